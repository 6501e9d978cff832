"""Any instruct checkpoint: right, or refused in one line. A row of the table a test; `columns.py` says what is tried."""

import pytest
import torch

from slm_swap.clients.engines import transformers_engine
from slm_swap.common.settings import PACKAGE
from slm_swap.tuning.packing import PackCollator
from tests.models.columns import COLUMNS, Trial, cell
from tests.models.families import FAMILIES
from tests.models.table import TITLES, table


@pytest.mark.parametrize("name", FAMILIES)
def test_every_cell_is_as_it_is_told(name, tmp_path):
    trial = Trial(FAMILIES[name], tmp_path)
    found = {column: cell(trial, check) for column, check in COLUMNS.items()}
    other = [f"{column}\n  told  {told}\n  found {found[column]}" for column, told in trial.family.cells(COLUMNS).items() if told != found[column]]
    assert not other, "\n".join([name, *other])


def test_the_readme_shows_the_table():
    assert list(TITLES) == list(COLUMNS)
    section = (PACKAGE / "README.md").read_text(encoding="utf-8").split("### Model families\n")[1].split("\n##")[0]
    assert table() in section, "put in what `python -m tests.models.table` prints"


def unpadded(mask):
    return torch.arange(mask.shape[1]).expand_as(mask)


def one_row(self, packs, call=PackCollator.__call__):
    batch = call(self, packs)
    return batch | {"position_ids": torch.arange(batch["input_ids"].shape[1])[None]}


FAULTS = {  # what is put in the place of what, and the columns that are to show it
    "positions count the padding": (transformers_engine, "positions_of", unpadded, ["batches", "forward"]),
    "packed rows see each other": (PackCollator, "__call__", one_row, ["packed"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_program_shows(fault, tmp_path, monkeypatch):
    owner, name, wrong, columns = FAULTS[fault]
    monkeypatch.setattr(owner, name, wrong)
    trial = Trial(FAMILIES["Qwen2.5"], tmp_path)
    assert trial.family.cells(columns) == dict.fromkeys(columns, "ok")
    assert "ok" not in {cell(trial, COLUMNS[column]) for column in columns}
