"""The stages that a campaign of faults runs: their commands on a few rows, and of what they write what has to be the same whatever happened."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm_swap.common.reports import sha256_file, write_atomically, write_jsonl
from slm_swap.common.settings import PACKAGE
from slm_swap.demo.azure_simulator import AzureSimulator, Faults
from slm_swap.rows.examples import read_examples
from slm_swap.rows.lines import text_hash
from slm_swap.rows.prompts import request_of
from tests.support.training_rows import ROWS

if TYPE_CHECKING:
    from aiohttp import web

SEED = 42  # the scripts' default: a sample of label.py has it and its number as its seed
SCRIPTS = (
    "01_eval/eval.py", "01_eval/live_compare.py", "01_eval/resend_traces.py", "02_dataset/label.py", "02_dataset/prepare_data.py",
    "03_compare/compare.py", "03_compare/render_report.py", "04_ft/merge_adapter.py", "04_ft/train_unsloth.py",
)  # fmt: skip
# What two runs of one command may have different: times, what counts sessions, and flags that change nothing.
APART = {
    "created_at", "seconds", "latency", "run_id", "sessions", "cached_replies", "trace", "tokens_per_second", "peak_memory_gib", "out", "out_dir",
    "load", "cache", "overwrite", "at", "ledger", "langfuse_optional",
}  # fmt: skip
SAMPLES = 2
REPLIES = {"prompt", "prediction", "id"}


class Recorder(AzureSimulator):
    """The simulator, which notes each answer that it gives: the key of a request, `simulator-key.TRIAL.SESSION`, says where."""

    def __init__(self, references: Any, asked: Path):
        self.asked = asked
        super().__init__(references, mistake_rate=0.2, faults=Faults(slow=0.5, slow_seconds=0.02))

    def answer(self, request: "web.Request", raw: bytes) -> Any:
        self.key = request.headers["api-key"]
        _, trial, session = self.key.split(".")
        answer = super().answer(request, raw)
        if answer.status == 200:
            body = json.loads(raw)
            with open(self.asked / trial, "a") as file:
                file.write(f"{session} {last_said(body['messages'])} {body['seed'] - SEED}\n")
        return answer


def last_said(messages: list[dict[str, Any]]) -> str:
    """A hash of the user's last message, in which all rows differ."""
    return text_hash(next(message["content"] for message in reversed(messages) if message["role"] == "user"))


@dataclass(frozen=True)
class Scene:
    """What all stages read, in one folder, and the simulator's address."""

    folder: Path
    endpoint: str

    @property
    def rows(self) -> Path:
        return self.folder / "rows.jsonl"

    def environment(self, trial: str, session: int, **more: str) -> dict[str, str]:
        """What a run of a trial sees."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("AZURE_", "LANGFUSE_", "SLM_"))}
        return kept | {
            "AZURE_ENDPOINT": self.endpoint, "AZURE_DEPLOYMENT": "simulator", "AZURE_API_VERSION": "2024-10-21",
            "AZURE_API_KEY": f"simulator-key.{trial}.{session}", "SLM_MODEL_PATH": str(PACKAGE / "models/phi-tiny"), "OMP_NUM_THREADS": "1",
            "PRICES_FILE": str(self._prices()), "LANGFUSE_DISABLED": "1",
        } | more  # fmt: skip

    def _prices(self) -> Path:
        """The hosted model's prices alone: what a machine costs goes by its seconds, which are no two times the same."""
        path = self.folder / "prices.toml"
        if not path.exists():
            write_atomically(path, lambda file: file.write((PACKAGE / "demo/prices.toml").read_text(encoding="utf-8").partition("[local]")[0]))
        return path

    def asked(self, trial: str) -> list[tuple[int, int]]:
        """(session, row of the journal) of each answer that the simulator has given to a trial."""
        place = {last_said(request_of("toolcall", example).messages): at for at, example in enumerate(read_examples(self.rows))}
        with suppress(FileNotFoundError):
            told = [line.split() for line in (self.folder / "asked" / trial).read_text().splitlines()]
            return [(int(session), int(sample) * len(place) + place[prompt]) for session, prompt, sample in told]
        return []


