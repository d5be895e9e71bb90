"""How the time of a job is told from those that are done: whose speed counts, and how much."""

from pathlib import Path

import pytest

from pipeline.run.speeds import alike, speeds, typical
from pipeline.store.artifacts import Store
from pipeline.store.manifest import Manifest

HERE = {"cpu": "a processor", "gpu": None, "threads": 2}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store").open()


def leave(store: Store, number: int, steps: int, step_s: float, first_s: float = 0.0, **changes):
    """Leave a training of 100 tokens a step, of 1000 operations each."""
    address = f"train_experts-sea-{number:012x}"
    training_s = first_s + (steps - bool(first_s)) * step_s
    metrics = {"steps": steps, "training_s": training_s, "flops_per_token": 1000.0}
    metrics["tokens_per_s"] = 100 * steps / training_s
    if first_s:
        metrics["first_step_s"] = first_s
    store.begin(address)
    made = {"machine": HERE | changes.pop("machine", {})}
    manifest = Manifest(address, "train_experts", "sea", {}, {}, metrics | changes, made)
    store.finish(manifest)


def test_a_first_step_is_no_measure_of_the_others(store):
    leave(store, 1, steps=3, step_s=5.0, first_s=50.0)
    (found,) = speeds(store)
    assert found.flops_per_s == pytest.approx(100 * 1000 / 5.0) and found.seconds == 10.0


def test_what_has_one_step_or_few_seconds_tells_nothing(store):
    leave(store, 1, steps=1, step_s=0.0, first_s=50.0)
    leave(store, 2, steps=3, step_s=2.0, first_s=50.0)
    # neither does what trains nothing
    store.begin("tokenizer-0123456789ab")
    store.finish(Manifest("tokenizer-0123456789ab", "tokenizer", None, {}, {}, {"tokens": 9}, {}))
    # nor a few steps of which nobody knows how long the first one took
    leave(store, 3, steps=9, step_s=2.0)
    leave(store, 4, steps=10, step_s=2.0)
    assert [each.seconds for each in speeds(store)] == [20.0]


def test_the_median_is_told_by_many_jobs_of_few_steps_too(store):
    for number, step_s in enumerate((5.0, 6.0, 40.0)):
        leave(store, number, steps=2, step_s=step_s, first_s=30.0)
    # one that shared its machine is slower than it would have been
    rates = [each.flops_per_s for each in speeds(store)]
    assert typical(rates) == pytest.approx(100 * 1000 / 6.0)
    assert typical(rates[:2]) == pytest.approx(100 * 1000 / 5.0) and typical([]) is None


def test_jobs_that_are_like_one_tell_most_of_it(store):
    leave(store, 1, steps=10, step_s=1.0)
    leave(store, 2, steps=10, step_s=1.0, machine={"threads": 4})
    leave(store, 3, steps=10, step_s=1.0, flops_per_token=1500.0)
    leave(store, 4, steps=10, step_s=1.0, flops_per_token=1e6, machine={"threads": 4})
    found = list(speeds(store))

    def chosen(flops_per_token, threads):
        # of older trainings, which noted no dtype
        kept = alike(found, flops_per_token, threads, "bf16")
        return sorted(int(each.manifest.address[-1]) for each in kept)

    # the same work, with as many threads where there is such a job
    assert chosen(1000.0, 2) == [1] and chosen(1000.0, 4) == [2] and chosen(1000.0, 8) == [1, 2]
    # a model about as large, of which none has done the same; threads tell more than the work
    assert chosen(1200.0, 2) == [1, 3] and chosen(1500.0, 4) == [2] and chosen(2e6, 2) == [4]
    # nothing like it, or a size that nobody knows
    assert chosen(1.0, 4) == [2, 4] and chosen(0.0, 2) == [1, 3]
    assert alike([], 1000.0, 2, "fp32") == []


def test_a_job_in_bf16_is_not_told_from_those_in_fp32(store):
    leave(store, 1, steps=10, step_s=1.0, machine={"dtype": "fp32"})
    leave(store, 2, steps=10, step_s=0.8, machine={"dtype": "bf16", "threads": 4})
    leave(store, 3, steps=10, step_s=1.0, flops_per_token=1e6)
    found = list(speeds(store))

    def chosen(dtype, known=found):
        kept = alike(known, 1000.0, 2, dtype)
        return [int(each.manifest.address[-1]) for each in kept]

    # rather of other threads, or of an older training, than of another arithmetic
    assert chosen("fp32") == [1] and chosen("bf16") == [2]
    assert chosen("bf16", found[:1]) == []


def test_the_time_of_a_model_of_another_size_goes_by_what_size_does_to_speed(store):
    # as measured: 2.2 and 565 million operations a token, 32 and 120 billion a second
    leave(store, 1, steps=10, step_s=1.0, flops_per_token=2.2e6)
    leave(store, 2, steps=10, step_s=1.0, flops_per_token=565e6)
    leave(store, 3, steps=10, step_s=1.0, flops_per_token=0.0, tokens_per_s=1.0)
    small, large, unknown = sorted(speeds(store), key=lambda each: each.manifest.address)
    assert small.scale(565e6) * 32 == pytest.approx(120, rel=0.1)
    assert large.scale(2.2e6) * 120 == pytest.approx(32, rel=0.1)
    assert small.scale(2.2e6 * 4) == small.scale(2.2e6) == small.scale(2.2e6 / 4) == 1.0
    assert small.scale(22e6) > 1.5 and large.scale(56e6) < 0.6
    # of sizes that nobody measured nothing is made, nor of one that nobody knows
    assert large.scale(1e12) == small.scale(1e3) == small.scale(0.0) == unknown.scale(1e6) == 1.0
    assert small.scale(1e12) == small.scale(565e6)
