"""Measure what confidence costs: decoding with the transformers engine with and without it, and finding the tokens of a reply that count.

    python benchmarks/confidence.py
    python benchmarks/confidence.py --shape small --turns 9 --out /tmp/confidence.json

A model with random weights of a real shape, as what is added grows with the vocabulary and what it is added to with the rest. Both ways take
turns on the same prompts, as a machine that others share is now faster, now slower; told is the median of the turns' ratios. On a CUDA GPU
the steps are captured, in bf16. Without confidence, `chances_of` gives zeros at once. `microseconds_per_reply` is `confidence()` alone, of the
embedded model's tokenizer, for a call of some 30 tokens.
"""

import argparse
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere

from slm_swap.cli import Parser, positive, run
from slm_swap.clients.confidence import confidence
from slm_swap.clients.engines import Prompt, captured, transformers_engine
from slm_swap.clients.loading import load_tokenizer
from slm_swap.clients.native import read_reply
from slm_swap.common.reports import code_version, hardware, now, package_versions, write_json
from slm_swap.common.settings import PACKAGE, ROOT, display_path
from slm_swap.rows.prompts import text_request

SHAPES: dict[str, dict[str, int]] = {  # of Qwen2.5-0.5B and Phi-4-mini
    "small": dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2, vocab_size=151_936),
    "phi-4-mini": dict(hidden_size=3072, intermediate_size=8192, num_hidden_layers=32, num_attention_heads=24, num_key_value_heads=8, vocab_size=200_064),
}
CALL = '<tool_call name="book_table">{"place":"Café Central","guests":4,"date":"2026-05-03","note":"by the window"}</tool_call>'


def make_engine(shape: str, batch_size: int) -> transformers_engine.TransformersEngine:
    from transformers import AutoModelForCausalLM, LlamaConfig

    gpu = torch.cuda.is_available()
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[shape], tie_word_embeddings=True, max_position_embeddings=4096, bos_token_id=0, eos_token_id=None)
    with torch.device("cuda" if gpu else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if gpu else torch.float32).eval()
    engine = transformers_engine.TransformersEngine(model, load_tokenizer(PACKAGE / "models/phi-tiny"), batch_size)
    engine.ends = set()  # every reply is as long as its limit
    if engine._captured:
        engine._captured.ends = engine.ends
    return engine


def no_chances(logits: Any, chosen: Any) -> Any:
    return logits.new_zeros(len(chosen), 2, dtype=torch.float32)  # as chances_of: a graph copies them as they are


def decode_seconds(engine: transformers_engine.TransformersEngine, prompts: list[Prompt], sure: bool) -> float:
    made = captured.chances_of if sure else no_chances
    with mock.patch.object(captured, "chances_of", made), mock.patch.object(transformers_engine, "chances_of", made):
        if engine._captured:
            engine._captured.clear()  # a graph has the one or the other in it
            list(engine.generate(prompts))
        started = time.perf_counter()
        list(engine.generate(prompts))
        return time.perf_counter() - started


def reply_microseconds(repeats: int = 2000) -> float:
    tokenizer, request = load_tokenizer(PACKAGE / "models/phi-tiny"), text_request("toolcall", "x")
    tokens = tokenizer(CALL, add_special_tokens=False)["input_ids"]
    read, chances = read_reply(tokenizer, request, tokens, True), [(-0.1, 1.0)] * len(tokens)
    started = time.perf_counter()
    for _ in range(repeats):
        confidence(tokenizer, request, tokens, chances, read)
    return (time.perf_counter() - started) / repeats * 1e6


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="small", help="the model's shape")
    parser.add_argument("--batch-size", type=positive, default=8, help="rows in a batch")
    parser.add_argument("--tokens", type=positive, default=24, help="new tokens of each row")
    parser.add_argument("--turns", type=positive, default=5, help="how often each way is measured")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/confidence.json", metavar="FILE", help="the file to write")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    engine = make_engine(args.shape, args.batch_size)
    prompts = [Prompt(index, list(range(10, 10 + 64)), args.tokens) for index in range(args.batch_size)]
    decode_seconds(engine, prompts, sure=True)
    turns = [{"with": decode_seconds(engine, prompts, sure=True), "without": decode_seconds(engine, prompts, sure=False)} for _ in range(args.turns)]
    told = {
        "created_at": now(), "code": code_version(), "packages": package_versions(), "hardware": hardware(),
        "shape": args.shape, "batch_size": args.batch_size, "tokens": args.tokens, "device": str(engine.model.device), "captured": engine._captured is not None,
        "seconds": turns, "ratio": round(median(turn["with"] / turn["without"] for turn in turns), 4),
        "microseconds_per_reply": round(reply_microseconds(), 1),
    }  # fmt: skip
    write_json(args.out, told)
    print(f"with confidence decoding takes {told['ratio']:.3f} times as long, and a reply {told['microseconds_per_reply']:.0f} µs\nreport: {display_path(args.out)}")
    return 0


if __name__ == "__main__":
    run(main)
