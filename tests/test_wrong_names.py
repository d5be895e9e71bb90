"""Files that are not what their name says, or not all that people have: never a silent loss.

The variants are made by the writers that people have; each is put among good files, where what is
lost of one would stay below data.max_bad_share.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import random
import sqlite3
import tarfile
import unicodedata
import zipfile

import pyarrow
import pytest
import zstandard
from datasets import Dataset, load_from_disk
from pyarrow import ipc, parquet
from test_documents import ROWS, config, read, write_jsonl

from pipeline.errors import DataError

TEXTS = [row["text"] for row in ROWS]
PACKERS = (gzip.compress, bz2.compress, lzma.compress, zstandard.compress)


def texts_of(*paths, **settings):
    """Return the texts, in order, and what was dropped or told."""
    found, stats = read(config(*paths, **settings))
    return [document.text for document in found], stats


def among_good(path, content: bytes, **settings):
    """Return the texts of a file beside others that are good, in which a row is a small share."""
    for number in range(20):
        write_jsonl(path.parent / f"good-{number}.jsonl", ROWS)
    path.write_bytes(content)
    found, stats = texts_of(path, path.parent / "good-*.jsonl", **settings)
    assert found[len(found) - 20 * len(ROWS) :] == TEXTS * 20
    return found[: len(found) - 20 * len(ROWS)], stats


def _lines(between: str, start: str = "", end: str = "", **how) -> bytes:
    return (start + between.join(json.dumps(row, **how) for row in ROWS) + end).encode()


# Other layouts under a name that stands for a row a line
LAYOUTS = {
    "old Macs": _lines("\r"),
    "no ends of lines": _lines(""),
    "blanks": _lines("  "),
    "tabs and returns": _lines("\t\r"),
    "array": _lines(", ", "[", "]"),
    "array over lines": json.dumps(ROWS, indent=1).encode(),
    "array of lines": _lines(",\n", "[\n", "\n]\n"),
    "array of old Macs": _lines(",\r", "[\r", "\r]"),
    "commas": _lines(",\n"),
    "commas alone": _lines(",", end=","),
    "commas of old Macs": _lines(",\r"),
    "text sequences": _lines("\n\x1e", "\x1e", "\n"),
    "text sequences of old Macs": _lines("\r\x1e", "\x1e", "\r"),
    "objects over lines": _lines("\n", indent=2),
    "objects over lines, none between": _lines("", indent=0),
    "two a line": _lines(" ") + b"\n" + _lines("\n"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_layout_makes_a_whole_file_one_bad_row(tmp_path, layout):
    content = LAYOUTS[layout]
    wanted = TEXTS * (2 if layout == "two a line" else 1)
    for name in ("rows.jsonl", "rows.ndjson"):
        for mark in (b"", b"\xef\xbb\xbf"):
            found, stats = among_good(tmp_path / name, mark + content)
            assert found == wanted and not stats.bad, name
    found, stats = among_good(tmp_path / "rows.jsonl", gzip.compress(content))
    assert found == wanted and not stats.bad


def test_what_follows_rows_on_their_line_is_told(tmp_path):
    rows = _lines("")
    found, stats = among_good(tmp_path / "rows.jsonl", rows + rows[:20])
    assert found == TEXTS and stats.counts == {"not JSON": 1}
    # A row with something after it is a row that went wrong
    for rest in (b" x", b"]", b'"', b"}"):
        found, stats = among_good(
            tmp_path / "rows.jsonl", _lines("\n") + b"\n" + _lines("\n") + rest
        )
        assert found == TEXTS + TEXTS[:-1] and stats.counts == {"not JSON": 1}


def _tar(mode: int) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=mode) as archive:
        for number, text in enumerate(TEXTS):
            info = tarfile.TarInfo(f"texts/{number}.txt")
            info.size = len(text.encode())
            archive.addfile(info, io.BytesIO(text.encode()))
    return sink.getvalue()


def _zip() -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr("a.txt", "\n".join(TEXTS))
    return sink.getvalue()


def _web_archive(end: bytes) -> bytes:
    records = []
    for text in TEXTS:
        raw = text.encode()
        head = [b"WARC/1.0", b"WARC-Type: conversion", b"Content-Length: %d" % len(raw), b"", raw]
        records.append(end.join([*head, b"", b""]))
    return b"".join(records)


def _database(folder) -> bytes:
    base = sqlite3.connect(folder / "base")
    base.execute("create table rows (text)")
    base.commit()
    base.close()
    return (folder / "base").read_bytes()


def _tables() -> list[bytes]:
    table = pyarrow.Table.from_pylist(ROWS)
    sink, arrow = io.BytesIO(), io.BytesIO()
    parquet.write_table(table, sink)
    with ipc.new_file(arrow, table.schema) as writer:
        writer.write_table(table)
    return [sink.getvalue(), arrow.getvalue()]


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.jsonl", "a.json", "a.csv", "a.tsv"])
def test_what_holds_no_text_is_refused_under_every_name(tmp_path, name):
    kinds = [_tar(tarfile.USTAR_FORMAT), _tar(tarfile.GNU_FORMAT), _tar(tarfile.PAX_FORMAT)]
    kinds += [_zip(), _web_archive(b"\r\n"), _web_archive(b"\n"), _database(tmp_path), *_tables()]
    kinds += [b"\x04\x22\x4d\x18" + bytes(range(200)), b"%PDF-1.7\n" + b"plain words " * 99]
    path = tmp_path / name
    for content in kinds:
        for pack in (bytes, *PACKERS):
            path.write_bytes(pack(content))
            with pytest.raises(DataError, match=rf"{name} holds no text\. It is "):
                read(config(path, domain="a", max_bad_share=1))
    for outer in PACKERS:
        for inner in PACKERS:
            path.write_bytes(outer(inner(_lines("\n"))))
            with pytest.raises(DataError, match="packed twice"):
                read(config(path, domain="a", max_bad_share=1))


def test_zeros_in_a_file_are_no_text_and_not_utf16(tmp_path):
    text = "plain words of one document, and of another after it\n" * 40
    half = len(text) // 2
    good = text[:half].encode()
    for content in (good + b"\0" * 600, b"\0" * 3000 + good, good + b"\0" * 9 + good):
        (tmp_path / "a.txt").write_bytes(content)
        with pytest.raises(DataError, match="1 of 1 .*not text .*: zeros"):
            read(config(tmp_path / "a.txt", domain="a"))
    for encoding in ("utf-16-le", "utf-16-be"):
        (tmp_path / "a.txt").write_bytes(text.encode(encoding))
        assert texts_of(tmp_path / "a.txt", domain="a", what="file")[0] == [text]


def test_a_quote_between_tabs_takes_no_rows_along(tmp_path):
    draw = random.Random(0)
    path = tmp_path / "a.tsv"
    for _ in range(40):
        rows = [["a", f"document {i} of these, long enough", str(i)] for i in range(30)]
        column = draw.choice([0, 1, 2])
        first, last = sorted(draw.sample(range(30), 2))
        # As files without any quoting have it: one text begins with a quote, a later one ends so
        rows[first][column] = '"' + rows[first][column]
        rows[last][column] += '"'
        lines = ["\t".join(row) for row in [["domain", "text", "number"], *rows]]
        path.write_text("\n".join(lines) + "\n")
        with pytest.raises(DataError, match=rf"a\.tsv .* quote that begins .* line {first + 2} "):
            read(config(path, max_bad_share=1))
    # With quotes as the csv module writes them, a text of several lines is one
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerows([["domain", "text", "number"], ["a", "line one\nline\ttwo\nthree", "1"]])
    assert texts_of(path)[0] == ["line one\nline\ttwo\nthree"]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_headers_as_spreadsheets_and_people_write_them(tmp_path, delimiter):
    rows = [[text.strip(), "a"] for text in TEXTS]
    for said in (f"sep={delimiter}\r\n", f'"sep={delimiter}"\r\n', f"SEP={delimiter}\n", ""):
        for mark in ("", "\ufeff"):
            sink = io.StringIO(newline="")
            csv.writer(sink, delimiter=delimiter).writerows([["text", "domain"], *rows])
            (tmp_path / "a.csv").write_text(mark + said + sink.getvalue(), newline="")
            assert texts_of(tmp_path / "a.csv")[0] == [text for text, _ in rows]
    lines = [f"text{delimiter} domain"]
    for text, label in rows:
        lines.append(f'"{text}, it ""said"""{delimiter} "{label}"')
    (tmp_path / "a.csv").write_text("\n".join(lines))
    assert texts_of(tmp_path / "a.csv")[0] == [f'{text}, it "said"' for text, _ in rows]


