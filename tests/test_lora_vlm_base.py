"""The base: laid out as on the Hub, opened without torchvision, known by its pin, mapped and not
copied."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import lora_small
import pytest
import torch
from fakes import flip
from huggingface_hub.utils import filter_repo_objects
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

from pipeline.errors import DamagedArtifact, DataError, MismatchError
from pipeline.families.adapters.base import ModelRef, file_hashes
from pipeline.families.lora_vlm import base as lora_base
from pipeline.families.lora_vlm.config import VlmBaseConfig
from pipeline.families.lora_vlm.patches import PatchCutter
from pipeline.families.lora_vlm.vision import ImageFeatures

HUB_LAYOUT = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(settings, folder) of a base built once; read it, never change it."""
    parts = lora_small.prepared(tmp_path_factory.mktemp("base"))
    return parts.cfg.loras.base, parts.folder("train_shared")


@pytest.fixture
def own(made, tmp_path):
    """The same in a folder of this test's own."""
    return made[0], Path(shutil.copytree(made[1], tmp_path / "shared"))


def named(folder: Path) -> VlmBaseConfig:
    """Return settings of a base that lies in a folder."""
    return VlmBaseConfig(
        model=str(folder), dtype="float32", image={"min_pixels": 4096, "max_pixels": 16384}
    )


def test_a_built_base_has_the_hubs_layout_and_stock_classes_load_it(made):
    base, folder = made
    assert {path.name for path in (folder / "base").iterdir()} == HUB_LAYOUT
    model = AutoModelForImageTextToText.from_pretrained(folder / "base")
    ours = lora_base.open_base(folder, base)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, ours.model.state_dict()[name]), name
    assert AutoConfig.from_pretrained(folder / "base").model_type == "qwen3_vl"
    text = "Count the dots. <|im_start|>Größe 42"
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    assert tokenizer.encode(text) == ours.chat.tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_same_sizes_give_the_same_bytes_and_another_seed_others(made, tmp_path):
    base, again = made[0], lora_small.config().loras.base
    words = ["Count the dots.", "red"]
    for name, settings in (("a", base), ("b", again)):
        torch.manual_seed(len(name + str(id(settings))))  # what was drawn before does not matter
        lora_base.build(settings, tmp_path / name, words)
    other = base.model_copy(update={"build": base.build.model_copy(update={"seed": 1})})
    lora_base.build(other, tmp_path / "c", words)
    files = [{p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in "abc"]
    assert files[0] == files[1]
    assert {name for name in files[0] if files[0][name] != files[2][name]} == {"model.safetensors"}


def test_building_leaves_torchs_generator_alone(made, tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    lora_base.build(made[0], tmp_path / "base", ["word"])
    assert torch.equal(torch.get_rng_state(), before)


def test_digits_and_capital_letters_are_single_tokens(made):
    tokenizer = lora_base.open_base(made[1], made[0]).chat.tokenizer
    assert {len(tokenizer.encode(sign)) for sign in "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"} == {1}


def test_the_processor_prepares_pictures_as_the_stock_one_and_needs_no_torchvision(made):
    processor = lora_base.open_base(made[1], made[0]).chat.renderer
    image = Image.effect_noise((200, 90), 60).convert("RGB")
    stock = AutoImageProcessor.from_pretrained(made[1] / "base", backend="pil")
    mine, theirs = (
        p(images=[image], return_tensors="pt") for p in (processor.image_processor, stock)
    )
    assert torch.equal(mine["pixel_values"], theirs["pixel_values"])
    assert mine["image_grid_thw"].tolist() == theirs["image_grid_thw"].tolist()
    assert mine["image_grid_thw"].prod().item() * 16 * 16 <= 16384
    text = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>x<|im_end|>"
    out = processor(text=[text], images=[image], return_tensors="pt")
    pads = (out["input_ids"] == processor.image_token_id).sum().item()
    assert (
        pads == mine["image_grid_thw"].prod().item() // 4 == out["mm_token_type_ids"].sum().item()
    )
    assert "torchvision" not in sys.modules


# other numbers in each channel; without a step that they are looked up for
@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"image_mean": [0.48, 0.45, 0.40], "image_std": [0.27, 0.26, 0.28], "rescale_factor": 0.01},
        {"do_normalize": False},
        {"do_resize": False},
        {"resample": 1},
    ],
    ids=["as it is", "other numbers", "not normalized", "not resized", "by sines"],
)
def test_pictures_are_cut_to_the_last_bit_as_their_preparation_cuts_them(made, changed):
    preparation = lora_base.open_processor(made[1] / "base", made[0].image).image_processor
    vars(preparation).update(changed)
    ramp = Image.linear_gradient("L")
    # every value of each channel, and what has to be resized to no multiple of its size
    shades = Image.merge("RGB", (ramp, ramp.rotate(90), Image.radial_gradient("L")))
    pictures = [shades]
    if preparation.do_resize:
        pictures += [Image.effect_noise(size, 150).convert("RGB") for size in ((200, 90), (40, 41))]
        pictures += [ramp.convert("RGB"), ramp.convert("RGBA")]
    cut = PatchCutter(preparation)
    for several in ([shades], pictures[:-1] or pictures, pictures):
        found = cut(several)
        wanted = preparation(images=several, return_tensors="pt")
        assert torch.equal(found[0], wanted["pixel_values"])
        assert found[0].dtype == wanted["pixel_values"].dtype
        assert torch.equal(found[1], wanted["image_grid_thw"])


