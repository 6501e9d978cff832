"""Datasets, experiments and traffic against the recording Langfuse server, in the forms of its v3 and of its v4."""

import base64
import json
import subprocess
import sys
import time
import uuid
from decimal import Decimal
from importlib import metadata
from types import SimpleNamespace

import pytest

from slm_swap.cli import run
from slm_swap.common.errors import UserError
from slm_swap.common.exact_json import EXACT
from slm_swap.common.settings import PACKAGE, load_settings
from slm_swap.dataset.readers.chat import chat
from slm_swap.dataset.readers.sources import Seen
from slm_swap.evaluating.experiments import link
from slm_swap.rows.examples import Example, parse_example
from slm_swap.rows.prompts import SYSTEM_PROMPTS, toolcall_completion
from slm_swap.scoring.tracks import TRACKS
from slm_swap.tracing import api as api_module
from slm_swap.tracing.api import LangfuseApi
from slm_swap.tracing.datasets import item_id, make_item, open_experiment
from tests.support.langfuse_rest import Rest
from tests.support.langfuse_server import LangfuseServer
from tests.support.scripts import load_script

DATASET = "slm_swap/structured/rows"
ROWS = [Example(prompt=f"Say {number}", completion=f'{{"number":{number}}}', id=f"row-{number}") for number in range(230)]


@pytest.fixture(scope="module")
def push_script():
    return load_script("02_dataset/push_langfuse.py")


@pytest.fixture(params=["v3", "v4"])
def server(request, monkeypatch):
    """The server, in both generations, with its keys in the environment."""
    with LangfuseServer(f"pk-lf-{uuid.uuid4()}") as recorder:
        recorder.rest = Rest(request.param)
        public_key, secret_key = recorder.keys.split(":")
        monkeypatch.setenv("LANGFUSE_PUBLIC_KEY", public_key)
        monkeypatch.setenv("LANGFUSE_SECRET_KEY", secret_key)
        monkeypatch.setenv("LANGFUSE_BASE_URL", recorder.url)
        monkeypatch.setenv("LANGFUSE_DISABLED", "0")
        yield recorder


@pytest.fixture
def pauses(monkeypatch) -> list[float]:
    """What the client would wait between tries, without the waiting."""
    waited: list[float] = []
    monkeypatch.setattr(api_module.time, "sleep", waited.append)
    return waited


