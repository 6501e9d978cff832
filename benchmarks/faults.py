"""A campaign of faults: kills, damaged files, full disks and odd Langfuse servers, and whether results survive them or the product says so.

    python benchmarks/faults.py
    python benchmarks/faults.py --minutes 10 --seed 7 --out /tmp/faults.json
    python benchmarks/faults.py --kills 0 --damage 0 --disks 0 --servers 0 --memory-rows 1000000
    python benchmarks/faults.py --only damage-17

The real scripts run on a few rows, in forks with everything loaded, against the simulated hosted endpoint over a real socket. Each trial has its own
seed, made of the campaign's and its name, so that one can be run alone (`--only`). What has to hold:

- kill: a script is killed, up to three times, and then run to its end. It ends in what an undisturbed run gives but for times (an adapter to the bit);
  no row is asked whose answer was kept; nothing is left behind; no traceback.
- damage: a file is damaged, and what reads it gives the same result, having told what it passed over, or refuses with one line and exit 2.
- disk: the disk is full, or the file may not be larger. One line and exit 2, and with room the same command goes on to the same result.
- server: Langfuse gives errors, pages, half answers or none. What is said to be sent is there; everything is, once, when the server is well again.

Not promised to be noticed, so counted apart (`not noticed`): damage to input rows, recorded replies, decisions and training_info.json that leaves them
valid, and a trace file that ends earlier or lacks whole lines. `failed` has the trials that failed; exit code 1 if there is one.
"""

import argparse
import contextlib
import json
import logging
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere

from damage import KINDS
from fault_stages import SCRIPTS, STAGES, Recorder, Scene, Stage, choose_rows, kept_rows, row_number, write_inputs
from forked import Before, Ended, Fault, InWrite, Moment, load, run_script

from slm_swap.cli import Parser, minutes, not_negative, positive, run
from slm_swap.common.errors import UserError
from slm_swap.common.reports import code_version, hardware, now, package_versions, write_json, write_jsonl
from slm_swap.common.settings import PACKAGE, ROOT, display_path
from slm_swap.rows.examples import read_examples
from tests.support.langfuse_server import LangfuseServer

ROWS = 30
FAILURES = ("lost", "wrong silently", "traceback", "left over", "hung")
OUTCOMES = ("went on", "told", "refused", "not noticed", *FAILURES)
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
ENDS = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: -signal.SIGTERM, signal.SIGINT: 130}  # exit codes, as subprocess has them
# How often each stage is killed, of all.
KILLED = {
    "eval": 5, "eval --cache": 3, "eval of replies": 4, "live_compare": 3, "label": 4, "prepare_data": 3, "train": 1, "merge": 2, "compare": 3, "render_report": 2,
}  # fmt: skip
FILLED = {"eval": 4, "eval of replies": 3, "label": 2, "prepare_data": 2, "train": 1}
AGAIN = ("exists already", "is there already", "is a finished report of another run")  # what a finished command says when it is run once more


class Failed(Exception):
    """A trial's failure: one of FAILURES, and why."""

    def __init__(self, outcome: str, why: str):
        super().__init__(why)
        self.outcome = outcome


@dataclass(frozen=True)
class Whole:
    """An undisturbed run of a stage: how it ended, what it gave and left, and the bytes of its largest file."""

    ended: Ended
    outcome: Any
    files: set[str]
    largest: int


