"""An evaluation that is interrupted: nothing is asked twice, nothing is lost, and the report is the same."""

import asyncio
import json
import os
import random
import signal
import subprocess
import tracemalloc
from contextlib import suppress
from dataclasses import replace

import pytest

from slm_swap.azure_client import AzureClient
from slm_swap.clients.protocol import Reply
from slm_swap.common.errors import UserError
from slm_swap.common.reports import write_atomically, write_jsonl
from slm_swap.common.settings import PACKAGE, Settings
from slm_swap.demo.azure_simulator import AzureSimulator, Faults
from slm_swap.evaluating.evaluation import check_rows, evaluate_rows
from slm_swap.evaluating.journal import Journal, elsewhere, journal_path
from slm_swap.evaluating.report import Tally, make_report
from slm_swap.evaluating.row import read_reply, score_row
from slm_swap.rows.examples import Dataset, Example
from slm_swap.rows.prompts import SYSTEM_PROMPTS, Request, toolcall_prompt
from slm_swap.scoring.tracks import TRACKS
from tests.support.processes import Script, wait_until

IDENTITY = {"track": "structured", "dataset_sha256": "d" * 64, "rows": 4, "model": {"kind": "azure", "parameters": {"seed": 42}}}
STRUCTURED = TRACKS["structured"]
REPLIES = [
    Reply('{"line": "\u00e4\u2028"}', "stop", 10, 2, 4, 0.25), Reply("", "content_filter"), Reply("", "error", error="500"),
    Reply("x", "length", cut={"limit": 7, "reference_tokens": 2, "thinking": False}, reasoning_tokens=1, load=3),
]  # fmt: skip
ENTRIES = [  # what Journal.add is given of each row
    (score_row(STRUCTURED, Example(f"p{number}", '{"line": ["a"]}', id=f"r{number}"), reply).line(STRUCTURED), reply)
    for number, reply in enumerate(REPLIES)
]
LINES = [line for line, _ in ENTRIES]


@pytest.fixture
def path(tmp_path):
    return journal_path(tmp_path / "out.json")


def begun(path, identity=IDENTITY, rows=4):
    journal = Journal(path)
    try:
        journal.begin(identity, rows)
    except BaseException:
        journal.__exit__()
        raise
    return journal


# The file


def test_the_rows_come_back_in_the_dataset_s_order(path):
    with begun(path) as journal:
        for index in (2, 0, 3, 1):
            journal.add(index, *ENTRIES[index], 0.5)
    header = journal.header
    assert path.name == "out.rows.jsonl.part" and (journal.sessions, journal.answered, journal.seconds) == (1, 3, 2.0)
    with begun(path) as journal:
        assert list(journal.lines()) == LINES and journal.line(3) == LINES[3]
        assert [index in journal for index in range(4)] == [True, True, False, True]
        assert (journal.sessions, journal.answered, journal.seconds) == (2, 3, 2.0)
        assert journal.header == header and len(header["run_id"]) == 32


def test_a_failed_row_is_asked_again_and_its_time_counts_twice(path):
    failed = ENTRIES[2]
    with begun(path) as journal:
        journal.add(0, *failed, 2.0)
        journal.add(1, *ENTRIES[1], 0.5)
        journal.add(0, *ENTRIES[0], 1.0)
        journal.add(2, *failed, 0.25)
        journal.add(3, *ENTRIES[3], 0.0)
    for _ in range(2):
        with begun(path) as journal:
            assert list(journal.lines()) == LINES
            assert (journal.answered, journal.seconds, 0 in journal, 2 in journal) == (3, 3.75, True, False)


def test_two_runs_of_one_command_have_their_own_ids(tmp_path):
    ids = set()
    for number in range(2):
        with begun(tmp_path / str(number)) as journal:
            ids.add(journal.header["run_id"])
    assert len(ids) == 2


def test_the_last_state_and_the_cached_rows_are_known_again(path):
    with begun(path) as journal:
        journal.note({"dropped": []})
        journal.note({"dropped": ["seed"]})
        size = path.stat().st_size
        journal.note({"dropped": ["seed"]})
        assert path.stat().st_size == size
        journal.add(0, *ENTRIES[0], 1.5, from_cache=True)
    with begun(path) as journal:
        assert (journal.state, journal.cached, journal.seconds) == ({"dropped": ["seed"]}, 1, 1.5)


