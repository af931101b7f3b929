"""Lines gone wrong in every way we could think of, seeded; and some that only look wrong."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator

Mutation = Callable[[random.Random, bytes], bytes]
WORDS = (
    "tray",
    "R&amp;D",
    "caf\u00e9",
    "day&#8212;night",
    "\x93quoted\x94",
    "&notit;",
    "&#x110000;",
    '"',
    "\\",
    "\u3000",
    "😀",
    "",
    "&",
)


def good_line(rng: random.Random, number: int) -> bytes:
    """A well-formed product; now and then empty, or a repeat of another."""
    title, content = (" ".join(rng.choices(WORDS, k=rng.choice((0, 1, 2, 9)))) for _ in range(2))
    row = {"uid": f"{number:07d}", "title": title, "content": content, "target_ind": [1, 2], "target_rel": [1.0, 0.5]}
    return json.dumps(row, ensure_ascii=rng.random() < 0.5).encode()


def _insert(rng: random.Random, line: bytes, what: bytes) -> bytes:
    at = rng.randrange(len(line) + 1)
    return line[:at] + what + line[at:]


def _value(line: bytes, name: bytes, value: bytes) -> bytes:
    """The line with a further value for a key, which is the one that counts."""
    return line[:-1] + b', "' + name + b'": ' + value + b"}"


def _deep(rng: random.Random, line: bytes) -> bytes:
    depth = rng.choice((1, 50, 900, 2000, 20_000))
    missing = rng.choice((0, 0, 0, 1))
    return _value(line, b"x", b"[" * depth + b"]" * (depth - missing))


def _flip(rng: random.Random, line: bytes) -> bytes:
    at = rng.randrange(len(line))
    return line[:at] + bytes([line[at] ^ 1 << rng.randrange(8)]) + line[at + 1 :]


def _without(rng: random.Random, line: bytes) -> bytes:
    row = json.loads(line, parse_int=float)
    row.pop(rng.choice(("uid", "title", "content", "target_ind")), None)
    return json.dumps(row).encode()


VALUES = (
    b"1", b"-1.5e3", b"null", b"true", b"[]", b'["a"]', b"{}", b'{"a": {"b": [1]}}', b"1e999", b"-1e999", b"9" * 5000,
    b"0." + b"1" * 400, b"01", b"1.", b".5", b"+1", b"0x1", b"1e", b"NaN", b"-Infinity", b"Inf", b"nan", b"undefined", b"'a'",
    b'"a', b'"\\ud800"', b'"\\u12"', b'"\\x41"', b'"\\u0000"', b'"\\ud83d\\ude00"', b'"tab\there"', b'"a" "b"', b"", b'"fine"',
)  # fmt: skip
JUNK = (
    b"\x00", b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf5\x80\x80\x80", b"\xc0\xaf", b"\xef\xbb\xbf", b"\r", b"\t", b"\x1f", b"\x7f",
    b'"', b"}",
)  # fmt: skip

MUTATIONS: dict[str, Mutation] = {
    "truncated": lambda rng, line: line[: rng.randrange(len(line))],
    "beheaded": lambda rng, line: line[rng.randrange(1, len(line)) :],
    "junk inside": lambda rng, line: _insert(rng, line, rng.choice(JUNK)),
    "bit flipped": _flip,
    "field of another kind": lambda rng, line: _value(line, rng.choice((b"uid", b"title", b"content")), rng.choice(VALUES)),
    "odd value in a further key": lambda rng, line: _value(line, b"target_rel", rng.choice(VALUES)),
    "key given twice": lambda rng, line: _value(line, rng.choice((b"title", b"content", b"target_ind")), b'"again"'),
    "field missing": _without,
    "deep": _deep,
    "byte order mark": lambda rng, line: b"\xef\xbb\xbf" + line,
    "carriage return": lambda rng, line: line + b"\r",
    "space around": lambda rng, line: b"  \t" + line + b" \t\r",
    "two on a line": lambda rng, line: line + rng.choice((b"", b" ", b",")) + line,
    "no object": lambda rng, line: rng.choice((b"[%s]" % line, b"null", b"7", b'"text"', b"{}", b"[]", b"true")),
    "blank": lambda rng, line: rng.choice((b"", b" ", b"\r", b"\t \r", b"\x0c", b"\x00")),
    "comma": lambda rng, line: line[:-1] + b",}",
    "another encoding": lambda rng, line: line.decode().encode(rng.choice(("utf-16", "utf-16-le", "cp1252")), errors="replace"),
}


def mutated_lines(count: int, seed: int) -> Iterator[bytes]:
    """So many lines, each changed by one mutation or two; a line break that comes in that way makes two lines of one.

    What becomes of a line that is deep and holds a key twice depends on Python's stack (tasks/reading/rows.py), so there is none.
    """
    rng, kinds = random.Random(seed), list(MUTATIONS.values())
    for number in range(count):
        first, second = rng.choice(kinds), rng.choice(kinds)
        line = first(rng, good_line(rng, number))
        yield second(rng, line) if rng.random() < 0.2 and _deep not in (first, second) and _is_object(line) else line


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line.decode(), parse_int=float), dict)
    except (ValueError, RecursionError):
        return False


def corpus(count: int, seed: int) -> bytes:
    """A file of mutated lines between runs of good ones, so that some blocks are clean; with three very long lines."""
    rng, parts = random.Random(seed), list[bytes]()
    for number, line in enumerate(mutated_lines(count, seed)):
        if number % 500 == 0:
            parts.extend(good_line(rng, count + number + extra) for extra in range(500))
        parts.append(line)
    for size in (7_000_000, 10_000_000, 12_000_000):
        parts.insert(rng.randrange(len(parts)), b'{"uid": "long", "title": "t", "content": "%s"}' % (b"a" * size))
    return b"\n".join(parts)


def delimited_corpus(count: int, seed: int, delimiter: bytes = b",") -> tuple[bytes, int]:
    """Delimited text of good rows and rows gone wrong within their line, and how many rows it has.

    Quotes are mutated in a field of their own row only, so that which rows there are is never in doubt.
    """
    rng, parts = random.Random(seed), [delimiter.join((b"uid", b"title", b"content"))]
    odd = (b"\xff", b"\xc3", b"\x00", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"&#8217;", b"\\", b"'", b'""', b"\x1f", b"\x85")
    for number in range(count):
        fields = [
            f"{number:07d}".encode(),
            *(" ".join(rng.choices(WORDS, k=rng.choice((0, 1, 2, 9)))).encode() for _ in range(2)),
        ]
        if rng.random() < 0.3:
            at = rng.randrange(3)
            fields[at] = _insert(rng, fields[at], rng.choice(odd))
        if rng.random() < 0.1:
            fields = rng.choice((fields[:1], fields[:2], [*fields, b"more"], [*fields, b"", b""]))
        quoted = [b'"' + field.replace(b'"', b'""') + b'"' if rng.random() < 0.7 or b'"' in field else field for field in fields]
        parts.append(delimiter.join(quoted))
    return b"\n".join(parts) + b"\n", count


def byte_rows(count: int, seed: int) -> Iterator[dict[str, bytes | None]]:
    """Rows whose values are bytes of any kind, or none at all, as a table's column of bytes may hold them."""
    rng = random.Random(seed)
    for number in range(count):
        row: dict[str, bytes | None] = {"uid": f"{number:07d}".encode()}
        row |= {name: " ".join(rng.choices(WORDS, k=rng.choice((0, 1, 2, 9)))).encode() for name in ("title", "content")}
        for _ in range(rng.choice((0, 0, 1, 2))):
            name = rng.choice(("uid", "title", "content"))
            value = row[name] or b" "
            row[name] = rng.choice(
                (None, _insert(rng, value, rng.choice(JUNK)), _flip(rng, value), rng.randbytes(9), value[1:] * 99)
            )
        yield row


