"""The trials of a campaign of faults (faults.py): one kill, damaged file, full disk or odd Langfuse each, and what has to hold after it."""

import contextlib
import json
import logging
import multiprocessing
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from damage import KINDS
from fault_stages import STAGES, Recorder, Scene, Stage, choose_rows, kept_rows, row_number, write_inputs
from forked import Before, Ended, Fault, InWrite, Moment, run_script

from slm_swap.rows.examples import read_examples
from slm_swap.tuning.checkpoints import MARKER
from tests.support.langfuse_server import LangfuseServer

ROWS = 30
FAILURES = ("lost", "wrong silently", "traceback", "left over", "hung")
OUTCOMES = ("went on", "told", "refused", "not noticed", *FAILURES)
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
ENDS = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: -signal.SIGTERM, signal.SIGINT: 130}  # exit codes, as subprocess has them
AGAIN = ("exists already", "is there already", "is a finished report of another run")  # what a finished command says when it is run once more
SERVED = ("served_model", "system_fingerprint")  # of a report: not known where all replies come from a cache


class Failed(Exception):
    """A trial's failure: one of FAILURES, and why."""

    def __init__(self, outcome: str, why: str):
        super().__init__(why)
        self.outcome = outcome


# -- What all trials share -------------------------------------------------------------------------------------------------------


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
        self.traced: Counter[str] = Counter()  # names of the spans and scores of a traced run

    def run(
        self, stage: Stage, folder: Path, trial: str, session: int = 1, fault: Fault = None, more: tuple = (), changes: bool = False, **environment: str
    ) -> Ended:
        words = [*stage.words(self.scene, folder), *more]
        return run_script(stage.script, words, folder, self.scene.environment(trial, session, **environment), fault, changes)

    def prepare(self, training: bool = True) -> None:
        """Run every stage undisturbed, and some of them half-way. Without `training` no trial may train, merge or take an adapter."""
        folder = self.scene.folder
        for name in ("eval", "eval --cache", "eval of replies", "live_compare", "label", "prepare_data"):
            self._undisturbed(name)
        (folder / "sides").mkdir()
        for side, stage in (("azure", "eval"), ("slm", "eval of replies")):
            for end in (".json", ".rows.jsonl"):
                shutil.copy(folder / f"whole/{stage}/report{end}", folder / f"sides/{side}{end}")
        self._undisturbed("compare")
        self._undisturbed("compare of copies", sorted((folder / "sides").iterdir()))
        self._undisturbed("render_report", [folder / "whole/compare/decision.json"])
        self._half_done("eval", InWrite(int(0.8 * self.whole["eval"].largest)))
        if training:
            self._undisturbed("train")
            shutil.copytree(folder / "whole/train/adapter", folder / "adapter")
            for name, given in (("eval --adapter", [folder / "adapter"]), ("merge", []), ("merge of a copy", [folder / "adapter"])):
                self._undisturbed(name, given)
            saving = next(at for at, change in enumerate(self.whole["train"].ended.changes, 1) if "checkpoints/adapter" in change)
            self._half_done("train", Before(saving, signal.SIGKILL))
        stage = STAGES["eval of replies"]
        with langfuse() as server:
            place = self._place("traced")
            require_end(stage, self.run(stage, place, "whole", **keys(server.url)))
            self.traced = server.arrived(place)
            server("server.refuse()")
            self.left["untold"] = self._place("untold")
            require_end(stage, self.run(stage, self.left["untold"], "whole", 1, None, ("--langfuse-optional",), **keys(server.url)))

    def _place(self, name: str) -> Path:
        place = self.scene.folder / "whole" / name
        place.mkdir(parents=True)
        return place

    def _undisturbed(self, name: str, given: Sequence[Path] = ()) -> None:
        stage, place = STAGES[name], self._place(name)
        for path in given:
            shutil.copytree(path, place / path.name) if path.is_dir() else shutil.copy(path, place)
        ended = self.run(stage, place, "whole", changes=True)
        require_end(stage, ended)
        sizes = [path.stat().st_size for path in place.rglob("*") if path.is_file()]
        self.whole[name] = Whole(ended, stage.found(place), files_of(place), max(sizes))

    def _half_done(self, name: str, fault: Fault) -> None:
        self.left[name] = self._place(f"half {name}")
        ended = self.run(STAGES[name], self.left[name], "half", fault=fault)
        if ended.code >= 0:
            raise RuntimeError(f"{name} was not killed: {ended.error}")


