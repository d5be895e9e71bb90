"""Every setting of a lora_vlm run does something: changing it changes what a stage leaves behind,
or it is refused.

EFFECTS and SHOWN list all of them, and a setting that is not listed fails. A stage's product is
compared with that of the same configuration before the change; the same configuration twice gives
the same product.
"""

from pathlib import Path

import lora_small
import pytest
import small_tasks
from fakes import FolderParts
from pydantic import ValidationError

from pipeline.families.adapters.stack import ROUTER
from pipeline.families.ffn_moe.config import FfnMoeConfig
from pipeline.families.lora_vlm import family
from pipeline.families.lora_vlm.config import LoraVlmConfig, VlmAdapterConfig
from pipeline.protocols import quiet
from tests import small_stack
from tests.small_settings import JSONL, NOBODY, OTHERS, PRODUCTS, product, run_of, written
from tests.test_settings import ON_MODAL, settings

TESTS = Path(__file__).parent
PLACES = {  # where a section is changed, in the runs below
    "vlmbase": "loras.base",
    "imagelimits": "loras.base.image",
    "vlmbuild": "loras.base.build",
    "vlmadapter": "loras.defaults",
    "vlmrouter": "loras.router",
    "vlmexpert": "loras.experts.color",
    "taskdata": "loras.experts.color.dataset",
    "synthetic": "loras.experts.color.dataset.synthetic",
    "routingset": "dataset",
    "splitshares": "dataset.splits",
    "splitrows": "dataset.per_expert",
    "wording": "dataset.neutral",
    "dedupe": "dataset.dedupe",
    "routinglimits": "dataset.limits",
    "adapterevaluate": "evaluate",
}
# The training lets every evaluation be worse than the last
WORSE = {"loras.defaults.eval_every_steps": 1}
READ = {"loras.experts.color.dataset": {"source": "jsonl", "path": "rows/rows.jsonl"}}
FOLDER = {"loras.experts.color.dataset": {"source": "jsonl", "path": "rows", "train": "rows.jsonl"}}
DIVIDED = {
    "loras.experts.color.dataset": {"source": "jsonl", "path": "rows", "split": "rows.jsonl"}
}
OCR = {"loras.experts.color.dataset": {"source": "jsonl", "path": "rows/rows.jsonl", "ocr": True}}
CUT = {"loras.experts.color.dataset": OCR["loras.experts.color.dataset"] | {"regions": True}}
SIGHTED = {"loras.defaults.targets": r".*\.(q_proj|qkv)", "loras.defaults.allow_vision": True}
UNSURE = {"loras.router.threshold": 1.0}

