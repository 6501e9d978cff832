"""The environment and `.env` in, one record out."""

import dataclasses
from pathlib import Path

import pytest

from slm_swap.common import settings as module
from slm_swap.common.errors import UserError
from slm_swap.common.settings import PACKAGE, Launch, Settings, display_path, find_path, load_settings, shown_path

VARIABLES = {
    "SLM_MODEL_PATH": "slm_model_path",
    "SLM_BASE_URL": "slm_base_url",
    "SLM_MODEL_NAME": "slm_model_name",
    "SLM_SWAP_KEYS": "swap_keys",
    "SLM_API_KEY": "slm_api_key",
    "AZURE_ENDPOINT": "azure_endpoint",
    "AZURE_DEPLOYMENT": "azure_deployment",
    "AZURE_API_KEY": "azure_api_key",
    "AZURE_API_VERSION": "azure_api_version",
    "LANGFUSE_PUBLIC_KEY": "langfuse_public_key",
    "LANGFUSE_SECRET_KEY": "langfuse_secret_key",
    "LANGFUSE_BASE_URL": "langfuse_base_url",
    "PRICES_FILE": "prices_file",
    "SLM_SWAP_SESSION": "session",
}


@pytest.fixture(autouse=True)
def checkout(monkeypatch, tmp_path):
    """A checkout of its own with nothing set."""
    for name in (*VARIABLES, "LANGFUSE_DISABLED", "LANGFUSE_HOST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    return tmp_path


def test_nothing_set():
    assert load_settings() == Settings() and Settings().langfuse_disabled is False and Settings().secrets == []


def test_every_variable_has_its_field(monkeypatch):
    for name in VARIABLES:
        monkeypatch.setenv(name, f" the {name} ")
    monkeypatch.setenv("LANGFUSE_DISABLED", "1")
    found = dataclasses.asdict(load_settings())
    assert found.pop("langfuse_disabled") is True
    assert found.pop("launch") == dataclasses.asdict(Launch())
    assert found == {field: f"the {name}" for name, field in VARIABLES.items()}


def test_what_a_launcher_says(monkeypatch):
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "node-0"}.items():
        monkeypatch.setenv(name, value)
    assert load_settings().launch == Launch(5, 8, 1, "node-0")
    monkeypatch.delenv("RANK")  # a scheduler may set some of them for what is no launch of ours
    assert load_settings().launch == Launch()


def test_the_file_is_read_and_the_environment_wins(checkout, monkeypatch):
    (checkout / ".env").write_text('AZURE_ENDPOINT="https://file"\nAZURE_DEPLOYMENT=file # a comment\nLANGFUSE_DISABLED=yes\n')
    monkeypatch.setenv("AZURE_DEPLOYMENT", "environment")
    found = load_settings()
    assert (found.azure_endpoint, found.azure_deployment, found.langfuse_disabled) == ("https://file", "environment", True)
    monkeypatch.setenv("AZURE_ENDPOINT", "")  # switches the file's off
    assert load_settings().azure_endpoint is None


@pytest.mark.parametrize("value", ["", "  "])
def test_an_empty_value_counts_as_not_set(monkeypatch, value):
    for name in (*VARIABLES, "LANGFUSE_DISABLED"):
        monkeypatch.setenv(name, value)
    assert load_settings() == Settings()


def test_the_older_name_of_the_address(monkeypatch):
    monkeypatch.setenv("LANGFUSE_HOST", "https://old")
    assert load_settings().langfuse_base_url == "https://old"
    monkeypatch.setenv("LANGFUSE_BASE_URL", "https://new")
    assert load_settings().langfuse_base_url == "https://new"


@pytest.mark.parametrize(
    ("value", "disabled"), [("1", True), ("TRUE", True), ("yes", True), ("0", False), ("False", False), ("no", False)]
)
def test_switching_tracing_off(monkeypatch, value, disabled):
    monkeypatch.setenv("LANGFUSE_DISABLED", value)
    assert load_settings().langfuse_disabled is disabled


def test_a_switch_that_says_neither(monkeypatch):
    monkeypatch.setenv("LANGFUSE_DISABLED", "maybe")
    with pytest.raises(UserError, match="LANGFUSE_DISABLED='maybe' is neither 1 nor 0"):
        load_settings()


def test_secrets_are_named_and_not_shown():
    settings = Settings(azure_api_key="key-1", langfuse_secret_key="key-2", langfuse_public_key="public")
    assert settings.secrets == ["key-1", "key-2"]
    assert "key-" not in repr(settings) and "key-" not in str(settings) and "public" in repr(settings)


def test_a_path_is_found_from_the_root_and_from_the_package(checkout, monkeypatch):
    elsewhere = checkout / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    package = checkout / "slm_swap"
    (package / "models/m").mkdir(parents=True)
    monkeypatch.setattr(module, "PACKAGE", package)
    assert find_path("slm_swap/models/m") == find_path("models/m") == package / "models/m"
    assert find_path("models/none") == Path("models/none")
    (elsewhere / "models/m").mkdir(parents=True)
    assert find_path("models/m") == Path("models/m")  # what lies here goes first
    assert find_path(str(elsewhere)) == elsewhere


def test_the_home_folder_is_understood(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_path("~") == tmp_path


def test_paths_are_shown_from_the_root(checkout, tmp_path_factory):
    assert display_path(checkout / "a/../b.json") == "b.json"
    outside = tmp_path_factory.mktemp("outside") / "x"
    assert display_path(outside) == str(outside)


def test_a_message_shows_a_path_as_it_can_be_used_where_one_stands(checkout, tmp_path_factory, monkeypatch):
    """Seen: "cannot read slm_swap/nowhere.jsonl" for `nowhere.jsonl`, typed in slm_swap/: no `cat` finds that."""
    (checkout / "slm_swap").mkdir()
    monkeypatch.chdir(checkout / "slm_swap")
    assert shown_path("nowhere.jsonl") == shown_path("../slm_swap/nowhere.jsonl") == "nowhere.jsonl"
    assert shown_path("../runs/x") == str(checkout / "runs/x")
    monkeypatch.chdir(gone := tmp_path_factory.mktemp("gone"))
    gone.rmdir()
    assert shown_path("/a/b") == "/a/b"


def test_the_package_is_where_the_code_is():
    assert (PACKAGE / "common/settings.py").is_file()
