"""Errors of the operating system in one line: which file it is, and what to do. Nothing else turns them into messages."""

import errno
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from slm_swap.common.errors import UserError
from slm_swap.common.settings import shown_path

ELSEWHERE = "choose another place with --out"
FULL = (errno.ENOSPC, errno.EDQUOT)
# What to do whatever the file is for; any other error has the advice of the place where it came up.
ADVICE = {
    **dict.fromkeys(FULL, "make room and run the same command again"),
    errno.EFBIG: "use a disk that takes files of that size, or raise ulimit -f",
    errno.EIO: "its disk, or the network in front of it, gives errors: copy what can be read to another disk, or try again",
    errno.ELOOP: "its symbolic links lead round in a circle: name the file itself",
    errno.ENAMETOOLONG: "choose a shorter name",
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "too many files are open: raise ulimit -n, or run less at a time"),
    **dict.fromkeys((errno.ESTALE, errno.ENOTCONN, errno.EHOSTDOWN), "its file system is away: mount it again, and run the same command again"),
}
WRITING = {errno.ENOENT: "its folder was moved or removed: put it back and run the same command again, or name its new place with {flag}"}
READING = dict.fromkeys((errno.EACCES, errno.EPERM), "you may not read it: change its permissions, or run as its owner")
# How PyTorch's C++ says that the disk took no more; it does not say why.
CUT_SHORT = re.compile(r"unexpected pos \d+ vs \d+|PytorchStreamWriter failed writing|basic_ios::clear: iostream error")
LOOP = "Symlink loop from "  # of Path.resolve
RUST = re.compile(r'\(os error (\d+)\)(?: at path "(.*?)")?')  # of safetensors and tokenizers


def os_error(error: OSError, doing: str, path: str | Path | None = None, advice: str | None = None) -> UserError:
    """The line for an error while `doing` something ("write", "read", "read the prices in") to a file; `path` is the one that a user knows, else the error's own.

    `advice` is what to do where the error itself does not say.
    """
    name = path if path is not None else error.filename
    flag = re.search(r"--[a-z-]+", advice or "")
    writing = {code: text.format(flag=flag[0] if flag else "--out") for code, text in WRITING.items()}
    known = ADVICE | {"write": writing, "read": READING}.get(doing.split()[0], {})
    why = error.strerror or " ".join(str(error).split()) or type(error).__name__
    what = why if name is None else f"cannot {doing} {shown_path(os.fsdecode(name))} ({why})"
    return UserError(f"{what}: {known.get(error.errno) or advice or 'check that place'}")


def without_advice(told: UserError) -> str:
    """What happened, of a line of `os_error`."""
    return f"{str(told).rpartition('): ')[0]})"


@contextmanager
def writing(path: str | Path, advice: str = ELSEWHERE) -> Iterator[None]:
    """Around what writes a file or a folder.

    Raises:
        UserError: for each error of the operating system, also where a package has wrapped it.
    """
    try:
        yield
    except Exception as error:
        found = error if isinstance(error, OSError) else wrapped(error)
        if found is None:
            raise
        raise os_error(found, "write", path, advice) from None


@contextmanager
def reading(path: str | Path, advice: str = "check the path", doing: str = "read") -> Iterator[None]:
    """Around what reads an input file, which is read several times: a pipe or a device is refused, where a read may never end.

    Raises:
        UserError: so, and for each error of the operating system.
    """
    try:
        mode = os.stat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise UserError(f"cannot {doing} {shown_path(path)}: it is no file but a pipe or a device: write what it gives to a file, and name that")
        yield
    except OSError as error:
        raise os_error(error, doing, path, advice) from None


def mendable(error: Exception) -> UserError | None:
    """The line for an error that no place has turned into one. None where it is a bug: it is none of the operating system's, or tells
    neither a file nor anything that a user can mend."""
    found = error if isinstance(error, OSError) else wrapped(error)
    if found is None or (found.filename is None and found.errno not in ADVICE):
        return None
    return os_error(found, "use")


def wrapped(error: BaseException) -> OSError | None:
    """The operating system's error that is behind another exception: a package's own class around its text, or a full disk that
    anything in the chain of exceptions tells of. None where there is none."""
    if found := _by_text(error):
        return found
    seen = set[int]()
    while (error := error.__cause__ or error.__context__) and id(error) not in seen:
        seen.add(id(error))
        found = error if isinstance(error, OSError) else _by_text(error)
        if found and found.errno in FULL:
            return found
    return None


def _by_text(error: BaseException) -> OSError | None:
    text = str(error)
    if isinstance(error, OSError) or not isinstance(error, Exception):
        return None
    if found := RUST.search(text):
        return OSError(int(found[1]), os.strerror(int(found[1])), *(found[2],) * bool(found[2]))
    if isinstance(error, RuntimeError):  # pathlib's, torch's
        if text.startswith(LOOP):
            return OSError(errno.ELOOP, os.strerror(errno.ELOOP), text.removeprefix(LOOP)[1:-1])
        for number in (*ADVICE, errno.EROFS, errno.EACCES):
            if text.endswith(os.strerror(number)):
                return OSError(number, os.strerror(number))
        if CUT_SHORT.search(text):
            return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return None
