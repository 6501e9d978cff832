"""Triton's kernels of 8-bit weights, on a GPU; without one under TRITON_INTERPRET=1, whose interpreter has no products in bfloat16."""

import os

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="needs a CUDA GPU, or TRITON_INTERPRET=1")]

from slm_swap.clients import int8_kernels
from slm_swap.clients.int8 import Int8Linear, dequantized

ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-23}  # of one number to a type, in its own size
TYPES = [torch.float16, torch.float32] if INTERPRETED else list(ROUNDING)
SIZES = [(40, 48), (33, 257), (96, 512), (70, 300), (65, 6200), (33, 6144), *([] if INTERPRETED else [(8200, 512), (3072, 8192)])]  # (out, in)
on_gpu = pytest.mark.skipif(INTERPRETED, reason="needs a CUDA GPU")


def layer(outputs: int, inputs: int, bias: bool, dtype: torch.dtype) -> Int8Linear:
    torch.manual_seed(0)
    weight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
    made = Int8Linear(weight, torch.rand(outputs) / 1000, torch.randn(outputs).to(dtype) if bias else None)
    return made.to(DEVICE)


def few_rows(x: torch.Tensor, of: Int8Linear) -> torch.Tensor:
    return int8_kernels.few_rows(x, of.weight, of.scale, of.bias)


def assert_near(found: torch.Tensor, x: torch.Tensor, of: Int8Linear, rounding: float, weight: torch.Tensor | None = None):
    """By what sums in 32 bits may lose, and by one rounding of the result, of its product with `weight` if that is given."""
    x, weight = x.double(), of.weight.double() * of.scale.double()[:, None] if weight is None else weight.double()
    wanted = x @ weight.T + (0 if of.bias is None else of.bias.double())
    apart = (found.double() - wanted).abs()
    assert (apart <= rounding * wanted.abs() + 1e-5 * (x.abs() @ weight.abs().T) + 1e-7).all(), apart.max()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("outputs", "inputs"), SIZES)
def test_few_rows_are_those_of_exact_arithmetic(outputs, inputs, bias, dtype):
    of = layer(outputs, inputs, bias, dtype)
    for rows in (1, 3, 8, 16, 17, 64):
        x = torch.randn(rows, inputs).to(DEVICE, dtype)
        found = few_rows(x, of)
        assert found.dtype == dtype and found.shape == (rows, outputs)
        assert_near(found, x, of, ROUNDING[dtype])


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("outputs", "inputs"), SIZES)
def test_a_row_is_the_same_to_the_bit_whatever_the_others_are(outputs, inputs, dtype):
    of, x = layer(outputs, inputs, True, dtype), torch.randn(64, inputs).to(DEVICE, dtype)
    wanted = few_rows(x, of)
    for part in (slice(0, 1), slice(5, 8), slice(0, 16), slice(3, 20), slice(20, 53)):
        assert torch.equal(few_rows(x[part].clone(), of), wanted[part]), part
    assert torch.equal(few_rows(x.flip(0), of), wanted.flip(0))


def test_whole_numbers_are_multiplied_and_added_exactly():
    of = Int8Linear(torch.arange(-127, 128, dtype=torch.int8).repeat(3, 1), torch.tensor([1.0, 2.0, 0.5]), torch.tensor([0.0, 1.0, -1.0])).to(DEVICE)
    x = torch.stack([torch.ones(255), torch.arange(255) % 2]).to(DEVICE)
    # -127 to 127 add up to 0, and the odd places -126, -124, ..., 126 too
    assert few_rows(x, of).tolist() == [[0.0, 1.0, -1.0]] * 2
    assert few_rows(x * torch.arange(255, device=DEVICE).ge(127), of).tolist() == [[8128.0, 16257.0, 4063.0], [4032.0, 8065.0, 2015.0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32] if INTERPRETED else TYPES, ids=str)
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (37, 1100), (64, 2048)])
def test_a_dequantised_weight_is_torch_s_to_the_bit(outputs, inputs, dtype):
    of = layer(outputs, inputs, False, dtype)
    assert torch.equal(int8_kernels.dequantised(of.weight, of.scale, dtype), dequantized(of.weight, of.scale, dtype))


@on_gpu
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_layer_s_products_of_any_number_of_rows(dtype):
    of = layer(96, 512, True, dtype)
    with torch.inference_mode():
        for shape in ((1, 512), (8, 1, 512), (2, 32, 512), (65, 512), (3, 100, 512)):
            x = torch.randn(shape).to(DEVICE, dtype)
            found = of(x)
            assert found.dtype == dtype and found.shape == (*shape[:-1], 96)
            few = x.numel() <= int8_kernels.FEW * 512
            assert_near(found, x, of, 2 * ROUNDING[dtype], None if few else dequantized(of.weight, of.scale, dtype))  # of many rows, the weight is rounded too
        assert of(torch.ones(0, 512, device=DEVICE, dtype=dtype)).shape == (0, 96)
        apart = torch.randn(512, 8).to(DEVICE, dtype).t()
        assert torch.equal(of(apart), of(apart.contiguous())), "rows that do not lie one after the other"


@on_gpu
@pytest.mark.parametrize("rows", [8, 32, 128])
@pytest.mark.parametrize(("outputs", "inputs"), [(3072, 3072), (3072, 8192), (16384, 3072)])
def test_captured_products_are_the_same(outputs, inputs, rows):
    of, x = layer(outputs, inputs, False, torch.bfloat16), torch.randn(rows, inputs).to(DEVICE, torch.bfloat16)
    with torch.inference_mode():
        of(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = of(x)
        x.copy_(torch.randn(rows, inputs))
        graph.replay()
        assert torch.equal(found, of(x))
