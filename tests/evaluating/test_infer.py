"""infer.py: one prompt, one reply."""

import pytest

from slm_swap.common.settings import PACKAGE
from slm_swap.demo.azure_simulator import AzureSimulator, Faults
from slm_swap.rows.examples import Example
from tests.support.scripts import load_script


@pytest.fixture
def script():
    return load_script("01_eval/infer.py")


def test_the_reply_is_all_of_standard_output(script, run_script, monkeypatch):
    monkeypatch.setenv("SLM_MODEL_PATH", str(PACKAGE / "models/phi-tiny"))
    code, out, error = run_script(script, "--track", "structured", "--model-kind", "slm", "--precision", "fp32", "--max-new-tokens", 4, "--prompt", "Say x")
    assert code == 0 and len(out.splitlines()) == 1 and error.startswith("length, ") and "next: python 01_eval/eval.py" in error


def test_where_there_is_no_reply_it_fails_with_the_reason(script, run_script, monkeypatch):
    monkeypatch.setenv("SLM_MODEL_PATH", str(PACKAGE / "models/phi-tiny"))
    code, out, error = run_script(script, "--track", "structured", "--model-kind", "slm", "--precision", "fp32", "--prompt", "Paint it " * 5000)
    assert (code, out) == (2, "") and len(error.splitlines()) == 1
    assert "error: no reply after 0.00 s (prompt_too_long): the prompt has " in error and error.endswith(" tokens, the context 4096\n")


def test_a_hosted_model_that_refuses_the_key_is_a_failure(script, run_script, monkeypatch):
    with AzureSimulator([Example("Say x", "x", id="x")], faults=Faults()) as server:
        for name, value in (("ENDPOINT", server.url), ("DEPLOYMENT", server.deployment), ("API_KEY", "another-key"), ("API_VERSION", "2024-10-21")):
            monkeypatch.setenv(f"AZURE_{name}", value)
        code, out, error = run_script(script, "--track", "structured", "--model-kind", "azure", "--prompt", "Say x")
    assert (code, out) == (2, "") and "401" in error and "Traceback" not in error
