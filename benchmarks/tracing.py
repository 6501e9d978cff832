"""Measure what tracing adds to a run at 500 rows a second: seconds, CPU and memory, with Langfuse well and in trouble.

    python benchmarks/tracing.py
    python benchmarks/tracing.py --rows 2000 --trouble-rows 500 --repeat 1 --out /tmp/tracing.json

The rows come from an instant client, one every 2 ms, each traced as eval.py traces it, to the tests' recording server in a process of
its own over a real socket; or to nothing. Traced and untraced runs take turns, so that a busy machine is busy for both. A trouble begins
with the first row and is over when the run has ended: then resend_traces.py delivers what is left, and everything has to be there once.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere

from slm_swap.cli import Parser, positive, run
from slm_swap.clients.protocol import Reply
from slm_swap.common.reports import code_version, hardware, now, write_json
from slm_swap.common.settings import PACKAGE, ROOT, Settings, display_path
from slm_swap.rows.prompts import build_messages
from slm_swap.tracing.runs import connect, outbox_path, trace_run

RATE = 500  # rows a second
TROUBLES = {  # what the server's process runs
    "refuses connections": "server.refuse()",
    "answers after 1 s": "server.delay = 1",
    "never answers": "server.hanging = True",
    "answers 400": "server.status = 400",
    "answers 401": "server.status = 401",
    "answers 500": "server.status = 500",
    "answers 503 half of the time": "server.flaky = 0.5",
}
WELL = "server.delay = server.flaky = 0; server.hanging = False; server.status = None; server._server or server.accept()"
COUNT = "print(*(len(x) for ids in ([s.id for s in server.spans], [s['id'] for s in server.scores]) for x in (ids, set(ids))), flush=True)"
SERVER = """
import os, sys
os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))  # a real server has a machine of its own
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere
from tests.support.langfuse_server import LangfuseServer
with LangfuseServer("pk-lf-benchmark") as server:
    print(server.url, flush=True)
    for line in sys.stdin:
        exec(line)
        print("done", flush=True)
