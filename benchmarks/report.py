"""Measure how long the HTML report of 5,000 rows takes to make and to open in headless Chromium.

    python benchmarks/report.py
    python benchmarks/report.py --rows 500 --out runs/report.json

Rows are generated and really scored (tests/decision_files.py). Open: from the navigation's start to the load event with the first
page of rows laid out, each time in a new browser context; the median and the worst of ten.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere

from slm_swap.cli import Parser, positive, run
from slm_swap.common.errors import UserError
from slm_swap.common.reports import code_version, hardware, now, write_atomically, write_json
from slm_swap.common.settings import ROOT
from slm_swap.verdict.html_report.decision_file import read_decision
from slm_swap.verdict.html_report.page import write_page
from tests.support.decision_files import make_decision

OPENED = 10
LAID_OUT = "document.querySelectorAll('#body tr').length && document.body.getBoundingClientRect().height && performance.now()"


def open_page(page: Path) -> tuple[str, list[dict[str, float]]]:
    """The browser's version and, for each opening, milliseconds since the navigation began.

    Raises:
        UserError: there is no Chromium.
    """
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium")
    if not chromium:
        raise UserError("no chromium on this machine: apt-get install chromium")
    times = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for _ in range(OPENED):
            tab = browser.new_context().new_page()
            tab.goto(page.as_uri(), wait_until="load")
            load = tab.evaluate("performance.timing.loadEventEnd - performance.timing.navigationStart")
            start = tab.evaluate("performance.now()")
            times.append({"load": load, "layout": load + tab.evaluate(LAID_OUT) - start})
            tab.context.close()
        version = browser.version
        browser.close()
    return version, times


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--rows", type=positive, default=5000, help="rows of the report")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the file to write (default: benchmarks/results/report.json)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        decision, page = make_decision(Path(folder), args.rows), Path(folder, "report.html")
        start = time.perf_counter()
        write_atomically(page, lambda stream: stream.writelines(write_page(read_decision(decision))))
        rendered = time.perf_counter() - start
        version, times = open_page(page)
        size = page.stat().st_size
    opened = [each["layout"] for each in times]
    results = {
        "rows": args.rows,
        "render_seconds": round(rendered, 1),
        "file_mib": round(size / 2**20, 1),
        "open_milliseconds": {"median": round(statistics.median(opened)), "worst": round(max(opened)), "openings": OPENED},
        "chromium": version,
    }
    print(json.dumps(results))
    report = {"created_at": now(), "code": code_version(), "hardware": hardware(), "results": results}
    write_json(args.out or ROOT / "benchmarks/results/report.json", report)
    return 0


if __name__ == "__main__":
    run(main)
