"""Rows as a Langfuse dataset, and an evaluation as an experiment on it.

Which server takes which form of an experiment:

- v4 and Langfuse Cloud go by the attributes of the spans (`Experiment.attributes`), as `run_experiment` of SDK 5 sets them. A
  row's own span is its item: `root_observation_id` is that span's id. The same five attributes (`id`, `name`, `dataset.id`,
  `item.id`, `item.root_observation_id`) belong on every span below it; `item.expected_output` only on the row's span; a run's own
  root span and those of its batches, which hold many rows, carry none. The environment is that of the whole trace. Rows may share one
  trace. The scores that are compared are those of the row's span. On v3 servers the attributes are shown as metadata and do nothing else.
- v3 goes by run items (`Experiment.link`), posted when the spans are made: what SDK 4.18 does beside the attributes. v4 servers
  that write in the new form only have no such endpoint, which is no error.

Doing both, with the experiment's id derived as the servers and SDK 5 derive it, shows one experiment on either.
"""

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from slm_swap.clients.chat_requests import request_body
from slm_swap.common.errors import UserError
from slm_swap.common.exact_json import ExactEncoder
from slm_swap.common.settings import Settings
from slm_swap.rows.examples import Example
from slm_swap.rows.lines import dump_json, text_hash
from slm_swap.rows.prompts import request_of
from slm_swap.tracing.api import LangfuseApi

AT_ONCE = 4  # requests; Langfuse's limits are by the minute
ENVIRONMENT = "sdk-experiment"  # keeps experiments out of the pages of production traffic


def dataset_name(track: str, split: str) -> str:
    """The dataset of a split: Langfuse shows the slashes as folders."""
    return f"slm_swap/{track}/{split}"


def item_id(dataset: str, row_id: str) -> str:
    """A row's item: ids are unique in the whole project, so the dataset's name is a part of them."""
    return text_hash(f"{dataset}\n{row_id}")[:32]


def make_item(dataset: str, track: str, example: Example) -> dict[str, Any]:
    """The item of a row; `metadata.content_hash` is over all that it holds, so a changed system prompt changes it too."""
    row = example.to_json()
    metadata = {name: row[name] for name in ("id", "group", "source", "tools", "schema", "accept") if name in row}
    request = request_of(track, example)
    asked = request_body(request) if request.native else request.messages
    body = {"input": asked, "expectedOutput": _expected(example), "metadata": metadata}
    metadata["content_hash"] = text_hash(json.dumps(body, sort_keys=True, ensure_ascii=False, cls=ExactEncoder))
    return {"id": item_id(dataset, example.id), "datasetName": dataset, "status": "ACTIVE", **body}


def _expected(example: Example) -> Any:
    """The reply wanted: a conversation's calls, or what is said where none is due, as a message; any other as its text."""
    if example.calls is None:
        return example.completion
    calls = [
        {"id": f"call_{at}", "type": "function", "function": {"name": call["name"], "arguments": dump_json(call["arguments"])}}
        for at, call in enumerate(example.calls)
    ]
    return {"role": "assistant", "content": example.content} | ({"tool_calls": calls} if calls else {})


# -- Push ------------------------------------------------------------------------------------------------------------------------


def push(api: LangfuseApi, dataset: str, track: str, examples: list[Example], source: dict[str, Any]) -> dict[str, int]:
    """Make the dataset hold these rows and no other: counts of items created, updated, unchanged and archived.

    Items that someone has added by hand stay as they are. A push that was cut off is finished by the next one.

    Raises:
        UserError: as `LangfuseApi`.
    """
    api.put_dataset(dataset, f"Rows of the track {track}: messages as sent, completion as expected.", {"track": track, **source})
    there = {item["id"]: item for item in api.items(dataset)}
    counts = {"created": 0, "updated": 0, "unchanged": 0, "archived": 0}
    changed = []
    wanted = {item["id"]: item for item in (make_item(dataset, track, example) for example in examples)}
    for name, item in wanted.items():
        if name not in there:
            counts["created"] += 1
        elif there[name].get("status") != "ACTIVE" or _hash(there[name]) != item["metadata"]["content_hash"]:
            counts["updated"] += 1
        else:
            counts["unchanged"] += 1
            continue
        changed.append(item)
    for name, item in there.items():
        ours = name == item_id(dataset, str((item.get("metadata") or {}).get("id")))
        if ours and name not in wanted and item.get("status") != "ARCHIVED":
            counts["archived"] += 1
            kept = {key: item.get(key) for key in ("id", "input", "expectedOutput", "metadata")}
            changed.append(kept | {"datasetName": dataset, "status": "ARCHIVED"})
    _each(api.put_item, changed)
    return counts


