"""Triton's kernels that choose a token, on a GPU; without one under TRITON_INTERPRET=1."""

import os

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="needs a CUDA GPU, or TRITON_INTERPRET=1")]

from slm_swap.clients.engines.captured import chances_of
from slm_swap.clients.engines.choice_kernels import choose
from slm_swap.clients.engines.masks import masked

TYPES = [torch.float16, torch.float32] if INTERPRETED else [torch.bfloat16, torch.float16, torch.float32]


def random_bits(rows: int, vocabulary: int) -> torch.Tensor:
    bits = torch.randint(-(2**31), 2**31, (rows, -(-vocabulary // 32)), dtype=torch.int32, device=DEVICE)
    bits[:, 0] |= 1
    return bits


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 2), (3, 50), (2, 8192), (1, 8193), (8, 20_064), (5, 32_768)])
@pytest.mark.parametrize("bound", [False, True])
def test_tokens_and_chances_are_those_of_plain_torch(rows, vocabulary, dtype, bound):
    torch.manual_seed(0)
    logits = (8 * torch.randn(rows, vocabulary, device=DEVICE)).to(dtype)  # in 16 bits many are alike
    bits = random_bits(rows, vocabulary) if bound else None
    token, chance = choose(logits, bits)
    allowed = masked(logits, bits) if bound else logits
    wanted = (allowed == allowed.amax(-1, keepdim=True)).int().argmax(-1)  # the first one of equals
    assert torch.equal(token, wanted) and token.dtype == torch.long
    torch.testing.assert_close(chance, chances_of(logits, wanted), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bound", [False, True])
def test_a_row_is_the_same_to_the_bit_whatever_the_others_are(bound):
    torch.manual_seed(0)
    logits = torch.randn(8, 20_064, device=DEVICE)
    bits = random_bits(8, 20_064) if bound else None
    whole = choose(logits, bits)
    for row in range(8):
        alone = choose(logits[row : row + 1].clone(), bits[row : row + 1].clone() if bound else None)
        assert all(torch.equal(one[0], all_[row]) for one, all_ in zip(alone, whole, strict=True))


def test_tokens_that_cannot_come_have_no_part():
    logits = torch.full((2, 9000), -torch.inf, device=DEVICE)
    logits[0, [3, 8999]] = torch.tensor([1.0, 2.0], device=DEVICE)
    logits[1, 8500] = 5.0
    token, chance = choose(logits, None)
    assert token.tolist() == [8999, 8500]
    assert chance[0].tolist() == pytest.approx([-0.31326, 1.0], abs=1e-5) and chance[1].tolist() == [0.0, torch.inf]


def test_the_only_token_allowed_is_taken():
    logits = torch.tensor([[4.0, 1.0, -3.0]], device=DEVICE)
    token, chance = choose(logits, torch.tensor([[4]], dtype=torch.int32, device=DEVICE))
    assert token.tolist() == [2] and chance[0, 1].item() == 3.0 and chance[0, 0].item() == pytest.approx(-7.04949, abs=1e-4)
