"""How sure a local model was: which tokens say something, and what is told of their log-probabilities."""

import json
import math
from functools import cache
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers.convert_slow_tokenizer import bytes_to_unicode

from slm_swap.clients import confidence as module
from slm_swap.clients.confidence import confidence, piece_spans, served_confidence, token_spans, tokens_in, value_spans
from slm_swap.clients.native import native_turn, read_reply
from slm_swap.common.settings import Settings
from slm_swap.rows.prompts import Request, text_request
from slm_swap.slm_client import SLMClient
from tests.support.chat_templates import tokenizer_of
from tests.support.tool_requests import BATCH

TEXT = text_request("toolcall", "x")
GPT_OSS = ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|return|>", "<|call|>"]
LISTED = (  # calls as one JSON list between tags
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}"
    "{% if m.tool_calls %}<tool_call>{{ m.tool_calls | map(attribute='function') | list | tojson }}</tool_call>{% endif %}<|end|>"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
tokenizer_for = cache(tokenizer_of)


def native(*tools: str) -> Request:
    offered = [{"name": name, "description": "", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}} for name in tools]
    return Request([{"role": "user", "content": "hi"}], offered, None, None, True)


def encode(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def said(tokenizer, request: Request, tokens: list[int], stopped: bool = True) -> tuple[list[str], list[str], str] | None:
    """(values, names, text) as `confidence` finds them in a reply."""
    whole = tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    places = module._places(tokenizer, request, whole, read_reply(tokenizer, request, tokens, stopped))
    if places is None:
        return None
    values, names = ([whole[start:end] for start, end in spans] for spans in places[:2])
    return values, names, whole[slice(*places.text)]


@pytest.fixture(scope="module")
def phi():
    return tokenizer_for("phi")


# -- Values of JSON --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ('{"city": "Oslo", "nights": -2.5e3, "pets": [true, null, "a, b"], "who": {"name": ""}}', ["Oslo", "-2.5e3", "true", "null", "a, b", '""']),
        ('{"a": "x\\"y{", "b\\"c": "z"}', ['x\\"y{', "z"]),
        ("{}", []),
        ("[]", []),
        ('[{"a": 1}, {"a": 2}] and {"b": 3}', ["1", "2"]),  # what follows the value is none of it
        ("42", ["42"]),
        ('"Oslo"', ["Oslo"]),
        ('{"city": "Os', ["Os"]),  # cut within a value,
        ('{"city": "', []),  # before its first character,
        ('{"ci', []),  # and within a key
        ('{"city": "Oslo", "nights"}', ["Oslo"]),
        ('{"a": 1, "b" 2]', ["1"]),
        ('{"a": "b" "c"}', ["b", "c"]),
        ('{city: Oslo, n: 3}', ["Oslo", "3"]),  # names without quotes
        ('  \n{"a": 1}', ["1"]),
        ("", []),
    ],
)
def test_values_are_found_in_json_and_as_far_as_it_goes(text, values):
    assert [text[start:end] for start, end in value_spans(text)] == values


LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=9)


def leaves(value) -> list:
    if isinstance(value, dict):
        value = list(value.values())
    return [leaf for child in value for leaf in leaves(child)] if isinstance(value, list) else [value]


@given(VALUES, st.booleans(), st.sampled_from([None, 1]))
def test_the_values_of_any_json_are_its_leaves(value, ascii_only, indent):
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    found = [text[start:end] for start, end in value_spans(text)]
    assert found == [json.dumps(leaf, ensure_ascii=ascii_only)[isinstance(leaf, str) and leaf != "" :][: -1 if isinstance(leaf, str) and leaf else None] for leaf in leaves(value)]


@given(st.text('{}[]",:\\ \nab1'))
def test_no_text_is_too_broken(text):
    spans = value_spans(text)
    assert all(0 <= start < end <= len(text) for start, end in spans)
    assert all(before[1] <= after[0] for before, after in pairwise(spans))


# -- Tokens ----------------------------------------------------------------------------------------------------------------------


