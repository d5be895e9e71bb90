"""Shapes that public corpora have: names of files, labels, nested columns, one file a domain."""

import gzip
import json
import random
import re

import pyarrow
import pyarrow.csv
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from pyarrow import parquet
from small_text import prepared
from test_documents import config, read
from test_whole_files import TABLES

from pipeline.config.labels import domain_name, label_text
from pipeline.config.text_data import PartitionConfig
from pipeline.data.sources import files
from pipeline.errors import DataError

TEXTS = [f"text number {i} is long enough" for i in range(8)]
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


def labels(cfg):
    """Return (text, label) of every document of a configuration."""
    return [(document.text, document.label) for document in read(cfg)[0]]


def write_lines(path, found):
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.ndjson", "a.json", "a.JSON", "part-1.c000.json.gz", "a.NDJSON.GZ"]
)
def test_lines_of_json_under_every_usual_name(tmp_path, name):
    raw = "".join(json.dumps({"text": text, "domain": "a"}) + "\n" for text in TEXTS).encode()
    path = tmp_path / name
    path.write_bytes(gzip.compress(raw) if name.lower().endswith(".gz") else raw)
    assert labels(config(path)) == [(text, "a") for text in TEXTS]


def test_a_name_that_tells_nothing_has_a_format_beside_it(tmp_path):
    path = write_lines(tmp_path / "part-00000", [{"text": text, "domain": "a"} for text in TEXTS])
    with pytest.raises(DataError, match="part-00000 is none of .*; say what it is with format"):
        read(config(path))
    entry = {"paths": [str(path)], "format": "jsonl"}
    assert labels(config(files=[entry], source="files")) == [(text, "a") for text in TEXTS]


NUMBERS = {
    "int": ([0, 1] * 4, ("0", "1")),
    "float": ([0.0, 1.0] * 4, ("0", "1")),
    "bool": ([False, True] * 4, ("false", "true")),
    "bytes": ([b"a", b"b"] * 4, ("a", "b")),
    "text": (["a", "b"] * 4, ("a", "b")),
}


@pytest.mark.parametrize("kind", NUMBERS)
@pytest.mark.parametrize("suffix", [*TABLES, "jsonl", "csv"])
def test_labels_of_every_type_are_domains(tmp_path, kind, suffix):
    values, domains = NUMBERS[kind]
    path = tmp_path / f"rows.{suffix}"
    rows = [{"text": t, "domain": v} for t, v in zip(TEXTS, values, strict=True)]
    if suffix in TABLES:
        path.write_bytes(TABLES[suffix](pyarrow.Table.from_pylist(rows)))
    elif kind == "bytes":
        return
    elif suffix == "jsonl":
        write_lines(path, rows)
    else:
        path.write_text("".join(["text,domain\n", *[f"{r['text']},{r['domain']}\n" for r in rows]]))
        if kind in ("float", "bool"):
            domains = tuple(map(str, NUMBERS[kind][0][:2]))
    # As YAML has them: numbers are numbers
    given = [values[0], values[1]] if kind == "int" else list(domains)
    found = labels(config(path, domains=given))
    assert found == [(text, domains[i % 2]) for i, text in enumerate(TEXTS)]


def test_a_label_that_is_none_costs_its_row(tmp_path):
    odd = [None, "", float("nan"), 0.5, [0], {"a": 1}, -0.0]
    rows = [{"text": t, "domain": v} for t, v in zip(TEXTS, [*odd, 0], strict=True)]
    found, stats = read(
        config(write_lines(tmp_path / "rows.jsonl", rows), domains=["0"], max_bad_share=1)
    )
    assert [document.text for document in found] == TEXTS[6:]
    assert stats.counts == {"no label": 6}


CLASSES = Features({"text": Value("string"), "domain": ClassLabel(names=["a", "b"])})
NESTED = Features({"text": Value("string"), "meta": {"domain": ClassLabel(names=["a", "b"])}})


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("how", ["parquet", "hub", "arrow"])
def test_numbers_that_stand_for_names_become_them(tmp_path, nested, how):
    numbers = [0, 1, 0, 1, 0, 1, -1, 0]
    column = [{"domain": number} for number in numbers] if nested else numbers
    found = Dataset.from_dict(
        {"text": TEXTS, "meta" if nested else "domain": column},
        features=NESTED if nested else CLASSES,
    )
    if how == "arrow":
        found.save_to_disk(tmp_path / "saved")
        [path] = (tmp_path / "saved").glob("*.arrow")
    else:
        path = tmp_path / "train.parquet"
        found.to_parquet(path)
    where = {"hub": [{"dataset": str(tmp_path), "revision": "main"}]} if how == "hub" else {}
    field = {"label_field": "meta.domain" if nested else "domain"}
    paths = [] if how == "hub" else [path]
    documents, stats = read(config(*paths, **where, **field, max_bad_share=1))
    wanted = [(t, "ab"[n]) for t, n in zip(TEXTS, numbers, strict=True) if n >= 0]
    assert [(document.text, document.label) for document in documents] == wanted
    assert stats.counts == {"no label": 1}