def test_a_line_that_is_torn_at_any_byte_costs_its_row_alone(path):
    with begun(path) as journal:
        for index in (1, 0, 3):
            journal.add(index, *ENTRIES[index], 0.5)
    whole = path.read_bytes()
    last = whole.rstrip(b"\n").rindex(b"\n") + 1
    for end in range(last, len(whole)):
        path.write_bytes(whole[:end])
        with begun(path) as journal:
            assert [index in journal for index in range(4)] == [True, True, False, False], end
            journal.add(2, *ENTRIES[2], 0.5)
            journal.add(3, *ENTRIES[3], 0.5)
            assert list(journal.lines()) == LINES
        assert path.read_bytes().startswith(whole[:last])


def test_a_torn_header_is_a_new_journal(path):
    with begun(path) as journal:
        journal.add(0, *ENTRIES[0], 0.5)
    whole = path.read_bytes()
    for end in range(whole.index(b"\n") + 1):
        path.write_bytes(whole[:end])
        with begun(path) as journal:
            assert (journal.answered, journal.sessions) == (0, 1)
        assert not path.exists()


@pytest.mark.parametrize("damage", [b"\0" * 40, b"[1]", b"", b"\xff", b'{"row": 99, "spent": 0}', b'{"row": 1}'])
def test_a_damaged_line_in_the_middle_costs_its_row_alone(path, damage):
    with begun(path) as journal:
        for index in (1, 0, 3):
            journal.add(index, *ENTRIES[index], 0.5)
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([*lines[:2], damage, *lines[3:]]))
    with begun(path) as journal:
        assert [index in journal for index in range(4)] == [True, False, False, True] and journal.damaged == 1


def test_a_flipped_bit_anywhere_costs_one_line_and_is_counted(path):
    """The header too: every session's line has it again."""
    with begun(path) as journal:
        for index in (1, 0, 3):
            journal.add(index, *ENTRIES[index], 0.5)
        journal.note({"dropped": ["seed"]})
        journal.keep("latency", {"p50": 1.0})
    whole = path.read_bytes()
    for at in range(0, len(whole) - 1, 3):
        bad = bytearray(whole)
        bad[at] ^= 1 << at % 8
        path.write_bytes(bad)
        with begun(path) as journal:
            assert journal.damaged == (2 if bad[at] == ord("\n") else 1), at
            found = {index: journal.line(index) for index in range(4) if index in journal}
            assert found.items() <= dict(enumerate(LINES)).items() and len(found) >= 1, at
            assert journal.state in (None, {"dropped": ["seed"]}) and journal.kept in ({}, {"latency": {"p50": 1.0}})


CHANGED = {
    "track": ({"track": "toolcall"}, 'track "structured" there, "toolcall" here'),
    "dataset": ({"dataset_sha256": "e" * 64}, 'dataset_sha256 "ddddddddddd... there, "eeeeeeeeeee... here'),
    "limit": ({"rows": 3}, "rows 4 there, 3 here"),
    "parameters": ({"model": {"kind": "azure", "parameters": {"seed": 7}}}, "model.parameters.seed 42 there, 7 here"),
    "new key": ({"model": {"kind": "azure", "parameters": {"seed": 42, "n": 1}}}, "model.parameters.n null there, 1 here"),
}


@pytest.mark.parametrize(("changes", "said"), CHANGED.values(), ids=CHANGED)
def test_a_journal_of_another_run_is_refused_and_kept(path, changes, said):
    with begun(path) as journal:
        journal.add(0, *ENTRIES[0], 0.5)
    before = path.read_bytes()
    with pytest.raises(UserError) as refused:
        begun(path, IDENTITY | changes)
    assert f"({said})" in str(refused.value) and "out.rows.jsonl.part" in str(refused.value) and "--out" in str(refused.value)
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"notes\n", b'{"id": "a"}\n', b"[]\n{}\n"])
def test_another_file_by_that_name_is_refused_and_kept(path, content):
    path.write_bytes(content)
    with pytest.raises(UserError, match="is not a journal"):
        begun(path)
    assert path.read_bytes() == content


def test_a_journal_has_one_process_at_a_time(path):
    with begun(path), pytest.raises(UserError, match="another process"):
        Journal(path)
    with begun(path):
        pass


def test_a_journal_without_an_answer_is_removed(path):
    with Journal(path):
        pass
    assert not path.exists()
    with begun(path) as journal:
        journal.add(0, *ENTRIES[2], 1.0)
    assert not path.exists()


