"""What documents there are: known by themselves, whatever their files are called, and which domain
decides on those that several have."""

import json
import multiprocessing
import random
import shutil
import tempfile

import numpy as np
import pytest
from small_text import opened, prepared, surveyed
from test_prepare import WORDS, bytes_of, config, rows, texts

from pipeline.config.text_data import TextRunConfig
from pipeline.data.text import records
from pipeline.data.text.documents import documents, drop_stats, key_of
from pipeline.data.text.held_out import HeldOut
from pipeline.data.text.looked import look_at_domain, look_at_tokenizer
from pipeline.data.text.survey import survey
from pipeline.store.looking import FileSums, Looking

SPLITS = ("train", "valid", "test")


def write(path, found):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


def reading(*paths, **sections):
    """Return settings that read files, an entry each."""
    raw = config("unread.jsonl", **sections).model_dump(mode="json")
    raw["data"]["files"] = [{"paths": [str(path)]} for path in paths]
    return TextRunConfig.model_validate(raw)


def prints(cfg, folder=None):
    """Return by domain, and for the tokenizer, what is read as it is now."""
    eye = Looking(FileSums(), folder=folder)
    found = {name: look_at_domain(cfg, name, eye) for name in cfg.partition.names}
    found["tokenizer"] = look_at_tokenizer(cfg, eye)
    return {name: looked.print for name, looked in found.items()}


def moved(before, after):
    """Return what has another print."""
    return {name for name in before if before[name] != after[name]}


@pytest.fixture
def three(tmp_path):
    """A file that holds three domains, its rows, and how it is read."""
    path = tmp_path / "in" / "rows.jsonl"
    found = rows(150)
    write(path, found)
    return path, found, reading(path)


def test_one_row_edited_in_a_file_of_three_domains_is_one_domains(three):
    path, found, cfg = three
    before = prints(cfg)
    assert len(set(before.values())) == 4
    for at, change in ((4, str.upper), (5, lambda text: text + " \n"), (6, lambda text: "")):
        edited = [dict(row) for row in found]
        edited[at]["text"] = change(edited[at]["text"])
        write(path, edited)
        assert moved(before, prints(cfg)) == {found[at]["domain"], "tokenizer"}
    # What is no document changes nothing
    write(path, [*found, {"text": "", "domain": "sea"}, {"text": "x" * 99, "domain": "moon"}])
    assert moved(before, prints(cfg)) == set()
    taught = {"by": "labels", "domains": ["shop", "hall"]}
    only = reading(path, partition=taught)
    assert moved(prints(only), before) == {"tokenizer"}


def test_files_may_be_renamed_touched_parted_and_listed_otherwise(three, tmp_path):
    path, found, cfg = three
    before = prints(cfg)
    other = path.rename(tmp_path / "elsewhere.jsonl")
    other.touch()
    assert prints(reading(other)) == before
    by_domain = {name: [row for row in found if row["domain"] == name] for name in WORDS}
    parts = {name: write(tmp_path / f"{name}.jsonl", those) for name, those in by_domain.items()}
    for order in (list(WORDS), list(WORDS)[::-1]):
        assert prints(reading(*(parts[name] for name in order))) == before
    halves = (write(tmp_path / f"{n}.jsonl", found[n * 75 :][:75]) for n in range(2))
    assert prints(reading(*halves)) == before
    # Another order of a domain's own documents is another text
    shuffled = random.Random(0).sample(found, len(found))
    assert moved(before, prints(reading(write(tmp_path / "s.jsonl", shuffled)))) == {
        *WORDS,
        "tokenizer",
    }
    renamed = [{"body": row["text"], "of": row["domain"]} for row in found]
    columns = {"text_field": "body", "label_field": "of"}
    assert prints(reading(write(tmp_path / "c.jsonl", renamed), data=columns)) == before


def test_a_file_is_read_once_and_again_only_when_it_changes(three, tmp_path, monkeypatch):
    path, found, _ = three
    # Of contents that no other test of this process has looked at
    found[0]["text"] += " once"
    write(path, found)
    sea = write(tmp_path / "sea.jsonl", [{"text": row["text"]} for row in rows(60, seed=1)])
    cfg = reading(path)
    raw = cfg.model_dump(mode="json")
    raw["data"]["files"] += [{"paths": [str(sea)], "domain": "sea"}]
    cfg = TextRunConfig.model_validate(raw)
    opened_files = []
    real = records.documents_of

    def counted(*args):
        opened_files.append(args[-1])
        return real(*args)

    monkeypatch.setattr(records, "documents_of", counted)
    folder = tmp_path / "kept"
    first = prints(cfg, folder)
    assert prints(cfg, folder) == first and opened_files == [None, "sea"]
    # A file of one domain is the same whichever others there are
    more = {**raw, "partition": {**raw["partition"], "domains": ["sea", "shop"]}}
    prints(TextRunConfig.model_validate(more), folder)
    assert opened_files == [None, "sea", None]
    write(path, found[:-1])
    assert moved(first, prints(cfg, folder)) == {"hall", "tokenizer"}
    assert opened_files == [None, "sea", None, None]
    # Whatever lies there in place of what was written costs a reading
    for kept in (folder / "text").iterdir():
        kept.write_bytes(kept.read_bytes()[:-9] + b"\0" * 9)
    del opened_files[:]
    write(path, found)
    assert prints(cfg, folder) == first and opened_files == [None, "sea"]