class Campaign:
    """What the trials of one campaign share: the scene, undisturbed runs by stage, and what half-done runs have left, by name."""

    def __init__(self, scene: Scene, seed: int):
        self.scene, self.seed, self.whole, self.left = scene, seed, dict[str, Whole](), dict[str, Path]()
        self.traced: list[str] = []  # names of the spans and scores of a traced run

    def run(self, stage: Stage, folder: Path, trial: str, session: int = 1, fault: Fault = None, more: tuple = (), changes: bool = False, **environment: str) -> Ended:
        words = [*stage.words(self.scene, folder), *more]
        return run_script(stage.script, words, folder, self.scene.environment(trial, session, **environment), fault, changes)

    def prepare(self) -> None:
        """Run every stage undisturbed, and some of them half-way."""
        folder = self.scene.folder
        for name in ("eval", "eval --cache", "eval of replies", "live_compare", "label", "prepare_data", "train"):
            self._undisturbed(name)
        shutil.copytree(folder / "whole/train/adapter", folder / "adapter")
        (folder / "sides").mkdir()
        for side, stage in (("azure", "eval"), ("slm", "eval of replies")):
            for end in (".json", ".rows.jsonl"):
                shutil.copy(folder / f"whole/{stage}/report{end}", folder / f"sides/{side}{end}")
        for name, given in (("eval --adapter", "adapter"), ("merge", None), ("merge of a copy", "adapter"), ("compare", None)):
            self._undisturbed(name, given and [folder / given])
        self._undisturbed("compare of copies", sorted((folder / "sides").iterdir()))
        self._undisturbed("render_report", [folder / "whole/compare/decision.json"])
        self._half_done("eval", InWrite(int(0.8 * self.whole["eval"].largest)))
        saving = next(at for at, change in enumerate(self.whole["train"].ended.changes, 1) if "checkpoints/adapter" in change)
        self._half_done("train", Before(saving, signal.SIGKILL))
        stage = STAGES["eval of replies"]
        with langfuse() as server:
            self._require(stage, self.run(stage, self._place("traced"), "whole", **keys(server.url)))
            self.traced = server.arrived()
            server("server.refuse()")
            self.left["traced"] = self._place("untold")
            self._require(stage, self.run(stage, self.left["traced"], "whole", 1, None, ("--langfuse-optional",), **keys(server.url)))

    def _place(self, name: str) -> Path:
        place = self.scene.folder / "whole" / name
        place.mkdir(parents=True)
        return place

    def _undisturbed(self, name: str, given: list[Path] | None = None) -> None:
        stage, place = STAGES[name], self._place(name)
        for path in given or ():
            shutil.copytree(path, place / path.name) if path.is_dir() else shutil.copy(path, place)
        ended = self.run(stage, place, "whole", changes=True)
        self._require(stage, ended)
        sizes = [path.stat().st_size for path in place.rglob("*") if path.is_file()]
        self.whole[name] = Whole(ended, stage.found(place), files_of(place), max(sizes))

    def _half_done(self, name: str, fault: Fault) -> None:
        place = self._place(f"half {name}")
        ended = self.run(STAGES[name], place, "half", fault=fault)
        if ended.code >= 0:
            raise RuntimeError(f"{name} was not killed: {ended.error}")
        self.left[name] = place

    @staticmethod
    def _require(stage: Stage, ended: Ended) -> None:
        if ended.code not in stage.codes:
            raise RuntimeError(f"{stage.name} ended with {ended.code} undisturbed: {ended.error}")


def files_of(folder: Path) -> set[str]:
    """All files below a folder; a database's own helpers apart."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and not path.name.endswith(("-wal", "-shm"))}


def require_no_traceback(ended: Ended) -> None:
    if ended.hung:
        raise Failed("hung", ended.error)
    if "Traceback" in ended.error + ended.said or ended.code == 1:
        raise Failed("traceback", ended.error)


def is_refused(ended: Ended) -> bool:
    """Whether a run ended with one line and exit 2; warnings may stand before it."""
    lines = [line for line in ended.error.splitlines() if not line.startswith("warning: ") and "answered already" not in line]
    return ended.code == 2 and len(lines) == 1 and lines[0].startswith("error: ")


def require_outcome(stage: Stage, folder: Path, whole: Whole, apart: frozenset[str] = frozenset()) -> None:
    """`apart`: files that may be there besides."""
    try:
        found = stage.found(folder)
    except (OSError, ValueError, KeyError) as error:
        raise Failed("lost", f"{type(error).__name__}: {error}") from None
    if found != whole.outcome:
        raise Failed("wrong silently", first_difference(found, whole.outcome))
    if more := files_of(folder) - whole.files - apart:
        raise Failed("left over", ", ".join(sorted(more)))


def first_difference(found: Any, wanted: Any, name: str = "") -> str:
    """Where two JSON values differ, for a failure's line."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        keys = [key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key)]
        return first_difference(found.get(keys[0]), wanted.get(keys[0]), f"{name}.{keys[0]}")
    if isinstance(found, (list, tuple)) and isinstance(wanted, (list, tuple)) and len(found) == len(wanted):
        at = next(at for at, pair in enumerate(zip(found, wanted, strict=True)) if pair[0] != pair[1])
        return first_difference(found[at], wanted[at], f"{name}[{at}]")
    return f"{name} is {str(found)[:200]}, not {str(wanted)[:200]}"


# -- Kills -----------------------------------------------------------------------------------------------------------------------


def draw_fault(dice: Random, whole: Whole) -> Fault:
    """A kill at a random moment, before a random change of a file, or in the middle of a write."""
    kind, number = dice.random(), dice.choice(SIGNALS)
    if kind < 0.5:
        return Before(dice.randint(1, len(whole.ended.changes)), number)
    if kind < 0.8:
        return Moment(dice.uniform(0, whole.ended.seconds), number)
    return InWrite(dice.randint(1, whole.largest))


