"""Experts that are deltas, and experts in chosen layers: trained, joined, measured, as the settings
say.

B sequences, T tokens, L layers, E experts.
"""

from dataclasses import replace

import pytest
import torch
from fakes import Killed, dying, equal, train_io, values

from pipeline.families.ffn_moe import cost, evaluate
from pipeline.families.ffn_moe import train as ffn_moe
from pipeline.families.ffn_moe.parts import stored_trunk
from pipeline.families.ffn_moe.stack import assemble
from pipeline.model.low_rank import LowRankExpert
from pipeline.protocols import quiet
from pipeline.train import loop
from pipeline.train.flops import ExpertShape, Shape
from pipeline.train.memory_plan import FAST_TOKENS, LEAN_TOKENS, MemoryPlan
from tests import small

FORMS = {
    "low rank": {"expert__form": "low_rank", "expert__rank": 3},
    "low rank, last layer, anchor": {
        "expert__form": "low_rank",
        "expert__layers": "last:1",
        "trunk__anchor": "keep",
    },
    "full, first layer": {"expert__layers": [0]},
}


@pytest.fixture(scope="module", params=FORMS)
def made(request, tmp_path_factory):
    """A whole small run of one form."""
    cfg = small.config(**FORMS[request.param])
    return small.run(cfg, tmp_path_factory.mktemp("forms") / "run")


def layers_of(cfg) -> tuple[int, ...]:
    """Return the layers with experts of a small run."""
    return {"all": (0, 1), "last:1": (1,)}.get(cfg.expert.layers, cfg.expert.layers)


def test_an_expert_is_what_its_form_holds_in_its_layers_alone(made):
    layers = layers_of(made.cfg)
    low_rank = made.cfg.expert.form == "low_rank"
    ends = ("lora_A.weight", "lora_B.weight") if low_rank else ("weight",)
    names = [
        f"model.layers.{i}.mlp.{p}_proj.{end}"
        for i in layers
        for p in ("gate", "up", "down")
        for end in ends
    ]
    stored = made.tensors("train_experts", "expert.safetensors", "beta")
    assert sorted(stored) == sorted(names)
    assert all(t.dtype == torch.float32 and t.any() for t in stored.values())
    if low_rank:
        assert len(stored["model.layers.1.mlp.up_proj.lora_A.weight"]) == (
            made.cfg.expert.rank or 16
        )
    assert made.metrics["train_experts", "beta"]["parameters"] == sum(
        t.numel() for t in stored.values()
    )
    gates = made.tensors("train_router", "router.safetensors")
    assert sorted(gates) == [f"model.layers.{i}.mlp.gate.weight" for i in layers]
    statistics = made.tensors("train_experts", "statistics.safetensors", "beta")
    assert statistics["sum"].shape == (len(layers), made.cfg.trunk.d_model)
    assert statistics["tokens"].item() == 256
    everywhere = made.tensors("train_shared", "statistics.safetensors")
    assert everywhere["sum"].shape == (2, made.cfg.trunk.d_model)


def test_the_stack_is_the_mixture_of_the_merged_experts(made):
    is_the_mixture_of_the_merged_experts(made)


