"""Replies kept for later runs: what is a hit, what is never kept, and several processes at once."""

import json
import multiprocessing
import sqlite3
from concurrent.futures import ProcessPoolExecutor

import pytest

from slm_swap.clients.protocol import Reply
from slm_swap.common.errors import UserError
from slm_swap.demo.azure_simulator import AzureSimulator, Faults
from slm_swap.evaluating.reply_cache import ReplyCache
from slm_swap.rows.examples import Example
from slm_swap.rows.prompts import Request, text_request

IDENTITY = {"kind": "azure", "deployment": "d", "parameters": {"seed": 42, "temperature": 0.0}}
ASKED = text_request("structured", "Say \u00e4\ud83d\ude00")
REPLY = Reply('{"a":"\u2028"}', "stop", 10, 3, 4, 0.1 + 0.2)


def test_what_was_kept_comes_back(tmp_path):
    ReplyCache(tmp_path / "new/folder", IDENTITY).put(ASKED, REPLY, 1.25)
    reordered = {"parameters": {"temperature": 0.0, "seed": 42}, "deployment": "d", "kind": "azure"}
    assert ReplyCache(tmp_path / "new/folder", reordered).get(ASKED) == (REPLY, 1.25)


@pytest.mark.parametrize("other", [{"deployment": "e"}, {"parameters": {"seed": 7, "temperature": 0.0}}, {"api_version": None}])
def test_another_model_or_parameter_is_no_hit(tmp_path, other):
    ReplyCache(tmp_path, IDENTITY).put(ASKED, REPLY, 1.0)
    assert ReplyCache(tmp_path, IDENTITY | other).get(ASKED) is None


def test_other_messages_are_no_hit(tmp_path):
    cache = ReplyCache(tmp_path, IDENTITY)
    cache.put(ASKED, REPLY, 1.0)
    assert cache.get(text_request("toolcall", "Say \u00e4\ud83d\ude00")) is None
    assert cache.get(text_request("structured", "Say a")) is None and cache.get(Request(ASKED.messages[:1])) is None


@pytest.mark.parametrize(
    ("reply", "kept"),
    [
        (Reply("a", "stop"), True), (Reply("a", "length"), True), (Reply("", "content_filter"), False),
        (Reply("no", "refusal"), False), (Reply("", "error", error="500"), False),
        (Reply("", "prompt_too_long", error="the prompt has 9 tokens, the context 8"), False),
    ],
)  # fmt: skip
def test_filtered_refused_and_failed_replies_are_never_kept(tmp_path, reply, kept):
    cache = ReplyCache(tmp_path, IDENTITY)
    cache.put(ASKED, reply, 1.0)
    assert (cache.get(ASKED) is not None) == kept


def test_a_flipped_bit_in_an_entry_is_a_miss_and_counted(tmp_path):
    cache = ReplyCache(tmp_path, IDENTITY)
    cache.put(ASKED, REPLY, 1.0)
    cache.close()
    raw = sqlite3.connect(tmp_path / "replies.sqlite3", isolation_level=None)
    whole = raw.execute("SELECT CAST(reply AS BLOB) FROM replies").fetchone()[0]
    for at in range(len(whole)):
        bad = bytearray(whole)
        bad[at] ^= 1 << at % 8
        raw.execute("UPDATE replies SET reply = CAST(? AS TEXT)", (bytes(bad),))
        cache = ReplyCache(tmp_path, IDENTITY)
        assert cache.get(ASKED) is None and cache.damaged == 1, at
        cache.put(ASKED, REPLY, 1.0)
        assert cache.get(ASKED) == (REPLY, 1.0)
        cache.close()


def test_entries_that_changed_places_are_misses(tmp_path):
    cache, other = ReplyCache(tmp_path, IDENTITY), text_request("structured", "Another")
    cache.put(ASKED, REPLY, 1.0)
    cache.put(other, Reply("other"), 1.0)
    raw = sqlite3.connect(tmp_path / "replies.sqlite3", isolation_level=None)
    (first, one), (second, two) = raw.execute("SELECT key, reply FROM replies").fetchall()
    raw.executemany("UPDATE replies SET reply = ? WHERE key = ?", [(two, first), (one, second)])
    assert cache.get(ASKED) is None and cache.get(other) is None and cache.damaged == 2