def kill(campaign: Campaign, trial: str, folder: Path, dice: Random) -> Iterator[tuple[str, str]]:
    (name,) = dice.choices(list(KILLED), list(KILLED.values()))
    stage, whole = STAGES[name], campaign.whole[name]
    journal, kept, more, sessions = folder / (stage.journal or "none"), set[int](), (), 0
    if name == "render_report":
        shutil.copy(campaign.scene.folder / "whole/compare/decision.json", folder)

    def session(fault: Fault = None) -> Ended:
        nonlocal sessions
        sessions += 1
        ended = campaign.run(stage, folder, trial, sessions, fault, more)
        asked = [row for of, row in campaign.scene.asked(trial) if of == sessions]
        if again := kept & set(asked):
            raise Failed("lost", f"session {sessions} asked rows {sorted(again)} again, whose answers were kept")
        if len(asked) != len(set(asked)):
            raise Failed("lost", f"session {sessions} asked a row twice")
        kept.update(map(row_number, kept_rows(journal)))
        require_no_traceback(ended)
        return ended

    for _ in range(dice.randint(1, 3)):
        fault = draw_fault(dice, whole)
        ended = session(fault)
        if ended.code in stage.codes:
            break  # it was faster
        if isinstance(fault, InWrite):
            if ended.code != -signal.SIGXFSZ:
                raise Failed("lost", f"{fault}: it ended with {ended.code}: {ended.error}")
            yield "in a write", "killed"
        elif any(text in ended.error for text in AGAIN):
            break
        elif ended.code != ENDS[fault.signal]:
            raise Failed("lost", f"{fault}: it ended with {ended.code}: {ended.error}")
        else:
            yield signal.Signals(fault.signal).name, "killed"
    else:
        ended = session()
    told = "went on"
    if ended.code == 2 and name == "live_compare" and AGAIN[2] in ended.error:  # Ctrl-C has saved the first rows as reports of their own
        if not is_refused(ended):
            raise Failed("lost", ended.error)
        told, more = "refused", ("--overwrite",)
        ended = session()
    if ended.code == 2 and name == "merge" and AGAIN[0] in ended.error and is_refused(ended):  # it was killed when the checkpoint was in its place
        told = "refused"
    elif ended.code != whole.ended.code:
        raise Failed("lost", f"the last session ended with {ended.code}: {ended.error}")
    require_outcome(stage, folder, whole)
    yield name, told


# -- Damage ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Harm:
    """A file that is damaged, in what was copied to a trial's folder, and the stage that reads it. `whole`: as it was written."""

    path: Path
    kind: str
    whole: bytes
    damaged: bytes


def harm(path: Path, dice: Random, kinds: tuple[str, ...] = tuple(KINDS)) -> Harm:
    """Damage a file, until it is another one."""
    whole = path.read_bytes()
    while True:
        kind = dice.choice(kinds)
        damaged = KINDS[kind](whole, dice)
        if damaged != whole:
            path.write_bytes(damaged)
            return Harm(path, kind, whole, damaged)


def judged(stage: Stage, ended: Ended, folder: Path, whole: Whole, must_tell: bool = False, promised: bool = True) -> str:
    """What became of a run on a damaged file."""
    require_no_traceback(ended)
    if is_refused(ended):
        return "refused"
    if ended.code not in stage.codes:
        raise Failed("lost", f"it ended with {ended.code}: {ended.error}")
    try:
        require_outcome(stage, folder, whole, frozenset(files_of(folder)))
    except Failed:
        if promised:
            raise
        return "not noticed"
    told = "damaged" in ended.error + ended.said
    if must_tell and not told:
        raise Failed("wrong silently", "damage was passed over, and nothing said so")
    return "told" if told else "went on"


def copy_into(folder: Path, source: Path) -> None:
    shutil.copytree(source, folder, dirs_exist_ok=True)


def damage_journal(campaign: Campaign, trial: str, folder: Path, dice: Random) -> tuple[str, str]:
    copy_into(folder, campaign.left["eval"])
    stage = STAGES["eval"]
    done = harm(folder / stage.journal, dice)
    written = set(done.whole.splitlines(keepends=True))
    must_tell = any(line.endswith(b"\n") and line not in written for line in done.damaged.splitlines(keepends=True))
    kept = {row_number(line) for line in kept_rows(done.path) if line in written}
    ended = campaign.run(stage, folder, trial)
    outcome = judged(stage, ended, folder, campaign.whole["eval"], must_tell)
    if again := kept & {row for _, row in campaign.scene.asked(trial)}:
        raise Failed("lost", f"rows {sorted(again)} are asked again, whose lines are whole")
    return done.kind, outcome