def require_end(stage: Stage, ended: Ended) -> None:
    """That an undisturbed run ended as it should."""
    if ended.code not in stage.codes:
        raise RuntimeError(f"{stage.name} ended with {ended.code} undisturbed: {ended.error}")


@dataclass
class Trial:
    """One trial: its name, an empty folder of its own, and its dice, which hang on the campaign's seed and the name. `notes` say what was done."""

    campaign: Campaign
    name: str
    folder: Path
    dice: Random
    notes: list[str] = field(default_factory=list)

    @property
    def scene(self) -> Path:
        return self.campaign.scene.folder

    def draw(self, weights: dict[str, Any]) -> str:
        """One of the keys, as often as its weight says."""
        return self.dice.choices(list(weights), list(weights.values()))[0]

    def run(self, stage: Stage, session: int = 1, fault: Fault = None, more: tuple = (), folder: Path | None = None, **environment: str) -> Ended:
        return self.campaign.run(stage, folder or self.folder, self.name, session, fault, more, **environment)

    def asked(self, session: int) -> list[int]:
        """The journal's rows of the answers that the simulator has given to a session."""
        return [row for of, row in self.campaign.scene.asked(self.name) if of == session]


@contextlib.contextmanager
def scene(folder: Path) -> Iterator[Scene]:
    """The rows in a folder and the simulator, in a process of its own."""
    write_inputs(folder, ROWS)
    (folder / "asked").mkdir()
    place, unread, stage = folder / "whole/prepared", Scene(folder, ""), STAGES["prepare_data"]
    place.mkdir(parents=True)
    require_end(stage, run_script(stage.script, stage.words(unread, place), place, unread.environment("whole", 0)))
    choose_rows(place / "data", folder, ROWS)
    with in_process(lambda there: _simulate(folder, there)) as here:
        yield Scene(folder, here.recv())


def _simulate(folder: Path, there: Any) -> None:
    logging.disable()  # a client that was killed is no news
    with Recorder(read_examples(folder / "rows.jsonl"), folder / "asked") as simulator:
        there.send(simulator.url)
        there.recv()


@contextlib.contextmanager
def in_process(work: Callable[[Any], object]) -> Iterator[Any]:
    """One end of a connection whose other end `work` has, in a fork that ends with the block."""
    here, there = multiprocessing.Pipe()
    child = os.fork()
    if not child:
        here.close()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            work(there)
        except EOFError:
            pass
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    there.close()
    try:
        yield here
    finally:
        here.close()
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


# -- What has to hold ------------------------------------------------------------------------------------------------------------


