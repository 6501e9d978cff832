"""What an evaluation says on the console when it is done."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from slm_swap.clients.loading import trained_as
from slm_swap.common.settings import find_path, shown_path
from slm_swap.evaluating.finished import again_command
from slm_swap.scoring.words import error_name, metric_name

WORTH_A_WARNING = 0.01  # share of rows that are not measured
NEARLY_ALL = 0.9  # share of replies that ran to the limit
CAUSES = {"failed": "their requests failed: reply_error says why", "truncated": "cut by --max-new-tokens {limit}"}


def show(report: dict[str, Any], out: Path, argv: Sequence[str], warn: Callable[[str], None]) -> None:
    """The report's numbers on standard output, and warnings of what they do not say; `argv` are the flags of this run."""
    if teachers := report.get("references_by_teacher"):
        rows, told = sum(teachers.values()), ", ".join(teachers)
        print(f"agreement, not accuracy: {rows} of {report['counts']['rows']} references are replies of {told}")
    for name, value in report["metrics"].items():
        print(f"{metric_name(name):28} {value:7.4f}")
    counts = report["counts"]
    missed = ", ".join(f"{error_name(error)} {count}" for error, count in counts["errors"].items() if count)
    print(f"{counts['rows']} rows in {report['seconds']['generate']} s; missed: {missed or 'none'}")
    for line in (_batches(report), _latency(report["latency"]), _repeat(report), _cost(report)):
        if line:
            print(line)
    _warn_of_unmeasured(report, argv, warn)
    if bound := counts.get("constrained"):
        print(f"under a grammar: {bound['rows']} of {counts['rows']} replies")
        if reasons := bound["without_grammar"]:
            told = "; ".join(f"{count} for {reason}" for reason, count in reasons.items())
            warn(f"{sum(reasons.values())} of {counts['rows']} rows have no grammar and were asked freely: {told}")
    cut = counts["errors"]["truncated"]
    if report["model"].get("kind") == "slm" and cut >= NEARLY_ALL * counts["rows"]:
        warn(
            f"{cut} of {counts['rows']} replies ran to the limit: this model does not end its replies. Raise --max-new-tokens if they are long; "
            "else the checkpoint names the wrong end (generation_config.json, chat template), or its training taught none"
        )
    if counts["prompt_too_long"]:
        warn(
            f"{counts['prompt_too_long']} of {counts['rows']} prompts do not fit in the model's context and count as misses: a larger "
            "--max-new-tokens does not help; shorten the prompts, or take a model with a longer context"
        )
    fingerprints = report["model"].get("system_fingerprint") or []
    if len(fingerprints) > 1:
        warn(
            f"{len(fingerprints)} versions of the hosted model answered (system_fingerprint {', '.join(fingerprints)}): it changed during "
            "the run; --repeat 2 measures how much its replies differ"
        )
    print(f"report: {shown_path(out)}")


def warn_of_training(model: str | Path | None, ask: str, thinking: str | None, shots: int, warn: Callable[[str], None]) -> None:
    """Say where an adapter, or a merged model, was trained on rows that were asked in another form than now, without the `thinking`, or with
    another number of `shots`."""
    trained, thought, shown = trained_as(find_path(model)) if model else (None, None, None)
    if trained not in (None, "mixed", ask):
        warn(f"{shown_path(find_path(model))} was trained on rows asked in {trained} form, and these are asked in {ask} form: --ask {trained}")
    if thought == "off" and thinking == "on":
        warn(f"{shown_path(find_path(model))} was trained to reply without thinking: leave --thinking out")
    if shown not in (None, shots):
        remedy = f"--few-shot FILE --shots {shown}" if shown else "leave --few-shot out"
        warn(f"{shown_path(find_path(model))} was trained on rows that are shown {shown} others, and these are shown {shots}: {remedy}")


def _warn_of_unmeasured(report: dict[str, Any], argv: Sequence[str], warn: Callable[[str], None]) -> None:
    rows, found = report["counts"]["rows"], {why: count for why, count in report["counts"]["unmeasured"].items() if count}
    total, limits = sum(found.values()), [report["args"].get("max_new_tokens"), *(one["max_new_tokens"] for one in report.get("again") or [])]
    if not total:
        return
    limit = max((limit for limit in limits if limit), default=256)
    causes = "; ".join(f"{count} {why}, {CAUSES[why].format(limit=limit)}" for why, count in found.items())
    if total <= WORTH_A_WARNING * rows:
        print(f"not measured: {causes}")
        return
    remedy = "record those replies again" if report["model"].get("kind") == "replay" else f"ask exactly these again: {again_command(argv, list(found), limit)}"
    warn(f"{total} of {rows} rows are not measured, and the metrics count them as they stand ({causes}): {remedy}")


def _batches(report: dict[str, Any]) -> str | None:
    used, fits = (report["model"].get(name) for name in ("batch_size_used", "batch_size_fits"))
    return f"batches of {used} rows: --batch-size auto takes {fits} at a time on this GPU, which is faster" if fits else None


def _latency(latency: dict[str, Any]) -> str | None:
    parts = []
    for name, told in (("alone", latency["alone"]), ("loaded", latency["loaded"])):
        if told:
            how = "asked alone" if name == "alone" else f"{told['concurrency']} at a time"
            parts.append(f"{how} p50 {told['p50']:.3g} s, p95 {told['p95']:.3g} s ({told['rows']} rows)")
    return f"latency: {'; '.join(parts)}" if parts else None


def _repeat(report: dict[str, Any]) -> str | None:
    told = report.get("repeat")
    if not told:
        return None
    cost = report["cost"]["repeat"]
    paid = "; what asking again cost is not known" if cost is None else f"; asking again cost {cost:.4g}, which is in cost.total"
    return (
        f"asked {told['runs']} times: {told['different_text']} of {told['rows']} replies have another text, "
        f"{told['exact_changed']} change between right and wrong{paid}"
    )


def _cost(report: dict[str, Any]) -> str | None:
    rows, counted = report["counts"]["rows"], report["tokens"]["rows"]
    if report["model"].get("kind") != "azure" or counted == rows:
        return None
    return f"tokens: known of {counted} of {rows} rows; tokens and cost are of these alone"
