"""Rows in: what is read, and one line with file and line number for what cannot be."""

import json
import os
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slm_swap.common.errors import UserError
from slm_swap.common.exact_json import EXACT, exact
from slm_swap.rows.examples import Dataset, Example, parse_example, read_examples
from slm_swap.rows.lines import dump_json, nested_too_deeply, read_jsonl

ROW = {"prompt": "p", "completion": "{}"}


def failure(path, **options):
    with pytest.raises(UserError) as raised:
        read_examples(path, **options)
    message = str(raised.value)
    assert "\n" not in message and ": " in message
    return message


def nested(depth):
    value = []
    for _ in range(depth - 1):
        value = [value]
    return value


def test_two_fields_are_enough(write_rows):
    [example] = read_examples(write_rows("rows.jsonl", [ROW]))
    assert (example.prompt, example.completion) == ("p", "{}")
    assert len(example.id) == 16 and example.where.endswith("rows.jsonl:1")
    assert example.tools is example.schema is example.accept is example.group is example.source is None


def test_all_fields_come_back(write_rows):
    row = ROW | {
        "id": "r1", "tools": [{"name": "f", "parameters": {}}], "schema": {"default": 0.5}, "accept": {"a": [1, ""]}, "group": "g", "source": "s",
        "unknown": 1,
    }  # fmt: skip
    [example] = read_examples(write_rows("rows.jsonl", [row]))
    assert example.to_json() == {name: value for name, value in row.items() if name != "unknown"}
    assert read_examples(write_rows("again.jsonl", [example.to_json()])) == [example]


def test_lines(write_rows):
    path = write_rows(
        "rows.jsonl", [b"\xef\xbb\xbf" + json.dumps(ROW).encode(), b"", b"  ", json.dumps(ROW | {"id": 7}).encode() + b"\r"]
    )
    assert [example.where.rsplit(":", 1)[1] for example in read_examples(path)] == ["1", "4"]
    assert read_examples(path)[1].id == "7"
    assert len(read_examples(path, limit=1)) == 1


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (b'{"prompt": "p"', "not a line of JSON"),
        (b"prompt,completion", "not a line of JSON"),
        (b'{"prompt": "\xff", "completion": "{}"}', "not a line of JSON .*utf-8"),
        (b'{"prompt": "p", "completion": "{}", "schema": {"default": NaN}}', "NaN is not JSON"),
        (b'{"prompt": "p", "completion": "{}", "schema": {"default": -Infinity}}', "-Infinity is not JSON"),
        (b'{"prompt": "p", "completion": "{}", "schema": {"default": 1e999}}', "1e999 is larger than any number"),
        (b'{"prompt": "p", "completion": "{}", "schema": {"default": -1e999}}', "-1e999 is larger than any number"),
        (b"[" * 100_000, "not a line of JSON"),
        (b'["prompt", "completion"]', "a row is a JSON object, not list"),
        (b"null", "a row is a JSON object, not NoneType"),
        (b'{"completion": "{}"}', "no `prompt`: every row needs"),
        (b'{"prompt": "p"}', "no `completion`"),
        (b'{"prompt": 5, "completion": "{}"}', "`prompt` is not a text"),
        (b'{"prompt": "p", "completion": {"a": 1}}', "`completion` is not a text"),
        (b'{"prompt": null, "completion": "{}"}', "`prompt` is not a text"),
        (b'{"prompt": " ", "completion": "{}"}', "`prompt` is not a text with something in it"),
        (b'{"prompt": "p", "completion": ""}', "`completion` is not a text with something in it"),
        (b'{"prompt": "\\ud800", "completion": "{}"}', "half of a surrogate pair"),
        (b'{"prompt": "p", "completion": "\\udfff"}', "half of a surrogate pair"),
        (b'{"prompt": "p", "completion": "{}", "id": "\\ud800"}', "half of a surrogate pair"),
        (b'{"prompt": "p", "completion": "{}", "tools": [{"name": "\\ud800"}]}', "half of a surrogate pair"),
        (b'{"prompt": "p", "completion": "{}", "tools": {}}', "`tools` must be a list, not dict"),
        (b'{"prompt": "p", "completion": "{}", "schema": []}', "`schema` must be a dict"),
        (b'{"prompt": "p", "completion": "{}", "group": 1}', "`group` must be a str"),
        (b'{"prompt": "p", "completion": "{}", "id": true}', "`id` must be a str"),
        (b'{"prompt": "p", "completion": "{}", "accept": {"a": "x"}}', "`accept` has no list for 'a'"),
        (json.dumps(ROW | {"schema": {"a": nested(150)}}).encode(), "nested deeper than 100"),
    ],
)
def test_a_bad_line_is_named(write_rows, line, what):
    import re

    path = write_rows("rows.jsonl", [ROW, line])
    assert re.search(f"rows.jsonl:2: .*{what}", failure(path)), failure(path)


def test_a_deep_but_readable_schema(write_rows):
    path = write_rows("rows.jsonl", [ROW | {"schema": {"a": nested(90)}}, ROW | {"schema": {"a": [[] for _ in range(500)]}}])
    assert len(read_examples(path)) == 2


