"""Shards read back against plain numpy, and the arithmetic of a DomainMixture's rows."""

import copy
import json

import numpy as np
import pytest

from pipeline.data.text.mixture import DomainMixture, shuffled
from pipeline.data.text.shards import Shards, ShardWriter
from pipeline.errors import DamagedArtifact, DataError, MissingArtifact, NewerStore

C = 8


def write(folder, sizes, vocab_size=4096, split="train"):
    """Write a shard whose tokens are unique numbers, one document of 10 tokens (with end_id) at a
    time."""
    writer = ShardWriter(folder, tuple(sizes), vocab_size, end_id=0)
    for base, (domain, tokens) in enumerate(sizes.items()):
        ids = iter(range(1 + 1000 * base, 1000 * base + 1000))
        for start in range(0, tokens, 10):
            count = min(10, tokens - start) - 1
            writer.add(split, domain, [next(ids) for _ in range(count)], document_bytes=3 * count)
    writer.finish()
    return Shards(folder)


def targets(rows):
    """Return all target tokens, sorted."""
    return sorted(rows[:, 1:].ravel().tolist())


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_536, "<u2"), (65_537, "<u4")])
def test_streams_are_flat_files_any_program_can_read(tmp_path, vocab_size, dtype):
    shards = write(tmp_path, {"a": 95, "b": 40}, vocab_size)
    raw = np.fromfile(tmp_path / "train/a.bin", dtype)
    assert shards.stream("train", "a").dtype == np.dtype(dtype)
    np.testing.assert_array_equal(shards.stream("train", "a"), raw)
    starts, sizes = shards.documents("train", "a")
    assert starts.dtype == sizes.dtype == np.int64 and len(starts) == len(sizes) + 1 == 11
    assert starts[-1] == len(raw) == shards.tokens("train", "a") == 95
    assert (raw[starts[:-1]] == shards.end_id).all() and (raw == 0).sum() == 10
    assert sizes.tolist() == [27] * 9 + [12]
    assert len(shards.stream("valid", "a")) == 0 and shards.domains == ("a", "b")


