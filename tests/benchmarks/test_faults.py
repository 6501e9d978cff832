"""The campaign of faults: a few trials of each kind find nothing, and a fault that is planted is found."""

import importlib
import itertools
import json
import sys
from collections import Counter
from random import Random
from types import SimpleNamespace

import pytest

from slm_swap.common.settings import ROOT
from tests.support.processes import run_python

# One undisturbed campaign for both: what is prepared takes the most of it. The fault: lines whose checksum does not match count as whole.
CAMPAIGN = """
import json, sys
from pathlib import Path
sys.path[:0] = [{root!r}, {root!r} + "/benchmarks"]
import fault_trials, faults
from slm_swap.evaluating import journal

folder, results = Path(sys.argv[1]), {{}}
faults.load(*faults.SCRIPTS)
with faults.scene(folder) as made:
    campaign = faults.Campaign(made, 42)
    campaign.prepare(training=False)
    for weights in (fault_trials.KILLED, fault_trials.FILLED, fault_trials.DAMAGED):
        for name in ("train", "merge", "checkpoint", "adapter", "render_report"):
            weights.pop(name, None)

    def run(*names):
        return list(faults.Trials(campaign, 2).results(iter(names)))

    results["sound"] = run(*(f"kill-{{n}}" for n in range(1, 4)), *(f"damage-{{n}}" for n in range(1, 7)), "disk-1", "server-1")
    results["again"] = run("damage-3")
    for kinds, one in ((fault_trials.DAMAGED, "journal"), (fault_trials.KINDS, "a flipped bit")):
        for kind in kinds.keys() - {{one}}:
            del kinds[kind]
    journal.is_whole = lambda line: True
    results["planted"] = run(*(f"damage-{{n}}" for n in range(1, 6)))
(folder / "results.json").write_text(json.dumps(results))
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("campaign")
    (folder / "campaign.py").write_text(CAMPAIGN.format(root=str(ROOT)))
    done = run_python(folder / "campaign.py", folder, LANGFUSE_DISABLED="1")
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "results.json").read_text())


def test_a_few_trials_of_each_kind_find_nothing(results):
    assert {result["trial"]: result["why"] for result in results["sound"] if result["why"]} == {}
    told = {result["trial"]: result["told"] for result in results["sound"]}
    assert len(told) == 11 and all(told[f"damage-{number}"] for number in range(1, 7))
    killed = Counter(outcome for name, parts in told.items() if name.startswith("kill") for _, outcome in parts)
    assert killed["killed"] >= 2 and killed["killed"] + killed["went on"] + killed["refused"] == killed.total()
    same = {result["trial"]: result["told"] for result in results["again"]}
    assert [told[name] for name in same] == list(same.values()), "a trial can be run alone"


def test_a_planted_fault_is_found(results):
    found = [result for result in results["planted"] if result["why"]]
    assert len(found) >= 2 and {"wrong silently"} <= {outcome for result in found for _, outcome in result["told"]}
    assert all("a flipped bit in report.rows.jsonl.part" in result["why"] for result in found)


@pytest.fixture(scope="module")
def benchmarks():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield {name: importlib.import_module(name) for name in ("damage", "faults")}
    sys.path.remove(str(ROOT / "benchmarks"))


def test_each_kind_of_damage_is_what_its_name_says(benchmarks):
    damage, dice, text = benchmarks["damage"], Random(1), b"".join(b"line %d\n" % number for number in range(60))
    lines = text.splitlines(keepends=True)
    for _ in range(50):
        flipped = damage.flipped(text, dice)
        assert sum((one ^ other).bit_count() for one, other in zip(text, flipped, strict=True)) == 1
        assert text.startswith(short := damage.cut(text, dice)) and len(short) < len(text)
        zeroed = damage.zeroed(text, dice)
        assert len(zeroed) == len(text) and b"\0" in zeroed and all(other in (one, 0) for one, other in zip(text, zeroed, strict=True))
        assert Counter(damage.swapped(text, dice).splitlines(keepends=True)) == Counter(lines)
        assert (Counter(damage.doubled(text, dice).splitlines(keepends=True)) - Counter(lines)).total() == 1
        assert (Counter(lines) - Counter(damage.deleted(text, dice).splitlines(keepends=True))).total() == 1


def test_kinds_take_turns_until_the_numbers_are_reached(benchmarks):
    faults = benchmarks["faults"]
    args = faults.parse_args(["--kills", "4", "--damage", "8", "--disks", "0", "--servers", "2"])
    counts, names = faults.Counts(), []
    for name in faults.planned(args, counts):
        names.append(name)
        kills = [("SIGKILL", "killed")] * 2 if name.startswith("kill") else []
        counts.add({"trial": name, "told": [*kills, ("eval", "went on")], "why": None})
    assert Counter(name.partition("-")[0] for name in names) == {"kill": 2, "damage": 8, "server": 2}, "kills are counted by those that came"
    assert names[-1].startswith("damage") or names[-2].startswith("damage"), "they are mixed"
    told = counts.to_json()
    assert told["kill"]["kills"] == 4 and told["kill"]["outcomes"]["went on"] == 2 and told["failed"] == {}
    counts.add({"trial": "kill-3", "told": [("eval", "lost")], "why": "lost: a row"})
    assert counts.to_json()["kill"]["outcomes"]["lost"] == 1 and counts.to_json()["failed"] == {"kill-3": "lost: a row"}


def test_with_minutes_it_goes_on_in_the_same_shares_until_they_are_over(benchmarks, monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(benchmarks["faults"], "time", SimpleNamespace(monotonic=lambda: next(clock)))
    faults, counts, names = benchmarks["faults"], SimpleNamespace(killed=Counter(), trials=Counter()), []
    args = faults.parse_args(["--minutes", "1", "--kills", "0", "--damage", "2", "--disks", "1", "--servers", "0"])
    for name in faults.planned(args, counts):
        names.append(name)
        counts.trials[name.partition("-")[0]] += 1
    kinds = Counter(name.partition("-")[0] for name in names)
    assert len(names) > 50 and set(kinds) == {"damage", "disk"} and 1.5 < kinds["damage"] / kinds["disk"] < 2.5 and len(set(names)) == len(names)


@pytest.mark.parametrize("name", ["kill", "kill-", "fire-1", "damage-x"])
def test_a_trial_that_is_none(benchmarks, capsys, name):
    with pytest.raises(SystemExit):
        benchmarks["faults"].parse_args(["--only", name])
    assert "a trial is kill, damage, disk, server and its number" in capsys.readouterr().err
