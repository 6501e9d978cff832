"""Several rows in one sequence: which rows go together, and the tensors that keep them apart."""

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

IGNORED = -100  # the label of tokens that carry no loss


def pack(lengths: Sequence[int], room: int, seed: int) -> list[list[int]]:
    """The rows of each pack, by index: every row once and whole, and no pack longer than `room`.

    Best fit in a seeded random order: a row goes into the fullest pack that still has room for it. In decreasing order, the usual
    variant, packs would hold rows of one length each; mixed ones make every step a fair sample of the rows.

    Raises:
        ValueError: a row is longer than `room`.
    """
    if lengths and max(lengths) > room:
        raise ValueError(f"a row of {max(lengths)} tokens does not fit into packs of {room}")
    order = list(range(len(lengths)))
    Random(seed).shuffle(order)
    packs: list[list[int]] = []
    open_packs: list[tuple[int, int]] = []  # (tokens left, pack), sorted
    for row in order:
        fitting = bisect_left(open_packs, (lengths[row], -1))
        if fitting < len(open_packs):
            left, number = open_packs.pop(fitting)
        else:
            left, number = room, len(packs)
            packs.append([])
        packs[number].append(row)
        insort(open_packs, (left - lengths[row], number))
    return packs


def packed_rows(rows: Sequence[dict[str, list[int]]], room: int, seed: int) -> list[dict[str, list[int]]]:
    """Rows of {"input_ids", "labels"} to packs of the same and `seq_lengths`, the lengths of the rows inside (TRL's format)."""
    found = []
    for members in pack([len(row["input_ids"]) for row in rows], room, seed):
        inside = [rows[index] for index in members]
        joined = {name: [token for row in inside for token in row[name]] for name in ("input_ids", "labels")}
        found.append(joined | {"seq_lengths": [len(row["input_ids"]) for row in inside]})
    return found


@dataclass(frozen=True)
class PackCollator:
    """One pack to tensors whose shapes are the same for every pack, so that compiled code fits them all.

    Gives `input_ids`, `labels`, `position_ids` (1, length), the positions starting anew at each row; `cu_seq_lens_q` and `_k`
    (segments + 1), int32, where each row begins, as variable-length attention wants it; `max_length_q` and `_k`; and the targets of
    `add_targets`. A pack's parts are lists or tensors. Padding is made of further rows without loss, none longer than the longest row: rotary
    embeddings may change their scale with the highest position.
    """

    length: int  # tokens in a pack, padding included
    longest: int  # tokens in the longest row
    segments: int  # rows in the fullest pack, those of padding included
    pad_token: int
    multiple_of: int = 1  # see add_targets

    @classmethod
    def for_packs(cls, packs: Iterable[dict], length: int, pad_token: int, multiple_of: int = 1) -> "PackCollator":
        packs = list(packs)
        longest = max(max(pack["seq_lengths"]) for pack in packs)
        segments = max(len(pack["seq_lengths"]) + -(-(length - len(pack["input_ids"])) // longest) for pack in packs)
        return cls(length, longest, segments, pad_token, multiple_of)

    def __call__(self, packs: list[dict[str, list[int]]]) -> dict[str, Any]:
        import torch

        (pack,) = packs
        missing = self.length - len(pack["input_ids"])
        lengths = torch.tensor([*pack["seq_lengths"], *[self.longest] * (missing // self.longest), missing % self.longest])
        starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        positions = torch.arange(self.length) - starts[:-1].repeat_interleave(lengths)
        starts = starts[: self.segments + 1]
        starts = torch.nn.functional.pad(starts, (0, self.segments + 1 - len(starts)), value=self.length).to(torch.int32)
        batch = {
            name: torch.nn.functional.pad(torch.as_tensor(pack[name]), (0, missing), value=filler)[None]
            for name, filler in (("input_ids", self.pad_token), ("labels", IGNORED))
        } | {
            "position_ids": positions[None],
            "cu_seq_lens_q": starts,
            "cu_seq_lens_k": starts,
            "max_length_q": self.longest,
            "max_length_k": self.longest,
        }
        return add_targets(batch, self.multiple_of)


@dataclass(frozen=True)
class StepRows:
    """The rows of a micro-batch as they are, {"input_ids", "labels"} each, until those of its whole step are known."""

    rows: list[dict[str, list[int]]]


@dataclass(frozen=True)
class StepPacks:
    """The rows of an optimizer step to as few packs as hold them: the sum of their losses is that of the rows one by one, and so are its gradients.

    Gives tensors as PackCollator does. A pack is as long as its rows and at most `room`; what lies between `multiple` and `multiple` is padding.
    """

    room: int  # tokens in a pack at most
    rows: int  # of a step at most
    longest: int  # tokens in the longest row
    pad_token: int
    multiple: int = 1  # that lengths are of
    targets: int = 1  # see add_targets

    def __call__(self, rows: Sequence[dict[str, list[int]]]) -> list[dict[str, Any]]:
        packs, segments = packed_rows(rows, self.room, seed=0), self.rows + -(-self.multiple // self.longest)
        lengths = [-(-len(pack["input_ids"]) // self.multiple) * self.multiple for pack in packs]
        return [
            PackCollator(length, self.longest, segments, self.pad_token, self.targets)([pack])
            for pack, length in zip(packs, lengths, strict=True)
        ]  # fmt: skip


def add_targets(batch: dict[str, Any], multiple_of: int = 1) -> dict[str, Any]:
    """Add where in the batch the next token carries loss, and which token that is.

    `target_index` (targets,) counts through all positions of `labels` (rows, length), row by row; `targets` (targets,). Both are
    filled up with IGNORED targets to a multiple of `multiple_of`. Known here, on the CPU, they need not be searched for on a GPU.
    """
    import torch

    following = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED).flatten()
    index = (following != IGNORED).nonzero().squeeze(1)
    missing = -len(index) % multiple_of
    batch["targets"] = torch.nn.functional.pad(following[index], (0, missing), value=IGNORED)
    batch["target_index"] = torch.nn.functional.pad(index, (0, missing))
    return batch
