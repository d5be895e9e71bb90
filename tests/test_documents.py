"""Sources against files written by other programs, and what is dropped on the way."""

import bz2
import csv
import gzip
import json
import lzma

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from pipeline.data.sources import files, installed
from pipeline.data.text.documents import cut, documents, drop_stats, key_of
from pipeline.errors import DataError
from pipeline.families.ffn_moe.config import FfnMoeConfig

ROWS = [{"text": f"text number {i} is é long enough\n", "domain": "ab"[i % 2]} for i in range(6)]


def config(*paths, domain=None, domains=("a", "b"), hub=(), partition=None, **data):
    """Return a FfnMoeConfig that reads paths."""
    files = [{"paths": [str(p) for p in paths], "domain": domain}] if paths else []
    source = {"source": "hub" if hub else "files", "files": files, "hub": hub}
    return FfnMoeConfig.model_validate(
        {"data": source | data, "partition": partition or {"domains": domains}}
    )


def read(cfg):
    """Return (documents, stats)."""
    stats = drop_stats()
    return list(documents(cfg, stats)), stats


def write_jsonl(path, found):
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


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


def test_unreadable_rows_are_counted_with_file_and_line(tmp_path):
    path = tmp_path / "bad.jsonl"
    lines = [
        b'{"text": "\xff\xfe broken bytes", "domain": "a"}',
        b"{not json",
        b"[1]",
        b'{"domain": "a"}',
    ]
    lines += [
        b'{"text": "this one has no label"}',
        b'{"text": "\\ud800 lone surrogate text", "domain": "a"}',
    ]
    lines += [b'{"text": "   ", "domain": "a"}', b'{"text": "short", "domain": "b"}']
    good = [json.dumps(ROWS[0]).encode()] * 6
    path.write_bytes(b"\n".join([*lines, *good]))
    found, stats = read(config(path, max_bad_share=0.5))
    assert len(found) == 6 and stats.seen == 14
    wanted = {
        "not UTF-8": 2,
        "not JSON": 2,
        "no text": 1,
        "no label": 1,
        "empty": 1,
        "too short": 1,
    }
    assert dict(stats.counts) == wanted
    assert stats.examples["no text"] == [f"{path}:4: text is missing"]
    with pytest.raises(DataError, match=r"6 of 14 .*max_bad_share \(0\.4\).*bad\.jsonl:2"):
        read(config(path, max_bad_share=0.4))


def test_short_and_empty_documents_are_not_unreadable(tmp_path):
    path = write_jsonl(tmp_path / "lines.jsonl", [{"text": "", "domain": "a"}] * 50 + ROWS)
    found, stats = read(config(path, max_bad_share=0.0))
    assert len(found) == 6 and stats.counts["empty"] == 50


def test_a_wrong_column_stops_before_the_whole_corpus_is_read(tmp_path):
    path = write_jsonl(tmp_path / "many.jsonl", [{"body": "x"}] * 10_001)
    with pytest.raises(DataError, match="10000 of 10000 .*data.text_field"):
        read(config(path))


@pytest.mark.parametrize(
    ("name", "raw", "match"),
    [
        ("none*.txt", None, "matches no file"),
        ("sub", "folder", "is a folder; write .*sub/"),
        ("x.pdf", b"x", "none of .txt .md .jsonl .parquet .csv"),
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


def test_pieces_join_to_the_document_and_end_at_lines_or_characters():
    text = ("a line of words\n" * 300) + "é漢🙂" * 2000 + " tail"
    pieces = list(cut([text.encode()], 1024))
    assert "".join(pieces) == text
    assert max(len(p.encode()) for p in pieces) <= 1024
    assert pieces[0].endswith("\n") and min(len(p.encode()) for p in pieces[:-1]) >= 512
    raw = text.encode()
    assert list(cut([raw[i : i + 700] for i in range(0, len(raw), 700)], 1024)) == pieces


def test_pieces_carry_the_key_of_the_whole(tmp_path):
    (tmp_path / "long.txt").write_text("word " * 2000)
    found, _ = read(config(tmp_path / "long.txt", domain="a", max_document_bytes=1024))
    assert {d.key for d in found} == {key_of(b"word " * 2000, 0)}
    assert [d.piece for d in found] == list(range(len(found))) and len(found) > 5


def test_a_file_larger_than_memory_allows_reads_as_a_small_one_does(tmp_path, monkeypatch):
    path = tmp_path / "long.txt"
    path.write_text("\ufeff" + "é漢🙂 and words\n" * 200_000)
    cfg = config(path, domain="a", max_document_bytes=50_000)
    whole, _ = read(cfg)
    monkeypatch.setattr(files, "STREAM_BYTES", 1 << 16)
    streamed, _ = read(cfg)
    assert [(d.text, d.key, d.piece) for d in streamed] == [(d.text, d.key, d.piece) for d in whole]
    path.write_bytes(b"good text " * 300_000 + b"\xff")
    found, stats = read(config(path, domain="a", max_bad_share=1))
    assert not found and stats.counts == {"not UTF-8": 1}


def test_keys_ignore_white_space_and_depend_on_the_seed():
    assert key_of(b"a b\n c", 0) == key_of(b"a  b c ", 0)
    assert len({key_of(b"a b", 0), key_of(b"a b", 1), key_of(b"a c", 0)}) == 3


def test_the_limit_holds_per_label_and_stops_reading(tmp_path):
    found = [{"text": "x" * 1000, "domain": "a"}] * 50 + [{"text": "y" * 1000, "domain": "b"}] * 50
    path = write_jsonl(tmp_path / "rows.jsonl", found + [{"never": "read"}] * 100)
    kept, stats = read(config(path, megabytes_per_domain=0.01))
    assert {d.label: sum(e.bytes for e in kept if e.label == d.label) for d in kept} == {
        "a": 10_000,
        "b": 10_000,
    }
    assert stats.seen == 60


def test_splits_come_from_the_field_and_unknown_ones_are_bad(tmp_path):
    names = ["train", "validation", "test", "dev", "holdout"]
    path = write_jsonl(tmp_path / "rows.jsonl", [ROWS[0] | {"split": name} for name in names])
    kept, stats = read(config(path, split_field="split", max_bad_share=0.5))
    assert [d.split for d in kept] == ["train", "valid", "test", "valid"]
    assert stats.counts == {"unknown split": 1}


def test_labels_play_no_part_unless_they_make_the_domains(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": r["text"]} for r in ROWS])
    kept, _ = read(config(path, partition={"by": "random", "count": 2}))
    assert len(kept) == 6
    with pytest.raises(DataError, match="6 no label"):
        read(config(path))


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


def test_licences_of_other_holders_are_the_same_wording():
    one = "MIT License\n\nCopyright (c) 2020 Ann\n\nPermission is granted."
    two = "MIT LICENSE\nCopyright (c) 1999-2024 Bob, Inc.\nPermission is\n granted."
    assert installed._wording(one) == installed._wording(two) != installed._wording("BSD")


def test_headers_without_torch_say_what_to_install(monkeypatch):
    monkeypatch.setattr(installed.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install -r requirements.txt"):
        next(installed.headers())


def test_examples_are_few(tmp_path):
    stats = drop_stats()
    for number in range(10):
        stats.drop("not JSON", f"file:{number}")
    assert stats.counts["not JSON"] == 10 and stats.examples["not JSON"] == [
        "file:0",
        "file:1",
        "file:2",
    ]
