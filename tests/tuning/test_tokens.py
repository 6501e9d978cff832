"""What is taught in native form: the prompt that evaluation shows, and a completion that evaluation reads as the row's reply."""

import json

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from slm_swap.clients.endings import require_ending
from slm_swap.clients.loading import encode_prompt
from slm_swap.clients.native import chat_format, completion_of, read_reply
from slm_swap.common.errors import UserError
from slm_swap.common.exact_json import EXACT
from slm_swap.rows.examples import Example, parse_example
from slm_swap.rows.prompts import request_of, structured_prompt, toolcall_prompt
from slm_swap.tuning.packing import IGNORED
from slm_swap.tuning.tokens import NOTHING_SAID, tokenize
from slm_swap.tuning.training import ask_of
from tests.support.chat_templates import tokenizer_of

TOOLS = [{"name": "paint", "description": "Paint.", "parameters": {"type": "object", "properties": {"color": {"type": "string"}}}}]
SCHEMA = {"type": "array", "items": {"type": "number"}}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00")),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), children, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module", params=["phi", "qwen2_5", "qwen3", "llama3_1"])
def tokenizer(request):
    return tokenizer_of(request.param)


def row(calls: list[dict] | None = None, **fields) -> Example:
    told = {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Paint it red."}], "tools": TOOLS}
    return parse_example(told | ({"calls": calls} if calls is not None else {}) | fields, "rows.jsonl:1")


def call(**arguments) -> dict:
    return {"name": "paint", "arguments": arguments}


def taught(tokenizer, example: Example, track: str = "toolcall") -> tuple[list[int], list[int]]:
    """The one row's prompt and completion."""
    (told,), too_long, untaught = tokenize(tokenizer, track, [example], 1 << 20)
    assert not too_long and not untaught
    at = sum(label == IGNORED for label in told["labels"])
    assert told["labels"][at:] == told["input_ids"][at:]
    return told["input_ids"][:at], told["input_ids"][at:]


@given(arguments=st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), JSON, max_size=3))
def test_a_call_is_taught_as_evaluation_reads_it(tokenizer, arguments):
    assume(not any(token in json.dumps(arguments, ensure_ascii=False) for token in tokenizer.get_added_vocab()))  # an end inside is not taught
    example = row([call(**{}) | {"arguments": arguments}])
    prompt, completion = taught(tokenizer, example)
    request = request_of("toolcall", example)
    assert prompt == encode_prompt(tokenizer, request) and completion[-1] == require_ending(tokenizer).id
    text, made, _ = read_reply(tokenizer, request, completion[:-1], stopped=True)
    assert text == "" and [(told["name"], json.loads(told["arguments"], **EXACT)) for told in made] == [("paint", arguments)]


def test_what_is_taught_is_what_the_template_writes(tokenizer):
    prompt, completion = taught(tokenizer, row([call(color="red")]))
    messages = [*row([]).messages, {"role": "assistant", "content": "", "tool_calls": [{"id": "call00000", "type": "function", "function": call(color="red")}]}]
    whole = chat_format(tokenizer).show(messages, TOOLS, open_turn=False)
    assert whole.startswith(tokenizer.decode(prompt + completion))


def test_several_calls_are_taught_where_the_template_has_them(tokenizer):
    rows, _, untaught = tokenize(tokenizer, "toolcall", [row([call(color="red"), call(color="blue")])], 4096)
    one_only = "single tool-calls" in str(tokenizer.chat_template)
    assert (len(rows), untaught.total()) == ((0, 1) if one_only else (1, 0))


def test_a_text_is_taught_where_no_call_is_due_and_a_row_without_one_is_counted(tokenizer):
    _, completion = taught(tokenizer, row([], content="I cannot paint."))
    assert "I cannot paint." in tokenizer.decode(completion)
    rows, _, untaught = tokenize(tokenizer, "toolcall", [row([]), row([call()])], 4096)
    assert len(rows) == 1 and untaught == {NOTHING_SAID: 1}


