"""The bundles at a target, shown, and the pointer to the current one moved."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..report.narrow import print_table
from ..store.versions import Version, Versions
from .prune import said

CURRENT = "latest"


def tend_versions(target: str, console: Console, command: str, to: str | None) -> int:
    """List the versions at a folder or URL, after the pointer was moved where that is the command;
    return how many there are.

    Raises StoreError.
    """
    versions = Versions(target, "TARGET")
    say = said(console)
    if command == "rollback":
        versions.roll_back(to, lambda text, _share: say(text))
    known = versions.known()
    current = versions.current()
    if not known:
        say(f"there is no version in {versions.shown}")
        return 0
    show_versions(known, current.name if current else None, versions.shown, console)
    return len(known)


def show_versions(known: list[Version], current: str | None, place: str, console: Console) -> None:
    """Print versions, the newest first, and which one is current."""
    # As text, for in a title brackets are a style
    title = Text(f"versions in {place}")
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("version", overflow="fold")
    table.add_column("whole since", overflow="fold")
    table.add_column("", overflow="fold")
    for version in reversed(known):
        # Down to the second
        at = f"{version.at[:19]}Z"
        table.add_row(version.name, at, CURRENT if version.name == current else "")
    print_table(console, table)
