"""live_compare.py: two clients side by side, Ctrl-C included; over a real socket."""

import json
import signal
from dataclasses import replace
from itertools import count, pairwise

import pytest

from slm_swap.common.settings import PACKAGE
from slm_swap.demo.azure_simulator import AzureSimulator, Faults
from slm_swap.rows.examples import Example, read_examples
from tests.support.processes import Script, run_python, wait_until

SCRIPT = PACKAGE / "01_eval/live_compare.py"
ROWS = [Example(prompt=f"Say {number}", completion=f'{{"number":{number}}}', id=str(number)) for number in range(12)]


@pytest.fixture
def files(tmp_path):
    """A dataset, and replies of another model that has two of the twelve wrong."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row.to_json()) + "\n" for row in ROWS))
    replies = [{"id": row.id, "prediction": "{}" if row.id in "34" else row.completion} for row in ROWS]
    (tmp_path / "replies.jsonl").write_text("".join(json.dumps(reply) + "\n" for reply in replies))
    return tmp_path


def start(files, server, *flags: str, **environment: str) -> Script:
    azure = {
        "AZURE_ENDPOINT": server.url,
        "AZURE_DEPLOYMENT": server.deployment,
        "AZURE_API_KEY": server.key,
        "AZURE_API_VERSION": "2024-10-21",
    }
    environment = azure | {"LANGFUSE_DISABLED": "1", "COLUMNS": "100"} | environment
    return Script(
        SCRIPT, "--track", "structured", "--models", "azure", "replay",
        "--dataset", files / "rows.jsonl", "--replies", files / "replies.jsonl", "--batch-size", 2, "--out-dir", files / "out", *flags, **environment,
    )  # fmt: skip


def reports(files) -> list[dict]:
    return [json.loads((files / f"out/structured_{kind}_rows_live.json").read_text()) for kind in ("azure", "replay")]


def saved_ids(files) -> list[str]:
    """The ids in the saved rows, which are the same for both."""
    azure, replay = (
        [json.loads(line)["id"] for line in (files / f"out/structured_{kind}_rows_live.rows.jsonl").open()]
        for kind in ("azure", "replay")
    )
    assert azure == replay
    return azure


def stop_early(files, *flags: str, rows: list[Example], replies: list[dict], warns=False, **environment: str) -> tuple[str, int]:
    """A run with --stop-early --save over other rows and replies: its output, and how many rows the simulator was asked for.

    `warns`: whether it says that the rows are too few for a swap."""
    (files / "rows.jsonl").write_text("".join(json.dumps(row.to_json()) + "\n" for row in rows))
    (files / "replies.jsonl").write_text("".join(json.dumps(reply) + "\n" for reply in replies))
    with AzureSimulator(rows) as server:
        process = start(files, server, "--stop-early", "--save", "--overwrite", *flags, **environment)
        out, error = process.communicate()
        assert process.returncode == 0, error
        assert ("warning: too few rows for a SWAP" in error) == warns
        return out, server.counts.total()


def test_both_models_and_their_difference_are_shown_and_saved(files):
    with AzureSimulator(read_examples(files / "rows.jsonl")) as server:
        out, error = (process := start(files, server, "--save")).communicate()
    assert process.returncode == 0, error
    assert "\nreport: " in out and "12 of 12 rows" in out and "Fully right reply" in out and "+0.167" in out
    azure, replay = reports(files)
    assert azure["metrics"]["exact_match_rate"] == 1 and replay["metrics"]["exact_match_rate"] == 10 / 12
    assert azure["inputs"]["rows_sha256"] == replay["inputs"]["rows_sha256"]
    assert azure["stopped_early"] is replay["stopped_early"] is None and "NEED_MORE_DATA" not in out
    assert saved_ids(files) == [row.id for row in ROWS]


def test_ctrl_c_keeps_what_both_have_answered(files):
    with AzureSimulator(read_examples(files / "rows.jsonl"), faults=Faults(slow=1.0, slow_seconds=0.7)) as server:
        process = start(files, server, "--save")
        wait_until(lambda: server.counts.total() >= 4)  # the first batch of two is through
        process.send_signal(signal.SIGINT)
        _, error = process.communicate()
    assert process.returncode == 130, error
    assert "interrupted after" in error and "Traceback" not in error
    azure, replay = reports(files)
    assert 0 < azure["counts"]["rows"] == replay["counts"]["rows"] < 12
    assert azure["inputs"]["rows_sha256"] == replay["inputs"]["rows_sha256"]


def test_ctrl_c_before_the_first_replies_leaves_nothing(files):
    with AzureSimulator(read_examples(files / "rows.jsonl"), faults=Faults(slow=1.0, slow_seconds=60)) as server:
        process = start(files, server, "--save")
        wait_until(lambda: server.counts.total() >= 1)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate()
    assert process.returncode == 130 and error.splitlines()[-1] == "interrupted" and "numbers" not in error, error
    assert not (files / "out").exists()


def test_saved_reports_are_kept(files):
    with AzureSimulator(read_examples(files / "rows.jsonl")) as server:
        assert start(files, server, "--save").wait(120) == 0
        before, asked = [path.read_bytes() for path in sorted((files / "out").iterdir())], server.counts.total()
        out, error = (process := start(files, server, "--save")).communicate(timeout=120)
        assert process.returncode == 0 and error == "" and "both reports are finished" in out
        _, error = (process := start(files, server, "--save", "--limit", "5")).communicate(timeout=120)
        assert process.returncode == 2 and "rows 12 there, 5 here" in error and error.count("\n") == 1
        assert [path.read_bytes() for path in sorted((files / "out").iterdir())] == before and server.counts.total() == asked
        assert start(files, server, "--save", "--limit", "5", "--overwrite").wait(120) == 0
    assert len(saved_ids(files)) == 5


@pytest.mark.parametrize("kib", [0, 24])
def test_reports_that_do_not_fit_are_kept_elsewhere(files, disk, kib):
    """The rows are paid for: the disk takes neither of both reports, or one."""
    disk.leave(kib)
    with AzureSimulator(read_examples(files / "rows.jsonl")) as server:
        _, error = (process := start(files, server, "--save", "--out-dir", disk.folder, folder=files)).communicate()
    assert process.returncode == 2 and error.count("\n") == 1 and "_live" in error, error
    (kept,) = files.glob("live_compare-*")
    assert f"(No space left on device): both reports are in {kept} instead, move them from there: nothing needs to be asked again" in error
    assert len(list(kept.iterdir())) == 4 and all(len(path.read_text().splitlines()) == 12 for path in kept.glob("*.rows.jsonl"))
    kept.rename(files / "out")
    assert len(saved_ids(files)) == 12 and [report["counts"]["rows"] for report in reports(files)] == [12, 12]


def test_a_place_that_takes_no_reports_is_noticed_before_a_model_is_asked(files):
    with AzureSimulator(read_examples(files / "rows.jsonl")) as server:
        _, error = (process := start(files, server, "--save", "--out-dir", files / "rows.jsonl")).communicate()
        assert process.returncode == 2 and error.endswith("choose another place with --out-dir\n") and not server.counts


def test_the_same_model_twice_is_a_mistake(files):
    done = run_python(SCRIPT, "--track", "structured", "--models", "slm", "slm")
    assert done.returncode == 2 and "two different models" in done.stderr and done.stderr.count("\n") == 1


# -- --stop-early ----------------------------------------------------------------------------------------------------------------

MANY = [Example(prompt=f"Say {number}", completion=f'{{"number":{number}}}', id=str(number)) for number in range(240)]
RIGHT = [{"id": row.id, "prediction": row.completion} for row in MANY]


def rows_needed(delta: float) -> int:
    """The rows without any difference after which a swap is certain at alpha 0.05: each multiplies a bet by 1 + g delta / (1 - delta)."""
    bets = (0.96, 0.48, 0.24, 0.12, 0.06, 0.03)
    return next(rows for rows in count(1) if sum((1 + bet * delta / (1 - delta)) ** rows for bet in bets) / 6 >= 20)


def test_equal_models_are_a_swap_before_all_rows_are_asked_for(files):
    prices = files / "prices.toml"
    prices.write_text("[hosted.simulator]\ninput = 1000\noutput = 4000\n")
    out, calls = stop_early(files, "--delta", "0.05", rows=MANY, replies=RIGHT, PRICES_FILE=str(prices))
    assert rows_needed(0.05) <= calls <= rows_needed(0.05) + 1 < 100  # a batch has two rows
    assert "SWAP: “Valid JSON”, hosted - small, is between" in out and "margin 0.05" in out
    azure, replay = reports(files)
    told = {"rows_available": 240, "rows": calls, "largest_cluster": 1, "delta": 0.05, "alpha": 0.05, "tools": "these", "verdict": "SWAP"}
    assert azure["stopped_early"] == replay["stopped_early"] == told and azure["counts"]["rows"] == calls
    saved, cost = 240 - calls, azure["cost"]["total"]
    assert f"\nSWAP after {calls} of 240 rows: {saved} hosted calls saved ({saved / 240:.0%}), about {cost / calls * saved:.4g} at" in out
    ids = saved_ids(files)
    assert len(set(ids)) == calls and ids != sorted(ids, key=int) and max(map(int, ids)) > 120  # of all the file, in random order


def test_the_order_is_the_seed_s(files):
    asked = []
    for seed in ("1", "1", "2"):
        stop_early(files, "--delta", "0.3", "--seed", seed, rows=MANY, replies=RIGHT)
        asked.append(saved_ids(files))
    assert asked[0] == asked[1] != asked[2]


def test_a_bad_model_is_a_fine_tune_after_few_rows(files):
    out, calls = stop_early(files, rows=MANY, replies=[{"id": row.id, "prediction": "no"} for row in MANY])
    assert calls <= 12 and reports(files)[0]["stopped_early"]["verdict"] == "FINE_TUNE"
    assert f"FINE_TUNE after {calls} of 240 rows" in out and "the money is not known: give the deployment's prices" in out


def test_the_hosted_model_may_be_named_second(files):
    """The difference stays azure - slm: a small model that is always wrong is no SWAP."""
    rows, replies = MANY, [{"id": row.id, "prediction": "no"} for row in MANY]
    stop_early(files, "--models", "replay", "azure", rows=rows, replies=replies)
    assert reports(files)[1]["stopped_early"]["verdict"] == "FINE_TUNE"


def test_what_is_not_certain_goes_to_the_end(files):
    out, calls = stop_early(files, rows=ROWS, replies=RIGHT[:12], warns=True)
    assert calls == 12 and "NEED_MORE_DATA after 12 of 12 rows: 0 hosted calls saved (0%)" in out
    assert reports(files)[0]["stopped_early"] == {
        "rows_available": 12, "rows": 12, "largest_cluster": 1, "delta": 0.02, "alpha": 0.05, "tools": "these", "verdict": "NEED_MORE_DATA",
    }  # fmt: skip


def test_a_group_is_one_bet_and_stays_together(files):
    groups = [replace(row, group=f"tool {number % 80}") for number, row in enumerate(MANY)]
    out, calls = stop_early(files, "--delta", "0.1", "--batch-size", "5", rows=groups, replies=RIGHT)
    needed = 3 * rows_needed(0.1)  # groups of three rows
    assert "SWAP after" in out and needed <= calls < needed + 5 <= 240
    assert reports(files)[0]["stopped_early"]["largest_cluster"] == 3
    tools = [int(name) % 80 for name in saved_ids(files)]
    assert sum(before != after for before, after in pairwise(tools)) == len(set(tools)) - 1 and tools != sorted(tools)


def test_one_large_group_makes_every_bet_small(files):
    """It could hold any share of the misses: rows that are enough without it are too few with it, before it has come too."""
    uneven = [replace(row, group="large" if number < 12 else None) for number, row in enumerate(MANY)]
    out, calls = stop_early(files, "--delta", "0.05", "--batch-size", "20", "--seed", "1", rows=uneven, replies=RIGHT, warns=True)
    assert calls == 240 and "NEED_MORE_DATA after 240 of 240 rows" in out
    assert saved_ids(files).index("0") > rows_needed(0.05)  # by this seed the large group comes late


def test_nothing_is_certain_while_requests_failed(files):
    """The rows that were not answered look like those of a bad model, which is found out after some eight."""
    failed = [{"id": row.id, "prediction": "", "finish_reason": "error"} for row in MANY[:29]]
    out, calls = stop_early(files, rows=MANY[:30], replies=[*failed, RIGHT[29]], warns=True)
    assert calls == 30 and "29 rows are not measured" in out.replace("\n", " ") and reports(files)[0]["stopped_early"]["verdict"] == "NEED_MORE_DATA"


def test_nothing_is_certain_while_our_own_limit_cuts_the_hosted_replies(files):
    """Which would look like a bad hosted model, and be a SWAP after some eight rows."""
    _, calls = stop_early(files, "--max-new-tokens", "1", rows=MANY[:30], replies=RIGHT[:30], warns=True)
    azure, replay = reports(files)
    assert azure["counts"]["unmeasured"] == {"failed": 0, "truncated": 30} and replay["metrics"]["exact_match_rate"] == 1
    assert calls == 30 and azure["stopped_early"]["verdict"] == "NEED_MORE_DATA"


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--models", "slm", "replay", "--stop-early"), "name azure"),
        (("--models", "azure", "slm", "--stop-early", "--delta", "1"), "--delta must be less than 1"),
        (("--models", "azure", "slm", "--stop-early", "--alpha", "0"), "--alpha more than 0"),
    ],
)
def test_stop_early_says_what_it_cannot_do(flags, told):
    done = run_python(SCRIPT, "--track", "structured", *flags)
    assert done.returncode == 2 and told in done.stderr and done.stderr.count("\n") == 1