@dataclass(frozen=True)
class Stage:
    """A command: its script below `slm_swap/`, its flags with a trial's folder, and `outcome`, what it has to leave there."""

    name: str
    script: str
    words: Callable[[Scene, Path], list[object]]
    outcome: Callable[[Path], Any]
    asks: int = 0  # times that each row is asked of the hosted model
    journal: str | None = None
    codes: tuple[int, ...] = (0,)

    def found(self, folder: Path) -> Any:
        """The outcome, as if it lay in another folder."""
        return json.loads(json.dumps(self.outcome(folder)).replace(f"{folder}/", ""))


def lasting(value: Any) -> Any:
    """A JSON value without what is APART."""
    if isinstance(value, dict):
        return {name: lasting(child) for name, child in value.items() if name not in APART}
    return [lasting(child) for child in value] if isinstance(value, list) else value


def report_of(path: Path) -> Any:
    return lasting(json.loads(path.read_text()))


def rows_of(path: Path) -> list[Any]:
    return [lasting(json.loads(line)) for line in path.read_text().splitlines()]


def _evaluation(*names: str) -> Callable[[Path], Any]:
    return lambda folder: {name: (report_of(folder / f"{name}.json"), rows_of(folder / f"{name}.rows.jsonl")) for name in names}


def _labels(folder: Path) -> Any:
    return [rows_of(folder / name) for name in ("labels.jsonl", "labels.review.jsonl")] + [report_of(folder / "labels.report.json")]


def _data(folder: Path) -> Any:
    found = {str(path.relative_to(folder)): sha256_file(path) for path in sorted(folder.rglob("*.jsonl"))}
    return found | {"report": report_of(folder / "data/prepare_report.json")}


def _model(name: str) -> Callable[[Path], Any]:
    def outcome(folder: Path) -> Any:
        files = {path.name: sha256_file(path) for path in sorted((folder / name).iterdir()) if path.name != "training_info.json"}
        return files | {"info": report_of(folder / name / "training_info.json")}

    return outcome


def _decision(folder: Path) -> Any:
    return report_of(folder / "decision.json"), rows_of(folder / "toolcall.looks.jsonl")


def _page(folder: Path) -> str:
    return hashlib.sha256((folder / "page.html").read_bytes()).hexdigest()


