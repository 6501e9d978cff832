"""A recording Langfuse server, runs that are traced to it, and resend_traces.py."""

import uuid

import pytest

from slm_swap.tracing import outbox, runs, wire
from slm_swap.tracing.runs import Tracing, connect, trace_run
from tests.support.langfuse_server import LangfuseServer
from tests.support.processes import PATIENCE
from tests.support.scripts import load_script


@pytest.fixture
def server():
    with LangfuseServer(f"pk-lf-{uuid.uuid4()}") as recorder:
        yield recorder


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """A server that is well may be slow here, as the whole machine may be: no request is sent twice, and no end cut off, for that."""
    for module, name in ((wire, "REQUEST_SECONDS"), (wire, "CHECK_SECONDS"), (runs, "CLOSE_SECONDS")):
        monkeypatch.setattr(module, name, PATIENCE)


@pytest.fixture
def impatient(patient, monkeypatch, request):
    """Outages in seconds instead of tens of seconds. What fails at once needs no limit on a request; what never answers does."""
    trouble = getattr(request.node, "callspec", None) and request.node.callspec.params.get("trouble")
    monkeypatch.setattr(wire, "REQUEST_SECONDS", 4 if trouble == "hanging" else PATIENCE)
    monkeypatch.setattr(wire, "CHECK_SECONDS", 1)
    monkeypatch.setattr(runs, "CLOSE_SECONDS", 2)
    monkeypatch.setattr(outbox, "PAUSES", (0.05,))


@pytest.fixture
def traced(tmp_path):
    """`trace_run` for a report in the test's own folder."""

    def run(settings, name="run", metadata=None, tags=None, report="report.json", seed=None, keep=lambda: False, **tracing):
        return trace_run(connect(settings, Tracing(**tracing)), name, tmp_path / report, metadata, tags, seed, keep)

    return run


@pytest.fixture
def resend(run_script, monkeypatch):
    """Run resend_traces.py for a server's keys: (exit code, stdout without the traces' addresses and the next command, stderr)."""

    def run_it(server, *places):
        public_key, secret_key = server.keys.split(":")
        values = {"PUBLIC_KEY": public_key, "SECRET_KEY": secret_key, "BASE_URL": server.url, "DISABLED": "0"}
        for name, value in values.items():
            monkeypatch.setenv(f"LANGFUSE_{name}", value)
        code, printed, error = run_script(load_script("01_eval/resend_traces.py"), *places)
        lines = printed.splitlines(keepends=True)
        traces = [line for line in lines if line.startswith(f"trace: {server.url}/project/project-1/traces/")]
        following = [line for line in lines if line.startswith("next: ")]
        assert len(traces) == printed.count("sent: ") and len(following) == (code == 1)
        return code, "".join(line for line in lines if line not in traces + following), error

    return run_it
