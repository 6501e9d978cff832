"""A step's packs by CUDA graphs: the same adapter as without. On a CPU all of it but the capturing, and to the bit."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from slm_swap.tuning.fast_training import CompletionTrainer
from slm_swap.tuning.step_graphs import Gradients, StepGraphs
from tests.tuning.test_step_packs import ONE_BY_ONE, trained

CUDA = torch.cuda.is_available()
PACKED = replace(ONE_BY_ONE, step_packs="yes", lora_dropout=0.1, pack_length=400, epochs=3, precision="bf16" if CUDA else "fp32", compile="yes" if CUDA else "no")
on_gpu = pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
NEAR = 0.1  # of what training changes in the weights


@pytest.fixture(scope="module", autouse=True)
def reproducible():
    """On a GPU, sums in an order that is always the same, where torch's kernels have one: compiled ones add by atomics."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(CUDA, warn_only=True)
        yield
        torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    """Gives the adapter's weights of a training whose kernels are launched one by one."""

    def train(**changed):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(StepGraphs, "_memory_is_free", lambda graphs, _: setattr(graphs, "on", False))
            return trained(tmp_path_factory.mktemp("launched") / "adapter", replace(PACKED, **changed))[0]

    return train


@pytest.fixture(scope="module")
def launched(launch):
    return launch()


@pytest.fixture(scope="module")
def apart(launch, launched):
    """How far weights are from those of `launched`, as a share of what training changed. Not of their norm, most of which is where LoRA begins: a
    training without dropout is within 0.04 of that."""
    start = launch(learning_rate=1e-12)
    return lambda found: ((found - launched).norm() / (launched - start).norm()).item()


@pytest.fixture
def require_same(request, launched):
    """Asserts that weights are those of `launched`. On a GPU nearly: two trainings whose kernels are launched differ in bits, too, as compiled kernels add
    by atomics, in any order."""
    apart = request.getfixturevalue("apart") if CUDA else None

    def require(found):
        if apart:
            assert apart(found) < NEAR
        else:
            assert torch.equal(found, launched)

    return require


@pytest.fixture
def passes(monkeypatch):
    """The StepGraphs of the next training, in a list; without a GPU they would capture if there were one."""
    found, make = [], CompletionTrainer._make_passes

    def made(trainer, model):
        gradients, graphs = make(trainer, model)
        graphs.on = True
        found.append(graphs)
        return gradients, graphs

    monkeypatch.setattr(CompletionTrainer, "_make_passes", made)
    return found


def done_again(graphs, work, needed):
    """In place of a graph: a replay does the work anew, and writes the same tensor."""
    loss = torch.zeros(())
    return SimpleNamespace(replay=lambda: loss.copy_(work())), loss


def refuse(graphs, work, needed):
    raise RuntimeError("operation not permitted when stream is capturing")


def test_replayed_steps_are_those_that_are_launched(require_same, passes, tmp_path, monkeypatch):
    if not CUDA:
        monkeypatch.setattr(StepGraphs, "_record", done_again)
        monkeypatch.setattr(StepGraphs, "_memory_is_free", lambda *_: True)
    found, info, _ = trained(tmp_path / "adapter", PACKED)
    (graphs,) = passes
    assert graphs.on and 0 < len(graphs.graphs) <= len(graphs.seen) < 3 * info["steps"]
    require_same(found)


def test_where_capturing_fails_steps_are_launched(require_same, passes, tmp_path, monkeypatch):
    said = []
    if CUDA:
        forward = StepGraphs._pass
        # What a graph cannot hold: the host asks for a number.
        monkeypatch.setattr(StepGraphs, "_pass", lambda graphs, pack, count: [forward(graphs, pack, count), float(count)][0])
    else:
        monkeypatch.setattr(StepGraphs, "_memory_is_free", lambda *_: True)
        monkeypatch.setattr(StepGraphs, "_record", refuse)
    found, _, _ = trained(tmp_path / "adapter", PACKED, say=said.append)
    (told,) = [line for line in said if "kernel by kernel" in line]
    assert "they cannot be captured (" in told and not passes[0].graphs
    require_same(found)


@on_gpu
def test_where_memory_is_short_steps_are_launched(require_same, passes, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (2**30, 2**37))
    found, _, _ = trained(tmp_path / "adapter", PACKED, say=said.append)
    assert [line for line in said if line.startswith("steps are launched kernel by kernel: for CUDA graphs ")] and not passes[0].graphs
    require_same(found)


def test_other_trainings_are_not_near(launch, apart):
    """So that those that are near mean something: a graph that replays other dropout, or none, would not pass for one that is right."""
    assert apart(launch(lora_dropout=0.0)) > 2 * NEAR and apart(launch(seed=PACKED.seed + 1)) > 2 * NEAR


def test_gradients_stay_at_one_place_and_begin_at_zero():
    layer = torch.nn.Linear(3, 2)
    layer.bias.requires_grad_(False)
    frozen = torch.nn.Parameter(torch.ones(4), requires_grad=False)
    half = torch.nn.Parameter(torch.ones(5, dtype=torch.bfloat16))
    gradients = Gradients([*layer.parameters(), frozen, half])
    for _ in range(2):
        gradients.begin()
        layer(torch.ones(1, 3)).sum().backward()
        layer(torch.ones(1, 3)).sum().backward()
        half.sum().backward()
        assert layer.weight.grad.tolist() == [[2.0] * 3] * 2 and half.grad.tolist() == [1.0] * 5 and frozen.grad is None is layer.bias.grad
        assert sorted(whole.tolist() for whole in gradients.whole) == [[1.0] * 5, [2.0] * 6]
        layer.weight.grad = half.grad = None
