"""Decoding under a grammar, on the embedded model and on one of random weights, in fp32 on a CPU."""

from dataclasses import replace

import pytest
import torch

from slm_swap.clients.engines import Prompt
from slm_swap.clients.engines.captured import CapturedDecoder
from slm_swap.clients.engines.masks import Grammars, Masks
from slm_swap.clients.protocol import Reply
from slm_swap.clients.reply_forms import call_form, row_grammar
from slm_swap.common.settings import Settings
from slm_swap.evaluating.row import read_reply, score_row
from slm_swap.rows.examples import Example, parse_example
from slm_swap.rows.json_schema import call_violations
from slm_swap.rows.prompts import request_of, toolcall_completion, toolcall_prompt
from slm_swap.scoring.replies import parse_toolcall
from slm_swap.scoring.tracks import TRACKS
from slm_swap.slm_client import SLMClient, in_form, made_again
from tests.support.chat_templates import tokenizer_of
from tests.support.uncaptured import uncaptured

SETTINGS = Settings(slm_model_path="models/phi-tiny")
TOOLS = [
    {"name": "set_mode", "description": "", "parameters": {"type": "object", "properties": {"mode": {"enum": ["on", "off"]}, "fast": {"type": "boolean"}}, "required": ["mode"]}},
    {"name": "count", "description": "", "parameters": {"type": "object", "properties": {"n": {"enum": [1, 12, 123]}}, "required": ["n"]}},
]  # fmt: skip


def row(text: str, tools=TOOLS) -> Example:
    return Example(toolcall_prompt(tools, text), toolcall_completion("count", {"n": 1}), id=text, tools=tools)


ROWS = [row(text) for text in ("Count to 12.", "Switch it on, and do so as fast as it can be done.", "Off!", "What?", "n is 123", "fast mode", "12", "Please count.")]
ASKED = [request_of("toolcall", example) for example in ROWS]
UNSAID = [TOOLS[0] | {"parameters": {"type": "object", "properties": {"mode": {"not": {"type": "null"}}}}}]


@pytest.fixture(scope="module")
def clients() -> dict[str, SLMClient]:
    """One for each way, of the same weights: random ones, which know nothing of calls."""
    made = {way: SLMClient(SETTINGS, precision="fp32", max_new_tokens=48, constrain=way) for way in ("off", "retry", "always")}
    torch.manual_seed(5)
    for parameter in made["off"].engine.model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    for client in made.values():
        client.engine.model.load_state_dict(made["off"].engine.model.state_dict())
    return made


def same(left: Reply, right: Reply) -> bool:
    """But for what hangs on the batch: its name, the seconds, and the last digits of chances."""
    sure = [{name: told for name, told in (reply.confidence or {}).items() if told is not None} for reply in (left, right)]
    alike = [replace(reply, seconds=0, batch=None, confidence=None) for reply in (left, right)]
    return alike[0] == alike[1] and sure[0] == pytest.approx(sure[1], rel=1e-4, abs=1e-4)


def test_random_weights_always_reply_in_form_and_keep_the_schema(clients):
    free, bound = (clients[way].generate(ASKED) for way in ("off", "always"))
    assert not any(map(in_form, ASKED, free)), "or nothing is shown"
    for reply in bound:
        call = parse_toolcall(reply.text)
        assert call_violations(call.value, next(tool for tool in TOOLS if tool["name"] == call.name)) == []
        assert (reply.finish_reason, reply.constrained, reply.grammar_error) == ("stop", True, None)
    assert {reply.constrained for reply in free} == {None}


@pytest.mark.parametrize("size", [1, 3])
def test_replies_under_a_grammar_do_not_depend_on_the_batch(clients, size, monkeypatch):
    expected = clients["always"].generate(ASKED)
    monkeypatch.setattr(clients["always"].engine, "batch_size", size)
    assert all(map(same, clients["always"].generate(ASKED), expected))


def test_the_captured_decoder_keeps_to_grammars_too(clients, monkeypatch):
    client = clients["always"]
    expected = client.generate(ASKED)
    monkeypatch.setattr(CapturedDecoder, "_capture", uncaptured)
    monkeypatch.setattr(client.engine, "_captured", CapturedDecoder(client.engine.model, client.engine.ends))
    assert all(map(same, client.generate(ASKED), expected))
    assert client.engine._captured is not None and client.engine._captured._steps


def test_a_row_without_a_grammar_is_asked_freely_beside_others_and_says_why(clients):
    asked = [*ASKED[:3], request_of("toolcall", row("Count to 12.", UNSAID))]
    for way in ("always", "retry"):
        *others, odd = clients[way].generate(asked)
        (free,) = clients["off"].generate(asked[3:])
        assert same(replace(odd, constrained=None, grammar_error=None), free)
        assert (odd.constrained, odd.grammar_error) == (False, "`not` in the schema")
        assert all(reply.constrained and in_form(request, reply) for request, reply in zip(asked, others, strict=False))


def test_a_reply_is_made_again_only_where_it_is_not_in_form(clients, monkeypatch):
    """What is in form stays to the byte; the others become what `always` makes of them, at the price of both."""
    free, bound = (clients[way].generate(ASKED) for way in ("off", "always"))
    kept = {2, 5}
    monkeypatch.setattr("slm_swap.slm_client.in_form", lambda request, reply: ASKED.index(request) in kept)
    for at, reply in enumerate(clients["retry"].generate(ASKED)):
        if at in kept:
            assert same(reply, replace(free[at], constrained=False))
        else:
            assert (reply.text, reply.finish_reason, reply.constrained) == (bound[at].text, bound[at].finish_reason, True)
            assert reply.output_tokens == free[at].output_tokens + bound[at].output_tokens
            assert reply.confidence == free[at].confidence, "a forced token looks certain"


