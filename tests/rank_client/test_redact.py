"""Secrets are taken out by name, by shape and by the environment's values; the rest stays."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rank_client.redact import MARK, MIN_VALUE_CHARACTERS, Redactor, is_secret_name

REDACTOR = Redactor({})
HEX40 = "0123456789abcdef0123456789abcdef01234567"
PEM = "-----BEGIN RSA PRIVATE KEY-----\nMIIEowIBAAKCAQEA\n-----END RSA PRIVATE KEY-----"

#: what each looks like to the outside; the whole of it is a secret
SHAPES = [
    "AKIAIOSFODNN7EXAMPLE",
    "ASIAIOSFODNN7EXAMPLE",
    "ghp_" + "a1B2" * 9,
    "gho_" + "a1B2" * 9,
    "github_pat_11ABCDEFG0" + "x" * 59,
    "glpat-" + "a1B2" * 5,
    "hf_" + "aBcD" * 9,
    "ul_" + HEX40,
    "wandb_v1_" + "a1B2_" * 10,
    "xoxb-123456789012-1234567890123-" + "a1B2" * 6,
    "sk-" + "a1B2" * 12,
    "sk-proj-" + "a1B2_-" * 12,
    "sk_live_" + "a1B2" * 6,
    "AIza" + "a1B2-_c" * 5,
    "eyJhbGciOiJIUzI1NiJ9eyJz.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9P",
    "eyJhcGlfYWRkcmVzcyI6Imh0dHBzOi8vYXBwLm5lcHR1bmUuYWkiLCJhcGlfa2V5IjoiYSJ9" + "==",
    PEM,
]
#: text → what it must become; the rest of the line is to stay
NAMED = {
    "password=hunter2": "password=[redacted]",
    "db_password : hunter2": "db_password : [redacted]",
    "PASSWORD = 'correct horse'; port=1": "PASSWORD = [redacted]; port=1",
    '{"api_key": "x y z", "lr": 0.1}': '{"api_key": [redacted], "lr": 0.1}',
    r"{\"secret\": \"x y\", \"lr\": 1}": r"{\"secret\": [redacted], \"lr\": 1}",
    "clientSecretValue=abc": "clientSecretValue=[redacted]",
    "aws_secret_access_key: wJalrXUtnFEMI/K7MDENG": "aws_secret_access_key: [redacted]",
    "Authorization: Bearer abc": "Authorization: [redacted]",
    "curl -H 'x: Bearer abcdef0123456789abcd' url": "curl -H 'x: [redacted]' url",
    "GET /v1?api_key=abc&page=2": "GET /v1?api_key=[redacted]&page=2",
    "<password>hunter2</password>": "<password>[redacted]</password>",
    "--password hunter2 --lr 1": "--password [redacted] --lr 1",
    "['t.py', '--hub-api-key', 'abc', '--lr']": "['t.py', '--hub-api-key', '[redacted]', '--lr']",
    "token=abcdef12345": "token=[redacted]",
    "refresh_token: 'a1b2c3d4'": "refresh_token: [redacted]",
    "postgres://me:p@ss@db.local/x": "postgres://[redacted]@db.local/x",
    f"https://{HEX40}@sentry.io/1": "https://[redacted]@sentry.io/1",
    "Server=db;Pwd=abc;Port=1": "Server=db;Pwd=[redacted];Port=1",
    "AccountKey=abc==;Suffix=x": "AccountKey=[redacted];Suffix=x",
}
HARMLESS = [
    "",
    "epoch 3 step 1,200 loss 0.123 lr 1e-4 tokens/s 12345.6 elapsed 00:12:33",
    "max_tokens=512, num_tokens: 12345678, tokens: 1,234,567,890",
    "pad_token='<|endoftext|>' cls_token: '[CLS-0001]'",
    "token = tokenizer(text)",
    "next token: Washington",
    "PWD=/home/me OLDPWD=/tmp",
    "password=None secret: null api_key=***",
    "password=[redacted]",
    "enter the password, then the secret",
    "ssh://git@github.com/a/b  https://example.com:8080/a@b",
    "task-aaaaaaaaaaaaaaaaaaaaaaaaaaaa risk-free disk-0123456789abcdef0123456789",
    "hf_model_name ghp_short AKIASHORT eyJ",
    "commit 0123456789abcdef0123456789abcdef01234567",
    "keyboard monkey=1 key=value turkey: 3",
    "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----",
]


@pytest.mark.parametrize("secret", SHAPES, ids=lambda s: s[:12])
@pytest.mark.parametrize("around", ["{}", "using {} now", "x='{}'", "({})", "a,{},b", '"{}"'])
def test_tokens_are_known_by_their_shape(secret: str, around: str) -> None:
    """A token is replaced wherever it stands, and what stands around it stays."""
    assert REDACTOR.text(around.format(secret)) == around.format(MARK)


@pytest.mark.parametrize(("text", "expected"), NAMED.items())
def test_what_follows_a_secret_name_is_replaced(text: str, expected: str) -> None:
    """After a name such as `password`, its value is replaced, in any of the usual notations."""
    assert REDACTOR.text(text) == expected


@pytest.mark.parametrize("text", HARMLESS)
def test_what_is_no_secret_stays(text: str) -> None:
    """Training logs speak of tokens and keys all the time."""
    assert REDACTOR.text(text) == text


@pytest.mark.parametrize("text", [*NAMED, *SHAPES])
def test_redacting_twice_is_redacting_once(text: str) -> None:
    """The mark itself is no secret."""
    once = REDACTOR.text(text)
    assert REDACTOR.text(once) == once


@pytest.mark.parametrize(
    "name",
    [
        "NEPTUNE_API_TOKEN", "CLEARML_API_SECRET_KEY", "CLEARML_API_ACCESS_KEY",
        "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "HF_TOKEN", "ULTRALYTICS_API_KEY", "HUB_API_KEY",
        "RANKGATE_SECRET", "MYSQL_PWD", "MyServicePassword", "GITHUB_TOKEN",
    ],
)  # fmt: skip
def test_values_of_secret_variables_are_replaced(name: str) -> None:
    """What the environment holds under a telling name is replaced wherever it appears."""
    redactor = Redactor({name: "plainly-nothing"})
    assert redactor.text("x plainly-nothing,plainly-nothing!") == f"x {MARK},{MARK}!"
    assert redactor.value("note", "is plainly-nothing") == f"is {MARK}"
    assert redactor.key("plainly-nothing/loss") == f"{MARK}/loss"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PWD", "/nowhere/at/all"),
        ("OLDPWD", "/nowhere/at/all"),
        ("TOKENIZERS_PARALLELISM", "nothing-at-all"),
        ("API_KEY", "x" * (MIN_VALUE_CHARACTERS - 1)),
        ("GOOGLE_APPLICATION_CREDENTIALS", __file__),
        ("HOME", "/nowhere/at/all"),
    ],
)
def test_other_values_stay(name: str, value: str) -> None:
    """Short values, existing files and directories are words that logs are full of."""
    assert Redactor({name: value}).text(f"see {value}") == f"see {value}"


def test_a_variable_of_several_lines_is_looked_for_line_by_line() -> None:
    """A key in the environment may be logged by somebody who splits it."""
    redactor = Redactor({"SSH_PRIVATE_KEY": "first-line-0\nsecond-line\nend"})
    assert redactor.text("a second-line b") == f"a {MARK} b"
    assert redactor.text("the end") == "the end"


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("password", "x", MARK),
        ("db/credentials/user", "me", MARK),
        ("clientSecret", "x", MARK),
        ("hub-api-key", "x", MARK),
        ("hub/token", "short", MARK),
        ("password", 1234, MARK),
        ("password", None, None),
        ("password", "", ""),
        ("use_password", True, True),
        ("secret_recall", 0.5, 0.5),
        ("max_tokens", 512, 512),
        ("max_tokens", "512", "512"),
        ("pad_token", "<pad>", "<pad>"),
        ("mask_token", "[MASK]", "[MASK]"),
        ("tokenizer", "gpt2", "gpt2"),
        ("note", "password=x", f"password={MARK}"),
        ("lr", 0.1, 0.1),
        ("key", "value", "value"),
    ],
)
def test_parameters_are_told_by_their_key(key: str, value: Any, expected: Any) -> None:
    """A text under a secret's name is replaced whole; numbers and switches stay."""
    found = REDACTOR.value(key, value)
    assert (found, type(found)) == (expected, type(expected))


