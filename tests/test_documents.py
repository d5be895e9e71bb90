"""Rows as documents: pieces, keys, limits, given splits, and what is dropped on the way."""

import json

import pytest

from pipeline.config.text_data import TextRunConfig
from pipeline.data.cut import cut
from pipeline.data.sources import files
from pipeline.data.text.documents import documents, drop_stats, key_of
from pipeline.errors import DataError

ROWS = [{"text": f"text number {i} is é long enough\n", "domain": "ab"[i % 2]} for i in range(6)]


def config(*paths, domain=None, domains=("a", "b"), hub=(), partition=None, what="auto", **data):
    """Return a TextRunConfig that reads paths; `what` is a document of a text file."""
    entry = {"paths": [str(p) for p in paths], "domain": domain, "documents": what}
    files = [entry] if paths else []
    source = {"source": "hub" if hub else "files", "files": files, "hub": hub}
    return TextRunConfig.model_validate(
        {"data": source | data, "partition": partition or {"domains": domains}}
    )


def read(cfg):
    """Return (documents, stats)."""
    stats = drop_stats()
    return list(documents(cfg, stats)), stats


def write_jsonl(path, found):
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


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
    assert stats.examples["no text"] == [f"{path}:4: text is missing; the columns are domain"]
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


def test_pieces_join_to_the_document_and_end_at_lines_or_characters():
    text = ("a line of words\n" * 300) + "é漢🙂" * 2000 + " tail"
    pieces = [piece.decode() for piece in cut([text.encode()], 1024)]
    assert "".join(pieces) == text
    assert max(len(p.encode()) for p in pieces) <= 1024
    assert pieces[0].endswith("\n") and min(len(p.encode()) for p in pieces[:-1]) >= 512
    raw = text.encode()
    blocks = [raw[i : i + 700] for i in range(0, len(raw), 700)]
    assert b"".join(cut(blocks, 1024)) == raw
    assert [piece.decode() for piece in cut(blocks, 1024)] == pieces


def test_pieces_carry_the_key_of_the_whole(tmp_path):
    (tmp_path / "long.txt").write_text("word " * 2000)
    found, _ = read(config(tmp_path / "long.txt", domain="a", what="file", max_document_bytes=1024))
    assert {d.key for d in found} == {key_of(b"word " * 2000, 0)}
    assert [d.piece for d in found] == list(range(len(found))) and len(found) > 5


def test_a_file_larger_than_memory_allows_reads_as_a_small_one_does(tmp_path, monkeypatch):
    path = tmp_path / "long.txt"
    path.write_text("\ufeff" + "é漢🙂 and words\n" * 200_000)
    large = files.STREAM_BYTES
    for what in ("file", "paragraphs"):
        cfg = config(path, domain="a", what=what, max_document_bytes=50_000)
        monkeypatch.setattr(files, "STREAM_BYTES", large)
        whole = [(d.text, d.key, d.piece) for d in read(cfg)[0]]
        # A mark at the start is no reason to take a file for a smaller one
        for size in (1 << 16, path.stat().st_size - 1, path.stat().st_size):
            monkeypatch.setattr(files, "STREAM_BYTES", size)
            assert [(d.text, d.key, d.piece) for d in read(cfg)[0]] == whole
    monkeypatch.setattr(files, "STREAM_BYTES", 1 << 16)
    path.write_bytes(b"good text " * 300_000 + b"\xff")
    found, stats = read(config(path, domain="a", what="file", max_bad_share=1))
    assert not found and stats.counts == {"not UTF-8": 1}
    assert "set encoding beside paths" in stats.examples["not UTF-8"][0]


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
    names = ["train", "validation", "test", "dev", "holdout", "Training", "testing "]
    path = write_jsonl(tmp_path / "rows.jsonl", [ROWS[0] | {"split": name} for name in names])
    kept, stats = read(config(path, split_field="split", max_bad_share=0.5))
    assert [d.split for d in kept] == ["train", "valid", "test", "valid", "train", "test"]
    assert stats.counts == {"unknown split": 1}


def test_labels_play_no_part_unless_they_make_the_domains(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": r["text"]} for r in ROWS])
    kept, _ = read(config(path, partition={"by": "random", "count": 2}))
    assert len(kept) == 6
    with pytest.raises(DataError, match="6 no label"):
        read(config(path))