def damage_cache(campaign: Campaign, trial: str, folder: Path, dice: Random) -> tuple[str, str]:
    copy_into(folder / "cache", campaign.scene.folder / "whole/eval --cache/cache")
    stage = STAGES["eval --cache"]
    done = harm(folder / "cache/replies.sqlite3", dice)
    return done.kind, judged(stage, campaign.run(stage, folder, trial), folder, campaign.whole["eval --cache"])


def damage_checkpoint(campaign: Campaign, trial: str, folder: Path, dice: Random) -> tuple[str, str]:
    copy_into(folder, campaign.left["train"])
    stage, checkpoints = STAGES["train"], folder / "adapter.checkpoints"
    steps = sorted(checkpoints.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    files = [path for path in [*checkpoints.glob("run.json"), *(steps[-1] if dice.random() < 0.8 else checkpoints).rglob("*")] if path.is_file() and path.stat().st_size]
    done = harm(dice.choice(files), dice)
    must_tell = steps[-1] in done.path.parents
    return done.kind, judged(stage, campaign.run(stage, folder, trial), folder, campaign.whole["train"], must_tell)


def damage_adapter(campaign: Campaign, trial: str, folder: Path, dice: Random) -> tuple[str, str]:
    copy_into(folder / "adapter", campaign.scene.folder / "adapter")
    stage = STAGES[dice.choice(("eval --adapter", "merge of a copy"))]
    read = [path for path in sorted((folder / "adapter").iterdir()) if not path.name.startswith("training_log")]
    done = harm(dice.choice(read), dice)
    promised = done.path.name != "training_info.json"
    return done.kind, judged(stage, campaign.run(stage, folder, trial), folder, campaign.whole[stage.name], promised=promised)


def damage_result(campaign: Campaign, trial: str, folder: Path, dice: Random) -> tuple[str, str]:
    copy_into(folder, campaign.scene.folder / "sides")
    stage = STAGES["compare of copies"]
    done = harm(folder / dice.choice(("azure.rows.jsonl", "slm.rows.jsonl", "azure.json", "slm.json")), dice)
    return done.kind, judged(stage, campaign.run(stage, folder, trial), folder, campaign.whole[stage.name])


def damage_decision(campaign: Campaign, trial: str, folder: Path, dice: Random) -> tuple[str, str]:
    shutil.copy(campaign.scene.folder / "whole/compare/decision.json", folder)
    stage = STAGES["render_report"]
    done = harm(folder / "decision.json", dice)
    return done.kind, judged(stage, campaign.run(stage, folder, trial), folder, campaign.whole[stage.name], promised=False)


def damage_input(campaign: Campaign, trial: str, folder: Path, dice: Random) -> tuple[str, str]:
    stage = STAGES["eval of replies"]
    name = dice.choice(("rows.jsonl", "replies.jsonl"))
    shutil.copy(campaign.scene.folder / name, folder)
    done = harm(folder / name, dice)
    words = [folder / name if word == campaign.scene.folder / name else word for word in stage.words(campaign.scene, folder)]
    ended = run_script(stage.script, words, folder, campaign.scene.environment(trial, 1))
    return done.kind, judged(stage, ended, folder, campaign.whole[stage.name], promised=False)


def damage_trace(campaign: Campaign, trial: str, folder: Path, dice: Random) -> tuple[str, str]:
    shutil.copy(campaign.left["traced"] / "report.traces.jsonl", folder)
    done = harm(folder / "report.traces.jsonl", dice)
    with langfuse() as server:
        ended = resend(campaign, trial, folder, server)
        arrived, wanted = Counter(server.arrived()), Counter(campaign.traced)
    if ended.hung or "Traceback" in ended.error:
        raise Failed("traceback", ended.error)
    if arrived - wanted:
        raise Failed("wrong silently", f"{arrived - wanted} were not in the file")
    if ended.code == 1:
        if not done.path.exists():
            raise Failed("lost", "the file is gone, though not all of it was sent")
        return done.kind, "told"
    if ended.code:
        raise Failed("lost", ended.error)
    if arrived != wanted:
        if done.kind not in ("a cut", "a deleted line"):
            raise Failed("wrong silently", f"{wanted - arrived} did not arrive, and the file counts as sent")
        return done.kind, "not noticed"
    return done.kind, "went on"


DAMAGED: dict[str, tuple[int, Callable[[Campaign, str, Path, Random], tuple[str, str]]]] = {  # how often, of all
    "journal": (7, damage_journal),
    "reply cache": (4, damage_cache),
    "checkpoint": (2, damage_checkpoint),
    "adapter": (3, damage_adapter),
    "trace file": (2, damage_trace),
    "rows and reports": (5, damage_result),
    "decision": (2, damage_decision),
    "input rows and replies": (2, damage_input),
}


def damage(campaign: Campaign, trial: str, folder: Path, dice: Random) -> Iterator[tuple[str, str]]:
    (name,) = dice.choices(list(DAMAGED), [weight for weight, _ in DAMAGED.values()])
    kind, outcome = DAMAGED[name][1](campaign, trial, folder, dice)
    yield kind, "damaged"
    yield name, outcome


# -- Disks -----------------------------------------------------------------------------------------------------------------------


def can_mount() -> bool:
    """Whether this process may mount a tmpfs."""
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(OSError):
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "none", folder], capture_output=True).returncode == 0:
            return subprocess.run(["umount", folder]).returncode == 0
    return False


