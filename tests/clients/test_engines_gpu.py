"""The engines on a CUDA GPU: captured decoding, quantized weights, vLLM."""

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from slm_swap.clients.engines import Workload
from slm_swap.clients.engines.captured import CHECK_EVERY
from slm_swap.common.errors import UserError
from slm_swap.common.reports import write_jsonl
from slm_swap.common.settings import PACKAGE, Settings
from slm_swap.rows.prompts import text_request
from slm_swap.slm_client import SLMClient, in_form
from slm_swap.tuning.training import train
from tests.support import local_runs
from tests.support.processes import free_port
from tests.support.tool_requests import GRAMMAR_ROWS, ask
from tests.support.training_rows import BASE, INPUTS, QUICK
from tests.support.training_rows import ROWS as TAUGHT

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vllm")
SETTINGS = Settings(slm_model_path="models/phi-tiny")
CITIES = ("Oslo", "Lima", "Rome", "Kyoto", "Quito", "Accra", "Porto", "Turin", "Nantes", "Bergen", "Malmo")
ROWS = [ask(f"{text} {city}", 1 + number % 2) for text in ("Check the weather in", "Check weather for") for number, city in enumerate(CITIES)]


@pytest.fixture(autouse=True)
def exact():
    """No TF32: fp32 replies do not depend on how they are computed then, but for ties."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def client(**options) -> SLMClient:
    return SLMClient(SETTINGS, max_new_tokens=40, workload=Workload(len(ROWS), 1024), **options)


def texts(asked: SLMClient, rows: list = ROWS) -> list[tuple[str, str, int]]:
    replies = asked.generate(rows)
    asked.close()
    return [(reply.text, reply.finish_reason, reply.output_tokens) for reply in replies]


def agreement(left: list, right: list) -> float:
    """The share of equal replies; ties may be broken either way."""
    return sum(one == other for one, other in zip(left, right, strict=True)) / len(left)


@pytest.fixture(scope="module")
def launched() -> list:
    """Replies by steps that are launched one by one."""
    asked = client(engine="transformers", precision="fp32")
    asked.engine._captured = None
    return texts(asked)


@pytest.mark.parametrize("size", [8, 32, "auto"])
def test_captured_steps_give_the_same_replies(launched, size):
    asked = client(engine="transformers", precision="fp32", batch_size=size)
    assert asked.engine._captured is not None
    assert texts(asked) == launched
    assert any(step.graph is not None for step in asked.engine._captured._steps.values())


def test_batches_of_eight_tell_what_auto_would_take():
    taken = {}
    for size in (8, "auto"):
        asked = client(engine="transformers", precision="bf16", batch_size=size)
        texts(asked)
        taken[size] = asked.describe()
    assert taken[8]["batch_size_used"] == 8 and taken[8]["batch_size_fits"] == taken["auto"]["batch_size_used"] > 8
    assert "batch_size_fits" not in taken["auto"]


@pytest.mark.parametrize("size", [4, 32])
def test_captured_steps_give_the_same_chances(size):
    """Also of rows that go on in a smaller batch."""
    asked = client(engine="transformers", precision="fp32", batch_size=size)
    captured = [reply.confidence for reply in asked.generate(ROWS)]
    assert any(step.graph is not None for step in asked.engine._captured._steps.values())
    asked.engine._captured = None
    assert captured == [pytest.approx(reply.confidence, abs=1e-3) for reply in asked.generate(ROWS)]
    asked.close()


@vllm
def test_vllm_gives_nearly_the_same_chances():
    """Its attention is no exact one in 32 bits on a GPU; on a CPU it is: test_vllm_cpu."""
    replies = []
    for engine in ("transformers", "vllm"):
        asked = client(engine=engine, precision="fp32")
        replies.append(asked.generate(ROWS))
        asked.close()
    same = [pair for pair in zip(*replies, strict=True) if pair[0].text == pair[1].text]
    assert len(same) > 0.8 * len(ROWS) and all(one.confidence == pytest.approx(other.confidence, abs=0.1) for one, other in same)


@pytest.mark.parametrize("size", [4, 32])
def test_captured_steps_keep_to_grammars(size):
    asked = client(engine="transformers", precision="fp32", batch_size=size, constrain="always")
    captured = asked.generate(GRAMMAR_ROWS)
    assert any(step.forward is not None for step in asked.engine._captured._steps.values())
    asked.engine._captured = None
    launched = asked.generate(GRAMMAR_ROWS)
    asked.close()
    assert [reply.text for reply in captured] == [reply.text for reply in launched]
    assert all(reply.constrained and in_form(request, reply) for request, reply in zip(GRAMMAR_ROWS, captured, strict=True))


@vllm
@pytest.mark.parametrize("way", ["retry", "always"])
def test_vllm_keeps_to_grammars(way):
    made = {}
    for engine in ("transformers", "vllm"):
        asked = client(engine=engine, precision="fp32", constrain=way)
        made[engine] = asked.generate(GRAMMAR_ROWS)
        asked.close()
    assert all(in_form(request, reply) for request, reply in zip(GRAMMAR_ROWS, made["vllm"], strict=True))
    assert agreement(*[[(reply.text, reply.constrained) for reply in replies] for replies in made.values()]) > 0.8


def test_longrope_is_captured_within_the_first_context(tmp_path):
    """Phi-4-mini's own rotary embedding, on random weights: the same numbers with and without graphs."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(BASE)
    config.max_position_embeddings, config.original_max_position_embeddings, config.sliding_window = 8192, 1024, 8190
    factors = config.hidden_size // config.num_attention_heads * 3 // 4 // 2
    config.rope_parameters = {
        "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75, "original_max_position_embeddings": 1024,
        "short_factor": [1.0] * factors, "long_factor": [4.0] * factors,
    }  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(BASE).save_pretrained(tmp_path)
    asked = SLMClient(SETTINGS, model=tmp_path, precision="fp32", engine="transformers", max_new_tokens=40)
    assert asked.engine._captured.fits(1024 - CHECK_EVERY) and not asked.engine._captured.fits(1025 - CHECK_EVERY)
    captured = texts(asked)
    assert any(step.graph is not None for step in asked.engine._captured._steps.values())
    asked.engine._captured = None
    assert texts(asked) == captured