def is_the_mixture_of_the_merged_experts(made) -> None:
    """Written out for one layer after another: every expert on every token, weighed by its gate."""
    stack = assemble(made.cfg, made)
    layers = layers_of(made.cfg)
    experts = []
    for each in stack.experts.values():
        experts.append(each.merged() if isinstance(each, LowRankExpert) else each)
    gates = made.tensors("train_router", "router.safetensors")
    _, dummy = stored_trunk(made.cfg, made)

    def written_out(layer, x_BTD):
        if layer not in layers:
            return dummy(layer, x_BTD)
        logits_BTE = x_BTD @ gates[f"model.layers.{layer}.mlp.gate.weight"].T
        chosen = logits_BTE.topk(made.cfg.router.top_k)
        weight_BTE = torch.zeros_like(logits_BTE)
        weight_BTE.scatter_(-1, chosen.indices, chosen.values.softmax(-1))
        y_EBTD = torch.stack([expert(layer, x_BTD) for expert in experts])
        return (y_EBTD * weight_BTE.movedim(-1, 0).unsqueeze(-1)).sum(0)

    ids_BT = torch.randint(40, (4, 8), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = stack.trunk.hidden(ids_BT, stack.mixture)
        wanted = stack.trunk.hidden(ids_BT, written_out)
        apart = stack.trunk.hidden(ids_BT, dummy)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert (found - apart).abs().max() > 1e-3


def test_a_report_measures_it_in_its_layers(made):
    report = evaluate.tables(made.cfg, made, quiet)
    assert [layer.layer for layer in report.routing.layers] == list(layers_of(made.cfg))
    stored = made.path("train_experts", "beta") / "expert.safetensors"
    assert report.model.expert_bytes == stored.stat().st_size
    rows = {row.name: row for row in report.quality}
    assert len({rows[name].mean for name in ("alpha", "beta", "gamma", "weight soup")}) == 4


def test_a_killed_training_ends_the_same_bit_for_bit(made, tmp_path):
    for make, item in ((ffn_moe.expert, ("alpha",)), (ffn_moe.router, ())):
        whole = make(made.cfg, made, *item)
        loop.fit(whole, train_io(tmp_path / f"{make.__name__} whole"))
        folder = tmp_path / make.__name__
        with pytest.raises(Killed):
            loop.fit(dying(make(made.cfg, made, *item), 2), train_io(folder))
        again = make(made.cfg, made, *item)
        torch.manual_seed(77)
        loop.fit(again, train_io(folder))
        assert equal(values(again), values(whole))


def test_coordinated_deltas_join_by_the_rows_that_they_learned(tmp_path):
    """A whole run: deltas beside the dummy under a gate each, then those gates' rows together."""
    cfg = small.config(
        expert__form="low_rank",
        expert__rank=3,
        expert__coordinate=True,
        router__init="rows",
        router__steps=0,
        trunk__anchor="keep",
    )
    parts = small.run(cfg, tmp_path / "run")
    stored = parts.tensors("train_experts", "expert.safetensors", "beta")
    assert all("lora_" in name and tensor.any() for name, tensor in stored.items())
    rows = [parts.tensors("train_experts", "gate.safetensors", name)["row"] for name in cfg.experts]
    gates = parts.tensors("train_router", "router.safetensors")
    for layer in (0, 1):
        wanted_ED = torch.stack([torch.zeros(16), *(row_LD[layer] for row_LD in rows)])
        torch.testing.assert_close(gates[f"model.layers.{layer}.mlp.gate.weight"], wanted_ED)
    is_the_mixture_of_the_merged_experts(parts)
    quality = {row.name: row.mean for row in evaluate.tables(cfg, parts, quiet).quality}
    assert len({quality[name] for name in ("trunk + dummy", "alpha", "beta", "gamma")}) == 4
    folder = tmp_path / "again"
    with pytest.raises(Killed):
        loop.fit(dying(ffn_moe.expert(cfg, parts, "beta"), 2), train_io(folder))
    again = ffn_moe.expert(cfg, parts, "beta")
    loop.fit(again, train_io(folder))
    assert all(torch.equal(values(again)[name], tensor) for name, tensor in stored.items())


def test_deltas_stay_fp32_in_a_bf16_training_over_a_rounded_base(tmp_path):
    cfg = small.config(dtype="bf16", expert__form="low_rank", trunk__anchor="keep")
    parts = small.run(cfg, tmp_path / "run")
    task = ffn_moe.expert(cfg, parts, "alpha")
    assert task.bf16 and not task.bf16_params
    assert task.zero_first_gradient == tuple(n for n in task.parameters if "lora_A" in n)
    # one step moves them all but what a zero multiplies, and that is no fault
    one = small.config(
        dtype="bf16", expert__form="low_rank", expert__steps=1, expert__weight_decay=0.0
    )
    moved = ffn_moe.expert(one, parts, "alpha")
    before = values(moved)
    loop.fit(moved, train_io(tmp_path / "one"))
    still = [name for name, value in values(moved).items() if torch.equal(value, before[name])]
    assert still == [name for name in before if "lora_A" in name]


def test_layers_below_the_first_expert_keep_nothing_for_a_backward_pass(tmp_path):
    cfg = small.config(trunk__layers=3, expert__form="low_rank", expert__layers=[2])
    parts = small.FolderParts(cfg, tmp_path / "run")
    small.write_shards(tmp_path / "run", cfg.partition.names)
    small.train(cfg, parts, "train_shared")
    kept = {}
    for layers in ("all", "last:1"):
        own = small.config(trunk__layers=3, expert__form="low_rank", expert__layers=layers)
        task = ffn_moe.expert(own, parts, "alpha")
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t
        ):
            task.loss(task.batch(0, 4)).backward()
        kept[layers] = sum(sizes)
    # of three layers one is kept; what is left is its share, and the loss
    assert kept["last:1"] < 0.5 * kept["all"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"expert__layers": "last:3"},
            "expert.layers: last:3 are more layers than the trunk has, 2",
        ),
        (
            {"expert__layers": [2]},
            "expert.layers: there is no layer 2; the trunk has layers 0 to 1",
        ),
        ({"expert__layers": [1, 0]}, "each once, the lowest first"),
        ({"expert__layers": []}, "must name at least one layer"),
        ({"expert__rank": 4}, "rank is of low-rank experts and adapters; set form: low_rank"),
        ({"expert__alpha": 4.0}, "alpha is of low-rank experts and adapters; set form: low_rank"),
        ({"expert__form": "low_rank", "expert__init": "fresh"}, "set form: full or init: trunk"),
        ({"expert__coordinate": True, "expert__layers": [1]}, "set layers: all"),
    ],
)
def test_what_no_form_has_is_refused_in_a_sentence(changes, told):
    with pytest.raises(ValueError, match=told):
        small.config(**changes)


