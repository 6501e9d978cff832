"""An endpoint over a real socket: the simulator as the hosted model, and a scripted small model or the embedded one."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai

from slm_swap.common.settings import ROOT
from slm_swap.demo.azure_simulator import AzureSimulator
from slm_swap.rows.lines import is_whole
from slm_swap.rows.toolschema import openai_tool
from slm_swap.verdict.cascade import identity_of, tool_hash
from tests.support.processes import Script, wait_until
from tests.support.scripted_endpoint import IDENTITY
from tests.support.shop_bot import TOOLS

HOSTED_KEY, HOSTED_NAME = "hosted-key-0123456789abcdef", "simulator"
CHECK_STOCK = next(tool for tool in TOOLS if tool["function"]["name"] == "check_stock")
SCRIPTED = identity_of(IDENTITY, "native", "off", 256, None)


@dataclass
class Endpoint:
    """A running endpoint: its URL without /v1, the simulator behind it, its state folder and its process."""

    url: str
    hosted: AzureSimulator | None
    state: Path
    script: Script
    log: Path
    more: dict[str, Any] = field(default_factory=dict)

    def client(self, key: str = "a-client-without-a-key", **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, **options)

    def ask(self, text: str, tools: Any = (CHECK_STOCK,), **options: Any) -> tuple[str, openai.types.chat.ChatCompletion]:
        """(the header that says who answered, the completion) of one user message."""
        with self.client() as client:
            told = {"tools": list(tools)} if tools else {}
            raw = client.chat.completions.with_raw_response.create(
                model=HOSTED_NAME, messages=[{"role": "user", "content": text}], **told, **options
            )
            return raw.headers["x-slm-swap"], raw.parse()

    def lines(self, name: str) -> list[dict[str, Any]]:
        """Those of a file of the state folder, each with its checksum right; without a last one that is being written, of which a reader may see a part."""
        path = self.state / name
        if not path.exists():
            return []
        data = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
        assert all(map(is_whole, data))
        return [json.loads(line) for line in data]


def cascade(path: Path, identity: dict[str, Any] = SCRIPTED, track: str = "toolcall", **changes: Any) -> Path:
    """A cascade.json: calls and values from a confidence of -1 on, words never."""
    rule = {"signal": "min_logprob", "threshold": -1.0, "units": 300, "local": 200, "losses": 0, "bound": 0.02, "seen": 0.0, "local_only": {"seen": 0.0, "bound": 0.02}}
    rules = {"call": rule, "no_call": rule | {"threshold": None}} if track == "toolcall" else {"value": rule}
    kept = openai_tool(CHECK_STOCK)
    told = {
        "schema_version": 1, "stage": "cascade", "created_at": "2026-01-01T00:00:00+00:00", "code": {}, "track": track, "guarantee": "regret", "prompts": 0,
        "delta": 0.02, "alpha": 0.05, "rules": rules, "share_local": 0.66, "regret": {"seen": 0.0, "bound": 0.02},
        "disagreement": {"seen": 0.01, "bound": 0.03, "units": 300}, "tools": {kept["name"]: tool_hash(kept)} if track == "toolcall" else None,
        "per_tool": {}, "identity": identity, "recipe": None, "calibration": {"path": "x", "sha256": "x", "rows": 300}, "hosted": "simulator", "costs": {},
    }  # fmt: skip
    path.write_text(json.dumps(told | changes))
    return path


@contextmanager
def serving(
    folder: Path, *flags: object, hosted: AzureSimulator | None = None, script: str = "tests/support/scripted_endpoint.py", track: str = "toolcall", **environment: str
) -> Iterator[Endpoint]:
    """An endpoint until the end; `hosted` is a simulator that runs."""
    state, log = folder / "state", folder / "log"
    known = {"LANGFUSE_DISABLED": "1", "SLM_BASE_URL": "", "PRICES_FILE": ""} | (known_to(hosted) if hosted else {})
    words = [str(ROOT / script), "--track", track, "--port", 0, "--state", state, *flags]
    process = Script(*words, log=log, **known | environment)
    try:
        wait_until(lambda: _url(log) or process.poll() is not None)
        assert process.poll() is None, log.read_text()
        endpoint = Endpoint(_url(log), hosted, state, process, log)
        wait_until(lambda: is_up(endpoint) or process.poll() is not None)
        assert process.poll() is None, log.read_text()
        yield endpoint
    finally:
        process.send_signal(15)
        process.wait()


def known_to(hosted: AzureSimulator) -> dict[str, str]:
    """The variables that name the hosted model."""
    return {"AZURE_ENDPOINT": hosted.url, "AZURE_DEPLOYMENT": HOSTED_NAME, "AZURE_API_KEY": HOSTED_KEY, "AZURE_API_VERSION": "2024-10-21"}


def _url(log: Path) -> str | None:
    found = re.search(r"^(http://\S+)/v1 ", log.read_text(), re.MULTILINE) if log.exists() else None
    return found[1] if found else None


def is_up(endpoint: Endpoint) -> bool:
    """Whether it listens, and its small model is there or will never be."""
    import httpx2

    try:
        told = httpx2.get(f"{endpoint.url}/healthz", timeout=5).json()
    except httpx2.HTTPError:
        return False
    return told.get("small_model") != "down"