@pytest.mark.parametrize("precision", ["nf4", "int8"])
def test_captured_steps_of_quantized_weights_give_the_same_replies(precision):
    asked = client(engine="transformers", precision=precision)
    captured = texts(asked)
    assert any(step.graph is not None for step in asked.engine._captured._steps.values())
    asked.engine._captured = None
    assert agreement(captured, texts(asked)) > 0.8  # in 16 bits there are more ties


@vllm
@pytest.mark.parametrize("start", ["eager", "graphs"])
def test_vllm_gives_the_same_replies(launched, start):
    assert agreement(texts(client(engine="vllm", precision="fp32", engine_start=start)), launched) > 0.8


@vllm
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_vllm_runs_in_each_precision(precision):
    asked = client(engine="vllm", precision=precision)
    assert (asked.describe()["engine"], asked.describe()["precision"]) == ("vllm", precision)
    assert all(tokens > 3 for _, _, tokens in texts(asked))


@vllm
def test_both_engines_take_an_adapter(tmp_path):
    """It was taught that walls are painted white whatever is asked for, which the base does not know."""
    pytest.importorskip("trl")
    train("structured", BASE, TAUGHT, TAUGHT[:1], tmp_path / "adapter", replace(QUICK, precision="bf16", epochs=8), "trl", INPUTS)
    asked = [text_request("structured", row.prompt) for row in TAUGHT]
    for engine in ("transformers", "vllm"):
        right = []
        for adapter in (None, tmp_path / "adapter"):
            replies = texts(client(engine=engine, precision="bf16", adapter=adapter), asked)
            right.append(sum(text == row.completion for (text, *_), row in zip(replies, TAUGHT, strict=True)))
        assert right[0] < 3 and right[1] > 6, engine


@vllm
def test_vllm_has_no_adapters_in_32_bits(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"r": 8}')
    with pytest.raises(UserError, match="no adapters in fp32"):
        client(engine="vllm", precision="fp32", adapter=tmp_path)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
@pytest.mark.parametrize("engine", ["transformers", pytest.param("vllm", marks=vllm)])
def test_two_gpus_end_in_the_report_of_one(engine, tmp_path):
    """By the wrapper, and by accelerate with the configuration for two GPUs."""
    write_jsonl(tmp_path / "rows.jsonl", local_runs.ROWS)
    gpus = (os.environ.get("CUDA_VISIBLE_DEVICES") or "0,1").split(",")[:2]
    known = os.environ | {"LANGFUSE_DISABLED": "1", "SLM_MODEL_PATH": "models/phi-tiny", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    accelerate = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", "accelerate_config/phi4_2gpu.yaml"]
    commands = {
        "one": ([sys.executable, "01_eval/eval.py"], gpus[:1]),
        "wrapper": (["./eval_parallel.sh"], gpus),
        "accelerate": ([*accelerate, "--main_process_port", str(free_port()), "01_eval/eval.py"], gpus),
    }
    for name, (command, visible) in commands.items():
        words = [*command, *map(str, local_runs.flags(tmp_path / "rows.jsonl", tmp_path / name / "out.json", "--engine", engine))]
        done = subprocess.run(
            words, capture_output=True, text=True, cwd=PACKAGE, env=known | {"CUDA_VISIBLE_DEVICES": ",".join(visible)}, timeout=300
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        assert done.stdout.count("report: ") == 1
    outcomes = [local_runs.outcome(tmp_path / name / "out.json") for name in commands]
    chances = []
    for report, lines in outcomes:
        for told in (report, *lines):
            del told["tokens"]["cached"]  # each replica of vLLM has a prefix cache of its own
        # Rows have other neighbours in their batches, of whose number the order of a sum hangs.
        chances.append([float("nan") if value is None else value for line in lines for value in (line.pop("confidence") or {}).values()])
    assert outcomes == [outcomes[0]] * 3
    for found in chances[1:]:
        assert found == pytest.approx(chances[0], abs=1e-4, nan_ok=True)
