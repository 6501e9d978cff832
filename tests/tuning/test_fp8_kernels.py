"""The Triton kernel of rows in 8-bit floats, on a GPU; without one under TRITON_INTERPRET=1."""

import os

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
ABLE = INTERPRETED or (torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9))
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not ABLE, reason="needs an Ada or Hopper GPU, or TRITON_INTERPRET=1")]

from slm_swap.tuning import fp8_kernels
from slm_swap.tuning.fp8 import E4M3, LARGEST, quantised

TYPES = [torch.float32, torch.bfloat16, torch.float16]


def scaled_rows(x, doubled):
    if INTERPRETED:
        return fp8_kernels.launch(fp8_kernels.scaled_rows_kernel, x, doubled)
    return fp8_kernels.scaled_rows(x, doubled)


def parts_of(count: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """8-bit floats (count, size), of which the largest there is is in each row, and rests (count, size) that round to nothing beside them, and are exact themselves."""
    torch.manual_seed(0)
    power = 2.0 ** torch.randint(0, 5, (count, size))
    whole, rest = torch.randint(9, 15, (count, size)) * power, torch.tensor([-0.375, -0.25, 0.25, 0.375])[torch.randint(4, (count, size))] * power
    whole, rest = (part * torch.randint(-1, 2, (count, size)) for part in (whole, rest))
    rest[whole == 0] = 0
    whole[:, size // 2], rest[:, size // 2] = LARGEST, 0
    return whole.to(DEVICE), rest.to(DEVICE)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("size", "columns"), [(64, 0), (64, 8), (40, 8), (3072, 192), (8192, 512), (16384, 0)])
def test_rows_are_8_bit_floats_and_what_they_round_away(size, columns, dtype):
    (whole, rest), factor = parts_of(9, size), 2.0 ** torch.arange(-6, 3, device=DEVICE)[:, None]
    doubled = torch.randperm(size)[:columns].sort().values.to(DEVICE) if columns else None
    x = ((whole + rest) * factor).to(dtype)
    assert torch.equal(x.float(), (whole + rest) * factor), "all of it is exact"
    bits, scale = scaled_rows(x, doubled)
    assert bits.dtype == E4M3 and torch.equal(scale, factor)
    wanted = torch.cat([whole, rest[:, doubled], whole[:, doubled]], -1) if columns else whole
    assert torch.equal(bits.float(), wanted)
    assert torch.equal(quantised(x, doubled)[0].float(), wanted), "as in plain torch"


def test_a_row_of_nothing_and_one_that_is_no_number():
    x = torch.zeros(2, 64, device=DEVICE)
    x[1, 3] = torch.nan
    doubled = torch.arange(8, device=DEVICE)
    bits, scale = scaled_rows(x, doubled)
    assert torch.equal(bits[0].float(), torch.zeros(80, device=DEVICE)) and scale[0] > 0
    assert scale[1].isnan() and quantised(x)[1][1].isnan(), "it is not hidden"


def test_a_part_of_a_larger_tensor_is_read_as_it_is():
    whole, rest = parts_of(8, 128)
    x = (whole + rest).t()[:, 2:6]
    assert torch.equal(scaled_rows(x, None)[0].float(), scaled_rows(x.contiguous(), None)[0].float())


@pytest.mark.skipif(INTERPRETED, reason="the interpreter rounds to 8 bits in a way of its own")
@pytest.mark.parametrize("columns", [0, 192])
def test_random_rows_are_rounded_as_plain_torch_does(columns):
    x = torch.randn(64, 3072, device=DEVICE, dtype=torch.bfloat16)
    doubled = torch.arange(0, 3072, 16, device=DEVICE) if columns else None
    (bits, scale), (wanted, wanted_scale) = scaled_rows(x, doubled), quantised(x, doubled)
    assert torch.equal(scale, wanted_scale)
    assert (bits.float() != wanted.float()).float().mean() < 1e-3, "a quotient may be apart in its last bit, and then be rounded elsewhere"
