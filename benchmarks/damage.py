"""Damage to files, as disks, cables and hands do it: each kind takes bytes and a random source and gives other bytes."""

from collections.abc import Callable
from random import Random

BLOCK = 512  # bytes: what a lost sector makes zeros


def flipped(data: bytes, dice: Random) -> bytes:
    """One bit is another one."""
    at, whole = dice.randrange(len(data)), bytearray(data)
    whole[at] ^= 1 << dice.randrange(8)
    return bytes(whole)


def cut(data: bytes, dice: Random) -> bytes:
    """The end is missing."""
    return data[: dice.randrange(len(data))]


def zeroed(data: bytes, dice: Random) -> bytes:
    """A block, or in a small file a part of one, is zeros."""
    size = min(BLOCK, max(1, len(data) // 4))
    at = dice.randrange(len(data))
    return data[:at] + b"\0" * len(data[at : at + size]) + data[at + size :]


def _lines(data: bytes) -> list[bytes]:
    """Lines with their ends; of a file without any, pages of SQLite's."""
    lines = data.splitlines(keepends=True) if b"\0" not in data else []
    return lines if len(lines) > 1 else [data[at : at + 4096] for at in range(0, len(data), 4096)]


def doubled(data: bytes, dice: Random) -> bytes:
    """A line stands there twice."""
    lines = _lines(data)
    at = dice.randrange(len(lines))
    return b"".join(lines[: at + 1] + lines[at:])


def swapped(data: bytes, dice: Random) -> bytes:
    """Two lines stand in each other's place."""
    lines = _lines(data)
    one, other = dice.randrange(len(lines)), dice.randrange(len(lines))
    lines[one], lines[other] = lines[other], lines[one]
    return b"".join(lines)


def deleted(data: bytes, dice: Random) -> bytes:
    """A line is missing."""
    lines = _lines(data)
    del lines[dice.randrange(len(lines))]
    return b"".join(lines)


KINDS: dict[str, Callable[[bytes, Random], bytes]] = {
    "a flipped bit": flipped,
    "a cut": cut,
    "a zeroed block": zeroed,
    "a doubled line": doubled,
    "swapped lines": swapped,
    "a deleted line": deleted,
}
