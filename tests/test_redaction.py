"""Secrets are cut out of text and plain data; words that only look a little like one stay."""

import pytest

from slimepo.redaction import REDACTED, redact, redacted


@pytest.mark.parametrize(
    "text",
    [
        "https://me:CANARY12@host/x", "https://CANARY12@host/x", "https://h/x?api_key=CANARY12&y=1", "s3://k:CANARY12@b",
        "Authorization: Bearer CANARY12", "hub_token=CANARY12", "'hub_token': 'CANARY12'", "password: CANARY12",
        "hf_CANARY12CANARY12", "sk-CANARY12CANARY12", "ghp_CANARY12", "cookie of Basic CANARY12==",
    ],
)  # fmt: skip
def test_what_has_the_form_of_a_secret_goes(text: str) -> None:
    assert "CANARY12" not in redact(text)
    assert REDACTED in redact(text)


def test_secrets_of_the_environment_go_wherever_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "correct horse")
    monkeypatch.setenv("SHORT_TOKEN", "a")
    assert redact("a correct horse battery") == f"a {REDACTED} battery"


@pytest.mark.parametrize(
    "text",
    [
        "m@http://127.0.0.1:8000/v1", "eos_token: <|im_end|>", "the task-based key-value store", "12 tokens: 5",
        "max_tokens=5", "Basic arithmetic", "data/pairs.jsonl", "https://h/x?page=2", "HF_HUB_OFFLINE is set",
    ],
)  # fmt: skip
def test_other_text_stays(text: str) -> None:
    assert redact(text) == text


def test_data_is_redacted_by_name_and_by_form() -> None:
    told = {
        "args": {"hub_token": "CANARY12", "list": ["https://a:b@h"]},
        "eos_token": "</s>",
        "key_variable": "MY_KEY",
    }
    assert redacted(told) == {
        "args": {"hub_token": REDACTED, "list": [f"https://{REDACTED}@h"]},
        "eos_token": "</s>",
        "key_variable": "MY_KEY",
    }