def sentencepiece():
    """A tokenizer as SentencePiece's: spaces are a part of what follows, the first one is left out, and bytes stand for what is unknown."""
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "▁", "▁{\"", "a", "\":", "▁\"", "Os", "lo", "\"}", *(f"<0x{byte:02X}>" for byte in range(256))]
    inner = Tokenizer(models.BPE({piece: at for at, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True))
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>"), {piece: at for at, piece in enumerate(pieces)}


def test_tokens_of_a_character_share_it_and_the_first_space_is_left_out():
    tokenizer, ids = sentencepiece()
    tokens = [ids[piece] for piece in ("▁{\"", "a", "\":", "▁\"", "Os", "<0xE6>", "<0x9D>", "<0xB1>", "lo", "\"}")]
    whole = tokenizer.decode(tokens)
    assert whole == '{"a": "Os東lo"}'
    spans = token_spans(tokenizer, tokens, whole)
    assert [whole[start:end] for start, end in spans] == ['{"', "a", '":', ' "', "Os", "東", "東", "東", "lo", '"}']
    assert tokens_in(spans, value_spans(whole)) == [4, 5, 6, 7, 8]


def test_bytes_that_never_become_a_character_have_a_place(phi):
    tokens = encode(phi, '{"a":"東')[:-1]
    whole = phi.decode(tokens)
    spans = token_spans(phi, tokens, whole)
    assert whole.endswith("\N{REPLACEMENT CHARACTER}") and spans[-1][1] == len(whole) and len(spans) == len(tokens)


@settings(deadline=None)
@given(st.text(max_size=40))
def test_the_tokens_of_any_text_cover_it(text):
    tokenizer = tokenizer_for("phi")
    tokens = encode(tokenizer, text)
    whole = tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    spans = token_spans(tokenizer, tokens, whole)
    assert len(spans) == len(tokens) and {at for start, end in spans for at in range(start, end)} == set(range(len(whole)))
    assert all(before[0] <= after[0] for before, after in pairwise(spans))


def test_a_token_that_straddles_a_value_counts():
    assert tokens_in([(0, 3), (3, 7), (7, 9)], [(2, 4)]) == [0, 1]
    assert tokens_in([(0, 3), (3, 3), (3, 5)], [(3, 5)]) == [2], "a token without characters does not"
    assert tokens_in([(0, 9)], [(1, 2), (4, 5)]) == [0] and tokens_in([(0, 2), (2, 4)], []) == []


# -- Replies in every form -------------------------------------------------------------------------------------------------------

CALL = '<tool_call name="book">{"city":"Oslo","nights":2}</tool_call>'


@pytest.mark.parametrize(
    ("text", "values", "names"),
    [
        (CALL, ["Oslo", "2"], ["book"]),
        (f"{CALL}\n{CALL.replace('book', 'cancel')}", ["Oslo", "2", "Oslo", "2"], ["book", "cancel"]),
        ('<tool_call name="ping">{}</tool_call>', [], ["ping"]),
        ("<Tool_call name='book'>{\"city\":\"Oslo\"}</tool_call> Done.", ["Oslo"], ["book"]),
        ('<tool_call name="book">{"city":"Oslo</tool_call>', ["Oslo"], ["book"]),
        ('<tool_call name="book">{"city":"a </tool_call> b"}</tool_call>', ["a </tool_call> b"], ["book"]),
        ('<tool_call name="book', [], []),
        ('{"tool_name":"book","arguments":{"city":"Oslo"}}', ["book", "Oslo"], []),
        ('```json\n{"city":"Oslo"}\n```', ["Oslo"], []),
        ('"Oslo"', ["Oslo"], []),
        ("17", ["17"], []),
        ("Your order [41] has left.", [], []),
    ],
)
def test_the_text_form(phi, text, values, names):
    assert said(phi, TEXT, encode(phi, text)) == (values, names, text)


def test_thinking_is_cut_first(phi):
    """Also where a call was drafted in it."""
    draft = f"<think>Perhaps {CALL}? Or Rome.</think>\n\n"
    assert said(phi, TEXT, encode(phi, draft + CALL.replace("Oslo", "Rome"))) == (["Rome", "2"], ["book"], CALL.replace("Oslo", "Rome"))
    assert said(phi, TEXT, encode(phi, f"<think>Perhaps {CALL}"), stopped=False) is None, "a thought alone says nothing"


ARGUMENTS = {"city": "São Tomé 東京", "nights": 2, "tags": ["a", "nights"], "book": "book"}
SAID = ["São Tomé 東京", "2", "a", "nights", "book"]
FAMILIES = {name: name for name in ("phi", "qwen2_5", "qwen3", "llama3_1", "qwen3_5_nothink", "gemma4")} | {"listed": LISTED}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("count", [1, 2])
def test_calls_in_a_chat_formats_own_form(family, count):
    """As the template writes them: JSON, between tags, and in a form of JSON of the model's own."""
    if (family, count) == ("llama3_1", 2):
        pytest.skip("its template has one call a turn")
    tokenizer, request = tokenizer_for(FAMILIES[family]), native("book", "look")
    calls = [{"name": "book", "arguments": ARGUMENTS}, {"name": "look", "arguments": {"city": "Oslo"}}][:count]
    tokens = encode(tokenizer, native_turn(tokenizer, request, "", calls)[1])[:-1]
    values, names, _ = said(tokenizer, request, tokens)
    assert sorted(values) == sorted(SAID + ["Oslo"] * (count - 1)) and names == ["book", "look"][:count]  # Gemma sorts the arguments


@pytest.mark.parametrize(
    ("written", "values", "names"),
    [
        ('<|tool_call|>[{"name": "book", "arguments": {"city": "Os', ["Os"], ["book"]),
        ('I book. <|tool_call|>[{"arguments": {"city": "book"}, "name": "book"}]<|/tool_call|>', ["book"], ["book"]),
        ('<|tool_call|>[{"name": "book"}]<|/tool_call|>', [], ["book"]),
        ('<|tool_call|>[{"name": "name", "arguments": {"name": "name"}}]<|/tool_call|>', ["name"], ["name"]),
        ('<|tool_call|>[{"name": "arguments", "arguments": {"city": "x"}}]<|/tool_call|>', ["x"], ["arguments"]),
        ('<|tool_call|>[{"name": "book", "arguments": {}}, {"name": "look", "arguments": {}}]<|/tool_call|>', [], ["book", "look"]),
    ],
)
def test_calls_that_are_broken_or_in_another_order(phi, written, values, names):
    assert said(phi, native("book"), encode(phi, written))[:2] == (values, names)


def test_the_name_of_a_call_is_where_the_call_stands(phi):
    """And not in what is said before it."""
    written = 'I will book. <|tool_call|>[{"name": "book", "arguments": {"city": "Oslo"}}]<|/tool_call|>'
    whole = phi.decode(tokens := encode(phi, written))
    places = module._places(phi, native("book"), whole, read_reply(phi, native("book"), tokens, True))
    assert places.names == [(whole.index('"book"') + 1, whole.index('"book"') + 5)]


def test_gpt_oss_channels():
    tokenizer = tokenizer_of("gptoss", marks=False)
    tokenizer.add_tokens(GPT_OSS, special_tokens=True)
    tokenizer.eos_token = "<|return|>"
    think = '<|channel|>analysis<|message|>to=functions.book {"city": "Rome"}?<|end|><|start|>assistant'
    call = '<|channel|>commentary to=functions.book <|constrain|>json<|message|>{"city": "Oslo"}'
    assert said(tokenizer, native("book"), encode(tokenizer, think + call))[:2] == (["Oslo"], ["book"])
    final = "<|channel|>final<|message|>No tool fits."
    assert said(tokenizer, native("book"), encode(tokenizer, think + final)) == ([], [], "No tool fits.")
    assert said(tokenizer, native("book"), encode(tokenizer, think.removesuffix("<|end|><|start|>assistant")), stopped=False) is None
    assert said(tokenizer, TEXT, encode(tokenizer, think + '<|channel|>final<|message|>{"a": 7}')) == (["7"], [], '{"a": 7}')


@pytest.mark.parametrize("family", ["phi", "qwen3"])
def test_a_native_reply_without_a_call(family):
    tokenizer = tokenizer_for(family)
    assert said(tokenizer, native("book"), encode(tokenizer, "Which city, please?")) == ([], [], "Which city, please?")
    thought = "<think>\nhm\n</think>\n\nWhich city, please?"
    assert said(tokenizer, native("book"), encode(tokenizer, thought))[2] == "Which city, please?"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(["<tool_call>", "</tool_call>", '{"name": "book", ', '"arguments": {', '"city": "Os', '"}', "}", "book", " ", "<think>", "</think>", "東"]), max_size=9))
