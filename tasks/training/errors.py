"""The meaning of libraries' errors."""

from __future__ import annotations


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error means that memory ran out; torch raises a bare RuntimeError for the CPU's.

    >>> is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"))
    True
    """
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


def first_line(error: Exception) -> str:
    """The first line of an error; its name if it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)
