"""The quickstart's endpoint: started, asked as an application asks it, and what its own counts say of it.

Nothing here looks into the endpoint: who answered is the header of each reply, what it cost stands in /metrics and in audits.jsonl.
"""

import re
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slm_swap.clients.completions import read_completion
from slm_swap.clients.endpoint import open_client
from slm_swap.clients.pricing import HostedPrices, to_float
from slm_swap.common.errors import UserError
from slm_swap.common.settings import PACKAGE, shown_path
from slm_swap.demo.mistakes import parse_call
from slm_swap.evaluating.row import score_row
from slm_swap.rows.examples import Example
from slm_swap.rows.prompts import request_text
from slm_swap.scoring.tracks import TRACKS
from slm_swap.serving.state import AUDITS, Tail

TRACK = "toolcall"
AT_ONCE = 8  # requests that the application has under way
START_SECONDS, END_SECONDS = 300, 120  # that the endpoint has to be up, and to end: the model is loaded, requests are answered first


def as_chat(example: Example) -> dict[str, Any]:
    """A row of one call in text form as the conversation that an application would have had: the user's message, the tools, the call.

    Raises:
        ValueError: the row is none of one call, or does not say what it offers.
    """
    call = parse_call(example.completion)
    if call is None or call.frame is not None or not example.tools:
        raise ValueError(f"{example.where or example.id}: no row of one call with its tools")
    asked = [{"role": "user", "content": request_text(example)}]
    calls = [{"name": call.name, "arguments": call.arguments}]
    return {"id": example.id, "messages": asked, "tools": example.tools, "calls": calls, "source": example.source}


# -- The endpoint ----------------------------------------------------------------------------------------------------------------


