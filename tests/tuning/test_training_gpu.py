"""Training on CUDA GPUs: attention for packs, both back ends and all precisions, resuming, two GPUs. No network, minutes."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from slm_swap.clients.int8 import Int8Linear
from slm_swap.clients.loading import load_model, load_tokenizer, with_adapter
from slm_swap.common.errors import UserError
from slm_swap.common.settings import PACKAGE, Settings
from slm_swap.rows.prompts import text_request
from slm_swap.slm_client import SLMClient
from slm_swap.tuning import fast_training
from slm_swap.tuning.checkpoints import Checkpoints
from slm_swap.tuning.model_checks import check_loss, check_packing
from slm_swap.tuning.packing import IGNORED, PackCollator, packed_rows
from slm_swap.tuning.tokens import tokenize
from tests.support.tiny_training import some_rows, tiny_family, tiny_model
from tests.support.training_rows import BASE, ROWS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
QUICK = ("--epochs", 6, "--learning-rate", "5e-3", "--batch-size", 4, "--gradient-accumulation", 1, "--lora-dropout", 0, "--compile", "no")
PACKED = ("--preset", "fast", "--pack-length", 2048, "--compile", "no", "--epochs", 24, "--learning-rate", "5e-3", "--lora-dropout", 0)


def needs(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}")


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_attention_restarts_at_each_row(kv_heads):
    torch.manual_seed(0)
    lengths, heads, size = [3, 64, 17, 200], 4, 64
    query, key, value = (torch.randn(1, count, sum(lengths), size, device="cuda", dtype=torch.bfloat16, requires_grad=True) for count in (heads, kv_heads, kv_heads))
    starts = torch.tensor([0, *lengths], device="cuda").cumsum(0).to(torch.int32)
    packed, _ = fast_training.varlen_attention(None, query, key, value, None, cu_seq_lens_q=starts, max_length_q=max(lengths))
    alone = [
        torch.nn.functional.scaled_dot_product_attention(*(part[:, :, begin:end] for part in (query, key, value)), is_causal=True, enable_gqa=True)
        for begin, end in pairwise(starts.tolist())
    ]  # fmt: skip
    wanted = torch.cat(alone, 2).transpose(1, 2)
    torch.testing.assert_close(packed, wanted, rtol=2e-2, atol=2e-2)
    direction = torch.randn_like(wanted)
    for part in (query, key, value):
        found, right = (torch.autograd.grad(out, part, direction, retain_graph=True)[0] for out in (packed, wanted))
        torch.testing.assert_close(found, right, rtol=5e-2, atol=5e-2)


def test_a_row_in_a_pack_has_the_loss_and_gradients_that_it_has_alone():
    rows, found = some_rows(), []
    (pack,) = packed_rows(rows, 256, seed=0)
    for packed in (False, True):
        model, base = tiny_model()
        model.to("cuda", torch.bfloat16)
        if packed:
            fast_training.give_completion_loss(base)
            base.set_attn_implementation(fast_training.VARLEN)
            batch = PackCollator.for_packs([pack], 256, pad_token=0)([pack])
            loss = model(**{name: part.cuda() if torch.is_tensor(part) else part for name, part in batch.items()}).loss
        else:
            parts = [{name: torch.tensor([values], device="cuda") for name, values in row.items()} for row in rows]
            loss = sum(model(**part).loss * (part["labels"] != IGNORED).sum() for part in parts)
        loss.backward()
        gradients = [weight.grad.float().flatten() for weight in model.parameters() if weight.requires_grad]
        found.append((loss.item(), torch.cat(gradients)))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-2)
    assert torch.nn.functional.cosine_similarity(found[0][1], found[1][1], dim=0) > 0.99
    assert found[1][1].norm().item() == pytest.approx(found[0][1].norm().item(), rel=5e-2)


@pytest.mark.parametrize(
    ("family", "refused"),
    [
        *((family, None) for family in ("llama", "mistral", "granite", "gemma3", "qwen3_moe")),
        ("gpt_oss", "has s_aux"), ("gemma2", "has softcap"), ("lfm2", "see each other"), ("qwen3_5", "see each other"),
    ],
)  # fmt: skip
def test_packing_is_checked_on_the_loaded_model(family, refused):
    model = tiny_family(family).to("cuda", torch.bfloat16)
    rows, attention = [row["input_ids"] for row in some_rows()], model.config._attn_implementation
    check_loss(model, rows[0])
    model.set_attn_implementation(fast_training.VARLEN)
    if refused is None:
        check_packing(model, rows, 256, attention)
    else:
        with pytest.raises(UserError, match=refused):
            check_packing(model, rows, 256, attention)


@pytest.fixture
def command(write_rows, tmp_path):
    """A function that gives train_unsloth.py's command line with some flags, and the adapter's folder."""
    write_rows("train.jsonl", [row.to_json() for row in ROWS])
    write_rows("val.jsonl", [row.to_json() for row in ROWS[:4]])

    def make(name: str, *flags: object, launcher=(sys.executable,)) -> tuple[list[str], Path]:
        files = ("--train", tmp_path / "train.jsonl", "--val", tmp_path / "val.jsonl", "--out", tmp_path / name)
        words = (*launcher, PACKAGE / "train_unsloth.py", "--track", "structured", "--model", BASE, *files, *flags)
        return [str(word) for word in words], tmp_path / name

    return make


def environment() -> dict[str, str]:
    return os.environ | {"LANGFUSE_DISABLED": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def run(words: list[str], out: Path) -> dict:
    done = subprocess.run(words, capture_output=True, text=True, env=environment(), timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.count("adapter:") == 1
    return json.loads((out / "training_info.json").read_text()) | {"out": str(out)}


def loss(model) -> float:
    """Of the validation rows' completions, all of which have the same length."""
    rows, *_ = tokenize(load_tokenizer(BASE), "structured", ROWS[:4], 2048)
    with torch.no_grad():
        parts = [{name: torch.tensor([values], device="cuda") for name, values in row.items()} for row in rows]
        return sum(model(**part).loss.item() for part in parts) / len(parts)


