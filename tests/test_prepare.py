"""The whole of preprocess on small text: what it leaves, what it promises, what it refuses."""

import errno
import json
import os
import random
import threading
from pathlib import Path

import pytest
from small_text import opened, prepared

from pipeline.config.text_data import TextRunConfig
from pipeline.data.text import encode, partition, tokenizer
from pipeline.data.text.mixture import DomainMixture
from pipeline.errors import DataError

WORDS = {
    "sea": ["tide", "reef", "gull", "mast", "kelp", "brine"],
    "shop": ["lathe", "gear", "bolt", "chuck", "vise", "rivet"],
    "hall": ["oboe", "chord", "waltz", "reed", "fugue", "tempo"],
}


def rows(count=120, seed=0, words=40):
    """Return documents of three domains that share filler words."""
    rng, out = random.Random(seed), []
    for i in range(count):
        domain = list(WORDS)[i % 3]
        found = rng.choices(WORDS[domain] + [f"word{n}" for n in range(30)], k=words)
        out.append({"text": f"{i}: " + " ".join(found), "domain": domain})
    return out


def config(path, found=None, **sections):
    """Write found to path and return a TextRunConfig that reads it."""
    if found is not None:
        path.write_text("".join(json.dumps(row) + "\n" for row in found))
    base = {
        "data": {"source": "files", "files": [{"paths": [str(path)]}]},
        "partition": {"domains": list(WORDS), "min_tokens": 100},
        "tokenizer": {"vocab_size": 300, "sample_megabytes": 0.1},
    }
    for name, section in sections.items():
        base[name] = base.get(name, {}) | section
    return TextRunConfig.model_validate(base)


def run(cfg, folder):
    return prepared(cfg, folder)


def texts(folder, split, domain):
    """Return a shard's documents as text, decoded by transformers."""
    from transformers import PreTrainedTokenizerFast

    decoder, out = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer"), []
    with opened(folder) as shards:
        starts, sizes = shards.documents(split, domain)
        stream = shards.stream(split, domain)
        for start, end, size in zip(starts[:-1], starts[1:], sizes, strict=True):
            assert (
                stream[start] == shards.end_id
                and not (stream[start + 1 : end] == shards.end_id).any()
            )
            out.append(decoder.decode(stream[start + 1 : end].astype(int)))
            assert len(out[-1].encode()) == size
    return out