@pytest.fixture
def call(capsys):
    """A function that runs a script as from the command line: (exit code, stdout, stderr)."""

    def run_it(script, *argv: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            run(lambda: script.main([str(word) for word in argv]))
        return left.value.code, *capsys.readouterr()

    return run_it


@pytest.fixture
def push(call, push_script, write_rows):
    """A function that pushes rows as the dataset DATASET: (exit code, stdout without the next command, stderr)."""

    def push_it(rows: list[Example], *flags: object) -> tuple[int, str, str]:
        path = write_rows("rows.jsonl", [row.to_json() for row in rows])
        code, printed, error = call(push_script, "--track", "structured", "--dataset", path, *flags)
        told, _, after = printed.partition("next: ")
        assert bool(after) == (code == 0 and "--name" not in flags)
        return code, told, error

    return push_it


# -- The client ------------------------------------------------------------------------------------------------------------------


def test_a_busy_server_is_asked_again_when_it_says(server, pauses):
    later = "Wed, 21 Oct 2015 07:28:00 GMT"
    server.busy = [(429, {"retry-after": "7"}), (503, {}), (502, {"retry-after": later})]
    with LangfuseApi(load_settings()) as api:
        assert api.dataset("none") is None
    assert pauses == [7.0, 2, 0.0]


def test_a_server_that_stays_away_is_one_line_and_the_waiting_ends(server, pauses):
    server.status = 503
    with LangfuseApi(load_settings()) as api, pytest.raises(UserError) as told:
        api.dataset("any")
    assert "HTTP 503" in str(told.value) and api.host in str(told.value) and len(pauses) == api_module.TRIES - 1
    server.refuse()
    with LangfuseApi(load_settings()) as api, pytest.raises(UserError, match="ConnectError"):
        api.dataset("any")


def test_a_wait_of_many_minutes_is_not_waited(server, pauses):
    server.busy = [(429, {"retry-after": "3600"})]
    with LangfuseApi(load_settings()) as api, pytest.raises(UserError, match="HTTP 429"):
        api.dataset("any")
    assert pauses == []


def test_keys_are_in_the_header_only_and_in_no_message(server, monkeypatch, push):
    secret = server.keys.split(":")[1]
    assert push(ROWS[:3])[0] == 0
    encoded = base64.b64encode(server.keys.encode()).decode()
    assert {headers["authorization"] for headers in server.headers} == {f"Basic {encoded}"}
    assert secret not in json.dumps(server.rest.asked)
    monkeypatch.setenv("LANGFUSE_SECRET_KEY", "sk-lf-wrong")
    code, out, err = push(ROWS[:3])
    assert code == 2 and err.count("\n") == 1 and "rejects the keys (HTTP 401)" in err and "sk-lf-wrong" not in out + err


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"LANGFUSE_DISABLED": "1"}, "unset it"),
        ({"LANGFUSE_PUBLIC_KEY": "", "LANGFUSE_SECRET_KEY": ""}, "LANGFUSE_PUBLIC_KEY, LANGFUSE_SECRET_KEY not set"),
        ({"LANGFUSE_BASE_URL": "localhost"}, "not an address"),
        ({"LANGFUSE_BASE_URL": "http://127.0.0.1:x"}, "not an address"),
    ],
)
def test_a_wrong_environment_is_one_line(variables, said, server, monkeypatch, push):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    code, _, err = push(ROWS[:1])
    assert code == 2 and err.count("\n") == 1 and said in err


# -- Push ------------------------------------------------------------------------------------------------------------------------


def test_a_pushed_row_is_what_the_model_is_sent_and_what_it_should_say(server, push):
    row = Example(prompt="Say 1", completion='{"number":1}', id="a", group="g", source="s", schema={"type": "object"})
    assert push([row])[:2] == (0, f"{DATASET}: 1 created, 0 updated, 0 unchanged, 0 archived\n")
    [item] = server.rest.items.values()
    assert item["id"] == item_id(DATASET, "a") and item["datasetName"] == DATASET
    assert item["input"] == [
        {"role": "system", "content": SYSTEM_PROMPTS["structured"]},
        {"role": "user", "content": "Say 1"},
    ]
    assert item["expectedOutput"] == '{"number":1}'
    told = {"id": "a", "group": "g", "source": "s", "schema": {"type": "object"}}
    assert item["metadata"] == told | {"content_hash": item["metadata"]["content_hash"]}


@pytest.mark.parametrize("wanted", [[{"name": "book", "arguments": {"day": "Monday"}}], []])
def test_a_pushed_conversation_is_read_back_as_the_row_that_it_was(tmp_path, wanted):
    """Tools, options and calls as production has them: an export of the dataset is a log like any other."""
    tools = [{"name": "book", "description": "Book a table", "parameters": {"type": "object", "properties": {"day": {"type": "string"}}, "required": ["day"]}}]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "A table for Monday, please"}]
    row = {"id": "a", "messages": messages, "tools": tools, "calls": wanted, "options": {"parallel_tool_calls": False}}
    example = parse_example(row | ({} if wanted else {"content": "For how many?"}), "rows.jsonl:1")
    item = make_item("d", "toolcall", example)
    (tmp_path / "items.jsonl").write_text(json.dumps(item) + "\n")
    [read] = chat([tmp_path / "items.jsonl"], Seen())
    assert (read.record["messages"], read.record["tools"], read.record["calls"]) == (messages, tools, wanted)
    assert read.record["options"] == row["options"] and read.record.get("content") == example.content


