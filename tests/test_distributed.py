"""Preprocess by jobs: the bytes of one run whatever their number, and what is done about folders
that are not whole.

BATCH_BYTES is small here, so that small text has many batches; one run has the same ones.
"""

import csv
import errno
import gzip
import itertools
import json
import os
import shutil

import pytest
from fakes import FaultyReads, flip, traces
from test_prepare import WORDS, bytes_of, config, rows, run

from pipeline.config.text_data import TextRunConfig
from pipeline.data import drop_stats
from pipeline.data.sources import files, installed
from pipeline.data.text import distributed, documents
from pipeline.data.text import encode as encoding
from pipeline.data.text.distributed import encode, scan
from pipeline.data.text.prepare import prepare
from pipeline.errors import DataError, MissingArtifact, StoreError, UnreadableFile
from pipeline.protocols import quiet


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch):
    monkeypatch.setattr(encoding, "BATCH_BYTES", 3000)


def by_jobs(cfg, folder, jobs, progress=quiet):
    """Prepare cfg in folder/out by jobs, the last of them first; return the metrics."""
    home = folder / "jobs"
    for number in reversed(range(scan(cfg, home, jobs, quiet))):
        encode(cfg, home, number, quiet)
    (folder / "out").mkdir()
    return prepare(cfg, folder / "out", progress, home)


def assert_equal(cfg, folder, counts=(1, 2, 5)):
    """Compare one run with runs by so many jobs, by their bytes and by what they counted."""
    wanted = run(cfg, folder / "whole")
    for jobs in counts:
        found = by_jobs(cfg, folder / str(jobs), jobs)
        assert bytes_of(folder / str(jobs) / "out") == bytes_of(folder / "whole")
        for timed in ("seconds", "megabytes_per_s"):
            found.pop(timed)
        assert found == {name: value for name, value in wanted.items() if name in found}
        assert len([p for p in (folder / str(jobs) / "jobs").iterdir() if p.name != "scan"]) == jobs


def write(path, found):
    """Write rows in the format of the path's name."""
    lines = "".join(json.dumps(row) + "\n" for row in found)
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, list(found[0]))
            table.writeheader()
            table.writerows(found)
    elif path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(found), path, row_group_size=20)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        path.write_text(lines)
    return path


KINDS = [
    {},
    {"by": "clusters", "count": 3},
    {"by": "random", "count": 3},
    *(
        {"by": "curriculum", "count": 3, "difficulty": how}
        for how in ("length", "rarity", "compression")
    ),
]


@pytest.mark.parametrize(
    "kind", KINDS, ids=lambda kind: "-".join(map(str, kind.values())) or "labels"
)
def test_every_kind_of_partition_has_the_bytes_of_one_run(tmp_path, kind):
    assert_equal(config(tmp_path / "rows.jsonl", rows(240), partition=kind), tmp_path)


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.csv", "rows.parquet"])
def test_every_format_has_the_bytes_of_one_run(tmp_path, name):
    assert_equal(config(write(tmp_path / name, rows(150))), tmp_path, (2, 5))


def test_many_text_files_of_fixed_labels_have_too(tmp_path):
    for i, row in enumerate(rows(90)):
        (tmp_path / f"{row['domain']}{i}.{('txt', 'md')[i % 2]}").write_text(row["text"])
    entries = [
        {"paths": [str(tmp_path / f"{d}*.{s}") for s in ("md", "txt")], "domain": d} for d in WORDS
    ]
    assert_equal(config(tmp_path, data={"files": entries}), tmp_path, (2, 5))


KINDS_INSTALLED = {
    "labels": {"partition": {"domains": ["manual", "licences"]}},
    "clusters": {"partition": {"by": "clusters", "count": 3}},
}