def disk(campaign: Campaign, trial: str, folder: Path, dice: Random) -> Iterator[tuple[str, str]]:
    (name,) = dice.choices(list(FILLED), list(FILLED.values()))
    stage, whole = STAGES[name], campaign.whole[name]
    mounted, place = can_mount() and dice.random() < 0.7, folder / "disk"
    place.mkdir()
    largest, kept = max(whole.largest, 1 << 14), set[int]()
    if mounted:
        size = int(largest ** dice.uniform(0.6, 1) * 2) // 4096 * 4096 + 4096
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", place], check=True)
    try:
        ended = campaign.run(stage, place, trial, 1, None if mounted else InWrite(dice.randint(1, whole.largest), killed=False))
        require_no_traceback(ended)
        how = "went on"
        if ended.code not in stage.codes:
            if not is_refused(ended):
                raise Failed("lost", f"it ended with {ended.code}: {ended.error}")
            how = "refused"
            kept = {row_number(line) for line in kept_rows(place / (stage.journal or "none"))}
            if mounted:
                subprocess.run(["mount", "-o", "remount,size=256m", place], check=True)
            ended = campaign.run(stage, place, trial, 2)
            require_no_traceback(ended)
        if ended.code != whole.ended.code:
            raise Failed("lost", f"with room it ended with {ended.code}: {ended.error}")
        require_outcome(stage, place, whole)
        if again := kept & {row for of, row in campaign.scene.asked(trial) if of == 2}:
            raise Failed("lost", f"rows {sorted(again)} are asked again, whose answers were kept")
    finally:
        if mounted:
            subprocess.run(["umount", "-l", place], check=True)
    yield "a full disk" if mounted else "a limit on a file's size", "tried"
    yield name, how


# -- Langfuse --------------------------------------------------------------------------------------------------------------------

PAGE = "b'<html><body>We are back soon</body></html>'"
TROUBLES = {
    "500": "server.status = 500",
    "503 half of the time": "server.flaky = 0.5",
    "200 with a page": f"server.raw = (200, 'text/html', {PAGE})",
    "200 with half a JSON": "server.raw = (200, 'application/json', b'{\"succ')",
    "slow": "server.delay = 1.5",
    "silent": "server.hanging = True",
    "refused connections": "server.refuse()",
    "partial success": "server.rejected_spans = 3",
    "bodies too large": "server.largest = 2000",
    "wrong keys": "server.keys = 'pk-lf-other:sk-lf-other'",
}
WELL = (
    "server.delay = server.flaky = server.rejected_spans = 0; server.hanging = False; server.status = server.raw = server.largest = None; "
    f"server.keys = {'pk-lf-faults:sk-lf-right'!r}; server._server or server.accept()"
)
ARRIVED = "{**{span.id: span.name for span in server.spans}, **{score['id']: score['name'] for score in server.scores}}"


def keys(url: str) -> dict[str, str]:
    return {"LANGFUSE_DISABLED": "0", "LANGFUSE_PUBLIC_KEY": "pk-lf-faults", "LANGFUSE_SECRET_KEY": "sk-lf-right", "LANGFUSE_BASE_URL": url}


class RemoteServer:
    """The tests' recording Langfuse in a process of its own: a call runs a statement there."""

    def __init__(self, connection: Any, url: str):
        self.url, self._connection = url, connection

    def __call__(self, statement: str) -> None:
        self._connection.send((statement, None))
        self._connection.recv()

    def arrived(self) -> list[str]:
        """Names of the spans and scores that arrived, each once by its id."""
        self._connection.send((None, ARRIVED))
        return list(self._connection.recv().values())