def _hash(item: dict) -> str | None:
    metadata = item.get("metadata")
    return metadata.get("content_hash") if isinstance(metadata, dict) else None


def _each(function: Any, values: list) -> list:
    """The function's results, a few calls at once; after an error no further call begins."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        try:
            return list(pool.map(function, values))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


# -- Experiments -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Experiment:
    """A run over rows of one dataset. Two runs of one `name` are one experiment: give each model its own."""

    name: str
    id: str
    dataset: str
    dataset_id: str
    url: str
    metadata: dict[str, Any] = field(default_factory=dict)

    def attributes(self, example: Example, span_id: str) -> dict[str, str]:
        """What every span of a row carries; `span_id` is the row's own span (16 hex digits)."""
        return {
            "langfuse.experiment.id": self.id,
            "langfuse.experiment.name": self.name,
            "langfuse.experiment.metadata": json.dumps(self.metadata, ensure_ascii=False),
            "langfuse.experiment.dataset.id": self.dataset_id,
            "langfuse.experiment.item.id": item_id(self.dataset, example.id),
            "langfuse.experiment.item.root_observation_id": span_id,
        }

    def root_attributes(self, example: Example, span_id: str) -> dict[str, str]:
        """What the row's own span carries: `attributes` and what only this span needs."""
        return self.attributes(example, span_id) | {
            "langfuse.experiment.item.expected_output": example.completion,
            "langfuse.environment": ENVIRONMENT,
        }

    def link(self, api: LangfuseApi, done: Iterable[tuple[Example, str, str]]) -> int:
        """Post run items of (row, trace id, span id) that are not posted yet; how many the server took (0 on v4).

        Raises:
            UserError: as `LangfuseApi`.
        """

        def post(row: tuple[Example, str, str]) -> bool:
            example, trace, span = row
            return api.link(self.name, item_id(self.dataset, example.id), trace, span, self.metadata)

        rows = list(done)
        if not rows or not post(rows[0]):
            return 0
        return 1 + sum(_each(post, rows[1:]))


def open_experiment(
    settings: Settings, track: str, dataset: str, examples: list[Example], name: str, push_command: str, metadata: dict[str, Any]
) -> Experiment:
    """The experiment `name` on a dataset that holds these rows as they are now.

    `push_command` is what the user runs where it does not; `metadata` is shown beside the experiment (model, commit, ...).

    Raises:
        UserError: the dataset is not there, or rows are missing in it or have changed since; also as `LangfuseApi`.
    """
    with LangfuseApi(settings) as api:
        found = api.dataset(dataset)
        if found is None:
            raise UserError(f"Langfuse at {api.host} has no dataset {dataset}: push it first with {push_command}")
        there = {item["id"]: _hash(item) for item in api.items(dataset) if item.get("status") == "ACTIVE"}
        items = [make_item(dataset, track, example) for example in examples]
        missing = [item for item in items if there.get(item["id"]) != item["metadata"]["content_hash"]]
        if missing:
            raise UserError(
                f"{len(missing)} of {len(items)} rows (first: id {missing[0]['metadata']['id']!r}) are not in Langfuse's dataset "
                f"{dataset} as they are now: push them with {push_command}"
            )
        project = api.project()
        base_url = api.base_url
    # The servers and SDK 5 derive the id in this way, so that both forms of an experiment meet in one.
    seed = json.dumps(["langfuse-experiment-v1", project, found["id"], name], separators=(",", ":"), ensure_ascii=False)
    url = f"{base_url}/project/{project}/datasets/{found['id']}"
    return Experiment(name, text_hash(seed)[:16], dataset, str(found["id"]), url, metadata)