def test_a_saved_set_is_read_whole_and_alone(tmp_path):
    saved = Dataset.from_list(ROWS)
    saved.save_to_disk(tmp_path / "set", num_shards=3)
    paths = [tmp_path / "set" / "*.arrow", tmp_path / "set" / "*"]
    for path in paths:
        assert texts_of(path) == (TEXTS, texts_of(path)[1])
    # What `datasets` keeps there for itself: the same rows again, changed
    load_from_disk(tmp_path / "set").map(lambda row: {"text": row["text"].upper()})
    assert len(list((tmp_path / "set").glob("*.arrow"))) > 3
    for path in paths:
        assert texts_of(path)[0] == TEXTS
    shards = sorted((tmp_path / "set").glob("data-*.arrow"))
    for shard in shards:
        content = shard.read_bytes()
        shard.unlink()
        for path in paths:
            with pytest.raises(DataError, match=rf"set of 3 files, .*{shard.name} is the first"):
                read(config(path))
        shard.write_bytes(content)


def test_shards_that_are_not_all_there_are_told(tmp_path):
    for number in (0, 1, 3):
        write_jsonl(tmp_path / f"train-{number:05}-of-00004.jsonl", ROWS)
    found, stats = texts_of(tmp_path / "*.jsonl")
    assert found == TEXTS * 3
    assert "only 3 of the 4 files" in " ".join(stats.told())
    write_jsonl(tmp_path / "train-00002-of-00004.jsonl", ROWS)
    assert "only" not in " ".join(texts_of(tmp_path / "*.jsonl")[1].told())