def test_buffers_flush_without_changing_a_byte(tmp_path, monkeypatch):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, {"a": 900, "b": 40})
        monkeypatch.setattr("pipeline.data.text.shards._BUFFER_BYTES", 0)
        monkeypatch.setattr("pipeline.data.text.shards._LEAST_BYTES", 64)
    for file in ("train/a.bin", "train/a.idx", "shards.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_close_lets_go_of_the_maps(tmp_path):
    def mapped():
        with open("/proc/self/maps") as file:
            return str(tmp_path) in file.read()

    with write(tmp_path, {"a": 95}) as shards:
        shards.stream("train", "a")
        assert mapped()
        other = copy.copy(shards)  # by way of what a pickle holds
    assert not mapped()
    assert len(other.stream("train", "a")) == 95


def test_damage_is_found_before_it_is_read(tmp_path):
    with pytest.raises(MissingArtifact, match="shards.json does not exist") as error:
        Shards(tmp_path)
    assert error.value.stages == ("preprocess",)
    shards = write(tmp_path, {"a": 95})
    with pytest.raises(DataError, match="no train shard of domain z"):
        shards.stream("train", "z")
    (tmp_path / "train/a.bin").write_bytes(b"\0" * 10)
    with pytest.raises(DamagedArtifact, match="10 bytes, 190 were wanted"):
        shards.stream("train", "a")
    (tmp_path / "train/a.idx").unlink()
    with pytest.raises(DamagedArtifact, match="is gone"):
        shards.documents("train", "a")
    about = json.loads((tmp_path / "shards.json").read_text())
    (tmp_path / "shards.json").write_text(json.dumps(about | {"format": 99}))
    with pytest.raises(NewerStore, match="format 99"):
        Shards(tmp_path)
    (tmp_path / "shards.json").write_text("{")
    with pytest.raises(DamagedArtifact):
        Shards(tmp_path)


def test_an_id_outside_the_vocabulary_is_refused(tmp_path):
    writer = ShardWriter(tmp_path, ("a",), 300, 0)
    with pytest.raises(DataError, match="id 300 and has 300 entries"):
        writer.add("train", "a", [1, 300], 4)


@pytest.mark.parametrize("size", [1, 2, 3, 10, 64, 65, 1000])
def test_shuffled_is_a_fresh_permutation_per_epoch(size):
    places, epochs = np.tile(np.arange(size), 3), np.repeat(np.arange(3), size)
    out = shuffled(places, size, 7, epochs).reshape(3, size)
    for row in out:
        assert sorted(row.tolist()) == list(range(size))
    if size >= 10:
        assert len({tuple(row) for row in out.tolist()}) == 3
        assert (out[0] != shuffled(np.arange(size), size, 8, np.zeros(size, np.int64))).any()


def test_shuffled_sends_a_place_everywhere_equally():
    epochs = np.arange(20_000)
    counts = np.bincount(shuffled(np.zeros(20_000, np.int64), 20, 3, epochs), minlength=20)
    assert ((counts - 1000) ** 2 / 1000).sum() < 60  # chi-square of 19 degrees: one in 10^5


def test_an_epoch_sees_every_window_once(tmp_path):
    mixture = DomainMixture(write(tmp_path, {"a": 101, "b": 50}), "train", ("a", "b"), C, seed=1)
    windows = 100 // C + 49 // C
    assert mixture.tokens() == windows * C
    stream = {d: mixture.shards.stream("train", d).tolist() * 2 for d in "ab"}
    seen = []
    for epoch in range(3):
        rows = mixture.rows(epoch * windows, windows)
        assert rows.shape == (windows, C + 1) and rows.dtype == np.int64
        for row in rows.tolist():
            ring = stream["b" if max(row) > 1000 else "a"]
            assert any(ring[i : i + C + 1] == row for i in range(len(ring) // 2))
        named = [t for t in targets(rows) if t]
        assert len(named) == len(set(named))  # no token is a target twice
        seen.append(rows.tolist())
    assert seen[0] != seen[1] != seen[2]
    assert sorted(map(tuple, seen[0])) != sorted(
        map(tuple, seen[1])
    )  # a fresh grid, not only a fresh order


def test_rows_depend_on_seed_and_number_alone(tmp_path):
    shards = write(tmp_path, {"a": 500, "b": 300})
    for how in ("natural", "equal"):
        five, again, six = (
            DomainMixture(shards, "train", ("a", "b"), C, seed, how, ("a", "b"), 0.3)
            for seed in (5, 5, 6)
        )
        whole = five.rows(1000, 40)
        single = np.concatenate([again.rows(1000 + i, 1) for i in range(40)])
        np.testing.assert_array_equal(whole, single)
        assert (whole != six.rows(1000, 40)).any()


def test_equal_takes_turns_and_each_domain_has_its_own_epochs(tmp_path):
    mixture = DomainMixture(
        write(tmp_path, {"a": 801, "b": 41}), "train", ("a", "b"), C, seed=0, how="equal"
    )
    rows = mixture.rows(0, 10)
    assert [int(row.max() > 1000) for row in rows] == [0, 1] * 5
    named = [t for t in targets(rows[1::2]) if t]
    assert len(named) == len(set(named))
    assert mixture.tokens() == (800 // C + 40 // C) * C


@pytest.mark.parametrize("share", [0.1, 0.25, 0.3, 0.7])
def test_general_rows_come_at_their_share_and_leave_no_gap(tmp_path, share):
    shards = write(tmp_path, {"a": 801, "b": 801})
    mixed = DomainMixture(shards, "train", ("a",), C, 0, general=("b",), general_share=share)
    rows = np.concatenate([mixed.rows(g, 20) for g in range(0, 100, 20)])
    general = np.array([int((g + 1) * share) > int(g * share) for g in range(100)])
    np.testing.assert_array_equal(rows.max(axis=1) > 1000, general)
    own = np.concatenate(
        [
            DomainMixture(shards, "train", ("a",), C, 0).rows(i, 1)
            for i in range(int((~general).sum()))
        ]
    )
    np.testing.assert_array_equal(rows[~general], own)


def test_too_little_text_names_domain_tokens_and_setting(tmp_path):
    shards = write(tmp_path, {"a": C, "b": 500})
    with pytest.raises(
        DataError, match=r"domain a has 8 train tokens, one window needs 9.*context_tokens"
    ):
        DomainMixture(shards, "train", ("b", "a"), C, 0).rows(0, 1)
    with pytest.raises(
        DataError, match=r"100 rows .*b \(500 tokens\) has 62 windows.*batch_sequences"
    ):
        DomainMixture(shards, "train", ("b",), C, 0).rows(0, 100)
    (tmp_path / "exact").mkdir()
    exact = write(tmp_path / "exact", {"a": C + 1})
    assert DomainMixture(exact, "train", ("a",), C, 0).rows(0, 1).shape == (1, C + 1)
