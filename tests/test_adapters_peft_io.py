"""Adapters: one at a time, in PEFT's own format, refused where they do not belong."""

import json
import shutil

import lora_small
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from pipeline.errors import ConfigError, DamagedArtifact, MismatchError
from pipeline.families.adapters import peft_io as adapters
from pipeline.families.adapters.base import ModelRef
from pipeline.families.lora_vlm import base
from pipeline.families.lora_vlm.config import VlmAdapterConfig
from tests.test_ffn_parts import mapped

TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def options(**changes):
    plain = {"r": 4, "alpha": 8.0, "dropout": 0.0, "targets": TARGETS, "allow_vision": False}
    return VlmAdapterConfig.model_construct(**plain | changes)  # not validated: faults are tried


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """(settings, folder) of a base; read it, never change it."""
    parts = lora_small.prepared(tmp_path_factory.mktemp("adapters"))
    return parts.cfg.loras.base, parts.folder("train_shared")


@pytest.fixture
def opened(place):
    return base.open_base(place[1], place[0])


@pytest.fixture
def asked(opened):
    return opened.chat.requests([("How many dots are there?", ()), ("red", ())])


def random(opened, name="one", **changes):
    """Return the base with an adapter that changes its answers."""
    torch.manual_seed(0)
    model = adapters.add(opened.model, name, options(**changes))
    with torch.no_grad():
        for parameter in adapters.adapter_parameters(model, name).values():
            parameter.normal_(std=0.1)
    return model.eval()


@pytest.fixture
def kept(opened, tmp_path, asked):
    """(folder, logits) of an adapter that was written."""
    model = random(opened)
    files = adapters.files(model, "one", opened.pin, {"label": "A"})
    with torch.no_grad():
        return lora_small.write(files, tmp_path / "kept"), model(**asked).logits


def logits(model, asked):
    with torch.no_grad():
        return model(**asked).logits


def test_a_new_adapter_is_the_only_thing_that_moves_and_starts_as_nothing(opened, asked):
    before = logits(opened.model, asked)
    model = adapters.add(opened.model, "one", options())
    model = adapters.add(model, "one_more", options())
    moving = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(moving) == 2 * 7 * 2 and all(
        f".{adapters.peft_name('one_more')}." in name and "lora_" in name for name in moving
    )
    assert set(adapters.adapter_parameters(model, "one_more")) == set(moving)
    assert model.active_adapters == [adapters.peft_name("one_more")]
    assert torch.equal(logits(model.eval(), asked), before)
    adapters.select(model, "one")
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(
        adapters.adapter_parameters(model, "one")
    )


def test_adapters_of_a_bf16_base_are_fp32(place):
    half = place[0].model_copy(update={"dtype": "bfloat16"})
    model = adapters.add(base.open_base(place[1], half).model, "one", options())
    assert {p.dtype for p in adapters.adapter_parameters(model, "one").values()} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (r".*\.query", "matches no module of the base; its layers end in"),
        (r"(", "is no regular expression"),
        (
            r".*(qkv|q_proj)",
            r"reaches into the vision tower \(2 modules, first model.visual.blocks.0.attn.qkv\)",
        ),
        (r"lm_head", "matches lm_head, which is no projection"),
        (r".*language_model.*self_attn", "which is no projection"),
    ],
)
def test_targets_that_match_nothing_or_what_must_stay_are_refused(opened, targets, said):
    with pytest.raises(ConfigError, match=said) as error:
        adapters.add(
            opened.model,
            "one",
            options(targets=targets),
            "loras.experts.one.overrides",
            opened.chat.media.check_targets,
        )
    assert "loras.experts.one.overrides.targets" in str(error.value)
    assert not any("lora" in name for name, _ in opened.model.named_parameters())


def test_the_vision_tower_gets_an_adapter_when_it_is_allowed(opened):
    model = adapters.add(opened.model, "one", options(targets=r".*(qkv|q_proj)", allow_vision=True))
    assert any("visual" in name for name in adapters.adapter_parameters(model, "one"))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft's affair
def test_peft_itself_loads_what_was_written(place, kept, asked):
    folder, wanted = kept
    fresh = base.open_base(place[1], place[0]).model
    before = logits(fresh, asked)
    model = PeftModel.from_pretrained(fresh, folder / "adapter")
    assert torch.equal(logits(model, asked), wanted) and not torch.allclose(
        wanted, before, atol=1e-3
    )
    keys = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert (
        all(key.startswith("base_model.model.model.language_model.layers.") for key in keys)
        and len(keys) == 28
    )


