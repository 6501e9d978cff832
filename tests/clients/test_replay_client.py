"""Replies read from a file: by id, by prompt, in order, and never guessed."""

import pytest

from slm_swap.clients.protocol import Reply
from slm_swap.clients.replay_client import ReplayClient, rows_of_replies
from slm_swap.common.errors import UserError
from slm_swap.rows.examples import Dataset, Example
from slm_swap.rows.prompts import text_request


def rows(*prompts):
    return [Example(prompt, "{}", id=f"r{number}") for number, prompt in enumerate(prompts)]


def ask(path, examples, size=2):
    client = ReplayClient(path, examples)
    batches = [examples[start : start + size] for start in range(0, len(examples), size)]
    return [reply for batch in batches for reply in client.generate([text_request("structured", row.prompt) for row in batch])]


def dataset_of_replies(path, limit=None):
    return list(Dataset(path, limit, rows_of_replies))


def texts(path, examples):
    return [reply.text for reply in ask(path, examples)]


def failure(make):
    with pytest.raises(UserError) as raised:
        make()
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_by_id_in_any_order(write_rows):
    other = {"id": "r9", "prompt": ["a"], "prediction": "x"}
    path = write_rows("r.jsonl", [{"id": "r1", "prediction": "one"}, {"id": "r0", "prediction": "zero"}, other])
    assert texts(path, rows("a", "b")) == ["zero", "one"]


def test_by_prompt(write_rows):
    path = write_rows(
        "r.jsonl", [{"prompt": "b", "prediction": "B"}, {"prompt": "c", "prediction": "C"}, {"prompt": "a", "prediction": "A"}]
    )
    assert texts(path, rows("a", "b", "c")) == ["A", "B", "C"]


def test_the_id_goes_before_the_prompt(write_rows):
    lines = [{"id": "r1", "prompt": "a", "prediction": "one"}, {"id": "r0", "prompt": "b", "prediction": "zero"}]
    assert texts(write_rows("r.jsonl", lines), rows("a", "b")) == ["zero", "one"]


def test_ids_of_another_numbering_leave_the_prompt(write_rows):
    lines = [{"id": 17, "prompt": "b", "prediction": "B"}, {"id": "", "prompt": "a", "prediction": "A"}]
    assert texts(write_rows("r.jsonl", lines), rows("a", "b")) == ["A", "B"]


def test_a_number_is_an_id(write_rows):
    assert texts(write_rows("r.jsonl", [{"id": 0, "prediction": "x"}]), [Example("p", "{}", id="0")]) == ["x"]


def test_equal_prompts_take_their_lines_in_order(write_rows):
    lines = [{"prompt": "a", "prediction": str(number)} for number in range(5)]
    assert texts(write_rows("r.jsonl", lines), rows("a", "a", "a", "a")) == ["0", "1", "2", "3"]


def test_equal_prompts_with_ids_keep_their_own(write_rows):
    lines = [{"id": f"r{number}", "prediction": str(number)} for number in (2, 0, 1)]
    assert texts(write_rows("r.jsonl", lines), rows("a", "a", "a")) == ["0", "1", "2"]


def test_equal_prompts_with_and_without_an_id(write_rows):
    lines = [
        {"prompt": "a", "prediction": "first"},
        {"id": "r1", "prompt": "a", "prediction": "own"},
        {"prompt": "a", "prediction": "second"},
    ]
    assert texts(write_rows("r.jsonl", lines), rows("a", "a", "a")) == ["first", "own", "second"]


def test_rows_without_a_reply_are_counted_and_the_first_is_named(write_rows):
    path = write_rows("r.jsonl", [{"prompt": "a", "prediction": "A"}])
    message = failure(lambda: ReplayClient(path, rows("a", "a", "b")))
    assert "no reply for 2 of 3 rows (first: id 'r1')" in message


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ([], "a line is a JSON object"),
        ({"id": "a"}, "`prediction` must be a text"),
        ({"id": "a", "prediction": 5}, "`prediction` must be a text"),
        ({"id": "a", "output": {"a": 1}}, "`output` must be a text"),
        ({"id": "a", "prediction": {"a": 1}}, "`prediction` must be a text"),
        ({"prediction": "x"}, "neither `id` nor `prompt` or `messages`"),
        ({"id": None, "prediction": "x"}, "neither `id` nor `prompt` or `messages`"),
        ({"id": "", "prediction": "x"}, "neither `id` nor `prompt` or `messages`"),
        ({"id": ["a"], "prediction": "x"}, "neither `id` nor `prompt` or `messages`"),
        ({"id": "r0", "prediction": "x"}, "a second reply for id 'r0'"),
        ({"id": "a", "prediction": "x", "finish_reason": "tired"}, "finish_reason 'tired' is none of stop, length"),
        ({"id": "a", "prediction": "x", "finish_reason": ["stop"]}, "finish_reason .* is none of"),
        (b"{", "not a line of JSON"),
        (b"\xff", "not a line of JSON"),
    ],
)
def test_a_bad_line_is_named(write_rows, line, what):
    path = write_rows("r.jsonl", [{"id": "r0", "prediction": "x"}, line])
    with pytest.raises(UserError, match=f"r.jsonl:2: .*{what}"):
        ReplayClient(path, rows("a"))


def test_a_missing_file(tmp_path):
    assert "cannot read" in failure(lambda: ReplayClient(tmp_path / "none.jsonl", rows("a")))


