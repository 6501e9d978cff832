"""Keys kept out of everything that is written or shown, and noticed where they do not belong."""

import os
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

LONG = 16  # characters from which on a key is cut out wherever it stands; Azure's keys have 32 or 84
HIDDEN = "***"
# How keys begin that say what they are: OpenAI's and others', Langfuse's, GitHub's, Slack's, AWS', a JSON web token.
_PREFIX = re.compile(r"(?:sk|pk|rk)-[\w-]{16,}|gh[opsu]_\w{20,}|github_pat_\w+|xox[abp]-\w+|AKIA[A-Z0-9]{16}|eyJ[\w-]{16,}")
_HEX = re.compile(r"[0-9a-fA-F]{32,}")
_RANDOM = re.compile(r"(?=.*[a-z])(?=.*[A-Z])(?=.*\d)[A-Za-z0-9+=]{40,}")


def scrub(text: str, secrets: Iterable[str], data: bool = False) -> str:
    """The text without the secrets: long ones wherever they stand, short ones where they stand as a whole word.

    `data`: the text is a model's reply, whose values are scored. A short key that is only letters or only digits may be one of them
    ("test", "12345") and stays.
    """
    for secret in sorted(secrets, key=len, reverse=True):
        if len(secret) >= LONG:
            text = text.replace(secret, HIDDEN)
        elif secret in text and not (data and (secret.isalpha() or secret.isdigit())):
            text = re.sub(rf"(?<![A-Za-z0-9]){re.escape(secret)}(?![A-Za-z0-9])", HIDDEN, text)
    return text


def looks_like_key(text: str, secrets: Iterable[str] = (), hexadecimal: bool = True) -> bool:
    """Whether a name holds what is a key by all appearance; `hexadecimal` digits in a row are one, too, where no id stands."""
    if any((len(secret) >= LONG and secret in text) or secret == text for secret in secrets):
        return True
    return bool(_PREFIX.search(text) or _RANDOM.fullmatch(text) or (hexadecimal and _HEX.fullmatch(text)))


def hide_in_tracebacks(secrets: Callable[[], Iterable[str]]) -> None:
    """From now on let no traceback of this process show a secret, in no thread; `secrets` is asked when there is one to show."""

    def show(kind: Any, error: Any, trace: Any) -> None:
        try:
            known = list(secrets())
        except Exception:  # the settings themselves cannot be read: what the environment has by such names
            known = [value for name, value in os.environ.items() if value and name.endswith(("_KEY", "_SECRET", "_TOKEN"))]
        told = scrub("".join(traceback.format_exception(kind, error, trace)), known)
        print(told, end="", file=sys.stderr)

    sys.excepthook = show
    threading.excepthook = lambda told: show(told.exc_type, told.exc_value, told.exc_traceback)


@contextmanager
def shown_by_hook() -> Iterator[None]:
    """Around what a process of multiprocessing does: the traceback of a bug is shown by `sys.excepthook`, which multiprocessing would go past. Ends with 1."""
    try:
        yield
    except Exception:
        sys.excepthook(*sys.exc_info())
        sys.exit(1)