def fill(folder, first):
    cache = ReplyCache(folder, IDENTITY)
    for number in range(first, first + 200):
        cache.put(text_request("structured", f"p{number}"), Reply(str(number)), 0.0)


def test_several_processes_at_once(tmp_path):
    with ProcessPoolExecutor(4, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(fill, [tmp_path] * 4, [0, 100, 200, 300]))
    cache = ReplyCache(tmp_path, IDENTITY)
    assert [cache.get(text_request("structured", f"p{n}")) for n in range(500)] == [(Reply(str(n)), 0.0) for n in range(500)]


def test_a_folder_that_cannot_be_used_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="another --cache"):
        ReplyCache(tmp_path / "file", IDENTITY)
    (tmp_path / "replies.sqlite3").write_bytes(b"notes, notes, notes" * 100)
    with pytest.raises(UserError, match="another --cache"):
        ReplyCache(tmp_path, IDENTITY)


# An evaluation with a cache

ROWS = [Example(f"Say {n}", f'{{"number":{n}}}', id=f"r{n}") for n in range(20)]


@pytest.fixture
def azure(monkeypatch):
    for name, value in {"DEPLOYMENT": "simulator", "API_VERSION": "2024-10-21", "API_KEY": "simulator-key"}.items():
        monkeypatch.setenv(f"AZURE_{name}", value)


def test_the_second_evaluation_asks_what_the_first_could_not_keep(run_script, eval_script, write_rows, tmp_path, monkeypatch, azure):
    rows, reports = write_rows("rows.jsonl", [row.to_json() for row in ROWS]), {}
    prices = tmp_path / "prices.toml"
    prices.write_text("[hosted.simulator]\ninput = 2.0\noutput = 10.0\n")
    monkeypatch.setenv("PRICES_FILE", str(prices))
    with AzureSimulator(ROWS, mistake_rate=0.3, faults=Faults(content_filter=0.2)) as server:
        monkeypatch.setenv("AZURE_ENDPOINT", server.url)
        flags = ("--track", "structured", "--model-kind", "azure", "--dataset", rows, "--cache", tmp_path / "cache")
        for name, more in (("first", ()), ("second", ()), ("other", ("--max-new-tokens", 7))):
            code, _, error = run_script(eval_script, *flags, *more, "--out", tmp_path / f"{name}.json")
            assert code == 0 and ("warning" in error) == (name == "other"), "7 tokens are too few for two of the wrong replies"
            reports[name] = json.loads((tmp_path / f"{name}.json").read_text()) | {"asked": server.counts.total()}
    first, second, other = reports.values()
    filtered = first["counts"]["errors"]["filtered"]
    assert 0 < filtered < 20
    assert [report["cached_replies"] for report in reports.values()] == [0, 20 - filtered, 0]
    assert (first["asked"], second["asked"], other["asked"]) == (20, 20 + filtered, 40 + filtered)
    for key in ("metrics", "metrics_by_matcher", "counts", "tokens", "cost"):
        assert first[key] == second[key]
    assert first["cost"]["total"] > 0
    # what a reply took is what it took when it was asked for
    assert second["seconds"]["generate"] > 0.5 * first["seconds"]["generate"]


def test_rows_of_one_run_are_asked_even_if_their_messages_are_equal(run_script, eval_script, write_rows, tmp_path, monkeypatch, azure):
    rows = write_rows("rows.jsonl", [row.to_json() | {"prompt": "the same", "id": f"r{n}"} for n, row in enumerate(ROWS[:3])])
    with AzureSimulator(ROWS) as server:
        monkeypatch.setenv("AZURE_ENDPOINT", server.url)
        flags = ("--track", "structured", "--model-kind", "azure", "--dataset", rows, "--cache", tmp_path / "cache", "--overwrite")
        for asked in (3, 3):
            assert run_script(eval_script, *flags, "--out", tmp_path / "out.json")[0] == 0
            assert server.counts.total() == asked
