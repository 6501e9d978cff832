"""Checkpoints of a training run, in a folder beside the adapter's until the adapter is complete.

The trainer writes a checkpoint file by file; one counts only with the marker that is written last, which has the hash of every file. A run
that is killed at any moment therefore goes on from its last whole checkpoint, and never from one that was damaged.
"""

import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from slm_swap.common.errors import UserError
from slm_swap.common.os_errors import ELSEWHERE, os_error, writing
from slm_swap.common.reports import read_json, sha256_file, write_json
from slm_swap.common.settings import display_path
from slm_swap.rows.lines import text_hash

RUN = "run.json"  # what the checkpoints are of
LOCK = "lock"  # held by the process that trains
MARKER = "complete.json"  # in a checkpoint that is whole
GO_ON = "let it be written, and go on with --resume"


class Checkpoints:
    """The folder `<out>.checkpoints` with `checkpoint-<step>` folders, as transformers names them."""

    def __init__(self, out: Path):
        self.folder = out.with_name(f"{out.name}.checkpoints")

    def path(self, step: int) -> Path:
        return self.folder / f"checkpoint-{step}"

    def steps(self) -> list[int]:
        """The steps of the whole checkpoints, in order."""
        return sorted(int(marker.parent.name.rsplit("-", 1)[1]) for marker in self.folder.glob(f"checkpoint-*/{MARKER}"))

    def run_id(self, resume: bool) -> str:
        """The id of the unfinished run that `resume` goes on with, else a new one: what its trace goes by."""
        known = read_json(self.folder / RUN, "train_unsloth.py") if resume and (self.folder / RUN).is_file() else {}
        return known.get("run_id") or str(uuid.uuid4())

    def open(self, run: dict[str, Any], resume: bool, run_id: str | None = None) -> None:
        """Make the folder ready for a run that `run` identifies, for this process alone; what a killed one left half written goes.

        Raises:
            UserError: there are checkpoints and `resume` is not asked for, or they are of another run; another process has the folder, or
                it cannot be made.
        """
        shown = display_path(self.folder)
        self._lock(shown)
        if steps := self.steps():
            if not resume:
                raise UserError(f"{shown} holds an unfinished run (step {steps[-1]}): go on with --resume, or delete that folder")
            kept, asked = read_json(self.folder / RUN, "train_unsloth.py"), json.loads(json.dumps(run))
            kept.pop("run_id", None)
            if differing := differences(kept, asked):
                raise UserError(f"{shown} is of another run ({'; '.join(differing)}): resume with that, or delete the folder")
        for inside in self.folder.iterdir():
            if inside.name not in {RUN, LOCK, *(self.path(step).name for step in steps)}:
                shutil.rmtree(inside) if inside.is_dir() else inside.unlink()
        write_json(self.folder / RUN, {**run, "run_id": run_id})

    def _lock(self, shown: str) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)  # closed when the process ends
        except OSError as error:
            raise os_error(error, "write", self.folder, ELSEWHERE) from None
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            os.close(descriptor)
            raise UserError(f"another process trains with {shown}: wait for its end, or choose another --out") from None
        except OSError:
            pass  # a file system without locks

    def latest(self, say: Callable[[str], object] = lambda _: None) -> tuple[Path, dict[str, Any]] | None:
        """The newest undamaged checkpoint and what `complete` was told of it; those that are passed over are said.

        Raises:
            UserError: there are checkpoints, and all of them are damaged.
        """
        steps = self.steps()
        for step in reversed(steps):
            progress, damage = self._read(step)
            if progress is not None:
                return self.path(step), progress
            say(f"{self.path(step).name} is damaged ({damage}) and is passed over")
        if steps:
            raise UserError(f"every checkpoint in {display_path(self.folder)} is damaged: delete that folder, and train again")
        return None

    def require_whole(self, step: int) -> Path:
        """The folder of a checkpoint that is not damaged.

        Raises:
            UserError: it is.
        """
        progress, damage = self._read(step)
        if progress is None:
            raise UserError(f"{display_path(self.path(step))}, the best step's, is damaged ({damage}): delete {display_path(self.folder)}, and train again")
        return self.path(step)

    def _read(self, step: int) -> tuple[dict[str, Any] | None, str]:
        """(what `complete` was told, ""), or (None, what is damaged)."""
        try:
            marker = json.loads((self.path(step) / MARKER).read_bytes())
            progress, kept = marker["progress"], marker["files"]
            if marker["sha256"] != _hash(progress, kept):
                return None, MARKER
            found = file_hashes(self.path(step))
        except (OSError, ValueError, TypeError, LookupError, RecursionError):
            return None, MARKER
        differing = sorted(name for name in kept.keys() | found.keys() if kept.get(name) != found.get(name))
        return (None, ", ".join(differing)) if differing else (progress, "")

    def complete(self, step: int, progress: dict[str, Any], best: int | None = None) -> None:
        """Mark a checkpoint as whole; of the others, the last one before it and the one of step `best` stay."""
        files = file_hashes(self.path(step))
        write_json(self.path(step) / MARKER, {"progress": progress, "files": files, "sha256": _hash(progress, files)}, GO_ON)
        steps = self.steps()
        with writing(self.folder, GO_ON):
            for other in set(steps) - {step, best, *[before for before in steps if before < step][-1:]}:
                (self.path(other) / MARKER).unlink()
                shutil.rmtree(self.path(other))

    def remove(self) -> None:
        """Remove the folder. The marks of whole checkpoints go first: a kill in the middle leaves no run that could not be gone on with."""
        with suppress(OSError):
            for step in self.steps():
                (self.path(step) / MARKER).unlink()
        shutil.rmtree(self.folder, ignore_errors=True)


def _hash(*values: Any) -> str:
    return text_hash(json.dumps(values, sort_keys=True))


def file_hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file in a checkpoint but its marker, by its name from there."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MARKER]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip((str(path.relative_to(folder)) for path in files), pool.map(sha256_file, files), strict=True))


def differences(kept: dict[str, Any], asked: dict[str, Any], name: str = "") -> list[str]:
    """Where two JSON objects differ: "key was this, is that"."""
    found = []
    for key in sorted(kept.keys() | asked.keys()):
        old, new, title = kept.get(key), asked.get(key), f"{name}{key}"
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{title}.")
        elif old != new:
            found.append(f"{title} was {old}, is {new}")
    return found