@pytest.mark.parametrize("depth", [1, 99, 100, 101, 5000])
def test_a_hundred_levels(depth):
    assert nested_too_deeply(nested(depth), "[" * 101) == nested_too_deeply({"a": nested(depth - 1)}, "{" * 101) == (depth > 100)
    assert not nested_too_deeply(nested(depth), "[{" * 50)  # so few cannot be too deep: nothing is walked


def test_whole_pairs_of_surrogates_are_text(write_rows):
    [example] = read_examples(write_rows("rows.jsonl", [b'{"prompt": "\\ud83d\\ude00", "completion": "{}"}']))
    assert example.prompt == "\U0001f600"


def test_no_rows(write_rows, tmp_path):
    for lines in ([], [b""], [b"   "]):
        assert "rows.jsonl has no rows" in failure(write_rows("rows.jsonl", lines))
    assert "cannot read" in failure(tmp_path / "missing.jsonl") and "No such file" in failure(tmp_path / "missing.jsonl")
    assert "cannot read" in failure(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_that_may_not_be_read(write_rows):
    path = write_rows("rows.jsonl", [ROW])
    path.chmod(0)
    assert "Permission denied" in failure(path)


def test_ids_are_unique(write_rows):
    rows = [ROW | {"id": "a"}, ROW | {"id": "b"}, ROW | {"id": "a"}]
    message = failure(write_rows("rows.jsonl", rows))
    assert "rows.jsonl:3: id 'a' is used at" in message and "rows.jsonl:1 already" in message
    assert "id '0'" in failure(write_rows("rows.jsonl", [ROW | {"id": 0}, ROW | {"id": "0"}]))
    assert len(read_examples(write_rows("rows.jsonl", rows), limit=2)) == 2


def test_equal_rows_without_ids_are_told_apart_by_their_place(write_rows):
    rows = [ROW, ROW | {"id": ""}, ROW, ROW]
    path = write_rows("rows.jsonl", rows)
    ids = [example.id for example in read_examples(path)]
    assert len(set(ids)) == 4 and ids == [example.id for example in read_examples(path)]
    assert ids[0] == read_examples(write_rows("other.jsonl", [dict(reversed(ROW.items()))]))[0].id


def test_the_hash_of_a_row_is_of_what_is_scored():
    def hashed(**fields):
        return parse_example(ROW | fields, "x").content_hash

    assert hashed() == hashed(id="1") == hashed(group="g", source="s") == hashed(request="p") == hashed(unknown=5)
    others = [hashed(prompt="q"), hashed(completion="[]"), hashed(tools=[]), hashed(schema={}), hashed(accept={"a": [1]})]
    assert len({hashed(), *others}) == 6
    assert hashed(schema={"a": 1, "b": 2}) == hashed(schema={"b": 2, "a": 1})


def test_dump_json():
    assert dump_json({"b": [1, "é"], "a": None}) == '{"b":[1,"é"],"a":null}'
    assert dump_json([Decimal("52.520006599999998"), Decimal("1E+400"), Decimal("9" * 5000)]) == f'[52.520006599999998,1E+400,{"9" * 5000}]'
    for value in (float("nan"), Decimal("nan"), Decimal("inf")):
        with pytest.raises(ValueError):
            dump_json(value)


@pytest.mark.parametrize("number", ["52.520006599999998", "12345678901234567.25", "9" * 5000, "0.1", "1e23"])
def test_a_row_keeps_the_digits_of_its_numbers(write_rows, number):
    line = f'{{"prompt":"p","completion":"{{}}","accept":{{"x":[{number}]}},"schema":{{"default":{number}}}}}'
    rows = Dataset(write_rows("rows.jsonl", [line.encode()]))
    for example in (*rows, *rows, *read_examples(write_rows("rows.jsonl", [line.encode()]))):
        assert exact(example.accept["x"][0]) == exact(example.schema["default"]) == Decimal(number)
        assert parse_example(json.loads(dump_json(example.to_json()), **EXACT), "x") == example


def test_rows_that_differ_in_their_last_digit_have_different_hashes():
    hashes = {parse_example(ROW | {"accept": {"x": [Decimal(f"52.52000659999999{digit}")]}}, "x").content_hash for digit in range(10)}
    assert len(hashes) == 10


@given(
    st.dictionaries(
        st.sampled_from(["prompt", "completion", "id", "tools", "accept", "x"]), st.text() | st.integers() | st.lists(st.text())
    )
)
def test_any_row_is_an_example_or_a_user_error(row):
    try:
        example = parse_example(row, "rows.jsonl:1")
    except UserError as error:
        assert str(error).startswith("rows.jsonl:1: ")
    else:
        assert isinstance(example, Example) and example.id and json.dumps(example.to_json(), ensure_ascii=False).encode()
        assert parse_example(example.to_json(), "y") == example


def test_read_jsonl_stops_at_the_bad_line(write_rows):
    lines = read_jsonl(write_rows("rows.jsonl", [1, "two", b"{", 4]))
    assert [next(lines)[1], next(lines)[1]] == [1, "two"]
    with pytest.raises(UserError, match=r"rows\.jsonl:3"):
        next(lines)
