"""Four domains of real text that every machine has once the requirements are installed.

Invariant: files are ordered by a hash of their relative path and read as bytes of installed
packages, so machines with the same requirements see the same documents in the same order, with no
network.
"""

import hashlib
import importlib.metadata
import importlib.util
import re
import sysconfig
from collections.abc import Iterator
from email import message_from_string
from pathlib import Path

from ...config.text_data import INSTALLED_DOMAINS as DOMAINS
from ...errors import DataError

GENERATED_BYTES = 1 << 18  # larger sources are generated tables
_NOT_PROSE = {
    "test",
    "tests",
    "testing",
    "idle_test",
    "data",
    "datasets",
    "site-packages",
    "__pycache__",
}
_LICENCE = re.compile(r"^(LICEN[CS]E|COPYING|NOTICE)", re.I)
_DOCUMENTATION = (".md", ".rst", ".txt")
_HEADERS = (".h", ".hpp", ".cuh")


def python() -> Iterator[tuple[str, str]]:
    """Yield (path, source) of this interpreter's standard library, its tests left out."""
    root = Path(sysconfig.get_path("stdlib"))
    skip = _NOT_PROSE - {"data", "datasets"} | {"pydoc_data", "dist-packages", "lib2to3"}
    yield from _texts(
        root, (p for p in root.rglob("*.py") if not skip & set(p.relative_to(root).parts))
    )


def headers() -> Iterator[tuple[str, str]]:
    """Yield (path, source) of the C and C++ headers that ship with torch, without the thousands of
    generated ones.

    Raises DataError when torch is not installed.
    """
    spec = importlib.util.find_spec("torch")  # finds the package and does not import it
    folders = spec.submodule_search_locations if spec else None
    root = Path(folders[0]) / "include" if folders else None
    if root is None or not root.is_dir():
        raise DataError(
            "data.source installed: the domain headers reads torch's include folder, and there is none here. "
            "Run `pip install -r requirements.txt`, or leave headers out of partition.domains"
        )
    written = (
        p
        for p in root.rglob("*")
        if p.suffix in _HEADERS and p.relative_to(root).parts[:2] != ("ATen", "ops")
    )
    yield from _texts(root, written)


def manual() -> Iterator[tuple[str, str]]:
    """Yield (name, text) of the language reference, package descriptions and package documentation."""
    from pydoc_data.topics import topics

    found = {f"pydoc/{name}": text for name, text in topics.items()}
    for name, package in _packages():
        found[f"{name}/METADATA"] = message_from_string(
            package.read_text("METADATA") or ""
        ).get_payload()
        for path in _listed(package):
            parts = path.split("/")
            prose = (
                path.endswith(_DOCUMENTATION)
                and not _NOT_PROSE & set(parts)
                and ".dist-info/" not in path
            )
            if prose and not _LICENCE.match(parts[-1]):
                found[f"{name}/{path}"] = _text(Path(str(package.locate_file(path))))
    yield from ((name, found[name]) for name in _shuffled(found) if found[name])


def licences() -> Iterator[tuple[str, str]]:
    """Yield (name, text) of the licence files of installed packages, each wording once."""
    found = {}
    for name, package in _packages():
        for path in _listed(package):
            if _LICENCE.match(path.rpartition("/")[2]) and not path.endswith((".py", ".pyc")):
                found[f"{name}/{path}"] = Path(str(package.locate_file(path)))
    seen = set()
    for name in _shuffled(found):
        text = _text(found[name])
        wording = _wording(text)
        if text and wording not in seen:
            seen.add(wording)
            yield name, text


READERS = dict(zip(DOMAINS, (python, headers, manual, licences), strict=True))


def _wording(text: str) -> bytes:
    """Return a digest that ignores case, layout, punctuation and who holds the copyright."""
    lines = (line.lower() for line in text.splitlines())
    words = " ".join(
        re.sub(r"[^a-z]+", " ", line)
        for line in lines
        if "copyright (c" not in line and "©" not in line
    )
    return hashlib.blake2b(" ".join(words.split()).encode(), digest_size=16).digest()


def _packages() -> list[tuple[str, importlib.metadata.Distribution]]:
    found = {}
    for package in importlib.metadata.distributions():
        name = (package.metadata["Name"] or "").lower()
        found.setdefault(name, package)  # the first on the path is the one that is imported
    return sorted((name, package) for name, package in found.items() if name)


def _listed(package: importlib.metadata.Distribution) -> list[str]:
    rows = (package.read_text("RECORD") or "").splitlines()
    return [row.rpartition(",sha256=")[0].strip('"') for row in rows if ",sha256=" in row]


def _texts(root: Path, paths: Iterator[Path]) -> Iterator[tuple[str, str]]:
    named = {
        p.relative_to(root).as_posix(): p
        for p in paths
        if p.is_file() and p.stat().st_size <= GENERATED_BYTES
    }
    for name in _shuffled(named):
        if text := _text(named[name]):
            yield name, text


def _text(path: Path) -> str:
    """Return a file's text; empty when it is not UTF-8 (a few codecs' own sources) or is gone."""
    try:
        return path.read_text("utf-8")
    except (UnicodeDecodeError, OSError):
        return ""


def _shuffled(names) -> list[str]:
    """Order names by their hash, so that the first few MB are a fair sample and not one folder."""
    return sorted(
        names, key=lambda name: (hashlib.blake2b(name.encode(), digest_size=8).digest(), name)
    )