@contextlib.contextmanager
def langfuse() -> Iterator[RemoteServer]:
    here, there = multiprocessing.Pipe()
    child = os.fork()
    if not child:
        with ended_with(here), LangfuseServer("pk-lf-faults") as server:
            there.send(server.url)
            while asked := there.recv():
                statement, expression = asked
                if statement:
                    exec(statement, {"server": server, "threading": threading})
                there.send(eval(expression, {"server": server}) if expression else None)
    there.close()
    try:
        yield RemoteServer(here, here.recv())
    finally:
        here.close()
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@contextlib.contextmanager
def ended_with(other_end: Any = None) -> Iterator[None]:
    """In a fork: it ends with the block, whatever happens there."""
    try:
        if other_end:
            other_end.close()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        yield
    except EOFError:
        pass
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def resend(campaign: Campaign, trial: str, folder: Path, server: RemoteServer) -> Ended:
    return run_script("01_eval/resend_traces.py", [folder], folder, campaign.scene.environment(trial, 9, **keys(server.url)))


def server(campaign: Campaign, trial: str, folder: Path, dice: Random) -> Iterator[tuple[str, str]]:
    stage, trouble = STAGES["eval of replies"], dice.choice(list(TROUBLES))
    with langfuse() as remote:
        later = dice.uniform(0, 0.5) if dice.random() < 0.5 else 0  # seconds
        remote(f"threading.Timer({later}, lambda: exec({TROUBLES[trouble]!r}, {{'server': server}})).start()" if later else TROUBLES[trouble])
        ended = campaign.run(stage, folder, trial, 1, None, ("--langfuse-optional",), **keys(remote.url))
        require_no_traceback(ended)
        if ended.code:
            raise Failed("lost", f"it ended with {ended.code}: {ended.error}")
        traces = folder / "report.traces.jsonl"
        missing = Counter(campaign.traced) - Counter(remote.arrived())
        if missing and not traces.exists():
            raise Failed("lost", f"{missing} did not arrive, and the file is gone")
        told = "told" if traces.exists() else "went on"
        if traces.exists() and "have not reached" not in ended.error and "cannot be reached" not in ended.error:
            raise Failed("wrong silently", f"the file stays, and nothing said so: {ended.error}")
        if traces.exists():
            again = resend(campaign, trial, folder, remote)
            if "Traceback" in again.error:
                raise Failed("traceback", again.error)
            missing = Counter(campaign.traced) - Counter(remote.arrived())
            if missing and not traces.exists():
                raise Failed("lost", f"{missing} did not arrive, and the file is gone after a second try")
        remote(WELL)
        if traces.exists():
            again = resend(campaign, trial, folder, remote)
            if again.code or traces.exists():
                raise Failed("lost", f"it was not sent to the healthy server: {again.error}")
        if Counter(remote.arrived()) != Counter(campaign.traced):
            raise Failed("lost", f"{Counter(campaign.traced) - Counter(remote.arrived())} did not arrive")
    require_outcome(stage, folder, campaign.whole[stage.name])
    yield trouble, told


# -- The campaign ----------------------------------------------------------------------------------------------------------------

TRIALS: dict[str, Callable[[Campaign, str, Path, Random], Iterator[tuple[str, str]]]] = {"kill": kill, "damage": damage, "disk": disk, "server": server}


def trial_seed(seed: int, trial: str) -> Random:
    return Random(f"{seed}:{trial}")


def one_trial(campaign: Campaign, trial: str) -> dict[str, Any]:
    """What came of a trial: (what, outcome) of each part of it, and why it failed."""
    kind, folder = trial.partition("-")[0], Path(tempfile.mkdtemp(prefix=f"{trial}-", dir=campaign.scene.folder))
    told: list[tuple[str, str]] = []
    began, why = time.monotonic(), None
    try:
        told += TRIALS[kind](campaign, trial, folder, trial_seed(campaign.seed, trial))
    except Failed as failure:
        told.append(("failed", failure.outcome))
        why = f"{failure.outcome}: {' '.join(str(failure).split())[-1500:]}"
    except Exception:
        told.append(("failed", "of the campaign itself"))
        why = traceback.format_exc()
    shutil.rmtree(folder, ignore_errors=True)
    return {"trial": trial, "told": told, "why": why, "seconds": time.monotonic() - began}


