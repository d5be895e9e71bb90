"""Bytecode beside the source that containers are given: what they compile goes with them, and this
program takes two seconds of processor time to compile."""

import hashlib
import importlib.util
import os
import py_compile
import tempfile
from pathlib import Path

Copies = list[list]  # [host path, container path, mode]


def cached() -> Path:
    """Return the folder in which bytecode is kept from one server to the next."""
    given = os.environ.get("XDG_CACHE_HOME")
    home = Path(given) if given else Path.home() / ".cache"
    folder = home / "moleforge-loopback"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def with_bytecode(copies: Copies, folder: Path) -> Copies:
    """Return copies with the bytecode of every module among them; host paths are named by what they
    hold, as the server's blobs are."""
    more = []
    for source, inside, _ in copies:
        if not inside.endswith(".py"):
            continue
        compiled = _compiled(Path(source), inside, folder)
        if compiled is not None:
            more.append([str(compiled), importlib.util.cache_from_source(inside), 0o644])
    return copies + more


def _compiled(source: Path, inside: str, folder: Path) -> Path | None:
    """Return a module's bytecode; None where it cannot be compiled, as its container will say."""
    # a traceback names the file as the container has it
    key = b"\0".join((importlib.util.MAGIC_NUMBER, source.name.encode(), inside.encode()))
    made = folder / f"{hashlib.sha256(key).hexdigest()}.pyc"
    if made.exists():
        return made
    handle, part = tempfile.mkstemp(dir=folder, suffix=".part")
    os.close(handle)
    try:
        # Python takes it as it is: the time of a container's copy of the source says nothing
        unchecked = py_compile.PycInvalidationMode.UNCHECKED_HASH
        py_compile.compile(str(source), part, inside, doraise=True, invalidation_mode=unchecked)
        Path(part).replace(made)
    except py_compile.PyCompileError:
        return None
    finally:
        Path(part).unlink(missing_ok=True)
    return made
