"""Greedy decoding with vLLM's offline engine: continuous batching, a prefix cache, LoRA adapters.

It can start eager, which is sooner up, or with CUDA graphs of the decode step, which is faster then (benchmarks/results/engine_start.json
has the seconds of both). The graphs are captured without compiling the model first, so that the start stays short.
"""

import json
import os
import time
from collections.abc import Container, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from slm_swap.clients.architecture import config_ends, text_config, usable_context
from slm_swap.clients.endings import reply_ends
from slm_swap.clients.engines import Chance, Generated, Prompt, Workload, vllm_for_cpus
from slm_swap.clients.loading import first_line, load_config, require_precision
from slm_swap.common.errors import UserError
from slm_swap.common.settings import display_path

FIRST_CONTEXT = 4096  # where nothing is known of the rows
END = object()  # behind the last prompt
QUEUED = 1024  # prompts that the engine holds at a time: enough to keep the GPU full, few enough to stream
# Batches whose decode step is captured; those between are filled up to the next one. They take no longer to capture than vLLM's 35 sizes
# up to 256, which leave the largest batches to be launched kernel by kernel: 285 instead of 325 requests a second on an H200.
CAPTURED = [1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, QUEUED]
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
MORE_THAN_LORA = {"trainable_token_indices": "trained tokens", "modules_to_save": "whole modules that were trained", "use_dora": "DoRA"}
DTYPES = {"bf16": "bfloat16", "fp8": "bfloat16", "fp32": "float32"}
ENVIRONMENT = {  # what vLLM is started with, unless it is set already
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # a process of the engine's own would import everything again, for longer than it saves
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    # Nothing is compiled here, and torch's compiler takes 4 seconds to be imported, which vLLM's decorated functions would have done.
    "TORCHDYNAMO_DISABLE": "1",
    # The graphs of the decode step share 0.3 GiB, a fraction of what vLLM leaves free: measuring that first would take a second.
    "VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS": "0",
    "VLLM_CPU_KVCACHE_SPACE": "4",  # GiB: on a CPU it would take nearly all of the machine's memory
}
# By how much a whole command takes longer to start with CUDA graphs, and a row is answered sooner: benchmarks/engine_start.py on an H200.
EXTRA_SECONDS = 2.59
SAVED_SECONDS = 0.00095


def start_for(rows: int) -> str:
    """"graphs" where so many rows win back what starting with them costs, else "eager"."""
    return "graphs" if rows * SAVED_SECONDS > EXTRA_SECONDS else "eager"


