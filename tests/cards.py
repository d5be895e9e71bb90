"""The example of a model card, run as it stands."""

import contextlib
import io
import re
import warnings
from pathlib import Path


def example_of(folder: Path) -> str:
    """Return the block of Python in a folder's card."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    return code


def printed(folder: Path) -> str:
    """Return what the example of a card prints in its folder, in names of its own; in a process of
    its own most of the time would go into imports."""
    said = io.StringIO()
    with warnings.catch_warnings(), contextlib.chdir(folder), contextlib.redirect_stdout(said):
        warnings.simplefilter("ignore")
        exec(example_of(folder), {"__name__": "__main__"})  # noqa: S102 (it is what is tested)
    return said.getvalue()
