"""Checkpoints of a training run, in a folder beside the adapter's until the adapter is complete.

The trainer writes a checkpoint file by file; one counts only with the marker that is written last. A run that is killed at any moment
therefore goes on from its last whole checkpoint.
"""

import fcntl
import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

from slm_swap.common.errors import UserError
from slm_swap.common.os_errors import ELSEWHERE, os_error
from slm_swap.common.reports import read_json, write_json
from slm_swap.common.settings import display_path

RUN = "run.json"  # what the checkpoints are of
LOCK = "lock"  # held by the process that trains
MARKER = "complete.json"  # in a checkpoint that is whole


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

    def latest(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest whole checkpoint and what `complete` was told of it."""
        steps = self.steps()
        return (self.path(steps[-1]), read_json(self.path(steps[-1]) / MARKER, "train_unsloth.py")) if steps else None

    def complete(self, step: int, progress: dict[str, Any], best: int | None = None) -> None:
        """Mark a checkpoint as whole; the others go, but for the one of step `best`."""
        write_json(self.path(step) / MARKER, progress)
        for other in set(self.steps()) - {step, best}:
            (self.path(other) / MARKER).unlink()
            shutil.rmtree(self.path(other))

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


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