def files_of(folder: Path) -> set[str]:
    """All files below a folder; a database's own helpers apart."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and not path.name.endswith(("-wal", "-shm"))}


def require_no_traceback(ended: Ended) -> None:
    if ended.hung:
        raise Failed("hung", ended.error)
    if "Traceback" in ended.error + ended.said:
        raise Failed("traceback", ended.error)


def is_refused(ended: Ended) -> bool:
    """Whether a run ended with one line and exit 2; warnings may stand before it."""
    lines = [line for line in ended.error.splitlines() if not line.startswith("warning: ") and "answered already" not in line]
    return ended.code == 2 and len(lines) == 1 and lines[0].startswith("error: ")


def require_outcome(stage: Stage, folder: Path, whole: Whole, apart: tuple[str, ...] = ()) -> None:
    """What the undisturbed run gave; keys of the name `apart` may differ."""
    try:
        found = without(stage.found(folder), apart)
    except (OSError, ValueError, KeyError) as error:
        raise Failed("lost", f"{type(error).__name__}: {error}") from None
    wanted = without(whole.outcome, apart)
    if found != wanted:
        raise Failed("wrong silently", first_difference(found, wanted))


def require_nothing_left(folder: Path, whole: Whole) -> None:
    if more := files_of(folder) - whole.files:
        raise Failed("left over", ", ".join(sorted(more)))


def without(value: Any, names: tuple[str, ...]) -> Any:
    if isinstance(value, dict):
        return {name: without(child, names) for name, child in value.items() if name not in names}
    return [without(child, names) for child in value] if isinstance(value, list) else value


def first_difference(found: Any, wanted: Any, name: str = "") -> str:
    """Where two JSON values differ, for a failure's line."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        key = min(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
        return first_difference(found.get(key), wanted.get(key), f"{name}.{key}")
    if isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        at = next(at for at, pair in enumerate(zip(found, wanted, strict=True)) if pair[0] != pair[1])
        return first_difference(found[at], wanted[at], f"{name}[{at}]")
    return f"{name} is {str(found)[:200]}, not {str(wanted)[:200]}"


# -- Kills -----------------------------------------------------------------------------------------------------------------------

# How often each stage is killed, of all.
KILLED = {
    "eval": 5, "eval --cache": 3, "eval of replies": 4, "live_compare": 3, "label": 4, "prepare_data": 3, "train": 1, "merge": 2, "compare": 3, "render_report": 2,
}  # fmt: skip


def draw_fault(dice: Random, whole: Whole) -> Fault:
    """A kill before a random change of a file, at a random moment, or in the middle of a write."""
    kind, number = dice.random(), dice.choice(SIGNALS)
    if kind < 0.5:
        return Before(dice.randint(1, len(whole.ended.changes)), number)
    if kind < 0.8:
        return Moment(dice.uniform(0, whole.ended.seconds), number)
    return InWrite(dice.randint(1, whole.largest))


def kill(trial: Trial) -> Iterator[tuple[str, str]]:
    name = trial.draw(KILLED)
    stage, whole, folder = STAGES[name], trial.campaign.whole[name], trial.folder
    journal, kept, more, sessions = folder / (stage.journal or "none"), set[int](), (), 0
    if name == "render_report":
        shutil.copy(trial.scene / "whole/compare/decision.json", folder)

    def session(fault: Fault = None) -> Ended:
        nonlocal sessions
        sessions += 1
        trial.notes.append(f"{name}: {fault}")
        ended = trial.run(stage, sessions, fault, more)
        asked = trial.asked(sessions)
        if again := kept & set(asked):
            raise Failed("lost", f"session {sessions} asked rows {sorted(again)} again, whose answers were kept")
        if len(asked) != len(set(asked)):
            raise Failed("lost", f"session {sessions} asked a row twice")
        kept.update(map(row_number, kept_rows(journal)))
        require_no_traceback(ended)
        return ended

    for _ in range(trial.dice.randint(1, 3)):
        fault = draw_fault(trial.dice, whole)
        ended = session(fault)
        how = "in a write" if isinstance(fault, InWrite) else signal.Signals(fault.signal).name
        nothing_to_show = name == "live_compare" and "no batch was answered" in ended.error and is_refused(ended)  # by Ctrl-C
        if nothing_to_show or ended.code == (-signal.SIGXFSZ if isinstance(fault, InWrite) else ENDS[fault.signal]):
            yield how, "killed"
        elif ended.code in stage.codes or any(text in ended.error for text in AGAIN):
            break  # it had ended, now or before
        else:
            raise Failed("lost", f"it ended with {ended.code}: {ended.error}")
    else:
        ended = session()
    told = "went on"
    if name == "live_compare" and AGAIN[2] in ended.error and is_refused(ended):  # Ctrl-C has saved the first rows as reports of their own
        told, more = "refused", ("--overwrite",)
        ended = session()
    if name in ("merge", "label") and any(text in ended.error for text in AGAIN) and is_refused(ended):  # it was killed when all was in its place
        told = "refused"
    elif ended.code != whole.ended.code:
        raise Failed("lost", f"the last session ended with {ended.code}: {ended.error}")
    require_outcome(stage, folder, whole)
    require_nothing_left(folder, whole)
    yield name, told