def test_pushing_again_changes_only_what_has_changed(server, push):
    assert push(ROWS)[1].endswith(": 230 created, 0 updated, 0 unchanged, 0 archived\n")
    server.rest.asked.clear()
    assert push(ROWS)[1].endswith(": 0 created, 0 updated, 230 unchanged, 0 archived\n")
    assert len(server.rest.items) == 230 and not [asked for asked in server.rest.asked if asked[:2] == ("POST", "dataset-items")]
    changed = [Example(prompt="Say 0", completion='{"number":-1}', id="row-0"), *ROWS[2:]]
    assert push(changed)[1].endswith(": 0 created, 1 updated, 228 unchanged, 1 archived\n")
    items = server.rest.items
    assert items[item_id(DATASET, "row-0")]["expectedOutput"] == '{"number":-1}'
    gone = items[item_id(DATASET, "row-1")]
    assert gone["status"] == "ARCHIVED" and gone["expectedOutput"] == '{"number":1}'
    assert push(changed)[1].endswith(": 0 created, 0 updated, 229 unchanged, 0 archived\n")
    assert push(ROWS)[1].endswith(": 0 created, 2 updated, 228 unchanged, 0 archived\n")
    assert {item["status"] for item in items.values()} == {"ACTIVE"} and len(items) == 230


def test_a_new_system_prompt_updates_every_item(server, push, monkeypatch):
    push(ROWS[:3])
    monkeypatch.setitem(SYSTEM_PROMPTS, "structured", "Another one.")
    assert push(ROWS[:3])[1].endswith(": 0 created, 3 updated, 0 unchanged, 0 archived\n")


def test_items_that_someone_added_by_hand_stay(server, push):
    push(ROWS[:1])
    server.rest.answer("POST", "/api/public/dataset-items", json.dumps({"id": "mine", "datasetName": DATASET}).encode())
    assert push(ROWS[:1])[1].endswith(", 0 archived\n") and server.rest.items["mine"]["status"] == "ACTIVE"


def test_the_same_rows_in_two_datasets_have_their_own_items(server, push):
    push(ROWS[:2])
    assert push(ROWS[:2], "--name", "other")[1] == "other: 2 created, 0 updated, 0 unchanged, 0 archived\n"
    assert len(server.rest.items) == 4


def test_bad_rows_reach_no_server(server, push):
    code, _, err = push([Example(prompt="Say", completion="no JSON", id="a")])
    assert code == 2 and "completion is not a structured reply" in err and not server.rest.asked


# -- Experiments -----------------------------------------------------------------------------------------------------------------


SDK_4 = metadata.version("langfuse").startswith("4.")


def sdk_experiment(server, run_name: str, told: dict) -> list:
    """The spans of the SDK's own run_experiment over DATASET."""
    from langfuse import Langfuse
    from opentelemetry.sdk.trace import TracerProvider

    public_key, secret_key = server.keys.split(":")
    client = Langfuse(public_key=public_key, secret_key=secret_key, base_url=server.url, tracer_provider=TracerProvider())
    dataset = client.get_dataset(DATASET)
    dataset.run_experiment(name=run_name, run_name=run_name, task=lambda *, item, **_: "done", metadata=told)
    client.shutdown()
    return server.spans


def opened(name="phi-4-mini", rows=ROWS[:3]):
    return open_experiment(load_settings(), "structured", DATASET, rows, name, "push_langfuse.py --track structured", {"model": "phi"})


def test_an_experiment_needs_its_rows_pushed_as_they_are(server, push):
    with pytest.raises(UserError, match=f"no dataset {DATASET}: push it first with push_langfuse.py --track structured"):
        opened()
    push(ROWS[:2])
    with pytest.raises(UserError, match=r"1 of 3 rows \(first: id 'row-2'\)"):
        opened()
    push([*ROWS[:2], Example(prompt="Say 2", completion='{"number":22}', id="row-2")])
    with pytest.raises(UserError, match=r"1 of 3 rows \(first: id 'row-2'\)"):
        opened()
    push(ROWS[:3])
    assert opened().id == opened(rows=ROWS[:1]).id != opened("gpt").id


