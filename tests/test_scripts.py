"""What holds for every script: help without heavy imports, one line for a mistake."""

import ast
import json
import os
import signal
import subprocess
import sys

import pytest

from slm_swap.common.settings import PACKAGE, ROOT

SCRIPTS = [
    "01_eval/eval.py", "01_eval/infer.py", "01_eval/live_compare.py", "01_eval/resend_traces.py", "02_dataset/label.py",
    "02_dataset/prepare_data.py", "02_dataset/pull_langfuse.py", "02_dataset/push_langfuse.py", "03_compare/calibrate.py", "03_compare/compare.py", "03_compare/render_report.py",
    "04_ft/improve.py", "04_ft/merge_adapter.py", "04_ft/train_unsloth.py", "05_serve/serve.py", "05_serve/watch.py", "train_unsloth.py", "demo/azure_simulator.py", "demo/make_sample_data.py", "demo/make_tiny_model.py",
    "demo/quickstart.py",
]  # fmt: skip
HEAVY = (
    "torch", "transformers", "peft", "trl", "unsloth", "vllm", "openai", "langfuse", "datasets", "numpy", "scipy", "pandas", "jinja2",
    "matplotlib",
)  # fmt: skip


def run(script: str, *flags: str, cwd=ROOT, **environment: str) -> subprocess.CompletedProcess:
    known = {name: value for name, value in os.environ.items() if not name.startswith(("AZURE_", "LANGFUSE_", "SLM_", "PRICES_"))}
    command = [sys.executable, "-X", "importtime", str(PACKAGE / script), *flags]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=known | environment, timeout=120)


def errors(done: subprocess.CompletedProcess) -> list[str]:
    """The lines on standard error but for the interpreter's list of imports."""
    return [line for line in done.stderr.splitlines() if not line.startswith("import time:")]


def test_every_script_is_in_the_list():
    found = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if '__name__ == "__main__"' in path.read_text()}
    assert found | {"train_unsloth.py"} == set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_answers_from_anywhere_without_heavy_imports(script, tmp_path):
    done = run(script, "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage:") and ("--seed" in done.stdout) != (
        script.startswith(("03_compare", "05_serve", "demo/quickstart")) or script.endswith(("_langfuse.py", "_traces.py", "_adapter.py"))
    )
    imported = {
        line.rsplit("|", 1)[1].strip().split(".")[0] for line in done.stderr.splitlines() if line.startswith("import time:")
    }
    assert "argparse" in imported and not imported & set(HEAVY)


@pytest.mark.parametrize("script", [script for script in SCRIPTS if script != "train_unsloth.py"])
def test_the_docstring_shows_two_commands_that_parse(script):
    lines = [line.strip() for line in ast.get_docstring(ast.parse((PACKAGE / script).read_text())).splitlines()]
    commands = [line for line in lines if line.startswith("python ")]
    documented = script.removeprefix("04_ft/") if script.endswith("train_unsloth.py") else script  # one path for it, in all documents
    assert len(commands) >= 2 and all(command.split()[1] == documented for command in commands)
    for command in commands:
        done = run(script, *command.split()[2:], "--help")
        assert done.returncode == 0, (command, errors(done))


INTERRUPTS = """
import importlib.abc, os, signal, sys

class Interrupt(importlib.abc.MetaPathFinder):
    # Ctrl-C at the import of a module, once

    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupt())
"""