def test_no_reply_is_too_broken(parts):
    tokenizer = tokenizer_for("qwen3")
    for request in (native("book"), TEXT):
        tokens = encode(tokenizer, "".join(parts))
        told = confidence(tokenizer, request, tokens, [(-0.5, 1.0)] * len(tokens), read_reply(tokenizer, request, tokens, False))
        assert told is None or (told["min_logprob"] == -0.5 and told["sum_logprob"] == -0.5 * told["tokens"] and 0 < told["tokens"] <= len(tokens))


# -- What is told ----------------------------------------------------------------------------------------------------------------


def told(tokenizer, request: Request, tokens: list[int], chances: list | None, stopped: bool = True) -> dict | None:
    return confidence(tokenizer, request, tokens, chances, read_reply(tokenizer, request, tokens, stopped))


def test_the_numbers_are_those_of_the_tokens_that_say_something(phi):
    """Worked out by hand: structure and the end token have chances that would show."""
    tokens = encode(phi, CALL)
    pieces = [phi.decode([token]) for token in tokens]
    assert "".join(pieces) == CALL
    at = [sum(map(len, pieces[:index])) for index in range(len(pieces))]
    holds = {word: [i for i, start in enumerate(at) if start < CALL.index(word) + len(word) and start + len(pieces[i]) > CALL.index(word)] for word in ("book", "Oslo", "2")}
    chances = [(-9.0, 0.001)] * len(tokens) + [(-99.0, 0.0001)]
    for number, index in enumerate(sorted({i for found in holds.values() for i in found}), 1):
        chances[index] = (-0.01 * number, 1.0 + number)
    said_by = sorted({i for found in holds.values() for i in found})
    assert told(phi, TEXT, tokens, chances) == {
        "min_logprob": pytest.approx(-0.01 * len(said_by)),
        "sum_logprob": pytest.approx(sum(chances[i][0] for i in said_by), abs=1e-6),
        "tokens": len(said_by),
        "tool_logprob": pytest.approx(sum(chances[i][0] for i in holds["book"]), abs=1e-6),
        "min_margin": 2.0,
    }


