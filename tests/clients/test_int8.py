"""bitsandbytes' 8-bit weights with products of our own: the same bits, exact products, 8 bits in memory."""

import copy
import sys
import threading

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition

from slm_swap.clients import int8
from slm_swap.clients.int8 import Int8Linear, dequantized, give_own_products
from slm_swap.clients.loading import load_model, with_adapter
from slm_swap.tuning.backends import linear_names, unfit_layers
from slm_swap.tuning.checks import lora_reach
from slm_swap.tuning.hyperparameters import Hyperparameters
from tests.support.training_rows import BASE, MATRICES

CPU = {"": torch.device("cpu")}
IDS = torch.arange(3, 83).reshape(2, 40)


def quantized(own: bool = True):
    model = load_model(BASE, "int8", device_map=CPU)
    assert not own or give_own_products(model) == MATRICES
    return model


def layer(outputs: int = 24, inputs: int = 16, bias: bool = True) -> Int8Linear:
    torch.manual_seed(0)
    weight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
    return Int8Linear(weight, torch.rand(outputs) / 100, torch.randn(outputs) if bias else None)


def plain(quantized: Int8Linear) -> torch.nn.Linear:
    found = torch.nn.Linear(quantized.in_features, quantized.out_features, quantized.bias is not None)
    found.weight.data = dequantized(quantized.weight, quantized.scale, torch.float32)
    if quantized.bias is not None:
        found.bias.data = quantized.bias.data.clone()
    return found.requires_grad_(False)


def with_lora(model):
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=4, target_modules=linear_names(model), init_lora_weights=False, task_type="CAUSAL_LM"))


def loss_and_gradients(model) -> tuple[float, torch.Tensor]:
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return loss.item(), torch.cat([weight.grad.float().flatten() for weight in model.parameters() if weight.requires_grad])


@pytest.mark.parametrize("bias", [True, False])
def test_a_product_and_its_gradient_are_those_of_the_dequantised_weight(bias):
    quantized, x = layer(bias=bias), torch.randn(3, 5, 16)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [one(part) for one, part in zip((quantized, plain(quantized)), inputs, strict=True)]
    torch.testing.assert_close(*outputs, rtol=0, atol=0)
    for output in outputs:
        output.square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=0, atol=0)
    assert quantized.weight.grad is None


def test_the_weights_are_those_of_bitsandbytes_to_the_bit():
    theirs, ours = quantized(own=False), quantized()
    plain = dict(load_model(BASE, "fp32", device_map=CPU).named_modules())
    names = [name for name, part in ours.named_modules() if isinstance(part, Int8Linear)]
    assert len(names) == MATRICES and not any("lm_head" in name for name in names)
    for name in names:
        quantized_by_them, found = theirs.get_submodule(name), ours.get_submodule(name)
        assert torch.equal(found.weight, quantized_by_them.weight.data) and torch.equal(found.scale, quantized_by_them.weight.SCB / 127)
        apart = (dequantized(found.weight, found.scale, torch.float32) - plain[name].weight).abs()
        assert (apart <= 0.51 * found.scale[:, None]).all(), "half a step, and what 16 bits have rounded before"


def test_a_model_that_has_made_products_is_taken_over_too():
    theirs = quantized(own=False)
    theirs(input_ids=IDS)
    give_own_products(theirs)
    torch.testing.assert_close(theirs(input_ids=IDS).logits, quantized()(input_ids=IDS).logits)


def test_lora_learns_as_over_dequantised_weights_and_nearly_as_over_llm_int8():
    ours = with_lora(quantized())
    exact = copy.deepcopy(ours).float()
    for module in exact.modules():
        if isinstance(getattr(module, "base_layer", None), Int8Linear):
            module.base_layer = plain(module.base_layer)
    theirs = with_lora(quantized(own=False))
    wanted, found, rounded = map(loss_and_gradients, (exact, copy.deepcopy(ours).float(), theirs))
    assert found[0] == pytest.approx(wanted[0], rel=1e-5)
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-3, atol=1e-5)
    in_16_bits = loss_and_gradients(ours)
    apart = [((gradients - wanted[1]).norm() / wanted[1].norm()).item() for _, gradients in (in_16_bits, rounded)]
    assert apart[0] < 0.03 and apart[1] < 0.06, apart


def kept_bytes(model, x) -> dict[torch.dtype, int]:
    """What a model's forward pass keeps for backward, by type."""
    kept: dict[torch.dtype, int] = {}

    def pack(tensor):
        kept[tensor.dtype] = kept.get(tensor.dtype, 0) + tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x).sum().backward()
    return kept


