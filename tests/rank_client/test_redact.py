"""Secrets are taken out by name, by shape and by the environment's values; the rest stays."""

from __future__ import annotations

import json
import time
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rank_client.redact import (
    MARK,
    MAX_SECRET_CHARACTERS,
    MIN_VALUE_CHARACTERS,
    Redactor,
    is_secret_name,
)
from rank_client.values import MAX_TEXT_VALUE

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


@pytest.mark.parametrize("many", [0, 100])
@pytest.mark.parametrize("secret", ["ghp_" + "a1B2" * 9, "plainly-nothing" * 2000, PEM])
def test_a_cut_leaves_no_half_of_a_secret(secret: str, many: int) -> None:
    """A text too long for a parameter is cut where it is clean: also where the marks of earlier
    secrets, shorter than those, bring what stood behind the cut before it."""
    redactor = Redactor({"MY_SECRET": "plainly-nothing" * 2000})
    known = f"{'ghp_' + 'c3D4' * 60} " * many
    for at in (1, 20, len(secret) - 1, len(secret) + 1, -15_000, -MAX_SECRET_CHARACTERS + 20):
        before = known + "x" * (MAX_TEXT_VALUE - at - len(known) - 1) + " "
        value = redactor.value("note", before + secret + " " + "y" * 200_000)
        assert len(value) <= MAX_TEXT_VALUE
        assert value.startswith(f"{MARK} " * many + "xxxx")
        assert secret[:4] not in value, (at, value[-60:])


def test_a_cut_costs_no_more_than_what_is_kept() -> None:
    """Of a text of any length only as much is looked at as a parameter holds."""
    text = "password=hidden " * 10_000_000
    began = time.process_time()
    assert len(REDACTOR.value("note", text)) <= MAX_TEXT_VALUE
    assert time.process_time() - began < 1


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
    ("url", "password"),
    [
        ("https://me:plain-words@host/path", "plain-words"),
        ("http://me:pl%40in-w%2Frds@proxy:3128", "pl@in-w/rds"),
        ("http://me:pl%40in-w%2Frds@proxy:3128", "pl%40in-w%2Frds"),
        ("postgres://:plain-words@db", "plain-words"),
        ("https://0123456789abcdef0123@sentry.io/1", "0123456789abcdef0123"),
    ],
)
def test_passwords_of_urls_in_the_environment(url: str, password: str) -> None:
    """A variable with a telling value may have any name; the password is one on its own too."""
    redactor = Redactor({"CLEARML_FILES_HOST": url})
    assert redactor.text(f"x {password} y") == f"x {MARK} y"
    assert redactor.text("me host path") == "me host path"


def test_a_password_that_is_the_users_name_is_a_word() -> None:
    """`postgres` would be gone from every line."""
    assert Redactor({"URL": "postgres://postgres:postgres@db"}).text("postgres") == "postgres"


@pytest.mark.parametrize("secret", ["qu'ote\"back\\slash", "a/b+c=d&e %f", "schlüssel-wört"])
def test_a_value_as_other_notations_have_it(secret: str) -> None:
    """In the text of a list, in JSON and in a URL it looks different, and is as secret."""
    redactor = Redactor({"X_SECRET": secret})
    shown = [
        f"{[secret, 1]}", json.dumps([secret, 1]), json.dumps([secret, 1], ensure_ascii=False),
        f"GET /x?y={quote(secret)}&z", f"GET /x?y={quote(secret, safe='')}&z",
    ]  # fmt: skip
    for text in shown:
        hidden = redactor.text(text)
        assert MARK in hidden
        assert not any(part in hidden for part in (secret, quote(secret), "slash", "schl", "b+c"))


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
