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
from slm_swap.tuning.backends import choose_backend, decoder_of, fit_layers, linear_names
from slm_swap.tuning.checks import lora_reach
from slm_swap.tuning.fp8 import DOUBLED, Fp8Linear, columns_to_double, give_fp8_products, quantised, require_fp8, scaled_product
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


COLUMNS = torch.tensor([1, 5, 8, 21, 30, 40, 41, 63])


def test_doubled_columns_have_the_bits_of_two_floats():
    torch.manual_seed(0)
    x, weight = torch.randn(7, 64), torch.randn(48, 64)
    wanted = x[:, COLUMNS] @ weight[:, COLUMNS].t()
    alone = torch.zeros(7, 64).index_copy(1, COLUMNS, x[:, COLUMNS])
    found = {}
    for doubled in (None, COLUMNS):
        bits, scale = quantised(weight, doubled, of_weight=True)
        found[doubled is None] = apart(scaled_product(alone, bits.view(torch.int8), scale[:, 0], doubled).float(), wanted)
    assert found[False] < 5e-3 < 0.02 < found[True], "what bfloat16 rounds, not what 8 bits round"


def test_other_columns_stay_as_they_are():
    torch.manual_seed(0)
    x = torch.randn(7, 64)
    plain, longer, of_weight = quantised(x), quantised(x, COLUMNS), quantised(x, COLUMNS, of_weight=True)
    for bits, scale in (longer, of_weight):
        assert torch.equal(bits[:, :64].float(), plain[0].float()) and torch.equal(scale, plain[1])
    value, rest = of_weight[0][:, 64:].float().split(8, -1)
    assert torch.equal(longer[0][:, 64:].float(), torch.cat([rest, value], -1)), "each value meets the other's rest"
    assert torch.equal(value, plain[0].float()[:, COLUMNS]) and 0 < rest.abs().max() <= value.abs().max() / 16


@pytest.mark.parametrize("doubled", [None, COLUMNS[:8] % 32])
def test_rows_of_nothing_give_nothing(doubled):
    layer = Fp8Linear(torch.nn.Linear(32, 16, bias=False), doubled)
    assert torch.equal(layer(torch.zeros(3, 32)), torch.zeros(3, 16))


def layer_and_plain(bias: bool = True, doubled: torch.Tensor | None = COLUMNS) -> tuple[Fp8Linear, torch.nn.Linear]:
    torch.manual_seed(0)
    plain = torch.nn.Linear(64, 48, bias)
    return Fp8Linear(plain, doubled), plain.requires_grad_(False)


@pytest.mark.parametrize("doubled", [None, COLUMNS])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_and_its_gradient_are_nearly_those_of_its_weight(bias, doubled):
    x, direction, found = torch.randn(9, 64), torch.randn(9, 48), []
    for layer in layer_and_plain(bias, doubled):
        part = x.clone().requires_grad_()
        output = layer(part)
        found.append((output.float(), *torch.autograd.grad(output, part, direction)))
    assert 0 < apart(found[0][0], found[1][0]) < 0.06 and 0 < apart(found[0][1], found[1][1]) < 0.06


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_layers_compile_to_one_graph_with_the_same_gradients(kind):
    layers = torch.nn.Sequential(layer_and_plain()[0], Fp8Linear(torch.nn.Linear(48, 64))).to(kind)
    x = torch.randn(9, 64, dtype=kind, requires_grad=True)
    wanted = torch.autograd.grad(layers(x).square().sum(), x)[0]
    torch._dynamo.reset()
    compiled = torch.compile(layers, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(x).square().sum(), x)[0], wanted)
    assert wanted.norm() > 0


def test_a_cast_keeps_bits_and_scales():
    layer, _ = layer_and_plain()
    cast = copy.deepcopy(layer).bfloat16()
    assert torch.equal(cast.weight, layer.weight) and torch.equal(cast.transposed, layer.transposed)
    assert torch.equal(cast.scale, layer.scale) and torch.equal(cast.scale_back, layer.scale_back) and torch.equal(cast.doubled, layer.doubled)


