"""Any file of chat: each row's form is seen by looking at it, each of its replies becomes a row."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from slm_swap.common.settings import display_path
from slm_swap.dataset.readers.conversations import rows_of
from slm_swap.dataset.readers.files import Bad, read_rows
from slm_swap.dataset.readers.forms import batch_request, form_of
from slm_swap.dataset.readers.own import is_conversation, own_row
from slm_swap.dataset.readers.sources import Seen, read_source, row_id
from slm_swap.dataset.row import Dropped, Row, Unusable

OWN = "conversation rows of this program"


def chat(paths: Iterable[Path], seen: Seen) -> Iterator[Row | Dropped]:
    """One item for each reply in the files. What was seen goes into `seen`.

    Raises:
        UserError: as `read_source`; or a file's first row has none of the known forms.
    """
    paths = list(paths)
    requests = _batch_requests(paths)

    def read(row: dict, where: str) -> Iterator[Row | Dropped]:
        place = where.rpartition(":")[0]
        if is_conversation(row):
            seen.forms[place][OWN] += 1
            yield own_row(row, where, seen)
            return
        form = form_of(row)
        if form is None:
            if requests and batch_request(row) is not None:
                seen.forms[place]["batch input"] += 1
                return
            raise Unusable("other_form", f"no known form: its fields are {', '.join(map(str, list(row)[:12]))}")
        seen.forms[place][form.name] += 1
        if form.fields is not None:
            seen.unknown.update(name for name in row if name not in form.fields)
        try:
            conversation = form.read(row, where, requests)
        except Unusable as reason:
            if str(reason) == "other_form":  # of this row's messages: the file's form is known
                yield Dropped(_name(row), where, "other_form", reason.why)
                return
            raise
        except (TypeError, AttributeError, KeyError, ValueError) as error:
            raise Unusable("bad_row", f"not quite {form.name}: {type(error).__name__}: {str(error)[:120]}") from None
        yield from rows_of(conversation)

    return read_source(paths, "chat", read)


def _name(row: dict) -> str:
    try:
        return row_id(row)
    except Unusable:
        return ""


def _batch_requests(paths: list[Path]) -> dict[str, dict]:
    """The requests of all batch inputs among the files, by their `custom_id`."""
    requests: dict[str, dict] = {}
    for path in paths:
        for at, (_, row) in enumerate(read_rows(path)):
            request = None if isinstance(row, Bad) else batch_request(row)
            if request is not None and "response" not in row and "result" not in row:
                requests[str(row["custom_id"])] = request
            elif at == 0:
                break
    return requests


def forms_seen(seen: Seen, path: Path) -> dict[str, int]:
    """How many rows of each form a file has."""
    return dict(seen.forms.get(display_path(path), {}))
