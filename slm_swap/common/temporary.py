"""Files and folders that are made beside their place and then moved there: a killed process leaves them, and the next one removes them.

Each has a name that says whose it is, `.NAME.HOST~PID~RANDOM`, and is locked while it is being made: one that is not locked is nobody's.
Some file systems keep locks to one machine, so what another machine has made must also have been left alone for an hour.
"""

import fcntl
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

FOREIGN_SECONDS = 3600.0


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())[:40] or "host"


@contextmanager
def beside(path: Path, folder: bool = False) -> Iterator[Path]:
    """The path of a new empty file, or folder, in the folder of `path`, which is there; it is gone afterwards unless it was moved.

    Raises:
        OSError: it cannot be made.
    """
    made, descriptor = None, None
    while descriptor is None:
        made = path.with_name(f".{path.name}.{_host()}~{os.getpid()}~{secrets.token_hex(4)}")
        made.mkdir() if folder else made.touch(0o644, exist_ok=False)
        descriptor = _locked(made, folder)
    try:
        yield made
    finally:
        remove(made)
        os.close(descriptor)


def _locked(made: Path, folder: bool) -> int | None:
    """A descriptor that holds the lock of what this process has just made; None where another one took it for a leftover before."""
    try:
        descriptor = os.open(made, (os.O_RDONLY if folder else os.O_RDWR) | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    with suppress(OSError):  # a file system without locks, on which nothing is removed
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    if os.fstat(descriptor).st_nlink and made.exists():
        return descriptor
    os.close(descriptor)
    return None


def remove_leftovers(path: Path) -> None:
    """Remove what killed processes have left of making `path`; what cannot be removed stays."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.([A-Za-z0-9-]+)~\d+~[0-9a-f]{{8}}")
    with suppress(OSError):
        for name in os.listdir(path.parent):
            if found := pattern.fullmatch(name):
                with suppress(OSError):
                    _remove_if_left(path.with_name(name), found[1] == _host())


def _remove_if_left(leftover: Path, own: bool) -> None:
    descriptor = os.open(leftover, (os.O_RDONLY if os.path.isdir(leftover) else os.O_RDWR) | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if own or time.time() - os.fstat(descriptor).st_mtime > FOREIGN_SECONDS:
            remove(leftover)
    finally:
        os.close(descriptor)


def remove(made: Path) -> None:
    """Remove a file or a folder, as far as it is there and can be."""
    if os.path.isdir(made):
        shutil.rmtree(made, ignore_errors=True)
    else:
        with suppress(OSError):
            made.unlink()
