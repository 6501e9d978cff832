"""Few-shot: which train rows are shown to a row, and as what."""

import json
import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slm_swap.common.errors import UserError
from slm_swap.common.settings import ROOT
from slm_swap.rows.examples import Dataset, parse_example
from slm_swap.rows.few_shot import FewShot
from slm_swap.rows.prompts import request_of, structured_prompt, toolcall_prompt
from slm_swap.rows.words import near, words

PAINT = {"name": "paint", "description": "Paint.", "parameters": {"type": "object", "properties": {"color": {"type": "string"}}}}
SELL = {"name": "sell", "description": "Sell.", "parameters": {"type": "object", "properties": {"what": {"type": "string"}}}}
LARGER = {**PAINT, "parameters": {"type": "object", "properties": {"color": {"type": "string"}, "coats": {"type": "integer"}}}}


def called(request: str, name: str = "paint", tools=(PAINT, SELL), **fields) -> dict:
    calls = [{"name": name, "arguments": {"color" if name == "paint" else "what": "red"}}]
    return {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": request}], "tools": list(tools), "calls": calls} | fields


def plain(request: str, **fields) -> dict:
    completion = '<tool_call name="paint">{"color":"red"}</tool_call>'
    return {"prompt": toolcall_prompt([PAINT], request), "completion": completion, "tools": [PAINT]} | fields


def index(tmp_path, rows: list[dict], count: int = 3, track: str = "toolcall") -> FewShot:
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return FewShot(path, track, count)


def asked(few_shot: FewShot, row: dict, ask: str | None = None) -> list[str]:
    """What the user says in the turns of a row's shots."""
    example = parse_example(row, "rows.jsonl:1")
    vars(example)["ask"] = ask
    return [turn["content"] for turn in few_shot.turns(example) if turn["role"] == "user"]


def test_the_nearest_rows_are_shown_and_the_nearest_last(tmp_path):
    few_shot = index(tmp_path, [called("a green door for the shed"), called("what about tea"), called("the green fence behind the shed")], 2)
    assert asked(few_shot, called("paint the green fence of my garden"), "native") == ["a green door for the shed", "the green fence behind the shed"]
    assert few_shot.report()["shown"] == {"2": 1}


def test_rows_without_a_word_in_common_are_not_shown(tmp_path):
    few_shot = index(tmp_path, [called("what about tea")])
    assert asked(few_shot, called("paint it")) == [] == asked(few_shot, called("?!"))
    assert few_shot.report()["shown"] == {"0": 2}


def test_neither_the_row_nor_a_near_duplicate_nor_its_group_is_shown(tmp_path):
    request = "paint the big red fence of my garden in green"
    rows = [called(request), called(request.upper()), called(f"{request} now"), called("a red fence", group="7"), called("a red garden", group="8")]
    assert asked(index(tmp_path, rows), called(request, group="7")) == ["a red garden"]


def test_what_is_shown_does_not_hang_on_the_reply_that_is_due(tmp_path):
    """In production it is not known."""
    few_shot = index(tmp_path, [called("paint the big red fence of my garden"), called("a red fence"), called("a fence to sell", "sell")])
    row = called("paint the big red fence of our garden")
    assert asked(few_shot, row) == asked(few_shot, row | {"calls": []}) == asked(few_shot, called(row["messages"][1]["content"], "sell"))


@pytest.mark.parametrize(("tools", "shown"), [([PAINT, SELL], 2), ([PAINT], 1), ([SELL], 1), ([LARGER, SELL], 1), ([], 0)])
def test_only_tools_on_offer_are_called(tmp_path, tools, shown):
    few_shot = index(tmp_path, [called("sell the red fence", "sell"), called("paint a red fence", "paint")])
    assert len(asked(few_shot, called("red fence", tools=tools, calls=[]))) == shown


def test_tools_that_stand_in_the_prompt_alone_are_found_there(tmp_path):
    bare = plain("red fence")
    del bare["tools"]
    assert asked(index(tmp_path, [plain("a red door")]), bare) == ["Request: a red door"]
    other = {"prompt": toolcall_prompt([SELL], "red fence"), "completion": '<tool_call name="sell">{}</tool_call>'}
    assert asked(index(tmp_path, [plain("a red door")]), other) == []


def test_only_rows_of_the_same_schema_are_shown(tmp_path):
    def row(request: str, schema: dict) -> dict:
        return {"prompt": structured_prompt(schema, request), "completion": '{"a":1}', "schema": schema}

    one, other = {"type": "object", "required": ["a"], "title": "A"}, {"type": "object"}
    few_shot = index(tmp_path, [row("a red door", one), row("a red fence", other)], track="structured")
    assert asked(few_shot, row("red", {"title": "A", "required": ["a"], "type": "object"})) == ["Request: a red door"]


def test_in_text_form_the_row_alone_says_what_is_on_offer(tmp_path):
    few_shot = index(tmp_path, [plain("a red door")])
    example = parse_example(plain("the red fence"), "rows.jsonl:1")
    alone = request_of("toolcall", example).messages
    vars(example)["shots"] = few_shot.turns(example)
    shown = [{"role": "user", "content": "Request: a red door"}, {"role": "assistant", "content": plain("")["completion"]}]
    assert request_of("toolcall", example).messages == [alone[0], *shown, alone[1]]


def test_in_native_form_calls_are_calls_with_their_results(tmp_path):
    few_shot = index(tmp_path, [called("a red door"), called("the red roof")])
    example = parse_example(called("a fence in red"), "rows.jsonl:1")
    vars(example)["shots"] = few_shot.turns(example)
    messages = request_of("toolcall", example).messages
    assert [message["role"] for message in messages] == ["system", *["user", "assistant", "tool"] * 2, "user"]
    calls = [call for message in messages for call in message.get("tool_calls", ())]
    assert [call["function"] for call in calls] == [{"name": "paint", "arguments": '{"color":"red"}'}] * 2
    assert [call["id"] for call in calls] == [message["tool_call_id"] for message in messages if message["role"] == "tool"]
    assert len({call["id"] for call in calls}) == 2


def test_a_text_row_that_is_asked_natively_gets_native_shots(tmp_path):
    few_shot = index(tmp_path, [plain("a red door")])
    example = parse_example(plain("the red fence"), "rows.jsonl:1")
    vars(example)["ask"] = "native"
    turns = few_shot.turns(example)
    assert turns[0] == {"role": "user", "content": "a red door"} and turns[1]["tool_calls"][0]["function"]["name"] == "paint"


def test_a_dataset_gives_its_rows_their_shots_in_every_loop(tmp_path):
    few_shot = index(tmp_path, [plain("a red door")])
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(plain("the red fence")) + "\n")
    dataset = Dataset(rows, few_shot=few_shot)
    first, again = list(dataset), list(dataset)
    assert first[0].shots == again[0].shots and len(again[0].shots) == 2
    assert first == list(Dataset(rows)) and first[0].content_hash == next(iter(Dataset(rows))).content_hash


