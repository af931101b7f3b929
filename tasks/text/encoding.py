"""Text to token ids, many texts at a time, as the tokenizers library does it; word_encoding.py is faster where it can be.

Ids travel as `large_binary`, one value a text, four bytes an id, so that Arrow's kernels take and join them.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tasks.refs import InputError, Tokenizer

if TYPE_CHECKING:
    import pyarrow as pa
    from tokenizers import Tokenizer as Backend

Ids = NDArray[np.int32]
ID_BYTES = 4


class Encoded(NamedTuple):
    """Conversations: their ids as `large_binary`, and of all ids end to end which are learnt."""

    ids: pa.LargeBinaryArray
    learnt: NDArray[np.bool_]


_ahead: dict[str, Backend] = {}


def load_ahead(tokenizer: Tokenizer) -> None:
    """Load the data stages' libraries and a tokenizer before their turn; all threads wait while a tokenizer is loaded."""
    import polars  # noqa: F401  # pyright: ignore[reportUnusedImport]
    import pyarrow.json  # noqa: F401  # pyright: ignore[reportUnusedImport]

    with suppress(InputError):  # told when its turn comes
        _ahead[tokenizer.digest] = load_tokenizer_json(Path(tokenizer.path))


def take_tokenizer(tokenizer: Tokenizer) -> Backend:
    """A tokenizer, for encoding; it may have been loaded before.

    Raises:
        InputError: as load_tokenizer_json.
    """
    return _ahead.pop(tokenizer.digest, None) or load_tokenizer_json(Path(tokenizer.path))


def load_tokenizer_json(directory: Path) -> Backend:
    """The tokenizer of a directory, without padding and truncation.

    Raises:
        InputError: when the directory has no readable tokenizer.json.
    """
    from tokenizers import Tokenizer as Backend

    try:
        backend = Backend.from_file(str(directory / "tokenizer.json"))
    except Exception as error:  # the library raises bare exceptions
        raise InputError(
            f"{directory}: tokenizer.json: got {error}; expected a file of the tokenizers library. "
            "Name a model directory that has one in model.id."
        ) from error
    backend.no_padding()
    backend.no_truncation()
    return backend


def special_id(backend: Backend, token: str) -> int:
    """The id of a special token.

    Raises:
        InputError: when the tokenizer doesn't have it.
    """
    found = backend.token_to_id(token)
    if found is None:
        raise InputError(
            f"tokenizer.json: special token: got none for {token!r}; expected it among the added tokens. "
            "Name a model directory whose tokenizer_config.json and tokenizer.json fit each other."
        )
    return found


def from_ids(flat: Ids, offsets: NDArray[np.int64]) -> pa.LargeBinaryArray:
    """Ids of all texts end to end, and where each text's begin, as one binary value a text."""
    import pyarrow as pa

    buffers = [None, pa.py_buffer(offsets.astype(np.int64) * ID_BYTES), pa.py_buffer(np.ascontiguousarray(flat, dtype="<i4"))]
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(offsets) - 1, buffers)


def to_ids(texts: pa.LargeBinaryArray) -> tuple[Ids, NDArray[np.int64]]:
    """The inverse of `from_ids`, without a copy.

    >>> flat, offsets = to_ids(from_ids(np.array([7, 8, 9], np.int32), np.array([0, 2, 3])))
    >>> flat.tolist(), offsets.tolist()
    ([7, 8, 9], [0, 2, 3])
    """
    _, ends, data = texts.buffers()
    offsets = np.frombuffer(ends, np.int64)[texts.offset : texts.offset + len(texts) + 1] // ID_BYTES
    flat = np.frombuffer(data or b"", "<i4")[offsets[0] : offsets[-1]]
    return flat, offsets - offsets[0]


class BatchEncoder:
    """The tokenizer's own batch encoder; `plain` takes the text of special tokens for plain text."""

    def __init__(self, backend: Backend, *, plain: bool) -> None:
        self.backend = backend
        self.plain = plain
        self.token_bytes = token_bytes(backend)
        self._lock = threading.RLock()

    def encode(self, texts: pa.Array) -> pa.LargeBinaryArray:
        """The ids of each text, nothing added."""
        return self.encode_list(texts.to_pylist())

    def encode_list(self, texts: Sequence[str | list[str]], *, split: bool = False) -> pa.LargeBinaryArray:
        """As `encode`, from a list; with `split`, each text is a list of words, encoded one by one."""
        with self._configured():
            encodings = self.backend.encode_batch_fast(texts, is_pretokenized=split, add_special_tokens=False)
        rows = [row.ids for row in encodings]
        offsets = np.cumsum([0, *map(len, rows)])
        return from_ids(np.fromiter(chain.from_iterable(rows), np.int32, offsets[-1]), offsets)

    def token_ends(self, texts: pa.Array) -> list[list[int]]:
        """For each text, at which of its characters each id ends."""
        with self._configured():
            rows = self.backend.encode_batch(texts.to_pylist(), add_special_tokens=False)
        return [[end for _, end in row.offsets] for row in rows]

    @contextmanager
    def _configured(self) -> Generator[None]:
        """The backend with `plain` set: a setting of the whole object, so one thread at a time."""
        with self._lock:
            self.backend.encode_special_tokens = self.plain
            try:
                yield
            finally:
                self.backend.encode_special_tokens = False


def token_bytes(backend: Backend) -> Ids | None:
    """How many bytes of text each id stands for; None unless the vocabulary is byte-level and has every byte."""
    from tokenizers.pre_tokenizers import ByteLevel

    vocabulary = backend.get_vocab(with_added_tokens=True)
    whole = vocabulary.keys() >= set(ByteLevel.alphabet())
    if not whole or backend.normalizer is not None or described(backend.decoder).get("type") != "ByteLevel":
        return None
    sizes = np.zeros(max(vocabulary.values()) + 1, np.int32)
    sizes[list(vocabulary.values())] = list(map(len, vocabulary))  # one character stands for one byte
    for number, token in backend.get_added_tokens_decoder().items():
        sizes[number] = len(token.content.encode())
    return sizes


def described(part: Any) -> dict[str, Any]:
    """A part of a tokenizer as it stands in tokenizer.json."""
    return {} if part is None else json.loads(part.__getstate__())