def give(model, rows=None) -> int:
    return give_fp8_products(model, decoder_of(model), fit_layers(model), SAMPLE if rows is None else rows)


SAMPLE = [{"input_ids": list(range(3 + at, 43 + at))} for at in range(20)]


def test_columns_that_make_most_of_a_product_are_doubled():
    model = tiny_family("llama", hidden_size=512, num_hidden_layers=1)
    layers = {name: model.get_submodule(name) for name in fit_layers(model)}
    large = torch.arange(7, 512, 16)
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[large] = 40
        layers["model.layers.0.mlp.gate_proj"].weight[:, large - 1] *= 40
    found = columns_to_double(decoder_of(model), layers, SAMPLE)
    assert found.keys() == layers.keys() and len(large) == 512 // DOUBLED
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
        assert torch.equal(found[f"model.layers.0.{name}"], large), "by the input"
    assert torch.equal(found["model.layers.0.mlp.gate_proj"], large - 1), "by the weight"
    assert all(len(columns) % 8 == 0 for columns in found.values()), "a longer row still is of a size for tensor cores"
    assert not any(layer._forward_pre_hooks for layer in layers.values()), "nothing stays behind"


def test_a_token_with_large_values_does_not_choose_for_all_others():
    class Decoder(torch.nn.Module):
        device, unreached = torch.device("cpu"), torch.nn.Linear(256, 16)

        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(256, 16)
            torch.nn.init.ones_(self.layer.weight)

        def forward(self, input_ids, use_cache):
            x = torch.ones(*input_ids.shape, 256)
            x[..., 8:24] = 3  # for every token
            x[:, 0, 100:108] = 1e4  # for the first one
            self.layer(x)

    model = Decoder()
    found = columns_to_double(model, {"layer": model.layer, "unreached": model.unreached}, SAMPLE)
    assert found.keys() == {"layer"} and found["layer"].tolist() == list(range(8, 24))


def test_linear_layers_of_the_decoder_are_replaced_and_the_head_is_not():
    model = tiny_family("llama")
    assert give(model) == 14 and type(model.lm_head) is torch.nn.Linear
    mixed = tiny_family("falcon_h1")
    give(mixed)
    assert not any(isinstance(part, FrozenLinear) for name, part in mixed.named_modules() if name.endswith("out_proj")), "its kernels use the weight"
    with pytest.raises(UserError, match="is of a kind and size for products in fp8"):
        odd = tiny_family("llama", hidden_size=40, intermediate_size=24, num_attention_heads=5, num_key_value_heads=5)
        give(odd)


def loss_and_gradients(change) -> tuple[float, torch.Tensor]:
    model = load_model(BASE, "fp32", device_map={"": "cpu"})
    change(model)
    torch.manual_seed(1)
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules=linear_names(model), init_lora_weights=False, task_type="CAUSAL_LM"))
    ids = torch.arange(3, 83).reshape(2, 40)
    loss = tuned(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.item(), torch.cat([weight.grad.flatten() for weight in tuned.parameters() if weight.requires_grad])


def test_gradients_of_lora_are_nearly_those_in_full_precision(monkeypatch):
    def give_all(model):
        assert give(model) == MATRICES

    def emulated(x, weight, scale, doubled=None):
        rows, scales = quantised(x, doubled)
        return (rows.float() * scales) @ (weight.view(fp8.E4M3).float() * scale[:, None]).t()

    exact, found = loss_and_gradients(lambda _: None), loss_and_gradients(give_all)
    monkeypatch.setattr(fp8, "scaled_product", emulated)
    wanted = loss_and_gradients(give_all)
    assert found[0] == pytest.approx(exact[0], rel=0.02)
    assert apart(found[1], wanted[1]) < 0.06 and 0 < apart(found[1], exact[1]) < 0.2


def test_where_few_columns_make_most_of_a_product_doubling_them_makes_it_nearer():
    torch.manual_seed(0)
    x, plain = torch.randn(50, 64), torch.nn.Linear(64, 48, bias=False)
    x[:, COLUMNS] *= 20
    near, far = (apart(Fp8Linear(plain, doubled)(x), plain(x)) for doubled in (COLUMNS, None))
    assert near < far / 3


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
