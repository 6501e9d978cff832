"""From rows to splits: near-duplicates by brute force, sizes, unseen tools, and files that are all there or not at all."""

import json
import re
from dataclasses import replace
from itertools import combinations
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slm_swap.common.errors import UserError
from slm_swap.common.reports import write_jsonl
from slm_swap.dataset import build as build_module
from slm_swap.dataset import near as near_module
from slm_swap.dataset.build import build, make_example
from slm_swap.dataset.near import components, near_duplicates
from slm_swap.dataset.row import Dropped, Row
from slm_swap.dataset.select import select
from slm_swap.dataset.splits import Sizes, moment, split
from slm_swap.rows.examples import parse_example
from slm_swap.scoring.json_values import parse_json, same
from slm_swap.scoring.tracks import TRACKS


def tool(name):
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    return {"name": name, "description": "", "parameters": parameters}


def row(number, request=None, name="f", offered=(), **fields):
    request = request or f"only{number} words{number} here{number}"
    values = {"where": f"rows.jsonl:{number}", "source": f"xlam:{number}", "tools": [tool(n) for n in (name, *offered)]}
    values["arguments"] = {"city": "Oslo"}
    return Row(str(number), request=request, tool=name, **(values | fields))


def words(text):
    return set(re.findall(r"\w+", text.lower()))


def near(one, other):
    one, other = words(one), words(other)
    return 10 * len(one & other) >= 7 * len(one | other)


def by_brute_force(texts):
    """The same partition as near_duplicates, pair by pair."""
    labels = list(range(len(texts)))
    for one, other in combinations(range(len(texts)), 2):
        if labels[one] != labels[other] and near(texts[one], texts[other]):
            labels = [labels[one] if label == labels[other] else label for label in labels]
    return labels


def same_partition(one, other):
    return len(set(zip(one, other, strict=True))) == len(set(one)) == len(set(other))


# -- Near-duplicates -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "one, other, expected",
    [
        ("a b c d e f g", "a b c d e f g h i j", True),  # 7 of 10: just
        ("a b c d e f g h i", "a b c d e f j k l m", False),  # 6 of 13
        ("a b", "a b c", False),  # 2 of 3
        ("a a b", "B, a!", True),  # sets, lower case, no punctuation
        ("a b c", "d e f", False),
        ("...", "?!", True),  # no words at all: alike
        ("...", "a", False),
    ],
)
def test_near_duplicates_of_two(one, other, expected):
    first, second = near_duplicates([one, other])
    assert (first == second) is expected


def test_near_duplicates_chain():
    texts = ["a b c d e f g h", "a b c d e f g h i j", "c d e f g h i j k"]
    assert not near(texts[0], texts[2])
    assert len(set(near_duplicates(texts))) == 1


def test_near_duplicates_just_across_a_block():
    texts = [" ".join(f"a{text} b c d e f g".split()) for text in range(512)]  # a block of seven words each
    labels = near_duplicates([*texts, "a9 b c d e f g x y z"])
    assert labels.count(labels[-1]) > 1


def test_near_duplicates_of_nothing_and_one():
    assert near_duplicates([]) == []
    assert len(near_duplicates(["x"])) == 1


@pytest.mark.parametrize("few", [(1, 10**18), (10**18, 0)], ids=["by prefixes", "by all"])
@pytest.mark.parametrize("vocabulary, length", [(30, 8), (400, 12), (3000, 20)])
def test_near_duplicates_against_brute_force(vocabulary, length, few, monkeypatch):
    monkeypatch.setattr(near_module, "FEW_PAIRS", few)
    rng = Random(vocabulary)
    texts = []
    for _ in range(700):  # more than one block; copies with a few words changed
        text = (
            list(rng.choice(texts)) if texts and rng.random() < 0.5 else rng.choices(range(vocabulary), k=rng.randint(1, length))
        )
        for _ in range(rng.randint(0, 3)):
            text[rng.randrange(len(text))] = int(vocabulary * rng.random() ** 2)
        texts.append(text)
    texts = [" ".join(f"w{word}" for word in text) for text in texts]
    labels = near_duplicates(texts)
    assert 1 < len(set(labels)) < len(texts)
    assert same_partition(labels, by_brute_force(texts))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(alphabet="abcdefgh ", max_size=20), max_size=12))
