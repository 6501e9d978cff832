"""Trace files that an earlier run left, that are damaged, or for which the disk has no room."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from slm_swap.common.errors import UserError
from slm_swap.common.settings import ROOT
from slm_swap.rows.lines import CHECKSUM, with_checksum
from slm_swap.tracing import outbox
from slm_swap.tracing.outbox import SUFFIX, Outbox, TraceFile, parse
from slm_swap.tracing.runs import outbox_path
from slm_swap.tracing.sender import Sender
from slm_swap.tracing.wire import Server
from tests.support.processes import PATIENCE, wait_until
from tests.support.traces import kept, send_rows, settings_for

ROWS = 12


def files(folder):
    """The trace files of a folder by their names without the ending."""
    return {path.name.removesuffix(SUFFIX): path for path in folder.glob(f"*{SUFFIX}")}


def left_behind(server, traced, folder, report="report.json", rows=ROWS, **options):
    """The trace file of a run without a server, which is there again then."""
    server.refuse()
    with traced(settings_for(server), report=report, optional=True, **options) as trace:
        send_rows(trace, rows)
    server.accept()
    return outbox_path(folder / report), trace.id


# --- what an earlier run left


def test_another_runs_file_is_put_aside_sent_along_and_said_in_one_line(server, traced, impatient, tmp_path, capfd, monkeypatch):
    path, first = left_behind(server, traced, tmp_path, seed="one")
    capfd.readouterr()
    monkeypatch.setattr("slm_swap.tracing.runs.CLOSE_SECONDS", PATIENCE)
    with traced(settings_for(server), seed="two") as trace:
        assert set(files(tmp_path)) == {"report", f"report.{first[:8]}"}
        send_rows(trace, 3)
    assert capfd.readouterr().err == (
        f"warning: {path} holds what an earlier run could not send: it is {path.with_name(f'report.{first[:8]}{SUFFIX}')} now, and is sent along\n"
    )
    traces = [span.trace for span in server.spans]
    assert traces.count(first) == ROWS + 1 and traces.count(trace.id) == 4 and len(server.scores) == ROWS + 3
    assert files(tmp_path) == {}


def test_leftovers_do_not_collide_and_are_found_by_resend_traces(server, traced, impatient, resend, tmp_path, capsys):
    ids = [left_behind(server, traced, tmp_path, seed=seed)[1] for seed in ("one", "two", "one", "one")]
    said = capsys.readouterr().err
    assert said.count("send it by python 01_eval/resend_traces.py\n") == 2
    one, two = ids[0][:8], ids[1][:8]
    assert set(files(tmp_path)) == {"report", f"report.{one}", f"report.{two}"}  # the last run went on with its own trace
    ids.append(left_behind(server, traced, tmp_path, seed="three")[1])
    assert set(files(tmp_path)) == {"report", f"report.{one}", f"report.{one}-2", f"report.{two}"}
    capsys.readouterr()
    code, printed, error = resend(server, tmp_path)
    assert (code, printed.count("sent: "), error) == (0, 4, "") and files(tmp_path) == {}
    assert {span.trace for span in server.spans} == set(ids) and len({(span.trace, span.id) for span in server.spans}) == 3 * (ROWS + 1)


def test_a_file_of_which_all_has_arrived_makes_room_without_a_word(server, traced, tmp_path, capfd):
    with pytest.raises(KeyboardInterrupt), traced(settings_for(server), seed="one", keep=lambda: True) as trace:
        send_rows(trace, 3)
        raise KeyboardInterrupt
    assert kept(tmp_path) and len(server.spans) == 4
    with traced(settings_for(server), seed="two"):
        assert set(files(tmp_path)) == {"report"}
    assert capfd.readouterr().err == "" and len(server.spans) == 5 and files(tmp_path) == {}


def test_what_cannot_be_sent_along_holds_the_end_up_no_longer_and_stays(server, traced, impatient, tmp_path, capsys):
    left_behind(server, traced, tmp_path, seed="one")
    capsys.readouterr()
    with traced(settings_for(server), seed="two") as trace:
        server.status = 503
        send_rows(trace, 2)
    first, mine, other = capsys.readouterr().err.splitlines()
    assert "is sent along" in first and "3 spans and 2 scores" in mine and "report.traces.jsonl" in mine
    assert f"{ROWS + 1} spans and {ROWS} scores have not reached" in other and len(files(tmp_path)) == 2


def test_resend_traces_passes_over_a_file_in_use(server, traced, impatient, resend, tmp_path, monkeypatch):
    left_behind(server, traced, tmp_path, report="b.json")
    monkeypatch.setattr(outbox, "LOCK_SECONDS", 0.1)
    with traced(settings_for(server), report="a.json"):
        code, printed, error = resend(server, tmp_path)
    assert code == 1 and printed.endswith("b.traces.jsonl\n") and "a.traces.jsonl is in use by another run" in error


def test_a_file_that_goes_while_it_is_waited_for_is_not_written_to(server, traced, tmp_path, monkeypatch):
    path = outbox_path(tmp_path / "report.json")
    held, naps = Outbox(path), []

    def sleep(seconds):
        naps.append(seconds)
        held.begin({"trace": "0", "base_url": "", "attributes": {}})
        assert held.close(0) == {"spans": 0, "scores": 0} and not path.exists()

    with monkeypatch.context() as patched:
        patched.setattr(outbox.time, "sleep", sleep)
        found = Outbox(path)
    assert len(naps) == 1 and path.exists() and os.path.samestat(os.fstat(found._file.descriptor), path.stat())


# --- damage


def flip(data, at):
    return data[: at // 8] + bytes([data[at // 8] ^ 1 << at % 8]) + data[at // 8 + 1 :]


def whole_spans(data):
    """The ids of the spans in lines that are as they were written, ends included."""
    lines = [line + b"\n" for line in data.split(b"\n")[:-1]]
    return {record["span"]["id"] for line in lines if "span" in (record := parse(line))}


def half_sent(server, traced, folder, capsys):
    """A trace file of which half has arrived, with the sender's marks: its bytes."""
    with traced(settings_for(server), seed="s") as trace:
        send_rows(trace, ROWS)
        wait_until(lambda: len(server.spans) == len(server.scores) == ROWS and b'"delivered"' in outbox_path(folder / "report.json").read_bytes())
        server.status = 500
        send_rows(trace, ROWS, first=ROWS)
    server.status = None
    capsys.readouterr()
    return outbox_path(folder / "report.json").read_bytes()


