"""Four domains of real text that every machine has once the requirements are installed.

Invariant: files are ordered by a hash of their relative path and read as bytes of the packages that
this project needs, so machines with the same versions of these and the same build of Python see the
same documents in the same order, with no network; others see others, and addresses hold which.
"""

import hashlib
import importlib.metadata
import importlib.util
import platform
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from email import message_from_string
from functools import lru_cache, partial
from importlib.metadata import Distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from ...config.text_data import INSTALLED_DOMAINS as DOMAINS
from ...config.text_data import TextRunConfig
from ...errors import DataError
from ...protocols import Eye, Seen
from . import FoundRow, Source, SourceFile

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
# What requirements.txt names. Text is taken of these and of what they need: what else a machine
# has, such as what its tests need, comes and goes
OWN = (
    "bitsandbytes",
    "datasets",
    "fastapi",
    "filelock",
    "fsspec",
    "gguf",
    "huggingface-hub",
    "imagehash",
    "jinja2",
    "matplotlib",
    "modal",
    "numpy",
    "optuna",
    "packaging",
    "peft",
    "pillow",
    "pillow-heif",
    "prometheus-client",
    "psutil",
    "pydantic",
    "pywavelets",
    "rapidfuzz",
    "rich",
    "ruamel-yaml",
    "s3fs",
    "safetensors",
    "scikit-learn",
    "scipy",
    "tensorboard",
    "tokenizers",
    "torch",
    "transformers",
    "typing-extensions",
    "uvicorn",
    "wandb",
    "zstandard",
)


def sources(cfg: TextRunConfig) -> Iterator[Source]:
    """Yield each domain that is asked for, as one file of rows."""
    for domain in DOMAINS:
        # A label that nobody wants need not be read to be dropped
        if cfg.partition.by == "labels" and domain not in cfg.partition.domains:
            continue
        rows = partial(_rows, domain, cfg.data.text_field)
        yield domain, iter([SourceFile(rows, partial(_seen, domain), {"domain": domain})])


def _seen(domain: str, _eye: Eye) -> Iterator[Seen]:
    # No file is opened
    for name, version in taken_from(domain):
        yield Seen("data.source", name, version)


def taken_from(domain: str) -> Iterator[tuple[str, str]]:
    """Yield (name, version) of what holds the text of a domain."""
    # Of one version each platform has another build, with other headers and other modules
    yield "platform", sysconfig.get_platform()
    if domain in ("python", "manual"):
        yield "Python", " ".join((platform.python_version(), *platform.python_build()))
    # Every package has a description, and most a licence
    from_all = domain in ("manual", "licences")
    for name, version in _versions(tuple(map(_changed_ns, sys.path))):
        if from_all or (domain == "headers" and name == "torch"):
            yield name, version


@lru_cache(maxsize=4)
def _versions(_folders_ns: tuple[int, ...]) -> tuple[tuple[str, str], ...]:
    """Return (name, version) of every package; read again once a folder of packages has changed, as
    it takes a tenth of a second."""
    return tuple((name, package.version) for name, package in _packages())


def _changed_ns(folder: str) -> int:
    try:
        return Path(folder or ".").stat().st_mtime_ns
    except OSError:
        return 0


def _rows(domain: str, text_field: str) -> Iterator[FoundRow]:
    for where, text in READERS[domain]():
        yield where, {text_field: text}


def python() -> Iterator[tuple[str, str]]:
    """Yield (path, source) of this interpreter's standard library, its tests left out."""
    root = Path(sysconfig.get_path("stdlib"))
    skip = _NOT_PROSE - {"data", "datasets"}
    # pydoc_data is the text that manual() gives; dist-packages holds what Debian installs
    skip |= {"pydoc_data", "dist-packages", "lib2to3"}
    found = []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).parts
        if skip.isdisjoint(parts):
            found.append(path)
    yield from _texts(root, found)


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
            "data.source installed: the domain headers reads torch's include folder, and there is "
            "none here. Run `pip install -r requirements.txt`, or leave headers out of "
            "partition.domains"
        )
    written = []
    for path in root.rglob("*"):
        # One generated file for each operator, all alike
        generated = path.is_relative_to(root / "ATen" / "ops")
        if path.suffix in _HEADERS and not generated:
            written.append(path)
    yield from _texts(root, written)


