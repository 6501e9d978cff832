"""The decision file that compare.py writes, the rows files and the dataset behind it: read, checked, nothing in them trusted."""

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from slm_swap.common.errors import UserError
from slm_swap.common.reports import read_json, sha256_file
from slm_swap.common.settings import find_path, shown_path
from slm_swap.rows.conversations import conversation_text, normalized
from slm_swap.rows.examples import Example, parse_example
from slm_swap.rows.lines import read_jsonl, text_hash
from slm_swap.rows.prompts import ASKS, request_text
from slm_swap.scoring.tracks import TRACKS
from slm_swap.verdict.cascade import GUARANTEES
from slm_swap.verdict.decision import EXIT_CODES
from slm_swap.verdict.evaluations import QUESTIONS, shown_tool, tool_of
from slm_swap.verdict.html_report.sent import Texts, sent
from slm_swap.verdict.html_report.text import all_visible, one_line, visible, word_diff

MADE_BY = "03_compare/compare.py"
HALF_PAIR = re.compile("[\ud800-\udfff]")  # no text: it has no hash, and no row is made of it
REQUEST_LENGTH = 160  # characters of a request in the list of rows

# -- The file's form, as JSON Schema. What may be null may be absent, too: then it is null. --------------------------------------


def maybe(schema: dict) -> dict:
    return {"anyOf": [{"type": "null"}, schema]}


def record(**properties: dict) -> dict:
    required = [name for name, schema in properties.items() if "anyOf" not in schema]
    return {"type": "object", "properties": properties, "required": required}


def listed(schema: dict) -> dict:
    return {"type": "array", "items": schema}


def named(schema: dict, **more: Any) -> dict:
    return {"type": "object", "additionalProperties": schema, **more}