def test_settings_name_the_base_by_its_pin_and_no_path_of_this_machine(opened, tmp_path):
    pin = ModelRef("hub", "Qwen/Qwen3-VL-2B-Instruct", "c0ffee")
    files = adapters.files(random(opened), "one", pin, {"label": "A"})
    settings, about = files["adapter/adapter_config.json"], files["adapter.json"]
    assert (settings["base_model_name_or_path"], settings["revision"]) == (pin.model, "c0ffee")
    assert settings["inference_mode"] and settings["target_modules"] == TARGETS
    assert (
        about["pin"] == pin.digest
        and about["label"] == "A"
        and set(about["packages"]) == {"torch", "transformers", "peft"}
    )
    assert str(tmp_path.parts[1]) not in json.dumps([settings, about])


def test_what_is_loaded_answers_as_it_did_beside_others_and_frozen(place, kept, asked):
    folder, wanted = kept
    fresh = base.open_base(place[1], place[0])
    model = random(fresh, "another", r=8)
    model = adapters.load(model, folder, "one", fresh.pin)
    model.set_adapter(adapters.peft_name("one"))
    assert torch.equal(logits(model, asked), wanted)
    alone = adapters.load(base.open_base(place[1], place[0]).model, folder, "one", fresh.pin)
    assert torch.equal(logits(alone, asked), wanted)
    assert not any(p.requires_grad for p in alone.parameters()) and not alone.training
    # it is mapped where it lies, and not copied
    factors = [p for name, p in alone.named_parameters() if ".lora_" in name]
    assert {mapped(each) for each in factors} == {str(folder / adapters.TENSORS)}


def renamed(folder, change):
    path = folder / "adapter" / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


WRONG = {
    "prefix": (
        lambda t: {k.replace("language_model.", ""): v for k, v in t.items()},
        "28 tensors are missing and 28",
    ),
    "missing": (lambda t: dict(sorted(t.items())[1:]), "1 tensors are missing and 0 unexpected"),
    "more": (
        lambda t: t | {"base_model.model.lm_head.lora_A.weight": torch.ones(4, 64)},
        "0 tensors are missing and 1",
    ),
    "shape": (
        lambda t: t | {k: v[:2].clone() for k, v in sorted(t.items())[:1]},
        "1 tensors have another shape",
    ),
}


@pytest.mark.parametrize(("change", "said"), WRONG.values(), ids=WRONG)
def test_an_adapter_with_other_keys_is_refused_and_leaves_no_trace(
    place, kept, asked, change, said
):
    folder, wanted = kept
    good = shutil.copytree(folder, folder.with_name("good"))
    renamed(folder, change)
    fresh = base.open_base(place[1], place[0])
    before = logits(fresh.model, asked)
    with pytest.raises(MismatchError, match=said):
        adapters.load(fresh.model, folder, "one", fresh.pin)
    assert torch.equal(logits(fresh.model, asked), before)
    assert not any("lora" in name for name, _ in fresh.model.named_parameters())
    model = adapters.load(fresh.model, good, "one", fresh.pin)  # the next one is right
    with pytest.raises(MismatchError, match=said):
        adapters.load(model, folder, "two", fresh.pin)
    assert list(model.peft_config) == [adapters.peft_name("one")] and torch.equal(
        logits(model, asked), wanted
    )


def test_an_adapter_of_another_base_is_refused(opened, kept):
    other = ModelRef("hub", "Qwen/Qwen3-VL-2B-Instruct", "c0ffee")
    with pytest.raises(MismatchError, match=r"was made on another base \(base, revision None\)"):
        adapters.load(opened.model, kept[0], "one", other)


def test_settings_that_fit_no_module_are_a_mismatch(place, kept):
    path = kept[0] / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": "nothing"}))
    fresh = base.open_base(place[1], place[0])
    with pytest.raises(MismatchError, match="fits no module of this base"):
        adapters.load(fresh.model, kept[0], "one", fresh.pin)


@pytest.mark.parametrize(
    "name", ["adapter.json", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"]
)
@pytest.mark.parametrize("how", ["torn", "gone", "list"])
def test_files_that_cannot_be_read_are_damaged(opened, kept, name, how):
    path = kept[0] / name
    path.unlink() if how == "gone" else path.write_text("{" if how == "torn" else "[1]")
    with pytest.raises(DamagedArtifact, match=path.name):
        adapters.load(opened.model, kept[0], "one", opened.pin)


def test_labels_are_one_token_each_and_differ(opened):
    tokenizer = opened.chat.tokenizer
    ids = adapters.label_ids(tokenizer, {"color": "A", "none": "Z"})
    assert [tokenizer.decode([i]) for i in ids.values()] == ["A", "Z"] and list(ids) == [
        "color",
        "none",
    ]
    with pytest.raises(ConfigError, match="the label 'QXJ' of dots is 3 tokens"):
        adapters.label_ids(tokenizer, {"color": "A", "dots": "QXJ"})
    with pytest.raises(ConfigError, match="two experts have one label"):
        adapters.label_ids(tokenizer, {"color": "A", "dots": "A"})