@pytest.mark.parametrize("backend", ["trl", "unsloth"])
@pytest.mark.parametrize("precision", ["int8", "nf4", "bf16", "fp8"])
def test_both_back_ends_train_on_every_precision(command, backend, precision):
    if backend == "unsloth":
        needs("unsloth")
    if precision == "fp8" and (backend == "unsloth" or torch.cuda.get_device_capability() < (8, 9)):
        pytest.skip("trains in fp8 on TRL alone, on Ada and Hopper")
    words, out = command("adapter", *QUICK, "--backend", backend, "--precision", precision)
    told = run(words, out)
    assert told["eval_loss"]["after"] < 0.5 * told["eval_loss"]["before"] and told["backend"] == backend
    assert told["peak_memory_gib"]["gpu"] > 0
    assert all("lora_" in name for name in load_file(out / "adapter_model.safetensors"))
    model = with_adapter(load_model(BASE, "bf16" if precision == "fp8" else precision, device_map={"": 0}), out, BASE).eval()
    assert loss(model) == pytest.approx(told["eval_loss"]["after"], rel=0.1, abs=0.02), "it is not the model that was trained"
    assert told["computed"]["step_packs"] == (backend == "trl") and (backend == "unsloth" or not told["computed"]["gradient_checkpointing"])


@pytest.mark.parametrize(("precision", "compiled"), [("int8", "no"), ("int8", "yes"), ("bf16", "yes"), ("nf4", "no")])
def test_the_documented_steps_are_the_same_in_packs(command, precision, compiled):
    steps = ("--epochs", 3, "--learning-rate", "1e-3", "--lora-dropout", 0, "--gradient-accumulation", 3, "--backend", "trl", "--precision", precision)
    packed = run(*command("packed", *steps, "--compile", compiled, "--pack-length", 400))
    alone = run(*command("alone", *steps, "--step-packs", "no"))
    assert packed["computed"]["step_packs"] and not alone["computed"]["step_packs"] and packed["steps"] == alone["steps"] == 9
    assert packed["eval_loss"]["after"] == pytest.approx(alone["eval_loss"]["after"], rel=0.05, abs=0.01)
    logs = [[json.loads(line) for line in (Path(told["out"]) / "training_log.jsonl").open()] for told in (packed, alone)]
    for point, other in zip(*logs, strict=True):
        assert point["loss"] == pytest.approx(other["loss"], rel=0.05, abs=0.01)