@pytest.mark.parametrize("kind", KINDS_INSTALLED.values(), ids=KINDS_INSTALLED)
def test_installed_text_has_too(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(encoding, "BATCH_BYTES", 40_000)
    monkeypatch.setattr(
        installed, "DOMAINS", ("manual", "licences")
    )  # the others walk thousands of files
    raw = {
        "data": {"megabytes_per_domain": 0.2},
        "tokenizer": {"vocab_size": 300, "sample_megabytes": 0.1},
    }
    assert_equal(TextRunConfig.model_validate(raw | kind), tmp_path, (5,))


def test_the_hub_has_too(tmp_path, monkeypatch):
    import datasets

    found = datasets.Dataset.from_list(rows(150)).to_iterable_dataset()
    monkeypatch.setattr(datasets, "load_dataset", lambda *_args, **_how: found)
    entry = {"dataset": "some/set", "revision": "abc"}
    assert_equal(
        config(tmp_path, data={"source": "hub", "hub": [entry, entry], "files": []}),
        tmp_path,
        (2, 5),
    )


@pytest.mark.parametrize("given", [False, True])
def test_limits_per_domain_stop_the_jobs_where_they_stop_one_run(tmp_path, given):
    found = [
        r | {"split": ("train", "train", "train", "valid", "test")[i // 3 % 5]}
        for i, r in enumerate(rows(300))
    ]
    found += [found[9] | {"split": "train"}, found[12] | {"split": "train", "domain": "shop"}]
    data = {
        "megabytes_per_domain": 0.012,
        "max_document_bytes": 1024,
        "split_field": "split" if given else None,
    }
    found.sort(
        key=lambda row: row["domain"]
    )  # so that the first label is full long before the last
    (tmp_path / "two.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found[::-1]))
    files = [{"paths": [str(tmp_path / "*.jsonl")]}]
    cfg = config(tmp_path / "rows.jsonl", found, data=data | {"files": files})
    assert_equal(cfg, tmp_path, (2, 5))
    assert json.loads((tmp_path / "whole/dropped.json").read_text())["dropped"]["over the limit"]


def test_leaks_are_counted_and_named_as_in_one_run(tmp_path):
    found = [
        r | {"split": ("train", "train", "train", "valid", "test")[i // 3 % 5]}
        for i, r in enumerate(rows(150))
    ]
    found += [row | {"split": "train"} for row in found[9:15] + found[24:30]]
    assert_equal(config(tmp_path / "rows.jsonl", found, data={"split_field": "split"}), tmp_path)
    about = json.loads((tmp_path / "5/out/dropped.json").read_text())
    assert about["dropped"] == {"equals a held-out document": 12}
    assert len(about["examples"]["equals a held-out document"]) == drop_stats.EXAMPLES


@pytest.mark.parametrize("long", [False, True], ids=["in memory", "in blocks"])
@pytest.mark.parametrize("what", ["file", "paragraphs"])
def test_a_job_may_begin_within_a_document(tmp_path, monkeypatch, long, what):
    if long:
        monkeypatch.setattr(files, "STREAM_BYTES", 2000)
    for i, domain in enumerate(WORDS):
        for number in range(4):
            text = " ".join(f"{domain}{number}w{(j * (i + 3)) % 71}" for j in range(1200))
            (tmp_path / f"{domain}{number}.txt").write_text(text)
    entries = []
    for domain in WORDS:
        paths = [str(tmp_path / f"{domain}*.txt")]
        entries.append({"paths": paths, "domain": domain, "documents": what})
    data = {"files": entries, "max_document_bytes": 1024, "megabytes_per_domain": 0.03}
    cfg = config(tmp_path, data=data)
    assert_equal(cfg, tmp_path, (2, 5))
    ranges = distributed.planned(tmp_path / "5/jobs").ranges
    # A document that a file is split into is a row, and one that is the file has pieces
    assert any(each.start.piece if what == "file" else each.start.row for each in ranges)


def test_a_pretrained_tokenizer_is_the_same_in_every_job(tmp_path):
    run(config(tmp_path / "rows.jsonl", rows()), tmp_path / "first")
    found = rows()
    found[7]["text"] += " <|endoftext|> é漢🙂"
    cfg = config(tmp_path / "rows.jsonl", found, tokenizer={"pretrained": str(tmp_path / "first")})
    assert_equal(cfg, tmp_path, (2,))


def test_a_range_full_of_unreadable_rows_is_not_judged_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "EARLY", 10)
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps(row) for row in rows(120)]
    for at in (119, 90, 60, 30):
        lines[at:at] = ["{torn"] * 12
    path.write_text("\n".join(lines) + "\n")
    assert_equal(config(path, data={"max_bad_share": 0.4}), tmp_path, (2, 5))


def test_more_jobs_than_batches_are_as_many_as_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "BATCH_BYTES", 1 << 20)
    assert scan(config(tmp_path / "rows.jsonl", rows()), tmp_path / "jobs", 7, quiet) == 1


def test_what_lies_before_a_range_is_not_opened(tmp_path, monkeypatch):
    for i, row in enumerate(rows(90)):
        (tmp_path / f"{row['domain']}{i:02}.txt").write_text(row["text"])
    entries = [{"paths": [str(tmp_path / f"{domain}*.txt")], "domain": domain} for domain in WORDS]
    cfg, opened, real = config(tmp_path, data={"files": entries}), [], files.open_text
    count = scan(cfg, tmp_path / "jobs", 4, quiet)
    monkeypatch.setattr(files, "open_text", lambda *which: opened.append(which) or real(*which))
    for number in range(count):
        encode(cfg, tmp_path / "jobs", number, quiet)
    assert (
        count == 4 and 90 <= len(opened) <= 90 + count
    )  # a job reads on to where its last document ends


@pytest.fixture
def whole(tmp_path):
    """(configuration, folder of one run, folder of its three jobs)."""
    cfg = config(tmp_path / "rows.jsonl", rows())
    run(cfg, tmp_path / "whole")
    for number in range(scan(cfg, tmp_path / "jobs", 3, quiet)):
        encode(cfg, tmp_path / "jobs", number, quiet)
    return cfg, tmp_path / "whole", tmp_path / "jobs"


def torn(path):
    """Cut a file's end off."""
    path.write_bytes(path.read_bytes()[:-1])


HARMS = {
    "missing": lambda job: shutil.rmtree(job),
    "no manifest": lambda job: (job / "manifest.json").unlink(),
    "half a manifest": lambda job: torn(job / "manifest.json"),
    "a manifest of nothing": lambda job: (job / "manifest.json").write_text("[]"),
    "a torn stream": lambda job: torn(job / "train/sea.bin"),
    "a flipped bit": lambda job: flip(job / "train/sea.bin"),
    "a lost index": lambda job: (job / "valid/hall.idx").unlink(),
}


@pytest.mark.parametrize("again", [False, True], ids=["by the merge", "by its own job"])
@pytest.mark.parametrize("harm", HARMS.values(), ids=HARMS.keys())
def test_a_job_that_is_not_whole_is_done_again(whole, tmp_path, harm, again):
    cfg, wanted, home = whole
    kept = [(home / name / "manifest.json").stat().st_mtime_ns for name in ("0", "2")]
    harm(home / "1")
    told = []
    if again:
        encode(cfg, home, 1, quiet)
    (tmp_path / "out").mkdir()
    prepare(cfg, tmp_path / "out", lambda text, _share: told.append(text), home)
    assert bytes_of(tmp_path / "out") == bytes_of(wanted)
    assert ("job 2 of 3 is missing or torn: doing it" in told) != again
    assert [(home / name / "manifest.json").stat().st_mtime_ns for name in ("0", "2")] == kept


@pytest.mark.parametrize("error", [errno.EACCES, errno.EIO, errno.ESTALE, errno.EMFILE])
def test_a_job_that_cannot_be_read_is_not_done_again(whole, monkeypatch, error):
    cfg, _, home = whole
    before = {name: traces(home / name) for name in ("scan", "1")}
    for name, call in (("scan", lambda: scan(cfg, home, 3, quiet)), ("1", None)):
        call = call or (lambda: encode(cfg, home, 1, quiet))
        failed = 0
        with monkeypatch.context() as patch:
            reads = FaultyReads(patch, home / name)
            for at in range(1000):
                reads.fail(at, error)
                try:
                    call()
                except UnreadableFile as said:
                    assert os.strerror(error) in str(said)  # noqa: PT017
                    failed += 1
                if reads.seen <= at:
                    break
        # all but the listing of folders for what does not belong there
        assert failed > 10
        assert traces(home / name) == before[name]


def test_what_is_whole_is_not_done_again(whole):
    cfg, _, home = whole
    before = {path: path.stat().st_mtime_ns for path in home.rglob("*")}
    assert scan(cfg, home, 3, quiet) == 3
    encode(cfg, home, 1, quiet)
    assert {path: path.stat().st_mtime_ns for path in home.rglob("*")} == before


def test_jobs_of_another_scan_do_not_count(whole, tmp_path):
    cfg, wanted, home = whole
    shutil.copytree(home / "1", tmp_path / "stale")
    assert scan(cfg, home, 2, quiet) == 2
    assert not (home / "1").exists()
    shutil.copytree(tmp_path / "stale", home / "1")
    (tmp_path / "out").mkdir()
    prepare(cfg, tmp_path / "out", quiet, home)
    assert bytes_of(tmp_path / "out") == bytes_of(wanted)


def put(home, source, target):
    """Let one folder be a copy of another."""
    shutil.rmtree(target)
    shutil.copytree(source, target)


def misplacements(home, other):
    """Yield (what, how) of every way in which whole folders of jobs may lie in wrong places."""
    names = ("scan", "0", "1", "2")
    for one, two in itertools.permutations(names, 2):
        yield f"{one} over {two}", lambda one=one, two=two: put(home, home / one, home / two)
    for one, two in itertools.combinations(names, 2):

        def swap(one=one, two=two):
            (home / one).rename(home / "between")
            (home / two).rename(home / one)
            (home / "between").rename(home / two)

        yield f"{one} and {two} swapped", swap
    for name in names:
        yield f"{name} of another address", lambda name=name: put(home, other / name, home / name)
    yield "all of another address", lambda: put(home, other, home)


def test_what_lies_in_a_wrong_place_does_not_count(whole, tmp_path):
    """Each folder is whole, and of other documents or other settings than its name says."""
    cfg, wanted, home = whole
    other = tmp_path / "other"
    larger = config(tmp_path / "rows.jsonl", rows(), tokenizer={"vocab_size": 280})
    for number in range(scan(larger, other, 3, quiet)):
        encode(larger, other, number, quiet)
    kept = shutil.copytree(home, tmp_path / "kept")
    count = 0
    # every second one, the last too: each takes a third of a second
    for what, misplace in list(misplacements(home, other))[::2]:
        put(home, kept, home)
        misplace()
        out = tmp_path / "out"
        out.mkdir()
        prepare(cfg, out, quiet, home)
        assert bytes_of(out) == bytes_of(wanted), what
        shutil.rmtree(out)
        count += 1
    assert count == 12


@pytest.mark.parametrize("name", ["", "1"])
@pytest.mark.parametrize("shape", ["a file", "a link"])
def test_what_is_no_folder_is_said_and_left(whole, name, shape):
    cfg, _, home = whole
    path = home / name
    path.rename(home.with_name("elsewhere"))
    path.write_text("mine") if shape == "a file" else path.symlink_to("nowhere")
    told = "is a file where a folder is wanted" if shape == "a file" else "leads nowhere"
    again = encode if name else scan
    with pytest.raises(StoreError, match=told):
        again(cfg, home, int(name or 3), quiet)
    assert path.is_symlink() if shape == "a link" else path.read_text() == "mine"


def test_a_torn_scan_leads_to_one_run_and_to_a_new_scan(whole, tmp_path):
    cfg, wanted, home = whole
    flip(home / "scan/splits.safetensors")
    with pytest.raises(MissingArtifact, match="has no scan"):
        encode(cfg, home, 0, quiet)
    (tmp_path / "out").mkdir()
    prepare(cfg, tmp_path / "out", quiet, home)
    assert bytes_of(tmp_path / "out") == bytes_of(wanted)
    assert scan(cfg, home, 3, quiet) == 3 and not (home / "0").exists()


@pytest.mark.parametrize(
    "change", [lambda t: t.replace("tide", "edit"), lambda t: t[: t.rindex("\n", 0, -1) + 1]]
)
def test_a_source_that_changes_after_the_scan_is_refused(tmp_path, change):
    cfg, home = config(tmp_path / "rows.jsonl", rows()), tmp_path / "jobs"
    last = scan(cfg, home, 2, quiet) - 1
    (tmp_path / "rows.jsonl").write_text(change((tmp_path / "rows.jsonl").read_text()))
    with pytest.raises(
        DataError, match="has changed since it was scanned: job 2 of 2 .* run preprocess again"
    ):
        encode(cfg, home, last, quiet)
    assert not (home / str(last) / "manifest.json").exists()


def test_a_merge_refuses_what_one_run_refuses(tmp_path):
    cfg = config(tmp_path / "rows.jsonl", rows(), partition={"min_tokens": 10**6})
    with pytest.raises(DataError, match="fewer than partition.min_tokens"):
        by_jobs(cfg, tmp_path, 2)
    assert not (tmp_path / "out/shards.json").exists()
