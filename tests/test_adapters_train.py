"""The trainings of lora_vlm: the loss they minimise, what moves and what does not, and that they
can be killed."""

import errno
import hashlib
import itertools
import shutil
from dataclasses import replace

import lora_small
import pytest
import torch
from fakes import FolderParts, Killed, dying, elsewhere, equal, train_io, unreadable, values

from pipeline.data.tasks.prepare import TaskRows, prepare
from pipeline.errors import (
    BudgetError,
    ConfigError,
    DataError,
    MissingArtifact,
    OtherCheckpoint,
    PipelineError,
)
from pipeline.families.adapters import peft_io
from pipeline.families.adapters.base import ModelRef
from pipeline.families.adapters.chat import Example, encode
from pipeline.families.adapters.train import Training
from pipeline.families.lora_vlm import base as lora_base
from pipeline.families.lora_vlm import family, image_cache
from pipeline.families.lora_vlm.image_cache import ImageCache
from pipeline.protocols import quiet
from pipeline.train import loop
from pipeline.train.loop import fit


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Data and base of a run; read it, never change it."""
    return lora_small.prepared(tmp_path_factory.mktemp("vlm"))


@pytest.fixture
def parts(tmp_path):
    return lora_small.prepared(tmp_path / "run")


def of(parts, **changes):
    """Return the same run with other settings."""
    return FolderParts(lora_small.config(**changes), parts.root)


def training(parts, name="color", **changes) -> Training:
    """Return an adapter on the base whose second matrices are not zero, so that all of it has
    gradients."""
    cfg = lora_small.config(**changes)
    opened = lora_base.open_base(parts.folder("train_shared"), cfg.loras.base)
    out = Training(opened, name, cfg, seed=1, bf16=False, where="loras.experts.color.overrides")
    with torch.no_grad():
        for parameter in peft_io.adapter_parameters(out.model, name).values():
            parameter.normal_(std=0.1)
    return out


def examples(parts, name="color", split="train"):
    rows = TaskRows(parts.folder("preprocess", name))
    return [
        Example(tuple(rows.folder / i for i in r.images), r.prompt, r.answer)
        for r in rows.rows(split)
    ]


def cache_of(run, dataset, most_bytes=image_cache.KEPT_BYTES) -> ImageCache:
    return ImageCache(run.core, run.chat.media, dataset.paths, dataset.path_tokens, most_bytes)


def batch_of(run, rows, keep=True):
    dataset = encode(run.chat, rows, 500)
    seen = cache_of(run, dataset, 10**9 if keep else 0)
    assert seen.keep == keep or not dataset.paths
    return run.inputs(dataset, seen, range(len(rows)), [None] * len(rows))


def gradients(run, nats):
    run.model.zero_grad()
    nats.backward()
    return {n: p.grad.clone() for n, p in peft_io.adapter_parameters(run.model, run.name).items()}


def test_the_loss_is_the_librarys_own_over_all_logits(shared):
    run, rows = training(shared), examples(shared)[:5]
    ours = gradients(run, nats := run.token_loss(batch_of(run, rows)))
    dataset = encode(run.chat, rows, 500)
    text, learned = dataset.batch(range(5)), dataset.target_count(range(5))
    pixels = run.chat.media.patches_of_files([dataset.paths[i] for (i,) in dataset.media(range(5))])
    whole = run.model(**text, pixel_values=pixels[0], image_grid_thw=pixels[1])
    assert whole.logits.shape[1] == text["labels"].shape[1]
    theirs = gradients(run, whole.loss)
    assert nats.item() / learned == pytest.approx(whole.loss.item(), abs=1e-6)
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name] / learned, gradient, atol=1e-6, rtol=1e-4)
        assert gradient.abs().sum() > 0, name


def test_checkpointing_leaves_every_gradient_as_it_is_bit_for_bit(shared):
    run, rows = training(shared), examples(shared)[:3]
    inputs = batch_of(run, rows)
    plain = gradients(run, run.token_loss(inputs))
    run.core.activation_checkpointing_enable({"use_reentrant": False})
    assert equal(gradients(run, run.token_loss(inputs)), plain)


def test_kept_features_are_what_the_tower_makes_of_the_pixels(shared):
    run, rows = training(shared), examples(shared)[:6]
    kept, fresh = (run.token_loss(batch_of(run, rows, keep)).item() for keep in (True, False))
    assert kept == pytest.approx(fresh, rel=1e-5)


def test_a_pictures_features_do_not_depend_on_what_was_asked_before(shared, monkeypatch):
    monkeypatch.setattr(image_cache, "BLOCK_PATCHES", 48)  # three pictures of 64 x 64
    run = training(shared)
    dataset = encode(run.chat, examples(shared), 500)
    one, other = cache_of(run, dataset), cache_of(run, dataset)
    one.pictures([7, 0, 3])
    for place_ in (20, 3, 7):
        a, b = (seen.pictures([place_])["mm_encoder_outputs"]["image"] for seen in (one, other))
        assert torch.equal(a.pooler_output[0], b.pooler_output[0])
        assert torch.equal(a.deepstack_features[0][0], b.deepstack_features[0][0])


def test_positions_that_are_looked_up_are_the_models_own(shared):
    run, rows = training(shared), examples(shared)[:4]
    rows[1] = replace(rows[1], media=rows[0].media + rows[1].media)
    rows[2] = replace(
        rows[2], media=(), prompt="A rather longer request without any picture at all"
    )
    inputs = batch_of(run, rows)
    own = run.core.model.get_rope_index(
        inputs["input_ids"],
        inputs["mm_token_type_ids"],
        inputs["image_grid_thw"],
        attention_mask=inputs["attention_mask"],
    )[0]
    assert torch.equal(inputs["position_ids"], own)


def test_text_alone_trains_too(shared):
    run = training(shared)
    inputs = batch_of(
        run, [Example((), "Say red.", "red"), Example((), "Say nothing but blue, please.", "blue")]
    )
    assert "image_grid_thw" not in inputs and run.token_loss(inputs).item() > 0


def test_a_batch_of_both_is_its_rows_one_by_one(shared):
    run, rows = (
        training(shared),
        [*examples(shared)[:3], Example((), "Say nothing but blue, please.", "blue")],
    )
    with torch.no_grad():
        one_by_one = sum(run.token_loss(batch_of(run, [row])).item() for row in rows)
        assert run.token_loss(batch_of(run, [rows[3], *rows[:3]])).item() == pytest.approx(
            one_by_one, rel=1e-4
        )


@pytest.mark.parametrize(
    ("base", "dtype"), [("bfloat16", "fp32"), ("bfloat16", "bf16"), ("float32", "bf16")]
)
def test_half_precision_trains_the_adapter_in_fp32(parts, base, dtype):
    settings = {"loras__base__dtype": base, "dtype": dtype, "loras__defaults__steps": 24}
    task = lora_small.train(of(parts, **settings), "color")
    assert {p.dtype for p in task.task.parameters.values()} == {torch.float32}
    told = [row["valid_nats"] for row in task.rows if "valid_nats" in row]
    assert told[-1] < told[0]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_micro_batches_add_up_to_the_batch(shared, size):
    """Answers of different lengths: the mean is over all tokens, not over parts."""
    task = family.expert(shared.cfg, of(shared, seed=4), "dots")
    with torch.no_grad():
        for parameter in task.parameters.values():
            parameter.normal_(std=0.1)

    def step(size):
        for at in range(0, 4, size):
            part = task.batch(4 + at, min(size, 4 - at))
            (task.loss(part) * (min(size, 4 - at) / 4)).backward()
        out = {n: p.grad.clone() for n, p in task.parameters.items()}
        for parameter in task.parameters.values():
            parameter.grad = None
        return out

    whole, summed = step(4), step(size)
    for name in whole:
        torch.testing.assert_close(summed[name], whole[name], atol=1e-6, rtol=1e-4)


def hashes(model) -> dict[str, str]:
    return {
        n: hashlib.sha256(p.detach().contiguous().numpy().tobytes()).hexdigest()
        for n, p in model.named_parameters()
    }


def test_training_one_adapter_leaves_the_base_and_the_others_as_they_were(shared, tmp_path):
    run = training(shared)
    adapters = peft_io.add(run.model, "other", run.options)
    peft_io.select(adapters, "color")
    before = hashes(run.model)
    rows = {"train": examples(shared), "valid": examples(shared, split="valid")}
    task = run.task(rows, ("What do you see?",), {}, dict)
    assert {n for n, p in run.model.named_parameters() if p.requires_grad} == set(task.parameters)
    fit(task, train_io(tmp_path))
    after = hashes(run.model)
    assert {name for name in after if after[name] != before[name]} == set(task.parameters)
    mark = f".{peft_io.peft_name('color')}."
    assert all(mark in name and "lora_" in name for name in task.parameters)


@pytest.mark.parametrize("name", ["color", "router"])
def test_one_step_is_a_training_and_none_is_not(shared, tmp_path, name):
    """In the first step lora_B is zero, so only lora_B moves; later all of it has to."""
    run = of(shared, loras__defaults__steps=1)
    task = lora_small.task_of(run, name)
    before = {key: tensor.clone() for key, tensor in values(task).items()}
    assert fit(task, train_io(tmp_path / "one"))["steps"] == 1
    assert {
        key for key, tensor in values(task).items() if not torch.equal(tensor, before[key])
    } == {key for key in before if "lora_B" in key}
    for steps, stuck in ((1, "lora_B"), (2, "lora_A")):
        task = lora_small.task_of(of(shared, loras__defaults__steps=steps), name)
        for key, parameter in task.parameters.items():
            if stuck in key:
                parameter.register_hook(torch.zeros_like)
        count = len(task.parameters)
        said = rf"{count // 2} of {count} tensors did not change in {steps} step.*{stuck}"
        with pytest.raises(PipelineError, match=said):
            fit(task, train_io(tmp_path / stuck))


@pytest.mark.parametrize("name", ["color", "router"])
def test_killed_and_resumed_is_undisturbed_bit_for_bit(shared, tmp_path, name):
    changes = {"loras__defaults__dropout": 0.1, "loras__defaults__micro_batch_sequences": 3}
    run = of(shared, **changes)
    whole = lora_small.task_of(run, name)
    metrics = fit(whole, train_io(tmp_path / "whole"))
    for step in (1, 4):
        with pytest.raises(Killed):
            fit(dying(lora_small.task_of(run, name), step), train_io(tmp_path / str(step)))
        again = lora_small.task_of(run, name)
        resumed = fit(again, train_io(tmp_path / str(step)))
        assert equal(values(again), values(whole))
        assert [resumed[k] for k in ("steps", "train_nats", "valid_nats", "kept_step")] == [
            metrics[k] for k in ("steps", "train_nats", "valid_nats", "kept_step")
        ]


@pytest.mark.parametrize("name", ["color", "router"])
def test_a_checkpoint_that_cannot_be_read_stays_and_is_gone_on_from(
    shared, tmp_path, monkeypatch, name
):
    slots = tmp_path / "slots"
    with pytest.raises(Killed):
        fit(dying(lora_small.task_of(shared, name), 2), train_io(slots))
    task, here = lora_small.task_of(shared, name), train_io(slots)
    assert unreadable(slots, task, monkeypatch, errno.EIO) > 8
    fit(elsewhere(lora_small.task_of(shared, name)), here)
    assert here.recorder.starts == [2]


def test_a_checkpoint_of_the_other_arithmetic_is_refused_though_its_tensors_are_alike(
    shared, tmp_path
):
    # an adapter's tensors are fp32 in either, so nothing but the checkpoint's own word tells
    for before, after in (("fp32", "bf16"), ("bf16", "fp32")):
        slots = tmp_path / before
        with pytest.raises(Killed):
            fit(dying(lora_small.task_of(of(shared, dtype=before), "color"), 2), train_io(slots))
        with pytest.raises(OtherCheckpoint) as found:
            fit(lora_small.task_of(of(shared, dtype=after), "color"), train_io(slots))
        assert found.value.setting == f"dtype: {before}"


def test_two_runs_give_the_same_files_and_another_seed_others(parts, tmp_path):
    one, same = (lora_small.train(parts, "color", slots=tmp_path / name) for name in "ab")
    other = lora_small.train(of(parts, seed=4), "color", slots=tmp_path / "c")
    names = ["adapter.json", "adapter/adapter_config.json"]
    assert all(one.files[name] == same.files[name] for name in names)
    tensors = [run.files["adapter/adapter_model.safetensors"] for run in (one, same, other)]
    assert equal(tensors[0], tensors[1]) and not equal(tensors[0], tensors[2])


def test_an_expert_learns_its_task_in_its_own_words_and_in_neutral_ones(tmp_path):
    """The answers are the model's own, one token after another; pictures not made for training."""
    settings = {
        "steps": 120,
        "batch_sequences": 16,
        "warmup_steps": 20,
        "eval_every_steps": 0,
        "r": 16,
    }
    parts = lora_small.prepared(tmp_path / "run", loras__defaults=settings)
    shutil.rmtree(parts.folder("preprocess", "color"))
    entry = parts.cfg.loras.entry("color")
    more = entry.dataset.synthetic.model_copy(update={"train": 500, "test": 60})
    entry = entry.model_copy(
        update={"dataset": entry.dataset.model_copy(update={"synthetic": more})}
    )
    folder = parts.new("preprocess", "color")
    prepare(entry, parts.cfg.loras.base.image, 0, folder, quiet, 1)
    done = lora_small.train(parts, "color")
    opened = lora_base.open_base(parts.folder("train_shared"), parts.cfg.loras.base)
    model, chat = (
        peft_io.load(opened.model, done.folder, "color", opened.pin),
        opened.chat,
    )
    rows = TaskRows(folder)
    for words in (None, "What do you see?"):
        asked = chat.requests(
            (words or row.prompt, rows.pictures(row)) for row in rows.rows("test")
        )
        out = model.generate(**asked, max_new_tokens=4, do_sample=False)
        said = chat.tokenizer.batch_decode(
            out[:, asked["input_ids"].shape[1] :], skip_special_tokens=True
        )
        right = [text == row.answer for text, row in zip(said, rows.rows("test"), strict=True)]
        assert sum(right) / len(right) >= 0.9