def test_a_metrics_name_is_no_secret() -> None:
    """Words that only contain one are left alone."""
    assert not any(map(is_secret_name, ("tokenizer", "keypoints", "secretary", "monkey", "author")))


ADVERSARIAL = [
    "a", " ", "--", "--a-", "eyJ", "eyJ.", "://", "://a:", "://a:a", "sk-", "hf_", "-----BEGIN ",
    "-----BEGIN RSA PRIVATE KEY-----", "token", "token=", "token=aaaaaaaa", "token=aaaaaaa1 ",
    "password", "password=", 'password="', "password='a\"", "password:\t", "secret_", "secret.-",
    "secret    ", "api key", "--a_a_a_password ", "bearer ", "authorization: bearer ", "pwd,,,,",
    "\\\"", "credentials=>", "-", "_", ".", "=", "xoxa-", "github_pat_", "[redacted]",
    "\x00é\ud800",
]  # fmt: skip


@pytest.mark.parametrize("piece", ADVERSARIAL)
def test_the_time_is_bounded_whatever_the_text(piece: str) -> None:
    """15,000 characters made to be hard take milliseconds of this thread's own time; a pattern that
    ran over and over would take seconds."""
    text = (piece * 15_000)[:15_000]
    took = []
    for _ in range(5):
        before = time.thread_time()
        REDACTOR.text(text)
        took.append(time.thread_time() - before)
    assert min(took) < 0.1


def test_the_time_is_linear() -> None:
    """A text ten times as long takes about ten times as long, not a hundred times."""

    def best(n: int) -> float:
        took = []
        for _ in range(5):
            before = time.thread_time()
            REDACTOR.text("secret_" * n)
            took.append(time.thread_time() - before)
        return min(took)

    assert best(20_000) < 30 * best(2_000)


WORDS = st.text(st.characters(codec="utf-8"), max_size=40)


@given(before=WORDS, after=WORDS, secret=st.sampled_from(SHAPES))
def test_a_token_in_any_text_is_gone(before: str, after: str, secret: str) -> None:
    """Whatever stands around it, apart by a space, nothing of the token is left."""
    assert secret not in REDACTOR.text(f"{before} {secret} {after}")


@given(WORDS, st.text("abcdefghij0123456789", min_size=8, max_size=30), WORDS)
def test_a_known_value_in_any_text_is_gone(before: str, value: str, after: str) -> None:
    """A value of the environment is found without anything around it."""
    hidden = Redactor({"X_SECRET": value}).text(f"{before}{value}{after}")
    assert value not in hidden.replace(MARK, "")


@given(st.text(max_size=300))
def test_any_text_is_taken(text: str) -> None:
    """Nothing raises, lone surrogates and all."""
    assert isinstance(REDACTOR.text(text), str)