# -- Damage ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Harm:
    """A file that was damaged: what it was, and what it is."""

    path: Path
    kind: str
    whole: bytes
    damaged: bytes


def harm(trial: Trial, path: Path) -> Harm:
    """Damage a file, until it is another one."""
    whole = path.read_bytes()
    while True:
        kind = trial.dice.choice(list(KINDS))
        damaged = KINDS[kind](whole, trial.dice)
        if damaged != whole:
            trial.notes.append(f"{kind} in {path.name}")
            path.write_bytes(damaged)
            return Harm(path, kind, whole, damaged)


def judged(trial: Trial, stage: Stage, ended: Ended, must_tell: bool = False, promised: bool = True, apart: tuple[str, ...] = ()) -> str:
    """What became of a run on a damaged file. `promised`: another result is a failure. `must_tell`: so is one that says nothing."""
    require_no_traceback(ended)
    if is_refused(ended):
        return "refused"
    if ended.code not in stage.codes:
        raise Failed("lost", f"it ended with {ended.code}: {ended.error}")
    try:
        require_outcome(stage, trial.folder, trial.campaign.whole[stage.name], apart)
    except Failed:
        if promised:
            raise
        return "not noticed"
    told = "damaged" in ended.error + ended.said
    if must_tell and not told:
        raise Failed("wrong silently", f"it passed damage over and said nothing: {ended.said} {ended.error}")
    return "told" if told else "went on"


def damage_journal(trial: Trial) -> tuple[str, str]:
    shutil.copytree(trial.campaign.left["eval"], trial.folder, dirs_exist_ok=True)
    stage = STAGES["eval"]
    done = harm(trial, trial.folder / stage.journal)
    written = set(done.whole.splitlines(keepends=True))
    must_tell = any(line.endswith(b"\n") and line not in written for line in done.damaged.splitlines(keepends=True))
    kept = {row_number(line) for line in kept_rows(done.path) if line in written}
    outcome = judged(trial, stage, trial.run(stage), must_tell)
    if again := kept & set(trial.asked(1)):
        raise Failed("lost", f"rows {sorted(again)} are asked again, whose lines are whole")
    return done.kind, outcome


def damage_cache(trial: Trial) -> tuple[str, str]:
    shutil.copytree(trial.scene / "whole/eval --cache/cache", trial.folder / "cache")
    stage = STAGES["eval --cache"]
    done = harm(trial, trial.folder / "cache/replies.sqlite3")
    return done.kind, judged(trial, stage, trial.run(stage), apart=SERVED)


