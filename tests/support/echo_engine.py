"""An engine without a model: each step, every prompt that is under way gets its own next token back."""

import os
import time
from dataclasses import dataclass

from slm_swap.clients.engines import Generated
from slm_swap.common.errors import UserError

DIES, FAILS, BREAKS = 2, 3, 4  # first tokens of prompts, and what they bring about


@dataclass
class EchoEngine:
    context: int = 100
    name: str = "vllm"
    ends: tuple[int, ...] = (0,)
    refused: bool = False
    forgotten: int = 0

    def __post_init__(self):
        if self.refused:
            raise UserError("the engine cannot start: use another one")

    def generate(self, prompts, answered=()):
        open_now, end = {}, object()
        while True:
            while (prompt := next(prompts, end)) not in (None, end):
                if prompt.tokens[0] == DIES:
                    os._exit(7)
                if prompt.tokens[0] == BREAKS:
                    raise ValueError(f"a bug, and it names {os.environ['AZURE_API_KEY']}")
                if prompt.tokens[0] == FAILS:
                    raise UserError("vllm failed (out of order)")
                open_now[prompt.index] = prompt, []
            if not open_now:
                yield None
                continue
            time.sleep(0.002)
            for index, (prompt, made) in list(open_now.items()):
                made.append(prompt.tokens[len(made)])
                if len(made) == min(prompt.limit, len(prompt.tokens)):
                    del open_now[index]
                    yield Generated(index, made, True, 0.1, self.forgotten, prompt.grammar, [(-0.5, 1.5)] * len(made))

    def describe(self):
        return {"device": f"process {os.getpid()}"}

    def state(self):
        return {"engine_start": "eager"}

    def forget(self):
        self.forgotten += 1