TEXT, FLAG = {"type": "string"}, {"type": "boolean"}
RATE = {"type": "number", "minimum": 0, "maximum": 1}
DIFFERENCE = {"type": "number", "minimum": -1, "maximum": 1}
AMOUNT = {"type": "number", "minimum": 0, "maximum": 1e15}
COUNT = {"type": "integer", "minimum": 0, "maximum": 10**15}
INTERVAL = {"type": "array", "items": DIFFERENCE, "minItems": 2, "maxItems": 2}
VERDICT = {"enum": list(EXIT_CODES)}
PATH = {"type": "string", "pattern": r"^[^\x00]+$"}
SIDE = record(path=maybe(PATH), sha256=maybe(TEXT), rows_path=maybe(PATH), rows_sha256=maybe(TEXT), ask=maybe({"enum": [*ASKS, "mixed"]}), shots=maybe(COUNT))
SPEED = record(rows=maybe(COUNT), concurrency=maybe(COUNT), p50=AMOUNT, p95=AMOUNT)  # seconds
LATENCY = record(alone=maybe(SPEED), loaded=maybe(SPEED), why=maybe(TEXT))
CAUSES = record(failed=maybe(COUNT), truncated=maybe(COUNT))
REPEAT = record(rows=COUNT, different_text=maybe(COUNT), exact_changed=maybe(COUNT))
COMPARED = {"azure": RATE, "slm": RATE, "difference": DIFFERENCE, "interval": maybe(INTERVAL)}
COST = record(
    currency=maybe(TEXT),
    azure=maybe(
        record(
            per_1000=maybe(AMOUNT),
            rows=maybe(COUNT),
            rows_counted=maybe(COUNT),
            input_tokens_per_row=maybe(AMOUNT),
            cached_tokens_per_row=maybe(AMOUNT),
            output_tokens_per_row=maybe(AMOUNT),
        )
    ),
    slm=maybe(record(per_1000=maybe(AMOUNT), utilisation=maybe(RATE), seconds_per_row=maybe(AMOUNT), hour=maybe(AMOUNT))),
    machine=maybe(record(hours_per_month=maybe(AMOUNT), per_month=maybe(AMOUNT), capacity_tasks_per_month=maybe(COUNT))),
    training=maybe(record(seconds=maybe(AMOUNT), cost=maybe(AMOUNT), pay_off_months=maybe(AMOUNT), per_month=maybe(AMOUNT))),
    traffic=maybe(
        record(tasks_per_month=maybe(COUNT), peak_factor=maybe(AMOUNT), fallback_share=maybe(RATE), cost_of_error=maybe(AMOUNT))
    ),
    bills=maybe(
        listed(
            record(
                tasks={"type": "integer", "minimum": 1, "maximum": 10**15},
                azure=maybe(AMOUNT),
                slm=maybe(AMOUNT),
                saving=maybe({"type": "number", "minimum": -1e15, "maximum": 1e15}),
                machines=maybe(COUNT),
                utilisation=maybe(RATE),
                slm_parts=maybe(named(maybe(AMOUNT))),
                slm_per_1000=maybe(AMOUNT),
                wrong_replies=maybe(AMOUNT),
                wrong_replies_cost=maybe(AMOUNT),
            )
        )
    ),
    cheaper=maybe(listed(record(first=COUNT, last=maybe(COUNT)))),
    looked_up_to=maybe(COUNT),
    why=maybe(TEXT),
    curve=maybe(listed(record(tasks=COUNT, machines=maybe(COUNT), azure=maybe(AMOUNT), slm=maybe(AMOUNT)))),
    paid_back_months=maybe(AMOUNT),
    assumed=maybe(listed(TEXT)),
    unknown=maybe(listed(TEXT)),
)
SCHEMA = record(
    stage={"const": "compare"},
    track={"enum": list(TRACKS)},
    verdict=VERDICT,
    sentence=maybe(TEXT),
    created_at=maybe(TEXT),
    code=maybe(record(commit=maybe(TEXT), dirty=maybe(FLAG))),
    rule=TEXT,
    delta=RATE,
    alpha=maybe({"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 0.5}),
    swap_alpha=maybe({"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 0.5}),
    withheld=maybe(VERDICT),
    question=maybe({"enum": list(QUESTIONS)}),
    questions=maybe(named(maybe(record(verdict=VERDICT, withheld=maybe(VERDICT), need=maybe(record(rows=maybe(COUNT), clusters=maybe(COUNT))))))),
    tools=maybe(COUNT),
    unmeasured=maybe(record(azure=CAUSES, slm=CAUSES, measure=listed(TEXT))),
    filtered=maybe(record(azure=COUNT, slm=COUNT, verdict_without=maybe(VERDICT))),
    latency=maybe(record(azure=maybe(LATENCY), slm=maybe(LATENCY), max_p95_ms=maybe(AMOUNT), p95_ms=maybe(AMOUNT), passed=maybe(FLAG))),
    repeat=maybe(record(azure=maybe(REPEAT), slm=maybe(REPEAT))),
    looks=maybe(record(number=COUNT, share=RATE, earlier=listed(record(at=maybe(TEXT), verdict=maybe(VERDICT), rows=maybe(COUNT))))),
    rows=maybe(COUNT),
    clusters=maybe(record(by=TEXT, count=COUNT, effective=AMOUNT)),
    reports=record(azure=SIDE, slm=SIDE, before=maybe(SIDE)),
    models=maybe(named(maybe({"type": "object"}))),
    labels=maybe(record(azure=maybe(TEXT), slm=maybe(TEXT), before=maybe(TEXT))),
    inputs=maybe(record(path=maybe(PATH), sha256=maybe(TEXT))),
    metrics=named(
        record(
            **COMPARED,
            p_value=maybe(RATE),
            p_worse=maybe(RATE),
            p_worse_holm=maybe(RATE),
            azure_interval=maybe(INTERVAL),
            slm_interval=maybe(INTERVAL),
            discordant=maybe(record(azure_better=COUNT, slm_better=COUNT, equal=COUNT)),
        ),
        minProperties=1,
    ),
    failing=maybe(listed(TEXT)),
    need=maybe(
        record(
            towards=VERDICT,
            metric=TEXT,
            rows=maybe(COUNT),
            clusters=maybe(COUNT),
            rows_if_equal=maybe(COUNT),
            azure_cost=maybe(AMOUNT),
            slm_cost=maybe(AMOUNT),
            why=maybe(TEXT),
        )
    ),
    matchers=maybe(named(record(verdict=VERDICT, metrics=named(record(**COMPARED))))),
    flips=maybe(FLAG),
    gap=maybe(
        record(
            metric=TEXT,
            azure=RATE,
            slm=RATE,
            difference=DIFFERENCE,
            errors=listed(record(kind=TEXT, azure=RATE, slm=RATE, difference=DIFFERENCE, azure_rows=COUNT, slm_rows=COUNT)),
            remedies=maybe(
                listed(
                    record(
                        remedy=TEXT,
                        kinds=listed(TEXT),
                        rows=COUNT,
                        gain_at_most=DIFFERENCE,
                        gain_measured=maybe(DIFFERENCE),
                    )
                )
            ),
            first=maybe(TEXT),
        )
    ),
    groups=maybe(
        record(
            by=TEXT,
            metric=TEXT,
            mean=maybe(DIFFERENCE),
            between_sd=maybe(AMOUNT),
            p_value=maybe(RATE),
            all=listed(
                record(group=TEXT, rows=COUNT, azure=RATE, slm=RATE, difference=DIFFERENCE, shrunk=DIFFERENCE, interval=INTERVAL)
            ),
        )
    ),
    gold_audit=maybe(
        record(
            rows=listed(record(id=TEXT, group=maybe(TEXT), reference=TEXT, reply=TEXT)),
            count=COUNT,
            verdict_without=maybe(VERDICT),
            metrics_without=maybe(named(record(**COMPARED))),
        )
    ),
    confidence=maybe(
        named(
            record(
                auroc=maybe(RATE),
                interval=maybe({"type": "array", "items": RATE, "minItems": 2, "maxItems": 2}),
                rows=COUNT,
                missing=maybe(COUNT),
                curve=listed({"type": "array", "items": RATE, "minItems": 2, "maxItems": 2}),
            )
        )
    ),
    cascade=maybe(
        record(
            path=TEXT, sha256=TEXT, guarantee={"enum": list(GUARANTEES)}, share_local=RATE, delta=RATE, alpha=RATE, regret=record(seen=RATE, bound=RATE),
        )
    ),
    before=maybe(
        record(
            metrics=named(
                record(before=RATE, slm=RATE, gain=DIFFERENCE, interval=maybe(INTERVAL), p_value=maybe(RATE)), minProperties=1
            ),
            worse=listed(TEXT),
            better=listed(TEXT),
            metric=maybe(TEXT),
        )
    ),
    cost=maybe(COST),
    sequential=maybe(
        record(
            stopped_after_rows=maybe(COUNT),
            rows_available=maybe(COUNT),
            calls_saved=maybe(COUNT),
            azure_cost_saved=maybe(AMOUNT),
            certain_at=maybe(named(maybe(COUNT))),
        )
    ),
    warnings=maybe(listed(TEXT)),
    trace=maybe(record(id=maybe(TEXT), url=maybe(TEXT))),
)


def with_nulls(value: Any, schema: dict) -> Any:
    """A value of a schema of this module, with every property that is absent there and null."""
    if value is None:
        return None
    schema = schema["anyOf"][1] if "anyOf" in schema else schema
    if "items" in schema:
        return [with_nulls(item, schema["items"]) for item in value]
    if "additionalProperties" in schema:
        return {key: with_nulls(child, schema["additionalProperties"]) for key, child in value.items()}
    if "properties" in schema:
        return value | {key: with_nulls(value.get(key), child) for key, child in schema["properties"].items()}
    return value


def read_decision(path: Path) -> dict[str, Any]:
    """A decision with every key of the contract, null where the file does not give it. Its strings are as they stand there.

    Raises:
        UserError: the file is missing or is not a decision.
    """
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import best_match

    value, shown = read_json(path, MADE_BY), shown_path(path)
    if value.get("stage") != "compare":
        raise UserError(f"{shown} is not a decision: give one that {MADE_BY} has written")
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        raise UserError(f"{shown} has a number in it that is none (NaN, infinity): make it again with {MADE_BY}") from None
    if fault := best_match(Draft202012Validator(SCHEMA).iter_errors(value)):
        place = visible(fault.json_path)[:200]
        raise UserError(f"{shown} is not a decision as compare writes it (see {place}): make it again with {MADE_BY}")
    return with_nulls(value, SCHEMA)


# -- Rows ------------------------------------------------------------------------------------------------------------------------


class Rows:
    """Both models' rows, side by side, read from their files each time that they are iterated over."""

    def __init__(self, decision: dict[str, Any], azure: Path, slm: Path):
        self.azure, self.slm = azure, slm
        self.track = TRACKS[decision["track"]]
        self.by_tool = (decision["groups"] or decision["clusters"] or {}).get("by") == "tool"
        audit, before = decision["gold_audit"], decision["before"]
        self.marks = {
            "reference": {row["id"] for row in audit["rows"]} if audit else set(),
            "broken": set(before["worse"]) if before else set(),
            "mended": set(before["better"]) if before else set(),
        }
        self.dataset = dataset(decision["inputs"])
        self.texts = Texts()  # of the rows that were iterated over
        models = {side: (decision["models"] or {}).get(side) or {} for side in ("azure", "slm")}
        self.asked = {
            side: {name: decision["reports"][side][name] for name in ("ask", "shots")} | {"local": model.get("kind") == "slm" and "endpoint" not in model}
            for side, model in models.items()
        }

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Each row as page.js takes it, every string of it visible.

        Raises:
            UserError: a line is not a row, or the files hold other rows; the line is named.
        """
        examples = examples_of(self.dataset) if self.dataset else {}
        for azure, slm in self.pairs():
            marks = [mark for mark, ids in self.marks.items() if azure["id"] in ids]
            row = {
                "id": azure["id"],
                "group": self.group(azure),
                "azure": self.side(azure),
                "slm": self.side(slm),
                "marks": marks,
            }
            if example := examples.get((azure["id"], azure.get("prompt_sha256"))):
                row["request"] = one_line(request_text(example), REQUEST_LENGTH)
                row["sent"] = sent(self.track.title, example, self.asked, self.texts)
            yield all_visible(row)

    def pairs(self) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """The lines of both files with the same id, in the order of the hosted model's; the other's wait in memory as far as theirs is another.

        Raises:
            UserError: as `__iter__`.
        """
        lines, waiting = read_jsonl(self.slm), dict[str, dict[str, Any]]()
        for where, azure in read_jsonl(self.azure):
            if not is_row(azure):
                raise self._mismatch(where)
            while azure["id"] not in waiting:
                _, slm = next(lines, (None, None))
                if not is_row(slm) or slm["id"] in waiting:
                    raise self._mismatch(where)
                waiting[slm["id"]] = slm
            yield azure, waiting.pop(azure["id"])
        if waiting or next(lines, None):
            raise self._mismatch(f"{shown_path(self.azure)}, behind its end")

    def _mismatch(self, where: str) -> UserError:
        return UserError(f"{where}: not the same row as in {shown_path(self.slm)}: evaluate and compare again")

    def group(self, row: dict[str, Any]) -> str:
        """The row's group; the tool that its reference calls where tools are what is compared, or no group is given."""
        if self.by_tool:
            return shown_tool(row, self.track)
        return row.get("group") or tool_of(row, self.track) or ""

    def side(self, row: dict[str, Any]) -> dict[str, Any]:
        """What one model did: whether it was right, the error, and the difference between its reply and the reference."""
        told = {
            "right": row["scores"].get(self.track.exact) == 1,
            "error": row.get("error"),
            "diff": word_diff(visible(row["reference"]), visible(row["reply"])),
        }
        if row.get("reply_error") or row.get("finish_reason") not in (None, "stop"):
            told["ended"] = row.get("reply_error") or row["finish_reason"]
        tokens = row.get("tokens") if isinstance(row.get("tokens"), dict) else {}
        spent = {"input_tokens": tokens.get("input"), "output_tokens": tokens.get("output"), "seconds": row.get("seconds"), "load": row.get("load")}
        return told | {name: value for name, value in spent.items() if isinstance(value, (int, float)) and value >= 0}


def is_row(value: Any) -> bool:
    """Whether a decoded line has what is read of it here, of the right types."""
    if not isinstance(value, dict) or not isinstance(value.get("scores"), dict):
        return False
    texts = all(isinstance(value.get(name), str) for name in ("id", "reply", "reference"))
    perhaps = ("group", "prompt_sha256", "error", "finish_reason", "reply_error")
    return texts and all(value.get(name) is None or isinstance(value[name], str) for name in perhaps)


def open_rows(decision: dict[str, Any]) -> Rows | None:
    """The rows behind a decision; None where it does not name both files with their hashes.

    Raises:
        UserError: as `rows_file`.
    """
    azure, slm = (rows_file(decision["reports"][side]) for side in ("azure", "slm"))
    return Rows(decision, azure, slm) if azure and slm else None


def rows_file(report: dict[str, str | None]) -> Path | None:
    """The rows file that a decision names; None where it names none with a hash.

    Raises:
        UserError: it is missing, or not the file that was compared.
    """
    if not report["rows_path"] or not report["rows_sha256"]:
        return None
    path = find_path(report["rows_path"])
    if not path.is_file():
        raise UserError(f"no rows at {shown_path(path)}: put the file back, or evaluate and compare again")
    if sha256_file(path) != report["rows_sha256"]:
        raise UserError(f"{shown_path(path)} is not the file that was compared (its sha256 differs): compare again")
    return path


def dataset(inputs: dict[str, Any] | None) -> Path | None:
    """The dataset that the models were evaluated on, where it is still there as it was."""
    if not inputs or not inputs["path"] or not inputs["sha256"]:
        return None
    path = find_path(inputs["path"])
    return path if path.is_file() and sha256_file(path) == inputs["sha256"] else None


def examples_of(path: Path) -> dict[tuple[str, str], Example]:
    """The rows of a dataset by what rows files know them by: id, and hash of the prompt."""
    found = {}
    for where, line in read_jsonl(path):
        with suppress(UserError):  # the evaluation had another file under that name
            example = parse_example(line, where)
            found[example.id, text_hash(example.prompt)] = example
    return found


def prompt_hashes(path: Path) -> set[str]:
    """The hashes of a dataset's prompts, as rows files have them."""
    return {text_hash(prompt) for prompt in _prompts(path) if not HALF_PAIR.search(prompt)}


def _prompts(path: Path) -> Iterator[str]:
    for _, row in read_jsonl(path):
        if isinstance(row, dict) and isinstance(row.get("prompt"), str):
            yield row["prompt"]
        elif isinstance(row, dict) and "messages" in row:
            with suppress(UserError):  # the evaluation had another file under that name
                yield conversation_text(normalized(row["messages"], ""))