def test_places_of_tokens_are_those_of_the_models_own_class(made):
    opened = lora_base.open_base(made[1], made[0])
    media = opened.chat.media
    grids = [(1, 4, 6), (1, 8, 2), (1, 2, 2)]
    seen = [ImageFeatures(grid, torch.zeros(grid[1] * grid[2] // 4, 8), ()) for grid in grids]
    # with text before, between and behind them, and none at either end
    for between in ([3, 1, 2, 4], [0, 2, 5, 0]):
        ids = [5] * between[0]
        for each, text in zip(seen, between[1:], strict=True):
            ids += [media.image_id] * each.tokens + [5] * text
        ids_BT = torch.tensor([ids])
        wanted_3BT, _ = opened.model.model.get_rope_index(
            ids_BT,
            media.token_inputs(ids_BT)["mm_token_type_ids"],
            image_grid_thw=torch.tensor(grids),
        )
        assert torch.equal(media.positions(opened.model, tuple(ids), seen), wanted_3BT[:, 0])
    assert media.positions(opened.model, (5, 5), ()) is None


def test_the_template_writes_turns_as_the_hubs_does(made):
    processor = lora_base.open_base(made[1], made[0]).chat.renderer
    turns = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "text", "text": "Hi"}, {"type": "image"}],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
    ]
    picture = "<|vision_start|><|image_pad|><|vision_end|>"
    assert processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        f"<|im_start|>user\n{picture}Hi{picture}<|im_end|>\n"
        "<|im_start|>assistant\nyes<|im_end|>\n<|im_start|>assistant\n"
    )


def test_image_limits_are_the_settings_and_not_the_folders(made):
    base = made[0].model_copy(
        update={"image": SimpleNamespace(min_pixels=65_536, max_pixels=65_536)}
    )
    processor = lora_base.open_base(made[1], base).chat.renderer
    out = processor.image_processor(images=[Image.new("RGB", (64, 64))], return_tensors="pt")
    assert out["image_grid_thw"].tolist() == [[1, 16, 16]]


def test_what_is_opened_is_frozen_of_the_wanted_type_and_mapped_from_its_file(made, tmp_path):
    base, folder = made
    model = lora_base.open_base(folder, base).model
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert str(folder / "base" / "model.safetensors") in Path("/proc/self/maps").read_text()
    bf16_params = base.model_copy(update={"dtype": "bfloat16"})
    assert {p.dtype for p in lora_base.open_base(folder, bf16_params).model.parameters()} == {
        torch.bfloat16
    }


def test_metrics_count_the_parameters_of_the_model(made, tmp_path):
    base = made[0]
    (tmp_path / "pin").mkdir()
    metrics = lora_base.write(base, ["word"], tmp_path / "pin")
    model = lora_base.open_base(tmp_path / "pin", base).model
    assert metrics["parameters"] == sum(p.numel() for p in model.parameters())
    assert metrics["digest"] == ModelRef.read(tmp_path / "pin").digest


