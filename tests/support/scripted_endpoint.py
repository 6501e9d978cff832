"""An endpoint whose small model is a script, for faults that no real model shows on demand: its words are orders.

Run as `serve.py` is, without what loads a model. The last user message of a request begins with what is done:
`call CITY` calls check_stock with that city, `say` replies in words, `shown` with the first message that it was shown, `sure N` and `unsure N` do so with that confidence,
`slow N` takes N seconds, `die` ends the process, `bug` raises what names the hosted model's key, `broken` replies in no form, `fail` fails as a row that does not fit in memory, `long` does not fit the context.
Where the file that SCRIPTED_REFUSES names is there, the model does not start, and the file is removed. SCRIPTED_MEMORY is a folder in place of /dev/shm.
"""

import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from slm_swap.cli import run
from slm_swap.clients.protocol import Reply
from slm_swap.common.errors import UserError
from slm_swap.rows.prompts import Request
from slm_swap.serving import processes
from tests.support.scripts import load_script

IDENTITY = {"kind": "slm", "path": "scripted", "engine": "scripted", "precision": "fp32", "files_sha256": ["0" * 64], "thinking": None}


class ScriptedClient:
    """A client that does as it is told."""

    kind, engine, identity = "slm", SimpleNamespace(name="scripted", batch_size=8), IDENTITY

    def generate(self, batch: list[Request]) -> list[Reply]:
        return [self._reply(request) for request in batch]

    def _reply(self, request: Request) -> Reply:
        word, _, rest = request.messages[-1]["content"].partition(" ")
        sure = -0.01 if word != "unsure" else -9.0
        confidence = {"min_logprob": sure, "sum_logprob": sure, "tokens": 1, "tool_logprob": sure, "min_margin": 1.0}
        call = [{"name": "check_stock", "arguments": f'{{"item":"lamp","city":"{rest}"}}'}]
        if word == "slow":
            time.sleep(float(rest))
        if word == "die":
            os._exit(9)
        if word == "bug":
            raise ValueError(f"of {os.environ['AZURE_API_KEY']}")
        if word == "fail":
            raise UserError("it does not fit in memory")
        if word == "long":
            return Reply("", "prompt_too_long", 9999, 0, 0, error="too long")
        if word == "say":
            return Reply("Nothing to look up.", "stop", 10, 5, 0, calls=[], confidence=confidence)
        if word == "shown":
            first = next(message for message in request.messages if message["role"] != "system")
            return Reply(first["content"], "stop", 10, 5, 0, calls=[], confidence=confidence)
        if word == "broken":
            call = [{"name": "check_stock", "arguments": '{"item":'}]
        return Reply("", "stop", 20, 10, 0, calls=call, confidence=confidence)


def make_small(settings, args) -> ScriptedClient:
    refuses = Path(os.environ.get("SCRIPTED_REFUSES", os.devnull))
    if refuses.is_file():
        refuses.unlink()
        raise UserError("the GPU's memory is not free")
    return ScriptedClient()


if __name__ == "__main__":
    processes.MEMORY = Path(os.environ.get("SCRIPTED_MEMORY", processes.MEMORY))
    script = load_script("05_serve/serve.py")
    script.make_small = make_small
    run(script.main)