class Trials:
    """Trials side by side, each in a fork of this process."""

    def __init__(self, campaign: Campaign, jobs: int):
        self.campaign, self.jobs = campaign, jobs
        self.running: dict[Any, int] = {}

    def results(self, trials: Iterator[str]) -> Iterator[dict[str, Any]]:
        """What came of each trial, as they end; `trials` is asked for the next one when there is room."""
        more = True
        try:
            while more or self.running:
                while more and len(self.running) < self.jobs:
                    trial = next(trials, None)
                    if more := trial is not None:
                        self._start(trial)
                for end in multiprocessing.connection.wait(list(self.running)) if self.running else ():
                    result = end.recv()
                    os.waitpid(self.running.pop(end), 0)
                    end.close()
                    yield result
        finally:
            for child in self.running.values():
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)

    def _start(self, trial: str) -> None:
        here, there = multiprocessing.Pipe(duplex=False)
        child = os.fork()
        if not child:
            with ended_with(here):
                there.send(one_trial(self.campaign, trial))
        there.close()
        self.running[here] = child


class Counts:
    """What came of all trials, by kind and by what was hit."""

    def __init__(self) -> None:
        self.trials: Counter[str] = Counter()
        self.killed: Counter[str] = Counter()
        self.damaged: Counter[str] = Counter()
        self.disks: Counter[str] = Counter()
        self.outcomes: dict[str, dict[str, Counter[str]]] = {kind: {} for kind in TRIALS}
        self.failed: dict[str, str] = {}

    def add(self, result: dict[str, Any]) -> None:
        kind = result["trial"].partition("-")[0]
        self.trials[kind] += 1
        apart = {"killed": self.killed, "damaged": self.damaged, "tried": self.disks}
        for what, outcome in result["told"]:
            if outcome in apart:
                apart[outcome][what] += 1
            else:
                self.outcomes[kind].setdefault(what, Counter())[outcome] += 1
        if result["why"]:
            self.failed[result["trial"]] = result["why"]

    def to_json(self) -> dict[str, Any]:
        told = {kind: {"trials": self.trials[kind]} | self._sums(kind) for kind in TRIALS}
        told["kill"] |= {"kills": self.killed.total(), "by_signal": dict(self.killed)}
        told["damage"] |= {"by_kind": dict(self.damaged)}
        told["disk"] |= {"by_kind": dict(self.disks)}
        return told | {"failed": dict(sorted(self.failed.items()))}

    def _sums(self, kind: str) -> dict[str, Any]:
        """Every outcome's sum, failures of which there are none too; and by what was hit."""
        sums = sum(self.outcomes[kind].values(), Counter())
        return {"outcomes": {name: sums[name] for name in (*OUTCOMES, *sorted(set(sums) - set(OUTCOMES)))}, "by": {name: dict(found) for name, found in sorted(self.outcomes[kind].items())}}


