"""The quickstart's last stage on an endpoint with a scripted small model: what it tells is what happened."""

import json
import re
from dataclasses import replace

import pytest

from slm_swap.clients.pricing import HostedPrices
from slm_swap.common.errors import UserError
from slm_swap.common.settings import PACKAGE
from slm_swap.demo import endpoint
from slm_swap.demo.quickstart import Demo
from slm_swap.rows.examples import Example, parse_example
from slm_swap.rows.prompts import request_of, toolcall_completion, toolcall_prompt
from slm_swap.rows.toolschema import openai_tool, xlam_tool
from slm_swap.serving import state
from tests.support.endpoints import CHECK_STOCK, HOSTED_KEY, HOSTED_NAME, SCRIPTED, cascade, serving
from tests.support.processes import environment, wait_until
from tests.support.scripted import Scripted, refused

PORTO = [{"name": "check_stock", "arguments": {"city": "Porto", "item": "lamp"}}]
PRICES = HostedPrices(2.5, 1.25, 10.0)  # those of demo/prices.toml
SAID = ("call Porto", "call Lyon", "unsure Porto", "unsure Lyon", "broken filtered")


def row(said: str) -> Example:
    """A conversation in which the call is to Porto, whatever was said."""
    return parse_example({"id": said, "messages": [{"role": "user", "content": said}], "tools": [openai_tool(CHECK_STOCK)], "calls": PORTO}, said)


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    """In cascade mode, with every local answer audited; the hosted model refuses to say anything of the last one."""
    folder = tmp_path_factory.mktemp("endpoint")
    flags = ("--mode", "cascade", "--cascade", cascade(folder / "cascade.json"), "--audit-share", 1, "--deadline", 60)

    def script(prompt, before, asked, answer):
        return refused(400, "content_filter", "filtered") if prompt == "broken filtered" else answer

    prices = {"PRICES_FILE": str(PACKAGE / "demo/prices.toml")}
    with Scripted(map(row, SAID), script, key=HOSTED_KEY) as hosted, serving(folder, *flags, hosted=hosted, **prices) as started:
        yield started


def audits(started):
    return started.lines("audits.jsonl")


def test_a_row_as_a_conversation_is_asked_and_scored_as_the_text_row_was():
    sample = (PACKAGE / "02_dataset/sample/xlam_sample.jsonl").read_text().splitlines()[:200]
    for line in map(json.loads, sample):
        tools, calls = [xlam_tool(tool) for tool in json.loads(line["tools"])], json.loads(line["answers"])
        completion = "\n".join(toolcall_completion(call["name"], call["arguments"]) for call in calls)
        text = Example(toolcall_prompt(tools, line["query"]), completion, str(line["id"]), tools)
        if len(calls) > 1:
            with pytest.raises(ValueError, match="no row of one call"):
                endpoint.as_chat(text)
            continue
        chat = parse_example(json.loads(json.dumps(endpoint.as_chat(text))), "w")
        assert (chat.id, chat.calls, chat.messages) == (text.id, calls, [{"role": "user", "content": line["query"]}])
        assert request_of("toolcall", replace(chat, ask="text")).messages[-1]["content"] == text.prompt


def test_an_application_sees_who_answered_and_whether_it_is_right(running):
    answers = endpoint.ask(running.url, HOSTED_NAME, [row(said) for said in SAID])
    assert [(answer.row.id, answer.by, answer.reason, answer.right) for answer in answers] == [
        ("call Porto", "local", "local", True),
        ("call Lyon", "local", "local", False),
        ("unsure Porto", "hosted", "below_threshold", True),
        ("unsure Lyon", "hosted", "below_threshold", True),
        ("broken filtered", "hosted", "unfit", None),
    ]
    local, hosted = (re.sub(r"p50 \d+ ms", "p50", line) for line in endpoint.summary(answers))
    assert local == "local: 2 of 5 answered, 1 of 2 right by the reference, p50"
    assert hosted == "hosted: 3 of 5 answered, 2 of 2 right by the reference, 1 refused, p50 (below_threshold 2, unfit 1)"