def test_near_duplicates_of_anything(texts):
    assert same_partition(near_duplicates(texts), by_brute_force(texts))


def test_components_by_query_and_by_source():
    rows = [row(1, "Straße"), row(2, " STRASSE\n"), row(3), row(4), row(5, source="log:9"), row(6, source="log:9")]
    assert [[r.id for r in group] for group in components(rows)] == [["1", "2"], ["3"], ["4"], ["5", "6"]]


def test_components_by_conversation():
    rows = [row(1, group="a"), row(2), row(3, group="a"), row(4, group="b")]
    assert [[r.id for r in group] for group in components(rows)] == [["1", "3"], ["2"], ["4"]]


def conversation(number, *messages, **record):
    told = [{"role": "user" if at % 2 == 0 else "assistant", "content": text} for at, text in enumerate(messages)]
    return replace(row(number), tool=None, record={"id": str(number), "messages": told, "calls": [], "content": "x"} | record, track="toolcall")


def test_replies_of_one_conversation_that_were_logged_alone_stay_together():
    rows = [
        conversation(1, "my parcel is late again", content="Which one?"),
        conversation(2, "my parcel is late again", "Which one?", "number four please"),
        conversation(3, "hi", content="Hello!"),
        conversation(4, "hi", "Hello!", "where is my parcel now"),
    ]
    assert [[r.id for r in group] for group in components(rows)] == [["1", "2"], ["3"], ["4"]]


# -- Selecting -------------------------------------------------------------------------------------------------------------------


def test_exact_duplicates_are_dropped_whatever_the_order_of_tools():
    first = row(1, "same", offered=["g"])
    second = row(2, "same", offered=["g"], tools=list(reversed(first.tools)))
    other = row(3, "same", offered=["h"])
    rows, dropped, _ = select([first, second, other, Dropped("9", "rows.jsonl:9", "no_answer")])
    assert [r.id for r in rows] == ["1", "3"]
    assert [(d.id, d.reason, d.why) for d in dropped] == [("2", "duplicate", "the same as rows.jsonl:1"), ("9", "no_answer", "")]


def test_the_newest_of_two_replies_stays_or_the_first_where_no_time_is_known():
    asked = {"request": "same", "where": "x:1"}
    rows = [row(1, **asked), row(2, arguments={"city": "Bonn"}, **asked), row(3, **asked)]
    kept, dropped, _ = select(rows)
    assert [r.id for r in kept] == ["1"]
    assert [(d.id, d.reason) for d in dropped] == [("2", "conflicting"), ("3", "duplicate")]
    timed = [replace(r, time=time) for r, time in zip(rows, ("2026-01-01", "2026-01-03", "2026-01-02"), strict=True)]
    kept, dropped, _ = select(timed)
    assert [r.id for r in kept] == ["2"]
    assert [(d.id, d.reason) for d in dropped] == [("1", "conflicting"), ("3", "conflicting")]


def test_ids_that_stand_twice_are_told_apart():
    rows, _, renamed = select([row(1), row(1, "another"), row(1, "a third"), row("1-2", "taken")])
    assert [r.id for r in rows] == ["1", "1-3", "1-4", "1-2"] and renamed == 2


@pytest.mark.parametrize(
    ("faulty", "why"),
    [(row(1, "\ud800"), "half of a surrogate pair"), (row(1, accept={"city": [float("nan")]}), "NaN or Infinity")],
)
def test_what_no_row_can_hold_is_counted(faulty, why):
    rows, [dropped], _ = select([faulty, row(2)])
    assert [r.id for r in rows] == ["2"] and (dropped.reason, dropped.why) == ("unusable", why)


def test_no_row_is_left():
    with pytest.raises(UserError, match=r"none of 2 rows can be used \(no_answer 2\)"):
        select([Dropped("1", "", "no_answer"), Dropped("2", "", "no_answer")])


def test_a_team_row_with_nan_is_counted():
    example = parse_example({"prompt": "p", "completion": "{}", "accept": {"a": [float("inf")]}}, "rows.jsonl:1")
    rows, [dropped], _ = select([row(1, example=example), row(2)])
    assert dropped.reason == "unusable" and len(rows) == 1