def bytes_of(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def test_every_document_comes_back_once_in_its_domain(tmp_path):
    found = rows()
    found[5]["text"] += " <|endoftext|> é漢🙂"
    out = tmp_path / "out"
    metrics = run(config(tmp_path / "rows.jsonl", found), out)
    for domain in WORDS:
        back = {split: texts(out, split, domain) for split in ("train", "valid", "test")}
        assert sorted(text for found in back.values() for text in found) == sorted(
            r["text"] for r in found if r["domain"] == domain
        )
        assert {split: len(t) for split, t in back.items()} == {"train": 36, "valid": 2, "test": 2}
        assert metrics["bytes"]["train"][domain] == sum(len(t.encode()) for t in back["train"])
        assert metrics["tokens"]["train"][domain] == opened(out).tokens("train", domain)
    assert metrics["dropped"] == {} and metrics["vocab_size"] == 300
    assert DomainMixture(opened(out), "train", tuple(WORDS), 16, 0).rows(0, 4).max() < 300


def test_the_same_run_leaves_the_same_bytes(tmp_path):
    for by in ("labels", "clusters"):
        section = {} if by == "labels" else {"by": by, "count": 3}
        cfg = config(tmp_path / "rows.jsonl", rows(), partition=section)
        for name in ("one", "two"):
            run(cfg, tmp_path / f"{by}-{name}")
        assert bytes_of(tmp_path / f"{by}-one") == bytes_of(tmp_path / f"{by}-two")


def test_batches_and_threads_change_nothing(tmp_path, monkeypatch):
    cfg = config(tmp_path / "rows.jsonl", rows())
    run(cfg, tmp_path / "one")
    monkeypatch.setattr(encode, "BATCH_BYTES", 300)
    run(cfg, tmp_path / "two")
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")


@pytest.mark.parametrize(
    ("by", "extra"), [("clusters", {}), ("random", {}), ("curriculum", {"difficulty": "rarity"})]
)
def test_a_new_document_finds_its_domain(tmp_path, by, extra):
    out = tmp_path / "out"
    run(config(tmp_path / "rows.jsonl", rows(), partition={"by": by, "count": 3} | extra), out)
    domains = partition.load(out / "tokenizer")
    from pipeline.data.text.documents import Document, key_of

    for name in domains.names:
        for text in texts(out, "train", name)[:5]:
            new = Document(text, len(text.encode()), key_of(text.encode(), 0), 0, "", None, "")
            assert domains.assign([new]) == [name]


def test_duplicates_never_cross_splits(tmp_path):
    found = rows(300)
    copies = [{"text": r["text"].replace(" ", "\n "), "domain": "sea"} for r in found]
    random.Random(0).shuffle(copies)
    out = tmp_path / "out"
    run(config(tmp_path / "rows.jsonl", found + copies), out)
    seen = {}
    for split in ("train", "valid", "test"):
        for domain in WORDS:
            for text in texts(out, split, domain):
                assert seen.setdefault("".join(text.split()), split) == split
    assert len(seen) == 300


def test_given_splits_are_kept_and_leaks_dropped(tmp_path):
    found = [
        r | {"split": ("train", "train", "train", "valid", "test")[i // 3 % 5]}
        for i, r in enumerate(rows(150))
    ]
    found += [found[9] | {"split": "train"}, found[12] | {"split": "train", "domain": "shop"}]
    out = tmp_path / "out"
    metrics = run(config(tmp_path / "rows.jsonl", found, data={"split_field": "split"}), out)
    assert metrics["dropped"] == {"equals a held-out document": 2}
    assert metrics["documents"] == {
        s: dict.fromkeys(WORDS, n) for s, n in (("train", 30), ("valid", 10), ("test", 10))
    }
    assert (
        "rows.jsonl:151"
        in json.loads((out / "preprocess-sea/dropped.json").read_text())["examples"][
            "equals a held-out document"
        ][0]
    )


def test_pieces_of_a_long_document_stay_in_one_split(tmp_path):
    found = [
        r | {"text": f"doc{i} " + " ".join(f"doc{i}" for _ in range(600))}
        for i, r in enumerate(rows(30))
    ]
    out = tmp_path / "out"
    run(config(tmp_path / "rows.jsonl", found, data={"max_document_bytes": 1024}), out)
    seen = {}
    for split in ("train", "valid", "test"):
        for domain in WORDS:
            for text in texts(out, split, domain):
                assert seen.setdefault(text.split()[0], split) == split
    assert len(seen) == 30


def test_the_tokenizer_hears_every_domain_equally_and_no_held_out_text(tmp_path, monkeypatch):
    heard = []
    real = tokenizer.train
    monkeypatch.setattr(
        "pipeline.data.text.tokenizer.train", lambda s, texts: heard.extend(texts) or real(s, texts)
    )
    found = rows(3000) + [r for r in rows(3000, seed=1) if r["domain"] == "sea"]
    out = tmp_path / "out"
    run(config(tmp_path / "rows.jsonl", found, tokenizer={"sample_megabytes": 0.09}), out)
    domain_of = {r["text"]: r["domain"] for r in found}
    share = {d: sum(len(t) for t in heard if domain_of[t] == d) for d in WORDS}
    assert all(30_000 <= size < 30_500 for size in share.values()), share
    held = {t for split in ("valid", "test") for d in WORDS for t in texts(out, split, d)}
    assert held and not held & set(heard)


def test_progress_is_told_and_ends_at_one(tmp_path):
    told = []
    prepared(
        config(tmp_path / "rows.jsonl", rows()),
        tmp_path / "out",
        lambda text, share: told.append((text, share)),
    )
    assert told[0][0].startswith("reading") and told[-1][1] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("found", "sections", "match"),
    [
        ([], {}, "no usable document"),
        (
            [row for row in rows() if row["domain"] != "hall"],
            {},
            "partition.domains names hall, and no document has that label.*sea, shop",
        ),
        (rows(), {"partition": {"domains": ["sea", "moon"]}}, "names moon.*holds sea, (hall|shop)"),
        (
            rows(),
            {"partition": {"min_tokens": 10**6}},
            r"domain sea has \d+ training tokens, fewer than partition.min_tok",
        ),
        (rows(6), {"partition": {"min_tokens": 1}}, "domain sea has 2 distinct documents"),
        (
            [r | {"split": "train"} for r in rows()],
            {"data": {"split_field": "split"}},
            "sea has no valid document: set val",
        ),
        (
            [{"body": "x" * 20}] * 9,
            {},
            "9 of 9 documents cannot be read.*9 no text .*rows.jsonl:1: text is missing",
        ),
    ],
)
def test_data_that_is_not_as_asked_is_refused(tmp_path, found, sections, match):
    with pytest.raises(DataError, match=match):
        run(config(tmp_path / "rows.jsonl", found, **sections), tmp_path / "out")
    assert len(list(tmp_path.rglob("shards.json"))) < len(
        list(tmp_path.glob("out/preprocess-*"))
    ) or (not (tmp_path / "out/preprocess-sea").exists())


def test_a_full_disk_passes_through_and_ends_every_thread(tmp_path, monkeypatch):
    class Full:
        def add(self, *_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(encode, "ShardWriter", lambda *_, **__: Full())
    monkeypatch.setattr(encode, "BATCH_BYTES", 300)
    with pytest.raises(OSError, match="No space left"):
        run(config(tmp_path / "rows.jsonl", rows()), tmp_path / "out")
    assert not [t for t in threading.enumerate() if t.name == "prepare"]


def test_a_reader_error_reaches_the_caller_from_its_thread(tmp_path, monkeypatch):
    cfg, calls = config(tmp_path / "rows.jsonl", rows()), []

    def remove(text, share):
        if text.startswith("training"):
            calls.append(Path(tmp_path / "rows.jsonl").unlink())

    with pytest.raises(DataError, match="matches no file"):
        prepared(cfg, tmp_path / "out", remove)
    assert calls and not [t for t in threading.enumerate() if t.name == "prepare"]


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: lines[:-1],
        lambda lines: [*lines, lines[0]],
        lambda lines: [lines[0].replace("0: ", "9: "), *lines[1:]],
        lambda lines: [*lines[:60], lines[60][:40] + "\n", *lines[61:]],
    ],
    ids=["shorter", "longer", "edited", "a torn row"],
)
def test_a_source_that_changes_between_the_passes_is_refused(tmp_path, change):
    path = tmp_path / "rows.jsonl"
    cfg = config(path, rows())

    def edit(text, share):
        if text.startswith("training"):
            lines = path.read_text().splitlines(keepends=True)
            path.write_text("".join(change(lines)))

    with pytest.raises(DataError, match="has changed since it was looked at: the documents of"):
        prepared(cfg, tmp_path / "out", edit)


def test_the_environment_is_left_as_it_was(tmp_path, monkeypatch):
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    run(config(tmp_path / "rows.jsonl", rows()), tmp_path / "out")
    assert "TOKENIZERS_PARALLELISM" not in os.environ


def test_installed_text_makes_four_domains(tmp_path):
    cfg = TextRunConfig.model_validate(
        {"data": {"megabytes_per_domain": 0.2}, "tokenizer": {"vocab_size": 512}}
    )
    metrics = run(cfg, tmp_path / "out")
    assert all(metrics["tokens"]["train"][d] >= 10_000 for d in cfg.partition.domains)
