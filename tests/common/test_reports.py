"""Writing results: whole or not at all, and with what made them."""

import json
import stat
import subprocess
from pathlib import Path

import pytest

from slm_swap.common import reports
from slm_swap.common.errors import UserError
from slm_swap.common.reports import (
    code_version,
    hardware,
    now,
    package_versions,
    read_json,
    rows_path,
    sha256_file,
    write_atomically,
    write_json,
    write_jsonl,
)  # fmt: skip


def test_json_is_sorted_readable_and_ends_with_a_line_break(tmp_path):
    write_json(tmp_path / "deep/er/r.json", {"b": 1, "a": {"d": "é", "c": None}})
    text = (tmp_path / "deep/er/r.json").read_text(encoding="utf-8")
    assert text == '{\n  "a": {\n    "c": null,\n    "d": "é"\n  },\n  "b": 1\n}\n'


def test_rows_keep_the_order_of_their_keys(tmp_path):
    write_jsonl(tmp_path / "r.jsonl", ({"b": number, "a": "é"} for number in range(2)))
    assert (tmp_path / "r.jsonl").read_text(encoding="utf-8") == '{"b": 0, "a": "é"}\n{"b": 1, "a": "é"}\n'


def failing():
    yield {"a": 1}
    raise RuntimeError("half way")


@pytest.mark.parametrize(
    "write",
    [
        lambda path: write_json(path, {"a": float("nan")}),
        lambda path: write_json(path, {"a": [float("inf")]}),
        lambda path: write_jsonl(path, [{"a": 1}, {"a": float("nan")}]),
        lambda path: write_jsonl(path, [{"a": 1}, {"a": object()}]),
        lambda path: write_jsonl(path, [{"a": "\ud800"}]),
        lambda path: write_jsonl(path, failing()),
        lambda path: write_atomically(path, lambda stream: stream.write("half") and 1 / 0),
    ],
)
@pytest.mark.parametrize("before", [None, "what was there\n"])
def test_a_failure_leaves_everything_as_it_was(tmp_path, write, before):
    path = tmp_path / "report.json"
    if before:
        path.write_text(before)
    with pytest.raises((ValueError, TypeError, RuntimeError, ZeroDivisionError)):
        write(path)
    assert [entry.name for entry in tmp_path.iterdir()] == (["report.json"] if before else [])
    assert not before or path.read_text() == before


def test_readers_see_the_old_file_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "report.json"
    path.write_text("old")

    def write(stream):
        stream.write("new")
        stream.flush()
        assert path.read_text() == "old"

    write_atomically(path, write)
    assert path.read_text() == "new" and len(list(tmp_path.iterdir())) == 1


def test_the_team_may_read_it(tmp_path):
    write_json(tmp_path / "r.json", {})
    assert stat.S_IMODE((tmp_path / "r.json").stat().st_mode) == 0o644


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^cannot write .*file/r\.json \(.*\): choose another place with --out$"):
        write_json(tmp_path / "file/r.json", {})


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000])
def test_what_is_no_json_is_said_in_one_line(tmp_path, content):
    (tmp_path / "r.json").write_bytes(content)
    with pytest.raises(UserError, match=r"r\.json is not JSON: make it again with 01_eval/eval\.py$"):
        read_json(tmp_path / "r.json", "01_eval/eval.py")


def test_reading(tmp_path):
    write_json(tmp_path / "r.json", {"a": 1})
    assert read_json(tmp_path / "r.json", "x") == {"a": 1}
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(UserError, match="is not a JSON object"):
        read_json(tmp_path / "list.json", "x")
    for missing in (tmp_path / "none.json", tmp_path):
        with pytest.raises(UserError, match=r"^cannot read .*: make it with eval$"):
            read_json(missing, "eval")


def test_the_rows_lie_beside_the_report():
    assert rows_path("a/b.c/toolcall_slm_test.json") == Path("a/b.c/toolcall_slm_test.rows.jsonl")


def test_hash_of_a_file(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256_file(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_now_is_utc():
    assert now().endswith("+00:00") and len(now()) == 25


@pytest.fixture
def repository(tmp_path, monkeypatch):
    root = tmp_path / "repository"
    (root / "slm_swap").mkdir(parents=True)
    (root / "slm_swap/code.py").write_text("a = 1\n")
    (root / "slm_swap/prices.toml").write_text("# no prices\n")
    monkeypatch.setattr(reports, "ROOT", root)
    monkeypatch.setattr(reports, "PACKAGE", root / "slm_swap")

    def git(*words):
        identity = ("-c", "user.name=t", "-c", "user.email=t@example.com", "-c", "init.defaultBranch=main")
        subprocess.run(("git", "-C", str(root), *identity, *words), check=True, capture_output=True)

    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    return root


@pytest.fixture
def asked_anew():
    """A function that gives the code's version as a new process sees it."""

    def ask():
        reports._checkout.cache_clear()
        return code_version()

    yield ask
    reports._checkout.cache_clear()


def test_code_version(repository, asked_anew):
    clean = asked_anew()
    assert len(clean["commit"]) == 40 and clean["dirty"] is False
    (repository / "notes.txt").write_text("beside the code\n")
    (repository / "slm_swap/prices.toml").write_text("[local]\nhour = 2.2\n")
    assert asked_anew() == clean
    (repository / "slm_swap/code.py").write_text("a = 2\n")
    assert code_version() == clean, "a process runs the code that it has read"
    assert asked_anew() == clean | {"dirty": True}


def test_code_version_without_git(tmp_path, monkeypatch, asked_anew):
    monkeypatch.setattr(reports, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert asked_anew() == {"commit": None, "dirty": None}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert asked_anew() == {"commit": None, "dirty": None}


def test_packages_and_hardware_are_json():
    assert json.loads(json.dumps(package_versions()))["python"]
    assert set(hardware()) == {"machine", "processor", "cores", "gpus"} and hardware()["cores"] >= 1


def test_a_symbolic_link_stays_one(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link.json").symlink_to(tmp_path / "disk/report.json")
    for value in (1, 2):
        write_json(tmp_path / "link.json", {"value": value})
        assert (tmp_path / "link.json").is_symlink() and read_json(tmp_path / "disk/report.json", "x") == {"value": value}
    assert len(list(tmp_path.rglob("*"))) == 3


def test_a_full_disk_keeps_the_older_file(disk):
    path = disk.folder / "r.json"
    write_json(path, {"value": 1})
    disk.leave(8)
    with pytest.raises(UserError, match=r"r\.json \(No space left on device\): make room and run the same command again$"):
        write_json(path, {"value": "x" * 20_000})
    assert read_json(path, "x") == {"value": 1} and set(disk.files()) == {"r.json"}
