"""What the code may not do at all, and what it may be installed with: read from the sources."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.flow.job import ROOT

from .row import Remove, Row

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PACKAGES = ("rank_client", "gateway")

#: A message that is one of these runs code, or may.
RUNS_CODE = frozenset(
    "pickle cPickle _pickle dill cloudpickle joblib marshal shelve jsonpickle yaml torch code "
    "recv_pyobj send_pyobj eval exec compile __import__ os.system os.popen load_module".split()
)
DOTTED = frozenset({"os.system", "os.popen"})
SAFE = frozenset({"re.compile"})
#: A message that is one of these may be a thousand times as large as it looks.
UNPACKS = frozenset(
    "gzip bz2 lzma zipfile tarfile zstandard zstd lz4 snappy brotli blosc decompress decompressobj "
    "unpack_archive extractall".split()
)


def sources() -> dict[str, str]:
    """Every file of the product, by its path."""
    files = [p for name in PACKAGES for p in sorted((ROOT / name).rglob("*.py"))]
    assert len(files) > 80
    return {str(p.relative_to(ROOT)): p.read_text() for p in files}


def text_of(name: str) -> str:
    return (ROOT / name).read_text()


def names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """What a module imports, calls, and takes for an argument that switches safety off."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.partition(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.lineno, str(node.module).partition(".")[0]
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called not in SAFE:
                yield node.lineno, called if called in DOTTED else called.rpartition(".")[2]
            for word in node.keywords:
                on = isinstance(word.value, ast.Constant) and word.value.value is True
                if word.arg in ("shell", "allow_pickle") and on:
                    yield node.lineno, "eval"


def found(forbidden: frozenset[str]) -> list[str]:
    return [
        f"{path}:{line} {name}"
        for path, text in sources().items()
        for line, name in names(ast.parse(text))
        if name in forbidden
    ]


def no_code_from_messages(_: Path) -> None:
    assert found(RUNS_CODE) == []


def nothing_is_unpacked(_: Path) -> None:
    assert found(UNPACKS) == []


def few_packages_at_a_rank(_: Path) -> None:
    """The training process gets two packages of ours, and no third through a back door, but for
    what reads the machine's figures and the framework that an integration is for."""
    of_all = {*sys.stdlib_module_names, "zmq", "msgpack", "__future__", "rank_client"}
    of_some = {
        "rank_client/capture/machine": {"psutil", "pynvml"},
        "rank_client/integrations/ultralytics": {"ultralytics"},
    }
    for path, text in sources().items():
        allowed = of_all.union(*(n for start, n in of_some.items() if path.startswith(start)))
        for node in ast.walk(ast.parse(text)) if path.startswith("rank_client/") else ():
            if isinstance(node, ast.Import):
                assert {a.name.partition(".")[0] for a in node.names} <= allowed, path
            elif isinstance(node, ast.ImportFrom) and not node.level:
                assert str(node.module).partition(".")[0] in allowed, path


def the_linter_looks(_: Path) -> None:
    """Rules for pickle, eval, exec, shell lines and unsafe yaml are on for the product."""
    lint = tomllib.loads(text_of("pyproject.toml"))["tool"]["ruff"]["lint"]
    assert "S" in lint["select"]
    off = {rule for rule in lint["ignore"] if rule.startswith("S") and rule[1:].isdigit()}
    assert off <= {"S101", "S603"}
    places = [where for where, rules in lint["per-file-ignores"].items() if "S" in rules]
    assert not any(name in where for where in places for name in PACKAGES)


# --- what it is installed with -------------------------------------------------------------------

#: earlier ones: an Unpacker used again after an error; a race between SQLite's connections
FLOORS = {"msgpack": (1, 2, 1), "apsw": (3, 51, 3), "pyzmq": (26,)}