def test_rows_without_a_reply_to_show_are_left_out(tmp_path):
    said = called("a red door", calls=[], content="No paint left.")
    assert asked(index(tmp_path, [said, called("a red roof", calls=[])]), called("red")) == ["a red door"]
    with pytest.raises(UserError, match="has no row with a reply that could be shown"):
        index(tmp_path, [called("a red roof", calls=[])])
    with pytest.raises(UserError, match=r"no train rows at .*: name them with --few-shot"):
        FewShot(tmp_path / "none.jsonl", "toolcall", 3)


WORDS = st.lists(st.sampled_from("red green blue door fence roof".split()), min_size=1, max_size=5).map(" ".join)


@settings(max_examples=40, deadline=None)
@given(train=st.lists(WORDS, min_size=1, max_size=90), request=WORDS, count=st.integers(1, 4))
def test_shots_are_the_best_of_those_that_may_be_shown(tmp_path_factory, train, request, count):
    """Also where more than the first of the best may not be: beside a look at all scores."""
    few_shot = index(tmp_path_factory.mktemp("few"), [called(text) for text in train], count)
    scores = few_shot._index.get_scores(list(words(request)))
    likely = [at for at in range(len(train)) if scores[at] > 0 and train[at].split() != request.split() and not near(words(train[at]), words(request))]
    best = sorted(likely, key=lambda at: (-scores[at], at))[:count]
    assert asked(few_shot, called(request)) == [train[at] for at in reversed(best)]


def test_the_index_does_not_load_jax(tmp_path):
    """It would take most of a GPU's memory."""
    (tmp_path / "jax").mkdir()
    (tmp_path / "jax/__init__.py").write_text("raise SystemExit('jax was loaded')")
    code = "import sys; from slm_swap.rows.few_shot import import_bm25s; import_bm25s().BM25; assert 'jax' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
