"""On a terminal of any width every cell of a table can be read whole."""

import io
import re

import pytest
from rich.console import Console
from rich.table import Table

from pipeline.__main__ import main
from pipeline.report.narrow import print_table
from pipeline.run import dry_run
from pipeline.run.dry_run import show_plan
from pipeline.store.artifacts import Store
from pipeline.store.roots import Root, leave
from tests import small

WORD = re.compile(r"[a-z_]+-[0-9a-f]{12}|[0-9][0-9,]+[0-9]")


def of_width(width, terminal=True):
    """Return a terminal, or a file, of so many columns."""
    return Console(file=io.StringIO(), width=width, force_terminal=terminal, no_color=True)


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 200])
def test_addresses_and_numbers_of_a_plan_are_whole_at_any_width(tmp_path, monkeypatch, width):
    # side by side is told of what is free just now
    monkeypatch.setattr(dry_run, "free_bytes", lambda: 10**10)
    texts = []
    for columns in (width, 500):
        console = of_width(columns)
        show_plan(small.config(), Store(tmp_path / "store"), console)
        texts.append(set(WORD.findall(console.file.getvalue())))
    narrow, wide = texts
    assert len(wide) > 8 and wide <= narrow


@pytest.mark.parametrize("width", range(20, 200, 20))
def test_every_cell_is_printed_whole_and_a_file_keeps_its_table(width):
    cells = [["a-long-address-0123456789ab", "to do", "1,234,567", ""], ["b", "done", "", "[x] y"]]
    for terminal in (True, False):
        table = Table(title="plan of [it]")
        for name in ("job", "state", "tokens", "how"):
            table.add_column(name, overflow="fold")
        for row in cells:
            table.add_row(*row)
        console = of_width(width if terminal else 1000, terminal)
        print_table(console, table)
        text = console.file.getvalue()
        for cell in [*cells[0], *cells[1]]:
            assert all(word in text for word in cell.split())
        assert "plan of [it]" in " ".join(text.split())
        assert ("│" in text) == (not terminal or width >= 60)


def test_errors_and_runs_show_brackets_and_colons_as_they_are(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "--config", "a[red]/b:key:.yaml"]) == 2
    assert "error: a[red]/b:key:.yaml does not exist" in capsys.readouterr().err
    store = Store(tmp_path / "a[red]:key:").open()
    typed = ("joint.models=[dense,moe]",)
    leave(store, Root("mine", "ffn_moe", "2026-01-01T00:00:00Z", "mine.yaml", typed, (), {}))
    assert main(["runs", "--store", str(store.root)]) == 0
    told = capsys.readouterr().out
    assert f"runs in {store.root}" in told and "--override joint.models=[dense,moe]" in told