def damages(data, seed):
    """Ways in which a file may be damaged."""
    rng = random.Random(seed)
    starts = [0, *(at + 1 for at, byte in enumerate(data[:-1]) if byte == 10)]
    for _ in range(6):
        yield "flip", flip(data, rng.randrange(8 * len(data)))
    for _ in range(2):
        yield "cut off", data[: rng.randrange(1, len(data))]
        a = rng.randrange(len(data) - 400)
        yield "cut out", data[:a] + data[a + rng.randrange(1, 400) :]
        yield "NULs", data[:a] + bytes(350) + data[a + 350 :]
        yield "NULs at the end", data[: len(data) - 700] + bytes(700)
    a, b = sorted(rng.sample(range(len(starts) - 1), 2))
    lines = [data[start:end] for start, end in zip(starts, [*starts[1:], len(data)], strict=True)]
    yield "swapped", b"".join([*lines[:a], lines[b], *lines[a + 1 : b], lines[a], *lines[b + 1 :]])
    yield "doubled", b"".join([*lines[: a + 1], *lines[a:]])
    yield "a line less", b"".join([*lines[:a], *lines[a + 1 :]])


def looks_whole(data):
    return data.endswith(b"\n") and all(parse(line + b"\n") for line in data.split(b"\n")[:-1])


@pytest.mark.parametrize("seed", range(3))
def test_of_a_damaged_file_all_that_is_whole_arrives_once(server, traced, impatient, tmp_path, seed, capsys):
    data, path = half_sent(server, traced, tmp_path, capsys), tmp_path / f"copy{SUFFIX}"
    assert len(whole_spans(data)) == 2 * ROWS + 1
    arrived = {span.id for span in server.spans}
    for kind, damaged in damages(data, seed):
        path.write_bytes(damaged)
        for again in range(2 if not looks_whole(damaged) else 1):
            server.accepted.clear()
            box = Outbox(path)
            if box.header:
                sender = Sender(box._file, Server(settings_for(server)), (0.05,))  # in this process: far sooner than one for each
                sender.end(PATIENCE)
                sender.join()
                assert {span.id for span in server.spans} | arrived >= whole_spans(damaged) or again, kind
                assert not again or server.spans == [], "what has arrived is not sent again"
            assert not box.header or box.close(0) == {"spans": 0, "scores": 0}, kind
            assert path.exists() != looks_whole(damaged), "what is damaged stays"