# setting: (stage whose product changes, another value, changes that both sides have)
EFFECTS = {
    "name": ("deploy", "other", {}),
    "seed": ("train_experts", 4, {}),
    "dtype": ("train_experts", "bf16", {}),
    "vlmbase.dtype": ("train_shared", "bfloat16", {}),
    "vlmbase.attn": ("train_experts", "eager", {}),
    "vlmbase.image": ("train_shared", {"max_pixels": 8192}, {}),
    "vlmbase.build": ("train_shared", {"layers": 1}, {}),
    "imagelimits.min_pixels": ("preprocess", 9216, {}),
    "imagelimits.max_pixels": ("preprocess", 2048, {"loras.base.image.min_pixels": 1024}),
    **{
        f"vlmbuild.{name}": ("train_shared", value, {})
        for name, value in (
            ("hidden", 32),
            ("layers", 1),
            ("heads", 2),
            ("kv_heads", 1),
            ("head_dim", 8),
            ("intermediate", 64),
            ("vision_hidden", 16),
            ("vision_layers", 1),
            ("vision_heads", 1),
            ("vision_intermediate", 32),
            ("vocab_size", 320),
            ("initializer_range", 0.5),
            ("text", ["Quite another text"] * 9),
            ("seed", 1),
        )
    },
    **{
        f"vlmadapter.{name}": ("train_experts", value, base)
        for name, value, base in (
            ("steps", 2, {}),
            ("epochs", 0.5, {}),
            ("tokens", 300, {}),
            ("batch_sequences", 3, {}),
            ("micro_batch_sequences", 1, {}),
            ("moments", "bf16", {}),
            ("gradients", "bf16", {}),
            ("lr", 2e-2, {}),
            ("min_lr_share", 0.9, {}),
            ("warmup_steps", 3, {}),
            ("schedule", "constant", {}),
            ("weight_decay", 0.9, {}),
            ("beta2", 0.5, {}),
            ("clip_norm", 1e-9, {}),
            ("eval_every_steps", 3, {}),
            ("eval_tokens", 60, {}),
            ("patience", 1, WORSE),
            ("keep", "last", WORSE),
            ("r", 1, {}),
            ("alpha", 99.0, {}),
            ("dropout", 0.5, {}),
            ("targets", r".*language_model.*\.q_proj", {}),
            ("allow_vision", False, SIGHTED),
            ("max_tokens", 31, {"loras.defaults.neutral_share": 0.0}),
            ("neutral_share", 1.0, {}),
        )
    },
    "vlmrouter.none_label": ("train_router of nobody's", "Y", {}),
    "vlmrouter.instruction": ("train_router", "Who?", {}),
    "vlmrouter.top_k": ("answers", 1, UNSURE),
    "vlmrouter.threshold": ("answers", 1.0, {}),
    "vlmrouter.fallback": ("answers", "color", {}),
    "vlmexpert.label": ("train_router", "C", {}),
    "vlmexpert.task": ("deploy", "naming", {}),
    "vlmexpert.description": ("deploy", "Names a color", {}),
    "vlmexpert.dataset": ("preprocess", READ["loras.experts.color.dataset"], {}),
    "vlmexpert.prompt": ("preprocess", "Say: {prompt}", {}),
    "vlmexpert.answer": ("preprocess", "It is {answer}", {}),
    "vlmexpert.metric": ("evaluate", "cer", {}),
    "vlmexpert.max_new_tokens": ("answers", 1, UNSURE),
    "taskdata.source": ("preprocess", "folder", DIVIDED),
    "taskdata.path": ("preprocess", "rows/more.jsonl", READ),
    "taskdata.split": ("preprocess", "more.jsonl", DIVIDED),
    "taskdata.train": ("preprocess", "more.jsonl", FOLDER),
    "taskdata.valid": ("preprocess", "held.jsonl", FOLDER),
    "taskdata.test": ("preprocess", "held.jsonl", FOLDER),
    "taskdata.valid_share": ("preprocess", 0.4, READ),
    "taskdata.test_share": ("preprocess", 0.4, READ),
    "taskdata.image_root": ("preprocess", "elsewhere", READ),
    "taskdata.image_field": ("preprocess", "other", READ),
    "taskdata.fields": ("preprocess", {"prompt": "ask"}, READ),
    "taskdata.pictures": ("preprocess", "none", READ),
    "taskdata.synthetic": ("preprocess", {"kind": "shape"}, {}),
    "taskdata.ocr": ("preprocess", True, READ),
    "taskdata.regions": ("preprocess", True, OCR),
    "taskdata.region_padding": ("preprocess", 1.0, CUT),
    "taskdata.box_format": ("preprocess", "xywh", READ),
    "taskdata.max_answer_chars": ("preprocess", 40, READ),
    "taskdata.max_bad_share": ("preprocess", 0.01, READ),
    "taskdata.limit": ("preprocess", 20, READ),
    "synthetic.kind": ("preprocess", "count", {}),
    "synthetic.train": ("preprocess", 20, {}),
    "synthetic.valid": ("preprocess", 4, {}),
    "synthetic.test": ("preprocess", 4, {}),
    "synthetic.size_px": ("preprocess", 96, {}),
    "synthetic.seed": ("preprocess", 1, {}),
    "routingset.seed": ("routing", 1, {}),
    "routingset.splits": ("routing", {"train": 0.6, "valid": 0.2, "test": 0.2}, {}),
    "routingset.split_by": ("routing", "id", {}),
    "routingset.per_expert": ("routing", {"train": 9}, {}),
    "routingset.balance": ("routing", "natural", {}),
    "routingset.short": ("routing", "upsample", {"dataset.per_expert.train": 90}),
    "routingset.sources": ("routing", OTHERS, {}),
    "routingset.paraphrases": ("routing", {"dots": {"seen": ["How many?"]}}, {}),
    "routingset.neutral": ("routing", {"seen": ["Well?"]}, {}),
    "routingset.ambiguous_share": ("routing", 0.9, {}),
    "routingset.dedupe": ("routing", {"prompt": "off"}, {}),
    "routingset.limits": ("routing", {"max_images": 1}, {}),
    "routingsource.expert": ("routing", "dots", {}),
    "routingsource.origin": ("routing", "loras", {"dataset.sources": [OTHERS[0], JSONL]}),
    "routingsource.path": ("routing", "routed/more.jsonl", {}),
    "routingsource.image_root": ("routing", "elsewhere", {}),
    "routingsource.image_field": ("routing", "other", {}),
    "routingsource.fields": ("routing", {"prompt": "ask"}, {}),
    "routingsource.weight": ("routing", 5.0, {}),
    "routingsource.per_split": ("routing", {"train": 3, "valid": 1, "test": 1}, {}),
    "routingsource.synthetic": ("preprocess of nobody's", NOBODY["synthetic"] | {"seed": 1}, {}),
    "splitshares.train": ("routing", {"train": 0.6, "valid": 0.3}, {}),
    "splitshares.valid": ("routing", {"valid": 0.3, "test": 0.1, "train": 0.6}, {}),
    "splitshares.test": ("routing", {"test": 0.3, "train": 0.6}, {}),
    "splitrows.train": ("routing", 9, {}),
    "splitrows.valid": ("routing", 2, {}),
    "splitrows.test": ("routing", 2, {}),
    "wording.seen": ("routing", ["Well?"], {}),
    "wording.held": (
        "routing",
        ["Well?"],
        {"dataset.paraphrases": {"dots": {"held": ["How many?"]}}},
    ),
    "dedupe.image": ("routing", "off", {"dataset.dedupe.prompt": "off"}),
    "dedupe.prompt": ("routing", "exact", {}),
    "routinglimits.max_images": ("routing", 1, {}),
    "routinglimits.max_prompt_chars": ("routing", 30, {}),
    # over as many requests as an interval needs
    "adapterevaluate.bootstrap": ("evaluate", 10, {"evaluate.smoke_rows": 30}),
    "adapterevaluate.rows_per_task": ("rows of the report", 9, {"evaluate.smoke": False}),
    "adapterevaluate.baseline_rows": ("rows of the report", 8, {"evaluate.smoke_rows": 3}),
    "adapterevaluate.smoke": ("rows of the report", False, {}),
    "adapterevaluate.smoke_rows": ("rows of the report", 3, {}),
    "adapterevaluate.consistency_rows": ("routing of the report", 1, {}),
    "adapterevaluate.thresholds": ("routing of the report", [0.5], {}),
    "adapterevaluate.min_expert_score": ("criteria of the report", 0.5, {}),
    "adapterevaluate.min_router_accuracy": ("criteria of the report", 0.5, {}),
    "adapterevaluate.oracle_gap": ("criteria of the report", 0.5, {}),
}
IN_CONFIG = "test_lora_vlm_config.py::"
HERE = "test_lora_vlm_settings.py::"
SHOWN = {  # settings whose effect is not in a product: the test that shows it
    "family": IN_CONFIG + "test_a_family_that_there_is_not",
    "vlmadapters.base": IN_CONFIG
    + "test_the_real_configuration_is_of_seven_experts_over_a_pinned_base",
    "vlmadapters.defaults": IN_CONFIG
    + "test_experts_and_router_have_of_the_defaults_what_they_do_not_state",
    "vlmadapters.experts": IN_CONFIG + "test_jobs_and_what_they_read",
    "vlmadapters.router": IN_CONFIG
    + "test_experts_and_router_have_of_the_defaults_what_they_do_not_state",
    "vlmexpert.imported": "test_foreign_adapters_vlm.py::"
    "test_what_peft_saved_is_an_expert_and_answers_in_the_stack",
    "vlmexpert.imported_bytes": "test_foreign_adapters_vlm.py::"
    "test_a_plan_looks_before_anything_is_made",
    "vlmexpert.imported_slack": "test_foreign_adapters_vlm.py::"
    "test_a_rank_that_is_not_served_is_filled_up_and_the_tower_needs_leave",
    "vlmexpert.overrides": IN_CONFIG + "test_an_override_reaches_an_expert_by_its_name",
    "vlmexpert.name": IN_CONFIG + "test_jobs_and_what_they_read",
    "vlmbase.model": "test_lora_vlm_base.py::test_a_folder_is_pinned_by_its_files_wherever_it_lies",
    "vlmbase.revision": "test_lora_vlm_base.py::"
    "test_a_hub_model_is_fetched_at_its_commit_without_pickles",
    "taskdata.id": HERE + "test_a_data_set_is_asked_of_the_hub_as_it_is_named",
    "taskdata.revision": HERE + "test_a_data_set_is_asked_of_the_hub_as_it_is_named",
    "taskdata.subset": HERE + "test_a_data_set_is_asked_of_the_hub_as_it_is_named",
    "taskdata.allow_fewer_rows": "test_task_sources.py::"
    "test_a_split_of_the_hub_with_fewer_rows_than_it_says_is_refused",
    "taskdata.near_duplicates": "test_near_duplicates.py::"
    "test_copies_are_in_one_split_or_dropped_from_the_laxer_or_told",
    "taskdata.box_units": "test_box_formats.py::test_a_box_is_the_same_however_it_is_written",
    "taskdata.class_names": "test_box_formats.py::test_a_box_is_the_same_however_it_is_written",
    "taskdata.markup": "test_conventions.py::"
    "test_special_tokens_of_other_formats_are_refused_or_declared_text",
    "taskdata.frames": "test_frames_and_tones.py::"
    "test_rows_with_several_frames_are_counted_and_the_setting_is_named",
    "taskdata.turns": "test_layouts.py::test_a_chat_of_several_is_none_the_first_or_each",
    "taskdata.rows_field": "test_layouts.py::test_several_lists_of_rows_ask_which",
    "routingset.max_bad_share": "test_routing_rows.py::"
    "test_more_bad_rows_than_a_source_may_have_stop_the_merge",
    "vlmadapter.checkpointing": HERE + "test_a_memory_plan_reaches_its_training",
    "vlmadapter.fuse_optimizer": HERE + "test_a_memory_plan_reaches_its_training",
    "vlmadapter.compile": HERE + "test_what_an_adapter_cannot_have_is_refused",
    "vlmrouter.compile": HERE + "test_what_an_adapter_cannot_have_is_refused",
    "vlmrouter.name": HERE + "test_what_an_adapter_cannot_have_is_refused",
    **{
        f"vlmrouter.{name}": HERE + "test_the_routers_options_are_those_of_its_training"
        for name in VlmAdapterConfig.model_fields
        if name != "compile"
    },
    "adapterevaluate.samples": "test_adapters_evaluate.py::"
    "test_some_requests_are_shown_with_their_pictures_and_answers",
    "adapterevaluate.batch_rows": HERE + "test_rows_of_a_forward_pass_are_those_of_the_setting",
}