def damage_checkpoint(trial: Trial) -> tuple[str, str]:
    shutil.copytree(trial.campaign.left["train"], trial.folder, dirs_exist_ok=True)
    stage, checkpoints = STAGES["train"], trial.folder / "adapter.checkpoints"
    last = max(checkpoints.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    files = [path for path in sorted((last if trial.dice.random() < 0.8 else checkpoints).rglob("*")) if path.is_file() and path.stat().st_size]
    done = harm(trial, trial.dice.choice(files))
    must_tell = last in done.path.parents and not (done.path.name == MARKER and same_json(done))
    return done.kind, judged(trial, stage, trial.run(stage), must_tell)


def same_json(done: Harm) -> bool:
    """Whether a damaged JSON file says the same, as with a line that stands there twice."""
    with contextlib.suppress(ValueError):
        return json.loads(done.whole) == json.loads(done.damaged)
    return False


def damage_adapter(trial: Trial) -> tuple[str, str]:
    shutil.copytree(trial.scene / "adapter", trial.folder / "adapter")
    stage = STAGES[trial.dice.choice(("eval --adapter", "merge of a copy"))]
    read = [path for path in sorted((trial.folder / "adapter").iterdir()) if not path.name.startswith("training_log")]
    done = harm(trial, trial.dice.choice(read))
    return done.kind, judged(trial, stage, trial.run(stage), promised=done.path.name != "training_info.json")


def damage_result(trial: Trial) -> tuple[str, str]:
    shutil.copytree(trial.scene / "sides", trial.folder, dirs_exist_ok=True)
    stage = STAGES["compare of copies"]
    done = harm(trial, trial.folder / trial.dice.choice(("azure.rows.jsonl", "slm.rows.jsonl", "azure.json", "slm.json")))
    return done.kind, judged(trial, stage, trial.run(stage))


def damage_decision(trial: Trial) -> tuple[str, str]:
    shutil.copy(trial.scene / "whole/compare/decision.json", trial.folder)
    stage = STAGES["render_report"]
    done = harm(trial, trial.folder / "decision.json")
    return done.kind, judged(trial, stage, trial.run(stage), promised=False)


def damage_input(trial: Trial) -> tuple[str, str]:
    stage, name = STAGES["eval of replies"], trial.dice.choice(("rows.jsonl", "replies.jsonl"))
    shutil.copy(trial.scene / name, trial.folder)
    done = harm(trial, trial.folder / name)
    given = [trial.folder / name if word == trial.scene / name else word for word in stage.words(trial.campaign.scene, trial.folder)]
    ended = run_script(stage.script, given, trial.folder, trial.campaign.scene.environment(trial.name, 1))
    return done.kind, judged(trial, stage, ended, promised=False)


def damage_trace(trial: Trial) -> tuple[str, str]:
    for path in trial.campaign.left["untold"].glob("report*"):
        shutil.copy(path, trial.folder)
    done = harm(trial, trial.folder / "report.traces.jsonl")
    with langfuse() as server:
        ended = resend(trial, server)
        arrived, wanted = server.arrived(trial.folder), trial.campaign.traced
    require_no_traceback(ended)
    if arrived - wanted:
        raise Failed("wrong silently", f"{arrived - wanted} were not in the file")
    if ended.code == 1 and done.path.exists():
        return done.kind, "told"
    if ended.code:
        raise Failed("lost", f"it ended with {ended.code}, and the file is gone: {ended.error}")
    if arrived != wanted and done.kind not in ("a cut", "a deleted line"):
        raise Failed("wrong silently", f"{wanted - arrived} did not arrive, and the file counts as sent")
    return done.kind, "went on" if arrived == wanted else "not noticed"


DAMAGED: dict[str, tuple[int, Callable[[Trial], tuple[str, str]]]] = {  # how often, of all
    "journal": (7, damage_journal),
    "reply cache": (4, damage_cache),
    "checkpoint": (2, damage_checkpoint),
    "adapter": (3, damage_adapter),
    "trace file": (2, damage_trace),
    "rows and reports": (5, damage_result),
    "decision": (2, damage_decision),
    "input rows and replies": (2, damage_input),
}


def damage(trial: Trial) -> Iterator[tuple[str, str]]:
    name = trial.draw({name: weight for name, (weight, _) in DAMAGED.items()})
    trial.notes.append(name)
    kind, outcome = DAMAGED[name][1](trial)
    yield kind, "damaged"
    yield name, outcome


# -- Disks -----------------------------------------------------------------------------------------------------------------------

FILLED = {"eval": 4, "eval of replies": 3, "label": 2, "prepare_data": 2, "train": 1}


def can_mount() -> bool:
    """Whether this process may mount a tmpfs."""
    place = Path(tempfile.mkdtemp())
    with contextlib.suppress(OSError):
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "none", place], capture_output=True).returncode == 0:
            subprocess.run(["umount", place], check=True)
            place.rmdir()
            return True
    place.rmdir()
    return False