def test_what_is_kept_is_taken_along_where_a_report_cannot_be_written(path, tmp_path, monkeypatch):
    out = tmp_path / "out.json"
    assert journal_path(out) == path and elsewhere(out) == "choose another place with --out"
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with begun(path) as journal:
        assert elsewhere(out) == "choose another place with --out", "a journal that has but begun"
        journal.note({"parameters": {"row": 1}})
        assert elsewhere(out) == "choose another place with --out"
        journal.add(0, *ENTRIES[0], 0.5)
        told = elsewhere(out)
    assert told.endswith(f"run the same command with --out {tmp_path / 'here/out.json'}: nothing is asked twice")
    subprocess.run(told.partition("`")[2].partition("`")[0], shell=True, check=True)
    with begun(journal_path(tmp_path / "here/out.json")) as journal:
        assert journal.answered == 1


def test_a_full_disk_is_told_in_one_line(path):
    journal = begun(path)
    journal.add(0, *ENTRIES[0], 0.5)
    os.dup2(os.open("/dev/full", os.O_WRONLY), journal._file.fileno())
    with pytest.raises(UserError, match=r"No space left on device.*the same command"):
        journal.add(1, *ENTRIES[1], 0.5)
    journal.__exit__()
    assert path.exists()


# A whole evaluation, killed

ROWS = [Example(f"Say {n}", f'{{"number":{n}}}', id=f"r{n}") for n in range(120)]
KEY = "0123456789abcdef-not-a-real-key"
CONCURRENCY = 32
FAULTS = Faults(slow=1.0, slow_seconds=0.03, content_filter=0.05, unsupported_parameters=frozenset({"seed"}))


def azure_environment(server):
    return {
        "LANGFUSE_DISABLED": "1", "AZURE_ENDPOINT": server.url, "AZURE_DEPLOYMENT": server.deployment, "AZURE_API_KEY": KEY,
        "AZURE_API_VERSION": "2024-10-21",
    }  # fmt: skip


def outcome(out):
    """A report and its rows without the times."""
    report = json.loads(out.read_text())
    rows = [json.loads(line) for line in out.with_suffix(".rows.jsonl").read_text().splitlines()]
    for key in ("created_at", "seconds", "sessions", "trace", "latency", "run_id"):
        del report[key]
    del report["args"]["out"]
    for row in rows:
        del row["seconds"]
    return json.dumps([report, rows])


class Runs:
    """One command, run to its end or killed."""

    def __init__(self, folder, environment, *flags):
        self.log, self.environment, self.flags = folder / "log.txt", environment, flags
        self.kills = 0

    def start(self, out):
        out.parent.mkdir(exist_ok=True)
        return Script(PACKAGE / "01_eval/eval.py", *self.flags, "--out", out, log=self.log, **self.environment)

    def finish(self, out):
        assert self.start(out).wait() == 0, self.log.read_text()
        return outcome(out)

    def killed(self, out, delay, ready=lambda: True):
        """Whether the process was killed `delay` seconds after it was ready; False: it had ended before."""
        process = self.start(out)
        wait_until(lambda: ready() or process.poll() is not None)
        with suppress(subprocess.TimeoutExpired):
            process.wait(delay)
        process.kill()
        self.kills += process.wait() == -signal.SIGKILL
        assert process.returncode in (0, -signal.SIGKILL), self.log.read_text()
        return process.returncode != 0


def test_killed_at_20_random_moments_it_ends_in_the_same_report(tmp_path, write_rows):
    rows, moments = write_rows("rows.jsonl", [row.to_json() for row in ROWS]), random.Random(7)
    with AzureSimulator(ROWS, key=KEY, mistake_rate=0.2, faults=FAULTS) as server:
        runs = Runs(tmp_path, azure_environment(server), "--track", "structured", "--model-kind", "azure", "--dataset", rows)
        expected = runs.finish(tmp_path / "whole/out.json")
        evaluations = 0
        while runs.kills < 20:
            evaluations += 1
            out, before, kills = tmp_path / f"{evaluations}/out.json", server.counts.total(), runs.kills
            while True:
                asked = server.counts.total()
                ready = (lambda: True) if moments.random() < 0.2 else (lambda asked=asked: server.counts.total() > asked)
                if runs.kills == 20 or not runs.killed(out, moments.uniform(0, 0.25), ready):
                    break
            assert runs.finish(out) == expected if not out.exists() or journal_path(out).exists() else outcome(out) == expected
            kills = runs.kills - kills
            # a rejection of `seed` and what was under way is all that a kill may cost
            assert server.counts.total() - before <= len(ROWS) + 1 + kills * (CONCURRENCY + 1)
            assert json.loads(out.read_text())["sessions"] <= kills + 1
            assert sorted(path.name for path in out.parent.iterdir() if not path.name.startswith(".")) == ["out.json", "out.rows.jsonl"]
    assert json.loads(expected)[0]["counts"]["errors"]["filtered"] > 0


