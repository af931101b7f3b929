"""GPUs of a host that has none, as its driver would tell of them."""

from __future__ import annotations

import os
from pathlib import Path

H200 = "0, GPU-11111111-2222-3333-4444-555555555555, NVIDIA H200, 580.95.05, 143771"
SECOND_H200 = H200.replace("0, GPU-1", "1, GPU-2")


def driver(path: Path, *lines: str) -> str:
    """A PATH on which nvidia-smi answers so."""
    path.mkdir(parents=True, exist_ok=True)
    program = path / "nvidia-smi"
    program.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines))
    program.chmod(0o755)
    return f"{path}:{os.environ['PATH']}"


__all__ = ["H200", "SECOND_H200", "driver"]
