"""A hosted evaluation of made-up rows against a scripted server."""

import json

import pytest

from slm_swap.rows.examples import Example
from tests.support.scripted import Scripted, plain

ROWS = [Example(f"Say {n}", f'{{"number":{n}}}', id=f"r{n}") for n in range(24)]


class Hosted:
    """`run(*flags)` evaluates ROWS against `server` into `out`: (exit code, stdout, stderr)."""

    def __init__(self, server, out, run, script, flags):
        self.server, self.out, self._run, self._script, self.flags = server, out, run, script, flags

    def run(self, *flags, out=None):
        return self._run(self._script, *self.flags, "--out", out or self.out, *flags)

    def report(self):
        return json.loads(self.out.read_text())

    def lines(self):
        return [json.loads(line) for line in self.out.with_suffix(".rows.jsonl").read_text().splitlines()]

    def requests(self):
        """How many requests were sent since the last time."""
        found = self.server.asked.total()
        self.server.asked.clear()
        return found


@pytest.fixture
def hosted(tmp_path, write_rows, run_script, eval_script, monkeypatch):
    prices = tmp_path / "prices.toml"
    prices.write_text("[hosted.simulator]\ninput = 2.5\ncached = 1.25\noutput = 10.0\n")
    rows = write_rows("rows.jsonl", [row.to_json() for row in ROWS])
    with Scripted(ROWS, plain) as server:
        told = {"ENDPOINT": server.url, "DEPLOYMENT": "simulator", "API_VERSION": "2024-10-21", "API_KEY": "simulator-key"}
        for name, value in told.items():
            monkeypatch.setenv(f"AZURE_{name}", value)
        monkeypatch.setenv("PRICES_FILE", str(prices))
        flags = ("--track", "structured", "--model-kind", "azure", "--dataset", rows)
        yield Hosted(server, tmp_path / "out.json", run_script, eval_script, flags)