@pytest.mark.parametrize("module", ["slm_swap.common.settings", "slm_swap.tracing.runs"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_ctrl_c_during_the_imports_is_one_line(script, module, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTS.format(module=module))
    known = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RANK", "WORLD_SIZE", "LOCAL_RANK")}
    for launch, said in (({}, "interrupted\n"), ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost"}, "")):
        done = subprocess.run(
            [sys.executable, str(PACKAGE / script), "--no-such-flag"], capture_output=True, text=True, env=known | launch | {"PYTHONPATH": str(tmp_path)}, timeout=120,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which the tests' own parent may have ignored
        )  # fmt: skip
        assert (done.returncode, done.stdout, done.stderr) == (130, "", said)


def test_another_error_during_the_imports_keeps_its_traceback(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTS.format(module="slm_swap.tracing.runs").replace("os.kill(os.getpid(), signal.SIGINT)", "raise RuntimeError('broken')"))
    done = subprocess.run([sys.executable, str(PACKAGE / "01_eval/eval.py"), "--help"], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(tmp_path)}, timeout=120)
    assert done.returncode == 1 and done.stderr.startswith("Traceback") and done.stderr.endswith("RuntimeError: broken\n")


NOT_NEEDED = {  # by an evaluation with the transformers engine, without tracing and adapter, on a CPU
    "langfuse", "openai", "anthropic", "vllm", "trl", "peft", "datasets", "pandas", "pyarrow", "matplotlib", "starlette", "uvicorn", "jsonschema",
    "scipy.stats", "torch._inductor.compile_fx",
}  # fmt: skip


@pytest.mark.parametrize("precision", ["int8", "fp32"])
def test_an_evaluation_imports_nothing_that_it_does_not_need(precision, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"Say {n}", "completion": f'{{"a": {n}}}'}) + "\n" for n in range(2)))
    flags = ("--track", "structured", "--model-kind", "slm", "--engine", "transformers", "--precision", precision, "--max-new-tokens", "2")
    done = run(
        "01_eval/eval.py", *flags, "--dataset", str(rows), "--out", str(tmp_path / "report.json"),
        LANGFUSE_DISABLED="1", SLM_MODEL_PATH=str(PACKAGE / "models/phi-tiny"), CUDA_VISIBLE_DEVICES="",
    )  # fmt: skip
    assert done.returncode == 0 and (tmp_path / "report.json").exists(), errors(done)
    imported = {line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert {"torch", "transformers"} < imported and ("bitsandbytes" in imported) is (precision == "int8")
    assert not imported & NOT_NEEDED


TRACK_SCRIPTS = {
    "01_eval/eval.py": ["--model-kind", "slm"],
    "01_eval/infer.py": ["--model-kind", "slm", "--prompt", "x"],
    "01_eval/live_compare.py": ["--models", "azure", "slm"],
    "03_compare/compare.py": ["--azure", "a.json", "--slm", "b.json"],
    "train_unsloth.py": ["--train", "t", "--val", "v", "--out", "o"],
}


@pytest.mark.parametrize("script", TRACK_SCRIPTS)
def test_an_unknown_track_is_one_line(script, tmp_path):
    done = run(script, "--track", "poetry", *TRACK_SCRIPTS[script], cwd=tmp_path, LANGFUSE_DISABLED="1")
    (line,) = errors(done)
    assert done.returncode == 2 and "invalid choice: 'poetry'" in line and "structured" in line and "toolcall" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", ["01_eval/eval.py", "01_eval/live_compare.py", "03_compare/compare.py", "train_unsloth.py"])
def test_a_traced_run_without_langfuse_names_what_is_missing(script, tmp_path):
    done = run(script, "--track", "toolcall", *TRACK_SCRIPTS[script], cwd=tmp_path, LANGFUSE_SECRET_KEY="there")
    (line,) = errors(done)
    assert done.returncode == 2 and "LANGFUSE_PUBLIC_KEY, LANGFUSE_BASE_URL" in line and "LANGFUSE_DISABLED=1" in line
    assert "LANGFUSE_SECRET_KEY" not in line


def test_missing_azure_variables_are_named_all_at_once(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "x", "completion": '{"a": 1}'}) + "\n")
    flags = ("--track", "structured", "--model-kind", "azure", "--dataset", str(rows), "--out", str(tmp_path / "report.json"))
    done = run("01_eval/eval.py", *flags, LANGFUSE_DISABLED="1")
    (line,) = errors(done)
    assert done.returncode == 2 and all(name in line for name in ("AZURE_ENDPOINT", "AZURE_DEPLOYMENT", "AZURE_API_KEY"))
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_every_variable_is_in_the_example_file():
    documented = {
        line.split("=")[0] for line in (ROOT / ".env.example").read_text().splitlines() if "=" in line and line[0] != "#"
    }
    read = {node.value for node in ast.walk(ast.parse((PACKAGE / "common/settings.py").read_text())) if isinstance(node, ast.Constant)}
    names = {
        value
        for value in read
        if isinstance(value, str) and value.startswith(("SLM_", "AZURE_", "LANGFUSE_", "PRICES_")) and value.isupper()
    }
    assert {name for name in names if " " not in name and "=" not in name} - {"LANGFUSE_HOST"} == documented


@pytest.mark.parametrize("script", [script for script in SCRIPTS if script not in ("train_unsloth.py", "demo/make_tiny_model.py", "demo/quickstart.py")])
def test_every_script_says_the_next_command(script):
    """`train_unsloth.py` runs the one in 04_ft, and the quickstart ends with the commands for one's own rows."""
    assert "next_step(" in (PACKAGE / script).read_text(encoding="utf-8")