def test_what_the_journal_has_is_not_asked_again(tmp_path, write_rows):
    rows = write_rows("rows.jsonl", [row.to_json() for row in ROWS])
    with AzureSimulator(ROWS, key=KEY, faults=FAULTS) as server:
        runs = Runs(tmp_path, azure_environment(server), "--track", "structured", "--model-kind", "azure", "--dataset", rows)
        out = tmp_path / "out.json"
        journal = journal_path(out)
        assert runs.killed(out, 0, lambda: journal.exists() and journal.read_bytes().count(b'"row"') >= 40)
        kept = journal.read_bytes().count(b'"row"')
        assert 40 <= kept < len(ROWS)
        before = server.counts.copy()
        runs.flags += ("--concurrency", 3)  # how fast it is asked makes no other run
        runs.finish(out)
    assert (server.counts - before).total() == len(ROWS) - kept
    report = json.loads(out.read_text())
    assert report["sessions"] == 2 and report["model"]["dropped_parameters"] == ["seed"]
    assert report["seconds"]["generate"] > 0 and report["seconds"]["total"] > report["seconds"]["generate"]


def test_a_local_model_is_killed(tmp_path, write_rows):
    parameters = {"type": "object", "properties": {"date": {"type": "string"}}}
    tool = {"name": "open_calendar", "description": "Open a calendar.", "parameters": parameters}
    examples = [
        Example(toolcall_prompt([tool], f"Open the calendar on {day} May"), f'<tool_call name="open_calendar">{{"date":"{day} May"}}</tool_call>')
        for day in range(1, 9)
    ]
    rows = write_rows("rows.jsonl", [example.to_json() for example in examples])
    flags = ("--track", "toolcall", "--model-kind", "slm", "--dataset", rows, "--precision", "fp32", "--batch-size", 2, "--max-new-tokens", 24)
    runs = Runs(tmp_path, {"LANGFUSE_DISABLED": "1", "SLM_MODEL_PATH": "models/phi-tiny", "OMP_NUM_THREADS": "1"}, *flags)
    expected, out = runs.finish(tmp_path / "whole/out.json"), tmp_path / "out.json"
    journal = journal_path(out)
    assert runs.killed(out, 0, lambda: journal.exists() and journal.read_bytes().count(b'"row"') >= 3)
    assert runs.finish(out) == expected
    assert json.loads(out.read_text())["sessions"] == 2


def test_a_replay_is_killed(tmp_path, write_rows):
    """Equal prompts with replies of their own: each row keeps its own, wherever the replay goes on."""
    rows = [{"id": f"r{n}", "prompt": f"p{n % 3}", "completion": f'{{"a":{n}}}'} for n in range(2000)]
    replies = [{"prompt": f"p{n % 3}", "prediction": f'{{"a":{n if n % 7 else 0}}}'} for n in range(2000)]
    flags = ("--dataset", write_rows("rows.jsonl", rows), "--replies", write_rows("replies.jsonl", replies))
    runs = Runs(tmp_path, {"LANGFUSE_DISABLED": "1"}, "--track", "structured", "--model-kind", "replay", *flags)
    expected, out = runs.finish(tmp_path / "whole/out.json"), tmp_path / "out.json"
    assert json.loads(expected)[0]["counts"]["errors"]["wrong_value"] == 2000 // 7
    journal = journal_path(out)
    for count in (1, 500, 1500):
        runs.killed(out, 0, lambda count=count: journal.exists() and journal.read_bytes().count(b'"row"') >= count)
    assert runs.kills >= 1 and runs.finish(out) == expected


