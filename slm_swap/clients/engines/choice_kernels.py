"""Triton kernels that choose each row's next token and tell its chance, by one pass over the logits. In plain torch that is some twenty kernels.

Imports torch and triton, which CPU builds of torch come without: import it inside functions.
"""

import torch
import triton
import triton.language as tl

SHARE = 8192  # tokens of a row that one program looks at: of the vocabulary alone, so that a row is the same whatever the others are
BLOCK = 1024


@triton.jit
def _look(logits, bits, numbers, places, vocabulary, words, SHARE: tl.constexpr, BLOCK: tl.constexpr):
    """Of one part of a row: the two largest logits, the sum of exponentials below the largest, and the largest that may be chosen, with its place.

    numbers: (rows, parts, 4), float32; places: (rows, parts). bits: (rows, words) or None, as of `masks.host_bits`.
    """
    row, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    lane = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    second, chosen = best, best
    total = tl.zeros((BLOCK,), tl.float32)
    place = part * SHARE + lane
    for start in range(0, SHARE, BLOCK):
        at = part * SHARE + start + lane
        inside = at < vocabulary
        found = tl.load(logits + row * vocabulary + at, inside, float("-inf")).to(tl.float32)
        larger = tl.maximum(best, found)
        second = tl.maximum(second, tl.minimum(best, found))
        lowest = tl.where(larger == float("-inf"), 0.0, larger)  # of infinities the difference is no number
        total = total * tl.exp(best - lowest) + tl.exp(found - lowest)
        best = larger
        if bits is not None:
            word = tl.load(bits + row * words + at // 32, inside, 0)
            found = tl.where((word >> (at % 32)) & 1 != 0, found, float("-inf"))
        place = tl.where(found > chosen, at, place)
        chosen = tl.maximum(chosen, found)
    top = tl.max(best, 0)
    first = tl.min(tl.where(best == top, lane, BLOCK), 0)
    lowest = tl.where(top == float("-inf"), 0.0, top)
    may = tl.max(chosen, 0)
    here = row * parts + part
    tl.store(numbers + 4 * here, top)
    tl.store(numbers + 4 * here + 1, tl.max(tl.where(lane == first, second, best), 0))
    tl.store(numbers + 4 * here + 2, tl.sum(total * tl.exp(best - lowest), 0))
    tl.store(numbers + 4 * here + 3, may)
    tl.store(places + here, tl.min(tl.where(chosen == may, place, vocabulary), 0))


@triton.jit
def _choose(numbers, places, token, chance, parts, PARTS: tl.constexpr):
    """A row's token, and its `Chance`, of what was found in its parts."""
    row, part = tl.program_id(0), tl.arange(0, PARTS)
    inside = part < parts
    here = row * parts + part
    best = tl.load(numbers + 4 * here, inside, float("-inf"))
    second = tl.load(numbers + 4 * here + 1, inside, float("-inf"))
    total = tl.load(numbers + 4 * here + 2, inside, 0.0)
    chosen = tl.load(numbers + 4 * here + 3, inside, float("-inf"))
    place = tl.load(places + here, inside, 0)
    top, may = tl.max(best, 0), tl.max(chosen, 0)
    first = tl.min(tl.where(best == top, part, PARTS), 0)
    below = tl.max(tl.where(part == first, second, best), 0)
    tl.store(token + row, tl.min(tl.where((chosen == may) & inside, place, 2**31 - 1), 0).to(tl.int64))
    tl.store(chance + 2 * row, may - top - tl.log(tl.sum(total * tl.exp(best - top), 0)))
    tl.store(chance + 2 * row + 1, top - below)


def choose(logits: torch.Tensor, bits: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's largest logit that `bits` allow, the first one of equals: its token (rows,), and its `Chance` by all logits, (rows, 2) in 32 bits.

    logits: (rows, vocabulary), contiguous, of any float; bits: (rows, words) of 32 bits each, contiguous, or None where every token may be chosen.
    """
    rows, vocabulary = logits.shape
    parts = triton.cdiv(vocabulary, SHARE)
    numbers, places = logits.new_empty(rows, parts, 4, dtype=torch.float32), logits.new_empty(rows, parts, dtype=torch.int32)
    token, chance = logits.new_empty(rows, dtype=torch.long), logits.new_empty(rows, 2, dtype=torch.float32)
    with torch.cuda.device_of(logits):
        _look[rows, parts](logits, bits, numbers, places, vocabulary, 0 if bits is None else bits.shape[1], SHARE=SHARE, BLOCK=BLOCK, num_warps=4)
        _choose[rows,](numbers, places, token, chance, parts, PARTS=triton.next_power_of_2(parts), num_warps=1)
    return token, chance
