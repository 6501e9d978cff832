"""Send to Langfuse what earlier runs could not deliver: the *.traces.jsonl files beside their reports.

    python 01_eval/resend_traces.py
    python 01_eval/resend_traces.py runs/quickstart 01_eval/reports/toolcall_azure_test.traces.jsonl

What has arrived is not sent again. A file is deleted once all of it has arrived. A file with damaged lines stays, and its other lines are sent.
The exit code is 1 if something is still missing.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from anywhere

from slm_swap.cli import Parser, next_step, positive_number, run, warn
from slm_swap.common.errors import UserError
from slm_swap.common.settings import PACKAGE, find_path, load_settings, shown_path
from slm_swap.tracing import wire
from slm_swap.tracing.outbox import SUFFIX, Outbox
from slm_swap.tracing.runs import Connection, connect

FOLDERS = ("01_eval/reports", "03_compare/reports", "04_ft")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("places", nargs="*", metavar="PLACE", help="files, or folders to look through (default: every stage's own)")
    parser.add_argument(
        "--seconds", type=positive_number, default=600.0, help="time limit for one file; the server has a tenth of it for each answer, and at least 5 s"
    )
    return parser.parse_args(argv)


def outboxes(places: list[str]) -> list[Path]:
    """The files that the places name or hold.

    Raises:
        UserError: a place is not there.
    """
    found = []
    for place in map(find_path, places or [PACKAGE / folder for folder in FOLDERS]):
        if place.is_dir():
            found += sorted(place.rglob(f"*{SUFFIX}"))
        elif place.is_file():
            found.append(place)
        elif places:
            raise UserError(f"nothing at {shown_path(place)}: name a *{SUFFIX} file or a folder with some")
    return found


def send(outbox: Outbox, connection: Connection, seconds: float) -> bool:
    """Deliver one file, and say what became of it: whether nothing of it is missing."""
    shown, server = shown_path(outbox.path), connection.server
    if outbox.header:
        if outbox.header["base_url"] != server.base_url:
            warn(f"{shown} was recorded for {outbox.header['base_url']} and is sent to {server.base_url}")
        outbox.deliver(server)
    missing = outbox.close(seconds)
    if outbox.turned_down:
        warn(f"{outbox.turned_down} scores of {shown} were turned down as not valid")
    if any(missing.values()) and outbox.header:
        warn(f"{missing['spans']} spans and {missing['scores']} scores of {shown} are still missing ({outbox.reason})")
    if not outbox.header:
        warn(f"{shown} has no header that can be read, so nothing in it can be sent: delete it when you no longer need it")
    elif outbox.damaged:
        warn(f"{outbox.damaged} damaged lines of {shown} cannot be sent: the file stays, delete it when you no longer need it")
    elif not any(missing.values()):
        print(f"sent: {shown}\ntrace: {server.base_url}/project/{connection.project}/traces/{outbox.header['trace']}")
        return True
    return False


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    settings = load_settings()
    found = outboxes(args.places)
    if not found:
        print("nothing to send: every trace has arrived")
        return 0
    connection = connect(settings, seconds=max(wire.REQUEST_SECONDS, args.seconds / 10))
    if connection is None:
        raise UserError("LANGFUSE_DISABLED=1 is set: unset it to send traces")
    left = 0
    for path in found:
        try:
            outbox = Outbox(path)
        except UserError as trouble:
            warn(str(trouble))
            left += 1
            continue
        left += not send(outbox, connection, args.seconds)
    if left:
        next_step(f"the same command with --seconds {args.seconds * 4:g}, once Langfuse at {connection.server.host} has less to do")
    return 1 if left else 0


if __name__ == "__main__":
    run(main)
