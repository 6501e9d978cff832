"""The only reader of the environment: variables and `.env` in, one frozen record out.

Real environment variables win over the checkout's `.env` file; an empty value counts as not set.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from slm_swap.common.errors import UserError

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

PACKAGE = Path(__file__).resolve().parents[1]
ROOT = PACKAGE.parent


@dataclass(frozen=True)
class Launch:
    """This process among those that `accelerate launch` or `torchrun` started; alone it is rank 0 of 1.

    The last three are set by `replicas.fork_replica`: whether this process holds a replica and serves rank 0, and rank 0's connection to
    the process that it has forked for its own replica, which has the other end.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    master: str = "127.0.0.1"
    serves: bool = False
    replica: "Connection | None" = None
    replica_pid: int | None = None


@dataclass(frozen=True)
class Settings:
    """What the environment says. Secrets are kept out of `repr`."""

    slm_model_path: str | None = None
    slm_base_url: str | None = None
    slm_model_name: str | None = None
    slm_api_key: str | None = field(default=None, repr=False)
    azure_endpoint: str | None = None
    azure_deployment: str | None = None
    azure_api_key: str | None = field(default=None, repr=False)
    azure_api_version: str | None = None
    prices_file: str | None = None
    langfuse_public_key: str | None = None
    langfuse_secret_key: str | None = field(default=None, repr=False)
    langfuse_base_url: str | None = None
    langfuse_disabled: bool = False
    session: str | None = None
    swap_keys: str | None = field(default=None, repr=False)
    launch: Launch = Launch()

    @property
    def secrets(self) -> list[str]:
        """Every value that must never be printed, logged, traced or written."""
        return [value for value in (self.azure_api_key, self.slm_api_key, self.langfuse_secret_key) if value]


def load_settings() -> Settings:
    """Read the environment and `.env` once.

    Raises:
        UserError: LANGFUSE_DISABLED is neither yes nor no.
    """
    from dotenv import dotenv_values

    values = {**dotenv_values(ROOT / ".env"), **os.environ}

    def text(*names: str) -> str | None:
        return next((values[name].strip() for name in names if (values.get(name) or "").strip()), None)

    disabled = (text("LANGFUSE_DISABLED") or "0").lower()
    if disabled not in {"0", "1", "true", "false", "yes", "no"}:
        raise UserError(f"LANGFUSE_DISABLED={disabled!r} is neither 1 nor 0: set LANGFUSE_DISABLED=1 to run untraced")
    return Settings(
        slm_model_path=text("SLM_MODEL_PATH"),
        slm_base_url=text("SLM_BASE_URL"),
        slm_model_name=text("SLM_MODEL_NAME"),
        slm_api_key=text("SLM_API_KEY"),
        azure_endpoint=text("AZURE_ENDPOINT"),
        azure_deployment=text("AZURE_DEPLOYMENT"),
        azure_api_key=text("AZURE_API_KEY"),
        azure_api_version=text("AZURE_API_VERSION"),
        prices_file=text("PRICES_FILE"),
        langfuse_public_key=text("LANGFUSE_PUBLIC_KEY"),
        langfuse_secret_key=text("LANGFUSE_SECRET_KEY"),
        langfuse_base_url=text("LANGFUSE_BASE_URL", "LANGFUSE_HOST"),
        langfuse_disabled=disabled in {"1", "true", "yes"},
        session=text("SLM_SWAP_SESSION"),
        swap_keys=text("SLM_SWAP_KEYS"),
        launch=load_launch(),
    )


def load_launch() -> Launch:
    """What the launcher of several processes says of this one; alone unless it says all of it."""
    told = [os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")]
    if not all(told) or told[1] == "1":
        return Launch()
    rank, world, local_rank, master = told
    return Launch(int(rank), int(world), int(local_rank), master)


def load_proxies() -> dict[str, str]:
    """The variables that name a proxy with their values, as HTTP clients read them: a lower-case name wins, NO_PROXY=* undoes all."""
    if "*" in os.environ.get("no_proxy", os.environ.get("NO_PROXY", "")).replace(" ", "").split(","):
        return {}
    names = [name for scheme in ("http", "https", "all") for name in (f"{scheme}_proxy", f"{scheme}_proxy".upper())]
    return {name: os.environ[name] for name in names if os.environ.get(name) and (name.islower() or name.lower() not in os.environ)}


def find_path(path: str | Path) -> Path:
    """A path as given, from the checkout's root or from `slm_swap/`: the first that exists, else the path as given."""
    given = Path(os.path.expanduser(path))  # which leaves the name of a user who is not there
    return next((p for p in (given, ROOT / given, PACKAGE / given) if p.exists()), given)


def display_path(path: str | Path) -> str:
    """The path relative to the checkout's root where it lies inside it: what reports keep, wherever they are made. It never fails."""
    resolved = real_path(path)
    return str(resolved.relative_to(ROOT)) if resolved.is_relative_to(ROOT) else str(resolved)


def shown_path(path: str | Path) -> str:
    """The path as whoever reads a message can use it: relative to the working directory where it lies below it, as it was typed, else
    absolute. It never fails."""
    resolved = real_path(path)
    try:
        return str(resolved.relative_to(real_path(os.getcwd())))
    except (ValueError, OSError):
        return str(resolved)


def real_path(path: str | Path) -> Path:
    """The absolute path without symbolic links; a circle of them is left as it is, where `Path.resolve` raises."""
    return Path(os.path.realpath(os.path.expanduser(path)))
