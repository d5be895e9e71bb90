"""Partitions against text whose domains are known, and their promise that saving changes
nothing."""

import random

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score

from pipeline.config.text_data import TextRunConfig
from pipeline.data.text import partition
from pipeline.data.text.documents import Document, key_of
from pipeline.data.text.partition import balanced
from pipeline.errors import DamagedArtifact, DataError, MissingArtifact

TOPICS = ("tide reef gull", "lathe gear bolt", "oboe chord waltz")


def document(text, label="", split=None, piece=0):
    return Document(text, len(text.encode()), key_of(text.encode(), 0), piece, label, split, "here")


def corpus(count=240, seed=0):
    """Return documents of three topics over shared filler, and their topics."""
    rng, out = random.Random(seed), []
    for i in range(count):
        words = TOPICS[i % 3].split() * 3 + [f"filler{rng.randrange(50)}" for _ in range(10)]
        out.append(document(" ".join(rng.sample(words, 15)) + f" {i}", label="abc"[i % 3]))
    return out, [i % 3 for i in range(count)]


def config(by, **settings):
    data = settings.pop("data", {})
    return TextRunConfig.model_validate({"partition": {"by": by} | settings, "data": data})


@pytest.mark.parametrize("by", ["labels", "clusters", "random", "curriculum"])
def test_a_saved_partition_assigns_alike(tmp_path, by):
    docs, _ = corpus()
    cfg = config(by, **({"domains": list("abc")} if by == "labels" else {"count": 3}))
    domains = partition.fit(cfg, docs)
    names = domains.assign(docs)
    assert set(names) == set(cfg.partition.names)
    assert partition.fit(cfg, docs).assign(docs) == names
    domains.save(tmp_path)
    loaded = partition.load(tmp_path)
    assert loaded.assign(docs) == names and loaded.names == cfg.partition.names
    assert [loaded.assign([d])[0] for d in docs[:20]] == names[:20] and loaded.assign([]) == []


def test_clusters_find_topics_in_new_documents():
    docs, topics = corpus()
    domains = partition.fit(config("clusters", count=3), docs)
    new, new_topics = corpus(90, seed=1)
    assert adjusted_rand_score(topics, domains.assign(docs)) > 0.95
    assert adjusted_rand_score(new_topics, domains.assign(new)) > 0.95


def test_balanced_respects_room_and_is_near_the_optimum():
    rng = np.random.default_rng(0)
    cost = rng.random((61, 4)) + np.array([0, 0.3, 0.6, 0.9])  # everyone would like the first
    chosen = balanced(cost)
    assert sorted(np.bincount(chosen).tolist()) == [15, 15, 15, 16]
    slots = np.repeat(np.arange(4), np.bincount(chosen))
    best = cost[:, slots][linear_sum_assignment(cost[:, slots])].sum()
    assert best <= cost[np.arange(61), chosen].sum() < 1.1 * best
    assert balanced(cost[:, :1]).tolist() == [0] * 61


def test_length_levels_are_quantiles():
    docs = [document("x" * n) for n in range(20, 120)]
    names = partition.fit(config("curriculum", count=4, difficulty="length"), docs).assign(docs)
    assert names == [f"level-{i // 25}" for i in range(100)]


def test_rarity_and_compression_order_documents_by_difficulty():
    rng = random.Random(0)
    easy = [document("the cat sat on the mat " * 20 + str(i)) for i in range(50)]
    hard = [document(" ".join(f"{rng.randrange(10**9):x}" for _ in range(60))) for _ in range(50)]
    for difficulty in ("rarity", "compression"):
        domains = partition.fit(config("curriculum", count=2, difficulty=difficulty), easy + hard)
        assert domains.assign(easy + hard) == ["level-0"] * 50 + ["level-1"] * 50


def test_chance_is_even_and_follows_the_seed():
    docs, _ = corpus(3000)
    names = partition.fit(config("random", count=3), docs).assign(docs)
    assert all(900 < names.count(f"random-{i}") < 1100 for i in range(3))
    other = partition.fit(config("random", count=3, data={"seed": 1}), docs).assign(docs)
    assert 0.2 < np.mean([a == b for a, b in zip(names, other, strict=True)]) < 0.5


def test_too_few_documents_and_damaged_files_are_named(tmp_path):
    with pytest.raises(
        DataError, match=r"wants 4 domains \(partition.count\) out of 3 training documents"
    ):
        partition.fit(config("clusters"), corpus(3)[0])
    with pytest.raises(MissingArtifact, match="partition.json"):
        partition.load(tmp_path)
    partition.fit(config("random"), []).save(tmp_path)
    (tmp_path / "partition.safetensors").write_bytes(b"torn")
    with pytest.raises(DamagedArtifact, match="cannot be read"):
        partition.load(tmp_path)