def test_a_row_carries_what_sdk_5_sets(server, push):
    """Against the SDK itself: its own experiment on the same item of the same dataset under the same name."""
    push(ROWS[:1])
    experiment = opened(rows=ROWS[:1])
    ours = experiment.root_attributes(ROWS[0], "00f067aa0ba902b7")
    assert ours["langfuse.experiment.item.root_observation_id"] == "00f067aa0ba902b7"
    spans = sdk_experiment(server, experiment.name, {"model": "phi"})
    task = next(span for span in spans if span.name == "experiment-item-task")
    theirs = {name: value for name, value in task.attributes.items() if name in ours}
    theirs["langfuse.experiment.item.root_observation_id"] = "00f067aa0ba902b7"
    if SDK_4:  # its id is the run's, as the server made it, and its metadata are one attribute a key
        ours = {name: value for name, value in ours.items() if name in theirs} | {
            "langfuse.experiment.id": theirs["langfuse.experiment.id"]
        }
    assert theirs == ours


def test_run_items_go_to_a_v3_server_and_are_left_out_on_v4(server, push):
    push(ROWS[:3])
    experiment = opened()
    done = [(row, "a" * 32, f"{number:016x}") for number, row in enumerate(ROWS[:3])]
    with LangfuseApi(load_settings()) as api:
        linked = experiment.link(api, done)
        assert experiment.link(api, []) == 0
    assert linked == (3 if server.rest.generation == "v3" else 0)
    expected = [
        {
            "runName": "phi-4-mini",
            "datasetItemId": make_item(DATASET, "structured", row)["id"],
            "traceId": "a" * 32,
            "observationId": f"{number:016x}",
            "metadata": {"model": "phi"},
        }
        for number, row in enumerate(ROWS[:3])
    ]
    assert sorted(server.rest.run_items, key=lambda item: item["observationId"]) == expected[:linked]


def test_an_experiment_of_one_trace_is_told_to_look_dearer_where_costs_of_traces_are_added_up(server, push):
    push(ROWS[:3])
    said: list[str] = []
    link(opened(), load_settings(), ROWS[:3], SimpleNamespace(id="a" * 32, row_id=lambda row: "b" * 16), said.append)
    assert ["3 times too high" in line for line in said] == ([True] if server.rest.generation == "v3" else [])


# -- Pull ------------------------------------------------------------------------------------------------------------------------

TOOL = {
    "name": "book",
    "description": "Book a table.",
    "parameters": {
        "type": "object",
        "properties": {"name": {"type": "string"}, "people": {"type": "integer"}, "mail": {"type": "string"}},
        "required": ["name", "people"],
    },
}
WINDOW = ("--from", "2026-01-01", "--to", "2026-01-02")


@pytest.fixture(scope="module")
def pull_script():
    return load_script("02_dataset/pull_langfuse.py")


@pytest.fixture
def pull(call, pull_script, tmp_path):
    """A function that pulls the window into `traffic.jsonl`."""
    return lambda *flags: call(pull_script, *WINDOW, "--out", tmp_path / "traffic.jsonl", *flags)


def generation(number: int, request: str | list, output: object, **fields) -> dict:
    """The observation of one chat request, `number` seconds into the window; a text has the tool TOOL on offer."""
    messages = [{"role": "user", "content": request}] if isinstance(request, str) else request
    return {
        "id": f"o{number:05}",
        "traceId": f"t{number:05}",
        "startTime": f"2026-01-01T{number // 3600:02}:{number // 60 % 60:02}:{number % 60:02}.000Z",
        "type": "GENERATION",
        "name": "chat",
        "level": "DEFAULT",
        "model": "gpt-4o-mini",
        "metadata": {"finish_reason": "stop"},
        "input": {"messages": messages, "tools": [{"type": "function", "function": TOOL}]},
        "output": output,
    } | fields


def booking(number: int, name: str, **more) -> dict:
    """A generation that books a table."""
    arguments = {"name": name, "people": number % 7 + 1} | more
    call = {"id": "c", "type": "function", "function": {"name": "book", "arguments": json.dumps(arguments)}}
    request = f"Table {number} for {name} party {number * 31}, wish {number * 17} and {number * 7}"
    return generation(number, request, {"role": "assistant", "content": None, "tool_calls": [call]})