def test_what_is_kept_says_what_it_is(parts):
    run = lora_small.train(parts, "dots")
    about, settings = run.files["adapter.json"], run.files["adapter/adapter_config.json"]
    pin = ModelRef.read(parts.folder("train_shared"))
    assert (about["name"], about["pin"]) == ("dots", pin.digest)
    assert (
        about["options"]["r"] == settings["r"] == 8
        and settings["base_model_name_or_path"] == "base"
    )
    assert about["rows"] == {
        "train": {"kept": 24, "dropped": {}},
        "valid": {"kept": 8, "dropped": {}},
    }
    assert run.metrics["parameters"] == sum(
        t.numel() for t in run.files["adapter/adapter_model.safetensors"].values()
    )


def test_rows_over_max_tokens_are_counted_and_said_and_without_any_left_it_ends(shared, tmp_path):
    lengths = sorted(
        line.tokens for line in encode(training(shared).chat, examples(shared), 500).rows
    )
    run = of(shared, loras__defaults__max_tokens=lengths[12], loras__defaults__neutral_share=0.0)
    task = family.expert(run.cfg, run, "color")
    dropped = sum(tokens > lengths[12] for tokens in lengths)
    assert 0 < dropped < 24
    assert task.export(0)["adapter.json"]["rows"]["train"] == {
        "kept": 24 - dropped,
        "dropped": {"over max_tokens": dropped},
    }
    limit = f"loras.experts.color.overrides.max_tokens = {lengths[12]}"
    said = f"{dropped} of 24 rows of train are over {limit} and were"
    assert task.notes[0].startswith(said)
    slot = train_io(tmp_path)
    fit(task, slot)
    assert slot.recorder.notes[: len(task.notes)] == list(task.notes)
    run = of(shared, loras__defaults__max_tokens=16)
    with pytest.raises(
        DataError, match=r"all 24 are over loras.experts.color.overrides.max_tokens = 16"
    ):
        family.expert(run.cfg, run, "color")