@pytest.mark.parametrize("text", ["Two are left.", "{}", "[]"])
def test_all_tokens_count_where_there_are_no_values(phi, text):
    tokens = encode(phi, text)
    chances = [(-0.1 * (1 + at), 2.0) for at in range(len(tokens))] + [(-50.0, 0.0)]
    found = told(phi, TEXT, tokens, chances)
    assert (found["tokens"], found["tool_logprob"]) == (len(tokens), None) and found["sum_logprob"] == pytest.approx(sum(one for one, _ in chances[:-1]), abs=1e-6)


def test_what_is_not_known_is_none(phi):
    tokens = encode(phi, CALL)
    good = [(-0.1, 1.0)] * len(tokens)
    assert told(phi, TEXT, tokens, None) is None and told(phi, TEXT, [], [(-0.1, 1.0)]) is None
    assert told(phi, TEXT, encode(phi, "  \n"), [(-0.1, 1.0)] * 9) is None
    for bad in ((math.nan, 1.0), (-math.inf, 1.0), (-0.1, math.nan), (-0.1, math.inf)):
        assert told(phi, TEXT, tokens, [bad] * len(tokens)) is None
        structure = [bad, *good[1:]]
        assert told(phi, TEXT, tokens, structure) == told(phi, TEXT, tokens, good), "the first token is none that counts"
    elsewhere = read_reply(phi, native("book"), tokens, True)[0], [{"name": "book", "arguments": '{"city":"Rome"}'}], ""
    assert confidence(phi, native("book"), tokens, good, elsewhere) is None, "arguments that do not stand in it"


