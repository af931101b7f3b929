r"""A JSON array of rows as JSON lines, whatever its size and however its lines are broken.

    [{"uid": "7",\n "title": "Pan"}, {"uid": "8"}]     ->     {"uid": "7",  "title": "Pan"}
                                                              {"uid": "8"}

The standard library's parser finds where a row ends; what the row holds is for the reader of lines. From a row on whose end
can't be found there is no telling rows apart, so the file is refused.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator

from tasks.reading.files.packing import ByteStream
from tasks.reading.rows import LineBlock
from tasks.refs import InputError

WHITE = re.compile(r"[ \t\r\n]*")
PIECE_BYTES = 2**16
"""At least so much is read at a time."""


def cut_array(stream: ByteStream, block_bytes: int, max_line_bytes: int) -> Iterator[LineBlock]:
    r"""Blocks of a JSON array's values, a line each, numbered as rows.

    >>> import io
    >>> list(cut_array(io.BytesIO(b'[{"a":\n1}, 2]'), 99, 99))
    [LineBlock(data=b'{"a": 1}\n2\n', first_line=1, line_bytes=0, unit='row', ends=None)]

    Raises:
        InputError: from the first row on whose end can't be found.
    """
    rows, first, size = list[bytes](), 1, 0
    for number, row in enumerate(array_values(stream, block_bytes, max_line_bytes), start=1):
        rows.append(row)
        size += len(row)
        if size >= block_bytes:
            yield LineBlock(b"\n".join([*rows, b""]), first, unit="row")
            rows, first, size = [], number + 1, 0
    if rows:
        yield LineBlock(b"\n".join([*rows, b""]), first, unit="row")


def array_values(stream: ByteStream, piece_bytes: int, max_value_bytes: int) -> Iterator[bytes]:
    """The values of a JSON array, each on one line.

    Raises:
        InputError: as cut_array.
    """
    text = ArrayText(stream, max(piece_bytes, PIECE_BYTES), max_value_bytes)
    text.expect("[")
    if text.peek() == "]":
        text.expect("]")
    else:
        mark = ","
        while mark == ",":
            yield text.value()
            mark = text.expect(",", "]")
    if rest := text.peek():
        raise text.wrong(f"got {rest!r} behind the array")


class ArrayText:
    """The text of an array, read as far as it is looked at."""

    def __init__(self, stream: ByteStream, piece_bytes: int, max_value_bytes: int) -> None:
        self._stream = stream
        self._piece_bytes = piece_bytes
        self._max = max_value_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        # numbers stay text: their digits may be many
        self._scan = json.JSONDecoder(parse_int=str, parse_float=str).raw_decode
        self._text, self._at, self._row = "", 0, 0

    def peek(self) -> str:
        """The next character that is no white space, empty at the end."""
        while True:
            found = WHITE.match(self._text, self._at)
            self._at = found.end() if found else self._at
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def expect(self, *marks: str) -> str:
        """Pass the next character, which is one of these.

        Raises:
            InputError: when it is none.
        """
        if (mark := self.peek()) not in marks or not mark:
            raise self.wrong(f"got {mark or 'the end of the file'!r} where {' or '.join(marks)} should be")
        self._at += 1
        return mark

    def value(self) -> bytes:
        """Pass the next value; it, on one line.

        Raises:
            InputError: when its end can't be found.
        """
        self._row += 1
        self.peek()
        while (end := self._end()) is None:
            if len(self._text) - self._at > self._max or not self._more():
                raise self.wrong(f"malformed, or longer than max_line_bytes={self._max:,}")
        text, self._at = self._text[self._at : end], end
        return text.replace("\n", " ").replace("\r", " ").encode("utf-8", "surrogatepass")

    def wrong(self, what: str) -> InputError:
        """The error at the present row."""
        return InputError(
            f"JSON array, row {self._row}: {what}; expected [, objects with commas between them, and ]. "
            "Mend the file, or write it as JSON lines, where a bad row costs no other."
        )

    def _end(self) -> int | None:
        """Where the value ends; None where it may go on beyond the text so far."""
        try:
            _, end = self._scan(self._text, self._at)
        except json.JSONDecodeError:
            return None
        except RecursionError:
            raise self.wrong("nested too deeply") from None
        return end if end < len(self._text) else None

    def _more(self) -> bool:
        """Take further text, as much as there is ahead already, and let go what has been passed."""
        data = self._stream.read(max(self._piece_bytes, len(self._text) - self._at))
        try:
            self._text = self._text[self._at :] + self._decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            raise self.wrong(f"invalid UTF-8 ({error.reason})") from None
        self._at = 0
        return bool(data)
