"""The whole pipeline on the embedded defaults: prepare, evaluate both models, compare, fine-tune, evaluate and compare again, calibrate, serve.

    python demo/quickstart.py
    python demo/quickstart.py --short
    python demo/quickstart.py --long

Nothing here is a real model of anybody: the "hosted" side is a simulator that answers from the references with a share of
mistakes, the local side a tiny model pretrained on generated text. The stages are the real ones; each command is shown.
Everything is written under runs/quickstart/, so that a team's own data, adapters and reports stay as they are.
"""

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from anywhere

from slm_swap.cli import Parser, run
from slm_swap.clients.pricing import load_prices
from slm_swap.common.errors import UserError
from slm_swap.common.progress import last_line
from slm_swap.common.reports import write_jsonl
from slm_swap.common.settings import PACKAGE, ROOT, display_path, load_settings
from slm_swap.demo import endpoint
from slm_swap.demo.azure_simulator import AzureSimulator, Faults
from slm_swap.rows.examples import Example, read_examples
from slm_swap.scoring.tracks import TRACKS
from slm_swap.scoring.words import metric_name
from slm_swap.serving.state import STOP

DELTA = 0.05
SHORT = 24  # rows of an evaluation with --short
HEARTBEAT = 30  # seconds between signs of life of a long stage
VERDICTS = {0: "SWAP", 10: "FINE_TUNE", 11: "NEED_MORE_DATA"}
NOTHING = 11  # calibrate.py's exit code where no rule can be certified
CALIBRATION, REQUESTS, TAKEN_BACK = 300, 60, 16  # rows for the rule, requests that an application sends to the endpoint, and those of the roll-back
AUDIT_SHARE = 0.5  # so that few requests show some; in service 2% are usual

OWN_ROWS = """\
cd slm_swap && source ../.venv/bin/activate
python 02_dataset/prepare_data.py --source chat --dataset-path our_logs.jsonl
python 01_eval/live_compare.py --track toolcall --models azure slm --save
python 03_compare/compare.py --track toolcall --azure 01_eval/reports/toolcall_azure_test_live.json --slm 01_eval/reports/toolcall_slm_test_live.json --delta 0.05"""

TAUGHT = {"structured": 1100, "toolcall": 600}  # rows to fine-tune on, at most: what two cores learn in less than three minutes
SHOTS = {"structured": 1, "toolcall": 2}  # examples in front of each row
LOCAL = ("--precision", "fp32", "--batch-size", 32, "--max-new-tokens", 96)  # how the small model runs, in evaluations and in service