def test_a_log_probability_is_at_most_zero(phi):
    tokens = encode(phi, CALL)
    found = told(phi, TEXT, tokens, [(1e-7, 30.0)] * len(tokens))
    assert json.dumps([found["min_logprob"], found["sum_logprob"], found["tool_logprob"]]) == "[0.0, 0.0, 0.0]"


# -- End to end ------------------------------------------------------------------------------------------------------------------


def test_a_local_models_replies_have_their_confidence_in_any_batch(monkeypatch):
    """Against transformers' own pass over prompt and reply at once."""
    import torch

    from slm_swap.clients.loading import encode_prompt

    client = SLMClient(Settings(slm_model_path="models/phi-tiny"), precision="fp32", max_new_tokens=48)
    eight = client.generate(BATCH)
    monkeypatch.setattr(client.engine, "batch_size", 1)
    one = client.generate(BATCH)
    assert all(left.confidence == pytest.approx(right.confidence, abs=1e-4) for left, right in zip(eight, one, strict=True))
    assert all(reply.confidence["tool_logprob"] is not None for reply in eight), "they are calls"
    prompt = encode_prompt(client.tokenizer, BATCH[0])
    tokens = encode(client.tokenizer, eight[0].text)
    with torch.inference_mode():
        logprobs = client.engine.model(input_ids=torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
    spans = token_spans(client.tokenizer, tokens, eight[0].text)
    city = eight[0].text.index("Oslo")
    name = eight[0].text.index("check_weather")
    counted = tokens_in(spans, [(name, name + 13), (city, city + 4)])
    own = [float(logprobs[at, tokens[at]]) for at in counted]
    assert eight[0].confidence["tokens"] == len(counted)
    assert eight[0].confidence["min_logprob"] == pytest.approx(min(own), abs=1e-4)
    assert eight[0].confidence["sum_logprob"] == pytest.approx(sum(own), abs=1e-4)


# -- Of a server -------------------------------------------------------------------------------------------------------------------


@given(st.text(max_size=12), st.lists(st.integers(0, 40), max_size=6))
def test_pieces_have_the_characters_whose_bytes_they_hold(text, cuts):
    data = text.encode("utf-8", "surrogatepass") if text.isascii() else text.encode("utf-8", "replace")
    borders = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    pieces = [data[start:end] for start, end in pairwise(borders)]
    owners = [at for at, character in enumerate(data.decode()) for _ in character.encode()]  # of each byte, its character
    place = 0
    for piece, (start, end) in zip(pieces, piece_spans(pieces), strict=True):
        assert (start, end) == (owners[place], owners[place + len(piece) - 1] + 1)
        place += len(piece)


@pytest.mark.parametrize("text", ['{"city": "Malmö", "nights": 2}', '{"a": ""}', "Nothing to do in Malmö.", "{}"])
def test_a_servers_pieces_tell_what_the_tokens_tell(phi, text):
    request = Request([{"role": "user", "content": "hi"}], None, None, None, True)
    tokens = encode(phi, text)
    spelled = {letter: byte for byte, letter in bytes_to_unicode().items()}  # of a byte-level vocabulary
    pieces = [bytes(spelled[letter] for letter in token) for token in phi.convert_ids_to_tokens(tokens)]
    assert b"".join(pieces).decode() == text
    chances = [(-0.1 * (at + 1), 1.0 + at) for at in range(len(tokens))]
    assert served_confidence(request, pieces, chances, (text, [], "")) == confidence(phi, request, tokens, chances, (text, [], ""))


def test_bytes_that_are_no_text_tell_nothing():
    assert served_confidence(TEXT, [b"\xff"], [(0.0, 1.0)], ("x", None, "")) is None
    assert served_confidence(TEXT, [], [], ("x", None, "")) is None