# -- Splits ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes, expected",
    [
        (Sizes(), (80, 10, 10)),
        (Sizes(val=0, test=50), (50, 0, 50)),
        (Sizes(train=30), (30, 10, 10)),
        (Sizes(train=0), (0, 10, 90)),
        (Sizes(train=0, val=0), (0, 0, 100)),
        (Sizes(train=0, val=0, test=5), (0, 0, 5)),
        (Sizes(100, 0, 0), (100, 0, 0)),
        (Sizes(calibration=30), (50, 10, 10)),
        (Sizes(train=0, val=0, calibration=30), (0, 0, 70)),
    ],
)
def test_sizes(sizes, expected):
    targets = dict(zip(("train", "val", "test", "calibration"), (*expected, sizes.calibration), strict=True))
    assert sizes.targets(100) == targets
    splits, dropped = split([[row(number)] for number in range(100)], sizes, seed=1)
    assert {name: len(rows) for name, rows in splits.items()} == targets
    assert [drop.reason for drop in dropped] == ["unused"] * (100 - sum(targets.values()))


def test_more_rows_than_there_are():
    with pytest.raises(UserError, match=r"train 90 \+ val 10 \+ test 10 rows are wanted, 100 can be used"):
        split([[row(number)] for number in range(100)], Sizes(train=90), seed=1)
    with pytest.raises(UserError, match=r"test 300 \+ calibration 700 rows are wanted, 1000 can be used"):
        split([[row(number)] for number in range(1000)], Sizes(train=0, val=100, test=300, calibration=700), seed=1)


def group(first, size):
    return [row(number) for number in range(first, first + size)]


def test_groups_stay_whole_and_what_does_not_fit_is_passed_over():
    groups = [group(0, 60), *(group(number, 5) for number in range(100, 200, 5))]
    splits, dropped = split(groups, Sizes(test=40, val=20), seed=3)
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 100, "val": 20, "test": 40, "calibration": 0}
    assert not dropped
    for whole in groups:
        assert len({name for name, rows in splits.items() for r in rows if r.id in {w.id for w in whole}}) == 1


def test_a_gap_is_closed_by_taking_the_largest_first():
    groups = [group(0, 3), group(10, 5), group(20, 5)]  # 10 only without the 3
    for seed in range(20):
        assert len(split(groups, Sizes(test=10, val=0), seed)[0]["test"]) == 10


def test_a_size_that_cannot_be_met_says_what_can():
    groups = [group(first, 10) for first in range(0, 100, 10)]
    with pytest.raises(
        UserError, match=r"test: 25 rows are wanted, 20 can be had with near-duplicates kept together: set --test-size 20"
    ):
        split(groups, Sizes(test=25, val=0), seed=1)
    assert len(split(groups, Sizes(test=20, val=0), seed=1)[0]["test"]) == 20
    assert len(split([*groups, group(200, 9)], Sizes(), seed=1)[0]["test"]) in (9, 10)  # a tenth: as near as groups allow


def test_one_large_group_cannot_be_split():
    with pytest.raises(UserError, match=r"test: 10 rows are wanted, 0 can be had.* 100 of the 100 rows left hang together.*--train-size 0"):
        split([group(0, 100)], Sizes(), seed=1)


def test_where_no_group_is_small_enough_the_smallest_is_taken():
    splits, _ = split([group(0, 7), group(10, 6), group(20, 7)], Sizes(), seed=1)
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 7, "val": 7, "test": 6, "calibration": 0}


def test_calibration_rows_come_from_groups_of_their_own_and_leave_the_test_as_it_was():
    groups = [group(first, 4) for first in range(0, 800, 4)]
    with_it, without = (split(groups, Sizes(test=80, calibration=size), seed=5)[0] for size in (120, 0))
    assert with_it["test"] == without["test"] and len(with_it["calibration"]) == 120
    owners = {row.id: name for name, rows in with_it.items() for row in rows}
    assert all(len({owners[row.id] for row in whole}) == 1 for whole in groups)


@pytest.mark.parametrize(("rows", "test"), [(999, 100), (1000, 300), (2500, 300), (4000, 400)])
def test_a_test_split_has_300_rows_where_there_are_1000(rows, test):
    assert Sizes().targets(rows)["test"] == test
    assert Sizes(test=50).targets(rows)["test"] == 50
    assert sum(Sizes(train=700).targets(rows).values()) <= rows


