"""The REST half of the recording Langfuse server: datasets, items, run items, observations, scores and traces of one project,
with the pages, field groups and errors of a v3 server or of a v4 one (v4 reads by cursor, and has no run items)."""

import base64
import json
from datetime import datetime, timezone
from urllib.parse import parse_qs, unquote, urlsplit

from slm_swap.common.exact_json import ExactEncoder

TIME = "2026-01-01T00:00:00.000Z"
GROUPS = {
    "core": ("id", "traceId", "startTime", "endTime", "projectId", "parentObservationId", "type"),
    "basic": ("name", "level", "statusMessage", "version", "environment"),
    "io": ("input", "output"),
    "metadata": ("metadata",),
    "model": ("model", "modelParameters"),
    "usage": ("usageDetails",),
    "trace_context": ("tags", "release", "traceName"),
}


class Refused(Exception):
    """An answer that is an error: (status, JSON)."""


class Rest:
    """`generation` is "v3" or "v4". Fill `observations` (input, output and metadata as JSON values), `scores` and `tags` (by trace)
    by hand; datasets, items and run items are what was posted. `asked` records every request."""

    def __init__(self, generation: str = "v4"):
        self.generation = generation
        self.datasets: dict[str, dict] = {}
        self.items: dict[str, dict] = {}
        self.run_items: list[dict] = []
        self.observations: list[dict] = []
        self.scores: list[dict] = []
        self.tags: dict[str, list[str]] = {}
        self.asked: list[tuple[str, str, dict]] = []

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, dict] | None:
        """(status, JSON); None for a path that is not among these."""
        parts = urlsplit(path)
        name, _, rest = parts.path.removeprefix("/api/public/").partition("/")
        if name in {"v2", "v3"}:
            second, _, rest = rest.partition("/")
            name = f"{name}/{second}"
        handler = getattr(self, f"_{method.lower()}_{name.replace('/', '_').replace('-', '_')}", None)
        if handler is None:
            return None
        query = {key: values if key == "tags" else values[0] for key, values in parse_qs(parts.query).items()}
        self.asked.append((method, name, query or (json.loads(body) if body else {})))
        try:
            return 200, handler(json.loads(body)) if method == "POST" else handler(query, unquote(rest))
        except Refused as refused:
            return refused.args

    # -- Datasets ----------------------------------------------------------------------------------------------------------------

    def _post_v2_datasets(self, body: dict) -> dict:
        known = self.datasets.get(body["name"], {"id": f"dataset-{len(self.datasets)}", "createdAt": TIME})
        self.datasets[body["name"]] = known | body | {"projectId": "project-1", "updatedAt": TIME}
        return self.datasets[body["name"]]

    def _get_v2_datasets(self, query: dict, name: str) -> dict:
        if not name:
            return _page(list(self.datasets.values()), query)
        return self._dataset(name)

    def _dataset(self, name: str) -> dict:
        if name not in self.datasets:
            raise Refused(404, {"message": "Dataset not found", "error": "LangfuseNotFoundError"})
        return self.datasets[name]

    def _post_dataset_items(self, body: dict) -> dict:
        dataset = self._dataset(body["datasetName"])
        known = self.items.get(body["id"], {"status": "ACTIVE", "createdAt": TIME, "datasetName": dataset["name"]})
        if known["datasetName"] != dataset["name"]:
            message = f"The dataset item with id {body['id']} already exists in a dataset other than {dataset['name']}"
            raise Refused(404, {"message": message, "error": "LangfuseNotFoundError"})
        given = {key: value for key, value in body.items() if value is not None}
        empty = {"input": None, "expectedOutput": None, "metadata": None, "sourceTraceId": None, "sourceObservationId": None}
        own = {"datasetId": dataset["id"], "updatedAt": TIME, "mediaReferences": []}
        self.items[body["id"]] = empty | known | given | own
        return self.items[body["id"]]

    def _get_dataset_items(self, query: dict, name: str) -> dict:
        dataset = self._dataset(query["datasetName"])
        return _page([item for item in self.items.values() if item["datasetId"] == dataset["id"]], query)

    def _post_dataset_run_items(self, body: dict) -> dict:
        if self.generation == "v4":
            raise Refused(404, {"message": "Not Found"})
        item = self.items.get(body["datasetItemId"])
        if item is None or item["status"] != "ACTIVE":
            raise Refused(404, {"message": "Dataset item not found", "error": "LangfuseNotFoundError"})
        self.run_items.append(body)
        times = {"createdAt": TIME, "updatedAt": TIME}
        run = {"id": f"run-item-{len(self.run_items)}", "datasetRunId": body["runName"], "datasetRunName": body["runName"]}
        return run | times | {key: body[key] for key in ("datasetItemId", "traceId", "observationId")}

    # -- Traffic -----------------------------------------------------------------------------------------------------------------

    def _found(self, query: dict) -> list[dict]:
        """The observations that a query asks for, newest first."""
        low, high = _moment(query.get("fromStartTime")), _moment(query.get("toStartTime"))
        return sorted(
            (
                row
                for row in self.observations
                if row["type"] == query.get("type", row["type"])
                and row.get("name") == query.get("name", row.get("name"))
                and (low is None or _moment(row["startTime"]) >= low)
                and (high is None or _moment(row["startTime"]) < high)
            ),
            key=lambda row: (row["startTime"], row["id"]),
            reverse=True,
        )

    def _get_observations(self, query: dict, name: str) -> dict:
        if self.generation == "v4":
            raise Refused(404, {"message": "Not Found"})
        return _page(self._found(query), query)

    def _get_v2_observations(self, query: dict, name: str) -> dict:
        if self.generation == "v3":
            message = "v2 APIs are currently in beta and only available on Langfuse Cloud"
            raise Refused(404, {"message": message, "error": "LangfuseNotFoundError"})
        limit = _limit(query, 1000)
        rows, cursor = self._found(query), query.get("cursor")
        if cursor:
            last = json.loads(base64.b64decode(cursor))
            rows = [row for row in rows if (row["startTime"], row["id"]) < (last["lastStartTimeTo"], last["lastId"])]
        groups = query.get("fields", "core,basic").split(",")
        if any(group not in GROUPS for group in groups):
            raise Refused(400, {"message": "Invalid request data", "error": [{"path": ["fields"], "message": "Invalid enum value"}]})
        shown = [field for group in dict.fromkeys(["core", *groups]) for field in GROUPS[group]]
        whole = query.get("expandMetadata", "").split(",")
        data = [{field: self._v2(row, field, whole) for field in shown} for row in rows[:limit]]
        if len(rows) <= limit:
            return {"data": data, "meta": {}}
        last = {"lastStartTimeTo": data[-1]["startTime"], "lastTraceId": data[-1]["traceId"], "lastId": data[-1]["id"]}
        return {"data": data, "meta": {"cursor": base64.b64encode(json.dumps(last).encode()).decode()}}

    def _v2(self, row: dict, field: str, whole: list[str]) -> object:
        """v2 gives input and output as raw text, the tags of the trace, and long metadata cut off."""
        value = row.get(field)
        if field == "tags":
            return self.tags.get(row["traceId"], [])
        if field in {"input", "output"} and value is not None and not isinstance(value, str):
            return json.dumps(value, cls=ExactEncoder)
        if field == "metadata" and value:
            texts = {key: item if isinstance(item, str) else json.dumps(item, cls=ExactEncoder) for key, item in value.items()}
            return {key: value[key] if key in whole or len(text) <= 200 else text[:200] for key, text in texts.items()}
        return value

    def _get_traces(self, query: dict, name: str) -> dict:
        if self.generation == "v4":
            raise Refused(404, {"message": "Not Found"})
        wanted = set(query.get("tags", []))
        return _page([{"id": trace, "tags": tags} for trace, tags in self.tags.items() if wanted <= set(tags)], query)

    def _get_v2_scores(self, query: dict, name: str) -> dict:
        if self.generation == "v4":
            raise Refused(404, {"message": "Not Found"})
        return _page([score for score in self.scores if score["name"] == query.get("name", score["name"])], query)

    def _get_v3_scores(self, query: dict, name: str) -> dict:
        if self.generation == "v3":
            raise Refused(404, {"message": "Not Found"})
        limit, start = _limit(query, 100), int(query.get("cursor", 0))
        scores = [score for score in self.scores if score["name"] == query.get("name", score["name"])]
        data = [_score_v3(score, query.get("fields", "")) for score in scores[start : start + limit]]
        more = {"cursor": str(start + limit)} if start + limit < len(scores) else {}
        return {"data": data, "meta": {"limit": limit, **more}}


def _score_v3(score: dict, fields: str) -> dict:
    core = {key: score[key] for key in ("id", "name", "value", "dataType")}
    if score.get("observationId"):
        subject = {"kind": "observation", "id": score["observationId"], "traceId": score["traceId"]}
    else:
        subject = {"kind": "trace", "id": score["traceId"]}
    return core | ({"subject": subject} if "subject" in fields else {})


def _limit(query: dict, most: int) -> int:
    limit = int(query.get("limit", 50))
    if not 0 < limit <= most:
        raise Refused(400, {"message": "Invalid request data", "error": [{"path": ["limit"], "code": "too_big", "maximum": most}]})
    return limit


def _page(rows: list[dict], query: dict) -> dict:
    limit, page = _limit(query, 100), int(query.get("page", 1))
    meta = {"page": page, "limit": limit, "totalItems": len(rows), "totalPages": -(-len(rows) // limit)}
    return {"data": rows[(page - 1) * limit : page * limit], "meta": meta}


def _moment(text: str | None) -> datetime | None:
    return None if text is None else datetime.fromisoformat(text).astimezone(timezone.utc)