def test_resend_traces_says_sent_only_where_nothing_was_damaged(server, traced, impatient, resend, tmp_path, capsys):
    data, path = half_sent(server, traced, tmp_path, capsys), outbox_path(tmp_path / "report.json")
    for kind, damaged in {name: content for name, content in damages(data, 5) if name in ("flip", "cut off", "NULs at the end", "doubled")}.items():
        path.write_bytes(damaged)
        code, printed, error = resend(server, tmp_path)
        if looks_whole(damaged):
            assert (code, printed, error) == (0, f"sent: {path}\n", "") and not path.exists(), kind
        else:
            assert (code, printed, error.count("\n")) == (1, "", 1) and "damaged lines of" in error and path.exists(), kind


def test_no_flipped_bit_makes_a_mark_count_for_what_has_not_arrived(server, traced, impatient, tmp_path, capsys):
    """Every bit of every mark, and many of what stands before them."""
    data = half_sent(server, traced, tmp_path, capsys)
    arrived, path = {span.id for span in server.spans}, tmp_path / "copy"
    lines = data.split(b"\n")
    marks = [8 * (data.index(line) + at) for line in lines if b'"delivered":' in line[CHECKSUM : CHECKSUM + 12] for at in range(len(line) + 1)]
    rng = random.Random(1)
    for bit in [at + rng.randrange(8) for at in marks] + rng.sample(range(8 * len(data)), 300):
        path.write_bytes(flip(data, bit))
        file = TraceFile(os.open(path, os.O_RDWR | os.O_APPEND))
        at = file.mark()["delivered"]["spans"][0]
        assert whole_spans(path.read_bytes()[:at]) <= arrived
        os.close(file.descriptor)


def test_every_place_of_a_short_cut_leaves_marks_that_are_true(server, traced, impatient, tmp_path, capsys):
    """What is cut out moves everything behind it, so that a byte number alone would name what has not arrived."""
    data = half_sent(server, traced, tmp_path, capsys)
    arrived, path = {span.id for span in server.spans}, tmp_path / "copy"
    for start in range(0, len(data) - 500, 97):
        path.write_bytes(data[:start] + data[start + 450 :])
        file = TraceFile(os.open(path, os.O_RDWR | os.O_APPEND))
        at = file.mark()["delivered"]["spans"][0]
        assert whole_spans(path.read_bytes()[:at]) <= arrived
        os.close(file.descriptor)