def test_kept_for_backward_are_8_bits_compiled_too():
    model, x = torch.nn.Sequential(layer(bias=False), torch.nn.ReLU(), layer(16, 24, bias=False)), torch.randn(1, 16, requires_grad=True)
    partition = aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph.forward), partition_fn=min_cut_rematerialization_partition)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=partition, fullgraph=True)
    compiled(x)
    for one in (model, compiled):
        kept = kept_bytes(one, x)
        assert kept[torch.int8] == 2 * 16 * 24 and kept[torch.float32] < 16 * 24, kept


def test_compiled_it_gives_the_same_by_the_kernel_of_backward_on_another_thread(monkeypatch):
    """A GPU's backward has a thread of its own, and dequantises by a compiled kernel within a compiled pass."""
    model, x = torch.nn.Sequential(layer(), torch.nn.ReLU(), layer(16, 24)), torch.randn(4, 16, requires_grad=True)

    def gradient(of) -> torch.Tensor:
        return torch.autograd.grad(of(x).square().sum(), x)[0]

    wanted, found = gradient(model), []
    fused = int8._fused_dequantized()
    monkeypatch.setattr(int8, "_weight_in", lambda weight, scale, dtype: fused(weight.detach(), scale, dtype))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    thread = threading.Thread(target=lambda: found.append(gradient(compiled)))
    thread.start()
    thread.join()
    torch.testing.assert_close(found[0], wanted)
    with torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(gradient(compiled), wanted)


def test_one_kernel_dequantises_weights_of_all_shapes():
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    fused = torch.compile(dequantized, dynamic=True, backend="aot_eager")
    for number in range(2, 14):
        weight = torch.nn.Parameter(torch.ones(16 * number, 48 - 2 * number, dtype=torch.int8), requires_grad=False)
        assert fused(weight.detach(), torch.ones(16 * number), torch.bfloat16).shape == weight.shape
    assert counters["stats"]["unique_graphs"] == 1, dict(counters["stats"])


def test_autocast_makes_products_in_16_bits():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = torch.randn(2, 16, requires_grad=True)
        found = layer()(x)
    found.float().sum().backward()
    assert found.dtype == torch.bfloat16 and x.grad.dtype == torch.float32


def test_a_cast_model_keeps_the_scales_in_32_bits():
    for cast in (lambda one: one.bfloat16(), lambda one: one.to(torch.bfloat16)):
        found = cast(layer())
        assert found.scale.dtype == torch.float32 and torch.equal(found.scale, layer().scale) and found.weight.dtype == torch.int8


def test_it_is_an_ordinary_model_to_peft(tmp_path):
    model = quantized()
    tuned = with_lora(model)
    assert linear_names(load_model(BASE, "bf16", device_map=CPU)) == sorted(tuned.peft_config["default"].target_modules)
    assert unfit_layers(model) == [] and lora_reach(tuned)["left_out"] == []
    tuned.save_pretrained(tmp_path)
    from safetensors.torch import load_file

    assert all("lora_" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    wanted = tuned(input_ids=IDS).logits
    torch.testing.assert_close(with_adapter(quantized(), tmp_path, BASE)(input_ids=IDS).logits, wanted)
    theirs = with_adapter(quantized(own=False), tmp_path, BASE)(input_ids=IDS).logits
    assert (theirs - wanted).norm() < 0.05 * wanted.norm(), "the adapter is as good for LLM.int8()"
    with pytest.raises(RuntimeError, match="can't be cast"):
        tuned.merge_adapter()


def test_documented_training_takes_it(tmp_path):
    from slm_swap.tuning.backends import load_trainable

    tuned = load_trainable(BASE, Hyperparameters(), "trl", torch.device("cpu"))
    assert sum(isinstance(part, Int8Linear) for part in tuned.modules()) == MATRICES
    assert {weight.dtype for weight in tuned.parameters() if weight.requires_grad} == {torch.float32}


@pytest.mark.parametrize("bias", [True, False])
def test_without_gradients_products_are_of_exact_weights(bias):
    """65 and more rows go another way on a GPU."""
    quantized = layer(bias=bias)
    with torch.inference_mode():
        for rows in (0, 1, 8, 65):
            x = torch.randn(rows, 16)
            wanted = x.double() @ (quantized.weight.double() * quantized.scale.double()[:, None]).T + (quantized.bias.double() if bias else 0)
            torch.testing.assert_close(quantized(x).double(), wanted, rtol=1e-5, atol=1e-5)
            assert quantized(x.bfloat16()).dtype == torch.bfloat16


def test_a_gpu_without_triton_is_told_in_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "slm_swap.clients.int8_kernels", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an old GPU")
    assert int8._kernels.__wrapped__(torch.device("cpu")) is None
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "do not run on an old GPU" in told and "triton" in told and "plain torch" in told
