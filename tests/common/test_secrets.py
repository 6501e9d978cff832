"""Keys are cut out of texts, noticed in names and URLs, and never shown by a traceback."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slm_swap.clients.endpoint import parse_base_url, parse_endpoint
from slm_swap.common.errors import UserError
from slm_swap.common.secrets import looks_like_key, scrub
from slm_swap.common.settings import ROOT

LONG = "0123456789abcdef0123456789abcdef"
AZURE = "https://r.openai.azure.com"


@pytest.mark.parametrize(
    ("text", "secret", "cut", "in_replies"),
    [
        (f"x{LONG}y", LONG, "x***y", "x***y"),
        ("key=ab12; ab123 xab12", "ab12", "key=***; ab123 xab12", "key=***; ab123 xab12"),
        ('{"status": "test"}', "test", '{"status": "***"}', '{"status": "test"}'),
        ("zip 12345", "12345", "zip ***", "zip 12345"),
        ("latest contest", "test", "latest contest", "latest contest"),
    ],
)
def test_long_keys_go_wherever_they_stand_and_short_ones_as_a_word(text, secret, cut, in_replies):
    assert scrub(text, [secret]) == cut and scrub(text, [secret], data=True) == in_replies


@given(st.text(), st.text(), st.text(alphabet="abcdef0123456789-_", min_size=16, max_size=90))
def test_no_long_key_is_left(before, after, secret):
    assert secret not in scrub(before + secret + after, [secret]).replace("***", "\0")


def test_a_key_within_another_goes_with_it():
    assert scrub(LONG + "tail-of-it", [LONG, LONG + "tail-of-it"]) == "***"


@pytest.mark.parametrize(
    "name", ["gpt-4o-mini-2024-07-18", "phi-4-mini", "Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4", "my_deployment", "3f2504e0-4f89-11d3-9a0c-0305e82c3301", ""]
)
def test_names_are_no_keys(name):
    assert not looks_like_key(name)


@pytest.mark.parametrize("name", [LONG, "sk-" + "a1B2" * 8, "eyJhbGciOiJIUzI1NiIsInR5cCI6", "Ab3" * 28, "pk-lf-" + "1234-" * 7])
def test_keys_are(name):
    assert looks_like_key(name)


@pytest.mark.parametrize(
    ("endpoint", "deployment", "variable"),
    [
        (f"{AZURE}/openai/deployments/{LONG}", None, "AZURE_ENDPOINT"),
        (f"{AZURE}/{LONG}/openai/deployments/d", None, "AZURE_ENDPOINT"),
        (f"{AZURE}?api-version={LONG}", "d", "AZURE_ENDPOINT"),
        ("https://gw.example.com/sk-0123456789abcdefghij/v1", "d", "AZURE_ENDPOINT"),
        (AZURE, LONG, "AZURE_DEPLOYMENT"),
        (AZURE, "short-key-1", "AZURE_DEPLOYMENT"),
    ],
)
def test_a_key_where_a_name_belongs_is_refused_and_not_shown(endpoint, deployment, variable):
    with pytest.raises(UserError, match=variable) as refused:
        parse_endpoint(endpoint, deployment, "2024-10-21", secrets=["short-key-1"])
    assert not any(part in str(refused.value) for part in (LONG, "sk-0123456789abcdefghij", "short-key-1")) and "AZURE_API_KEY" in str(refused.value)


def test_an_account_of_a_gateway_is_no_key():
    assert parse_endpoint(f"https://gateway.ai.cloudflare.com/v1/{LONG}/g/openai/v1", "d", None).deployment == "d"


def test_a_served_models_name_and_url_too():
    for url, model in (("http://127.0.0.1:1/v1", LONG), ("http://127.0.0.1:1/sk-0123456789abcdefghij/v1", "m")):
        with pytest.raises(UserError, match="looks like a key") as refused:
            parse_base_url(url, model)
        assert LONG not in str(refused.value) and "0123456789abcdefghij" not in str(refused.value)


@pytest.mark.parametrize("settings", [True, False])
@pytest.mark.parametrize("where", ["main", "thread"])
def test_a_traceback_shows_no_key(where, settings):
    """Where the settings cannot be read, too."""
    raise_it = f"raise RuntimeError('refused with {LONG}, and with ab12')"
    code = f"import threading\nfrom slm_swap.cli import run\ndef fail():\n    {raise_it}\ndef main():\n"
    code += "    fail()\nrun(main)" if where == "main" else "    t = threading.Thread(target=fail); t.start(); t.join(); return 0\nrun(main)"
    environment = {"AZURE_API_KEY": LONG, "SLM_API_KEY": "ab12", "PATH": "/usr/bin:/bin"} | ({} if settings else {"LANGFUSE_DISABLED": "perhaps"})
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert "RuntimeError: refused with ***, and with ***" in done.stderr and "Traceback" in done.stderr
    assert LONG not in done.stderr and done.returncode == (1 if where == "main" else 0)