def test_small_files_are_kept_together_and_a_list_that_is_damaged_costs_time_alone(
    tmp_path, monkeypatch
):
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number:02}.txt").write_text(f"a document of its own, number {number}\n")
    raw = config("unread.jsonl", partition={"domains": ["sea"], "min_tokens": 1}).model_dump()
    raw["data"]["files"] = [{"paths": [str(folder / "*.txt")], "domain": "sea"}]
    cfg = TextRunConfig.model_validate(raw)
    read = []
    real = records.documents_of
    monkeypatch.setattr(records, "documents_of", lambda *a: read.append(1) or real(*a))
    kept = tmp_path / "kept"

    def look():
        monkeypatch.setattr(records, "_known", {})
        return prints(cfg, kept)

    first = look()
    assert look() == first and len(read) == 40
    (listed,) = (kept / "text").iterdir()
    listed.write_bytes(listed.read_bytes().replace(b"sea", b"tea", 1))
    assert look() == first and len(read) == 80
    (folder / "07.txt").write_text("a document of its own, number seven\n")
    assert moved(first, look()) == {"sea", "tokenizer"} and len(read) == 81


def test_what_a_job_keeps_for_itself_goes_with_it(three, tmp_path, monkeypatch):
    """It is forked, and ends without what is done at exit: each left a folder of the system's."""
    monkeypatch.setattr(records, "_own", [])
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    end, other_end = multiprocessing.Pipe()

    def look():
        prints(three[2])
        end.send([path.name for path in (tmp_path / "tmp").iterdir()])

    job = multiprocessing.get_context("fork").Process(target=look)
    job.start()
    job.join()
    (kept,) = other_end.recv()
    assert kept.startswith("moleforge-")
    assert not list((tmp_path / "tmp").iterdir())