def test_the_newest_conversations_are_the_test():
    rows = [row(number, time=f"2026-01-{number % 28 + 1:02}T00:00:00Z") for number in range(100)]
    splits, _ = split([[r] for r in rows], Sizes(), seed=1, by_time=True)
    days = {name: {moment(r.time) for r in part} for name, part in splits.items() if part}
    assert min(days["test"]) >= max(days["val"]) and min(days["val"]) >= max(days["train"])
    with pytest.raises(UserError, match="--split-by time needs a time in every row, 1 have none"):
        split([[r] for r in [*rows, row(200)]], Sizes(), seed=1, by_time=True)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("1970-01-01T00:01:00Z", 60), ("1970-01-01 00:01:00", 60), ("60", 60), ("1700000000000", 1.7e9), ("soon", None), (None, None)],
)
def test_moments(text, seconds):
    assert moment(text) == seconds


def test_unseen_tools():
    rng = Random(0)
    names = [f"tool{number}" for number in range(20)]
    rows = [row(number, name=rng.choice(names), offered=rng.sample(names, 1)) for number in range(400)]
    splits, dropped = split([[r] for r in rows], Sizes(), seed=1, unseen_tools=True)
    test_tools = {r.tool for r in splits["test"]}
    assert len(splits["test"]) == 40 and len(test_tools) < 5  # few tools, whole
    assert all(not r.names & test_tools for name in ("train", "val") for r in splits[name])
    assert len({r.tool for r in splits["val"]}) > 5  # val is drawn from all that is left
    assert {drop.reason for drop in dropped} == {"shares_test_tool"}
    assert sum(map(len, splits.values())) + len(dropped) == 400
    assert len(dropped) < 120
    with pytest.raises(UserError, match="--unseen-tools needs to know each row's tool"):
        split([[row(1, name=None, tools=[])]], Sizes(), seed=1, unseen_tools=True)


TEMPLATES = [
    "please book a table in {c} for {n} people under the name {p}", "what is the weather in {c}", "send {n} euros to {p} today",
    "wake {p} at {n}", "find a flight from {c} to {c}", "how many {p} live near {c} and pay more than {n} euros a month for it",
]  # fmt: skip


def template_rows(count, seed=0):
    rng = Random(seed)
    rows = []
    for number in range(count):
        extra = " ".join(f"w{rng.randrange(5000)}" for _ in range(rng.choice((0, 2, 6, 9))))
        text = rng.choice(TEMPLATES).format(c=f"city{rng.randrange(90)}", n=rng.randrange(60), p=f"person{rng.randrange(90)}")
        rows.append(row(number, f"{text} {extra}", name=rng.choice("fgh")))
    return rows


def test_splits_share_nothing_by_brute_force():
    rows, _, _ = select(template_rows(2000))
    groups = components(rows)
    splits, dropped = split(groups, Sizes(), seed=42)
    assert sum(map(len, splits.values())) == len(rows) and not dropped
    assert any(len(g) > 20 for g in groups)
    for one, other in combinations(splits.values(), 2):
        sets = [words(r.request) for r in other]
        for r in one:
            mine = words(r.request)
            for theirs in sets:
                shared = len(mine & theirs)
                assert 17 * shared < 7 * (len(mine) + len(theirs))


def test_the_split_depends_on_the_seed_and_not_on_the_order_of_rows():
    rows = template_rows(300)

    def ids(some, seed):
        return {name: {r.id for r in part} for name, part in split(components(some), Sizes(), seed)[0].items()}

    assert ids(rows, 42) == ids(rows[::-1], 42) != ids(rows, 43)


# -- Examples and files ----------------------------------------------------------------------------------------------------------


def test_examples_of_both_tracks():
    source = row(1, "Weather in Oslo?", "f", ["g", "h"], accept={"city": ["Oslo", "oslo"]})
    call, structured = (make_example(source, track, seed=42) for track in ("toolcall", "structured"))
    assert call.completion == '<tool_call name="f">{"city":"Oslo"}</tool_call>'
    assert structured.completion == '{"tool_name":"f","arguments":{"city":"Oslo"}}'
    assert sorted(t["name"] for t in call.tools) == ["f", "g", "h"]
    assert all(json.dumps(t) in call.prompt for t in call.tools)
    assert call.prompt.endswith("Request: Weather in Oslo?") and structured.prompt.endswith("Request: Weather in Oslo?")
    assert json.dumps(structured.schema) in structured.prompt
    for example in (call, structured):
        assert (example.id, example.group, example.source, example.accept) == ("1", None, "xlam:1", {"city": ["Oslo", "oslo"]})