def planned(args: argparse.Namespace, counts: Counts) -> Iterator[str]:
    """Names of trials, the kinds mixed, until there are as many as asked for or the time is over."""
    deadline = time.monotonic() + args.minutes * 60 if args.minutes else float("inf")
    wanted = {"kill": args.kills, "damage": args.damage, "disk": args.disks, "server": args.servers}
    begun: Counter[str] = Counter()

    def share(kind: str) -> float:
        """How much of a kind is done: kills are counted by those that came."""
        done = counts.killed.total() + begun[kind] - counts.trials[kind] if kind == "kill" else begun[kind]
        return done / wanted[kind] if wanted[kind] else 1.0

    while time.monotonic() < deadline:
        kind = min(wanted, key=share)
        if share(kind) >= 1:
            if not args.minutes or not any(wanted.values()):
                return
            wanted = {name: 2 * number for name, number in wanted.items()}  # the time is not over: on, in the same shares
            continue
        begun[kind] += 1
        yield f"{kind}-{begun[kind]}"


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder that goes with the block; a fork, unlike with tempfile's own, does not take it along at its end."""
    folder = Path(tempfile.mkdtemp(prefix="faults_"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def scene(folder: Path) -> Iterator[Scene]:
    """The rows and the simulator, in a process of its own."""
    write_inputs(folder, ROWS)
    (folder / "asked").mkdir()
    place, unread = folder / "whole/prepared", Scene(folder, "http://127.0.0.1:9")
    place.mkdir(parents=True)
    stage = STAGES["prepare_data"]
    Campaign._require(stage, run_script(stage.script, stage.words(unread, place), place, unread.environment("whole", 0)))
    choose_rows(place / "data", folder, ROWS)
    here, there = multiprocessing.Pipe()
    child = os.fork()
    if not child:
        logging.disable()  # a client that was killed is no news
        with ended_with(here), Recorder(read_examples(folder / "rows.jsonl"), folder / "asked") as simulator:
            there.send(simulator.url)
            there.recv()
    there.close()
    try:
        yield Scene(folder, here.recv())
    finally:
        here.close()
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def memory(rows: int, folder: Path) -> dict[str, Any]:
    """The most memory that an evaluation of recorded replies takes, in a process of its own."""
    texts = (f"Plan stop number {number} of a long journey through the north, by train wherever there is one, otherwise by bus." for number in range(rows))
    given = ({"id": f"row-{number}", "prompt": text, "completion": json.dumps({"stop": number, "by": "train"})} for number, text in enumerate(texts))
    write_jsonl(folder / "rows.jsonl", given)
    write_jsonl(folder / "replies.jsonl", ({"id": f"row-{number}", "prediction": json.dumps({"stop": number - number % 7 // 6, "by": "train"})} for number in range(rows)))
    code = (
        "import atexit, pathlib, runpy, sys; sys.argv = sys.argv[1:]; "
        "atexit.register(lambda: print(pathlib.Path('/proc/self/status').read_text(), flush=True)); runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    words = ("--track", "structured", "--dataset", folder / "rows.jsonl", "--model-kind", "replay", "--replies", folder / "replies.jsonl", "--out", folder / "report.json")
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, str(PACKAGE / "01_eval/eval.py"), *map(str, words)], env=os.environ | {"LANGFUSE_DISABLED": "1"}, capture_output=True, text=True
    )
    if done.returncode:
        raise UserError(f"the evaluation for --memory-rows ended with {done.returncode} ({done.stderr[-300:]}): see what it says")
    peak = int(next(line for line in done.stdout.splitlines() if line.startswith("VmHWM:")).split()[1]) / 1024
    files = sum((folder / name).stat().st_size for name in ("rows.jsonl", "replies.jsonl")) / 2**20
    return {"rows": rows, "peak_mib": round(peak, 1), "input_mib": round(files, 1), "seconds": round(time.monotonic() - began, 1)}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--minutes", type=minutes, metavar="M", help="go on for so long, with the kinds in the shares of their numbers (default: until the numbers are reached)")
    add("--kills", type=not_negative, default=500, metavar="N", help="kills (default: 500)")
    add("--damage", type=not_negative, default=1000, metavar="N", help="damaged files (default: 1000)")
    add("--disks", type=not_negative, default=60, metavar="N", help="full disks and limits on files (default: 60)")
    add("--servers", type=not_negative, default=40, metavar="N", help="runs traced to an odd Langfuse (default: 40)")
    add("--only", metavar="TRIAL", help="one trial, such as kill-17, and what it found")
    add("--memory-rows", type=positive, metavar="N", help="measure the memory of an evaluation of so many rows, too (1,000,000 take some 4 minutes)")
    add("--jobs", type=positive, default=os.cpu_count(), metavar="N", help="trials at a time (default: one a core)")
    parser.add_seed()
    add("--out", type=Path, metavar="FILE", default=ROOT / "benchmarks/results/faults.json")
    args = parser.parse_args(argv)
    if args.only and (args.only.partition("-")[0] not in TRIALS or not args.only.partition("-")[2].isdigit()):
        parser.error(f"--only {args.only}: a trial is {', '.join(TRIALS)} and its number, such as kill-17")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    began, counts = time.monotonic(), Counts()
    code = code_version()
    with scratch_folder() as folder:
        (folder / "memory").mkdir()
        told = {"memory": memory(args.memory_rows, folder / "memory")} if args.memory_rows else {}
        shutil.rmtree(folder / "memory")
        if args.only or args.minutes or any((args.kills, args.damage, args.disks, args.servers)):
            load(*SCRIPTS)
            with scene(folder) as made:
                campaign = Campaign(made, args.seed)
                campaign.prepare()
                trials = iter([args.only]) if args.only else planned(args, counts)
                for result in Trials(campaign, args.jobs).results(trials):
                    counts.add(result)
                    if result['why'] or args.only or os.environ.get('DBG'):
                        print(f"{result['trial']}, {result['seconds']:.1f} s: {result['why'] or result['told']}", flush=True)
    told |= {"created_at": now(), "code": code, "packages": package_versions(), "hardware": hardware(), "seed": args.seed, **counts.to_json()}
    told["seconds"] = round(time.monotonic() - began, 1)
    print(f"{counts.killed.total()} kills, {counts.damaged.total()} damaged files, {counts.disks.total()} disks, {counts.trials['server']} servers: {len(counts.failed)} failed")
    if not args.only:
        write_json(args.out, told)
        print(f"report: {display_path(args.out)}")
    return 1 if counts.failed else 0


if __name__ == "__main__":
    run(main)
