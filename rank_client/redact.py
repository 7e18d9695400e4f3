"""Secrets out, before anything is written: a spool, a journal and a backend keep what they get.

Three ways to know a secret: the name it goes by (`password`, `api_key=…`), its shape (a GitHub
token, a PEM key, a password in a URL), and its value, where that stands in an environment variable
whose name says so, in a variable's URL, or in a file in which a vendor's package keeps its keys.
Keys of metrics, and the insides of files, figures and tables, are not looked into.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote, unquote

from . import key_files
from .values import MAX_TEXT_VALUE, clean_key

MARK = "[redacted]"
MAX_SECRET_CHARACTERS = 16_384  #: of one known by its shape, as a private key is
MIN_VALUE_CHARACTERS = 8  #: of an environment variable; a shorter value stands in many words

# Each pattern begins with a letter or two, so that most places of a text are passed by at once, and
# none repeats without a bound from more than one place: the time is linear in the text's length.

_STRONG = (
    r"[pP](?i:asswords?|asswd|assphrases?|wd(?!\W{0,4}/)|rivate[_\-. ]?keys?)"
    r"|[sS](?i:ecrets?(?:[_\-. ]?keys?)?|igning[_\-. ]?keys?|sh[_\-. ]?keys?)"
    r"|[cC](?i:redentials?)|[eE](?i:ncryption[_\-. ]?keys?)"
    r"|[aA](?i:uthorization|(?:pi|ccess|ccount|uth)[_\-. ]?keys?)"
)
#: `max_tokens = 512` and `pad_token = "<pad>"` are no secrets: what a token is, its value says
_LIKELY = r"(?=[\"']?[^\s\"'<\[]{8})(?=[^\s]{0,64}\d)(?![\d.,]{8,64}(?:[\s,;)}\]\"']|$))"
_NO_VALUE = r"(?!\\?[\"']?(?:\[redacted\]|None\b|null\b|\*))"
_VALUE = (
    r"(?:(?:bearer|basic|token)\s{1,4})?"
    r"(?:\\?\"[^\"\n]*\"|\\?'[^'\n]*'|[^\s\"',;&<]+)"
)
_IS = r"(?![\w.\-])\\?[\"']?\s{0,4}(?:=>|[=:>])\s{0,4}" + _NO_VALUE
_NAMED = (
    rf"(?:{_STRONG})(?:[_.\-A-Z0-9][\w.\-]{{0,40}})?{_IS}(?P<value>(?i:{_VALUE}))"
    rf"|[tT](?i:okens?){_IS}{_LIKELY}(?P<token>(?i:{_VALUE}))"
)
#: on a command line, also as the list that `sys.argv` is
_FLAG = (
    rf"-(?<![\w\-]-)-(?:[A-Za-z0-9]{{1,20}}[_\-]){{0,3}}(?:{_STRONG}|[tT](?i:oken))"
    r"[\"']?,?\s{1,4}(?!-)[\"']?(?P<argument>[^\s\"',]+)"
)
#: what stands before a token's own first letter ends in no letter or digit
_SHAPES = (
    r"A(?<![A-Za-z0-9]A)(?:(?:KIA|SIA)[A-Z0-9]{16}|Iza[A-Za-z0-9_\-]{35})",
    r"g(?<![A-Za-z0-9]g)(?:h[oprsu]_[A-Za-z0-9]{20,255}|ithub_pat_[A-Za-z0-9_]{20,255}"
    r"|lpat-[A-Za-z0-9_\-]{20,255})",
    r"h(?<![A-Za-z0-9]h)f_[A-Za-z0-9]{24,255}",
    r"u(?<![A-Za-z0-9]u)l_[0-9a-f]{40}",
    r"w(?<![A-Za-z0-9]w)andb_v\d_[A-Za-z0-9_]{20,255}",
    r"x(?<![A-Za-z0-9]x)(?:ox[a-z]|app)-[A-Za-z0-9\-]{10,255}",
    r"[rs](?<![A-Za-z0-9].)k(?:-[A-Za-z0-9_\-]{20,255}|_(?:live|test)_[A-Za-z0-9]{16,255})",
    r"y(?<![A-Za-z0-9]y)a29\.[A-Za-z0-9_\-]{20,1024}",
    # a JWT, and Neptune's token: JSON in base 64
    r"e(?<![A-Za-z0-9+/_\-]e)yJ[A-Za-z0-9+/_\-]{20,4096}={0,2}(?:\.[A-Za-z0-9_\-]{1,4096}){0,2}",
    r"[bB](?<![A-Za-z0-9].)(?i:earer)\s{1,4}(?=[^\s]{0,64}\d)[A-Za-z0-9._~+/=\-]{16,4096}",
)
_PEM = r"-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]{0,40}KEY-----|\Z)"
_USERINFO = (
    r"://(?P<userinfo>[^\s/@:\"'<>]{0,128}:[^\s/\"'<>]{1,256}|[^\s/@:\"'<>]{16,256})(?=@[\w\[])"
)

_SECRET = re.compile("|".join((_USERINFO, *_SHAPES, _NAMED, _PEM, _FLAG)))

_URL_SECRET = re.compile(_USERINFO)

_WORD_START = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_SECRET_NAME = re.compile(rf"(?i)(?:{_STRONG})(?![a-z])")
_TOKEN_NAME = re.compile(r"(?i)token(?:$|/)")
_NOT_SECRET = ("PWD", "OLDPWD")  #: the current directory


def _replace(found: re.Match[str]) -> str:
    """The match with its secret part replaced; the name it goes by stays."""
    if found.lastgroup is None:
        return MARK
    return found.string[found.start() : found.start(found.lastgroup)] + MARK


def is_secret_name(name: str) -> bool:
    """Does a key or a variable of this name hold a secret, whatever its value is?"""
    words = _WORD_START.sub("_", name)
    return _SECRET_NAME.search(words) is not None or _TOKEN_NAME.search(words) is not None


def _secret_values(environ: Mapping[str, str]) -> list[str]:
    """The values to look for, longest first; a value of several lines is looked for by line."""
    found = set()
    for value in _values(environ):
        for line in map(str.strip, value.splitlines()):
            if len(line) >= MIN_VALUE_CHARACTERS and not _is_file(line):
                found |= _forms(line)
    return sorted(found, key=len, reverse=True)


def _values(environ: Mapping[str, str]) -> Iterator[str]:
    for name, value in environ.items():
        if name not in _NOT_SECRET and is_secret_name(name) and not _is_file(value):
            yield value
        yield from _passwords(value)
    for text in key_files.texts(environ):
        yield from key_files.keys(text)
        yield from _passwords(text)


def _passwords(text: str) -> Iterator[str]:
    """Of the URLs in a text, as they stand there and as they are meant; `me:me` names nobody."""
    for match in _URL_SECRET.finditer(text):
        user, _, password = match["userinfo"].partition(":")
        if user != password:
            yield password or user
            yield unquote(password or user)


def _forms(value: str) -> set[str]:
    """A value as it is, and as it stands in the text of a list, in JSON and in a URL."""
    shown = {
        repr(value)[1:-1],
        json.dumps(value)[1:-1],
        json.dumps(value, ensure_ascii=False)[1:-1],
    }
    return {value, *shown, *(quote(value, safe, errors="replace") for safe in ("", "/"))}


def _is_file(value: str) -> bool:
    try:
        return os.path.exists(value)  # noqa: PTH110
    except ValueError:  # a zero byte, which only a file can hold
        return False


class Redactor:
    """Takes secrets out of text. Environment and files are read once, when this is made."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._values = _secret_values(environ)
        self._longest = max(MAX_SECRET_CHARACTERS, *map(len, self._values), 0)

    def text(self, text: str) -> str:
        """The text with `[redacted]` in the place of each secret; linear in its length."""
        for value in self._values:
            if value in text:
                text = text.replace(value, MARK)
        return _SECRET.sub(_replace, text)

    def start(self, text: str, characters: int) -> str:
        """The first `characters` of a text, without secrets; no work for the rest of it."""
        if len(text) <= characters:
            return self.text(text)
        found = self.text(text[: characters + self._longest])
        if len(text) > characters + self._longest:
            found = found[: -self._longest]  # here may be half a secret, which nothing shows
        return found[:characters]

    def key(self, name: Any) -> str:
        """A key, name or tag, as every store can hold it."""
        return clean_key(self.text(str(name)))

    def value(self, key: str, value: Any) -> Any:
        """A parameter's plain value, told by its key or by itself."""
        if isinstance(value, str):
            hidden = is_secret_name(key) and not (value == "" or _is_special_token(value))
            return MARK if hidden else self.start(value, MAX_TEXT_VALUE)
        if isinstance(value, int) and not isinstance(value, bool) and _SECRET_NAME.search(key):
            return MARK
        return value


def _is_special_token(value: str) -> bool:
    """`<pad>`, `[CLS]` and their like, which tokenizers call tokens too."""
    return (value[0], value[-1]) in (("<", ">"), ("[", "]"))
