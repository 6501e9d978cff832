"""Make one HTML file from a decision, for the person who decides: it opens from disk and needs no network.

    python 03_compare/render_report.py --track toolcall
    python 03_compare/render_report.py --decision decision.json --out decision.html

It also reads the rows files that the decision names. It shows prompts if the dataset is unchanged and in its place.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from anywhere

from slm_swap.cli import Parser, check_out, next_step, run
from slm_swap.common.reports import write_atomically
from slm_swap.common.settings import PACKAGE, find_path, shown_path
from slm_swap.scoring.tracks import TRACKS
from slm_swap.verdict.html_report.decision_file import read_decision
from slm_swap.verdict.html_report.page import write_page


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    decision = parser.add_mutually_exclusive_group(required=True)
    decision.add_argument("--track", choices=TRACKS, help="the decision at 03_compare/reports/<track>.json")
    decision.add_argument("--decision", metavar="FILE", help="a decision elsewhere")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page (default: beside the decision, as .html)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    path = find_path(args.decision or PACKAGE / f"03_compare/reports/{args.track}.json")
    decision = read_decision(path)
    out = args.out or path.with_suffix(".html")
    reports = [report for report in decision["reports"].values() if isinstance(report, dict)]
    check_out(out, inputs=[path, *(report[key] for report in reports for key in ("path", "rows_path"))])
    write_atomically(out, lambda stream: stream.writelines(write_page(decision)))
    print(f"report: {shown_path(out)}")
    next_step(f"open {out.absolute().as_uri()} in a browser")
    return 0


if __name__ == "__main__":
    run(main)
