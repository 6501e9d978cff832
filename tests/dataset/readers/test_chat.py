"""The forms in which teams keep conversations: each file of tests/data gives the very rows that its conversations have."""

import csv
import gzip
import importlib.util
import json
from copy import deepcopy
from random import Random

import pytest

from slm_swap.common.errors import UserError
from slm_swap.common.settings import ROOT
from slm_swap.dataset.readers.chat import chat
from slm_swap.dataset.readers.sources import Seen
from slm_swap.dataset.row import REASONS, Dropped, Row
from slm_swap.rows.examples import parse_example

DATA = ROOT / "tests/data"
spec = importlib.util.spec_from_file_location("make_forms", DATA / "make_forms.py")
make_forms = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_forms)

CONVERSATIONS = [
    "openai_chat.jsonl", "openai_functions.jsonl", "anthropic.jsonl", "sharegpt.json", "hermes.jsonl", "tau.json",
    "langfuse_observations.jsonl", "langfuse_observations.json", "langfuse_observations.csv",
]  # fmt: skip
SINGLE = ["trl_prompt_completion.jsonl", "stored_completions.jsonl", "batch_output.jsonl", "requests.jsonl", "langfuse_items.jsonl"]
SEEN = {
    "openai_chat.jsonl": "OpenAI chat rows", "openai_functions.jsonl": "OpenAI chat rows", "anthropic.jsonl": "Anthropic messages",
    "sharegpt.json": "ShareGPT", "hermes.jsonl": "Hermes", "tau.json": "tau-bench trajectories",
    "langfuse_observations.jsonl": "Langfuse observations", "langfuse_observations.json": "Langfuse observations",
    "langfuse_observations.csv": "Langfuse observations", "trl_prompt_completion.jsonl": "TRL prompt and completion",
    "stored_completions.jsonl": "stored completions", "batch_output.jsonl": "batch output",
    "requests.jsonl": "requests with their responses", "langfuse_items.jsonl": "Langfuse dataset items",
}  # fmt: skip


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(*paths):
    seen = Seen()
    return list(chat(paths, seen)), seen


def rows_of(tmp_path, *rows):
    return read(write(tmp_path / "rows.jsonl", rows))[0]


def plain(messages):
    """Messages without ids, which forms do not share."""
    made = []
    for message in messages:
        calls = [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in message.get("tool_calls") or ()]
        made.append((message["role"], message.get("content") or "", calls))
    return made


def wanted():
    """What every form has to give: (messages before the reply, calls, text of a reply without a call)."""
    for _, messages, reply in make_forms.replies():
        [(_, text, calls)] = plain([reply])
        yield plain(messages), [{"name": name, "arguments": arguments} for name, arguments in calls], None if calls else text


def test_the_files_are_what_their_script_makes():
    for name, rows in make_forms.forms().items():
        assert (DATA / name).read_text(encoding="utf-8") == make_forms.content(name, rows)


@pytest.mark.parametrize("name", [*CONVERSATIONS, *SINGLE])
def test_every_form_gives_the_same_rows(name):
    items, seen = read(*([DATA / "batch_input.jsonl"] if name == "batch_output.jsonl" else []), DATA / name)
    assert all(isinstance(item, Row) for item in items), "all replies can be measured"
    assert [(plain(r.record["messages"]), r.record["calls"], r.record.get("content")) for r in items] == list(wanted())
    assert [len(row.record["calls"]) for row in items] == [1, 0, 2, 0, 1, 0, 1, 1, 0, 1, 1]
    assert all(row.record["tools"] == make_forms.tools() and row.track == "toolcall" for row in items)
    assert len({row.group for row in items}) == (6 if name in CONVERSATIONS else 11)
    assert seen.forms[f"tests/data/{name}"].keys() == {SEEN[name]} and not seen.unknown
    for row in items:
        assert parse_example(row.record, row.where).calls == row.record["calls"]
        waiting = []
        for message in row.record["messages"]:
            waiting += [call["id"] for call in message.get("tool_calls") or ()]
            if message["role"] == "tool":
                waiting.remove(message["tool_call_id"])
        assert not waiting or row.record["messages"][-1]["role"] == "user", "each result answers a call"


def test_options_stay():
    items, _ = read(DATA / "openai_chat.jsonl")
    assert {json.dumps(row.record["options"]) for row in items} == {'{"parallel_tool_calls": true}'}


@pytest.mark.parametrize("name", ["alpaca.json", "rft.jsonl", "extraction.jsonl"])
def test_json_replies(name):
    items, _ = read(DATA / name)
    values = [{"from": here, "to": there} for here, there in make_forms.PLACES]
    if name == "extraction.jsonl":
        values[3] = [values[3]]
        assert items[0].record["schema"]["required"] == ["from", "to"]
        assert items[1].record["schema"] == {"type": "object"} and "schema" not in items[2].record
    assert [row.record["object"] for row in items] == values
    assert {row.track for row in items} == {"structured"}