def test_one_damaged_header_costs_nothing_and_two_are_told(server, traced, impatient, resend, tmp_path, capsys):
    path, _ = left_behind(server, traced, tmp_path)
    data = path.read_bytes()
    size = data.index(b"\n") + 1
    capsys.readouterr()
    assert data[:size] == data[size : 2 * size]
    path.write_bytes(flip(data, 8 * (size // 2)))
    assert resend(server, tmp_path)[0] == 1 and len({span.id for span in server.spans}) == ROWS + 1
    server.accepted.clear()
    path.write_bytes(flip(flip(data, 8 * (size // 2)), 8 * (size + 3)))
    code, printed, error = resend(server, tmp_path)
    assert (code, printed, server.spans) == (1, "", []) and error.count("\n") == 1 and "nothing in it can be sent" in error


@pytest.mark.parametrize("damage", ["row", "headers", "torn"])
def test_a_run_goes_on_beside_a_damaged_file_and_tells_its_rows_again(server, traced, impatient, tmp_path, capsys, damage, monkeypatch):
    path, trace_id = left_behind(server, traced, tmp_path, seed="s")
    data = path.read_bytes()
    size = data.index(b"\n") + 1
    at = data.index(b'"row-3"')
    path.write_bytes({"row": flip(data, 8 * at + 8), "headers": b"x" * (2 * size - 1) + data[2 * size - 1 :], "torn": data[: at + 5]}[damage])
    capsys.readouterr()
    monkeypatch.setattr("slm_swap.tracing.runs.CLOSE_SECONDS", PATIENCE)
    with traced(settings_for(server), seed="s") as trace:
        send_rows(trace, ROWS)
    said = capsys.readouterr().err
    assert trace.id == trace_id and {span.row for span in server.spans} == {"run", *(f"row-{number}" for number in range(ROWS))}
    if damage == "torn":  # as a killed run leaves it
        assert said == "" and files(tmp_path) == {}
    elif damage == "row":
        assert said.count("\n") == 1 and "(1 damaged lines in it cannot be sent)" in said and set(files(tmp_path)) == {f"report.{trace_id[:8]}"}
    else:
        assert said.count("\n") == 1 and "nothing in it can be sent" in said and set(files(tmp_path)) == {"report.damaged"}


def test_the_checksum_is_over_every_byte_of_a_line():
    line = with_checksum(b'{"span":{"id":"1"}}\n')
    assert parse(line) == {"crc": line[9:17].decode(), "span": {"id": "1"}}
    assert [bit for bit in range(8 * len(line)) if parse(flip(line, bit))] == []


# --- a full disk

LIMITED = """
import resource, sys, time
from pathlib import Path
from slm_swap.cli import run
from slm_swap.tracing import runs
from slm_swap.clients.protocol import Reply
from slm_swap.common.settings import Settings
public_key, secret_key, url, report, begins, grows = sys.argv[1:]
def limit(size):
    if int(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(size), int(size)))
def main():
    connection = runs.connect(Settings(langfuse_public_key=public_key, langfuse_secret_key=secret_key, langfuse_base_url=url))
    limit(begins)
    with runs.trace_run(connection, "run", Path(report), {"note": "n" * 500}, seed="s", keep=lambda: True) as trace:
        limit(grows)
        for number in range(400):
            trace.generation(f"row-{number}", "phi-4-mini", [], Reply("x" * 100), {"args_exact": 1.0})
            time.sleep(0.002)
    print("report written", flush=True)
    return 0
run(main)
"""


def limited(server, folder, begins=0, grows=0):
    command = [sys.executable, "-c", LIMITED, *server.keys.split(":"), server.url, str(folder / "report.json"), str(begins), str(grows)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=PATIENCE)


@pytest.mark.parametrize("size", [1, 300, 1000])
def test_no_room_for_the_files_beginning_is_one_line(server, tmp_path, size):
    done = limited(server, tmp_path, begins=size)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert f"error: cannot write {outbox_path(tmp_path / 'report.json')} (" in done.stderr and "make room" in done.stderr


@pytest.mark.parametrize("size", [3_000, 30_000])
def test_no_room_for_records_and_marks_ends_no_run_and_shows_no_traceback(server, tmp_path, size, resend, traced):
    """The limit is the sender's too: what neither of them can write."""
    done = limited(server, tmp_path, begins=size)
    assert (done.returncode, done.stdout) == (0, "report written\n") and "Traceback" not in done.stderr, done.stderr
    assert "could not take all of the trace (" in done.stderr
    path = outbox_path(tmp_path / "report.json")
    if path.exists():
        assert all(parse(line + b"\n") for line in path.read_bytes().split(b"\n")[:-1]) and path.read_bytes().endswith(b"\n"), "no torn line"
        assert resend(server, tmp_path)[0] == 0
    with traced(settings_for(server), seed="s") as trace:
        send_rows(trace, 400)
    assert {span.row for span in server.spans} == {"run", *(f"row-{number}" for number in range(400))}


def test_a_folder_that_may_not_be_written_is_one_line(server, traced, impatient, tmp_path, monkeypatch):
    left_behind(server, traced, tmp_path, seed="one")

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(UserError, match=r"cannot write .*report.traces.jsonl \(Permission denied\)"), traced(settings_for(server), seed="two"):
        pytest.fail("the run began")


def test_no_secret_changes_a_checksum(server, traced, impatient, tmp_path):
    path, _ = left_behind(server, traced, tmp_path, rows=1, metadata={"note": "sk-lf-right"})
    lines = path.read_bytes().splitlines(keepends=True)
    assert all(map(parse, lines)) and b"sk-lf-right" not in path.read_bytes() and json.loads(lines[0])["header"]["attributes"]