def test_everything_that_a_line_says(write_rows):
    line = {
        "id": "r0", "prediction": "x", "finish_reason": "length", "tokens": {"input": 7, "cached": 3, "output": 2},
        "seconds": 1.5,
        "reply_error": "cut",
    }  # fmt: skip
    assert ask(write_rows("r.jsonl", [line]), rows("a")) == [Reply("x", "length", 7, 2, 3, 1.5, "cut")]


def test_what_a_line_does_not_say_or_says_oddly(write_rows):
    lines = [
        {"id": "r0", "reply": "x"},
        {"id": "r1", "prediction": "", "finish_reason": None, "tokens": [1], "seconds": "2", "reply_error": 5},
        {"id": "r2", "prediction": "y", "tokens": {"input": True, "output": 1.5, "other": 2}},
    ]
    assert ask(write_rows("r.jsonl", lines), rows("a", "b", "c")) == [Reply("x"), Reply(""), Reply("y")]


@pytest.mark.parametrize("reason", ["stop", "length", "content_filter", "refusal", "error"])
def test_every_finish_reason_is_kept(write_rows, reason):
    assert (
        ask(write_rows("r.jsonl", [{"id": "r0", "prediction": "", "finish_reason": reason}]), rows("a"))[0].finish_reason
        == reason
    )


def test_halves_of_surrogate_pairs_become_question_marks(write_rows):
    line = b'{"id": "r0", "prediction": "a\\ud800b\\ud83d\\ude00", "reply_error": "\\udfff"}'
    assert ask(write_rows("r.jsonl", [line]), rows("a")) == [Reply("a?b\U0001f600", error="?")]


def test_what_the_client_tells_of_itself(write_rows):
    client = ReplayClient(path := write_rows("r.jsonl", [{"id": "r0", "prediction": "x"}]), rows("a"))
    told = client.describe()
    assert told["kind"] == client.kind == "replay" and told["path"] == str(path) and len(told["sha256"]) == 64
    assert client.cost(1, 1, 1, 1.0) is None and client.load_seconds == 0
    path.unlink()
    assert client.describe() == told and client.close() is None


# -- A file that is its own dataset ----------------------------------------------------------------------------------------------


def test_own_dataset(write_rows):
    lines = [
        {"id": "x", "prompt": "p", "reference": "{}", "prediction": "A", "group": "g", "accept": {"a": [1]}, "issues": ["odd"]},
        {"prompt": "q", "reference": '{"a":1}', "prediction": "B"},
    ]
    path = write_rows("r.jsonl", lines)
    first, second = examples = dataset_of_replies(path)
    assert (first.id, first.prompt, first.completion, first.group, first.accept) == ("x", "p", "{}", "g", {"a": [1]})
    assert second.completion == '{"a":1}' and second.where.endswith("r.jsonl:2")
    assert texts(path, examples) == ["A", "B"]
    assert [example.id for example in dataset_of_replies(path, limit=1)] == ["x"]


def test_equal_rows_of_an_own_dataset_have_ids_of_their_own(write_rows):
    path = write_rows("r.jsonl", [{"prompt": "p", "reference": "{}", "prediction": text} for text in "AB"])
    examples = dataset_of_replies(path)
    assert len({example.id for example in examples}) == 2 and texts(path, examples) == ["A", "B"]


def test_the_prediction_is_no_part_of_the_row(write_rows):
    hashes = [
        dataset_of_replies(write_rows("r.jsonl", [{"prompt": "p", "reference": "{}", "prediction": text}]))[0].content_hash
        for text in "AB"
    ]
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize(
    "line",
    [
        {"prompt": "p", "prediction": "x"},
        {"reference": "{}", "prediction": "x"},
        {"prompt": "p", "reference": {}},
        {"prompt": " ", "reference": "x"},
        [],
    ],
)
def test_a_file_that_is_not_its_own_dataset(write_rows, line):
    path = write_rows("r.jsonl", [{"prompt": "p", "reference": "{}"}, line])
    assert "r.jsonl:2: recorded replies without `prompt` or `reference`" in failure(lambda: dataset_of_replies(path))


def test_an_empty_file_and_ids_twice(write_rows):
    assert "no rows" in failure(lambda: dataset_of_replies(write_rows("r.jsonl", [])))
    lines = [{"id": "a", "prompt": "p", "reference": "{}"}] * 2
    assert "ids must be unique" in failure(lambda: dataset_of_replies(write_rows("r.jsonl", lines)))


# -- Conversations ---------------------------------------------------------------------------------------------------------------


def conversation(text, **more):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}, {"role": "user", "content": text}]
    return {"messages": turns, "tools": [{"name": "f", "parameters": {"type": "object"}}], "calls": []} | more


def test_a_conversation_finds_its_reply_by_its_messages(write_rows):
    examples = list(Dataset(write_rows("rows.jsonl", [conversation("a"), conversation("b")])))
    lines = [{"messages": conversation(text)["messages"], "prediction": text} for text in "ba"]
    assert texts(write_rows("r.jsonl", lines), examples) == ["a", "b"]


def test_conversations_of_an_own_dataset(write_rows):
    """What a row wants is not what was replied."""
    lines = [conversation("a", id="x", calls=[{"name": "f", "arguments": {}}], prediction="A"), conversation("b", prediction=[])]
    path = write_rows("r.jsonl", lines)
    first, second = examples = dataset_of_replies(path)
    assert (first.id, first.calls, second.calls) == ("x", [{"name": "f", "arguments": {}}], [])
    assert [(reply.text, reply.calls) for reply in ask(path, examples)] == [("A", None), ("", [])]