@pytest.mark.parametrize("kind", ["gz", "utf-16", "bom", "parquet", "data key", "list"])
def test_any_kind_of_file(tmp_path, kind):
    text = (DATA / "openai_chat.jsonl").read_text(encoding="utf-8")
    path = tmp_path / ("rows.parquet" if kind == "parquet" else "rows.jsonl")
    if kind == "gz":
        path.write_bytes(gzip.compress(text.encode()))
    elif kind == "parquet":
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist([json.loads(line) for line in text.splitlines()]), path)
    elif kind in ("data key", "list"):
        rows = [json.loads(line) for line in text.splitlines()]
        path.write_text(json.dumps({"data": rows, "version": 1} if kind == "data key" else rows))
    else:
        path.write_text(text, encoding={"bom": "utf-8-sig"}.get(kind, kind))
    items, _ = read(path)
    assert [(plain(row.record["messages"]), row.record["calls"], row.record.get("content")) for row in items] == list(wanted())
    assert all(row.record["tools"] == make_forms.tools() for row in items), "no key that only the column has"


# -- Single replies --------------------------------------------------------------------------------------------------------------

USER = {"role": "user", "content": "Rain in Oslo tomorrow?"}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}


def called(arguments, name="weather"):
    return {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": {"name": name, "arguments": arguments}}]}


@pytest.mark.parametrize("arguments", ['{"city": "Oslo"}', '"{\\"city\\": \\"Oslo\\"}"', {"city": "Oslo"}])
def test_arguments_in_every_form(tmp_path, arguments):
    [row] = rows_of(tmp_path, {"messages": [USER, called(arguments)], "tools": [TOOL]})
    assert row.record["calls"] == [{"name": "weather", "arguments": {"city": "Oslo"}}]


LEGACY = {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
PARTS = [{"type": "reasoning", "value": "Hm."}, {"type": "tool_call", "value": '{"name": "weather", "arguments": {"city": "Oslo"}}'}]
RESPONSES = [{"type": "reasoning"}, {"type": "function_call", "call_id": "c", "name": "weather", "arguments": '{"city": "Oslo"}'}]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, LEGACY, {"role": "function", "name": "weather", "content": "rain"}], "tools": [TOOL]},
        {"messages": [USER, {"role": "assistant", "content": PARTS}], "tools": json.dumps([TOOL])},
        {"messages": [USER, {"role": "assistant", "content": "Let me see."}, called('{"city": "Oslo"}')], "tools": [TOOL]},
        {"messages": [{"role": "human", "content": "Rain in Oslo tomorrow?"}, called({"city": "Oslo"})], "tools": [TOOL]},
        {"input": {"messages": [USER], "tools": [TOOL]}, "output": called('{"city": "Oslo"}')},
        {"input": {"input": "Rain in Oslo tomorrow?", "tools": [TOOL]}, "output": RESPONSES},
        {"request": {"body": {"messages": [USER], "tools": [TOOL]}}, "response": {"body": {"choices": [{"message": LEGACY}]}}},
        {"input": {"messages": [USER], "tools": [TOOL]}, "preferred_output": [LEGACY], "non_preferred_output": [USER]},
        {"prompt": [USER], "chosen": [LEGACY], "rejected": [USER], "tools": [TOOL]},
        {"query": "Rain in Oslo tomorrow?", "ground_truth": json.dumps(called('{"city": "Oslo"}')["tool_calls"]), "tool_definitions": [TOOL]},
    ],
)
def test_other_ways_to_write_one_call(tmp_path, row):
    [made] = rows_of(tmp_path, row)
    assert made.record["messages"] == [USER] and made.record["calls"] == [{"name": "weather", "arguments": {"city": "Oslo"}}]
    assert [tool["name"] for tool in made.record["tools"]] == ["weather"]


def test_a_system_text_that_looks_like_json_is_a_text(tmp_path):
    [made] = rows_of(tmp_path, {"system": '{"tone": "brief"}', "messages": [USER, called("{}")], "tools": [TOOL]})
    assert made.record["messages"][0] == {"role": "system", "content": '{"tone": "brief"}'}