def test_epochs_and_tokens_are_counted_in_rows(shared):
    for duration, steps in (({"epochs": 2}, 12), ({"tokens": 24 * 31}, 6)):
        cfg = lora_small.config()
        defaults = cfg.loras.defaults.model_copy(update={"steps": None, **duration})
        cfg = cfg.model_copy(update={"loras": cfg.loras.model_copy(update={"defaults": defaults})})
        task = family.expert(cfg, shared, "color")
        assert task.steps == pytest.approx(steps, abs=1)


def test_a_label_of_two_tokens_is_refused_before_training(shared):
    entries = lora_small.SETTINGS["loras"]["experts"]
    run = of(shared, loras__experts=[entries[0], entries[1] | {"label": "QXJ"}])
    for item in ("color", "router"):
        with pytest.raises(ConfigError, match="the label 'QXJ' of dots is 3 tokens"):
            lora_small.task_of(run, item)


def test_a_budget_that_nothing_fits_into_is_refused(shared):
    run = of(shared, runtime__memory_budget="1MB")
    with pytest.raises(BudgetError, match="does not fit into runtime.memory_budget"):
        family.expert(run.cfg, run, "color")


def test_a_training_waits_for_what_it_needs(tmp_path):
    parts = FolderParts(lora_small.config(), tmp_path)
    for item in ("color", "router"):
        with pytest.raises(MissingArtifact):
            lora_small.task_of(parts, item)


def test_rates_and_peaks_of_a_killed_adapter_cover_all_attempts(tmp_path, monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(loop.time, "perf_counter", lambda: float(next(ticks)))
    parts = lora_small.prepared(tmp_path)
    first = train_io(tmp_path / "slots")
    first.peak.carry(3 * 10**15, 4 * 10**15)
    with pytest.raises(Killed):
        fit(dying(lora_small.task_of(parts, "color"), 4), first)
    again = fit(lora_small.task_of(parts, "color"), train_io(tmp_path / "slots"))
    once = fit(lora_small.task_of(parts, "color"), train_io(tmp_path / "other"))
    for name in ("forward_s", "backward_s", "tokens_per_s", "tokens", "steps"):
        assert again[name] == once[name]
    assert (again["peak_mb"], again["host_peak_mb"]) == (3e9, 4e9) != (once["peak_mb"], 0)
