"""Datasets, experiments and traffic against the recording Langfuse server, in the forms of its v3 and of its v4."""

import base64
import json
import uuid
from importlib import metadata

import pytest
from conftest import load_script
from langfuse_rest import Rest
from langfuse_server import LangfuseServer

from slm_swap import langfuse_api
from slm_swap.cli import run
from slm_swap.errors import UserError
from slm_swap.examples import Example
from slm_swap.langfuse_api import LangfuseApi
from slm_swap.langfuse_datasets import item_id, make_item, open_experiment
from slm_swap.prompts import SYSTEM_PROMPTS
from slm_swap.settings import load_settings

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
    monkeypatch.setattr(langfuse_api.time, "sleep", waited.append)
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
    """A function that pushes rows as the dataset DATASET."""

    def push_it(rows: list[Example], *flags: object) -> tuple[int, str, str]:
        path = write_rows("rows.jsonl", [row.to_json() for row in rows])
        return call(push_script, "--track", "structured", "--dataset", path, *flags)

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
    assert "HTTP 503" in str(told.value) and api.host in str(told.value) and len(pauses) == langfuse_api.TRIES - 1
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