def test_results_without_ids_answer_the_calls_in_order(tmp_path):
    two = {"role": "assistant", "tool_calls": [{"name": "weather", "arguments": {"city": city}} for city in ("Oslo", "Bergen")]}
    results = [{"role": "function", "name": "weather", "content": text} for text in ("rain", "sun")]
    for told in (results, [{"role": "tool", "content": '["rain", "sun"]'}]):
        *_, last = rows_of(tmp_path, {"messages": [USER, two, *told, {"role": "assistant", "content": "Rain, sun."}], "tools": [TOOL]})
        calls, *answers = last.record["messages"][1:]
        assert [(a["tool_call_id"], a["content"]) for a in answers] == [(c["id"], t) for c, t in zip(calls["tool_calls"], ("rain", "sun"), strict=True)]


@pytest.mark.parametrize("ids", [True, False])
def test_calls_on_turns_of_their_own_are_one_reply_where_the_results_follow_them_all(tmp_path, ids):
    """As ShareGPT and some loggers write parallel calls: the first call alone would be half of the reply."""
    calls = [called(json.dumps({"city": city})) for city in ("Oslo", "Bergen")]
    for number, call in enumerate(calls):
        call["tool_calls"][0]["id"] = f"c{number}"
    results = [{"role": "tool", "content": text} | ({"tool_call_id": f"c{at}"} if ids else {}) for at, text in enumerate(("rain", "sun"))]
    first, last = rows_of(tmp_path, {"messages": [USER, *calls, *results, {"role": "assistant", "content": "Both."}], "tools": [TOOL]})
    assert [call["arguments"]["city"] for call in first.record["calls"]] == ["Oslo", "Bergen"]
    assert [message["role"] for message in last.record["messages"]] == ["user", "assistant", "tool", "tool"]
    # a call that hangs on the result of the one before stays a reply of its own
    first, second = rows_of(tmp_path, {"messages": [USER, calls[0], results[0], calls[1], results[1]], "tools": [TOOL]})
    assert len(first.record["calls"]) == len(second.record["calls"]) == 1


def test_a_turn_of_two_messages_is_trained_on_where_both_are(tmp_path):
    text, call = {"role": "assistant", "content": "Let me see."}, called("{}")
    [dropped] = rows_of(tmp_path, {"messages": [USER, text, call | {"weight": 0}], "tools": [TOOL]})
    assert dropped.reason == "not_trained"


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"type": "any"}, "required"),
        ({"type": "auto", "disable_parallel_tool_use": True}, "auto"),
        ({"type": "tool", "name": "weather"}, {"type": "function", "function": {"name": "weather"}}),
        ({"type": "function", "name": "weather"}, {"type": "function", "function": {"name": "weather"}}),
        ({"type": "function", "function": {"name": "weather"}}, {"type": "function", "function": {"name": "weather"}}),
        ("required", "required"),
    ],
)
def test_a_choice_of_tools_is_kept_in_the_form_in_which_it_is_sent(tmp_path, given, kept):
    [row] = rows_of(tmp_path, {"messages": [USER, called("{}")], "tools": [TOOL], "tool_choice": given})
    assert row.record["options"]["tool_choice"] == kept


CALL_JSON = '{"name": "weather", "arguments": {"city": "Oslo"}}'


@pytest.mark.parametrize("said", [CALL_JSON, f"[{CALL_JSON}]"])
def test_calls_that_are_the_json_of_a_text_are_calls(tmp_path, said):
    [row] = rows_of(tmp_path, {"messages": [USER, {"role": "assistant", "content": said}], "tools": [TOOL]})
    assert row.record["calls"] == [{"name": "weather", "arguments": {"city": "Oslo"}}]


@pytest.mark.parametrize("said", [f"I call {CALL_JSON}", f"<functioncall> {CALL_JSON}", f"[TOOL_CALLS][{CALL_JSON}]", 'weather(city="Oslo")'])
def test_a_call_in_an_unknown_form_does_not_say_that_none_is_due(tmp_path, said):
    [dropped] = rows_of(tmp_path, {"messages": [USER, {"role": "assistant", "content": said}], "tools": [TOOL]})
    assert dropped.reason == "other_form"