def rows_of(path) -> list[dict]:
    return [json.loads(line, **EXACT) for line in path.read_text(encoding="utf-8").splitlines()]


def test_traffic_of_every_kind_is_kept_or_counted(server, pull, tmp_path):
    user = {"role": "user", "content": "How many?"}
    server.rest.observations = [
        booking(1, "Ann"),
        booking(1, "Ann") | {"id": "o00002", "startTime": "2026-01-01T00:00:02.000Z"},
        booking(1, "Bo") | {"id": "o00003", "startTime": "2026-01-01T00:00:00.500Z", "input": booking(1, "Ann")["input"]},
        generation(4, [user], '{"n": 4}', input=[user]),
        generation(5, "Broken", None, level="ERROR"),
        generation(6, "Bad words", None, metadata={"finish_reason": "content_filter"}),
        generation(7, "Long", '{"n": 4', metadata={"finish_reason": "length"}),
        generation(8, "Chat", "Hello!"),
        generation(9, "", '{"n": 4}', input=[user, {"role": "assistant", "content": "?"}, user]),
        booking(10, "Eve") | {"type": "SPAN"},
        booking(11, "Eve") | {"startTime": "2026-01-02T00:00:00.000Z"},
        booking(12, "Eve") | {"startTime": "2025-12-31T23:59:59.999Z"},
    ]
    code, out, err = pull()
    assert (code, err) == (0, "")
    dropped = {"failed": 1, "filtered": 1, "truncated": 1, "duplicate": 1, "conflicting": 1}
    report = json.loads((tmp_path / "traffic.report.json").read_text())
    assert report["counts"] == {"read": 9, "kept": 4, "dropped": dropped}
    assert report["reference"] == "the hosted model's reply" and "reference: the hosted model's reply" in out
    assert report["window"] == {"from": "2026-01-01T00:00:00+00:00", "to": "2026-01-02T00:00:00+00:00"}
    called, said = rows_of(tmp_path / "traffic_toolcall.jsonl")
    assert (called["id"], said["id"], said["calls"], said["content"]) == ("o00002", "o00008", [], "Hello!")
    one, several = rows_of(tmp_path / "traffic_structured.jsonl")
    assert one["object"] == {"n": 4} and one["messages"] == [user]
    assert several["object"] == {"n": 4} and several["messages"] == [user, {"role": "assistant", "content": "?"}, user]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "traffic.report.json",
        "traffic_structured.jsonl",
        "traffic_toolcall.jsonl",
    ]
    assert {headers["authorization"].split()[0] for headers in server.headers} == {"Basic"}


def test_replies_whose_end_was_not_recorded_are_told_and_those_as_long_as_their_limit_dropped(server, pull, tmp_path):
    """As langfuse.openai records chat completions: usage and parameters, and no finish_reason."""
    bare = {"metadata": {}, "modelParameters": {"max_tokens": "64", "temperature": 0}}
    server.rest.observations = [
        generation(1, "Hello", "Hi! How may I help you?", **bare, usageDetails={"input": 90, "output": 8, "total": 98}),
        generation(2, "And the menu?", "We have soup, fish,", **bare, usageDetails={"input": 90, "output": 64, "total": 154}),
        generation(3, "And the wine?", "Red, white and", **bare | {"modelParameters": {}}, usageDetails={"output": 64}),
        generation(4, "Good day", "Good day!", usageDetails={"output": 64}, modelParameters={"max_completion_tokens": 64}),
    ]
    code, _, err = pull("--track", "toolcall")
    report = json.loads((tmp_path / "traffic.report.json").read_text())
    assert code == 0 and report["counts"] == {"read": 4, "kept": 3, "dropped": {"truncated": 1}} and report["end_unknown"] == 2
    assert [row["id"] for row in rows_of(tmp_path / "traffic.jsonl")] == ["o00001", "o00003", "o00004"]
    assert "warning: 2 of 3 replies have no finish_reason in Langfuse" in err