def disk(trial: Trial) -> Iterator[tuple[str, str]]:
    name = trial.draw(FILLED)
    stage, whole, place = STAGES[name], trial.campaign.whole[name], trial.folder / "disk"
    mounted = trial.dice.random() < 0.7 and can_mount()
    place.mkdir()
    pages = trial.dice.randint(1, max(2, 3 * whole.largest // 4096))
    limit = None if mounted else InWrite(trial.dice.randint(1, whole.largest), killed=False)
    trial.notes.append(f"{name}: {f'{pages} pages' if mounted else limit}")
    if mounted:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={4 * pages}k", "none", place], check=True)
    try:
        ended, how, kept = trial.run(stage, 1, limit, folder=place), "went on", set[int]()
        require_no_traceback(ended)
        if ended.code not in stage.codes:
            if not is_refused(ended):
                raise Failed("lost", f"it ended with {ended.code}: {ended.error}")
            how, kept = "refused", {row_number(line) for line in kept_rows(place / (stage.journal or "none"))}
            if mounted:
                subprocess.run(["mount", "-o", "remount,size=256m", place], check=True)
            ended = trial.run(stage, 2, folder=place)
            require_no_traceback(ended)
        if ended.code != whole.ended.code:
            raise Failed("lost", f"with room it ended with {ended.code}: {ended.error}")
        require_outcome(stage, place, whole)
        require_nothing_left(place, whole)
        if again := kept & set(trial.asked(2)):
            raise Failed("lost", f"rows {sorted(again)} are asked again, whose answers were kept")
    finally:
        if mounted:
            subprocess.run(["umount", "-l", place], check=True)
    yield "a full disk" if mounted else "a limit on a file's size", "tried"
    yield name, how


# -- Langfuse --------------------------------------------------------------------------------------------------------------------

TROUBLES = {
    "500": "server.status = 500",
    "503 half of the time": "server.flaky = 0.5",
    "200 with a page": "server.raw = (200, 'text/html', b'<html><body>We are back soon</body></html>')",
    "200 with half a JSON": "server.raw = (200, 'application/json', b'{\"succ')",
    "answers after 1.5 s": "server.delay = 1.5",
    "no answer": "server.hanging = True",
    "refused connections": "server.refuse()",
    "OTLP partial success": "server.rejected_spans = 3",
    "bodies too large": "server.largest = 2000",
    "keys not accepted": "server.keys = 'pk-lf-other:sk-lf-other'",
}
TRIES = 5  # on a machine that does much else, one may run out of its time
WELL = (
    "server.delay = server.flaky = server.rejected_spans = 0; server.hanging = False; server.status = server.raw = server.largest = None; "
    "server.keys = 'pk-lf-faults:sk-lf-right'; server._server or server.accept()"
)
ARRIVED = "{**{s.id: (s.trace, s.name) for s in server.spans}, **{s['id']: (s['traceId'], s['name']) for s in server.scores}}"


def keys(url: str) -> dict[str, str]:
    return {"LANGFUSE_DISABLED": "0", "LANGFUSE_PUBLIC_KEY": "pk-lf-faults", "LANGFUSE_SECRET_KEY": "sk-lf-right", "LANGFUSE_BASE_URL": url}


class RemoteServer:
    """The tests' recording Langfuse in a process of its own: a call runs a statement there, some seconds later if asked."""

    def __init__(self, connection: Any):
        self._connection, self.url = connection, connection.recv()

    def __call__(self, statement: str, seconds: float = 0.0) -> None:
        self._connection.send((f"threading.Timer({seconds}, exec, ({statement!r}, given)).start()" if seconds else statement, None))
        self._connection.recv()

    def arrived(self, folder: Path) -> Counter[str]:
        """Names of the spans and scores that arrived of the trace of a folder's report, each once by its id."""
        self._connection.send((None, ARRIVED))
        trace = json.loads((folder / "report.json").read_text())["trace"]["id"]
        return Counter(name for of, name in self._connection.recv().values() if of == trace)


@contextlib.contextmanager
def langfuse() -> Iterator[RemoteServer]:
    with in_process(_serve) as connection:
        yield RemoteServer(connection)


def _serve(there: Any) -> None:
    with LangfuseServer("pk-lf-faults") as server:
        given = {"server": server, "threading": threading}
        given["given"] = given
        there.send(server.url)
        while True:
            statement, expression = there.recv()
            if statement:
                exec(statement, given)
            there.send(eval(expression, given) if expression else None)


def resend(trial: Trial, server: RemoteServer) -> Ended:
    return run_script("01_eval/resend_traces.py", [trial.folder], trial.folder, trial.campaign.scene.environment(trial.name, 9, **keys(server.url)))


def server(trial: Trial) -> Iterator[tuple[str, str]]:
    stage, trouble, dice, traced = STAGES["eval of replies"], trial.dice.choice(list(TROUBLES)), trial.dice, trial.campaign.traced
    whole, traces = trial.campaign.whole[stage.name], trial.folder / "report.traces.jsonl"
    trial.notes.append(trouble)
    with langfuse() as remote:
        remote(TROUBLES[trouble], dice.uniform(0.01, 0.5) if dice.random() < 0.5 else 0.0)

        def run(fault: Fault = None) -> Ended:
            ended = trial.run(stage, 1, fault, ("--langfuse-optional",), **keys(remote.url))
            require_no_traceback(ended)
            return ended

        def missing(when: str) -> Counter[str]:
            """What has not arrived; while something has not, the file has to be there."""
            lacking = traced - remote.arrived(trial.folder)
            if lacking and not traces.exists():
                raise Failed("lost", f"{lacking} did not arrive, and the file is gone {when}")
            return lacking

        if dice.random() < 0.4:
            fault = Moment(dice.uniform(0, whole.ended.seconds), signal.SIGKILL)
            trial.notes.append(str(fault))
            run(fault)
            if (trial.folder / "report.json").exists():  # the rest of its trace was in its memory alone
                return
        ended = run()
        if ended.code:
            raise Failed("lost", f"it ended with {ended.code}: {ended.error}")
        missing("after the run")
        told = "told" if traces.exists() else "went on"
        if traces.exists() and "have not reached" not in ended.error:
            raise Failed("wrong silently", f"the file stays, and nothing said so: {ended.error}")
        if traces.exists():
            require_no_traceback(resend(trial, remote))
            missing("after a second try")
        remote(WELL)
        for _ in range(TRIES):
            if traces.exists():
                again = resend(trial, remote)
        if traces.exists():
            raise Failed("lost", f"it could not be sent to the healthy server: {again.error}")
        if lacking := missing("in the end"):
            raise Failed("lost", f"{lacking} did not arrive")
    require_outcome(stage, trial.folder, whole)
    require_nothing_left(trial.folder, whole)
    yield trouble, told


TRIALS: dict[str, Callable[[Trial], Iterator[tuple[str, str]]]] = {"kill": kill, "damage": damage, "disk": disk, "server": server}


TRIES, NO_THREADS = 5, "Invalid thread pool!"  # torch's, in a fork: no script of ours is started so


def one_trial(campaign: Campaign, name: str) -> dict[str, Any]:
    """As `_one_trial`; made again where a fork took torch's threads along in a state that it refuses to work in."""
    for _ in range(TRIES):
        result = _one_trial(campaign, name)
        if not (result["why"] and NO_THREADS in result["why"]):
            break
    return result


def _one_trial(campaign: Campaign, name: str) -> dict[str, Any]:
    """What came of a trial: (what, outcome) of each part of it, and why it failed."""
    folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=campaign.scene.folder))
    trial = Trial(campaign, name, folder, Random(f"{campaign.seed}:{name}"))
    told, why = list[tuple[str, str]](), None
    try:
        for part in TRIALS[name.partition("-")[0]](trial):
            told.append(part)
    except Failed as failure:
        told.append((trial.notes[0] if trial.notes else name, failure.outcome))
        why = f"{failure.outcome}: {' '.join(str(failure).split())[:1500]} ({'; '.join(trial.notes)})"
    except Exception:
        why = f"the campaign itself: {traceback.format_exc()} ({'; '.join(trial.notes)})"
    shutil.rmtree(folder, ignore_errors=True)
    return {"trial": name, "told": told, "why": why}
