"""A base with products in 8-bit floats, by torch's own kernels, which CPUs have too."""

import copy
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from slm_swap.clients.int8 import FrozenLinear
from slm_swap.clients.loading import load_model, with_adapter
from slm_swap.common.errors import UserError
from slm_swap.tuning import fp8
from slm_swap.tuning.backends import choose_backend, fit_layers, linear_names
from slm_swap.tuning.checks import lora_reach
from slm_swap.tuning.fp8 import Fp8Linear, give_fp8_products, quantised, require_fp8, scaled_product
from slm_swap.tuning.training import train
from tests.support.tiny_training import tiny_family
from tests.support.training_rows import BASE, INPUTS, MATRICES, QUICK, ROWS


@pytest.fixture(autouse=True)
def able():
    try:
        require_fp8(torch.device("cpu"))
    except UserError as reason:
        pytest.skip(str(reason))


def apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("shape", [(7, 64), (2, 5, 64)])
def test_a_product_is_that_of_rounded_rows(shape):
    torch.manual_seed(0)
    x, weight = torch.randn(shape) * torch.logspace(-3, 3, shape[-2])[:, None], torch.randn(48, 64) * torch.logspace(-2, 2, 48)[:, None]
    bits, scale = quantised(weight)
    found = scaled_product(x, bits.view(torch.int8), scale[:, 0]).float()
    rounded = [part.float() * factor for part, factor in (quantised(x.flatten(0, -2)), (bits, scale))]
    wanted = (rounded[0] @ rounded[1].t()).unflatten(0, shape[:-1])
    for row, other in zip(found.flatten(0, -2), wanted.flatten(0, -2), strict=True):
        assert apart(row, other) < 5e-3, "what bfloat16 rounds"
    for row, other in zip(found.flatten(0, -2), (x @ weight.t()).flatten(0, -2), strict=True):
        assert apart(row, other) < 0.1, "large and small rows alike"


def test_rows_of_nothing_give_nothing():
    layer = Fp8Linear(torch.nn.Linear(32, 16, bias=False))
    assert torch.equal(layer(torch.zeros(3, 32)), torch.zeros(3, 16))


def layer_and_plain(bias: bool = True) -> tuple[Fp8Linear, torch.nn.Linear]:
    torch.manual_seed(0)
    plain = torch.nn.Linear(64, 48, bias)
    return Fp8Linear(plain), plain.requires_grad_(False)


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_and_its_gradient_are_nearly_those_of_its_weight(bias):
    x, direction, found = torch.randn(9, 64), torch.randn(9, 48), []
    for layer in layer_and_plain(bias):
        part = x.clone().requires_grad_()
        output = layer(part)
        found.append((output.float(), *torch.autograd.grad(output, part, direction)))
    assert 0 < apart(found[0][0], found[1][0]) < 0.06 and 0 < apart(found[0][1], found[1][1]) < 0.06


def test_it_compiles_to_one_graph_with_the_same_values():
    layer, _ = layer_and_plain()
    x = torch.randn(9, 64, requires_grad=True)
    wanted = torch.autograd.grad(layer(x).square().sum(), x)[0]
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(x).square().sum(), x)[0], wanted)


def test_a_cast_keeps_bits_and_scales():
    layer, _ = layer_and_plain()
    cast = copy.deepcopy(layer).bfloat16()
    assert torch.equal(cast.weight, layer.weight) and torch.equal(cast.transposed, layer.transposed)
    assert torch.equal(cast.scale, layer.scale) and torch.equal(cast.scale_back, layer.scale_back)


def test_linear_layers_of_the_decoder_are_replaced_and_the_head_is_not():
    model = tiny_family("llama")
    assert give_fp8_products(model, fit_layers(model)) == 14 and type(model.lm_head) is torch.nn.Linear
    mixed = tiny_family("falcon_h1")
    give_fp8_products(mixed, fit_layers(mixed))
    assert not any(isinstance(part, FrozenLinear) for name, part in mixed.named_modules() if name.endswith("out_proj")), "its kernels use the weight"
    with pytest.raises(UserError, match="is of a kind and size for products in fp8"):
        odd = tiny_family("llama", hidden_size=40, intermediate_size=24, num_attention_heads=5, num_key_value_heads=5)
        give_fp8_products(odd, fit_layers(odd))


def loss_and_gradients(give) -> tuple[float, torch.Tensor]:
    model = load_model(BASE, "fp32", device_map={"": "cpu"})
    give(model)
    torch.manual_seed(1)
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules=linear_names(model), init_lora_weights=False, task_type="CAUSAL_LM"))
    ids = torch.arange(3, 83).reshape(2, 40)
    loss = tuned(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.item(), torch.cat([weight.grad.flatten() for weight in tuned.parameters() if weight.requires_grad])


def test_gradients_of_lora_are_nearly_those_in_full_precision(monkeypatch):
    def give(model):
        assert give_fp8_products(model, fit_layers(model)) == MATRICES

    def emulated(x, weight, scale):
        rows, scales = quantised(x)
        return (rows.float() * scales) @ (weight.view(fp8.E4M3).float() * scale[:, None]).t()

    exact, found = loss_and_gradients(lambda _: None), loss_and_gradients(give)
    monkeypatch.setattr(fp8, "scaled_product", emulated)
    wanted = loss_and_gradients(give)
    assert found[0] == pytest.approx(exact[0], rel=0.02)
    assert apart(found[1], wanted[1]) < 0.06 and 0 < apart(found[1], exact[1]) < 0.2


def test_training_learns_and_the_adapter_is_for_16_bits(tmp_path):
    info = train("structured", BASE, ROWS, ROWS[:2], tmp_path / "adapter", replace(QUICK, precision="fp8"), "trl", INPUTS)
    assert info["products"] == "fp8" and info["eval_loss"]["after"] < 0.5 * info["eval_loss"]["before"] and info["lora"]["left_out"] == []
    model = with_adapter(load_model(BASE, "bf16", device_map={"": "cpu"}), tmp_path / "adapter", BASE)
    assert {weight.dtype for name, weight in model.named_parameters() if "lora_" in name} == {torch.float32} and lora_reach(model)["share"] > 0.5


def test_what_cannot_multiply_so_is_refused_in_a_line(monkeypatch):
    with pytest.raises(UserError, match="--backend unsloth does not train in fp8"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        choose_backend("unsloth", precision="fp8")
    assert choose_backend("auto", precision="fp8") == "trl"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA GeForce RTX 3090")
    with pytest.raises(UserError, match=r"needs an Ada or Hopper GPU .*, and this is NVIDIA GeForce RTX 3090: use --precision bf16"):
        require_fp8(torch.device("cuda:0"))

    def fail(*_, **__):
        raise NotImplementedError("no such kernel\nsee there")

    monkeypatch.setattr(fp8, "scaled_product", fail)
    with pytest.raises(UserError, match=r"makes no products in fp8 on a CPU \(no such kernel\): use --precision bf16"):
        require_fp8(torch.device("cpu"))