@pytest.mark.parametrize("as_text", [True, False], ids=["text", "read"])
def test_numbers_keep_their_digits_and_one_that_is_too_long_stops_nothing(server, pull, tmp_path, as_text):
    numbers = ["1.10", "52.520006599999998", "9" * 5000, "12345678901234567.25"]
    server.rest.observations = [
        generation(at, f"Where is place {at}?", f'{{"x":{number}}}' if as_text else {"x": Decimal(number)}, input=f"Place {at}?")
        for at, number in enumerate(numbers)
    ]
    assert pull("--track", "structured")[0] == 0
    assert json.loads((tmp_path / "traffic.report.json").read_text())["counts"]["dropped"] == {"unusable": 1}
    track, rows = TRACKS["structured"], rows_of(tmp_path / "traffic.jsonl")
    for row, number in zip(rows, (numbers[at] for at in (0, 1, 3)), strict=True):
        assert track.score(track.reference(parse_example(row, "x")), f'{{"x":{number}}}').error is None


def test_a_schema_s_digits_survive_the_journal_and_a_push(server, pull, call, push_script, tmp_path):
    schema = {"type": "object", "properties": {"x": {"type": "number", "maximum": Decimal("52.520006599999998")}}}
    asked = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    server.rest.observations = [generation(1, "How far?", '{"x":1}', input="How far?", metadata={"response_format": asked})]
    assert pull("--track", "structured")[0] == 0
    assert "52.520006599999998" in (tmp_path / "traffic.jsonl").read_text()
    for counted in ("1 created", "1 unchanged"):
        code, out, err = call(push_script, "--track", "structured", "--dataset", tmp_path / "traffic.jsonl")
        assert (code, err) == (0, "") and counted in out


def test_one_track_goes_to_the_file_that_is_named(server, pull, tmp_path):
    server.rest.observations = [booking(1, "Ann"), generation(4, "", '{"n": 4}', input="How many?")]
    assert pull("--track", "toolcall")[0] == 0
    assert [row["id"] for row in rows_of(tmp_path / "traffic.jsonl")] == ["o00001"]
    assert json.loads((tmp_path / "traffic.report.json").read_text())["counts"]["dropped"] == {"other_track": 1}


def test_filters(server, pull, tmp_path):
    server.rest.observations = [booking(number, "Ann") for number in range(1, 6)]
    server.rest.observations[0]["name"] = "other"
    server.rest.observations[1]["model"] = "gpt-4o"
    server.rest.tags = {"t00003": ["production", "eu"], "t00004": ["production"], "t00005": ["eu"]}

    def kept(*flags: object) -> list[int]:
        assert pull("--track", "toolcall", *flags)[0] == 0
        return [int(row["id"][1:]) for row in rows_of(tmp_path / "traffic.jsonl")]

    assert kept() == [1, 2, 3, 4, 5]
    assert kept("--name", "chat") == [2, 3, 4, 5]
    assert kept("--model", "gpt-4o") == [2]
    assert kept("--tags", "production") == [3, 4]
    assert kept("--tags", "eu", "production") == [3]
    assert kept("--limit", "2") == [4, 5]
    code, _, err = pull("--model", "none")
    assert code == 2 and "none of 0 generations makes a row (none was found)" in err
    assert not (tmp_path / "traffic.part").exists()