def test_ctrl_c_keeps_what_is_answered(tmp_path, write_rows):
    rows, out = write_rows("rows.jsonl", [row.to_json() for row in ROWS]), tmp_path / "out.json"
    with AzureSimulator(ROWS, key=KEY, faults=FAULTS) as server:
        runs = Runs(tmp_path, azure_environment(server), "--track", "structured", "--model-kind", "azure", "--dataset", rows)
        expected = runs.finish(tmp_path / "whole/out.json")
        process, before = runs.start(out), server.counts.total()
        wait_until(lambda: server.counts.total() > before + CONCURRENCY + 5)
        process.send_signal(signal.SIGINT)
        assert process.wait() == 130 and not out.exists()
        assert "rows are answered and kept: the same command continues" in runs.log.read_text()
        assert "Traceback" not in runs.log.read_text()
        assert runs.finish(out) == expected


def test_two_processes_at_once_do_not_mix(tmp_path, write_rows, run_script, eval_script, monkeypatch):
    rows, out = write_rows("rows.jsonl", [row.to_json() for row in ROWS[:5]]), tmp_path / "out.json"
    flags = ("--track", "structured", "--model-kind", "azure", "--dataset", rows)
    with AzureSimulator(ROWS, key=KEY, faults=Faults(slow=1.0, slow_seconds=1.0)) as server:
        process = (runs := Runs(tmp_path, azure_environment(server), *flags)).start(out)
        wait_until(lambda: server.counts)
        code, _, error = run_script(eval_script, *flags, "--out", out)
        assert code == 2 and "another process" in error and error.count("\n") == 1
        assert process.wait() == 0, runs.log.read_text()
    assert json.loads(out.read_text())["counts"]["rows"] == 5


# The same command, or another


