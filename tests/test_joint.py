"""Joint trainings: what they are trained on, what they leave, and what their histories tell.

B sequences, T tokens, N = B*T, E experts, K experts per token, D model width.
"""

import math
import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from fakes import FolderParts, train_io
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from pipeline.errors import BudgetError, Interrupted
from pipeline.families.ffn_moe import evaluate, family
from pipeline.families.ffn_moe.joint.cost import joint_cost
from pipeline.families.ffn_moe.joint.epochs import Epochs
from pipeline.families.ffn_moe.joint.network import opened
from pipeline.families.ffn_moe.joint.sums import TrainingSums
from pipeline.families.ffn_moe.parts import shards_of, stored_settings
from pipeline.metrics.training import training_metrics
from pipeline.model.router import Gating, Router
from pipeline.protocols import quiet
from pipeline.train import loop
from tests import small

MODELS = ("dense", "moe")
TRAINING = "train_joint"
BATCH = 32
WINDOWS = 235  # of 8 tokens in the training text of all three domains
# Where an epoch of 235 rows ends in batches of 32
ENDS = [7, 15, 22, 29]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Token shards and nothing else: a joint training reads no trunk."""
    root = tmp_path_factory.mktemp("joint") / "run"
    small.write_shards(root)
    return FolderParts(small.config(), root)


def config(**joint):
    """Return a configuration of both models; changes are of the section joint."""
    own = {"models": MODELS, "steps": None, "epochs": 3, "batch_sequences": BATCH} | joint
    return small.config(joint=own)


def test_both_models_start_alike_and_read_the_same_rows(shards):
    dense, moe = (family.joint(config(), shards, item) for item in MODELS)
    torch.testing.assert_close(dense.batch(96, 32), moe.batch(96, 32), rtol=0, atol=0)
    for name, parameter in dense.parameters.items():
        in_moe = name.replace("layers.1.mlp.", "layers.1.mlp.experts.0.")
        assert torch.equal(parameter, moe.parameters[in_moe])
    drawn = [moe.parameters[f"model.layers.1.mlp.experts.{i}.up_proj.weight"] for i in range(3)]
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[1], drawn[2])


@pytest.mark.parametrize(("item", "top_k"), [("dense", 1), ("moe", 1), ("moe", 2)])
@pytest.mark.parametrize("layers", ["all", (1,)])
def test_the_stock_class_computes_the_same_from_what_is_stored(
    shards, tmp_path, item, top_k, layers
):
    ramp = {"start": 3.0, "end": 0.5}
    cfg = config(steps=3, epochs=None, layers=layers, top_k=top_k, temperature=ramp, dropout=0.3)
    parts = FolderParts(cfg, tmp_path / "run")
    shutil.copytree(shards.root, parts.root)
    made = small.train(cfg, parts, "train_joint", item)
    stock = AutoModelForCausalLM.from_pretrained(made.folder).eval()
    assert type(stock).__name__ == ("Qwen3MoeForCausalLM" if item == "moe" else "Qwen3ForCausalLM")
    settings = stored_settings(parts, "train_joint", item)
    stored = parts.tensors("train_joint", "model.safetensors", item)
    trunk, ffn = opened(cfg, item, settings, stored)
    ids_BT = made.task.batch(0, 4)
    with torch.no_grad():
        ours_BTV = trunk.hidden(ids_BT, ffn) @ trunk.head.T
        torch.testing.assert_close(ours_BTV, stock(ids_BT).logits, rtol=1e-4, atol=1e-5)


def test_tokens_over_capacity_get_exactly_the_residual(shards):
    cfg = config(capacity_factor=0.5, top_k=2)
    task = family.joint(cfg, shards, "moe")
    model = _model_of(task)
    [layer] = [model.trunk.network.model.layers[1]]
    seen = {}
    layer.post_attention_layernorm.register_forward_hook(
        lambda _module, inputs, output: seen.update(residual=inputs[0], x=output)
    )
    layer.register_forward_hook(lambda _module, _inputs, output: seen.update(out=output))
    task.before_step(0)
    task.loss(task.batch(0, BATCH))
    # Who is over capacity by a plain count: all first choices in order, then all second ones
    x_ND = seen["x"].flatten(0, 1)
    logits_NE = F.linear(x_ND, model.router.gates[0])
    index_NK = logits_NE.topk(2).indices.tolist()
    slots = int(0.5 * len(index_NK) * 2 / 3)
    used, runs = [0, 0, 0], set()
    for place in range(2):
        for token, choices in enumerate(index_NK):
            used[choices[place]] += 1
            if used[choices[place]] <= slots:
                runs.add(token)
    over = [token for token in range(len(index_NK)) if token not in runs]
    out_ND, residual_ND = seen["out"].flatten(0, 1), seen["residual"].flatten(0, 1)
    assert 10 < len(over) < len(index_NK) - 10
    assert torch.equal(out_ND[over], residual_ND[over])
    assert all(not torch.equal(out_ND[token], residual_ND[token]) for token in runs)


def test_gates_of_one_expert_a_token_get_the_gradient_of_a_plain_reference(shards):
    task = family.joint(config(aux_weight=0.0), shards, "moe")
    task.before_step(0)
    (task.loss(task.batch(0, BATCH)) + task.penalty()).backward()
    gate = task.parameters["model.layers.1.mlp.gate.weight"]
    assert gate.grad.abs().min() > 0
    # The same through a mixture written out: the expert's answer, by a probability that is scaled
    # to one in its value and not in its gradient
    model = _model_of(task)
    mixture, router = model.ffn, model.router
    x_BTD = torch.randn(2, 8, 16)
    router.gates[0].grad = None
    mixture(1, x_BTD).square().sum().backward()
    found = router.gates[0].grad.clone()
    weight_ED = router.gates[0].detach().clone().requires_grad_()
    x_ND = x_BTD.flatten(0, 1)
    probability_NE = F.linear(x_ND, weight_ED).softmax(-1)
    chosen_N = probability_NE.argmax(-1)
    rows = []
    for x_D, probability_E, chosen in zip(x_ND, probability_NE, chosen_N.tolist(), strict=True):
        weight = probability_E[chosen] - probability_E[chosen].detach() + 1
        rows.append(weight * mixture.experts[chosen](1, x_D[None])[0].detach())
    torch.stack(rows).square().sum().backward()
    torch.testing.assert_close(found, weight_ED.grad, rtol=1e-4, atol=1e-7)


def test_the_auxiliary_loss_is_one_at_an_even_load_and_more_where_it_is_skewed():
    x_ND = torch.randn(64, 16)
    losses = {}
    for scale in (0.0, 1.0, 30.0):
        router = Router(torch.zeros(1, 4, 16), Gating(1)).train()
        with torch.no_grad():
            # Expert 0 is preferred by all, the more the larger the scale
            router.gates[0][0] = scale * x_ND.mean(0) / x_ND.mean(0).norm()
            router.gates[0][0] += scale * 0.1
        router.route(0, x_ND.abs())
        losses[scale] = router.balance_loss().item()
    assert losses[0.0] == pytest.approx(1.0)
    assert 1.0 < losses[1.0] < losses[30.0] <= 4.0


def _model_of(task):
    return task.before_step.__self__.model


def fitted(cfg, parts, item, folder, stop_at=()):
    """Return what a training ends with: metrics, the rows that count and the exported tensors; it
    is interrupted before each step of stop_at and made anew."""
    rows = {}
    for step in (*stop_at, None):
        task = family.joint(cfg, parts, item)
        place = train_io(folder)

        def before_step(at, until=step, real=task.before_step):
            if at == until:
                raise Interrupted(f"stopped at {at}")
            real(at)

        try:
            metrics = loop.fit(replace(task, before_step=before_step), place)
        except Interrupted:
            continue
        finally:
            for row in place.recorder.rows:
                kind = "valid" if "valid_nats" in row else "train"
                timeless = {k: v for k, v in row.items() if not k.endswith(("_s", "_mb", "time"))}
                rows[row["step"], kind] = timeless
    return metrics, rows, task.export(metrics["kept_step"])


REGULARISED = {
    "dropout": 0.2,
    "label_smoothing": 0.1,
    "capacity_factor": 1.25,
    "temperature": {"start": 2.0, "end": 1.0, "epochs": 2},
    "keep": "best",
}


@pytest.fixture(scope="module")
def whole(shards, tmp_path_factory):
    """An undisturbed training of each model, by its name, with everything that is drawn."""
    folder = tmp_path_factory.mktemp("whole")
    cfg = config(**REGULARISED)
    return {item: fitted(cfg, shards, item, folder / item) for item in MODELS}


@pytest.mark.parametrize("item", MODELS)
def test_an_interrupted_training_ends_with_the_same_bytes_and_rows(shards, whole, tmp_path, item):
    metrics, rows, files = whole[item]
    found = fitted(config(**REGULARISED), shards, item, tmp_path, stop_at=(3, 7, 19))
    assert found[1] == rows
    assert found[0]["steps"] == metrics["steps"]
    assert found[2].keys() == files.keys()
    tensors = found[2]["model.safetensors"]
    for name, tensor in files["model.safetensors"].items():
        assert torch.equal(tensors[name], tensor)


def test_what_is_dropped_is_dropped_again_where_activations_are_made_again(shards, tmp_path):
    files = []
    for again in (False, True):
        cfg = config(models=("dense",), checkpointing=again, dropout=0.4, steps=2, epochs=None)
        files.append(fitted(cfg, shards, "dense", tmp_path / str(again))[2])
    one, other = (each["model.safetensors"] for each in files)
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_validation_ends_each_epoch(whole):
    for item in MODELS:
        valid = [row for (_, kind), row in whole[item][1].items() if kind == "valid"]
        assert [(row["epoch"], row["step"]) for row in valid] == list(enumerate(ENDS[:3], 1))


def test_epochs_have_the_means_of_their_steps(whole):
    _, rows, _ = whole["moe"]
    before = 0
    for end in ENDS[:3]:
        steps = [rows[step, "train"] for step in range(before + 1, end + 1)]
        valid = rows[end, "valid"]
        ce = sum(row["train_nats"] for row in steps) / len(steps)
        aux = sum(row["balance"] for row in steps) / len(steps)
        assert valid["train_ce"] == pytest.approx(ce)
        assert valid["train_aux"] == pytest.approx(aux)
        before = end


def test_the_total_is_smoothed_nats_and_the_weighted_auxiliary_loss(shards, tmp_path):
    cfg = config(label_smoothing=0.2, aux_weight=0.5, steps=1, epochs=None)
    task = family.joint(cfg, shards, "moe")
    model = _model_of(task)
    task.before_step(0)
    ids_BT = task.batch(0, BATCH)
    with torch.no_grad():
        logits_BTV = model.trunk.hidden(ids_BT[:, :-1], model.ffn) @ model.trunk.head.T
    target_N = ids_BT[:, 1:].flatten()
    smoothed = F.cross_entropy(logits_BTV.flatten(0, 1), target_N, label_smoothing=0.2).item()
    plain = F.cross_entropy(logits_BTV.flatten(0, 1), target_N).item()
    aux = model.router.balance_loss().item()
    _, rows, _ = fitted(cfg, shards, "moe", tmp_path)
    told = rows[1, "valid"]
    assert told["train_ce"] == pytest.approx(plain, rel=1e-5)
    assert told["train_aux"] == pytest.approx(aux, rel=1e-5)
    assert told["train_total"] == pytest.approx(smoothed + 0.5 * aux, rel=1e-5)
    assert told["valid_total"] > told["valid_nats"] + 0.5 * told["valid_aux"]


def test_shares_entropy_and_dropped_tokens_stand_by_layer(whole):
    for end in ENDS[:3]:
        layers = whole["moe"][1][end, "valid"]["experts"]["layer"]
        assert list(layers) == ["1"]
        told = layers["1"]
        assert sum(told["shares"]) == pytest.approx(1)
        entropy = -sum(share * math.log(share) for share in told["shares"] if share)
        assert told["entropy"] == pytest.approx(entropy)
        assert 0 <= told["dropped"] < 1
    assert "experts" not in whole["dense"][1][ENDS[0], "valid"]


def test_metrics_of_a_training_have_each_epoch_and_layer(whole):
    for item in MODELS:
        metrics, rows, _ = whole[item]
        # a validation's row comes after that of its step
        ordered = [rows[key] for key in sorted(rows)]
        found = training_metrics("x", "train_joint", item, metrics, ordered)
        assert [point.epoch for point in found.losses] == [1, 2, 3] and found.epochs == 3
        for point, end in zip(found.losses, ENDS[:3], strict=True):
            told = rows[end, "valid"]
            parts = (point.train.total, point.train.ce, point.train.aux)
            assert parts == (told["train_total"], told["train_ce"], told["train_aux"])
            assert point.valid.total == told["valid_total"] and point.valid.aux == told["valid_aux"]
            assert point.temperature == told.get("temperature")
        assert (found.best_step, found.best_nats) == (metrics["kept_step"], metrics["valid_nats"])
        assert found.patience == metrics["patience"] and found.cpu.forward > 0
        layers = [(layer.layer, len(layer.points)) for layer in found.experts]
        assert layers == ([("1", 3)] if item == "moe" else [])


def test_the_temperature_of_each_epoch_is_that_of_the_schedule(whole):
    _, rows, _ = whole["moe"]
    for step in range(1, ENDS[2] + 1):
        passed = (step - 1) * BATCH / WINDOWS  # epochs before this step
        wanted = 2.0 + (1.0 - 2.0) * min(1.0, passed / 2)
        assert rows[step, "train"]["temperature"] == pytest.approx(wanted)
    for end in ENDS[:3]:
        assert rows[end, "valid"]["temperature"] == rows[end, "train"]["temperature"]


def test_patience_counts_epochs_also_over_an_interruption(shards, tmp_path, monkeypatch):
    # A rate of next to nothing, and a validation that is worse each time
    cfg = config(patience=2, epochs=4)
    nats = {7: 3.0, 15: 3.5, 22: 3.4, 29: 3.3}
    real = family.joint

    def worse(*given):
        task = real(*given)
        at = [0]

        def before_step(step):
            at[0] = step + 1
            task.before_step(step)

        return replace(task, validate=lambda: nats[at[0]], before_step=before_step)

    monkeypatch.setattr(family, "joint", worse)
    for stops in ((), (10,), (7, 16)):
        metrics, rows, _ = fitted(cfg, shards, "dense", tmp_path / str(stops), stop_at=stops)
        assert metrics["steps"] == 22 < metrics["planned_steps"] == 29
        assert [step for step, kind in rows if kind == "valid"] == [7, 15, 22]


@pytest.mark.parametrize(("rows", "batch", "epochs"), [(231, 32, 3), (7, 7, 4), (100, 3, 2.5)])
def test_epochs_end_where_their_last_row_is(rows, batch, epochs):
    opts = config(epochs=epochs, batch_sequences=batch).joint
    found = Epochs(opts, 8, 8 * rows)
    assert found.steps == round(epochs * rows / batch)
    ends = [step for step in range(found.steps + 1) if found.ends_at(step)]
    assert ends == [round(e * rows / batch) for e in range(1, int(epochs) + 1)]
    for step in range(1, found.steps + 1):
        over = sum(end < step for end in ends)
        assert found.at(step) == over + 1


def test_a_mixtures_settings_are_in_no_dense_models_address():
    cfg, other = config(), config(layers="all", experts=5, top_k=2, aux_weight=0, epochs=3)
    for item, same in (("dense", True), ("moe", False)):
        one, two = (each.content("train_joint", item) for each in (cfg, other))
        assert (one == two) == same
    assert config(dropout=0.5).content("train_joint", "dense") != cfg.content(
        "train_joint", "dense"
    )
    assert cfg.needs("train_joint", "moe") == [
        ("tokenizer", None),
        *(("preprocess", name) for name in small.DOMAINS),
    ]


def test_without_models_there_is_no_job():
    assert small.config().items("train_joint") == ()
    assert ("train_joint", "moe") in config().needs("evaluate", None)


@pytest.mark.parametrize(
    ("joint", "sentence"),
    [
        ({"top_k": 4}, "a mixture has 3"),
        ({"layers": (2,)}, "joint.layers: there is no layer 2"),
        ({"layers": (1, 0)}, "the lowest first"),
        ({"models": ("moe", "moe")}, "named twice"),
        ({"domains": ("delta",)}, "joint.domains: no such domain"),
        ({"checkpointing": True}, "leave it out"),
        ({"epochs": None}, "joint: give one of"),
    ],
)
def test_what_cannot_be_trained_is_refused(joint, sentence):
    with pytest.raises(ValidationError, match=sentence):
        config(**joint)


def test_a_pretrained_trunk_gives_no_sizes(tmp_path):
    with pytest.raises(ValidationError, match=r"joint\.models: they train from zero"):
        small.config(joint__models=MODELS, trunk__init=str(tmp_path), dense__baselines=())


def test_without_a_row_there_are_no_means_of_rows():
    sums = TrainingSums(None, "cpu")
    assert sums.told() == {}
    sums.add_pass(2, torch.tensor(3.0), torch.tensor(2.0), torch.tensor(1.0))
    assert sums.told() == {"train_total": 3.0, "train_ce": 2.0, "train_aux": 1.0}
    assert sums.told() == {}


def test_an_expert_that_no_token_reaches_is_told_and_no_error(shards, tmp_path, monkeypatch):
    cfg = config(steps=1, epochs=None, weight_decay=0.0, aux_weight=0.0)
    real, made = family.joint, []

    def starved(*given):
        task = real(*given)
        [gate] = _model_of(task).router.gates
        with torch.no_grad():
            # The larger of a number and its negative is above zero
            gate[1] = -gate[0]
            gate[2] = 0
        made.append({name: tensor.detach().clone() for name, tensor in task.parameters.items()})
        return task

    monkeypatch.setattr(family, "joint", starved)
    _, rows, files = fitted(cfg, shards, "moe", tmp_path)
    shares = rows[1, "valid"]["experts"]["layer"]["1"]["shares"]
    assert shares[2] == 0 < min(shares[:2])
    for name, tensor in files["model.safetensors"].items():
        rests = ".experts.2." in name
        assert torch.equal(tensor, made[0][name]) == rests


@pytest.mark.parametrize("item", MODELS)
def test_the_plan_counts_what_is_trained(shards, item):
    cfg = config(layers=(0, 1), top_k=2)
    tokens = {name: shards_tokens(shards, name) for name in small.DOMAINS}
    task = family.joint(cfg, shards, item)
    found = joint_cost(cfg, TRAINING, item, tokens, bf16=False)
    assert found.tokens == task.steps * BATCH * small.CONTEXT
    # The vocabulary of these shards is smaller than the settings say, and small norms are left out
    more = (cfg.tokenizer.vocab_size - small.VOCAB) * cfg.trunk.d_model
    trained = sum(parameter.numel() for parameter in task.parameters.values())
    assert found.parameters - more == pytest.approx(trained, rel=0.02)
    assert found.flops > found.tokens * task.flops_per_token
    assert joint_cost(cfg, TRAINING, item, None, bf16=False).tokens is None


def shards_tokens(parts, name: str) -> int:
    return shards_of(parts, [name]).tokens("train", name)


def test_a_budget_holds_or_is_refused(shards):
    cfg = config()
    needed = joint_cost(cfg, TRAINING, "moe", None, bf16=False).peak_bytes
    kept = small.config(joint=cfg.joint.model_dump(), runtime={"memory_budget": needed})
    plan = family.joint(kept, shards, "moe").memory_plan
    # A mixture's batch is never cut in pieces to fit: balance and capacity are of all of it
    assert (plan.micro_batch_sequences, plan.whole_batch) == (BATCH, True)
    tight = small.config(joint=cfg.joint.model_dump(), runtime={"memory_budget": "1MB"})
    with pytest.raises(BudgetError, match=r"train_joint-moe does not fit .* smallest that works"):
        joint_cost(tight, TRAINING, "moe", None, bf16=False)


def test_reports_show_joint_models_beside_the_stack(tmp_path):
    parts = small.trained(tmp_path / "run")
    cfg = config(steps=2, epochs=None, top_k=2)
    parts = FolderParts(cfg, parts.root, parts.metrics)
    for item in MODELS:
        small.train(cfg, parts, "train_joint", item)
    report = evaluate.tables(cfg, parts, quiet)
    rows = {row.name: row for row in report.quality}
    dense, moe = rows["joint dense"], rows["joint moe top-2"]
    network = 3 * cfg.trunk.d_model * cfg.trunk.d_ff
    assert moe.active_parameters - dense.active_parameters == network
    assert moe.total_parameters - dense.total_parameters == 2 * network
    assert dense.train_tokens == moe.train_tokens == 2 * BATCH * small.CONTEXT
    assert {"joint dense", "joint moe top-2"} <= {win.against for win in report.wins}
    assert "primary, joint dense" in {each.name for each in report.criteria}
    assert {"train_joint dense", "train_joint moe"} <= {speed.job for speed in report.speed}


def test_in_bf16_gates_stay_exact_and_a_resume_is_the_same(shards, tmp_path):
    own = config(steps=4, epochs=None, dropout=0.1).joint.model_dump()
    cfg = small.config(joint=own, dtype="bf16")
    task = family.joint(cfg, shards, "moe")
    exact = set(task.parameters) - set(task.bf16_params)
    assert exact == {"model.layers.1.mlp.gate.weight"}
    _, rows, files = fitted(cfg, shards, "moe", tmp_path / "whole")
    found = fitted(cfg, shards, "moe", tmp_path / "parts", stop_at=(2,))
    assert found[1] == rows
    stored = found[2]["model.safetensors"]
    for name, tensor in files["model.safetensors"].items():
        assert torch.equal(stored[name], tensor)
