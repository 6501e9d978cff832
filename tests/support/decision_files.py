"""A whole decision with its rows files and dataset, as compare.py writes them: rows are generated and really scored, the
statistics are of the right form only (Wald's intervals, made-up p-values); the cost is worked out, from made-up prices."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from random import Random

from slm_swap.clients.pricing import HostedPrices, LocalPrices, Prices, Traffic, compare_costs
from slm_swap.clients.protocol import Reply
from slm_swap.common.reports import sha256_file
from slm_swap.evaluating.row import Row
from slm_swap.rows.examples import Example
from slm_swap.rows.lines import dump_json
from slm_swap.scoring.form import form_of
from slm_swap.scoring.metrics import MATCHERS
from slm_swap.scoring.tracks import TRACKS
from slm_swap.verdict.comparison import sureness

TRACK = TRACKS["toolcall"]
TOOLS = (
    "book_table", "cancel_order", "convert_currency", "create_invoice", "find_flights", "get_weather", "list_songs", "play_radio",
    "reserve_room", "search_recipes", "send_parcel", "track_parcel", "translate_text", "update_contact",
)  # fmt: skip
WORDS = "amber birch cedar delta ember fjord grove harbour island juniper kettle lagoon meadow nectar orchard pebble".split()
KINDS = {
    "wrong_tool": "wrong_tool", "missing_argument": "missing", "extra_argument": "extra", "wrong_type": "type",
    "wrong_value": "value", "truncated": "truncated", "filtered": "filtered", "refused": "filtered",
}  # fmt: skip
MADE = ("wrong_value", "missing_argument", "extra_argument", "wrong_type", "extra_text", "wrong_tool", "truncated", "no_json")


def call(tool: str, arguments: dict) -> str:
    return f'<tool_call name="{tool}">{dump_json(arguments)}</tool_call>'


def make_example(number: int, rng: Random) -> tuple[Example, str, dict]:
    tool = rng.choice(TOOLS)
    arguments = {
        "place": rng.choice(WORDS),
        "count": rng.randint(1, 90),
        "note": " ".join(rng.choices(WORDS, k=rng.randint(1, 6))),
    }
    request = (
        f"Request: {tool.replace('_', ' ')}, {arguments['count']} times at {arguments['place']}, and note {arguments['note']}."
    )
    prompt = f"Tool signature: {tool}(place: str, count: int, note: str)\nTool description: made up for a test.\n{request}"
    return Example(prompt, call(tool, arguments), f"row-{number:05}", group=tool), tool, arguments


def make_reply(tool: str, arguments: dict, error: str | None, rng: Random) -> Reply:
    changed, finish = dict(arguments), "stop"
    match error:
        case "wrong_value":
            changed["note"] += " " + rng.choice(WORDS)
        case "missing_argument":
            del changed["count"]
        case "extra_argument":
            changed["language"] = "en"
        case "wrong_type":
            changed["count"] = str(changed["count"])
        case "wrong_tool":
            tool = next(other for other in TOOLS if other != tool)
        case "truncated":
            finish = "length"
    text = call(tool, changed)
    text = {"truncated": text[:-25], "no_json": "Sorry, I cannot do that.", "extra_text": f"Sure! Here you are:\n{text}"}.get(
        error, text
    )
    sure = -rng.expovariate(1.0 if error else 5.0)
    told = {"min_logprob": sure, "sum_logprob": 3 * sure, "tokens": 9, "tool_logprob": -rng.expovariate(9.0), "min_margin": rng.uniform(0, 9)}
    return Reply(text, finish_reason=finish, input_tokens=160, output_tokens=40, seconds=rng.uniform(0.1, 0.6), confidence=told)


def make_rows(
    count: int, seed: int = 1, misses: tuple[float, float] = (0.08, 0.14)
) -> tuple[list[Example], list[dict], list[dict]]:
    """Examples and the lines of both rows files; in every 40th row both models give the same wrong answer."""
    rng = Random(seed)
    examples, sides = [], ([], [])
    for number in range(count):
        example, tool, arguments = make_example(number, rng)
        examples.append(example)
        same = make_reply(tool, arguments, "wrong_value", rng) if number % 40 == 39 else None
        reference = TRACK.reference(example)
        for lines, miss in zip(sides, misses, strict=True):
            error = rng.choice(MADE) if rng.random() < miss else None
            reply = same or make_reply(tool, arguments, error, rng)
            form = form_of("toolcall", example, reply.text, reply.finish_reason)
            lines.append(Row(example, reply, TRACK.score(reference, reply.text, reply.finish_reason), form=form).to_json(TRACK))
    return examples, *sides


def interval_of(differences: list[float]) -> list[float]:
    mean = sum(differences) / len(differences)
    spread = math.sqrt(sum((value - mean) ** 2 for value in differences)) / len(differences)
    return [max(-1.0, mean - 1.645 * spread), min(1.0, mean + 1.645 * spread)]


def compared(azure: list[dict], slm: list[dict], scores: Callable[[dict], dict] = lambda line: line["scores"]) -> dict:
    found = {}
    for name in TRACK.row_metrics(TRACK.score(TRACK.reference(Example("", call("a", {}))), "").strict):
        sides = {side: [scores(line)[name] for line in lines] for side, lines in (("azure", azure), ("slm", slm))}
        differences = [left - right for left, right in zip(sides["azure"], sides["slm"], strict=True)]
        means = {side: sum(values) / len(values) for side, values in sides.items()}
        found[f"{name}_rate" if name in TRACK.yes_no else name] = {
            **means,
            "difference": means["azure"] - means["slm"],
            "interval": interval_of(differences),
            "azure_interval": [max(0.0, end) for end in interval_of(sides["azure"])],
            "slm_interval": [max(0.0, end) for end in interval_of(sides["slm"])],
            "discordant": {
                "azure_better": sum(d > 0 for d in differences),
                "slm_better": sum(d < 0 for d in differences),
                "equal": sum(d == 0 for d in differences),
            },
            "p_value": 0.4,
            "p_worse": 0.01,
            "p_worse_holm": 0.03,
        }
    return found


def make_gap(azure: list[dict], slm: list[dict]) -> dict:
    def rows(lines: list[dict], kind: str) -> int:
        return sum(KINDS.get(line["error"], "format") == kind for line in lines if line["error"])

    errors = []
    for kind in ("format", "wrong_tool", "missing", "extra", "type", "value", "truncated", "filtered", "failed"):
        counts = rows(azure, kind), rows(slm, kind)
        rates = [number / len(azure) for number in counts]
        errors.append(
            {
                "kind": kind,
                "azure": rates[0],
                "slm": rates[1],
                "difference": rates[1] - rates[0],
                "azure_rows": counts[0],
                "slm_rows": counts[1],
            }
        )
    right = [sum(line["scores"][TRACK.exact] for line in lines) / len(lines) for lines in (azure, slm)]
    formats = next(error for error in errors if error["kind"] == "format")
    values = next(error for error in errors if error["kind"] == "value")
    remedies = [
        {
            "remedy": "Force the reply's form (grammar or JSON schema) while it is generated",
            "kinds": ["format"],
            "rows": formats["slm_rows"],
            "gain_at_most": formats["slm"],
            "gain_measured": formats["slm"] / 2,
        },
        {
            "remedy": "Fine-tune on rows like these",
            "kinds": ["value", "missing"],
            "rows": values["slm_rows"],
            "gain_at_most": values["slm"],
            "gain_measured": None,
        },
    ]
    return {
        "metric": "args_exact_rate",
        "azure": right[0],
        "slm": right[1],
        "difference": right[0] - right[1],
        "errors": errors,
        "remedies": remedies,
        "first": remedies[0]["remedy"],
    }


def make_groups(azure: list[dict], slm: list[dict]) -> dict:
    found = []
    for tool in sorted({line["group"] or "" for line in azure}):
        pairs = [
            (a["scores"][TRACK.exact], s["scores"][TRACK.exact])
            for a, s in zip(azure, slm, strict=True)
            if (a["group"] or "") == tool
        ]
        means = [sum(side) / len(pairs) for side in zip(*pairs, strict=True)]
        difference = means[0] - means[1]
        found.append(
            {
                "group": tool,
                "rows": len(pairs),
                "azure": means[0],
                "slm": means[1],
                "difference": difference,
                "shrunk": 0.6 * difference,
                "interval": [max(-1.0, 0.6 * difference - 0.08), min(1.0, 0.6 * difference + 0.08)],
            }
        )
    found.sort(key=lambda group: -group["shrunk"])
    return {"by": "tool", "metric": "args_exact_rate", "mean": 0.05, "between_sd": 0.03, "all": found}


def make_cost(verdict: str = "FINE_TUNE", local: dict | None = None, **traffic: float | None) -> dict:
    """A hosted task costs 0.0005413 USD; a machine 1,460 USD a month, for 3,864,705 tasks at twice the mean rate."""
    azure = {
        "model": {"kind": "azure", "deployment": "simulator"},
        "tokens": {"input": 412_500, "cached": 128_000, "output": 48_200, "rows": 1000},
        "counts": {"rows": 1000, "failed_requests": 0},
    }
    slm = {
        "model": {"kind": "slm", "path": "models/phi-4-mini", "adapter": "04_ft/adapter_toolcall"},
        "seconds": {"generate": 340.0},
        "counts": {"rows": 1000, "failed_requests": 0},
    }
    prices = Prices(
        "slm_swap/prices.toml",
        "USD",
        {"simulator": HostedPrices(1.0, 0.5, 4.0)},
        LocalPrices(**{"hour": 2.0, "hours_per_month": 730, "training_hour": 2.0, "pay_off_months": 12} | (local or {})),
        Traffic(**{"tasks_per_month": 10_000_000, "peak_factor": 2, "cost_of_error": 0.01} | traffic),
    )
    return compare_costs(azure, slm, prices, 5400.0, delta=0.02, verdict=verdict)


def write(path: Path, *values: dict) -> dict[str, str]:
    """JSON lines in ASCII, so that halves of surrogate pairs can be written; gives path and hash as a decision has them."""
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return {"path": str(path), "sha256": sha256_file(path)}


def make_decision(
    folder: Path, rows: int = 120, change: Callable[[dict], None] | None = None, lines: tuple | None = None
) -> Path:
    """Write a decision, its rows files and its dataset to a folder; `change` may alter the decision before it is written."""
    examples, azure, slm = lines or make_rows(rows)
    inputs = write(folder / "test.jsonl", *(example.to_json() for example in examples))
    sides = {}
    for side, found in (("azure", azure), ("slm", slm)):
        written = write(folder / f"{side}.rows.jsonl", *found)
        sides[side] = write(folder / f"{side}.json", {"stage": "eval"}) | {"ask": "text", "shots": None} | {f"rows_{key}": value for key, value in written.items()}
    metrics = compared(azure, slm)
    suspect = [
        {"id": a["id"], "group": a["group"], "reference": a["reference"], "reply": a["reply"]}
        for a, s in zip(azure, slm, strict=True)
        if a["error"] and a["reply"] == s["reply"]
    ]
    rest = [pair for pair in zip(azure, slm, strict=True) if pair[0]["id"] not in {row["id"] for row in suspect}]
    only = {
        side: [line["id"] for line, other in zip(*pair, strict=True) if line["error"] is None and other["error"]]
        for side, pair in (("azure", (azure, slm)), ("slm", (slm, azure)))
    }
    decision = {
        "schema_version": 1,
        "stage": "compare",
        "created_at": "2026-11-23T13:00:00+00:00",
        "code": {"commit": "0" * 40, "dirty": False},
        "track": "toolcall",
        "verdict": "FINE_TUNE",
        "fine_tune": True,
        "rule": "paired",
        "delta": 0.02,
        "alpha": 0.05,
        "rows": len(azure),
        "sentence": "phi-4-mini is worse than gpt-4o-mini by more than 2 points on fully right calls: fine-tune it, then measure again.",
        "clusters": {"by": "tool", "count": len(TOOLS), "effective": 12.6},
        "reports": sides | {"before": None},
        "models": {
            "azure": {"kind": "azure", "deployment": "gpt-4o-mini"},
            "slm": {"kind": "slm", "path": "models/phi-4-mini", "precision": "int8"},
            "before": None,
        },
        "labels": {"azure": "gpt-4o-mini", "slm": "phi-4-mini + adapter_toolcall", "before": "phi-4-mini"},
        "inputs": inputs | {"rows": len(azure), "rows_sha256": "0" * 64},
        "metrics": metrics,
        "failing": ["args_exact_rate"],
        "question": "these",
        "questions": {"these": {"verdict": "FINE_TUNE"}, "others": {"verdict": "NEED_MORE_DATA", "need": {"clusters": 41}}},
        "tools": len(TOOLS),
        "latency": {
            "azure": {"alone": {"rows": 20, "p50": 0.41, "p95": 0.98}, "loaded": {"rows": 80, "concurrency": 32, "p50": 0.5, "p95": 1.4}},
            "slm": {"alone": {"rows": 20, "p50": 0.22, "p95": 0.3}, "why": "not under load"},
        },
        "need": {
            "towards": "FINE_TUNE",
            "metric": "args_exact_rate",
            "rows": 240,
            "clusters": 28,
            "rows_if_equal": 900,
            "azure_cost": 0.15,
            "slm_cost": 0.05,
            "why": "The interval still reaches over the margin.",
        },
        "matchers": {
            matcher: {
                "verdict": verdict,
                "metrics": compared(azure, slm, lambda line, matcher=matcher: line["scores_by_matcher"][matcher]),
            }
            for matcher, verdict in zip(MATCHERS, ("FINE_TUNE", "FINE_TUNE", "NEED_MORE_DATA"), strict=True)
        },
        "flips": True,
        "gap": make_gap(azure, slm),
        "groups": make_groups(azure, slm),
        "confidence": sureness(slm, TRACK, None),
        "cascade": {
            "path": "cascade.json", "sha256": "c" * 64, "guarantee": "regret", "share_local": 0.62, "delta": 0.02, "alpha": 0.05,
            "regret": {"seen": 0.008, "bound": 0.0195},
        },
        "gold_audit": {
            "rows": suspect,
            "count": len(suspect),
            "verdict_without": "FINE_TUNE",
            "metrics_without": compared(*map(list, zip(*rest, strict=True))),
        },
        "before": {
            "metrics": {
                name: {
                    "before": max(0.0, value["slm"] - 0.2),
                    "slm": value["slm"],
                    "gain": min(0.2, value["slm"]),
                    "interval": [0.12, 0.28],
                    "p_value": 0.001,
                }
                for name, value in metrics.items()
            },
            "worse": only["azure"][:2],
            "better": only["slm"][:3],
            "metric": "args_exact_rate",
        },
        "cost": make_cost(),
        "sequential": {
            "stopped_after_rows": len(azure),
            "rows_available": 2 * len(azure),
            "calls_saved": len(azure),
            "azure_cost_saved": 0.07,
            "certain_at": {"args_exact_rate": 80, "args_f1": None},
        },
        "warnings": ["3 requests of the azure report failed and count as misses: evaluate it again"],
        "trace": {"id": "t-1", "url": "https://langfuse.example/trace/t-1"},
    }
    if change:
        change(decision)
    write(folder / "decision.json", decision)
    return folder / "decision.json"