def test_a_json_value_is_taught_as_text(tokenizer):
    example = row(object=[1, 12345678901234567890.5], schema=SCHEMA, tools=None)
    _, completion = taught(tokenizer, example, "structured")
    assert tokenizer.decode(completion[:-1], skip_special_tokens=True).split("</think>")[-1].strip() == example.completion


def test_numbers_are_taught_with_their_digits(tokenizer):
    line = '{"messages": [{"role": "user", "content": "x"}], "tools": %s, "calls": [{"name": "paint", "arguments": {"n": 0.12345678901234567891}}]}'
    _, completion = taught(tokenizer, parse_example(json.loads(line % json.dumps(TOOLS), **EXACT), "rows.jsonl:1"))
    assert '{"n": 0.12345678901234567891}' in tokenizer.decode(completion)


def test_old_rows_are_taught_natively_where_their_prompt_can_be_taken_apart(tokenizer):
    texts = toolcall_prompt(TOOLS, "Paint it red."), '<tool_call name="paint">{"color": "red"}</tool_call>'
    prompt, completion = taught(tokenizer, Example(*texts, tools=TOOLS, ask="native"))
    assert "<tool_call name" not in tokenizer.decode(completion) and "Tools:" not in tokenizer.decode(prompt)
    value = Example(structured_prompt(SCHEMA, "Two numbers."), '{"a": 1.50}', schema=SCHEMA, ask="native")
    assert '{"a": 1.50}' in tokenizer.decode(taught(tokenizer, value, "structured")[1])


def test_a_row_whose_calls_would_not_be_read_back_is_not_taught():
    """Between tags a value has no escapes."""
    rows, _, untaught = tokenize(tokenizer_of("qwen3_5_nothink"), "toolcall", [row([call(color="</tool_call>")]), row([call(color="7")])], 4096)
    assert len(rows) == 1 and list(untaught.values()) == [1]


def test_a_template_that_joins_no_reply_to_its_prompt_is_refused():
    with pytest.raises(UserError, match="writes a conversation otherwise than its prompt, so no reply can be taught: use --ask text"):
        completion_of("<user>a<assistant>", "<user>a</s>b</s>", "</s>")
    with pytest.raises(UserError, match="does not end a call with '</s>'"):
        completion_of("a", "ab", "</s>")
    assert completion_of("a", "ab</s>c</s>\n", "</s>") == "b</s>c</s>"


def test_how_the_model_was_asked_is_told():
    text, native = Example("p", "c"), row([call()])
    assert [ask_of(rows) for rows in ([text], [native], [text, native])] == ["text", "native", "mixed"]


@pytest.mark.parametrize("space", ["always", "first"])
def test_a_reply_is_spelled_as_behind_its_prompt(space):
    """SentencePiece puts a space in front of a text of its own; between a prompt and its reply the template writes none."""
    letters = Tokenizer(models.BPE({letter: number for number, letter in enumerate(["▁", "\n", *map(chr, range(33, 127))])}, []))
    letters.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=space, split=False)
    template = "{% for m in messages %}{{ m.content + ('</s>' if m.role == 'assistant' else '\n') }}{% endfor %}"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, chat_template=template, eos_token="</s>")
    ((told,), _, _) = tokenize(tokenizer, "structured", [parse_example({"prompt": "One.", "completion": "[1, 2]"}, "rows.jsonl:1")], 4096)
    prompt = [token for token, label in zip(told["input_ids"], told["labels"], strict=True) if label == IGNORED]
    assert tokenizer.convert_ids_to_tokens(told["input_ids"][len(prompt) :]) == ["[", "1", ",", "▁", "2", "]", "</s>"]
    assert prompt == encode_prompt(tokenizer, request_of("structured", parse_example({"prompt": "One.", "completion": "[1, 2]"}, "rows.jsonl:1")))
