"""Which documents are held out, by threshold, by rank or as given, and the sample of the rest."""

import numpy as np
import pytest
from test_partition import config, document

from pipeline.data.text.splits import Sample, SmallDomains, Splits
from pipeline.errors import DataError


def test_thresholds_hold_out_the_shares_that_were_asked_for():
    splits = Splits(config("random", data={"valid_share": 0.1, "test_share": 0.2}).data)
    found = [splits.of(document(f"text {i}")) for i in range(5000)]
    assert abs(found.count("valid") - 500) < 80 and abs(found.count("test") - 1000) < 120


def test_small_domains_get_every_split_and_shared_text_stays_together():
    data = config("random").data
    splits, small = Splits(data), SmallDomains(data)
    docs = {
        name: [document(f"{name} text {i}") for i in range(n)]
        for name, n in (("a", 3), ("b", 40), ("c", 400))
    }
    docs["b"][:3] = docs["a"]
    for name, found in docs.items():
        for d in found * 2:  # copies do not count
            small.add(name, d.key)
    small.decide(splits, docs)
    for name, (valid, test) in {"a": (1, 1), "b": (2, 2)}.items():
        found = [splits.of(d) for d in docs[name]]
        assert (found.count("valid"), found.count("test")) == (valid, test)
    assert {splits.of(d) for d in docs["c"]} == {"train", "valid", "test"}
    small.add("d", 1)
    with pytest.raises(DataError, match="domain d has 1 distinct documents"):
        small.decide(splits, ["d"])


def test_small_means_that_a_threshold_could_hold_out_nothing():
    data = config("random", data={"valid_share": 0.01, "test_share": 0.01}).data
    splits, small = Splits(data), SmallDomains(data)
    docs = [document(f"text {i}") for i in range(150)]
    for d in docs:
        small.add("a", d.key)
    small.decide(splits, ["a"])
    found = [splits.of(d) for d in docs]
    assert found.count("valid") == found.count("test") == 2


def test_given_splits_drop_what_is_held_out_elsewhere():
    splits = Splits(config("random").data)
    given = [
        document(t, split=s)
        for t, s in (("one", "train"), ("o ne", "valid"), ("two", "valid"), ("two", "test"))
    ]
    given += [document("three", split="train"), document("one", split="train", piece=1)]
    for d in given:
        splits.remember(d)
    assert [splits.of(d) for d in given] == [None, "valid", None, "test", "train", None]


def test_the_sample_is_bounded_uniform_and_blind_to_order():
    docs = [document(f"text {i} " + "x" * (i % 7 * 100)) for i in range(2000)]
    samples = []
    for order in (docs, docs[::-1]):
        sample = Sample(100_000, seed=0)
        for d in order:
            sample.add(d)
        assert not sample.whole
        samples.append([d.text for d in sample.documents()])
    assert samples[0] == samples[1]
    assert 80_000 < sum(max(len(text), 64) for text in samples[0]) <= 100_000
    places = [int(text.split()[1]) for text in samples[0]]
    assert 800 < np.mean(places) < 1200


def test_what_is_saved_decides_alike(tmp_path):
    data = config("random").data
    splits, small = Splits(data), SmallDomains(data)
    docs = [document(f"text {i}") for i in range(40)]
    given = [document("held", split="test"), document("held", split="train")]
    for d in docs:
        small.add("a", d.key)
    for d in given:
        splits.remember(d)
    small.decide(splits, ["a"])
    splits.save(tmp_path / "splits.safetensors")
    loaded = Splits(data).load(tmp_path / "splits.safetensors")
    assert [loaded.of(d) for d in docs + given] == [splits.of(d) for d in docs + given]
    assert [loaded.of(d) for d in given] == ["test", None]