def test_a_run_that_goes_on_makes_the_same_replies_again(clients, monkeypatch):
    """A batch that is made again has the rows that it had before, those that are answered too."""
    client, batches = clients["retry"], []
    monkeypatch.setattr(client.engine, "batch_size", 4)
    whole, decode = client.generate(ASKED), client.engine._decode

    def seen(batch):
        batches.append([prompt.index for prompt in batch])
        return decode(batch)

    monkeypatch.setattr(client.engine, "_decode", seen)
    dict(client.stream(enumerate(ASKED)))
    before = list(batches)
    batches.clear()
    left = dict(client.stream(enumerate(ASKED), answered={0, 1, 3, 4, 5, 6, 7}))
    assert list(left) == [2] and same(left[2], whole[2])
    assert batches and all(batch in before for batch in batches)


@pytest.mark.parametrize(
    "text, reason, right",
    [
        ('<tool_call name="count">{"n":7}</tool_call>', "stop", True),  # the schema is no matter of form
        ('<tool_call name="count">{"n":1}</tool_call>', "length", False),
        ('<tool_call name="kount">{"n":1}</tool_call>', "stop", False),
        ('<tool_call name="count">{"n":1,}</tool_call>', "stop", False),
        ('Here: <tool_call name="count">{"n":1}</tool_call>', "stop", False),
        ("12", "stop", False),
    ],
)
def test_in_form(text, reason, right):
    assert in_form(ASKED[0], Reply(text, reason)) is right


def test_a_conversation_may_be_answered_in_words():
    example = parse_example({"messages": [{"role": "user", "content": "?"}], "tools": TOOLS, "calls": []}, "rows:1")
    for asked in (request_of("toolcall", example), request_of("toolcall", replace(example, ask="text"))):
        calls = [] if asked.native else None
        assert in_form(asked, Reply("It is sunny.", calls=calls))
        assert not in_form(asked, Reply("", calls=calls)) and not in_form(asked, Reply('[TOOL_CALLS][{"name": "x"', calls=calls))
    native = request_of("toolcall", example)
    assert in_form(native, Reply("", calls=[{"name": "count", "arguments": '{"n": 1}'}]))
    assert not in_form(native, Reply("", calls=[{"name": "count", "arguments": '{"n": 1'}]))
    assert not in_form(native, Reply("", calls=[{"name": "kount", "arguments": "{}"}]))


def test_both_replies_are_paid_and_what_the_free_one_tells_stays():
    free, bound = Reply("a", "length", 5, 7, 1, 2.0, limit=9, reasoning_tokens=3), Reply("b", "stop", 5, 4, 0, 1.5, limit=9)
    assert made_again(free, bound) == Reply("b", "stop", 5, 11, 1, 3.5, limit=9, reasoning_tokens=3)


def test_the_rows_file_says_how_a_reply_was_made():
    example = ROWS[0]
    for reply in (Reply(example.completion, constrained=True), Reply("x", constrained=False, grammar_error="`not` in the schema"), Reply("x")):
        scored = score_row(TRACKS["toolcall"], example, reply)
        told = read_reply(scored.to_json(TRACKS["toolcall"]))
        assert (told.constrained, told.grammar_error) == (reply.constrained, reply.grammar_error)


@pytest.mark.parametrize("family, separators", [("phi", (", ", ": ")), ("qwen2_5", (", ", ": ")), ("qwen3", (", ", ": ")), ("llama3_1", (", ", ": "))])
def test_calls_in_a_templates_own_form_are_in_the_grammar(family, separators):
    from slm_swap.clients.endings import reply_ends, require_ending
    from slm_swap.tuning.tokens import lesson

    tokenizer = tokenizer_of(family)
    assert call_form(tokenizer).separators == separators
    made = Grammars(tokenizer)
    shared = {"messages": [{"role": "user", "content": "?"}], "tools": TOOLS}
    one = {"name": "set_mode", "arguments": {"fast": True, "mode": "on"}}
    several = [] if family == "llama3_1" else [[one, {"name": "count", "arguments": {"n": 12}}]]
    for wanted in ({"calls": [one]}, {"calls": [], "content": "It is sunny."}, *({"calls": calls} for calls in several)):
        example = parse_example(shared | wanted, "rows:1")
        _, tokens = lesson(tokenizer, "toolcall", example, require_ending(tokenizer))
        grammar = row_grammar(tokenizer, request_of("toolcall", example), reply_ends(tokenizer), made.special)
        assert made.why_not(grammar) is None
        assert made.matcher(grammar).try_consume_tokens(tokens) == len(tokens), tokenizer.decode(tokens)


def test_embeddings_that_are_no_tokens_come_only_where_a_row_is_free(clients):
    client = clients["always"]
    grammar = row_grammar(client.tokenizer, ASKED[0], client.engine.ends, client.grammars.special)
    size = len(client.tokenizer)
    prompts = [Prompt(0, [1], 9, grammar=grammar), Prompt(1, [1], 9), Prompt(2, [1], 9, grammar=grammar)]

    def allowed(vocabulary: int) -> torch.Tensor:
        return Masks(client.grammars, prompts).apply(torch.zeros(3, vocabulary), [0, 1, 2]) == 0

    exact, padded = allowed(size), allowed(size + 100)
    assert torch.equal(padded[:, :size], exact) and 0 < exact[0].sum() < size and exact[1].all()
    assert padded[:, size:].any(1).tolist() == [False, True, False] and padded[1].all()