def import_vllm() -> None:
    """Import vLLM with its ENVIRONMENT, which takes seconds."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)  # a launcher's: vLLM's own world, of one process, would look for its store
    from vllm import LLM  # noqa: F401  the package itself imports little


class VllmEngine:
    """A checkpoint, and possibly an adapter, in vLLM behind `engines.Engine`.

    Args:
        precision: "bf16", "fp8" (weights in 8 bits, quantized while loading) or "fp32".
        start: one of engines.STARTS; "auto" decides by the workload's rows.
        workload: what it is started for. The engine's context is just what the longest row needs: with LongRoPE, vLLM takes the
            long factors for every row as soon as the context is longer than the model was first trained on.
        constrained: prompts may have a grammar. vLLM loads a tokenizer of its own only for these.

    Raises:
        UserError: vLLM cannot start, or takes no such adapter.
    """

    name = "vllm"

    def __init__(
        self,
        path: Path,
        precision: str,
        adapter: Path | None = None,
        start: str = "auto",
        workload: Workload | None = None,
        trust_remote_code: bool = False,
        tokenizer: Any = None,
        constrained: bool = False,
    ):
        if adapter and precision == "fp32":
            raise UserError("the vllm engine has no adapters in fp32: use --precision bf16 or --engine transformers")
        rank = {"enable_lora": True, "max_lora_rank": lora_rank(adapter), "max_loras": 1} if adapter else {}
        import_vllm()
        config = load_config(path, trust_remote_code)
        if precision == "fp8":
            require_precision(path, config, precision)
        context = min(usable_context(config, tokenizer), workload.longest if workload else FIRST_CONTEXT)
        self.ends = end_tokens(path, config, tokenizer)
        # Of a model that also sees or hears, the text decoder alone: the rest would take memory, and files that a merged checkpoint lacks.
        part = {} if text_config(config) is config else {"language_model_only": True}
        from vllm import LLM, SamplingParams
        from vllm.lora.request import LoRARequest

        self._device = "cpu" if vllm_for_cpus() else "cuda"
        self.start = start if start != "auto" else start_for(workload.rows if workload and self._device == "cuda" else 1)
        # Of vLLM's four back ends, the one by llguidance. A tokenizer of Mistral's own package is none that it reads.
        tokens = {"structured_outputs_config": {"backend": "guidance"}, "tokenizer_mode": "hf"} if constrained else {"skip_tokenizer_init": True}
        graphs = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": CAPTURED}
        self._sampling = SamplingParams
        self._lora = LoRARequest("adapter", 1, str(adapter)) if adapter else None
        try:
            self._llm = LLM(
                model=str(path),
                trust_remote_code=trust_remote_code,
                dtype=DTYPES[precision],
                quantization="fp8" if precision == "fp8" else None,
                max_model_len=context,
                enforce_eager=self.start == "eager",
                enable_prefix_caching=True,
                compilation_config=None if self.start == "eager" else graphs,
                disable_log_stats=True,
                **rank,
                **part,
                **tokens,
            )
        except Exception as error:  # of whatever package the checkpoint needs
            raise UserError(
                f"vllm cannot start on {display_path(path)} ({first_line(error)}): free the GPU's memory, or use --engine transformers"
            ) from None
        self._engine = self._llm.llm_engine
        self.context = context

    def generate(self, prompts: Iterable[Prompt | None], answered: Container[int] = ()) -> Generator[Generated | None]:
        """Prompts join and leave the running batch one by one, so that those that are answered already are just left out.

        A None among the prompts says that no other one waits now: the running batch goes on, and where there is none, None is given.
        """
        prompts = (prompt for prompt in prompts if prompt is None or prompt.index not in answered)
        asked: dict[str, tuple[Prompt, float]] = {}
        again: list[Prompt] = []
        try:
            while True:
                prompt = None
                while len(asked) < QUEUED and (prompt := again.pop() if again else next(prompts, END)) not in (None, END):
                    name = str(prompt.index)
                    asked[name] = prompt, time.perf_counter()
                    with said_in_one_line():
                        self._engine.add_request(name, {"prompt_token_ids": prompt.tokens}, self._limit(prompt), lora_request=self._lora)
                if not asked:
                    if prompt is END:
                        return
                    yield None
                    continue
                with said_in_one_line():
                    outputs = self._engine.step()
                for output in outputs:
                    if output.finished:
                        prompt, began = asked.pop(output.request_id)
                        made = self._generated(prompt, output, time.perf_counter() - began)
                        if prompt.again and (other := prompt.again(made)):
                            again.append(other)
                        else:
                            yield made
        finally:
            if asked:
                self._engine.abort_request(list(asked))

    def _limit(self, prompt: Prompt) -> Any:
        from vllm.sampling_params import RequestOutputKind

        bound = {}
        if prompt.grammar:
            from vllm.sampling_params import StructuredOutputsParams

            bound["structured_outputs"] = StructuredOutputsParams(grammar=prompt.grammar)
        return self._sampling(
            temperature=0.0,
            max_tokens=prompt.limit,
            stop_token_ids=self.ends,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            logprobs=None if prompt.grammar else 2,  # of the two best tokens, and of the chosen one if it is neither
            flat_logprobs=not prompt.grammar,  # lists of numbers until they are read: objects for each token would keep the garbage collector busy
            **bound,
        )

    @staticmethod
    def _generated(prompt: Prompt, output: Any, seconds: float) -> Generated:
        made = output.outputs[0]
        tokens, stopped = list(made.token_ids), made.finish_reason == "stop"
        chances = None
        if not prompt.grammar:  # under one, vLLM tells the chances among the tokens that it allows: a forced one would look certain
            chances = [chance_of(token, told) for token, told in zip(tokens, made.logprobs, strict=True)]
        return Generated(prompt.index, tokens[:-1] if stopped else tokens, stopped, seconds, output.num_cached_tokens, chances=chances)

    def describe(self) -> dict[str, Any]:
        return {"device": self._device}

    def state(self) -> dict[str, Any]:
        return {"engine_start": self.start, "engine_context": self.context}

    def restore(self, state: dict[str, Any]) -> None: ...

    def forget(self) -> None:
        """Empty the prefix cache: a prompt that is asked again would have none of its tokens to compute."""
        self._engine.reset_prefix_cache()

    def close(self) -> None:
        """Give the GPU's memory back."""
        shutdown = getattr(self._engine.engine_core, "shutdown", None)
        if shutdown:
            shutdown()


def chance_of(token: int, told: Mapping[int, Any]) -> Chance:
    """A generated token's chance, from the log-probabilities that vLLM tells at its place: by token, the best two among them."""
    best, second, *_ = sorted((one.logprob for one in told.values()), reverse=True)
    return told[token].logprob, best - second


@contextmanager
def said_in_one_line() -> Iterator[None]:
    """
    Raises:
        UserError: vLLM raised anything.
    """
    try:
        yield
    except Exception as error:  # vLLM's own, and those of what it runs
        raise UserError(
            f"vllm failed ({first_line(error)}): run the same command again; if it fails there again, use --engine transformers"
        ) from None


def end_tokens(path: Path, config: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a reply: as `endings.reply_ends`."""
    from transformers import GenerationConfig

    try:
        ends = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:  # a checkpoint without generation_config.json
        ends = None
    return sorted(reply_ends(tokenizer, ends, *config_ends(config)))


def lora_rank(adapter: Path) -> int:
    """The smallest rank that vLLM has kernels for and that holds the adapter's.

    Raises:
        UserError: there is none, or the adapter has more than LoRA's matrices: vLLM would leave that out, or stop at the first row.
    """
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    for name, what in MORE_THAN_LORA.items():
        if config.get(name):
            raise UserError(f"vllm takes no adapters with {what}: merge {display_path(adapter)} by merge_adapter.py, or use --engine transformers")
    rank = max([config["r"], *config.get("rank_pattern", {}).values()])
    if rank > LORA_RANKS[-1]:
        raise UserError(f"the adapter {display_path(adapter)} has rank {rank}, and vllm takes {LORA_RANKS[-1]}: use --engine transformers")
    return next(known for known in LORA_RANKS if known >= rank)