@dataclass
class Demo:
    """One run: where it writes, how much it does, and what it has done."""

    out: Path
    short: bool
    long: bool = False
    environment: dict[str, str] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def say(self, text: str) -> None:
        with self.lock:
            print(f"[{time.perf_counter() - self.started:4.0f} s] {text}", flush=True)

    @property
    def limit(self) -> tuple[object, ...]:
        return ("--limit", SHORT) if self.short else ()

    @property
    def cascade_page(self) -> Path:
        return self.out / f"reports/{endpoint.TRACK}_cascade.html"

    def log(self, title: str) -> Path:
        return self.out / "logs" / f"{title.replace(' ', '_')}.log"

    def stage(self, title: str, script: str, *flags: object, accept: tuple[int, ...] = (0,)) -> int:
        """Run a stage script, its output into a log; gives its exit code.

        Raises:
            UserError: it ended with an exit code that is not in `accept`; the end of its log is shown.
        """
        command = [sys.executable, str(PACKAGE / script), *map(str, flags)]
        log = self.log(title)
        log.parent.mkdir(parents=True, exist_ok=True)
        self.say(f"{title}: python {script} {' '.join(display_path(flag) if '/' in str(flag) else str(flag) for flag in flags)}")
        with open(log, "w") as output:
            process = subprocess.Popen(command, env=self.environment, stdout=output, stderr=subprocess.STDOUT, cwd=PACKAGE)
            for beats in itertools.count(1):
                try:
                    code = process.wait(HEARTBEAT)
                    break
                except subprocess.TimeoutExpired:
                    self.say(f"{title}: {last_line(log) or f'at work for {beats * HEARTBEAT} s'}")
                except BaseException:
                    process.terminate()
                    raise
        if code not in accept:
            print("".join(log.read_text().splitlines(keepends=True)[-15:]), file=sys.stderr)
            raise UserError(f"{title} failed with exit code {code}: the whole log is {display_path(log)}")
        return code

    def track(self, track: str) -> dict[str, Path]:
        """Both evaluations, the gate, and where it says so fine-tuning and a second look; gives the reports' paths."""
        data, exact = self.out / track, next(name for name in TRACKS[track].gate if "exact" in name)
        paths = {
            name: self.out / f"reports/{track}_{name}.json"
            for name in ("azure", "before", "after", "decision_before", "decision_after")
        }
        paths["page"] = self.out / f"reports/{track}.html"
        limit = self.limit
        local = ("--model-kind", "slm", *LOCAL, "--latency-rows", 5, *limit)
        rows = ("--track", track, "--dataset", data / "test.jsonl")

        def evaluate(name: str, *flags: object) -> None:
            self.stage(f"{track} evaluate {name}", "01_eval/eval.py", *rows, *flags, "--overwrite", "--out", paths[name])
            self.say(f"{track} {name}: {metric_name(exact).lower()} {json.loads(paths[name].read_text())['metrics'][exact]:.3f}")

        def compare(slm: str, out: str, *flags: object) -> str:
            flags = ("--track", track, "--azure", paths["azure"], "--slm", paths[slm], "--delta", DELTA, "--out", paths[out], *flags)
            verdict = VERDICTS[self.stage(f"{track} compare {slm}", "03_compare/compare.py", *flags, accept=tuple(VERDICTS))]
            self.say(f"{track} verdict {slm} fine-tuning: {verdict}")
            self.stage(f"{track} render {slm}", "03_compare/render_report.py", "--decision", paths[out], "--out", paths["page"])
            return verdict

        evaluate("azure", "--model-kind", "azure", *limit)
        evaluate("before", *local)
        if compare("before", "decision_before") == "SWAP":
            return {name: paths[name] for name in ("azure", "before", "decision_before", "page")}  # "after" may be another run's
        if self.long:
            self.ladder(track, rows[:2], data, limit)
        adapter = self.out / f"adapter_{track}"
        self.stage(
            f"{track} fine-tune", "train_unsloth.py", "--track", track, "--train", data / "train.jsonl", "--val", data / "val.jsonl", *self.examples(track),
            "--out", adapter, "--backend", "trl", "--precision", "fp32", "--batch-size", 8, "--gradient-accumulation", 1, "--no-gradient-checkpointing",
            "--lora-r", 16, "--lora-dropout", 0, "--learning-rate", "5e-3", "--save-steps", 0, "--limit", 48 if self.short else TAUGHT[track],
        )  # fmt: skip
        with ThreadPoolExecutor(1) as beside:  # the other track's core is free soon
            begun = beside.submit(self.measure_calibration_rows, adapter) if track == endpoint.TRACK else None
            evaluate("after", *local, "--adapter", adapter, *self.examples(track))
            compare("after", "decision_after", "--before", paths["before"])
            if begun:
                begun.result()
        return paths

    def examples(self, track: str) -> tuple[object, ...]:
        """Train rows like a row, in front of it: when the small model is taught, and whenever it is asked after that."""
        return "--few-shot", self.out / track / "train.jsonl", "--shots", SHOTS[track]

    def ladder(self, track: str, of_track: tuple, data: Path, limit: tuple) -> None:
        """Climb the means that need no training, on the validation rows; its table is shown."""
        hosted, title = self.out / f"reports/{track}_azure_val.json", f"{track} ladder"
        rows = (*of_track, "--dataset", data / "val.jsonl")
        self.stage(f"{track} evaluate azure on val", "01_eval/eval.py", *rows, "--model-kind", "azure", *limit, "--overwrite", "--out", hosted)
        self.stage(
            title, "04_ft/improve.py", *rows, *limit, "--azure", hosted, "--delta", DELTA, "--rungs", "few-shot,constrain", "--engine", "transformers",
            "--precision", "fp32", "--batch-size", 32, "--max-new-tokens", 96, "--out", self.out / f"improve_{track}",
        )  # fmt: skip
        log = self.log(title).read_text(encoding="utf-8")
        self.say(f"{title}:\n{log[log.index(f'{track}: ') :] if f'{track}: ' in log else log}")

    def chat_rows(self, split: str) -> Path:
        """The endpoint's calibration or test rows as the conversations of an application: an endpoint gets conversations, and these rows are text."""
        return self.out / f"chat/{endpoint.TRACK}/{split}.jsonl"

    def write_chat_rows(self, split: str) -> Path:
        path = self.chat_rows(split)
        write_jsonl(path, map(endpoint.as_chat, read_examples(self.out / endpoint.TRACK / f"{split}.jsonl")))
        return path

    def in_service(self, adapter: Path | None) -> tuple[object, ...]:
        """How the small model runs there. The adapter learned text rows: the conversations are asked as text, too."""
        return (*LOCAL, "--ask", "text", *(("--adapter", adapter, *self.examples(endpoint.TRACK)) if adapter else ()))

    def calibration_report(self, name: str) -> Path:
        return self.out / f"reports/{endpoint.TRACK}_{name}_calibration.json"

    def measure_calibration_rows(self, adapter: Path | None) -> None:
        """Both models on rows that nothing was chosen on. The hosted one is asked as production asks it."""
        rows = ("--track", endpoint.TRACK, "--dataset", self.chat_rows("calibration"), "--latency-rows", 0, *self.limit, "--overwrite")
        for title, name, flags in (("azure", "azure", ()), ("phi-tiny", "slm", self.in_service(adapter))):
            self.stage(f"calibration {title}", "01_eval/eval.py", *rows, "--model-kind", name, *flags, "--out", self.calibration_report(name))

    def serve(self, adapter: Path | None, model: str) -> list[str]:
        """Calibrate the small model, and put it into service behind the hosted one; gives what the end tells of it."""
        track, folder = endpoint.TRACK, self.out / "serving"
        reports = {name: self.calibration_report(name) for name in ("azure", "slm")}
        cascade, state = folder / "cascade.json", folder / "state"
        shutil.rmtree(folder, ignore_errors=True)  # an earlier run's flag and audits are of another model
        folder.mkdir(parents=True)
        code = self.stage(
            "calibrate", "03_compare/calibrate.py", "--track", track, "--azure", reports["azure"], "--slm", reports["slm"], "--delta", DELTA,
            "--signal", "sum_logprob", "--out", cascade, "--html", self.cascade_page, accept=(0, NOTHING),
        )  # fmt: skip
        told = [line for line in self.log("calibrate").read_text(encoding="utf-8").splitlines() if line and not line.startswith("warning:")]
        self.say(f"calibrate: {told[0]}")
        certified = code != NOTHING
        if not certified:
            self.say("nothing is certified, so that the endpoint runs in shadow mode: the hosted model answers, the small one is compared beside it")
        mode = ("--mode", "cascade", "--cascade", cascade) if certified else ("--mode", "shadow")
        # The deadline is for a busy machine: in service a request does not wait so long for the small model.
        flags = ("--track", track, *mode, "--state", state, "--audit-share", AUDIT_SHARE, "--deadline", 60, *self.in_service(adapter))
        asked = read_examples(self.chat_rows("test"))[: SHORT if self.short else REQUESTS]
        self.say(f"serve: python 05_serve/serve.py {' '.join(display_path(flag) if isinstance(flag, Path) else str(flag) for flag in flags)}")
        with endpoint.running(flags, self.environment, self.log("serve")) as url:
            self.say(f"serve: an application sends {len(asked)} test requests to {url}/v1, {endpoint.AT_ONCE} at a time")
            answers = endpoint.ask(url, model, asked)
            audits, prices = endpoint.audits_so_far(state, quiet=1 if certified else 6), load_prices(self.environment["PRICES_FILE"])
            bill = endpoint.bill_of(endpoint.read_metrics(url), audits, prices.deployment(model))
            lines = [*endpoint.summary(answers), *endpoint.bill_lines(bill, prices.currency)]
            for line in lines:
                self.say(f"serve: {line}")
            if local_rows := [answer.row for answer in answers if answer.by == "local"][:TAKEN_BACK]:
                self.take_back(url, model, state, local_rows)
        self.say("serve: SIGTERM, and the endpoint has ended with exit code 0")
        return [f"the endpoint ({mode[1]} mode, {track}, simulated hosted model): {told[0]}", *lines]

    def take_back(self, url: str, model: str, state: Path, rows: list[Example]) -> None:
        """An operator's roll-back, and the way back into service, shown on requests that were answered locally.

        Raises:
            UserError: the small model answered while the flag was up, or answers nothing any more when it is lowered.
        """
        (state / STOP).touch()
        began = time.perf_counter()
        answers = endpoint.ask(url, model, rows)
        seconds = time.perf_counter() - began
        hosted = sum(answer.by == "hosted" for answer in answers)
        self.say(f"roll-back: stop.json is written, and the hosted model answers {hosted} of the same {len(rows)} requests, all within {seconds:.2f} s")
        if hosted < len(rows):
            raise UserError(f"{len(rows) - hosted} requests were not answered by the hosted model while stop.json was up: the log is {display_path(self.log('serve'))}")
        self.stage("resume", "05_serve/watch.py", "--state", state, "--resume")
        local = sum(answer.by == "local" for answer in endpoint.ask(url, model, rows))
        self.say(f"resume: the small model answers {local} of them again")
        if not local:
            raise UserError(f"nothing is answered locally after watch.py --resume: the log is {display_path(self.log('serve'))}")