def test_scores_of_the_generation_and_of_its_trace(server, pull, tmp_path):
    server.rest.observations = [booking(number, "Ann") for number in range(1, 7)]

    def put(number: int, value: object, name="good", own=True, kind="NUMERIC") -> dict:
        subject = {"traceId": f"t{number:05}", "observationId": f"o{number:05}" if own else None}
        return {"id": f"s{number}", "name": name, "value": value, "dataType": kind} | subject

    server.rest.scores = [
        put(1, 0.5), put(2, 0.4), put(3, 0.1, own=False), put(4, 0.0, name="other"), put(5, "bad", kind="CATEGORICAL"),
        *(put(99, 1.0) for _ in range(120)), put(6, 1.0), put(6, 0.2),
    ]  # fmt: skip

    def kept(*flags: object) -> list[int]:
        assert pull("--track", "toolcall", *flags)[0] == 0
        return [int(row["id"][1:]) for row in rows_of(tmp_path / "traffic.jsonl")]

    assert kept("--min-score", "good=0.5") == [1, 4, 5]
    assert json.loads((tmp_path / "traffic.report.json").read_text())["counts"]["dropped"] == {"low_score": 3}
    assert kept("--min-score", "0.5") == [1, 5]
    assert kept("--min-score", "good=0.5", "--require-score") == [1]
    assert json.loads((tmp_path / "traffic.report.json").read_text())["counts"]["dropped"] == {"no_score": 2, "low_score": 3}


def test_personal_data_is_masked_and_counted(server, pull, tmp_path):
    server.rest.observations = [
        booking(1, "ann@example.com", mail="ann@example.com"), booking(2, "Bo", mail="bo@example.com"), booking(3, "Cy")
    ]  # fmt: skip
    assert pull("--track", "toolcall")[0] == 0
    first, second, _ = rows_of(tmp_path / "traffic.jsonl")
    assert "for <EMAIL_1> party" in first["messages"][0]["content"]
    assert first["calls"] == [{"name": "book", "arguments": {"name": "<EMAIL_1>", "people": 2, "mail": "<EMAIL_1>"}}]
    assert second["calls"] == [{"name": "book", "arguments": {"name": "Bo", "people": 3, "mail": "<EMAIL_1>"}}]
    assert json.loads((tmp_path / "traffic.report.json").read_text())["masked"] == {"EMAIL": 2}
    assert pull("--track", "toolcall", "--no-mask")[0] == 0
    assert "ann@example.com" in rows_of(tmp_path / "traffic.jsonl")[0]["messages"][0]["content"]
    assert json.loads((tmp_path / "traffic.report.json").read_text())["masked"] is None


def test_a_pull_that_was_killed_goes_on_and_ends_the_same(server, call, pull_script, tmp_path):
    server.rest.observations = [booking(number, f"Guest {number % 90}") for number in range(1, 351)]
    server.rest.observations += [generation(number, "Hello", "Hi!") for number in range(400, 420)]
    flags = ("--from", "2026-01-01", "--track", "toolcall", "--out", tmp_path / "killed.jsonl")  # without --to: until now
    journal = tmp_path / "killed.part"
    pages = "v2/observations" if server.rest.generation == "v4" else "observations"
    answer = server.rest.answer

    def hang_at_the_third(method: str, path: str, body: bytes):
        server.hanging = sum(asked[1] == pages and asked[2].get("limit") == "100" for asked in server.rest.asked) == 2
        return answer(method, path, body)

    server.rest.answer = hang_at_the_third
    killed = subprocess.Popen([sys.executable, str(PACKAGE / "02_dataset/pull_langfuse.py"), *map(str, flags)])
    deadline = time.monotonic() + 60
    while not (journal.exists() and len(journal.read_bytes().splitlines()) >= 3) and time.monotonic() < deadline:
        time.sleep(0.05)
    killed.kill()
    killed.wait()
    server.hanging, server.rest.answer = False, answer
    assert len(journal.read_bytes().splitlines()) in {3, 4} and not (tmp_path / "killed.jsonl").exists()
    assert b"sk-lf" not in journal.read_bytes()
    with open(journal, "ab") as stream:
        stream.write(b'{"ids": ["o0')  # a line that the end of power cut off
    code, _, err = call(pull_script, *flags, "--name", "chat")
    assert code == 2 and "is of a pull with other flags" in err
    assert journal.read_bytes().endswith(b"}\n"), "what follows must not be joined to the line that was cut off"
    server.rest.asked.clear()
    assert call(pull_script, *flags)[0] == 0
    assert sum(asked[1] == pages for asked in server.rest.asked) < 4, "pages that were read are not read again"
    assert call(pull_script, *flags[:-1], tmp_path / "whole.jsonl")[0] == 0
    assert (tmp_path / "killed.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert len(rows_of(tmp_path / "whole.jsonl")) == 351 and not journal.exists()
    counts = [json.loads((tmp_path / f"{name}.report.json").read_text())["counts"] for name in ("killed", "whole")]
    assert counts[0] == counts[1] == {"read": 370, "kept": 351, "dropped": {"duplicate": 19}}


def test_rows_that_the_store_gives_twice_are_read_once(server, pull, tmp_path):
    again = booking(1, "Ann") | {"startTime": "2026-01-01T10:00:00.000Z"}  # on the first page and on the last
    server.rest.observations = [*(booking(number, "Ann") for number in range(1, 121)), booking(1, "Ann"), again]
    assert pull("--track", "toolcall")[0] == 0
    assert json.loads((tmp_path / "traffic.report.json").read_text())["counts"] == {"read": 120, "kept": 120, "dropped": {}}


def test_a_long_schema_in_the_metadata_comes_whole(server, pull, tmp_path):
    schema = {"type": "object", "properties": {"n": {"type": "integer", "description": "How many. " * 50}}}
    wanted = {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}}
    server.rest.observations = [generation(1, [{"role": "user", "content": "How many?"}], '{"n": 4}', metadata=wanted)]
    assert pull("--track", "structured")[0] == 0
    assert rows_of(tmp_path / "traffic.jsonl")[0]["schema"] == schema


