"""A file is read whole or refused: torn, cut and damaged files of every packing and format.

The variants are made by the writers that people have (gzip, bz2, lzma, zstandard, csv, pyarrow),
and cut or changed at every place.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import random
import struct
from pathlib import Path

import pyarrow
import pytest
import zstandard
from pyarrow import ipc, parquet
from test_documents import ROWS, config, read

from pipeline.config.text_data import TextRunConfig
from pipeline.data.sources import json_rows, packed
from pipeline.data.sources.files import look
from pipeline.errors import DataError

TEXTS = [row["text"] for row in ROWS]
LINES = [json.dumps(row).encode() + b"\n" for row in ROWS]


def _zstd(content: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(content)


def _zstd_as_parallel_packers_do(content: bytes) -> bytes:
    packed_bytes = _zstd(content)
    return struct.pack("<III", 0x184D2A50, 4, len(packed_bytes)) + packed_bytes


PACKERS = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": _zstd,
    "ZST": _zstd_as_parallel_packers_do,
}


def texts(path, **settings):
    """Return the texts of a file, each once, and what was dropped."""
    found, stats = read(
        config(path, **{"max_bad_share": 1, "max_document_bytes": 1 << 20} | settings)
    )
    return [document.text for document in found], stats


def outcome(path, content: bytes, **settings) -> list[str] | None:
    """Return the texts of a file with this content, None where it is refused by its name."""
    path.write_bytes(content)
    try:
        return texts(path, **settings)[0]
    except DataError as error:
        refused = str(error)
    assert path.name in refused
    return None


@pytest.mark.parametrize("suffix", PACKERS)
def test_a_packed_file_is_refused_wherever_it_is_cut(tmp_path, suffix):
    pack, path = PACKERS[suffix], tmp_path / f"rows.jsonl.{suffix}"
    # Three streams one after the other, as cat and parallel packers write them
    streams = [pack(b"".join(LINES[at : at + 2])) for at in (0, 2, 4)]
    whole = b"".join(streams)
    assert outcome(path, whole) == TEXTS
    # A file that ends where a stream does is a whole one
    ends = {len(b"".join(streams[:count])): 2 * count for count in range(4)}
    frame = len(_zstd(b"".join(LINES[:2])))
    for size in range(len(whole)):
        found = outcome(path, whole[:size])
        if size in ends and size:
            assert found == TEXTS[: ends[size]]
        elif suffix == "ZST" and size - 12 in ends:
            assert len(found) == ends[size - 12]  # nothing but the header of what would follow
        else:
            assert found is None, f"cut at {size} of {len(whole)}"
    assert frame < len(whole)


@pytest.mark.parametrize("suffix", PACKERS)
def test_what_follows_a_packed_stream_is_never_left_out(tmp_path, suffix):
    pack, path = PACKERS[suffix], tmp_path / f"rows.jsonl.{suffix}"
    whole = pack(b"".join(LINES))
    for rest in (b"x", LINES[0], b"\0\0x", whole[:20], b"\n"):
        assert outcome(path, whole + rest) is None
    second = bytearray(pack(LINES[0]))
    for at in range(len(second)):
        second[at] ^= 0x55
        found = outcome(path, whole + bytes(second))
        # What says when and by whom a stream was packed may be anything
        assert found is None or found == [*TEXTS, TEXTS[0]]
        second[at] ^= 0x55
    assert outcome(path, whole + b"\0" * 700) == TEXTS or suffix in ("zst", "ZST")


def test_packing_is_told_by_the_contents(tmp_path):
    raw = b"".join(LINES)
    for pack in PACKERS.values():
        assert outcome(tmp_path / "rows.jsonl", pack(raw)) == TEXTS
    for suffix in PACKERS:
        assert outcome(tmp_path / f"rows.jsonl.{suffix}", raw) is None
        assert outcome(tmp_path / f"rows.jsonl.{suffix}", b"") is None


def _table(rows=ROWS):
    return pyarrow.Table.from_pylist(list(rows))


def _parquet(table) -> bytes:
    sink = io.BytesIO()
    parquet.write_table(table, sink, row_group_size=2)
    return sink.getvalue()


def _arrow(table, new) -> bytes:
    sink = io.BytesIO()
    with new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return sink.getvalue()


TABLES = {
    "parquet": _parquet,
    "arrow": lambda table: _arrow(table, ipc.new_file),
    "ARROW": lambda table: _arrow(table, ipc.new_stream),
}


@pytest.mark.parametrize("suffix", TABLES)
def test_a_table_is_refused_wherever_it_is_cut(tmp_path, suffix):
    path, whole = tmp_path / f"rows.{suffix}", TABLES[suffix](_table())
    assert outcome(path, whole) == TEXTS
    assert outcome(tmp_path / f"rows.{suffix}.gz", gzip.compress(whole)) == TEXTS
    for size in {*range(0, len(whole), 7), *range(len(whole) - 30, len(whole))}:
        assert outcome(path, whole[:size]) is None, f"cut at {size} of {len(whole)}"


@pytest.mark.parametrize("suffix", TABLES)
def test_one_value_that_is_no_text_costs_one_row(tmp_path, suffix):
    raw = [row["text"].encode() for row in ROWS]
    raw[3] = b"caf\xe9 in latin one, and more of it"
    labels = [row["domain"] for row in ROWS]
    as_bytes = pyarrow.array(raw, pyarrow.binary())
    for text in (as_bytes, as_bytes.view(pyarrow.string())):
        path = tmp_path / f"rows.{suffix}"
        path.write_bytes(TABLES[suffix](pyarrow.table({"text": text, "domain": labels})))
        found, stats = texts(path)
        assert found == TEXTS[:3] + TEXTS[4:]
        assert stats.counts == {"not UTF-8": 1}
        if suffix == "parquet":
            found, stats = read(
                config(hub=[{"dataset": str(tmp_path), "revision": "main"}], max_bad_share=1)
            )
            assert [document.text for document in found] == TEXTS[:3] + TEXTS[4:]
            assert stats.counts == {"not UTF-8": 1}


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.ndjson", "rows.json"])
def test_a_last_line_that_is_cut_is_a_row_that_is_told(tmp_path, name):
    path, start = tmp_path / name, b"".join(LINES[:-1])
    for size in range(1, len(LINES[-1]) - 2):
        path.write_bytes(start + LINES[-1][:size])
        found, stats = texts(path)
        assert found == TEXTS[:-1] and stats.counts == {"not JSON": 1}
        assert "the last line, cut off" in stats.told()[0]
    # All but the end of the line, or of nothing
    assert outcome(path, b"".join(LINES)[:-1]) == TEXTS


ARRAYS = {
    "one line": {},
    "indented": {"indent": 2},
    "not indented": {"indent": 0},
    "as it is": {"ensure_ascii": False, "separators": (",", ":")},
}


@pytest.mark.parametrize("how", ARRAYS)
@pytest.mark.parametrize("block", [1, 7, 1 << 20])
def test_an_array_is_read_an_element_at_a_time(tmp_path, monkeypatch, how, block):
    monkeypatch.setattr(json_rows, "_BLOCK_BYTES", block)
    odd = [
        {
            "text": 'a "quoted" [text], {with} \\ brackets é漢🙂',
            "domain": "a",
            "score": float("nan"),
        }
    ]
    whole = json.dumps(ROWS + odd + [17, [1], None, "text"] + ROWS[:1], **ARRAYS[how]).encode()
    path = tmp_path / "rows.json"
    path.write_bytes(b" \n" + whole + b"\n")
    found, stats = texts(path)
    assert found == [*TEXTS, odd[0]["text"], TEXTS[0]]
    assert stats.counts == {"not JSON": 4}
    for size in range(1, len(whole), 5 if block > 7 else 61):
        assert outcome(path, whole[:size]) is None, f"cut at {size} of {len(whole)}"
    assert outcome(path, whole + b"x") is None
    whole = whole.decode()
    commas = [at for at in range(len(whole)) if whole[at] == "," and whole[at - 1] == "}"]
    for at in commas:
        for between in (" ", ";", ",,", ']["'):
            broken = whole[:at] + between + whole[at + 1 :]
            assert outcome(path, broken.encode()) is None


def test_objects_spread_over_lines_are_rows(tmp_path):
    for indent in (0, 2):
        for between in ("", "\n", "\n\n"):
            whole = between.join(json.dumps(row, indent=indent) for row in ROWS).encode()
            assert outcome(tmp_path / "rows.json", whole) == TEXTS
            assert outcome(tmp_path / "rows.json", whole[:-9]) is None


def _csv(rows, **how) -> str:
    sink = io.StringIO(newline="")
    writer = csv.writer(sink, **how)
    writer.writerow(["text", "domain"])
    writer.writerows(rows)
    return sink.getvalue()


def test_a_quote_too_many_or_too_few_never_takes_other_rows(tmp_path):
    draw = random.Random(0)
    kinds = ("plain", "with, a comma", 'a "quoted" word', "two\nlines", ",odd", "ends in “quotes”")
    for number in range(300):
        rows = [
            [f"document {i}: {draw.choice(kinds)} and more", draw.choice("ab")] for i in range(9)
        ]
        how = {"quoting": draw.choice([csv.QUOTE_ALL, csv.QUOTE_MINIMAL])}
        whole = _csv(rows, **how)
        start = whole.index("\n") + 1
        at = draw.randrange(start, len(whole))
        quotes = [place for place in range(start, len(whole)) if whole[place] == '"']
        if number % 2 or not quotes:
            changed = whole[:at] + '"' + whole[at:]
        else:
            at = draw.choice(quotes)
            changed = whole[:at] + whole[at + 1 :]
        path = tmp_path / "rows.csv"
        path.write_text(changed, newline="")
        try:
            found, stats = texts(path)
        except DataError as error:
            refused = str(error)
        else:
            refused = ""
        if refused:
            assert "rows.csv" in refused and "a quote on line" in refused
            continue
        wanted = {text for text, _ in rows}
        assert len(wanted - set(found)) <= 1, changed
        assert wanted <= set(found) or stats.total or len(found) == len(rows)


def test_a_quote_that_is_not_closed_is_told_with_its_line(tmp_path):
    lines = _csv([[text.strip(), "a"] for text in TEXTS * 9]).splitlines(keepends=True)
    path = tmp_path / "rows.csv"
    for at in range(1, len(lines), 5):
        path.write_text("".join([*lines[:at], '"' + lines[at], *lines[at + 1 :]]), newline="")
        with pytest.raises(DataError, match=rf"rows\.csv .* quote on line {at + 1} is not closed"):
            texts(path)


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_rows_with_more_or_fewer_fields_than_the_header_are_left_out(tmp_path, delimiter):
    rows = [[text.strip(), "a"] for text in TEXTS]
    for fields in ([], ["only this one"], ["far", "too", "many"], ["a", "b", ""]):
        whole = _csv([*rows[:3], fields, *rows[3:]], delimiter=delimiter)
        path = tmp_path / ("rows.tsv" if delimiter == "\t" else "rows.csv")
        path.write_text(whole, newline="")
        found, stats = texts(path)
        assert found == [text for text, _ in rows]
        wanted = {"wrong number of fields": 1} if fields else {}
        assert stats.counts == wanted
    path.write_text(_csv([[*row, "more"] for row in rows], delimiter=delimiter), newline="")
    with pytest.raises(DataError, match="6 of 6 .*3 where the header has 2"):
        texts(path, max_bad_share=0.5)
    path.write_text(f"text{delimiter}text\na{delimiter}b\n")
    with pytest.raises(DataError, match="the column text twice"):
        texts(path)


SUFFIXES = ("txt", "md", "jsonl", "ndjson", "json", "csv", "tsv", "parquet", "arrow")


@pytest.mark.parametrize("suffix", [*SUFFIXES, "jsonl.gz", "txt.zst", "parquet.xz"])
def test_a_pointer_of_git_lfs_is_told_as_one(tmp_path, suffix):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    path = tmp_path / f"rows.{suffix}"
    path.write_bytes(pointer)
    with pytest.raises(
        DataError, match=rf"rows\.{suffix} holds a pointer of git-lfs.*git lfs pull"
    ):
        texts(path, domain="a")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_with_nothing_in_it_is_counted_or_refused(tmp_path, suffix):
    good = tmp_path / "good.jsonl"
    good.write_bytes(b"".join(LINES))
    path = tmp_path / f"rows.{suffix}"
    path.write_bytes(b"")
    if suffix in ("parquet", "arrow"):
        with pytest.raises(DataError, match=path.name):
            read(config(good, path))
        return
    found, stats = read(config(good, path, domain="a"))
    assert len(found) == len(ROWS) and stats.bad == 0
    assert stats.counts == {"empty file": 1}


@pytest.mark.parametrize("name", ["law.txt", "law.md", "law.TXT", "law.txt.gz", "law"])
def test_plain_text_of_which_nothing_says_a_domain_is_refused(tmp_path, name):
    """It was left out whole, as one document without a label."""
    good = tmp_path / "good.jsonl"
    good.write_bytes(b"".join(LINES))
    path = tmp_path / name
    content = b"text of the law\n\n" * 400
    path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    raw = config(good, domain="a").model_dump(mode="json")
    entry = raw["data"]["files"][0] | {"paths": [str(path)], "domain": None}
    if "." not in name:
        entry["format"] = "text"
    raw["data"]["files"].append(entry)
    for act in (read, look):
        with pytest.raises(DataError, match=rf"{name} is plain text.* Give its entry a domain"):
            act(TextRunConfig.model_validate(raw))
    entry["domain"] = "b"
    assert {document.label for document in read(TextRunConfig.model_validate(raw))[0]} == {"a", "b"}
    raw["partition"] = {"by": "clusters", "count": 2}
    entry["domain"] = None
    assert len(read(TextRunConfig.model_validate(raw))[0]) > len(LINES)


ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-le", "utf-16-be")
LATIN = ("latin-1", "cp1252", "mac-roman")


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "json", "csv", "tsv"])
def test_encodings_are_told_by_their_mark_or_a_setting(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(packed, "_BUFFER_BYTES", 61)
    rows = [["naïve café text number one", "a"], ["déjà vu, and a second one", "b"]]
    lines = [json.dumps({"text": t, "domain": d}, ensure_ascii=False) for t, d in rows]
    whole = {
        "txt": rows[0][0],
        "jsonl": "\n".join(lines),
        "json": f"[{','.join(lines)}]",
        "csv": _csv(rows),
        "tsv": _csv(rows, delimiter="\t"),
    }[suffix]
    wanted = [text for text, _ in rows[: 1 if suffix == "txt" else 2]]
    for encoding in (*ENCODINGS, *LATIN):
        path = tmp_path / f"{encoding}.{suffix}"
        path.write_bytes(whole.encode(encoding))
        entry = {"paths": [str(path)], "domain": "a"}
        if encoding in LATIN:
            entry["encoding"] = encoding
        found, stats = read(config(files=[entry], source="files"))
        assert [document.text for document in found] == wanted, encoding
        assert stats.bad == 0
        told = " ".join(stats.told())
        assert ("for so the file begins" in told) == encoding.startswith(("utf-16", "utf-32"))
        if encoding.startswith("utf-16"):
            path.write_bytes(whole.encode(encoding)[:-1])
            with pytest.raises(DataError, match=rf"{path.name} cannot be read as utf-16"):
                read(config(files=[entry], source="files"))


def test_text_of_another_encoding_names_the_setting(tmp_path):
    (tmp_path / "a.txt").write_bytes("ein schöner Text, und mehr davon".encode("cp1252"))
    with pytest.raises(DataError, match=r"1 of 1 .*not UTF-8 .*a\.txt.*set encoding beside paths"):
        read(config(tmp_path / "a.txt", domain="a"))


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_header_of_another_encoding_costs_no_row_of_plain_letters(tmp_path, delimiter):
    path = tmp_path / ("a.tsv" if delimiter == "\t" else "a.csv")
    rows = [[f"a plain text of number {number}", "a"] for number in range(3)]
    whole = _csv(rows, delimiter=delimiter).replace("domain", "catégorie")
    path.write_bytes(whole.encode("cp1252"))
    found, stats = read(config(path, domain="a"))
    assert [[document.text, "a"] for document in found] == rows
    assert stats.bad == 0


def test_a_split_of_the_hub_with_fewer_rows_than_it_says_is_refused(tmp_path):
    about = "dataset_info:\n  features:\n  - name: text\n    dtype: string\n  - name: domain\n"
    about += "    dtype: string\n  splits:\n  - name: train\n    num_bytes: 1\n    num_examples: "
    (tmp_path / "data").mkdir()
    for start in (0, 2):
        (tmp_path / f"data/train-{start}.parquet").write_bytes(
            _parquet(_table(ROWS[start : start + 2]))
        )
    entry = {"dataset": str(tmp_path), "revision": "main"}
    for said in (4, 3, 6):
        (tmp_path / "README.md").write_text(f"---\n{about}{said}\n---\n")
        if said <= 4:
            assert len(read(config(hub=[entry]))[0]) == 4
            continue
        with pytest.raises(DataError, match=r"\[train\] gave 4 rows, and its metadata says 6"):
            read(config(hub=[entry]))
        assert len(read(config(hub=[entry | {"allow_fewer_rows": True}]))[0]) == 4


@pytest.mark.parametrize("link", [None, Path.symlink_to, Path.hardlink_to])
def test_files_of_two_entries_are_told_before_anything_starts_also_beside_an_address(
    tmp_path, link
):
    path = tmp_path / "a.txt"
    path.write_text("a text that two entries name, long enough to be one\n")
    other, told = path, r"a\.txt is matched by two entries"
    if link is not None:
        other, told = tmp_path / "b.txt", r"a\.txt, which \S*/b\.txt is a link to, is matched by"
        link(other, path)
    both = [
        {"paths": [str(path)], "domain": "a"},
        {"paths": [str(other), "https://host.invalid/b.txt"], "domain": "b"},
    ]
    with pytest.raises(DataError, match=told):
        look(config(files=both, source="files"))


def test_a_saved_set_that_cannot_be_read_is_told(tmp_path, monkeypatch):
    def refuse(_self, path):
        raise PermissionError(13, "Permission denied", path)

    (tmp_path / "state.json").write_text("{}")
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROWS))
    monkeypatch.setattr("fsspec.implementations.local.LocalFileSystem.cat_file", refuse)
    with pytest.raises(DataError, match=r"state\.json cannot be read: .*Permission denied"):
        read(config(path))
