"""Langfuse's REST API, the few endpoints that datasets and traffic need: every wait bounded, every error one line.

The SDK's generated client is not the same in 4.18 and 5 (run items and the older reads are gone from 5), while the endpoints are
the server's, whichever SDK is installed. Servers come in two generations, and `generations` and `scores` read both:

- v4 and Langfuse Cloud: `/api/public/v2/observations` and `/api/public/v3/scores`, by cursor.
- v3: `/api/public/observations`, `/api/public/v2/scores` and `/api/public/traces`, by page.

The keys travel in the Authorization header and nowhere else.
"""

import json
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from decimal import Decimal
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import quote

from slm_swap.common.errors import UserError
from slm_swap.common.exact_json import EXACT, ExactEncoder
from slm_swap.common.secrets import scrub
from slm_swap.common.settings import Settings
from slm_swap.tracing.wire import address, failures, http_client

TIMEOUT = 30  # seconds for one answer; a page of long prompts takes the server a while
TRIES = 6
LONGEST_PAUSE = 60  # seconds before a try; Langfuse's rate limits are by the minute
PAGE = 100  # rows in one page, the most that every endpoint gives
NOT_OFFERED = {404, 405, 410, 501}  # how servers answer for an endpoint of the other generation


class LangfuseApi:
    """One project's REST API. Safe to call from several threads.

    Raises:
        UserError: Langfuse is switched off, variables are missing (all are named) or the base URL is no address. Every method too:
            no answer, rejected keys, or an answer that the method cannot use.
    """

    def __init__(self, settings: Settings):
        if settings.langfuse_disabled:
            raise UserError("LANGFUSE_DISABLED=1 is set, and this works with Langfuse: unset it")
        self.base_url, self.host = address(settings, "this works with Langfuse", "")
        self._http = http_client(
            base_url=self.base_url, auth=(settings.langfuse_public_key, settings.langfuse_secret_key), timeout=TIMEOUT
        )
        self._secrets = settings.secrets

    def __enter__(self) -> "LangfuseApi":
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    # -- Datasets ----------------------------------------------------------------------------------------------------------------

    def project(self) -> str:
        """The id of the keys' project."""
        try:
            return str(self._get("projects")["data"][0]["id"])
        except (LookupError, TypeError):
            raise self._strange("projects") from None

    def put_dataset(self, name: str, description: str, metadata: dict[str, Any]) -> dict:
        """Create a dataset, or update the one of that name."""
        return self._send("POST", "v2/datasets", json={"name": name, "description": description, "metadata": metadata})

    def dataset(self, name: str) -> dict | None:
        """The dataset of that name, None where there is none."""
        return self._send("GET", f"v2/datasets/{quote(name, safe='')}", absent={404})

    def items(self, dataset: str) -> Iterator[dict]:
        """All items of a dataset, those archived among them."""
        yield from self._pages("dataset-items", {"datasetName": dataset})

    def put_item(self, item: dict[str, Any]) -> None:
        """Create an item, or update the one of its id: `id`, `datasetName`, `input`, `expectedOutput`, `metadata`, `status`."""
        self._send("POST", "dataset-items", json=item)

    def link(self, run: str, item: str, trace: str, observation: str, metadata: dict[str, Any]) -> bool:
        """Record an observation as an item of a run; False where the server has no such endpoint."""
        body = {"runName": run, "datasetItemId": item, "traceId": trace, "observationId": observation, "metadata": metadata}
        return self._send("POST", "dataset-run-items", json=body, absent=NOT_OFFERED) is not None

    # -- Traffic -----------------------------------------------------------------------------------------------------------------

    def has_cursors(self, start: datetime) -> bool:
        """Whether the server reads by cursor (v4)."""
        query = {"type": "GENERATION", "fromStartTime": _stamp(start), "limit": 1}
        return self._send("GET", "v2/observations", params=query, absent=NOT_OFFERED) is not None

    def generations(
        self, start: datetime, end: datetime, name: str | None, tags: bool, cursor: str | int | None, cursors: bool
    ) -> tuple[list[dict], str | int | None]:
        """(one page of generations, newest first; where the next one is, None after the last).

        `cursor` is what the last page gave, None for the first. With `tags`, v4 gives each generation its trace's `tags`.
        """
        query = {"type": "GENERATION", "fromStartTime": _stamp(start), "toStartTime": _stamp(end), "name": name, "limit": PAGE}
        if cursors:
            query["fields"] = "core,basic,io,metadata,model,usage" + ",trace_context" * tags
            query["expandMetadata"] = "response_format,text_format,tools"
            page = self._get("v2/observations", query | {"cursor": cursor})
            return self._rows("v2/observations", page), page.get("meta", {}).get("cursor")
        number = int(cursor or 1)
        page = self._get("observations", query | {"page": number})
        return self._rows("observations", page), self._next(page, number)

    def traces_tagged(self, start: datetime, end: datetime, tags: list[str]) -> set[str]:
        """The ids of a v3 server's traces that have all the tags."""
        query = {"fromTimestamp": _stamp(start), "toTimestamp": _stamp(end), "tags": tags, "fields": "core"}
        return {str(trace.get("id")) for trace in self._pages("traces", query) if set(tags) <= set(trace.get("tags") or [])}

    def scores(self, start: datetime, name: str | None, cursors: bool) -> Iterator[tuple[str, str | None, str, float]]:
        """(trace, observation or None, name, value) of every numeric and boolean score since `start`."""
        query = {"fromTimestamp": _stamp(start), "name": name}
        if not cursors:
            for score in self._pages("v2/scores", query):
                if _is_number(score):
                    yield score.get("traceId"), score.get("observationId"), score.get("name"), float(score["value"])
            return
        cursor = None
        while True:
            page = self._get("v3/scores", query | {"fields": "subject", "limit": PAGE, "cursor": cursor})
            for score in self._rows("v3/scores", page):
                subject = score.get("subject") or {}
                if _is_number(score) and subject.get("kind") == "observation":
                    yield subject.get("traceId"), subject.get("id"), score.get("name"), float(score["value"])
                elif _is_number(score) and subject.get("kind") == "trace":
                    yield subject.get("id"), None, score.get("name"), float(score["value"])
            cursor = page.get("meta", {}).get("cursor")
            if not cursor:
                return

    # -- HTTP --------------------------------------------------------------------------------------------------------------------

    def _pages(self, path: str, query: dict[str, Any]) -> Iterator[dict]:
        number: int | None = 1
        while number:
            page = self._get(path, query | {"page": number, "limit": PAGE})
            yield from self._rows(path, page)
            number = self._next(page, number)

    def _rows(self, path: str, page: dict) -> list[dict]:
        rows = page.get("data")
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise self._strange(path)
        return rows

    def _next(self, page: dict, number: int) -> int | None:
        pages = page.get("meta", {}).get("totalPages", 0)
        return number + 1 if page["data"] and number < pages else None

    def _get(self, path: str, query: dict[str, Any] | None = None) -> dict:
        return self._send("GET", path, params={key: value for key, value in (query or {}).items() if value is not None})

    def _send(self, method: str, path: str, absent: set[int] = frozenset(), **content: Any) -> dict | None:
        """The answer's JSON object; None for the statuses of `absent`. Tried again while the server is busy or away."""
        if "json" in content:  # httpx's own encoder knows no Decimal
            body = json.dumps(content.pop("json"), ensure_ascii=False, separators=(",", ":"), allow_nan=False, cls=ExactEncoder)
            content |= {"content": body.encode(), "headers": {"content-type": "application/json"}}
        for attempt in range(1, TRIES + 1):
            pause = min(2 ** (attempt - 1), LONGEST_PAUSE)
            try:
                response = self._http.request(method, f"/api/public/{path}", **content)
                trouble = f"HTTP {response.status_code}" if response.status_code == 429 or response.status_code >= 500 else ""
                if response.status_code in absent:
                    return None
                pause = _retry_after(response.headers.get("retry-after"), pause)
            except failures() as error:
                trouble = type(error).__name__
            if not trouble:
                break
            if attempt == TRIES or pause > LONGEST_PAUSE:
                raise UserError(f"Langfuse at {self.host} does not answer ({trouble}): start it, correct LANGFUSE_BASE_URL or try later")
            time.sleep(pause)
        if response.status_code in {401, 403}:
            raise UserError(
                f"Langfuse at {self.host} rejects the keys (HTTP {response.status_code}): "
                "correct LANGFUSE_PUBLIC_KEY and LANGFUSE_SECRET_KEY"
            )
        try:
            answer = response.json(**EXACT)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise self._strange(path, response.status_code)
        if not response.is_success:
            raise UserError(
                f"Langfuse at {self.host} refuses {method} {path} (HTTP {response.status_code}): {self._reason(answer)}: "
                "correct what it names, or use a server of version 3 or 4"
            )
        return answer

    def _reason(self, answer: dict) -> str:
        text = " ".join(str(answer.get("message") or answer.get("error") or json.dumps(answer, cls=ExactEncoder)).split())
        return scrub(text, self._secrets)[:200]

    def _strange(self, path: str, status: int = 200) -> UserError:
        return UserError(f"{self.host} does not answer {path} like Langfuse (HTTP {status}): correct LANGFUSE_BASE_URL")


def _stamp(moment: datetime) -> str:
    return moment.astimezone(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _is_number(score: dict) -> bool:
    return score.get("dataType") in {"NUMERIC", "BOOLEAN"} and isinstance(score.get("value"), bool | int | float | Decimal)


def _retry_after(header: str | None, otherwise: float) -> float:
    """Seconds that a Retry-After header asks for (RFC 9110, 10.2.3: a number of seconds, or a date)."""
    if not header:
        return otherwise
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(header) - datetime.now(timezone.utc)).total_seconds())
    except (ValueError, TypeError):
        return otherwise