def test_this_programs_own_runs_are_warned_of(server, pull):
    own = [{"role": "system", "content": SYSTEM_PROMPTS["structured"]}, {"role": "user", "content": "How many?"}]
    server.rest.observations = [generation(1, own, '{"n": 4}'), generation(2, "And now?", '{"n": 4}')]
    code, _, err = pull()
    assert code == 0 and "warning: 1 of 2 rows are this program's own runs" in err


@pytest.mark.parametrize(
    "flags", [("--to", "2025-01-01"), ("--from", "yesterday"), ("--phone-regions", "UK"), ("--require-score",), ("--min-score", "x")]
)
def test_bad_flags_are_one_line(server, pull, flags):
    code, _, err = pull(*flags)
    assert code == 2 and err.count("\n") == 1


def test_from_traffic_to_an_evaluation(server, call, pull, eval_script, tmp_path, monkeypatch):
    """The whole chain: pull, split, and the hosted model's replies measured against themselves."""
    system = {"role": "system", "content": "You take bookings for a restaurant with many rooms and a terrace by the river. " * 5}
    server.rest.observations = [booking(number, f"Guest {number}", mail=f"g{number}@example.com") for number in range(1, 61)]
    for row in server.rest.observations:
        row["input"]["messages"].insert(0, system)
    assert pull("--track", "toolcall")[0] == 0
    pulled = tmp_path / "traffic.jsonl"
    prepare = load_script("02_dataset/prepare_data.py")
    flags = ("--source", "jsonl", "--track", "toolcall", "--dataset-path", pulled, "--out-dir", tmp_path)
    assert call(prepare, *flags)[0] == 0
    split = [rows_of(tmp_path / "toolcall" / f"{name}.jsonl") for name in ("train", "val", "test")]
    assert [len(rows) for rows in split] == [48, 6, 6], "a preamble that all rows share makes them no near-duplicates"
    replies = tmp_path / "replies.jsonl"
    replies.write_text("".join(json.dumps({"id": row["id"], "prediction": toolcall_completion(*row["calls"][0].values())}) + "\n" for row in split[2]))
    monkeypatch.setenv("LANGFUSE_DISABLED", "1")
    dataset = tmp_path / "toolcall" / "test.jsonl"
    out = tmp_path / "report.json"
    run_flags = ("--track", "toolcall", "--model-kind", "replay", "--dataset", dataset, "--replies", replies, "--out", out)
    assert call(eval_script, *run_flags)[0] == 0
    assert json.loads(out.read_text())["metrics"]["args_exact_rate"] == 1.0
