"""The embedded defaults: the sample, the tiny model and how both are made."""

import json
import math
import re
import runpy
import sys
from argparse import Namespace

import pytest

from slm_swap.clients.loading import load_model, load_tokenizer
from slm_swap.common.settings import PACKAGE
from slm_swap.demo import make_tiny_model
from slm_swap.demo.language import CONCEPTS, Speaker, say
from slm_swap.demo.make_sample_data import TOOLS
from slm_swap.demo.pretraining_rows import MADE_UP, kind_of, make_row, make_table, make_tool, with_made_up
from slm_swap.rows.json_schema import call_violations
from slm_swap.rows.toolschema import xlam_tool

SAMPLE = PACKAGE / "02_dataset/sample/xlam_sample.jsonl"
TINY = PACKAGE / "models/phi-tiny"


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return [json.loads(line) for line in SAMPLE.read_text().splitlines()]


def run(monkeypatch, script: str, *flags: object) -> None:
    monkeypatch.setattr(sys, "argv", [script, *map(str, flags)])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(PACKAGE / script), run_name="__main__")
    assert left.value.code == 0


def test_the_sample_is_what_its_script_makes(tmp_path, monkeypatch):
    run(monkeypatch, "demo/make_sample_data.py", "--out", tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_bytes() == SAMPLE.read_bytes()


def test_the_sample_has_xlams_form_and_quirks(rows):
    assert len(rows) >= 2000 and all(set(row) == {"id", "query", "answers", "tools"} for row in rows)
    answers, tools = [[json.loads(row[name]) for row in rows] for name in ("answers", "tools")]
    assert len({tool["name"] for offered in tools for tool in offered}) == len(TOOLS) >= 40
    types = {parameter["type"] for offered in tools for tool in offered for parameter in tool["parameters"].values()}
    assert {"str", "int", "float", "List[int]", "str, optional", "int, optional", "List[str]"} <= types
    defaults = {
        str(parameter.get("default")) for offered in tools for tool in offered for parameter in tool["parameters"].values()
    }
    assert {"", "None", "10"} <= defaults
    assert 0.05 < sum(len(calls) > 1 for calls in answers) / len(rows) < 0.2
    assert sum(len(offered) > 1 for offered in tools) > len(rows) / 2


def test_every_gold_of_the_sample_fits_its_tools_schema(rows):
    for row in rows:
        tools = {tool["name"]: xlam_tool(tool) for tool in json.loads(row["tools"])}
        for call in json.loads(row["answers"]):
            assert not call_violations(call["arguments"], tools[call["name"]]), row


@pytest.mark.parametrize("key", CONCEPTS)
def test_a_phrase_says_its_value(key):
    rng, concept = Speaker(key), CONCEPTS[key]
    for _ in range(50):
        phrase, value = say(rng, concept, general=False)
        assert "{" not in phrase and value not in ("", None, [])
        if concept.type == "int":
            assert isinstance(value, int)
        if concept.type == "List[str]":
            assert all(item in phrase for item in value)


def test_invented_words_are_new_and_known_ones_stay_known():
    known = ("apple", "pear")
    assert {Speaker("a").word(known) for _ in range(3)} <= set(known)
    rng = Speaker("b", invented=1.0)
    words = [rng.word(known) for _ in range(500)]
    assert not set(words) & set(known) and len(set(words)) > 450 and all(re.fullmatch("[a-z]{3,8}", word) for word in words)


@pytest.fixture(scope="module")
def pretraining() -> list:
    return [make_row(42, number) for number in range(3000)]


def test_the_sample_tools_are_not_in_the_pretraining_text(pretraining):
    names, asks = {tool.name for tool in TOOLS}, {ask for tool in TOOLS for ask in tool.asks}
    for row in pretraining:
        assert not any(f'"{name}"' in row.prompt or f'"{name}"' in row.completion for name in names)
    for number in range(3000):
        tool = make_tool(Speaker(f"tool {number}"))
        assert tool.name not in names and not asks & {*tool.asks}


def test_no_convention_of_the_sample_is_in_the_pretraining_text(pretraining):
    """Where a schema asks for the country alone, the call has the country's name, whatever the shots are."""
    concepts = {f"{concept.description}.": concept for concept in CONCEPTS.values() if concept.convention}
    assert len(concepts) == 10
    words = {
        description: {concept.draw(Speaker(f"{n}"))[0] for n in range(300)} for description, concept in concepts.items()
    }
    seen = 0
    for row in pretraining:
        offered, _, arguments = called_of(row, row.prompt, row.completion)
        for name, schema in offered.items():
            if schema.get("description") in concepts and name in arguments:
                seen += 1
                assert arguments[name] in words[schema["description"]], row
    assert seen > 300


def called_of(row, prompt: str, completion: str) -> tuple[dict, str, dict]:
    """(properties of the tool that is called, its name, the call's arguments)"""
    if row.track == "structured":
        schema, call = json.JSONDecoder().raw_decode(prompt.partition("\n")[2])[0], json.loads(completion)
        assert schema["properties"]["tool_name"]["const"] == call["tool_name"]
        return schema["properties"]["arguments"]["properties"], call["tool_name"], call["arguments"]
    tools = [json.loads(line) for line in prompt.splitlines() if line.startswith("{")]
    name, arguments = re.fullmatch(r'<tool_call name="([^"]*)">(.*)</tool_call>', completion).groups()
    (tool,) = [tool for tool in tools if tool["name"] == name]
    assert not call_violations(json.loads(arguments), tool)
    return tool["parameters"]["properties"], name, json.loads(arguments)


def test_pretraining_rows_may_have_shots_as_few_shot_shows_them(pretraining):
    shown = [row for row in pretraining if row.shots]
    assert 0.1 < len(shown) / len(pretraining) < 0.3 and {len(row.shots) // 2 for row in shown} == {1, 2, 3, 5}
    assert {len(row.further) // 2 for row in pretraining} == set(range(8))
    for row in shown:
        assert [turn["role"] for turn in row.messages] == ["system", *("user", "assistant") * (len(row.shots) // 2), "user"]
        assert all(turn["content"].startswith("Request: ") for turn in row.shots[::2])
        for turn in (*row.shots[1::2], *row.further[1::2]):
            called_of(row, row.prompt, turn["content"])


def test_pretraining_rows_may_have_many_small_tools_to_choose_from(pretraining):
    """Every request has its tool among those on offer, and no tool is always the one that is due."""
    many = []
    for row in (row for row in pretraining if row.track == "toolcall"):
        tools = [json.loads(line) for line in row.prompt.splitlines() if line.startswith("{")]
        names = [tool["name"] for tool in tools]
        due = [called_of(row, row.prompt, reply)[1] for reply in (row.completion, *(turn["content"] for turn in row.further[1::2]))]
        assert len({*names}) == len(names) <= 8 and {*due} <= {*names}
        if len(tools) > 3:
            assert all(len(tool["parameters"]["properties"]) == 1 for tool in tools) or row.shots  # shots may tell of one more
            many.append((names.index(due[0]), len({*due})))
    assert 0.25 < len(many) / sum(row.track == "toolcall" for row in pretraining) < 0.45
    assert {place for place, _ in many} == set(range(8)) and sum(different > 2 for _, different in many) > len(many) / 2


def test_two_values_of_one_kind_stand_side_by_side_in_some_tools():
    pairs = [[kind_of(parameter.concept) for parameter in make_tool(Speaker(f"pair {n}")).parameters] for n in range(2000)]
    several = [kinds for kinds in pairs if len(kinds) > 1]
    assert 0.2 < sum(len({*kinds}) < len(kinds) for kinds in several) / len(several) < 0.5


def test_every_reply_of_a_pretraining_row_is_learned_and_nothing_else():
    tokenizer = load_tokenizer(TINY)
    rows = [make_row(7, number) for number in range(8)]
    steps = make_tiny_model.Steps(tokenizer, Namespace(seed=7, rows_per_step=8, steps=1, first_step=0, micro_tokens=10**6))
    ((ids, labels),) = steps[0]
    replies = {"".join(row.completion + "<|end|>" + "".join(t["content"] + "<|end|>" for t in row.further[1::2])) for row in rows}
    assert {tokenizer.decode(row[row != -100]) for row in labels} == replies
    whole = {tokenizer.apply_chat_template([*row.messages, {"role": "assistant", "content": row.completion}, *row.further], tokenize=False) for row in rows}
    assert {tokenizer.decode(row[: (one != -100).nonzero().max() + 1]) for row, one in zip(ids, labels, strict=True)} == {
        text.removesuffix("<|endoftext|>") for text in whole
    }


def test_words_known_before_give_the_ids_of_the_whole_text():
    tokenizer = load_tokenizer(TINY)
    words = make_tiny_model.KnownWords(tokenizer)
    rows = [make_row(7, number) for number in range(40)]
    texts = [tokenizer.apply_chat_template(row.messages, tokenize=False) + row.completion for row in rows]
    texts += ["", "a<|end|>b<|endofx|><|<|user|>|>", "<|system", "x_y1 23 4.5\n\t{}", "Zürich ½ cup", "  <  <|tool|>"]
    for _ in range(2):
        assert [words.ids(text) for text in texts] == tokenizer(texts, add_special_tokens=False)["input_ids"]
    words.MOST = len(words)
    words.ids("zyzzyva")
    assert len(words) == 1  # what is known does not grow for ever


def test_a_micro_batch_holds_the_tokens_that_fit():
    tokenizer = load_tokenizer(TINY)
    given = {"seed": 1, "rows_per_step": 16, "steps": 1, "first_step": 0}
    (whole,) = make_tiny_model.Steps(tokenizer, Namespace(**given, micro_tokens=10**6))[0]
    parts = make_tiny_model.Steps(tokenizer, Namespace(**given, micro_tokens=2000))[0]
    assert len(parts) > 2 and sum(len(ids) for ids, _ in parts) == len(whole[0]) == 16
    assert all(ids.numel() <= 2000 or len(ids) == 1 for ids, _ in parts)


def test_a_made_up_convention_is_told_by_the_shots(pretraining):
    """The value of the row's own call stands in one of its shots."""
    rng = Speaker("table", invented=0.5)
    table = make_table(rng, 3)
    tool, concept = with_made_up(rng, make_tool(rng), iter(table))
    assert [parameter.concept for parameter in tool.parameters].count(MADE_UP) == 1
    assert [concept.draw(rng) for _ in table] == table and concept.description.startswith("The ")
    told = 0
    for row in (row for row in pretraining if row.shots):
        offered, _, arguments = called_of(row, row.prompt, row.completion)
        for name, schema in offered.items():
            if schema.get("description") == f"The {name}." and name in arguments:
                shots = [called_of(row, row.prompt, turn["content"])[2] for turn in row.shots[1::2]]
                told += any(shot.get(name) == arguments[name] for shot in shots)
    assert told > 100


def test_the_tiny_model_has_phi_4_minis_architecture():
    config = json.loads((TINY / "config.json").read_text())
    assert config["architectures"] == ["Phi3ForCausalLM"] and config["tie_word_embeddings"] is True
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["rope_parameters"]["partial_rotary_factor"] == 0.75
    assert sum(path.stat().st_size for path in TINY.iterdir()) <= 20e6 and (TINY / "model.safetensors").is_file()


def test_a_word_has_the_same_tokens_wherever_it_stands():
    tokenizer = load_tokenizer(TINY)
    word = tokenizer("restaurant", add_special_tokens=False)["input_ids"]
    inside = tokenizer('Book a restaurant: {"restaurant_id": 7}', add_special_tokens=False)["input_ids"]
    hits = [at for at in range(len(inside)) if inside[at : at + len(word)] == word]
    assert len(hits) == 2


def test_the_pretraining_loss_is_that_of_the_completion():
    tokenizer = load_tokenizer(TINY)
    model = load_model(TINY, "fp32", device_map=None)
    steps = make_tiny_model.Steps(tokenizer, Namespace(seed=1, rows_per_step=4, steps=1, first_step=0, micro_tokens=4096))
    ((ids, labels),) = steps[0]
    tokens = (labels != -100).sum().item()
    lengths = [(row != -100).nonzero().max().item() + 1 for row in labels]
    losses = [
        model(input_ids=ids[[r]][:, :n], labels=labels[[r]][:, :n]).loss.item() * (labels[r] != -100).sum().item()
        for r, n in enumerate(lengths)
    ]
    assert math.isclose(make_tiny_model.completion_loss(model, ids, labels).item() / tokens, sum(losses) / tokens, rel_tol=1e-4)


def test_pretraining_is_reproducible_and_lowers_the_loss(tmp_path, monkeypatch):
    flags = ("--steps", 6, "--rows-per-step", 4, "--micro-tokens", 4096, "--workers", 0, "--layers", 1, "--tokenizer-rows", 200)
    for name in ("one", "two"):
        run(monkeypatch, "demo/make_tiny_model.py", *flags, "--out", tmp_path / name)
    for file in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    run(
        monkeypatch,
        "demo/make_tiny_model.py",
        *flags,
        "--start-from",
        tmp_path / "one",
        "--first-step",
        6,
        "--out",
        tmp_path / "more",
    )
    runs = json.loads((tmp_path / "more/training_info.json").read_text())["runs"]
    assert len(runs) == 2 and runs[0]["loss"]["6"] < runs[0]["loss"]["1"] and runs[1]["loss"]["6"] < runs[0]["loss"]["1"]