def floors(_: Path) -> None:
    wanted = tomllib.loads(text_of("pyproject.toml"))["project"]["dependencies"]
    for name, floor in FLOORS.items():
        [given] = [w for w in wanted if re.match(rf"{name}\b", w)]
        least = re.search(r">=([\d.]+)", given)
        assert least, given
        assert tuple(map(int, least[1].split("."))) >= floor, given
        version = importlib.metadata.version(name)
        assert tuple(int(n) for n in re.findall(r"\d+", version)[: len(floor)]) >= floor


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def needed(name: str, seen: set[str]) -> set[str]:
    """What a package brings with it here, extras not asked for left out."""
    for line in importlib.metadata.requires(name) or ():
        dependency, _, when = line.partition(";")
        match = re.match(r"[A-Za-z0-9._-]+", dependency)
        if match is None or "extra ==" in when or normal(match[0]) in seen:
            continue
        try:
            importlib.metadata.distribution(match[0])
        except importlib.metadata.PackageNotFoundError:
            continue  # for another system, or another Python
        seen.add(normal(match[0]))
        needed(match[0], seen)
    return seen


def all_is_pinned(_: Path) -> None:
    """Whatever rankgate brings to this machine has its version written down."""
    lines = text_of("constraints.txt").splitlines()
    pins = {normal(n) for n, equal, _ in (line.partition("==") for line in lines) if equal}
    brought = needed("rankgate", set()) - {"rankgate"}
    for extra in ("neptune", "clearml"):
        brought |= needed(extra, {extra})
    assert {"pyzmq", "msgpack", "apsw", "requests", "urllib3"} <= brought
    assert brought - pins == set()


# --- without -------------------------------------------------------------------------------------


def with_module(*texts: str) -> Remove:
    """As if somebody had written these lines into the product; each alone must be found."""

    def remove(patch: object) -> None:
        there = sources()
        for text in texts:
            assert found_in(text), text
        there["rank_client/new.py"] = "\n".join(texts)
        patch.setattr(sys.modules[__name__], "sources", lambda: there)  # type: ignore[attr-defined]

    return remove


def found_in(text: str) -> list[str]:
    return [n for _, n in names(ast.parse(text)) if n in RUNS_CODE | UNPACKS]


def instead(name: str, old: str, new: str) -> Remove:
    """As if a file that is not code said something else."""

    def remove(patch: object) -> None:
        text = text_of(name)
        assert old in text
        changed = lambda asked: text.replace(old, new) if asked == name else text_of(asked)  # noqa: E731
        patch.setattr(sys.modules[__name__], "text_of", changed)  # type: ignore[attr-defined]

    return remove


def another_package(patch: object) -> None:
    there = {**sources(), "rank_client/new.py": "def f():\n    import torch\n"}
    patch.setattr(sys.modules[__name__], "sources", lambda: there)  # type: ignore[attr-defined]


CODE = (
    "import pickle", "from pickle import loads", "socket.recv_pyobj()", "eval('1')",
    "np.load(f, allow_pickle=True)", "subprocess.run('x', shell=True)", "os.system('x')",
)  # fmt: skip
ARCHIVES = (
    "import gzip", "import zipfile", "zlib.decompress(b)", "shutil.unpack_archive(p)",
    "from tarfile import open",
)  # fmt: skip
SUPPLY = "supply chain"

ROWS = [
    Row("pickle", "no code from messages", no_code_from_messages, with_module(*CODE)),
    Row("pickle", "the linter looks", the_linter_looks, instead("pyproject.toml", '"S", ', "")),
    Row("decompression", "nothing is unpacked", nothing_is_unpacked, with_module(*ARCHIVES)),
    Row(SUPPLY, "two packages at a rank", few_packages_at_a_rank, another_package),
    Row(SUPPLY, "floors", floors, instead("pyproject.toml", "msgpack>=1.2.1", "msgpack>=1.1")),
    Row(SUPPLY, "all is pinned", all_is_pinned, instead("constraints.txt", "\nurllib3==", "\n#")),
]