def own_settings() -> set[str]:
    """Return the settings that only this family has, and those at the top, which mean something in
    every family."""
    found = {name for name in settings(LoraVlmConfig) if name.partition(".")[0] not in ON_MODAL}
    return {name for name in found if "." not in name or name not in settings(FfnMoeConfig)}


def test_every_setting_is_listed_once():
    assert sorted(own_settings()) == sorted([*EFFECTS, *SHOWN])


def test_the_tests_that_show_a_setting_exist():
    for place in SHOWN.values():
        file, test = place.split("::")
        assert f"def {test}(" in (TESTS / file).read_text("utf-8"), place


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of what stages read."""
    return written(tmp_path_factory.mktemp("settings"))


PRODUCED: dict[tuple, str] = {}  # the unchanged side, once per stage and base


def _change(dotted: str, value) -> dict:
    section, _, name = dotted.rpartition(".")
    if section == "routingsource":
        changed = (NOBODY if name == "synthetic" else JSONL) | {
            {"origin": "from"}.get(name, name): value
        }
        return {"dataset.sources": [*(OTHERS[:1] if name == "origin" else OTHERS), changed]}
    if section == "splitshares":
        return {PLACES[section]: value}
    return {f"{PLACES[section]}.{name}" if section else name: value}


@pytest.mark.parametrize("dotted", EFFECTS)
def test_changing_a_setting_changes_the_product(dotted, made, tmp_path):
    stage, value, base = EFFECTS[dotted]
    key = (stage, repr(base))
    if key not in PRODUCED:
        PRODUCED[key] = product(made, stage, tmp_path / "unchanged", base)
        assert ": " not in PRODUCED[key], PRODUCED[key]
    changed = product(made, stage, tmp_path / "changed", base, _change(dotted, value))
    assert changed != PRODUCED[key]
    assert (": " in changed) == (dotted in REFUSED), changed


REFUSED = {"taskdata.max_bad_share", "vlmadapter.allow_vision"}  # whose other value is an error


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("stage", "change"),
    [
        ("train_experts", {"loras.defaults.checkpointing": True}),
        ("train_router", {"loras.defaults.checkpointing": True}),
        ("train_experts", {"loras.experts.color.label": "C"}),
        ("train_router", {"loras.router.neutral_share": 1.0}),
    ],
    ids=str,
)
def test_what_cannot_change_a_result_is_not_in_its_address(stage, change, dtype, made, tmp_path):
    """With random numbers drawn on the way, which a pass that is made twice has to draw alike."""
    same = {"dtype": dtype, "loras.defaults.dropout": 0.3, "loras.defaults.steps": 2}
    raw, first, _ = PRODUCTS[stage]
    item = "color" if stage == "train_experts" else None
    one, other = (run_of(made, raw, first, same, more) for more in ({}, change))
    assert one != other
    assert one.content(stage, item) == other.content(stage, item)
    digests = [product(made, stage, tmp_path / str(len(m)), same, m) for m in ({}, change)]
    assert digests[0] == digests[1] and ": " not in digests[0]


@pytest.mark.parametrize("stage", PRODUCTS)
def test_the_same_configuration_gives_the_same_product(stage, made, tmp_path):
    key = (stage, repr({}))
    one = PRODUCED[key] if key in PRODUCED else product(made, stage, tmp_path / "one")
    assert product(made, stage, tmp_path / "two") == one


def test_a_data_set_is_asked_of_the_hub_as_it_is_named(monkeypatch, tmp_path):
    import datasets

    asked = []

    class Rows(list):
        features = None
        info = datasets.DatasetInfo()

    def load(*given, **named):
        asked.append((given, named))
        return Rows(
            {"image": small_tasks.picture(i), "prompt": f"what is {i}?", "answer": "it"}
            for i in range(20)
        )

    monkeypatch.setattr(datasets, "load_dataset", load)
    data = {
        "source": "hub",
        "id": "some/set",
        "subset": "large",
        "revision": "abc",
        "split": "validation",
    }
    for split, more in (("validation", {}), ("train", {"split": None})):
        cfg = run_of(tmp_path, lora_small.SETTINGS, {"loras.experts.color.dataset": data | more})
        family.prepare(cfg, None, tmp_path / split, quiet, "color")
        assert asked.pop() == (
            ("some/set", "large"),
            {"split": split, "revision": "abc", "streaming": True},
        )


def test_a_memory_plan_reaches_its_training(made):
    given = {"checkpointing": True, "fuse_optimizer": True, "clip_norm": 0}
    for changes in ({}, {"loras.defaults": given}):
        cfg = run_of(made, lora_small.SETTINGS, changes)
        for item in ("color", ROUTER):
            memory_plan = lora_small.task_of(FolderParts(cfg, made / "small"), item).memory_plan
            assert memory_plan.checkpointing == memory_plan.fuse_optimizer == bool(changes)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"loras.defaults.compile": True}, r"loras\.defaults\s.*compile: rows differ in length"),
        ({"loras.router.compile": True}, r"loras\.router\s.*compile: rows differ in length"),
        ({"loras.router.name": "guide"}, r"loras\.router\.name\s.*Input should be 'router'"),
    ],
)
def test_what_an_adapter_cannot_have_is_refused(change, said, tmp_path):
    with pytest.raises(ValidationError, match=said):
        run_of(tmp_path, lora_small.SETTINGS, change)


def test_the_routers_options_are_those_of_its_training(made):
    """Experts' trainings show what each option does; the router's is the same, with options of its
    own."""
    other = {
        name.partition(".")[2]: value
        for name, (_, value, _) in EFFECTS.items()
        if name.startswith("vlmadapter.")
    }
    durations = {"steps": 2, "epochs": 0.5, "tokens": 900}
    other = {name: value for name, value in other.items() if name not in durations}
    other |= {"checkpointing": True, "max_tokens": 99}
    fused = {"fuse_optimizer": True, "clip_norm": 0.0, "micro_batch_sequences": None}
    steps = []
    for (name, value), more in zip(durations.items(), ({}, fused, {}), strict=True):
        values = other | more | {name: value}
        cfg = run_of(made, lora_small.SETTINGS, {"loras.router": values})
        task = lora_small.task_of(FolderParts(cfg, made / "small"), ROUTER)
        assert {key: getattr(task.options, key) for key in values} == values
        assert {p.shape[0] for key, p in task.parameters.items() if "lora_A" in key} == {other["r"]}
        assert all("q_proj" in key for key in task.parameters)
        steps.append(task.steps)
    assert steps[0] == 2 and len(set(steps)) == 3
    assert {*other, *durations, *fused, "compile"} == {*VlmAdapterConfig.model_fields}


def test_rows_of_a_forward_pass_are_those_of_the_setting(made, monkeypatch):
    sizes = {}
    for most in (2, 5):
        cfg = run_of(made, small_stack.RUN, {"evaluate.batch_rows": most})
        stack, sizes[most] = family.assemble(cfg, FolderParts(cfg, made / "stack")), []
        stack.model.core.model.register_forward_pre_hook(
            lambda _module, _given, named, most=most: sizes[most].append(
                len(named["attention_mask"])
            ),
            with_kwargs=True,
        )
        stack.logits(small_stack.requests(12))
    assert max(sizes[2]) == 2 and max(sizes[5]) == 5