@pytest.mark.parametrize(
    ("reason", "row"),
    [
        ("not_trained", {"messages": [USER, {"role": "assistant", "content": "Hm", "weight": 0}], "tools": [TOOL]}),
        ("plain_text", {"messages": [USER, {"role": "assistant", "content": "Rain."}]}),
        ("no_reply", {"messages": [USER]}),
        ("no_request", {"messages": [{"role": "assistant", "content": "Hello"}], "tools": [TOOL]}),
        ("not_trained", {"messages": [USER, {"role": "assistant", "content": "Hm", "loss_weight": 0.0}], "tools": [TOOL]}),
        ("no_request", {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, called("{}")], "tools": [TOOL]}),
        ("no_request", {"messages": [USER, {"role": "tool", "content": [{"type": "image_url", "image_url": {}}]}, USER, called("{}")], "tools": [TOOL]}),
        ("no_request", {"messages": [USER, {"role": "tool", "content": [{"type": "image", "source": {}}]}, USER, called("{}")], "tools": [TOOL]}),
        ("tool_not_listed", {"messages": [USER, called("{}", "news")], "tools": [TOOL]}),
        ("gold_breaks_schema", {"messages": [USER, called('{"city": 1}')], "tools": [TOOL]}),
        ("not_json", {"messages": [USER, called('{"city":')], "tools": [TOOL]}),
        ("schema_fault", {"messages": [USER, called("{}")], "tools": [{"type": "web_search"}]}),
        ("failed", {"messages": [USER, {"role": "assistant", "content": ""}], "tools": [TOOL]}),
        ("unusable", {"messages": [{"role": "user", "content": "\ud800"}, called("{}")], "tools": [TOOL]}),
        ("other_form", {"messages": [USER, {"role": "narrator", "content": "x"}]}),
    ],
)
def test_a_reply_that_makes_no_row_is_counted(tmp_path, reason, row):
    good, dropped = rows_of(tmp_path, {"messages": [USER, called("{}")], "tools": [TOOL]}, row)
    assert isinstance(good, Row) and isinstance(dropped, Dropped)
    assert (dropped.reason, dropped.where.rpartition(":")[2]) == (reason, "2")


def test_thinking_is_no_part_of_a_reply_or_of_history(tmp_path):
    thought = {"role": "assistant", "content": "<think>Bergen?</think>Which city?", "reasoning_content": "hm"}
    [first, second] = rows_of(tmp_path, {"messages": [USER, thought, USER, called("{}") | {"content": "<think>ok</think>"}], "tools": [TOOL]})
    assert first.record["content"] == "Which city?"
    assert second.record["messages"][1] == {"role": "assistant", "content": "Which city?"}


def test_a_batch_output_alone_says_what_it_lacks():
    items, _ = read(DATA / "batch_output.jsonl")
    assert {item.reason for item in items} == {"no_request"} and "give the batch's input file" in items[0].why


def test_a_file_of_another_source_names_the_command(tmp_path):
    with pytest.raises(UserError, match=r"looks like rows of --source jsonl.*--source jsonl --track"):
        rows_of(tmp_path, {"prompt": "p", "completion": "{}"})
    with pytest.raises(UserError, match=r"looks like rows of --source xlam"):
        rows_of(tmp_path, {"query": "q", "answers": "[]", "tools": "[]"})
    [dropped] = rows_of(tmp_path, {"what": "ever"})
    assert dropped.reason == "other_form" and "its fields are what" in dropped.why


def test_a_field_that_nothing_reads_is_counted(tmp_path):
    _, seen = read(write(tmp_path / "rows.jsonl", [{"messages": [USER, called("{}")], "tools": [TOOL], "tool_chioce": "auto"}]))
    assert seen.unknown == {"tool_chioce": 1}


# -- Nothing in a row ends an import ---------------------------------------------------------------------------------------------

JUNK = [None, 1.5, True, "", "x", [], {}, [None], {"a": 1}, "{", "null", "\ud800", 10**30, {"type": "text"}, "assistant"]


def places(value, above=()):
    for key, child in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*above, key)
        yield from places(child, (*above, key))


@pytest.mark.parametrize("seed", range(3))
def test_no_fault_in_a_row_ends_an_import(tmp_path, seed):
    rng, rows = Random(seed), [row for rows in make_forms.forms().values() for row in rows]
    faulty = []
    for _ in range(200):
        row = json.loads(json.dumps(rng.choice(rows)))
        for _ in range(rng.randint(1, 3)):
            *above, last = rng.choice(list(places(row)) or [("x",)])
            inner = row
            for key in above:
                inner = inner[key]
            inner[last] = deepcopy(rng.choice(JUNK))
        faulty.append(row)
    items = rows_of(tmp_path, rows[0], *faulty)
    assert {item.where.rpartition(":")[2] for item in items} >= {str(number) for number in range(1, 202)} - {
        str(number) for number, row in enumerate(faulty, 2) if "body" in row
    }, "each row is accounted for"
    for item in items:
        if isinstance(item, Row):
            assert parse_example(item.record, item.where)
        else:
            assert item.reason in REASONS


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_line_ends_inside_a_cell_stay(tmp_path, encoding):
    path = tmp_path / "rows.csv"
    with open(path, "w", encoding=encoding, newline="") as stream:
        writer = csv.writer(stream)
        writer.writerows([["instruction", "output"], ["first\r\nsecond\rthird\nfourth", '{"a": 1}']])
    [row] = read(path)[0]
    assert row.record["messages"][0]["content"] == "first\r\nsecond\rthird\nfourth"
