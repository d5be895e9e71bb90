"""Sources of documents: files written by other programs, the Hub, installed text, and a new one."""

import bz2
import codecs
import csv
import gzip
import json
import lzma
import sys
from pathlib import Path
from types import ModuleType

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from packaging.utils import canonicalize_name
from test_documents import ROWS, config, read, write_jsonl

from pipeline.data.sources import SourceFile, installed
from pipeline.errors import DataError

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "suffix", ["jsonl", "jsonl.gz", "jsonl.bz2", "jsonl.xz", "jsonl.zst", "csv", "parquet"]
)
def test_every_format_gives_the_same_documents(tmp_path, suffix):
    path, raw = tmp_path / f"rows.{suffix}", "".join(json.dumps(r) + "\n" for r in ROWS).encode()
    pack = {
        "gz": gzip.compress,
        "bz2": bz2.compress,
        "xz": lzma.compress,
        "zst": zstandard.compress,
    }
    if suffix == "csv":
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, ROWS[0])
            writer.writeheader()
            writer.writerows(ROWS)
    elif suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    else:
        path.write_bytes(pack.get(suffix.rpartition(".")[2], bytes)(raw))
    found, _ = read(config(path))
    assert [(d.text, d.label) for d in found] == [(r["text"], r["domain"]) for r in ROWS]
    assert [d.bytes for d in found] == [len(r["text"].encode()) for r in ROWS]


def test_hub_code_streams_a_local_folder(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    found, _ = read(config(hub=[{"dataset": str(tmp_path), "revision": "main"}]))
    assert [(d.text, d.label) for d in found] == [(r["text"], r["domain"]) for r in ROWS]


def test_hub_that_cannot_be_reached_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match=r"data\.hub: .*nowhere.* cannot be streamed.*network"):
        read(config(hub=[{"dataset": str(tmp_path / "nowhere"), "revision": "main"}]))


def test_globs_are_sorted_and_read_once(tmp_path):
    for name in ("b.txt", "a.md", "c.txt"):
        (tmp_path / name).write_text(f"this is the file {name}")
    cfg = config(tmp_path / "*.txt", tmp_path / "?.*", domain="a")
    assert [d.text[-5:] for d in read(cfg)[0]] == ["b.txt", "c.txt", " a.md"]


def test_a_file_that_links_lead_to_is_read_once_and_a_mark_alone_is_no_row(tmp_path):
    write_jsonl(tmp_path / "b.jsonl", ROWS)
    (tmp_path / "a.jsonl").symlink_to("b.jsonl")
    (tmp_path / "all").symlink_to(tmp_path)
    (tmp_path / "z.jsonl").hardlink_to(tmp_path / "b.jsonl")
    (tmp_path / "c.jsonl").write_bytes(codecs.BOM_UTF8)
    (tmp_path / "d.json").write_bytes(codecs.BOM_UTF8 + b"\n")
    alone, _ = read(config(tmp_path / "b.jsonl"))
    everywhere = [tmp_path / part for part in ("*.jsonl", "*.json", "all/*.jsonl")]
    found, stats = read(config(*everywhere))
    assert [document.text for document in found] == [document.text for document in alone]
    assert stats.counts == {"empty file": 2}


@pytest.mark.parametrize(
    ("name", "raw", "match"),
    [
        ("none*.txt", None, "matches no file"),
        ("sub", "folder", "is a folder; write .*sub/"),
        ("x.pdf", b"x", "none of .txt .md .jsonl .ndjson .json .csv .tsv .parquet"),
        ("x.jsonl.gz", b"not gzip", "x.jsonl.gz cannot be read"),
        (
            "x.jsonl.gz",
            gzip.compress(b'{"text": "a"}' * 999, mtime=0)[:-12],
            "x.jsonl.gz cannot be read",
        ),
        ("x.parquet", b"not parquet", "x.parquet cannot be read"),
        ("x.jsonl.zst", b"not zstandard", "x.jsonl.zst cannot be read"),
    ],
)
def test_a_source_that_cannot_be_read_is_named(tmp_path, name, raw, match):
    if raw == "folder":
        (tmp_path / name).mkdir()
    elif raw:
        (tmp_path / name).write_bytes(raw)
    with pytest.raises(DataError, match=match):
        read(config(tmp_path / name, domain="a"))


def test_installed_text_is_four_domains_in_a_fixed_order():
    for domain in installed.DOMAINS[
        2:
    ]:  # the other two walk thousands of files; the whole chain reads them
        found = list(installed.READERS[domain]())
        assert sum(len(text) for _, text in found) > 200_000
        assert found == list(installed.READERS[domain]())
        assert not any(name.startswith("/") for name, _ in found)
    sources = dict(installed.python())
    assert "import" in sources["ast.py"] and not any("test" in name.split("/") for name in sources)


def test_what_is_installed_beside_the_requirements_gives_no_text(tmp_path, monkeypatch):
    needs = {
        "rich": ["Friend[more]"],
        "friend": ["more_friend; extra == 'more'", "foe; extra == 'less'"],
        "more_friend": ["old-friend; python_version < '3'"],
        **dict.fromkeys(("foe", "old_friend", "stranger"), ()),
    }
    for name, needed in needs.items():
        package = tmp_path / f"{name}-99.dist-info"
        package.mkdir()
        lines = "".join(f"Requires-Dist: {each}\n" for each in needed)
        package.joinpath("METADATA").write_text(
            f"Name: {name}\nVersion: 99\n{lines}\n{name} says\n"
        )
    before = dict(installed.taken_from("licences"))
    monkeypatch.syspath_prepend(tmp_path)
    after = dict(installed.taken_from("licences"))
    assert after.keys() - before.keys() == {"friend", "more-friend"}
    assert after["rich"] == "99"
    assert "pytest" not in before
    told = dict(installed.manual())
    assert "more_friend says" in told["more-friend/METADATA"]
    assert "stranger/METADATA" not in told


def test_the_requirements_are_what_text_is_taken_of():
    lines = (ROOT / "requirements.txt").read_text("utf-8").splitlines()
    named = {canonicalize_name(line.partition("==")[0]) for line in lines if "==" in line}
    assert named == set(installed.OWN)


def test_licences_of_other_holders_are_the_same_wording():
    one = "MIT License\n\nCopyright (c) 2020 Ann\n\nPermission is granted."
    two = "MIT LICENSE\nCopyright (c) 1999-2024 Bob, Inc.\nPermission is\n granted."
    assert installed._wording(one) == installed._wording(two) != installed._wording("BSD")


def test_headers_without_torch_say_what_to_install(monkeypatch):
    monkeypatch.setattr(installed.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install -r requirements.txt"):
        next(installed.headers())


def test_a_new_source_is_a_module_with_its_name(monkeypatch):
    """Its settings aside, nothing names the sources there are."""
    poems = ModuleType("pipeline.data.sources.poems")
    poems.sources = lambda cfg: iter(
        [("a", iter([SourceFile(lambda: iter([("poem 1", ROWS[0])]), iter, {})]))]
    )
    monkeypatch.setitem(sys.modules, poems.__name__, poems)
    cfg = config("unread.txt")
    cfg = cfg.model_copy(update={"data": cfg.data.model_copy(update={"source": "poems"})})
    found, _ = read(cfg)
    assert [(d.text, d.label, d.where) for d in found] == [(ROWS[0]["text"], "a", "poem 1")]