def manual() -> Iterator[tuple[str, str]]:
    """Yield (name, text) of the language reference, package descriptions and package
    documentation."""
    from pydoc_data.topics import topics

    found = {f"pydoc/{name}": text for name, text in topics.items()}
    for name, package in _packages():
        found[f"{name}/METADATA"] = _description(package)
        for path in _listed(package):
            if _is_documentation(path):
                found[f"{name}/{path}"] = _text(_located(package, path))
    for name in _shuffled(found):
        if found[name]:
            yield name, found[name]


def _description(package: Distribution) -> str:
    """Return a package's description: what follows the headers of its METADATA."""
    message = message_from_string(package.read_text("METADATA") or "")
    return str(message.get_payload())


def _is_documentation(path: str) -> bool:
    parts = path.split("/")
    if not path.endswith(_DOCUMENTATION) or ".dist-info/" in path:
        return False
    # Licences are a domain of their own
    if _LICENCE.match(parts[-1]):
        return False
    return _NOT_PROSE.isdisjoint(parts)


def licences() -> Iterator[tuple[str, str]]:
    """Yield (name, text) of the licence files of installed packages, each wording once."""
    found = {}
    for name, package in _packages():
        for path in _listed(package):
            _, _, file = path.rpartition("/")
            # license.py is a program, not a licence
            if _LICENCE.match(file) and not file.endswith((".py", ".pyc")):
                found[f"{name}/{path}"] = _located(package, path)
    seen = set()
    for name in _shuffled(found):
        text = _text(found[name])
        wording = _wording(text)
        if text and wording not in seen:
            seen.add(wording)
            yield name, text


READERS = {
    "python": python,
    "headers": headers,
    "manual": manual,
    "licences": licences,
}


def _wording(text: str) -> bytes:
    """Return a digest that ignores case, layout, punctuation and who holds the copyright."""
    words: list[str] = []
    for line in text.splitlines():
        line = line.lower()
        if "copyright (c" not in line and "©" not in line:
            words += re.sub(r"[^a-z]+", " ", line).split()
    text = " ".join(words)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _packages() -> list[tuple[str, Distribution]]:
    """Return (name, package) of what OWN names and needs, of what is installed, by name."""
    here: dict[str, Distribution] = {}
    for package in importlib.metadata.distributions():
        name = canonicalize_name(package.metadata["Name"] or "")
        here.setdefault(name, package)  # the first on the path is the one that is imported
    asked = [(canonicalize_name(name), "") for name in OWN]
    # (name, extra): what an extra brings is needed by whoever asks for it
    found = set()
    while asked:
        each = asked.pop()
        name, extra = each
        if each in found or name not in here:
            continue
        found.add(each)
        for line in here[name].requires or ():
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                asked += [(canonicalize_name(needed.name), of) for of in ("", *needed.extras)]
    return [(name, here[name]) for name in sorted({name for name, _ in found})]


def _listed(package: Distribution) -> list[str]:
    """Return the files that a package came with: those its RECORD has a hash of."""
    record = package.read_text("RECORD") or ""
    files = []
    for row in record.splitlines():
        # "path",sha256=HASH,BYTES: a path with a comma stands in quotes
        path, hashed, _ = row.rpartition(",sha256=")
        if hashed:
            files.append(path.strip('"'))
    return files


def _located(package: Distribution, path: str) -> Path:
    return Path(str(package.locate_file(path)))


def _texts(root: Path, paths: Iterable[Path]) -> Iterator[tuple[str, str]]:
    named = {}
    for path in paths:
        if path.is_file() and path.stat().st_size <= GENERATED_BYTES:
            named[path.relative_to(root).as_posix()] = path
    for name in _shuffled(named):
        text = _text(named[name])
        if text:
            yield name, text


def _text(path: Path) -> str:
    """Return a file's text; empty when it is not UTF-8 (a few codecs' own sources) or is gone."""
    try:
        return path.read_text("utf-8")
    except (UnicodeDecodeError, OSError):
        return ""


def _shuffled(names: Iterable[str]) -> list[str]:
    """Order names by their hash, so that the first few MB are a fair sample and not one folder."""

    def place(name: str) -> tuple[bytes, str]:
        return hashlib.blake2b(name.encode(), digest_size=8).digest(), name

    return sorted(names, key=place)