@pytest.fixture
def interrupted(tmp_path, write_rows, run_script, eval_script, monkeypatch):
    """A replay that was interrupted after its second reply: a function that runs it again with other flags."""
    rows = write_rows("rows.jsonl", [row.to_json() for row in ROWS[:4]])
    replies = write_rows("replies.jsonl", [{"id": row.id, "prediction": row.completion} for row in ROWS[:4]])
    flags = {"--track": "structured", "--model-kind": "replay", "--dataset": rows, "--replies": replies, "--out": tmp_path / "out.json"}

    def again(**changes):
        given = flags | {f"--{name}": value for name, value in changes.items()}
        return run_script(eval_script, *(word for pair in given.items() for word in pair))

    with monkeypatch.context() as patch:
        patch.setattr(eval_script, "make_report", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        code, _, error = again()
    assert code == 130 and "4 of 4 rows are answered and kept" in error
    return again


def test_the_same_command_goes_on(interrupted, tmp_path):
    code, printed, error = interrupted()
    assert code == 0 and error.startswith("4 of 4 rows are answered already") and "Fully right reply             1.0000" in printed
    assert not journal_path(tmp_path / "out.json").exists()


@pytest.mark.parametrize("what", ["dataset", "replies", "limit", "prompt", "track"])
def test_another_command_is_refused(interrupted, tmp_path, write_rows, monkeypatch, what):
    before = journal_path(tmp_path / "out.json").read_bytes()
    changes, said = {}, what
    if what == "dataset":
        changes["dataset"] = write_rows("other.jsonl", [row.to_json() for row in reversed(ROWS[:4])])
    elif what == "replies":
        changes["replies"] = write_rows("other.jsonl", [{"id": row.id, "prediction": ""} for row in ROWS[:4]])
        said = "model.sha256"
    elif what == "limit":
        changes["limit"], said = 3, "rows 4 there, 3 here"
    elif what == "prompt":
        monkeypatch.setitem(SYSTEM_PROMPTS, "structured", "Another.")
        said = "prompt_sha256"
    else:
        calls = [replace(row, completion='<tool_call name="f">{}</tool_call>').to_json() for row in ROWS[:4]]
        changes |= {"track": "toolcall", "dataset": write_rows("other.jsonl", calls)}
    code, _, error = interrupted(**changes)
    assert code == 2 and said in error and "is of another run" in error and error.count("\n") == 1
    assert journal_path(tmp_path / "out.json").read_bytes() == before and not (tmp_path / "out.json").exists()


def test_kept_rows_are_scored_by_the_code_that_writes_the_report(path):
    example, client = Example("p", '{"a":1}', id="r0"), Instant()
    with begun(path, rows=1) as journal:
        reply = Reply('{"a":1}', "stop", 3, 2, 1, 0.5)
        right = score_row(STRUCTURED, example, reply).line(STRUCTURED)
        journal.add(0, right.replace('"error": null', '"error": "wrong_value"', 1), reply, 0.5)
    with begun(path, rows=1) as journal:
        evaluate_rows(tally := Tally("structured"), client, [example], journal)
        assert list(journal.lines()) == [right] and journal.seconds == 0.5
    assert tally.summary()["metrics"]["exact_match_rate"] == 1 and tally.tokens == {"input": 3, "cached": 1, "output": 2}


def test_a_line_of_another_row_is_not_taken(path):
    """In a file that was edited by hand, checksums and all: the line says which row it is of."""
    examples = [Example(f"p{number}", '{"a":1}', id=f"r{number}") for number in range(2)]
    reply = Reply('{"a":2}', "stop", 3, 2, 1, 0.5)
    with begun(path, rows=2) as journal:
        journal.add(0, score_row(STRUCTURED, examples[1], reply).line(STRUCTURED), reply, 0.5)
    with begun(path, rows=2) as journal:
        evaluate_rows(Tally("structured"), Instant(), examples, journal)
        assert journal.damaged == 1 and journal.answered == 2
        assert [json.loads(line)["id"] for line in journal.lines()] == ["r0", "r1"] and '{\\"a\\":2}' not in "".join(journal.lines())


def test_a_line_tells_its_reply():
    assert [read_reply(json.loads(line)) for line in LINES] == REPLIES


# As it streams


def test_a_client_s_failure_keeps_the_rows_before_it(tmp_path, path):
    settings = Settings(azure_deployment="simulator", azure_api_key=KEY, azure_api_version="2024-10-21")
    with AzureSimulator(ROWS, key=KEY) as server:
        client = AzureClient(replace(settings, azure_endpoint=server.url), concurrency=4)

        def withdraw(index, row):
            if row.example.id == "r0":
                server.key = "another"

        try:
            with begun(path, rows=len(ROWS)) as journal, pytest.raises(UserError, match="401"):
                evaluate_rows(Tally("structured"), client, ROWS, journal, on_row=withdraw)
        finally:
            client.close()
    assert 1 <= journal.answered < len(ROWS) and path.exists()


def test_requests_start_as_soon_as_a_slot_is_free():
    """One slow request holds up none of the others, and a reply is given as it comes."""
    rows = [Example(f"p{n}", "{}") for n in range(30)]

    class OneSlow(AzureSimulator):
        async def handle(self, request):
            if b'"p1"' in await request.read():
                await asyncio.sleep(1.5)
            return await super().handle(request)

    settings = Settings(azure_deployment="simulator", azure_api_key=KEY, azure_api_version="2024-10-21")
    with OneSlow(rows, key=KEY) as server:
        client = AzureClient(replace(settings, azure_endpoint=server.url), concurrency=2)
        order = [index for index, _ in client.stream((n, Request([{"role": "user", "content": row.prompt}])) for n, row in enumerate(rows))]
        client.close()
        assert server.most_in_flight <= 2
    assert order[-1] == 1 and sorted(order) == list(range(30))


class Instant:
    """A client that answers everything alike, at once."""

    kind, load_seconds, identity = "azure", 0.0, {"kind": "azure"}

    def stream(self, rows, answered):
        return ((index, Reply('{"a":1}')) for index, _ in rows if index not in answered)

    def state(self):
        return {}

    describe = state

    def cost(self, *_):
        return None


def peak_bytes(tmp_path, count):
    path, out = tmp_path / f"{count}.jsonl", tmp_path / "out.json"
    write_jsonl(path, ({"id": f"r{n}", "prompt": f"{n} " + "x" * 3000, "completion": '{"a":1}'} for n in range(count)))
    tracemalloc.start()
    dataset, client = Dataset(path), Instant()
    tally = check_rows("structured", dataset)
    with Journal(journal_path(out)) as journal:
        journal.begin({}, count)
        evaluate_rows(tally, client, dataset, journal)
        report = make_report("structured", client, tally, 1.0, 1.0, {}, {})
        write_atomically(tmp_path / "rows.jsonl", lambda stream: stream.writelines(journal.lines()))
        journal.remove()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert report["counts"]["rows"] == count and report["metrics"]["exact_match_rate"] == 1
    return peak


def test_memory_does_not_grow_with_the_rows(tmp_path):
    """Hashes, offsets and times stay, some 200 bytes a row; ids, prompts and replies do not."""
    peak_bytes(tmp_path, 100)  # what is loaded once
    few, many = peak_bytes(tmp_path, 500), peak_bytes(tmp_path, 3000)
    assert (many - few) / 2500 < 350