TOOLCALL = ("--track", "toolcall", "--dataset")
TRAIN = (
    "--track", "structured", "--backend", "trl", "--precision", "fp32", "--batch-size", 1, "--gradient-accumulation", 1, "--no-gradient-checkpointing",
    "--learning-rate", "5e-3", "--save-steps", 1, "--eval-steps", 2, "--epochs", 2, "--resume",
)  # fmt: skip
LOCAL = ("--model-kind", "slm", "--precision", "fp32", "--engine", "transformers", "--limit", 3, "--max-new-tokens", 12, "--latency-rows", 0)
STAGES = {
    stage.name: stage
    for stage in (
        Stage(
            "eval", "01_eval/eval.py",
            lambda scene, folder: [*TOOLCALL, scene.rows, "--model-kind", "azure", "--concurrency", 4, "--out", folder / "report.json"],
            _evaluation("report"), 1, "report.rows.jsonl.part",
        ),
        Stage(
            "eval --cache", "01_eval/eval.py",
            lambda scene, folder: [*TOOLCALL, scene.rows, "--model-kind", "azure", "--concurrency", 4, "--cache", folder / "cache", "--out", folder / "report.json"],
            _evaluation("report"), 1, "report.rows.jsonl.part",
        ),
        Stage(
            "eval of replies", "01_eval/eval.py",
            lambda scene, folder: [*TOOLCALL, scene.rows, "--model-kind", "replay", "--replies", scene.folder / "replies.jsonl", "--out", folder / "report.json"],
            _evaluation("report"), 0, "report.rows.jsonl.part",
        ),
        Stage(
            "eval --adapter", "01_eval/eval.py",
            lambda scene, folder: [*TOOLCALL, scene.rows, *LOCAL, "--adapter", folder / "adapter", "--out", folder / "report.json"],
            _evaluation("report"),
        ),
        Stage(
            "live_compare", "01_eval/live_compare.py",
            lambda scene, folder: [
                *TOOLCALL, scene.rows, "--models", "azure", "replay", "--replies", scene.folder / "replies.jsonl", "--save", "--out-dir", folder,
            ],
            _evaluation("toolcall_azure_rows_live", "toolcall_replay_rows_live"), 1,
        ),
        Stage(
            "label", "02_dataset/label.py",
            lambda scene, folder: [
                "--track", "toolcall", "--prompts", scene.folder / "prompts.jsonl", "--samples", SAMPLES, "--budget", 9, "--out", folder / "labels.jsonl",
            ],
            _labels, SAMPLES, "labels.rows.jsonl.part",
        ),
        Stage(
            "prepare_data", "02_dataset/prepare_data.py",
            lambda scene, folder: ["--source", "xlam", "--dataset-path", scene.folder / "xlam.jsonl", "--val-size", 20, "--test-size", 40, "--out-dir", folder / "data"],
            _data,
        ),
        Stage(
            "train", "04_ft/train_unsloth.py",
            lambda scene, folder: [*TRAIN, "--train", scene.folder / "train.jsonl", "--val", scene.folder / "val.jsonl", "--out", folder / "adapter"],
            _model("adapter"),
        ),
        Stage(
            "merge", "04_ft/merge_adapter.py",
            lambda scene, folder: ["--adapter", scene.folder / "adapter", "--out", folder / "merged"],
            _model("merged"),
        ),
        Stage(
            "merge of a copy", "04_ft/merge_adapter.py",
            lambda scene, folder: ["--adapter", folder / "adapter", "--out", folder / "merged"],
            _model("merged"),
        ),
        Stage(
            "compare", "03_compare/compare.py",
            lambda scene, folder: [
                "--track", "toolcall", "--azure", scene.folder / "sides/azure.json", "--slm", scene.folder / "sides/slm.json", "--out", folder / "decision.json",
            ],
            _decision, codes=(0, 10, 11),
        ),
        Stage(
            "compare of copies", "03_compare/compare.py",
            lambda scene, folder: [
                "--track", "toolcall", "--azure", folder / "azure.json", "--slm", folder / "slm.json", "--out", folder / "decision.json",
            ],
            lambda folder: {name: report_of(folder / "decision.json")[name] for name in ("verdict", "metrics", "rows")}, codes=(0, 10, 11),
        ),
        Stage(
            "render_report", "03_compare/render_report.py",
            lambda scene, folder: ["--decision", folder / "decision.json", "--out", folder / "page.html"],
            _page,
        ),
    )
}  # fmt: skip


def write_inputs(folder: Path, rows: int) -> None:
    """The rows that stages read, in a folder: of the embedded sample, `rows` of the track toolcall are evaluated."""
    sample = (PACKAGE / "02_dataset/sample/xlam_sample.jsonl").read_text().splitlines(keepends=True)
    (folder / "xlam.jsonl").write_text("".join(sample[: 6 * rows]))
    write_jsonl(folder / "train.jsonl", (row.to_json() for row in ROWS[:2]))
    write_jsonl(folder / "val.jsonl", (row.to_json() for row in ROWS[2:3]))


def choose_rows(data: Path, folder: Path, rows: int) -> None:
    """Of what prepare_data.py made of them: the evaluated rows, the same without replies, and replies of which some are wrong."""
    examples = read_examples(data / "toolcall/test.jsonl", rows)
    write_jsonl(folder / "rows.jsonl", (example.to_json() for example in examples))
    write_jsonl(folder / "prompts.jsonl", ({name: value for name, value in example.to_json().items() if name not in ("completion", "calls", "accept")} for example in examples))
    replies = ({"id": example.id, "prediction": examples[at - at % 3 // 2].completion} for at, example in enumerate(examples))
    write_jsonl(folder / "replies.jsonl", replies)


def kept_rows(journal: Path) -> Counter[bytes]:
    """The whole lines of a journal that hold an answered row, with how often they stand there."""
    lines = journal.read_bytes().splitlines(keepends=True) if journal.exists() else []
    return Counter(line for line in lines if line.endswith(b"\n") and b'"row": ' in line[:40] and b'"finish_reason": "error"' not in line)


def row_number(line: bytes) -> int:
    """The row of one of `kept_rows`."""
    return json.loads(line)["row"]
