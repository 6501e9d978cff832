"""The ledger of looks: what counts as a further look at the same rows, and what each may spend."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slm_swap.common.errors import UserError
from slm_swap.verdict.looks import ledger_path, look_at, record, share

AZURE, BASE, TUNED = {"deployment": "gpt"}, {"path": "phi"}, {"path": "phi", "adapter": "a"}


def rows(first, last):
    return [{"id": f"r{n}", "reference": f"{n}", "prompt_sha256": f"p{n}"} for n in range(first, last)]


@pytest.fixture
def look(tmp_path):
    """A function that looks at rows with a small model and records it: (number, share, look)."""
    ledger = ledger_path(tmp_path / "reports/decision.json", "toolcall")

    def see(some, slm, azure=AZURE, verdict="NEED_MORE_DATA"):
        found = look_at(ledger, some, azure, slm)
        record(ledger, found, verdict, 0.02, "phi")
        return found

    return see


def test_the_shares_add_up_to_1_1_however_often_one_looks():
    assert [share(number) for number in range(1, 6)] == [0.7, 0.2, 0.1, 0.05, 0.025]
    assert sum(share(number) for number in range(1, 200)) == pytest.approx(1.1) and sum(map(share, range(1, 9))) < 1.1


@given(st.integers(1, 100))
def test_each_further_look_may_spend_less(number):
    assert 0 < share(number + 1) < share(number) < 1


def test_the_documented_loop_is_counted(look):
    numbers = [
        look(rows(0, 100), BASE).number,
        look(rows(0, 100), TUNED).number,  # another small model at the same rows
        look(rows(0, 300), TUNED).number,  # more rows
        look(rows(0, 300), {"path": "phi", "adapter": "b"}).number,
        look(rows(50, 60), BASE).number,  # a part of them
    ]
    assert numbers == [1, 2, 3, 4, 5]


def test_a_model_that_was_shown_to_be_worse_spent_nothing(look):
    assert look(rows(0, 100), BASE, verdict="FINE_TUNE").number == 1
    assert look(rows(0, 100), TUNED).number == 1, "from the base model to the first adapter"
    assert look(rows(0, 300), TUNED, verdict="SWAP").number == 2
    assert look(rows(0, 300), {"path": "other"}).number == 3


def test_the_last_verdict_of_a_look_counts(look):
    look(rows(0, 100), BASE, verdict="FINE_TUNE")
    look(rows(0, 100), BASE, verdict="NEED_MORE_DATA")  # some rows were measured again
    assert look(rows(0, 100), TUNED).number == 2 and look(rows(0, 100), BASE).number == 1


def test_deciding_again_is_no_further_look(look):
    first = look(rows(0, 100), BASE)
    look(rows(0, 100), TUNED)
    again = look(list(reversed(rows(0, 100))), BASE)
    assert (again.number, again.share, again.earlier) == (1, first.share, [])
    assert look(rows(0, 100), TUNED).number == 2
    assert look(rows(0, 100), BASE | {"parameters": {"max_new_tokens": 1024}}).number == 1, "measuring again what was cut is no new look"


def test_rows_that_were_never_looked_at_begin_anew(look):
    look(rows(0, 100), BASE)
    assert look(rows(100, 200), TUNED).number == 1
    assert look(rows(99, 201), TUNED).number == 3, "one row of each is enough"


def test_a_row_is_what_it_asks_and_wants(look):
    look(rows(0, 10), BASE)
    changed = [row | {"reference": "other"} for row in rows(0, 10)]
    assert look(changed, BASE).number == 1


def test_only_other_models_spend_of_a_rule_that_may_look_at_any_time(look):
    assert look(rows(0, 100), BASE).share_of_models == 1.0
    assert look(rows(0, 200), BASE).share_of_models == 1.0, "the same model on more rows"
    assert look(rows(0, 200), TUNED).share_of_models == share(2)


def test_what_the_ledger_keeps(look, tmp_path):
    look(rows(0, 2), BASE, verdict="SWAP")
    (line,) = (tmp_path / "reports/toolcall.looks.jsonl").read_text().splitlines()
    told = json.loads(line)
    assert (told["verdict"], told["delta"], told["label"], len(told["rows"])) == ("SWAP", 0.02, "phi", 2)
    second = look(rows(0, 3), BASE)
    assert second.earlier == [{"at": told["at"], "verdict": "SWAP", "delta": 0.02, "label": "phi", "slm": told["slm"], "rows": 2}]
    (warning,) = second.warning(0.05)
    assert "look 2" in warning and "0.01 now" in warning and "0.035" in warning


@pytest.mark.parametrize("line", ["[]", '{"rows": 1, "slm": "a"}', '{"rows": []}', "not JSON"])
def test_a_ledger_that_cannot_be_read_is_no_empty_one(tmp_path, line):
    ledger = tmp_path / "toolcall.looks.jsonl"
    ledger.write_text(line + "\n")
    with pytest.raises(UserError, match=r"toolcall\.looks\.jsonl:1"):
        look_at(ledger, rows(0, 2), AZURE, BASE)


@pytest.mark.parametrize("kept", [1, 40, -2])
def test_a_line_that_could_not_be_ended_is_none_and_the_next_takes_its_place(look, tmp_path, kept):
    """As a kill or a full disk leaves it, anywhere in the line."""
    look(rows(0, 100), BASE)
    ledger = tmp_path / "reports/toolcall.looks.jsonl"
    first = ledger.read_bytes()
    look(rows(0, 100), TUNED)
    ledger.write_bytes(ledger.read_bytes()[: len(first) + kept if kept > 0 else kept])
    assert look(rows(0, 100), TUNED).number == 2
    lines = ledger.read_bytes().splitlines(keepends=True)
    assert lines[0] == first and len(lines) == 2 and all(map(json.loads, lines))


def test_a_whole_line_without_its_end_counts(look, tmp_path):
    look(rows(0, 100), BASE)
    ledger = tmp_path / "reports/toolcall.looks.jsonl"
    ledger.write_bytes(ledger.read_bytes().rstrip(b"\n"))
    assert look(rows(0, 100), TUNED).number == 2
    assert len(list(map(json.loads, ledger.read_text().splitlines()))) == 2


def test_a_full_disk_takes_the_whole_line_or_nothing(disk):
    ledger = ledger_path(disk.folder / "decision.json", "toolcall")
    record(ledger, look_at(ledger, rows(0, 10), AZURE, BASE), "SWAP", 0.02, "phi")
    before, further = ledger.read_bytes(), look_at(ledger, rows(0, 2000), AZURE, TUNED)
    disk.leave(4)  # of the 30 that it takes
    with pytest.raises(UserError, match=r"cannot write .*toolcall.looks.jsonl \(No space left on device\): make room"):
        record(ledger, further, "SWAP", 0.02, "phi")
    assert ledger.read_bytes() == before
    disk.make_room()
    record(ledger, further, "SWAP", 0.02, "phi")
    assert look_at(ledger, rows(0, 2000), AZURE, BASE).number == 3
