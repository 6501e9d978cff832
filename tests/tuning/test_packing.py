"""Rows in packs: which go together, and the tensors that keep them apart."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slm_swap.tuning.packing import IGNORED, PackCollator, add_targets, pack, packed_rows

ROWS = [{"input_ids": [number] * size, "labels": [IGNORED] * (size - 2) + [number] * 2} for number, size in ((1, 5), (2, 3), (3, 4))]


@given(st.lists(st.integers(1, 40), max_size=200), st.integers(40, 100), st.integers())
def test_every_row_is_in_one_pack_and_no_pack_is_too_long(lengths, room, seed):
    packs = pack(lengths, room, seed)
    assert sorted(row for members in packs for row in members) == list(range(len(lengths)))
    sums = [sum(lengths[row] for row in members) for members in packs]
    assert max(sums, default=0) <= room
    assert sum(total * 2 <= room for total in sums) <= 1, "two packs that are half empty would have been one"
    assert packs == pack(lengths, room, seed)


def test_the_seed_decides_which_rows_go_together():
    assert pack([10] * 50, 100, 1) != pack([10] * 50, 100, 2)


def test_a_row_goes_where_it_fits_best():
    packs = pack([60, 50, 40, 50], 100, 0)
    assert sorted(map(sorted, packs)) == [[0, 2], [1, 3]]


def test_a_row_longer_than_a_pack_is_refused():
    with pytest.raises(ValueError, match="a row of 11 tokens does not fit into packs of 10"):
        pack([3, 11], 10, 0)


def test_packs_hold_the_rows_as_they_were():
    (found,) = packed_rows(ROWS, 12, 0)
    assert sorted(found["seq_lengths"]) == [3, 4, 5]
    start, seen = 0, []
    for length in found["seq_lengths"]:
        seen.append({name: found[name][start : start + length] for name in ("input_ids", "labels")})
        start += length
    assert sorted(seen, key=str) == sorted(ROWS, key=str) and start == len(found["labels"]) == 12


def test_a_pack_as_tensors():
    packs = [
        {"input_ids": [1, 1, 1, 2, 2], "labels": [IGNORED, 1, 1, IGNORED, 2], "seq_lengths": [3, 2]},
        {"input_ids": [3], "labels": [IGNORED], "seq_lengths": [1]},
    ]
    collate = PackCollator.for_packs(packs, length=9, pad_token=0, multiple_of=4)
    first, second = (collate([one]) for one in packs)
    assert first["input_ids"].tolist() == [[1, 1, 1, 2, 2, 0, 0, 0, 0]]
    assert first["labels"].tolist() == [[IGNORED, 1, 1, IGNORED, 2] + [IGNORED] * 4]
    assert first["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2, 0]], "padding is rows no longer than the longest"
    assert first["cu_seq_lens_q"].tolist() == [0, 3, 5, 8, 9] and second["cu_seq_lens_q"].tolist() == [0, 1, 4, 7, 9]
    assert first["max_length_q"] == second["max_length_q"] == 3
    assert first["target_index"].tolist() == [0, 1, 3, 0] and first["targets"].tolist() == [1, 1, 2, IGNORED]
    assert second["targets"].tolist() == []
    assert {name: getattr(value, "dtype", None) for name, value in first.items()} == {
        name: getattr(value, "dtype", None) for name, value in second.items()
    }


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6), min_size=1, max_size=5), st.integers(54, 70))
def test_all_packs_have_one_shape_and_their_positions_restart(packs, length):
    packs = [{"input_ids": [7] * sum(sizes), "labels": [7] * sum(sizes), "seq_lengths": sizes} for sizes in packs]
    collate = PackCollator.for_packs(packs, length, pad_token=0)
    batches = [collate([one]) for one in packs]
    assert len({(batch["input_ids"].shape, batch["cu_seq_lens_q"].shape) for batch in batches}) == 1
    for one, batch in zip(packs, batches, strict=True):
        starts = batch["cu_seq_lens_q"].tolist()
        wanted = [position for begin, end in pairwise(starts) for position in range(end - begin)]
        assert batch["position_ids"].tolist() == [wanted] and len(wanted) == length
        assert starts[: len(one["seq_lengths"]) + 1] == [sum(one["seq_lengths"][:n]) for n in range(len(one["seq_lengths"]) + 1)]


def test_targets_count_through_all_rows_of_a_batch():
    import torch

    labels = torch.tensor([[IGNORED, 5, 6, IGNORED], [IGNORED, IGNORED, IGNORED, 7]])
    batch = add_targets({"labels": labels})
    assert batch["target_index"].tolist() == [0, 1, 6] and batch["targets"].tolist() == [5, 6, 7]
