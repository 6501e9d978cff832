"""RMSNorms by torch's fused kernel: the same numbers up to rounding, and of no other kind of norm."""

import pytest
import torch

from slm_swap.clients.engines.norms import fused_norms, plain_norms


class PlainRMSNorm(torch.nn.Module):
    """As Llama, Phi-3 and Qwen have it."""

    def __init__(self, size: int):
        super().__init__()
        self.weight, self.variance_epsilon = torch.nn.Parameter(torch.randn(size)), 1e-5

    def forward(self, x):
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)).to(x.dtype)


class OneMoreRMSNorm(PlainRMSNorm):
    """As Gemma has it."""

    def forward(self, x):
        return super().forward(x) + super().forward(x) / self.weight


class HalvingNorm(PlainRMSNorm):
    """Of another name."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_norms_are_fused_and_come_back(dtype):
    model = torch.nn.Sequential(PlainRMSNorm(64), OneMoreRMSNorm(64), HalvingNorm(64), torch.nn.Linear(64, 64), PlainRMSNorm(64)).to(dtype)
    own = model[4].forward
    model[4].forward = lambda x: own(x)  # someone else's, as accelerate puts it there
    norms = plain_norms(model)
    assert [module for module, _ in norms] == [model[0]]
    x = torch.randn(3, 5, 64, dtype=dtype)
    wanted = model[0](x)
    with pytest.raises(KeyError), fused_norms(norms):
        assert model[0].forward is norms[0][1]
        assert torch.allclose(model[0](x).float(), wanted.float(), rtol=1e-6 if dtype == torch.float32 else 2**-6, atol=1e-6)
        raise KeyError
    assert "forward" not in vars(model[0]) and torch.equal(model[0](x), wanted)


def test_a_norm_of_zeros_is_not_taken_for_one_that_adds_one():
    model = torch.nn.Sequential(OneMoreRMSNorm(16))
    with torch.no_grad():
        model[0].weight.fill_(1e-3)  # as Gemma's before it has learned: near 0
    assert not plain_norms(model)


def test_numbers_of_another_type_than_the_weights_stay_with_the_norm_itself():
    """Weights that are kept in 32 bits give 32 bits; the kernel would give what it was given."""
    model = torch.nn.Sequential(PlainRMSNorm(64))
    x = torch.randn(3, 64).bfloat16()
    wanted = model(x)
    with fused_norms(plain_norms(model)):
        assert "forward" in vars(model[0]) and model(x).dtype == wanted.dtype == torch.float32
        assert torch.equal(model(x), wanted)


class GatedRMSNorm(PlainRMSNorm):
    """As some hybrid models have it."""

    def forward(self, x, gate):
        return super().forward(x) * gate


class HeadsRMSNorm(PlainRMSNorm):
    """With weights for each head."""

    def __init__(self, heads: int, size: int):
        super().__init__(size)
        self.weight = torch.nn.Parameter(torch.randn(heads, size))


def test_norms_that_take_other_inputs_are_left_alone():
    model = torch.nn.Sequential(GatedRMSNorm(16), HeadsRMSNorm(3, 16), PlainRMSNorm(16))
    assert [module for module, _ in plain_norms(model)] == [model[2]]
