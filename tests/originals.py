"""Folders that live as long as this process: what is made once and copied by every later test.

A test's tmp_path does not: it is removed as soon as that test has passed.
"""

import atexit
import os
import shutil
import tempfile
from pathlib import Path


def folder(name: str) -> Path:
    """Return a new empty folder that is removed when this process ends."""
    root = Path(tempfile.mkdtemp(prefix=f"original-{name}-"))
    atexit.register(_remove, root, os.getpid())
    return root


def _remove(root: Path, maker: int) -> None:
    if os.getpid() == maker:  # a fork has inherited the registration, not the folder
        shutil.rmtree(root, ignore_errors=True)