def test_no_folder_is_made_that_is_not_needed(three, tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_own", [])
    prints(three[2], tmp_path / "kept")
    assert not records._own


def test_a_survey_has_what_is_read_and_so_many_bytes(three, tmp_path):
    path, _, _ = three
    limited = {"megabytes_per_domain": 0.004, "max_document_bytes": 1024}
    given = [row | {"split": SPLITS[i // 3 % 5 % 3]} for i, row in enumerate(rows(600))]
    given[7]["text"] *= 9
    long = write(tmp_path / "long.jsonl", given)
    for data in ({}, limited, limited | {"split_field": "split"}):
        cfg = reading(*([long] if "split_field" in data else [path, long]), data=data)
        wanted = {name: [] for name in WORDS}
        for document in documents(cfg, drop_stats()):
            if not document.piece:
                wanted[document.label].append(document.digest)
        there = surveyed(cfg)
        for name in WORDS:
            digests = [row.tobytes().hex() for block in there.rows(name) for row in block["digest"]]
            assert digests == wanted[name] and there.count(name) == len(digests) > 10


@pytest.mark.parametrize("by", ["labels", "clusters"])
def test_files_that_a_limit_leaves_unread_are_told_once(tmp_path, by):
    for number in range(4):
        write(tmp_path / "in" / f"{number}.jsonl", rows(90))
    raw = config("unread.jsonl").model_dump(mode="json")
    raw["data"] |= {"megabytes_per_domain": 0.003, "files": [{"paths": [f"{tmp_path}/in/*.jsonl"]}]}
    raw["partition"] |= {"by": by, "count": 3} if by == "clusters" else {}
    told = []

    def surveyed_again(changed=raw):
        cfg = TextRunConfig.model_validate(changed)
        eye = Looking(
            FileSums(), folder=tmp_path / "sources", progress=lambda say, _: told.append(say)
        )
        survey(cfg, eye)
        return [each for each in told if "megabytes_per_domain" in each]

    (line,) = surveyed_again()
    assert "after 1 of 4 files, and the others are not read" in line
    assert ("share one limit" in line) == (by == "clusters")
    # a second look reads nothing and tells nothing anew; where the limit is far nothing is unread
    assert len(surveyed_again()) == 1
    raw["data"]["megabytes_per_domain"] = 9.0
    assert len(surveyed_again(raw)) == 1


def every_text(folder, domain):
    return {text: split for split in SPLITS for text in texts(folder, split, domain)}


def high_keys(draw, name):
    """Return texts whose keys are in the upper third."""
    every = [f"{name} {n} " + " ".join(draw.choices(WORDS["sea"], k=20)) for n in range(300)]
    return [text for text in every if key_of(text.encode(), 0) > 2**64 * 2 / 3]


@pytest.mark.parametrize("kind", ["ranks", "thresholds", "given"])
def test_the_first_domain_that_has_a_document_decides(tmp_path, kind):
    """Of documents that domains share, in every order of the domains: what one trains on no later
    one holds out, and the other way round; and a domain in front is as it is alone."""
    draw = random.Random(kind)
    counts = {"sea": 40, "shop": 400 if kind == "thresholds" else 60, "hall": 30}
    found = []
    # With high keys, which a threshold trains on: a domain of no others holds some of them out
    shared = high_keys(draw, "shared")[:24]
    for name, count in counts.items():
        own = [f"{name} {n} " + " ".join(draw.choices(WORDS[name], k=20)) for n in range(count)]
        if name == "sea":
            own = high_keys(draw, name)[:count]
        for text in (*own, *draw.sample(shared, 16)):
            split = draw.choices(SPLITS, (6, 2, 2))[0]
            found.append({"text": text, "domain": name, "split": split})
    draw.shuffle(found)
    data = {"valid_share": 0.25, "test_share": 0.25}
    if kind == "given":
        data["split_field"] = "split"
    path = write(tmp_path / "rows.jsonl", found)
    swayed = 0
    for order in (["sea", "shop", "hall"], ["hall", "shop", "sea"], ["shop", "sea", "hall"]):
        out = tmp_path / "-".join(order)
        cfg = reading(path, data=data, partition={"domains": order, "min_tokens": 1})
        prepared(cfg, out)
        decided = {}
        for name in order:
            made = every_text(out, name)
            for text, split in made.items():
                assert decided.setdefault(text, split) == split
            alone = reading(path, data=data, partition={"domains": [name], "min_tokens": 1})
            held_out = HeldOut(surveyed(alone))
            splits = held_out.splits(name)
            own = {d.text: splits.of(d) for d in documents(alone, drop_stats())}
            differs = any(own[text] != split for text, split in made.items()) or len(
                [text for text, split in own.items() if split]
            ) != len(made)
            # An address moves with what earlier domains have changed, and with nothing else
            assert bool(HeldOut(surveyed(cfg)).print_of(name)) == differs
            swayed += differs
            assert not differs or name != order[0]
    assert swayed


def test_a_domains_tokens_are_those_that_it_has_alone(three, tmp_path):
    path, _, cfg = three
    prepared(cfg, tmp_path / "all")
    for name in WORDS:
        one = reading(path, partition={"domains": [name]})
        shutil.copytree(tmp_path / "all/tokenizer", tmp_path / name / "tokenizer")
        from pipeline.data.text.prepare import prepare

        folder = tmp_path / name / f"preprocess-{name}"
        folder.mkdir()
        prepare(one, surveyed(one), name, tmp_path / name / "tokenizer", folder)
        assert bytes_of(folder) == bytes_of(tmp_path / "all" / f"preprocess-{name}")
        assert (tmp_path / "all" / f"preprocess-{name}" / "train" / f"{name}.bin").stat().st_size


@pytest.mark.parametrize(
    "kind",
    [
        {"by": "clusters", "count": 3},
        {"by": "random", "count": 3},
        {"by": "curriculum", "count": 3, "difficulty": "length"},
    ],
    ids=lambda kind: kind["by"],
)
def test_without_labels_every_document_is_in_one_domain(three, tmp_path, kind):
    path, found, _ = three
    cfg = reading(path, partition=kind)
    out = tmp_path / "out"
    metrics = prepared(cfg, out)
    every = [every_text(out, name) for name in cfg.partition.names]
    assert sorted(text for made in every for text in made) == sorted(r["text"] for r in found)
    assert metrics["dropped"] == {} and all(every)
    assert np.array(opened(out).stream("train", cfg.partition.names[0])).size
    before = prints(cfg)
    write(path, found[1:])
    assert moved(before, prints(cfg)) == {"tokenizer", *cfg.partition.names}


def test_a_file_that_cannot_be_read_is_another_and_told_by_who_needs_it(three, tmp_path):
    path, found, _ = three
    torn = tmp_path / "torn.jsonl.gz"
    torn.write_bytes(b"\x1f\x8b nothing of that kind")
    cfg = reading(path, torn)
    before = prints(cfg)
    assert moved(prints(reading(path)), before) == {*WORDS, "tokenizer"}
    assert before == prints(cfg)
    with pytest.raises(Exception, match=r"torn.jsonl.gz"):
        prepared(cfg, tmp_path / "out")
    gone = reading(path, tmp_path / "gone.jsonl")
    assert len(set(prints(gone).values())) <= 2 and moved(before, prints(gone))
    assert found
