"""What a grammar costs: 200 rows with 40 sets of tools, decoded freely, always under a grammar, and again only where it is needed.

    python benchmarks/constrained.py
    python benchmarks/constrained.py --shape phi-4-mini --engine transformers --precision bf16
    python benchmarks/constrained.py --shape phi-4-mini --engine vllm --precision bf16

Without --shape it is the embedded model, and the rows are those whose replies are the same in both ways. A --shape has random weights, whose free replies
run to the limit: its rows are those that get there under a grammar, too, as a row that ends earlier leaves its batch with less to do. `retry` writes
their replies twice. The ratio is of the seconds a token. The ways take turns, grammars are compiled anew in each round, and the ratio is that of the medians. Without a GPU it is of
the processor's seconds, which other work on the machine leaves as they are.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere

from benchmarks.shapes import SHAPES, make_checkpoint
from slm_swap.cli import Parser, positive, run
from slm_swap.clients.engines import CONSTRAINTS, ENGINES
from slm_swap.clients.engines.masks import Grammars
from slm_swap.clients.loading import load_tokenizer
from slm_swap.common.reports import code_version, hardware, now, package_versions, write_json
from slm_swap.common.settings import PACKAGE, Settings
from slm_swap.dataset.readers.importers import xlam
from slm_swap.dataset.row import Row
from slm_swap.rows.examples import Example
from slm_swap.rows.prompts import Request, request_of, toolcall_completion, toolcall_prompt
from slm_swap.slm_client import SLMClient, in_form

SETS, TOOLS, LIMIT = 40, 4, 96
SPARE = 24  # rows of a --shape, of which few end before the limit
EMBEDDED = PACKAGE / "models/phi-tiny"


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, help="random weights of this shape (default: the embedded model)")
    parser.add_argument("--engine", choices=ENGINES[1:], default="transformers", help="what decodes")
    parser.add_argument("--precision", default="fp32", help="weights of the model")
    parser.add_argument("--batch-size", type=positive, default=8, help="rows in one batch")
    parser.add_argument("--rows", type=positive, default=200, help="rows measured")
    parser.add_argument("--rounds", type=positive, default=3, help="how often each way is measured")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/constrained.json", help="the figures")
    return parser.parse_args(argv)


def questions() -> list[Request]:
    """The sample's rows, each with the tools of one of SETS sets that has its own."""
    rows = [row for row in xlam([PACKAGE / "02_dataset/sample/xlam_sample.jsonl"]) if isinstance(row, Row) and row.tool]
    tools = {tool["name"]: tool for row in rows for tool in row.tools}
    sets = [Random(number).sample(sorted(tools), TOOLS) for number in range(SETS)]
    found = []
    for number, row in enumerate(rows):
        fitting = [names for names in sets if row.tool in names]
        if fitting:
            offered = [tools[name] for name in fitting[number % len(fitting)]]
            found.append(Example(toolcall_prompt(offered, row.request), toolcall_completion(row.tool, row.arguments), tools=offered))
    return [request_of("toolcall", example) for example in found]


def checkpoint(folder: Path, shape: str) -> Path:
    """Random weights with the embedded model's tokenizer, its vocabulary filled up to the shape's by longer and longer words."""
    path = make_checkpoint(folder / shape, shape)
    load_tokenizer(EMBEDDED).save_pretrained(path)
    told = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary, merges, random = told["model"]["vocab"], told["model"]["merges"], Random(0)
    words = [token for token in vocabulary if (token.removeprefix("Ġ").isalpha() and token.isascii()) or token == "Ġ"]
    letters = [token for token in words if len(token) == 1 and token.isalpha()]
    while len(vocabulary) < SHAPES[shape][1]["vocab_size"]:
        word, letter = random.choice(words), random.choice(letters)
        if len(word) < 12 and word + letter not in vocabulary:
            vocabulary[word + letter] = len(vocabulary)
            merges.append([word, letter])
            words.append(word + letter)
    (path / "tokenizer.json").write_text(json.dumps(told, ensure_ascii=False), encoding="utf-8")
    return path


def timed(client: SLMClient, asked: list[Request], way: str) -> dict[str, Any]:
    """One way's replies, and what they took."""
    client.constrain = way
    if client.grammars:
        client.grammars = Grammars(client.tokenizer)
        if hasattr(client.engine, "grammars"):
            client.engine.grammars = client.grammars
    client.forget()
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    started = clock()
    replies = client.generate(asked)
    seconds, grammars = clock() - started, client.grammars
    return {
        "replies": replies, "seconds": seconds, "tokens": sum(reply.output_tokens for reply in replies),
        "in_form": sum(map(in_form, asked, replies)), "under_a_grammar": sum(reply.constrained is True for reply in replies),
        "grammars": grammars.compiled, "compile_seconds": grammars.seconds,
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        path = checkpoint(Path(folder), args.shape) if args.shape else EMBEDDED
        client = SLMClient(
            Settings(), path, precision=args.precision, max_new_tokens=LIMIT, batch_size=args.batch_size, engine=args.engine, constrain="always"
        )
        try:
            asked = questions()
            asked = asked[: args.rows + SPARE if args.shape else 2 * args.rows]
            both = [[reply.output_tokens if args.shape else reply.text for reply in timed(client, asked, way)["replies"]] for way in ("off", "always")]
            asked = [request for request, free, bound in zip(asked, *both, strict=True) if free == bound][: args.rows]
            for way in CONSTRAINTS:
                timed(client, asked[: args.batch_size], way)  # kernels, allocations
            rounds = [{way: timed(client, asked, way) for way in CONSTRAINTS} for _ in range(args.rounds)]
        finally:
            client.close()
    figures = {}
    for way in CONSTRAINTS:
        made = [one[way] for one in rounds]
        last = {name: value for name, value in made[-1].items() if name not in ("replies", "seconds", "compile_seconds")}
        figures[way] = last | {
            "seconds": [round(one["seconds"], 3) for one in made],
            "compile_seconds": round(statistics.median(one["compile_seconds"] for one in made), 4),
            "ms_a_token": round(1e3 * statistics.median(one["seconds"] / one["tokens"] for one in made), 4),
        }
    told = {
        "shape": args.shape or "phi-tiny", "engine": args.engine, "precision": args.precision, "batch_size": args.batch_size,
        "rows": len(asked), "tool_sets": len({str(sorted(tool["name"] for tool in request.wanted.tools)) for request in asked}),
        "ratio": {way: round(figures[way]["ms_a_token"] / figures["off"]["ms_a_token"], 4) for way in CONSTRAINTS[1:]}, "ways": figures,
    }  # fmt: skip
    print(told)
    write_json(args.out, {"created_at": now(), "code": code_version(), "hardware": hardware(), "packages": package_versions(), **told})
    return 0


if __name__ == "__main__":
    run(main)