@contextmanager
def running(flags: Sequence[object], environment: Mapping[str, str], log: Path) -> Iterator[str]:
    """An endpoint on a free port of loopback with its small model loaded: its URL. In the end SIGTERM stops it.

    Raises:
        UserError: it did not start, does not let its small model answer, or ended with another exit code than 0; its log says why.
    """
    command = [sys.executable, str(PACKAGE / "05_serve/serve.py"), "--port", "0", *map(str, flags)]
    with open(log, "w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT, cwd=PACKAGE)
    try:
        yield _url(process, log)
        process.send_signal(signal.SIGTERM)
        code = process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        raise UserError(f"the endpoint did not end within {END_SECONDS} s of SIGTERM: its log is {shown_path(log)}") from None
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    if code:
        raise UserError(f"the endpoint ended with exit code {code}: its log is {shown_path(log)}")


def _url(process: "subprocess.Popen[bytes]", log: Path) -> str:
    until = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < until:
        if found := re.search(r"^(http://\S+)/v1 ", log.read_text(), re.MULTILINE):
            health = _health(found[1])
            if health.get("mismatches"):
                raise UserError(f"the endpoint's small model is not the calibrated one: {health['mismatches'][0]}; its log is {shown_path(log)}")
            if health.get("small_model") == "up":
                return found[1]
        time.sleep(0.1)
    print("".join(log.read_text().splitlines(keepends=True)[-15:]), file=sys.stderr)
    raise UserError(f"the endpoint did not start: its whole log is {shown_path(log)}")


def _health(url: str) -> dict[str, Any]:
    import httpx2

    with _http() as client:
        try:
            return client.get(f"{url}/healthz", timeout=5).json()
        except (httpx2.HTTPError, ValueError):
            return {}


def _http() -> Any:
    import openai

    return open_client(openai.DefaultHttpxClient, "127.0.0.1")


# -- An application --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """What the application got for a row: by whom and why (as the endpoint's header says), after how many seconds, and whether it is right by the row's
    reference. `right` is None where there is no reply to look at: the request was refused."""

    row: Example
    by: str
    reason: str
    seconds: float
    right: bool | None


def ask(url: str, model: str, rows: Sequence[Example]) -> list[Answer]:
    """Ask each row's conversation by the official client, AT_ONCE at a time; the answers in the order of the rows.

    Raises:
        openai.OpenAIError: the endpoint did not answer at all.
    """
    import openai

    def one(row: Example) -> Answer:
        tools = [{"type": "function", "function": tool} for tool in row.tools or ()]
        began = time.perf_counter()
        try:
            raw = client.chat.completions.with_raw_response.create(model=model, messages=row.messages, tools=tools)
        except openai.APIStatusError as error:  # a content filter's refusal, for one
            return Answer(row, *_who(error.response.headers), time.perf_counter() - began, None)
        seconds = time.perf_counter() - began
        reply = read_completion(raw.parse().model_dump(), native=True)
        return Answer(row, *_who(raw.headers), seconds, score_row(TRACKS[TRACK], row, reply).scored.error is None)

    with _http() as http_client, ThreadPoolExecutor(AT_ONCE) as pool:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="the-endpoint-has-no-keys", http_client=http_client)
        return list(pool.map(one, rows))


def _who(headers: Mapping[str, str]) -> tuple[str, str]:
    by, _, reason = headers.get("x-slm-swap", "nobody").partition("; reason=")
    return by, reason.partition(";")[0]


def summary(answers: Iterable[Answer]) -> list[str]:
    """A line for each who answered: how many, right by the reference, p50, and for the hosted model why it was asked."""
    answers = list(answers)
    lines = []
    for by in sorted({answer.by for answer in answers}, reverse=True):
        mine = [answer for answer in answers if answer.by == by]
        scored = [answer.right for answer in mine if answer.right is not None]
        refused = f", {len(mine) - len(scored)} refused" if len(scored) < len(mine) else ""
        reasons = ", ".join(f"{reason} {count}" for reason, count in Counter(answer.reason for answer in mine).most_common())
        why = "" if by == "local" else f" ({reasons})"
        p50 = statistics.median(answer.seconds for answer in mine)
        lines.append(f"{by}: {len(mine)} of {len(answers)} answered, {sum(scored)} of {len(scored)} right by the reference{refused}, p50 {p50 * 1000:.0f} ms{why}")
    return lines


# -- The bill --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bill:
    """What the hosted model's tokens cost at a price list, by the endpoint's own counts; None where not known. `answered` is for the `requests` requests that
    it answered, `audits` for those `audited` besides, of which `agreed` agree; `saved` is what the `local` answers would have cost, by the small model's own
    count of tokens."""

    requests: int
    local: int
    answered: float | None
    audits: float | None
    saved: float | None
    audited: int
    agreed: int

    @property
    def paid(self) -> float | None:
        return None if None in (self.answered, self.audits) else self.answered + self.audits

    @property
    def without(self) -> float | None:
        return None if None in (self.answered, self.saved) else self.answered + self.saved


def audits_so_far(state: Path, quiet: float, most: float = 60) -> list[dict[str, Any]]:
    """The lines of audits.jsonl: they come in the background, so that they are waited for until none has come for `quiet` seconds, `most` seconds at most."""
    found, tail, began = [], Tail(state / AUDITS), time.monotonic()
    last = began
    while time.monotonic() < min(last + quiet, began + most):
        if new := list(tail.new()):
            found, last = found + new, time.monotonic()
        time.sleep(0.1)
    return found


def read_metrics(url: str) -> str:
    """The text of /metrics."""
    with _http() as client:
        return client.get(f"{url}/metrics", timeout=30).raise_for_status().text


def bill_of(metrics: str, audits: Iterable[Mapping[str, Any]], prices: HostedPrices) -> Bill:
    """The bill of all that an endpoint answered, by the text of its /metrics and the lines of its audits.jsonl. All input counts in full: its counts do not say
    what was cached."""
    from prometheus_client.parser import text_string_to_metric_families

    audits = list(audits)
    found = [sample for family in text_string_to_metric_families(metrics) for sample in family.samples]

    def total(name: str, **labels: str) -> float:
        return sum(sample.value for sample in found if sample.name == name and labels.items() <= sample.labels.items())

    cost = prices.cost(*(int(total("slm_swap_tokens_total", answered_by="hosted", kind=kind)) for kind in ("input", "cached", "output")))
    spent = [audit["cost"]["hosted"] for audit in audits]
    return Bill(
        int(total("slm_swap_requests_total")), int(total("slm_swap_requests_total", answered_by="local")), to_float(cost),
        None if None in spent else sum(spent), None if cost is None else total("slm_swap_saved_money_total"),
        len(audits), sum(audit["agree"] for audit in audits),
    )  # fmt: skip


def bill_lines(bill: Bill, currency: str | None) -> list[str]:
    """What the bill says, in words."""

    def money(value: float | None) -> str:
        return "unknown" if value is None else f"{value:.4f} {currency or ''}".rstrip()

    share = f" ({bill.local / bill.requests:.0%} answered locally)" if bill.requests else ""
    return [
        f"audits: {bill.audited} times both models replied to the same request, and {bill.agreed} times they agree",
        f"bill at example prices of these {bill.requests} requests, the client's retries among them{share}: {money(bill.paid)}, "
        f"of which {money(bill.audits)} for audits; "
        f"by the hosted model alone {money(bill.without)}, by the small model's count of tokens for local answers; this machine's cost is not in it",
    ]