@pytest.mark.parametrize("suffix", [*TABLES, "jsonl", "json", "csv"])
def test_columns_inside_columns_have_dotted_names(tmp_path, suffix):
    inner = [
        {"doc": {"body": t, "x": 1}, "meta": {"source": {"name": "ab"[i % 2]}}}
        for i, t in enumerate(TEXTS)
    ]
    path = tmp_path / f"rows.{suffix}"
    if suffix in TABLES:
        path.write_bytes(TABLES[suffix](pyarrow.Table.from_pylist(inner)))
    elif suffix == "csv":
        # Columns of a table can only be text: JSON in it is looked into
        rows = [{key: json.dumps(value) for key, value in row.items()} for row in inner]
        pyarrow.csv.write_csv(pyarrow.Table.from_pylist(rows), path)
    elif suffix == "json":
        path.write_text(json.dumps(inner))
    else:
        write_lines(path, inner)
    fields = {"text_field": "doc.body", "label_field": "meta.source.name"}
    assert labels(config(path, **fields)) == [(t, "ab"[i % 2]) for i, t in enumerate(TEXTS)]


def test_a_column_that_has_the_dot_in_its_name_comes_first(tmp_path):
    rows = [{"text": t, "meta.source": "a", "meta": {"source": "b"}} for t in TEXTS]
    lines = write_lines(tmp_path / "rows.jsonl", rows)
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    for path in (lines, tmp_path / "rows.parquet"):
        assert labels(config(path, label_field="meta.source")) == [(t, "a") for t in TEXTS]


def test_dots_lead_into_lists_by_number(tmp_path):
    rows = [{"turns": [{"said": t}], "tags": json.dumps(["a", "x"])} for t in TEXTS]
    lines = write_lines(tmp_path / "rows.jsonl", rows)
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    for path in (lines, tmp_path / "rows.parquet"):
        found = labels(config(path, text_field="turns.0.said", label_field="tags.0"))
        assert found == [(t, "a") for t in TEXTS]


@pytest.mark.parametrize("suffix", [*TABLES, "jsonl", "csv"])
def test_a_column_that_is_not_there_is_told_with_those_that_are(tmp_path, suffix):
    rows = [{"content": t, "topic": "a"} for t in TEXTS]
    path = tmp_path / f"rows.{suffix}"
    if suffix in TABLES:
        path.write_bytes(TABLES[suffix](pyarrow.Table.from_pylist(rows)))
    elif suffix == "csv":
        path.write_text("".join(["content,topic\n", *[f"{r['content']},a\n" for r in rows]]))
    else:
        write_lines(path, rows)
    with pytest.raises(DataError, match=r"8 no text .*rows\..*content, topic"):
        read(config(path))
    with pytest.raises(DataError, match=r"8 no label .*content, topic"):
        read(config(path, text_field="content"))
    assert len(read(config(path, text_field="content", label_field="topic"))[0]) == 8


@pytest.mark.parametrize("column", ["text", "wide"])
def test_no_message_is_longer_than_a_screen(tmp_path, column):
    rows = [
        {"text": f"{t} of many words\n" * 90} | {f"column {i}" * 9: i for i in range(99)}
        for t in TEXTS
    ]
    if column == "wide":
        rows = [row | {"wide": {"a": row["text"]}} for row in rows]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    for number, fields in enumerate(
        (
            {"label_field": column},
            {"split_field": column, "label_field": "column 1" * 9},
            {"text_field": "b"},
        )
    ):
        with pytest.raises(DataError) as error:
            prepared(config(path, domains=["1", "b"], **fields), tmp_path / str(number))
        assert len(str(error.value)) < 2500 and str(error.value).count("\n") < 3, str(error.value)


PARAGRAPHS = [" ".join([f"paragraph {i}:", *["word"] * (i * 7 % 90 + 3)]) + "." for i in range(400)]


@pytest.mark.parametrize("between", ["\n\n", "\r\n\r\n", "\n\n\n", "\n"])
@pytest.mark.parametrize("stream_bytes", [1 << 23, 3000])
def test_one_file_for_a_domain_is_split_at_paragraph_ends(
    tmp_path, monkeypatch, between, stream_bytes
):
    monkeypatch.setattr(files, "STREAM_BYTES", stream_bytes)
    monkeypatch.setattr(files, "_BLOCK_BYTES", 1777)
    whole = between.join(PARAGRAPHS)
    path = tmp_path / "law.txt"
    path.write_bytes(whole.encode())
    found, stats = read(config(path, domain="a", paragraph_bytes=1500))
    assert "".join(document.text for document in found) == whole
    assert len({document.key for document in found}) == len(found) > 60
    assert all(document.bytes <= 1500 for document in found)
    ends = [document.text[-len(between) :] for document in found[:-1]]
    assert set(ends) == {between}
    [told] = stats.told()
    assert "law.txt: split at paragraph ends" in told and str(tmp_path) not in told
    one, stats = read(config(path, domain="a", what="file", max_document_bytes=1 << 20))
    assert [document.text for document in one] == [whole] and not stats.told()


