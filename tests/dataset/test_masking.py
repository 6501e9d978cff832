"""What is masked, what is left alone, and that JSON stays JSON."""

import json
import re

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from slm_swap.dataset.masking import mask

JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U"
BLOCK = "-----BEGIN RSA PRIVATE KEY-----\nMIIEow\nIBAAKC\n-----END RSA PRIVATE KEY-----"
STORAGE = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("Write to ann.lee+x@mail.example.co.uk.", "Write to <EMAIL_1>."),
        ("a@b.com,c@d.org a@B.com", "<EMAIL_1>,<EMAIL_2> <EMAIL_1>"),
        ("<jürgen@müller.de>", "<<EMAIL_1>>"),
        ("(415) 555-2671 or 415-555-2671", "<PHONE_1> or <PHONE_1>"),
        ("Ring +49 170 1234567 now", "Ring <PHONE_1> now"),
        ("my phone is 4155552671", "my phone is <PHONE_1>"),
        ("phone: 4155552671, again 4155552671", "phone: <PHONE_1>, again <PHONE_1>"),
        ("4111 1111 1111 1111", "<CARD_1>"),
        ("4111-1111-1111-1111 12/27 and 4111111111111111", "<CARD_1> 12/27 and <CARD_1>"),
        ("Amex 3782 822463 10005, Visa 4111111111111111 123", "Amex <CARD_1>, Visa <CARD_2> 123"),
        ("sk-proj-abcdefghijklmnop1234, sk-lf-12345678-1234-1234-1234-123456789012", "<KEY_1>, <KEY_2>"),
        ("AKIAIOSFODNN7EXAMPLE", "<KEY_1>"),
        ("ghp_" + "a1B2" * 9, "<KEY_1>"),
        ("Authorization: Bearer abc.def-ghi_12345678", "Authorization: Bearer <KEY_1>"),
        (f"token {JWT}.", "token <KEY_1>."),
        (f"key:\n{BLOCK}\nend", "key:\n<KEY_1>\nend"),
        (f"AccountKey={STORAGE};", "AccountKey=<KEY_1>;"),
        (f"it is {STORAGE}", "it is <KEY_1>"),
        ("api-key: 0123456789abcdef0123456789abcdef", "api-key: <KEY_1>"),
        ('password = "hunter2!!"', 'password = "<KEY_1>"'),
        ("<EMAIL_3> and bob@x.org", "<EMAIL_3> and <EMAIL_4>"),
    ],
)
def test_what_is_masked(text, masked):
    assert mask([text])[0] == [masked]


@pytest.mark.parametrize(
    "text",
    [
        "2024-05-12, 12/05/2024, 2024.05.12, 20240512, 2024-05-12T10:30:00Z, 10:30-12:45",
        "$1,234.56, 10.000,00 EUR, 4155552671, 1700000000, 1700000000000, 1234567890123",
        "price $1,234.56 10.000,00",
        "order 550e8400-e29b-41d4-a716-446655440000, ISBN 978-3-16-148410-0, v1.2.3.4, 192.168.1.100, 37.7749,-122.4194",
        "4111 1111 1111 1112, 4111111111111112, 35 209900 176148 1, 1234 5678 9012 3456",
        "IBAN DE89 3704 0044 0532 0130 00, SKU 0012345678905, hotel 4155552671, SSN 219-09-9999",
        "5+5@3 @ann user@host a@b, git@v2",
        "the token is important, max_tokens: 4096, token: 12345678, a secret: whatever, next page token",
        "da39a3ee5e6b4b0d3255bfef95601890afd80709 thisIsAVeryLongCamelCaseIdentifierOfSomeJavaClass1 /usr/lib/python3/dist-packages/Some/Thing",
        "<EMAIL_1> <PHONE_2> <CARD_1> <KEY_9>",
    ],
)
def test_what_is_left_alone(text):
    assert mask([text]) == ([text], {})


def test_one_row_has_one_placeholder_for_one_value():
    prompt = "Mail ann@example.com, call (415) 555-2671, card 4111 1111 1111 1111, api_key=abcd1234efgh"
    value = {"to": "Ann@Example.com", "n": "4155552671", "intl": "+14155552671", "card": 4111111111111111, "k": "abcd1234efgh"}
    [text, made], counts = mask([prompt, value])
    assert text == "Mail <EMAIL_1>, call <PHONE_1>, card <CARD_1>, api_key=<KEY_1>"
    assert made == {"to": "<EMAIL_1>", "n": "<PHONE_1>", "intl": "<PHONE_1>", "card": "<CARD_1>", "k": "<KEY_1>"}
    assert counts == {"EMAIL": 1, "PHONE": 1, "CARD": 1, "KEY": 1}


def test_a_json_key_says_what_stands_under_it():
    value = {"phone_number": "4155552671", "fax": 4155552672, "order": "4155552673", "password": "hunter2!!", "note": "hunter3!!"}
    made = mask([value])[0][0]
    assert made == value | {"phone_number": "<PHONE_1>", "fax": "<PHONE_2>", "password": "<KEY_1>"}


def test_keys_are_masked_and_stay_apart():
    assert mask([{"a@b.com": 1, "A@b.com": 2}])[0] == [{"<EMAIL_1>": 1, "<EMAIL_1>_": 2}]


def test_regions_decide_what_a_national_number_is():
    text = "Ruf 030 901820 an"
    assert mask([text], ["US"])[0] == [text]
    assert mask([text], ["DE"])[0] == mask([text], ["US", "DE"])[0] == ["Ruf <PHONE_1> an"]


def test_numbers_and_constants_of_json_stay():
    value = {"a": [1, 2.5, True, None, 12345678901234567890], "b": {}}
    assert mask([value])[0] == [value]


values = st.sampled_from(["ann@example.com", "+14155552671", "4111111111111111", "AKIAIOSFODNN7EXAMPLE", JWT])
texts = st.lists(st.one_of(values, st.text(max_size=8), st.from_regex(r"\d{1,16}", fullmatch=True)), max_size=4).map(" ".join)
leaves = st.one_of(texts, st.integers(), st.booleans(), st.none(), st.floats(allow_nan=False))
json_values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=8)


def shape(value):
    if isinstance(value, dict):
        return [shape(child) for child in value.values()]
    return [shape(child) for child in value] if isinstance(value, list) else None


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(texts, json_values)
@example("", "+14155552671 2012000000")
def test_masking_keeps_the_shape_is_done_after_once_and_leaves_no_value(text, value):
    masked, counts = mask([text, value])
    assert mask(masked) == (masked, {})
    assert shape(masked[1]) == shape(value)
    left = json.dumps(json.loads(json.dumps(masked, ensure_ascii=False)), ensure_ascii=False)
    for secret in ("ann@example.com", "AKIAIOSFODNN7EXAMPLE", JWT):
        assert not re.search(rf"(?<![\w.@+-]){re.escape(secret)}(?![\w.@-])", left)
    assert sum(counts.values()) <= len(re.findall(r"<(?:EMAIL|PHONE|CARD|KEY)_\d+>", left))