def test_rank_and_alpha_have_defaults_of_each_other():
    expert = small.config(expert__form="low_rank").expert
    assert (expert.delta_rank, expert.delta_scale) == (16, 2.0)
    expert = small.config(expert__form="low_rank", expert__rank=4, expert__alpha=2.0).expert
    assert (expert.delta_rank, expert.delta_scale) == (4, 0.5)
    assert small.config().expert.delta_rank == 0


def test_plan_and_report_count_what_is_trained_and_what_runs(made):
    """Parameters and operations of each form, held against the tensors themselves."""
    cfg = made.cfg
    stored = made.tensors("train_experts", "expert.safetensors", "beta")
    own = sum(t.numel() for t in stored.values())
    planned = cost.cost(cfg, "train_experts", "beta", None, False)
    assert planned.parameters == own
    gates = made.tensors("train_router", "router.safetensors")
    assert cost.cost(cfg, "train_router", None, None, False).parameters == sum(
        t.numel() for t in gates.values()
    )
    dummy = made.tensors("train_shared", "dummy.safetensors")
    trunk, _ = stored_trunk(cfg, made)
    shape = Shape.from_hf_config(trunk.config.to_dict(), small.CONTEXT)
    whole = sum(t.numel() for t in dummy.values())
    low_rank = cfg.expert.form == "low_rank"
    # one base for all experts: below deltas all of it, else in the layers without experts
    shared = whole if low_rank else whole - own
    expert = cost.expert_shape(cfg, shape)
    for count in (1, 2, 3):
        found = shape.stack_parameters(shape.ffns(count, expert))
        assert found == shape.trunk_parameters + shared + count * own
    rows = {row.name: row for row in evaluate.tables(cfg, made, quiet).quality}
    assert rows["trunk + dummy"].active_parameters == shape.trunk_parameters + whole
    assert rows["weight soup"].active_parameters == shape.trunk_parameters + whole
    assert rows["beta"].active_parameters == shape.trunk_parameters + shared + own
    assert rows["oracle expert"].total_parameters == shape.trunk_parameters + shared + 3 * own
    # less than a full expert's: no gradient of frozen weights, nothing below the first layer
    task = ffn_moe.expert(cfg, made, "beta")
    assert task.flops_per_token == shape.train_flops_per_token("expert", expert)
    if low_rank and cfg.expert.layers == "last:1":
        below = shape.train_flops_per_token("expert", replace(expert, layers=(0,)))
        assert task.flops_per_token < below < shape.train_flops_per_token("ffn") * 1.5
    # gates choose between what these experts add, and have no backward pass below the lowest
    forward = shape.forward_flops_per_token(shape.ffns(cfg.router.top_k, expert))
    gates = ffn_moe.router(cfg, made).flops_per_token
    assert forward < gates <= 2 * forward
    assert (gates == 2 * forward) == (min(expert.layers) == 0)
    assert gates < shape.train_flops_per_token("gates", None, cfg.router.top_k)


def test_gates_over_one_expert_a_token_cost_less_than_over_two():
    shape = Shape(30, 576, 576, 192, 1536, 49_152, 256)
    one, two = (shape.train_flops_per_token("gates", active=count) for count in (1, 2))
    # a whole network more runs in each layer, forwards and backwards
    assert two - one == 2 * 2 * shape.ffn_parameters


def test_deltas_and_few_layers_are_predicted_to_take_less_memory():
    shape = Shape(30, 576, 576, 192, 1536, 49_152, 256)
    plan = MemoryPlan(micro_batch_sequences=4)
    every = tuple(range(30))

    def peak(expert, trains="expert"):
        return cost.peak_bytes(shape, trains, plan, True, 3, 2, 0, expert, 2)

    full = peak(None, "ffn")
    deltas = peak(ExpertShape(every, 64))
    assert deltas < 0.6 * full
    assert peak(ExpertShape(every, 16)) < deltas
    last = peak(ExpertShape(every[20:], 64))
    # of the activations two thirds are not kept
    kept = shape.layer_activations("expert", in_blocks=True) * 20 * 1024 * 2
    assert deltas - last > 0.9 * kept
    assert peak(ExpertShape(every[20:])) < 0.6 * full


@pytest.mark.parametrize(
    ("form", "trains", "tokens"),
    [
        ("full", "ffn", FAST_TOKENS),
        ("low_rank", "expert", LEAN_TOKENS),
        ("adapter", "adapter", LEAN_TOKENS),
    ],
)
def test_what_trains_few_numbers_has_fewer_tokens_in_a_pass(form, trains, tokens):
    cfg = small.config(expert={"batch_sequences": 600})
    opts = cfg.expert.model_copy(update={"form": form})
    cfg = cfg.model_copy(update={"expert": opts})
    shape = Shape.from_config(cfg.trunk, cfg.tokenizer.vocab_size)
    plan = cost.memory_plan(cfg, cfg.expert, shape, trains, True)
    assert plan.micro_batch_sequences == tokens // small.CONTEXT