def test_tools_are_shuffled_row_by_row():
    orders = {tuple(t["name"] for t in make_example(row(n, "x", "f", ["g", "h"]), "toolcall", 42).tools) for n in range(60)}
    assert len(orders) == 6


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=5), json_values, max_size=4))
def test_every_built_completion_is_gold_of_its_track(arguments):
    source = replace(row(1), arguments=arguments)
    call = TRACKS["toolcall"].parse_reference(make_example(source, "toolcall", 1).completion)
    structured = TRACKS["structured"].parse_reference(make_example(source, "structured", 1).completion)
    assert call.name == structured.value["tool_name"] == "f"
    assert call.value == structured.value["arguments"]
    assert same(call.value, parse_json(json.dumps(arguments)))


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_build_writes_both_tracks_and_accounts_for_every_row(tmp_path):
    items = [*template_rows(100), Dropped("x", "rows.jsonl:101", "no_answer", "0 answers")]
    report = build(items, tmp_path, {"stage": "prepare_data"}, Sizes(train=50, val=10, test=20), seed=42)
    assert sorted(files(tmp_path)) == [
        "prepare_dropped.jsonl", "prepare_report.json", "structured/test.jsonl", "structured/train.jsonl", "structured/val.jsonl",
        "toolcall/test.jsonl", "toolcall/train.jsonl", "toolcall/val.jsonl",
    ]  # fmt: skip
    assert report == json.loads((tmp_path / "prepare_report.json").read_text())
    counts = report["counts"]
    assert (counts["read"], counts["kept"]) == (101, 80)
    assert counts["kept"] + sum(counts["dropped"].values()) == counts["read"]
    assert counts["dropped"] == {"no_answer": 1, "unused": 20}
    lines = [json.loads(line) for line in (tmp_path / "prepare_dropped.jsonl").read_text().splitlines()]
    assert lines[0] == {"where": "rows.jsonl:101", "id": "x", "reason": "no_answer", "why": "0 answers"} and len(lines) == 21
    assert report["dropped_examples"]["no_answer"] == [{"id": "x", "where": "rows.jsonl:101", "why": "0 answers"}]
    for name in ("train", "val", "test"):
        ids = [
            [json.loads(line)["id"] for line in (tmp_path / track / f"{name}.jsonl").read_text().splitlines()]
            for track in ("structured", "toolcall")
        ]
        assert ids[0] == ids[1] and len(ids[0]) == report["splits"]["toolcall"][name]["rows"]


def test_build_again_is_the_same_and_a_stale_split_goes(tmp_path):
    rows = template_rows(60)
    build(rows, tmp_path, {}, Sizes(), seed=42)
    first = files(tmp_path)
    build(rows, tmp_path, {}, Sizes(), seed=42)
    assert files(tmp_path) == first
    report = build(rows, tmp_path, {}, Sizes(val=0), seed=42)
    assert not (tmp_path / "toolcall/val.jsonl").exists() and not (tmp_path / "structured/val.jsonl").exists()
    assert report["splits"]["toolcall"]["val"] == {"rows": 0}


def test_a_failure_changes_nothing(tmp_path, monkeypatch):
    rows = template_rows(60)
    build(rows, tmp_path, {}, Sizes(), seed=42)
    before = files(tmp_path)
    written = []

    def full_at_the_fourth(path, lines):
        written.append(path)
        if len(written) == 4:
            raise OSError(28, "No space left on device")
        write_jsonl(path, lines)

    monkeypatch.setattr(build_module, "write_jsonl", full_at_the_fourth)
    with pytest.raises(UserError, match="No space left on device"):
        build(rows, tmp_path, {}, Sizes(), seed=43)
    assert files(tmp_path) == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"cannot write .*file.*--out-dir"):
        build(template_rows(60), tmp_path / "file", {}, Sizes(), seed=42)