def table(results: dict[str, dict[str, Path]], rows: int):
    """Track x model x metric, before and after, with verdicts and costs."""
    from rich.table import Table

    shown = Table(title=f"slm_swap quickstart: {rows} test rows a track, delta {DELTA:g}, costs at example prices")
    headings = ("track", "metric", "azure simulator", "phi-tiny", "phi-tiny fine-tuned")
    for heading in headings:
        shown.add_column(heading, justify="left" if heading in ("track", "metric") else "right")
    for track, paths in results.items():
        reports = {name: json.loads(path.read_text()) for name, path in paths.items() if path.suffix == ".json"}
        models = [reports.get(name) for name in ("azure", "before", "after")]
        for metric in TRACKS[track].gate:
            shown.add_row(track, metric_name(metric), *(f"{model['metrics'][metric]:.3f}" if model else "" for model in models))
        verdicts = (reports.get(f"decision_{name}", {}).get("verdict", "") for name in ("before", "after"))
        shown.add_row(track, "verdict against azure", "", *verdicts)
        costs = [model["cost"]["per_1000_rows"] if model else None for model in models]
        shown.add_row(track, "cost per 1,000 rows, machine 100% used", *("" if cost is None else f"{cost:.4f}" for cost in costs))
        shown.add_section()
    return shown


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "runs/quickstart", help="where everything is written")
    parser.add_argument("--short", action="store_true", help="a few rows only, to see that every stage runs")
    parser.add_argument("--long", action="store_true", help="climb the ladder, too: few-shot and constrained decoding on the validation rows")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    from rich.console import Console

    settings = load_settings()
    demo = Demo(args.out.resolve(), args.short, args.long)
    traced = settings.langfuse_disabled or all(
        (settings.langfuse_public_key, settings.langfuse_secret_key, settings.langfuse_base_url)
    )
    threads = str(max(1, (os.cpu_count() or 2) // len(TRACKS)))  # the tracks run side by side
    demo.environment = {
        **os.environ,
        "PRICES_FILE": str(PACKAGE / "demo/prices.toml"),
        "SLM_MODEL_PATH": "models/phi-tiny",
        "SLM_BASE_URL": "",  # a team's own .env may name a server
        "SLM_SWAP_KEYS": "",
        "OMP_NUM_THREADS": threads,
        "TOKENIZERS_PARALLELISM": "false",
        "SLM_SWAP_SESSION": settings.session or f"quickstart-{time.strftime('%Y%m%d-%H%M%S')}",
    }
    if not traced:
        demo.environment["LANGFUSE_DISABLED"] = "1"
        demo.say("Langfuse is not set up (see .env.example): these runs are not traced")
    sample = PACKAGE / "02_dataset/sample/xlam_sample.jsonl"
    sizes = ("--val-size", 50, "--test-size", 400, "--calibration-size", CALIBRATION)
    demo.stage("prepare", "02_dataset/prepare_data.py", "--source", "xlam", "--dataset-path", sample, "--calls", "one", *sizes, "--out-dir", demo.out)
    chat = [demo.write_chat_rows(split) for split in ("calibration", "test")]
    # The first reference counts where several are asked the same: conversations before the structured rows of the same sentences.
    splits = [demo.out / track / f"{split}.jsonl" for split in ("test", *(("val",) if demo.long else ())) for track in TRACKS]
    references = [example for path in (*chat, *splits) for example in read_examples(path)]
    with AzureSimulator(references, mistake_rate=0.08, faults=Faults(rate_limit=0.01, content_filter=0.01)) as server:
        demo.say(f"the simulator of a hosted deployment answers at {server.url}")
        demo.environment |= {
            "AZURE_ENDPOINT": server.url, "AZURE_DEPLOYMENT": server.deployment, "AZURE_API_KEY": server.key, "AZURE_API_VERSION": "2024-10-21",
        }  # fmt: skip
        with ThreadPoolExecutor(len(TRACKS)) as pool:
            results = dict(zip(TRACKS, pool.map(demo.track, TRACKS), strict=True))
        adapter = demo.out / f"adapter_{endpoint.TRACK}" if "after" in results[endpoint.TRACK] else None
        if adapter is None:
            demo.measure_calibration_rows(None)
        # All cores are this stage's, and threads that wait leave them to the endpoint, the simulator and whatever else runs: spinning took 2.4 times as long.
        demo.environment |= {"OMP_NUM_THREADS": str(os.cpu_count() or 1), "OMP_WAIT_POLICY": "passive"}
        served = demo.serve(adapter, server.deployment)
    rows = json.loads(results["toolcall"]["azure"].read_text())["counts"]["rows"]
    Console(width=110 if not sys.stdout.isatty() else None).print(table(results, rows))
    print(
        "azure simulator: answers from the references with 8% mistakes, 1% filtered; its tokens are estimates. phi-tiny: 4.6 M parameters,"
    )
    print(
        "pretrained on generated text; its cost is this machine's time. Neither says anything about a real model; the stages are the real ones."
    )
    taught = ", ".join(f"{track} on at most {TAUGHT[track]} rows, {SHOTS[track]} like it in front of each row" for track in TRACKS)
    print(f"fine-tuned: {taught}")
    print("\n".join(served))
    print("reports:")
    for paths in results.values():
        for path in paths.values():
            print(f"  {display_path(path)}")
    print(f"  {display_path(demo.cascade_page)}")
    print("your own logs, once .env is filled in (see README.md):")
    print("\n".join(f"  {line}" for line in OWN_ROWS.splitlines()))
    page = results[endpoint.TRACK]["page"]
    demo.say(f"done. Open {display_path(page)} in a browser: the verdict, and why")
    return 0


if __name__ == "__main__":
    run(main)
