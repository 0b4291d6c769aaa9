"""Mutations of files: of bytes, of JSON and YAML trees, of JSON Lines."""

import copy
import json
import random
import struct
from collections.abc import Callable
from typing import Any

import yaml

BOMB = "[" * 100_000
"""Nested more deeply than parsers go."""
DIGITS = "9" * 5_000
"""More than Python converts to an integer."""
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 7, 1 << 31, 1 << 63, -(1 << 63), 10**30, 0.5, -1e308, 1e-320),
    *(float("nan"), float("inf"), "", " ", "x", "1", "null", "..", "../x", "/etc/hostname", "a\0b"),
    *("<script>", "\ud800", "é" * 300, [], {}, [[]], {"": None}, [1, 2, 3], ["a"], {"a": {"b": 1}}),
)
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_DUMPER: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
_INTEGERS = (0, 1, -1, 1 << 31, -(1 << 31), (1 << 63) - 1, -(1 << 63))


def of_bytes(data: bytes, rng: random.Random) -> bytes:
    """Return ``data`` with one to three random changes."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        data = rng.choice(_BYTE_CHANGES)(data, rng)
    return data


def _place(data: bytes, rng: random.Random) -> int:
    """Return a place; headers at the beginning are more likely than what follows."""
    return rng.randrange(min(len(data), rng.choice((32, 256, 1 << 40))) or 1)


def _flip(data: bytes, rng: random.Random) -> bytes:
    at = _place(data, rng)
    return (
        data[:at]
        + bytes(byte ^ (1 << rng.randrange(8)) for byte in data[at : at + 1])
        + data[at + 1 :]
    )


def _overwrite(data: bytes, rng: random.Random) -> bytes:
    at, new = _place(data, rng), rng.randbytes(rng.choice((1, 2, 8, 64)))
    return data[:at] + new + data[at + len(new) :]


def _integer(data: bytes, rng: random.Random) -> bytes:
    at, value = _place(data, rng), rng.choice(_INTEGERS)
    return data[:at] + struct.pack("<q", value) + data[at + 8 :]


def _remove(data: bytes, rng: random.Random) -> bytes:
    at = _place(data, rng)
    return data[:at] + data[at + rng.choice((1, 4, 100)) :]


def _insert(data: bytes, rng: random.Random) -> bytes:
    at = _place(data, rng)
    return data[:at] + rng.choice((b"\0", b"\xff", b"\n", rng.randbytes(9))) + data[at:]


def _repeat(data: bytes, rng: random.Random) -> bytes:
    at = _place(data, rng)
    return data[:at] + data[at : at + 50] * rng.choice((2, 30)) + data[at + 50 :]


_BYTE_CHANGES: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    *(_flip, _flip, _overwrite, _integer, _remove, _insert, _repeat),
    lambda data, rng: data[: _place(data, rng)],
    lambda data, rng: data[: rng.randrange(len(data) + 1)],
    lambda data, rng: data + rng.randbytes(40),
    lambda data, rng: b"",
)


def of_tree(tree: Any, rng: random.Random) -> Any:
    """Return a deep copy of ``tree`` with one to three nodes replaced, removed, added or moved."""
    root = [copy.deepcopy(tree)]
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = list(_places(root))
        holder, key = rng.choice(places)
        change = rng.randrange(10)
        if change < 6 or holder is root:
            holder[key] = copy.deepcopy(rng.choice(ODD))
        elif change == 6:
            del holder[key]
        elif change == 7 and isinstance(holder, dict):
            holder[rng.choice(("x", "", "format", str(key) + "s"))] = holder.pop(key)
        elif change == 8 and isinstance(holder, list):
            holder += holder * rng.choice((1, 20))
        else:
            other, place = rng.choice(places)
            if other is not root:
                holder[key] = copy.deepcopy(other[place])
    return root[0]


def _places(node: Any) -> Any:
    keys = range(len(node)) if isinstance(node, list) else list(node)
    for key in keys:
        yield node, key
        if isinstance(node[key], (dict, list)):
            yield from _places(node[key])


def of_json(data: bytes, rng: random.Random) -> bytes:
    """Return a mutated JSON text."""
    if rng.random() < 0.3:
        return of_text(data, rng)
    return json.dumps(of_tree(json.loads(data), rng)).encode()


def of_json_lines(data: bytes, rng: random.Random) -> bytes:
    """Return JSON Lines with one line mutated, or mutated as text."""
    lines = data.splitlines()
    if not lines or rng.random() < 0.2:
        return of_text(data, rng)
    number = rng.randrange(len(lines))
    lines[number] = of_json(lines[number], rng)
    return b"\n".join(lines) + b"\n"


def of_yaml(data: bytes, rng: random.Random) -> bytes:
    """Return a mutated YAML text."""
    if rng.random() < 0.4:
        return of_text(data, rng)
    tree = of_tree(yaml.load(data, _LOADER), rng)
    try:
        return yaml.dump(tree, Dumper=_DUMPER, allow_unicode=False).encode()
    except UnicodeEncodeError:  # a lone surrogate
        return yaml.safe_dump(tree).encode("utf-8", "surrogatepass")


def of_text(data: bytes, rng: random.Random) -> bytes:
    """Return a text with odd syntax or mutated bytes."""
    at = _place(data, rng)
    colons = [place for place, byte in enumerate(data) if byte == ord(":")] or [at]
    value = rng.choice(colons) + 1
    end = data.find(b"\n", value)
    piece = rng.choice(_PIECES)
    if rng.random() < 0.4:
        return of_bytes(data, rng)
    if rng.random() < 0.5:
        return data[:value] + b" " + piece + data[end if end > 0 else len(data) :]
    return data[:at] + piece + data[at:]


_PIECES = (
    *(
        BOMB.encode(),
        DIGITS.encode(),
        b"-" + DIGITS.encode(),
        b"1e99999",
        b"0x1F",
        b"{",
        b"}",
        b"[",
        b"]",
    ),
    *(
        b"\n",
        b"\t",
        b"\0",
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b"*a",
        b"&a [*a]",
        b"<<: 1",
        b"? [1]",
        b"!!binary x",
    ),
    *(
        b"!!python/object/apply:os.system ['touch pwned']",
        b"2001-99-99",
        b"1:60:99",
        b".inf",
        b".nan",
    ),
    *(
        b"---\n",
        b"%YAML 9.9\n",
        b"- 1\n",
        b'"',
        b"'",
        b"|",
        b"NaN",
        b"Infinity",
        b"null",
        b"\\ud800",
    ),
    b"&a [x,x,x]\nb: &b [*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b]\nd: &d [*c,*c,*c,*c]\n",
)