def test_files_are_found_as_people_see_them(tmp_path):
    name = "Übung é [a] b"
    for form in ("NFC", "NFD"):
        folder = tmp_path / form / unicodedata.normalize(form, name)
        folder.mkdir(parents=True)
        write_jsonl(folder / unicodedata.normalize(form, "é (1).jsonl"), ROWS)
        # Beside people's files, by systems and editors
        (folder / "._é (1).jsonl").write_bytes(b"\0\5\x16\7")
        write_jsonl(folder / ".old.jsonl", ROWS)
        (folder / ".ipynb_checkpoints").mkdir()
        write_jsonl(folder / ".ipynb_checkpoints" / "é.jsonl", ROWS)
        for asked in ("NFC", "NFD"):
            here = tmp_path / form / unicodedata.normalize(asked, name)
            assert texts_of(here / "**/*.jsonl")[0] == TEXTS
            assert texts_of(here / unicodedata.normalize(asked, "é (1).jsonl"))[0] == TEXTS
        assert texts_of(folder / ".o*.jsonl")[0] == TEXTS
        assert texts_of(folder / ".ipynb_checkpoints" / "*.jsonl")[0] == TEXTS
    (tmp_path / "link.jsonl").symlink_to("gone.jsonl")
    with pytest.raises(DataError, match=r"link\.jsonl is gone, or a link"):
        read(config(tmp_path / "l*.jsonl"))
    with pytest.raises(DataError, match="matches only folders"):
        read(config(tmp_path / "N*"))


def test_no_file_is_read_for_two_entries(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    for domains in (("a", "b"), ("a", "a"), (None, None)):
        entries = [{"paths": [str(tmp_path / "*")], "domain": domains[0]}]
        entries += [{"paths": [str(tmp_path / "a*l")], "domain": domains[1]}]
        with pytest.raises(DataError, match=r"a\.jsonl is matched by two entries"):
            read(config(files=entries, source="files"))


def test_labels_that_look_alike_are_one_or_told(tmp_path):
    for seen in ("café", "Family law", "C++"):
        rows = []
        for number, form in enumerate(("NFC", "NFD", "NFC", "NFD")):
            label = unicodedata.normalize(form, seen)
            rows.append({"text": TEXTS[number], "domain": f" {label}\t" if number > 1 else label})
        for asked in ("NFC", "NFD"):
            domains = [unicodedata.normalize(asked, seen)]
            assert len(texts_of(write_jsonl(tmp_path / "a.jsonl", rows), domains=domains)[0]) == 4
        rows.append({"text": TEXTS[4], "domain": seen.swapcase()})
        found, stats = texts_of(write_jsonl(tmp_path / "a.jsonl", rows), domains=[seen])
        assert len(found) == 4 and stats.counts == {"other label": 1}
        assert f"the label {seen.swapcase()} is left out" in " ".join(stats.told())


def test_what_stands_for_a_text_is_named_with_the_way_to_read_it(tmp_path):
    path = tmp_path / "a.json"
    table = tmp_path / "a.parquet"
    shapes = {
        "name the one that is meant, text.en or so": {"text": {"en": "x", "de": "y"}},
        "text is a list of 2, and a row needs one text": {"text": ["x", "y"]},
        "rows is a list of rows, which has to be a file of its own": {"rows": ROWS},
    }
    for told, row in shapes.items():
        path.write_text(json.dumps(row))
        parquet.write_table(pyarrow.Table.from_pylist([row | {"domain": "a"}]), table)
        with pytest.raises(DataError, match=told):
            read(config(path))
        if "text" in row:
            with pytest.raises(DataError, match=told):
                read(config(table))
    twice = pyarrow.Table.from_arrays([pyarrow.array(["x"])] * 2, names=["text", "text"])
    parquet.write_table(twice, table)
    with pytest.raises(DataError, match=r"a\.parquet has the column text twice"):
        read(config(table))