def big_layers(give, count: int = 4, size: int = 4096):
    """Linear layers of 32 MiB each in bfloat16, what `give` makes of them, and the bytes that a forward pass leaves allocated, compiled."""
    torch.manual_seed(0)
    plain = [torch.nn.Linear(size, size, bias=False, device="cuda", dtype=torch.bfloat16).requires_grad_(False) for _ in range(count)]
    model = torch.nn.Sequential(*map(give, plain))
    compiled, x = torch.compile(model, dynamic=False), torch.randn(64, size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    torch.autograd.grad(compiled(x).float().square().mean(), x)  # compiles
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    found = compiled(x)
    kept = torch.cuda.memory_allocated() - before
    wanted = torch.nn.Sequential(*plain)(x)
    gradients = [torch.autograd.grad(part.float().square().mean(), x)[0].float() for part in (found, wanted)]
    return kept, found.float(), wanted.float(), gradients


def apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


def quantised_as_bitsandbytes_does(layer: torch.nn.Linear) -> Int8Linear:
    from bitsandbytes.functional import int8_vectorwise_quant

    bits, scale, _ = int8_vectorwise_quant(layer.weight.half())
    return Int8Linear(bits, scale / 127, None)


def test_compiled_products_keep_8_bits_for_backward_and_are_near_the_exact_ones():
    torch._dynamo.reset()
    kept, found, wanted, gradients = big_layers(quantised_as_bitsandbytes_does)
    assert kept < 16 << 20, "not the weights in 16 bits, 128 MiB"
    assert apart(found, wanted) < 0.03 and apart(*gradients) < 0.03


@pytest.mark.parametrize("columns", [0, 128])
def test_products_in_fp8_are_near_the_exact_ones(columns):
    from slm_swap.tuning.fp8 import Fp8Linear, scaled_product

    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs Ada or Hopper")
    torch._dynamo.reset()
    doubled = torch.arange(5, 4096, 31, device="cuda")[:columns] if columns else None
    kept, found, wanted, gradients = big_layers(lambda layer: Fp8Linear(layer, doubled))
    assert kept < 16 << 20 and apart(found, wanted) < 0.15 and apart(*gradients) < 0.15
    if columns:
        plain = torch.nn.Linear(4096, 256, bias=False, device="cuda", dtype=torch.bfloat16)
        layer, x = Fp8Linear(plain, doubled), torch.randn(64, 4096, device="cuda", dtype=torch.bfloat16)
        x[:, doubled] *= 30
        wanted = plain(x).float()
        for product in (scaled_product, torch.compile(scaled_product)):
            found = product(x, layer.weight, layer.scale, layer.doubled).float()
            without = scaled_product(x, layer.weight[:, :4096].contiguous(), layer.scale).float()
            assert apart(found, wanted) < apart(without, wanted) / 3


@pytest.mark.parametrize("backend", ["trl", "unsloth"])
def test_rows_of_a_pack_do_not_see_each_other(command, backend):
    """They have one completion in common, so that the loss of a row that sees others is far lower."""
    if backend == "unsloth":
        needs("unsloth")
    told = run(*command("adapter", *PACKED, "--epochs", 1, "--backend", backend))
    assert told["eval_loss"]["before"] == pytest.approx(loss(load_model(BASE, "bf16", device_map={"": 0})), rel=0.02)


def test_the_adapter_of_packed_rows_is_loaded_and_was_measured_on_generated_replies(command):
    words, out = command("adapter", *PACKED, "--eval-steps", 12, "--eval-generate", 4, "--best-by", "exact_match_rate")
    told = run(words, out)
    assert told["hyperparameters"]["packing"] and told["metrics"]["after"]["exact_match_rate"] > told["metrics"]["before"]["exact_match_rate"]
    client = SLMClient(Settings(slm_model_path=str(BASE)), precision="bf16", adapter=out, max_new_tokens=48, engine="transformers")
    replies = client.generate([text_request("structured", row.prompt) for row in ROWS[:4]])
    right = sum(reply.text == row.completion for reply, row in zip(replies, ROWS, strict=False)) / 4
    assert right == pytest.approx(told["metrics"]["after"]["exact_match_rate"], abs=0.25)  # bf16 ties


def test_a_killed_run_goes_on_to_the_same_loss(command):
    flags = (*PACKED, "--save-steps", 3, "--eval-steps", 8)
    whole = run(*command("whole", *flags))
    words, out = command("killed", *flags)
    process, deadline = subprocess.Popen(words, env=environment(), stdout=subprocess.DEVNULL), time.monotonic() + 300
    while not Checkpoints(out).steps() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert Checkpoints(out).steps() and not out.exists(), "it was too fast to be killed"
    told = run([*words, "--resume"], out)
    assert told["steps"] == whole["steps"] and told["sessions"] == 2
    assert told["eval_loss"]["after"] == pytest.approx(whole["eval_loss"]["after"], rel=0.1, abs=0.01)


@pytest.mark.parametrize("deepspeed", [True, False])
@pytest.mark.parametrize("flags", [PACKED, QUICK])
def test_two_gpus_train_as_one_does(command, flags, deepspeed):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA GPUs")
    if deepspeed:
        needs("deepspeed")
    more = ("--deepspeed-config", "accelerate_config/deepspeed_zero2.json") if deepspeed else ()
    told = run(*command("two", *flags, "--backend", "trl", *more, launcher=TORCHRUN))
    assert told["processes"] == 2 and (told["deepspeed_sha256"] is not None) == deepspeed
    assert told["eval_loss"]["after"] < 0.5 * told["eval_loss"]["before"]