Turns = list[dict[str, object]]
CONTENTS: tuple[object, ...] = (
    "Hi", "", " ", None, 7, True, ["a"], {}, [{"type": "text", "text": "x"}], [{"type": "image_url"}], [7],
)  # fmt: skip
SHAPES: dict[str, Callable[[random.Random, Turns], object]] = {
    "as it is": lambda _, turns: turns,
    "turn missing": lambda rng, turns: turns[:-1] if rng.random() < 0.5 else turns[1:],
    "turn twice": lambda _, turns: [*turns, turns[-1]],
    "another role": lambda rng, turns: [
        turns[0] | {"role": rng.choice((None, 7, "tool", "system", "assistant", "narrator", ""))},
        *turns[1:],
    ],
    "a tool's call": lambda rng, turns: [*turns[:-1], turns[-1] | {"tool_calls": rng.choice(([], None, [{"id": 1}]))}],
    "odd content": lambda rng, turns: [*turns[:-1], turns[-1] | {"content": rng.choice(CONTENTS)}],
    "key missing": lambda rng, turns: [{"role": "user"}, *turns[1:]] if rng.random() < 0.5 else [{"content": "Hi"}, *turns],
    "no turns": lambda rng, turns: rng.choice((None, 7, "Hi", {}, [], [turns], [None])),
}


def odd_conversations(count: int, seed: int) -> Iterator[str]:
    """Messages as JSON: some well-formed, others gone wrong in their shape or cut off."""
    rng, shapes = random.Random(seed), list(SHAPES.values())
    for number in range(count):
        roles = ("user", "assistant") * rng.choice((1, 1, 2, 3))
        turns: Turns = [{"role": role, "content": f"{number} {rng.choice(WORDS)}"} for role in roles]
        text = json.dumps(rng.choice(shapes)(rng, turns))
        yield text[: rng.randrange(len(text))] if rng.random() < 0.05 else text


def odd_rows(count: int, seed: int) -> Iterator[dict[str, object]]:
    """Rows of JSON values of every kind under the keys of a product."""
    rng = random.Random(seed)
    values: tuple[object, ...] = (
        1,
        -1.5e3,
        None,
        True,
        [],
        ["a"],
        {},
        {"a": [1]},
        1e308,
        10**30,
        0.1,
        "a\tb",
        "\x85",
        "e\u0301",
        "\ud800",
    )
    for number in range(count):
        row: dict[str, object] = {"uid": f"{number:07d}"}
        row |= {name: " ".join(rng.choices(WORDS, k=rng.choice((0, 1, 9)))) for name in ("title", "content")}
        for _ in range(rng.choice((0, 0, 1, 2))):
            row[rng.choice(("uid", "title", "content", "x"))] = rng.choice(values)
        if rng.random() < 0.1:
            row.pop(rng.choice(("uid", "title", "content")), None)
        yield row


def damaged(data: bytes, rng: random.Random) -> bytes:
    """A file with a byte flipped, a stretch overwritten, cut out or doubled, or its end gone."""
    at, size = rng.randrange(len(data)), rng.choice((1, 1, 4, 64, 4096))
    match rng.randrange(5):
        case 0:
            return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
        case 1:
            return data[:at] + rng.randbytes(size) + data[at + size :]
        case 2:
            return data[:at] + data[at + size :]
        case 3:
            return data[:at] + data[at : at + size] + data[at:]
        case _:
            return data[:at]