def test_a_folder_is_pinned_by_its_files_wherever_it_lies(made, tmp_path):
    pins = []
    for name in ("here", "there"):
        shutil.copytree(made[1] / "base", tmp_path / name)
        (tmp_path / f"pin-{name}").mkdir()
        lora_base.write(named(tmp_path / name), [], tmp_path / f"pin-{name}")
        opened = lora_base.open_base(tmp_path / f"pin-{name}", named(tmp_path / name))
        pins.append(opened.pin)
    built = ModelRef.read(made[1])
    assert pins[0].digest == pins[1].digest == built.digest
    assert [pin.source for pin in (*pins, built)] == ["folder", "folder", "built"]


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_base_whose_file_changed_is_another_base(own, name):
    base, folder = own
    flip(folder / "base" / name)
    with pytest.raises(MismatchError, match="its files have changed since train_shared"):
        lora_base.open_base(folder, base)


def test_a_pin_that_was_touched_or_torn_is_damaged(own):
    base, folder = own
    raw = json.loads((folder / "pin.json").read_text())
    for text in (json.dumps(raw | {"files": {}}), json.dumps({"digest": "x"}), "{", "[]"):
        (folder / "pin.json").write_text(text)
        with pytest.raises(DamagedArtifact, match="pin.json"):
            lora_base.open_base(folder, base)


def test_a_folder_without_a_model_is_named(tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(DataError, match="no config.json and no tokenizer.json"):
        lora_base.write(named(tmp_path / "model"), [], tmp_path)
    with pytest.raises(DataError, match="is no model folder"):
        lora_base.write(named(tmp_path / "absent"), [], tmp_path)


@pytest.mark.parametrize(
    ("said", "found"),
    [({"model_type": "bert"}, "holds a bert"), ([], "holds no JSON object"), ({}, "what kind")],
)
def test_a_folder_of_something_else_is_refused_before_anything_is_loaded(own, said, found):
    folder = own[1] / "base"
    (folder / "config.json").write_text(json.dumps(said))
    with pytest.raises(DataError, match=found):
        lora_base.write(named(folder), [], own[1])


def test_weights_that_cannot_be_read_are_a_data_error(own):
    folder = own[1] / "base"
    (folder / "model.safetensors").write_bytes(b"torn")
    (own[1] / "pin.json").write_text(
        json.dumps(ModelRef("built", "base", files=file_hashes(folder)).values())
    )
    with pytest.raises(DataError, match=r"model\.safetensors is torn"):
        lora_base.open_base(own[1], own[0])


def test_a_hub_model_is_fetched_at_its_commit_without_pickles(made, tmp_path, monkeypatch):
    asked = []

    needed = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    needed += ["chat_template.jinja", "merges.txt", "preprocessor_config.json", "tokenizer.json"]
    others = ["README.md", "consolidated.safetensors", "consolidated-00001-of-00002.safetensors"]
    others += ["onnx/config.json", "original/model.safetensors", "pytorch_model.bin", "x.pkl"]

    def fetch(model, revision, **patterns):
        asked.append((model, revision))
        assert list(filter_repo_objects([*needed, *others], **patterns)) == needed
        return str(made[1] / "base")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    base = VlmBaseConfig(model="Qwen/Qwen3-VL-2B-Instruct", revision=COMMIT, dtype="float32")
    lora_base.write(base, [], tmp_path)
    opened = lora_base.open_base(tmp_path, base)
    assert set(asked) == {("Qwen/Qwen3-VL-2B-Instruct", COMMIT)}
    assert (opened.pin.source, opened.pin.revision, opened.pin.files) == ("hub", COMMIT, {})
    other = ModelRef("hub", base.model, COMMIT[::-1])
    assert other.digest != opened.pin.digest


def test_a_hub_that_cannot_be_reached_is_a_data_error(tmp_path):
    base = VlmBaseConfig(
        model="Qwen/Qwen3-VL-2B-Instruct", revision=COMMIT
    )  # the tests have no network
    with pytest.raises(
        DataError, match="the Hub did not give it at revision 0123456789.* HF_TOKEN"
    ):
        lora_base.write(base, [], tmp_path)