def test_the_bill_is_what_the_tokens_cost(running):
    before, known = endpoint.bill_of(endpoint.read_metrics(running.url), [], PRICES), len(audits(running))
    usage = [running.ask("unsure Porto")[1].usage for _ in range(2)]
    for _ in range(3):
        running.ask("call Porto")
    wait_until(lambda: len(audits(running)) == known + 3)
    after = endpoint.bill_of(endpoint.read_metrics(running.url), audits(running)[known:], PRICES)
    cost = sum(one.prompt_tokens * 2.5 + one.completion_tokens * 10 for one in usage) / 1e6
    saved = 3 * (20 * 2.5 + 10 * 10) / 1e6  # the scripted model counts 20 tokens in and 10 out
    assert (after.requests - before.requests, after.local - before.local, after.audited, after.agreed) == (5, 3, 3, 3)
    assert after.answered - before.answered == pytest.approx(cost) and after.saved - before.saved == pytest.approx(saved)
    spent = sum(line["cost"]["hosted"] for line in audits(running)[known:])
    assert spent > 0 and after.paid == pytest.approx(after.answered + spent) and after.without == pytest.approx(after.answered + after.saved)


def test_what_is_not_known_is_not_told():
    metrics = 'slm_swap_requests_total{answered_by="local",reason="local"} 1.0\nslm_swap_requests_total{answered_by="hosted",reason="mode"} 3.0\n'
    one = {"cost": {"hosted": None}, "agree": False}
    bill = endpoint.bill_of(metrics, [one], HostedPrices())
    assert (bill.answered, bill.saved, bill.paid, bill.without) == (None, None, None, None)
    audited, money = endpoint.bill_lines(bill, "USD")
    assert audited == "audits: 1 times both models replied to the same request, and 0 times they agree"
    assert money.startswith("bill at example prices of these 4 requests, ") and "(25% answered locally): unknown, of which unknown for audits;" in money
    assert "by the hosted model alone unknown" in money
    assert endpoint.bill_of(metrics, [one], PRICES).paid is None


def demo(folder):
    return Demo(folder, short=True, environment=environment(LANGFUSE_DISABLED="1"))


def test_the_roll_back_takes_everything_back_and_lets_it_on_again(running, tmp_path, capsys):
    rows, kept = [row("call Porto"), row("call Lyon")], set(running.state.glob("stop-*.json"))
    demo(tmp_path).take_back(running.url, HOSTED_NAME, running.state, rows)
    told = capsys.readouterr().out
    assert "the hosted model answers 2 of the same 2 requests" in told and "the small model answers 2 of them again" in told
    assert state.flag(running.state) is None and len(set(running.state.glob("stop-*.json")) - kept) == 1


def test_a_small_model_that_stays_away_fails_the_stage(running, tmp_path):
    with pytest.raises(UserError, match="nothing is answered locally after"):
        demo(tmp_path).take_back(running.url, HOSTED_NAME, running.state, [row("unsure Porto")])


@pytest.mark.parametrize(
    ("identity", "why"), [(None, "the endpoint did not start"), (SCRIPTED, "the endpoint's small model is not the calibrated one: files_sha256 is")]
)
def test_an_endpoint_that_cannot_answer_as_calibrated_fails_the_stage(running, tmp_path, identity, why):
    path = cascade(tmp_path / "cascade.json", identity) if identity else tmp_path / "none.json"
    known = environment(
        LANGFUSE_DISABLED="1", SLM_MODEL_PATH="models/phi-tiny", SLM_BASE_URL="", SLM_SWAP_KEYS="", AZURE_ENDPOINT=running.hosted.url, AZURE_DEPLOYMENT=HOSTED_NAME,
        AZURE_API_KEY=HOSTED_KEY, AZURE_API_VERSION="2024-10-21",
    )  # fmt: skip
    flags = ("--track", "toolcall", "--mode", "cascade", "--cascade", path, "--precision", "fp32", "--state", tmp_path / "state")
    with pytest.raises(UserError, match=why), endpoint.running(flags, known, tmp_path / "log"):
        pass
