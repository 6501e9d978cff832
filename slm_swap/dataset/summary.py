"""What prepare_data.py says of its report."""

from collections.abc import Iterator
from pathlib import Path

from slm_swap.common.settings import shown_path
from slm_swap.dataset.build import DROPPED
from slm_swap.dataset.splits import LEAST_TEST

NO_FAULTS = ("unused", "shares_test_tool", "too_few", "not_trained", "duplicate")  # reasons that need no example on the console


def summary(report: dict) -> str:
    """What was seen, read, kept and dropped, and the splits, as a small table."""
    counts, replies = report["counts"], report["replies"]
    lines = []
    for part in report.get("inputs", ()):
        if part.get("forms"):
            lines.append(f"{part['path']}: " + "; ".join(f"{form}, {rows} rows" for form, rows in part["forms"].items()))
    lines += [f"{'read':<32}{counts['read']:>8}", f"{'kept':<32}{counts['kept']:>8}"]
    lines += [f"{'dropped: ' + reason:<32}{count:>8}" for reason, count in sorted(counts["dropped"].items())]
    if replies["share"] is not None and report.get("args", {}).get("source") == "chat":
        lines.append(f"{'replies that can be measured':<32}{replies['share']:>8.1%} ({replies['measurable']} of {replies['read']})")
    for track, splits in report["splits"].items():
        if any(split["rows"] for split in splits.values()):
            shown = {name: split["rows"] for name, split in splits.items() if split["rows"] or name != "calibration"}  # which few ask for
            lines += [f"{track + '/' + name:<32}{rows:>8}" for name, rows in shown.items()]
    return "\n".join(lines)


def remarks(report: dict, out_dir: Path) -> Iterator[str]:
    """What the table does not say: the first rows dropped, and what else is worth a line."""
    examples = report["dropped_examples"]
    faults = [(reason, drop) for reason in examples if reason not in NO_FAULTS for drop in examples[reason]]
    for reason, drop in faults[:3]:
        yield f"dropped: {drop['where']}: {reason}" + (f": {drop['why']}" if drop["why"] else "")
    if report["counts"]["dropped"]:
        yield f"every dropped row, with why: {shown_path(out_dir / DROPPED)}"
    if report["renamed_ids"]:
        yield f"{report['renamed_ids']} ids stood twice: their rows are told apart by -2, -3, ..."
    for track, splits in report["splits"].items():
        if not any(split["rows"] for split in splits.values()) and "too_few" in report["counts"]["dropped"]:
            why = next((drop["why"] for drop in report["dropped_examples"]["too_few"] if drop["why"].startswith(track)), None)
            if why:
                yield f"no splits of {why}"
    for track, splits in report["splits"].items():
        test, rows = splits["test"]["rows"], sum(split["rows"] for split in splits.values())
        more = min(LEAST_TEST, rows // 2)
        if report["args"]["test_size"] is None and 0 < test < more:
            yield f"{track}/test has {test} rows, which seldom suffice for a SWAP at a margin of 5 points; {LEAST_TEST} mostly do: --test-size {more} puts more of them there"
    if report["form"] == "conversation" and report["args"]["source"] in ("xlam", "bfcl"):
        yield (
            f"{report['without_structured_twin']} rows have several calls or none: all toolcall rows are written as conversations, and "
            "those have no structured twin (--calls one leaves them out)"
        )
    for note, count in report["notes"].items():
        yield f"{note}: {count}"