def test_many_text_files_are_a_document_each(tmp_path):
    for number in range(files.FEW_FILES):
        (tmp_path / f"{number:02}.txt").write_text("\n\n".join(PARAGRAPHS[number : number + 60]))
    many = config(tmp_path / "*.txt", domain="a")
    assert len(read(many)[0]) == files.FEW_FILES
    few = config(tmp_path / "0*.txt", domain="a")
    assert len(read(few)[0]) > 10
    # Not told by what is no text
    mixed = config(tmp_path / "0*.txt", write_lines(tmp_path / "a.jsonl", [{"text": TEXTS[0]}]))
    assert mixed.data.files[0].documents == "auto"


def test_a_bad_byte_in_a_large_text_costs_one_document(tmp_path):
    raw = "\n\n".join(PARAGRAPHS).encode()
    (tmp_path / "law.txt").write_bytes(raw[:9000] + b"\xff" + raw[9000:])
    found, stats = read(config(tmp_path / "law.txt", domain="a", paragraph_bytes=1000))
    assert stats.counts == {"not UTF-8": 1}
    assert len(found) > 60 and "law.txt part" in stats.examples["not UTF-8"][0]


ODD = (
    "C++",
    "C#",
    "C",
    "Family law",
    "法律",
    "français",
    "R&B",
    "ab/cd",
    "a b  c",
    "..",
    "-x",
    "é",
)


def test_labels_that_are_no_names_get_one(tmp_path):
    rows = [{"text": f"{t} {d}", "domain": d} for t in TEXTS for d in ODD]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    cfg = config(path, domains=ODD)
    assert all(NAME.fullmatch(name) for name in cfg.partition.domains)
    assert len(set(cfg.partition.domains)) == len(ODD)
    named = {domain_name(label): label for label in ODD if domain_name(label) != label}
    assert cfg.partition.shown_labels == named and len(named) == len(ODD) - 1
    found, stats = read(cfg)
    assert len(found) == len(rows) and not stats.total
    assert [document.label for document in found] == [domain_name(row["domain"]) for row in rows]
    # What a run keeps of its configuration is that configuration
    kept = PartitionConfig.model_validate(cfg.partition.model_dump(mode="json"))
    assert kept == cfg.partition


def test_a_name_depends_on_its_label_alone():
    draw = random.Random(0)
    letters = "abcXYZ019 _-./+#&éßあ法🙂\n\t\"'"
    named = {}
    for _ in range(20_000):
        label = "".join(draw.choices(letters, k=draw.randint(1, 70)))
        name = domain_name(label)
        assert NAME.fullmatch(name) and domain_name(name) == name
        if NAME.fullmatch(label):
            assert name == label
        named.setdefault(name, set()).add(label)
    # Few share one, and those are refused where they meet: `a b` and `a-b`
    assert len(named) > 19_000
    assert len({domain_name(f"{'long ' * 20}{i}") for i in range(500)}) == 500


def test_several_labels_may_be_one_domain(tmp_path):
    given = ["Family law", "Criminal law", "law", "code", "food"]
    rows = [{"text": f"{t} {d}", "domain": d} for t in TEXTS for d in given]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    partition = {
        "domains": ["law", "code"],
        "labels": {"law": ["Family law", "Criminal law"], "code": ["code", "food"]},
    }
    found, stats = read(config(path, partition=partition))
    counts = {name: sum(d.label == name for d in found) for name in ("law", "code")}
    assert counts == {"law": 16, "code": 16} and stats.counts == {"other label": 8}
    for wrong, match in (
        ({"labels": {"music": ["x"]}}, "music, not one of domains"),
        ({"labels": {"law": ["x"], "code": ["x"]}}, "x belongs to two domains"),
        ({"domains": ["Family law", "Family-law"], "labels": {}}, "has Family-law twice"),
    ):
        with pytest.raises(ValueError, match=match):
            config(path, partition=partition | wrong)


def test_a_label_that_only_looks_like_a_domain_is_another(tmp_path):
    rows = [{"text": f"{t} {d}", "domain": d} for t in TEXTS for d in ("a b", "a-b")]
    found, stats = read(config(write_lines(tmp_path / "rows.jsonl", rows), domains=["a b"]))
    assert {document.label for document in found} == {"a-b"}
    assert len(found) == 8 and stats.counts == {"other label": 8}


def test_label_text_is_none_for_what_is_no_label():
    assert [label_text(value) for value in (None, "", b"", b"\xff", 1.5, [], {})] == [None] * 7