"""


class RemoteServer:
    """The recording server in a process of its own."""

    def __enter__(self) -> "RemoteServer":
        code = SERVER.format(root=str(ROOT))
        self.process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.url = self.process.stdout.readline().strip()
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def do(self, statement: str) -> list[str]:
        """Run a statement there: the lines that it prints."""
        print(statement, file=self.process.stdin, flush=True)
        return list(iter(lambda: self.process.stdout.readline().strip(), "done"))


def ask_rows(rows: range, trace) -> tuple[float, float]:
    """(seconds, CPU seconds of this process) of a run that asks one row every 2 ms at the earliest."""
    messages = build_messages("toolcall", "Book a table for two in Lisbon on Friday at eight, near the river if possible. " * 4)
    reply = Reply('<tool_call name="book_table">{"city":"Lisbon","people":2,"day":"Friday","hour":20}</tool_call>', "stop", 190, 49, 40, 0.25)
    scores = dict.fromkeys(("valid_call", "name_match", "args_exact", "args_precision", "args_recall", "args_f1"), 1.0) | {"error": "none"}
    started, cpu = time.perf_counter(), time.process_time()
    for number in rows:
        if trace:
            trace.generation(f"row-{number}", "phi-4-mini", messages, reply, scores)
        time.sleep(1 / RATE)
    return time.perf_counter() - started, time.process_time() - cpu


def resident(process: int) -> float:
    """MiB of memory that a process holds."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def traced(rows: int, trouble: str | None) -> dict:
    """One traced run. Memory is what the second half of the rows adds, in the run's process and the sender's.

    Raises:
        RuntimeError: something did not arrive, or twice.
    """
    with RemoteServer() as server, tempfile.TemporaryDirectory() as folder:
        settings = Settings(langfuse_public_key="pk-lf-benchmark", langfuse_secret_key="sk-lf-right", langfuse_base_url=server.url)
        connection, report = connect(settings), Path(folder, "report.json")
        waited = resource.getrusage(resource.RUSAGE_CHILDREN)
        with trace_run(connection, "benchmark", report) as trace:
            children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
            (sender,) = {int(child) for child in children} - {server.process.pid}
            if trouble:
                server.do(TROUBLES[trouble])
            first = ask_rows(range(rows // 2), trace)
            held = resident(os.getpid()), resident(sender)
            rest = ask_rows(range(rows // 2, rows), trace)
            grown = resident(os.getpid()) - held[0], resident(sender) - held[1]
            ended = time.perf_counter()
        closing = time.perf_counter() - ended
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        server.do(WELL)
        left = outbox_path(report).exists()
        if left:
            keys = {"PUBLIC_KEY": "pk-lf-benchmark", "SECRET_KEY": "sk-lf-right", "BASE_URL": server.url, "DISABLED": "0"}
            command = [sys.executable, str(PACKAGE / "01_eval/resend_traces.py"), folder]
            subprocess.run(command, env=os.environ | {f"LANGFUSE_{name}": value for name, value in keys.items()}, check=True, stdout=subprocess.DEVNULL)
        counts = [int(count) for count in server.do(COUNT)[0].split()]
        if counts != [rows + 1, rows + 1, rows * 7, rows * 7]:
            raise RuntimeError(f"{trouble}: {counts} spans, different ones, scores and different ones arrived of {rows} rows")
    return {
        "seconds": first[0] + rest[0],
        "cpu_seconds": first[1] + rest[1],
        "sender_cpu_seconds": used.ru_utime + used.ru_stime - waited.ru_utime - waited.ru_stime,
        "closing_seconds": closing,
        "grown_mib": grown[0],
        "sender_grown_mib": grown[1],
        "resent": left,
    }


def measure(rows: int, trouble: str | None, repeat: int) -> dict:
    """The run of median slowdown, and the slowdown of every one: seconds of the rows against an untraced run's, the closing apart."""
    runs = []
    for _ in range(repeat):
        seconds, cpu = ask_rows(range(rows), None)
        told = {"rows": rows, "untraced_seconds": seconds, "untraced_cpu_seconds": cpu} | traced(rows, trouble)
        runs.append(told | {"ratio": told["seconds"] / seconds, "ratio_with_closing": (told["seconds"] + told["closing_seconds"]) / seconds})
        print(f"{trouble or 'well'}: {100 * (runs[-1]['ratio'] - 1):+.1f}%, closing {runs[-1]['closing_seconds']:.2f} s", flush=True)
    runs.sort(key=lambda one: one["ratio"])
    middle = {name: round(value, 3) for name, value in runs[len(runs) // 2].items()}
    return middle | {"ratios": [round(one["ratio"], 3) for one in runs], "closing_seconds_at_most": round(max(one["closing_seconds"] for one in runs), 3)}


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=positive, default=10_000, help="rows of a run with Langfuse well (default: 10000)")
    parser.add_argument("--trouble-rows", type=positive, default=1000, help="rows of a run with Langfuse in trouble (default: 1000)")
    parser.add_argument("--repeat", type=positive, default=3, help="pairs of runs, of which the medians are reported (default: 3)")
    parser.add_argument("--out", type=Path, metavar="FILE", default=ROOT / "benchmarks/results/tracing.json")
    args = parser.parse_args(argv)
    well = measure(args.rows, None, args.repeat)
    troubles = {trouble: measure(args.trouble_rows, trouble, args.repeat) for trouble in TROUBLES}
    told = {"created_at": now(), "code": code_version(), "hardware": hardware(), "rows_per_second": RATE}
    write_json(args.out, told | {"well": well, "in_trouble": troubles})
    print(f"tracing takes {100 * (well['ratio_with_closing'] - 1):+.1f}% of the run, closing included")
    worst = max(troubles, key=lambda trouble: troubles[trouble]["ratio"])
    print(f"in trouble at most {100 * (troubles[worst]['ratio'] - 1):+.1f}% ({worst}), and {max(t['closing_seconds_at_most'] for t in troubles.values()):.1f} s at the end")
    print(f"report: {display_path(args.out)}")
    return 0


if __name__ == "__main__":
    run(main)
