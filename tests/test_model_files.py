"""Checkpoints that people bring: whole, or refused by what is wrong with them; the trunk of one
family and the base of the other alike."""

import json
import random
import shutil
from pathlib import Path

import lora_small
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3VLForConditionalGeneration

from pipeline.errors import PipelineError
from pipeline.families.ffn_moe.pretrained import open_pretrained
from pipeline.families.lora_vlm import base as lora_base
from pipeline.families.lora_vlm.config import VlmBaseConfig
from pipeline.store.model_files import INDEX, WEIGHTS
from tests import small
from tests.test_parity import whole

FAMILIES = ("ffn_moe", "lora_vlm")
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize 1234\n"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A sound checkpoint of each family, by its name; read them, never change them."""
    root = tmp_path_factory.mktemp("sound")
    llama = whole("llama", tie_word_embeddings=False)
    llama.save_pretrained(root / "ffn_moe")
    parts = lora_small.prepared(root / "parts")
    shutil.copytree(parts.folder("train_shared") / "base", root / "lora_vlm")
    # As most are found: in several files, under an index
    llama.save_pretrained(root / "ffn_moe-shards", max_shard_size="8kB")
    model = Qwen3VLForConditionalGeneration.from_pretrained(root / "lora_vlm")
    shutil.copytree(root / "lora_vlm", root / "lora_vlm-shards")
    (root / "lora_vlm-shards" / WEIGHTS).unlink()
    model.save_pretrained(root / "lora_vlm-shards", max_shard_size="80kB")
    return root


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def own(family, sound, tmp_path):
    """The same checkpoint, of this test's own."""
    return Path(shutil.copytree(sound / family, tmp_path / "model"))


def opened(family: str, folder: Path):
    """Open a checkpoint as its family does at first."""
    if family == "ffn_moe":
        return open_pretrained(small.config(trunk__init=str(folder), tokenizer__pretrained="own"))
    (folder.parent / "pinned").mkdir(exist_ok=True)
    base = VlmBaseConfig(model=str(folder), dtype="float32", image={"min_pixels": 4096})
    lora_base.write(base, [], folder.parent / "pinned")
    return lora_base.open_base(folder.parent / "pinned", base)


def refusal(family: str, folder: Path) -> str:
    """Return the sentence that a checkpoint is refused with."""
    with pytest.raises(PipelineError) as error:
        opened(family, folder)
    said = str(error.value)
    assert "\n" not in said and "Traceback" not in said and len(said) < 700
    return said


def test_sound_ones_open_whole_and_in_shards_and_say_nothing(family, sound, tmp_path, capfd):
    for name in (family, f"{family}-shards"):
        opened(family, shutil.copytree(sound / name, tmp_path / name))
    assert len(list((sound / f"{family}-shards").glob("*.safetensors"))) > 3
    assert "LOAD REPORT" not in "".join(capfd.readouterr())


def _dropped(tensors, name):
    del tensors[name]


def _renamed(tensors, name):
    tensors[f"{name.replace('.', '_')}.w"] = tensors.pop(name)


def _reshaped(tensors, name):
    tensors[name] = torch.cat([tensors[name]] * 2).clone()


def _spoilt(value):
    def spoil(tensors, name):
        tensors[name] = tensors[name].clone()
        tensors[name].view(-1)[-1] = value

    return spoil


CHANGES = {
    "missing": _dropped,
    "unknown": _renamed,
    "of another shape": _reshaped,
    "not finite": _spoilt(float("nan")),
    "not finite ": _spoilt(float("-inf")),
}


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("seed", range(3))
def test_any_tensors_that_do_not_arrive_are_named_and_counted(family, own, what, seed):
    draw = random.Random(f"{family} {what} {seed}")
    tensors = load_file(own / WEIGHTS)
    names = draw.sample(sorted(tensors), draw.choice([1, 2, 5]))
    for name in names:
        CHANGES[what](tensors, name)
    save_file(tensors, own / WEIGHTS, {"format": "pt"})
    said = refusal(family, own)
    assert what.strip() in said and f"{len(names)} tensor" in said
    if what != "unknown":
        # The first of them; the rest are counted
        assert sorted(names)[0] in said


@pytest.mark.parametrize("prefix", ["_orig_mod.", "base_model.model.", "module.", "trunk."])
def test_names_that_a_wrapper_changed_say_which(family, own, prefix):
    tensors = load_file(own / WEIGHTS)
    renamed = {prefix + name: tensor for name, tensor in tensors.items()}
    save_file(renamed, own / WEIGHTS, {"format": "pt"})
    said = refusal(family, own)
    assert f"{len(tensors)} tensors are unknown" in said
    assert ("save the model inside it" in said) == (prefix != "trunk.")


def test_a_head_beside_the_embedding_that_it_is_tied_to_is_not_dropped(sound, tmp_path):
    folder = shutil.copytree(sound / "ffn_moe", tmp_path / "model")
    edit(folder, tie_word_embeddings=True)
    assert "lm_head.weight" in refusal("ffn_moe", folder)
    assert "tie_word_embeddings" in refusal("ffn_moe", folder)


def edit(folder: Path, **changes) -> None:
    """Change keys of config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("seed", range(4))
def test_a_file_that_ends_anywhere_is_torn(family, own, seed):
    data = (own / WEIGHTS).read_bytes()
    end = random.Random(seed).randrange(len(data))
    (own / WEIGHTS).write_bytes(data[:end])
    assert f"{WEIGHTS} is torn" in refusal(family, own)


def test_every_file_of_git_lfs_is_told_from_what_it_points_to(family, own):
    for path in sorted(own.iterdir()):
        before = path.read_bytes()
        if path.suffix not in (".json", ".safetensors", ".jinja"):
            continue
        path.write_text(POINTER.format("a" * 64))
        said = refusal(family, own)
        assert f"{path.name} is a pointer of Git LFS" in said and "git lfs pull" in said
        path.write_bytes(before)


def test_each_missing_shard_is_named(family, sound, tmp_path):
    folder = shutil.copytree(sound / f"{family}-shards", tmp_path / "model")
    shards = sorted(folder.glob("*.safetensors"))
    for path in shards[:3]:
        before = path.read_bytes()
        path.unlink()
        said = refusal(family, folder)
        assert path.name in said and f"names {len(shards)} files, and 1 of them" in said
        path.write_bytes(before)
    # Two that changed places hold none of what the index says
    held = shards[0].read_bytes()
    shards[0].write_bytes(shards[1].read_bytes())
    shards[1].write_bytes(held)
    assert f"{shards[0].name} has not the" in refusal(family, folder)
    (folder / INDEX).write_text("{}")
    assert f"{INDEX} is no index" in refusal(family, folder)


REVERSIBLE = ("bitsandbytes", "fp8", "compressed-tensors", "mxfp4")
METHODS = [*REVERSIBLE, "gptq", "awq", "some-new-one"]


@pytest.mark.parametrize("place", [(), ("text_config",)])
@pytest.mark.parametrize("method", METHODS)
def test_quantised_weights_are_told_by_their_method(family, own, method, place):
    config = json.loads((own / "config.json").read_text())
    part = config
    for key in place:
        part = part.setdefault(key, {})
    part["quantization_config"] = {"quant_method": method, "bits": 4}
    (own / "config.json").write_text(json.dumps(config))
    said = refusal(family, own)
    assert f"quantised ({method})" in said and "name the model that it was made from" in said
    assert ("dequantize" in said) == (method in REVERSIBLE)


@pytest.mark.parametrize("name", ["quantize_config.json", "quant_config.json"])
def test_so_are_those_that_only_a_file_beside_them_tells(family, own, name):
    (own / name).write_text("{}")
    assert f"{name} says that the weights are quantised" in refusal(family, own)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8])
def test_so_are_those_that_only_the_numbers_tell(family, own, dtype):
    tensors = load_file(own / WEIGHTS)
    name = next(name for name in sorted(tensors) if name.endswith("proj.weight"))
    tensors[name] = tensors[name].to(dtype)
    save_file(tensors, own / WEIGHTS, {"format": "pt"})
    assert f"quantised format ({name})" in refusal(family, own)


@pytest.mark.parametrize(
    ("file", "what"),
    [
        ("pytorch_model.bin", "pickled"),
        ("consolidated.00.pth", "pickled"),
        ("model-Q4_K_M.gguf", "llama.cpp"),
        ("tf_model.h5", "TensorFlow"),
    ],
)
def test_weights_of_another_format_are_told_by_the_format(family, own, file, what):
    (own / WEIGHTS).rename(own / file)
    assert what in refusal(family, own)
    (own / file).unlink()
    assert f"{WEIGHTS} is not there" in refusal(family, own)


def test_an_adapter_is_no_model(family, own):
    (own / "config.json").unlink()
    (own / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    assert "merge_and_unload" in refusal(family, own)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"model_type": "bert"}'])
def test_a_config_of_something_else_is_told(family, own, text):
    (own / "config.json").write_text(text)
    said = refusal(family, own)
    assert "config.json" in said or "bert" in said or "model_type" in said


def test_an_adapter_beside_a_model_is_not_loaded_into_it(family, own):
    (own / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(PipelineError, match=r"adapter_config\.json .*merge_and_unload"):
        opened(family, own)


@pytest.mark.parametrize("part", ["norm.weight", "embed_tokens.weight"])
def test_zeros_where_a_copy_was_broken_off_are_told(family, own, part):
    tensors = load_file(own / WEIGHTS)
    hit = [name for name in tensors if name.endswith(part)]
    for name in hit:
        tensors[name] = torch.zeros_like(tensors[name])
    save_file(tensors, own / WEIGHTS, metadata={"format": "pt"})
    noun = "tensor is" if len(hit) == 1 else "tensors are"
    with pytest.raises(PipelineError, match=f"{len(hit)} {noun} nothing but zeros"):
        opened(family, own)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.Q4_K_M.gguf", "tf_model.h5"])
def test_a_folder_of_another_format_alone_is_told_by_it(tmp_path, name):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / name).write_bytes(b"GGUF")
    with pytest.raises(PipelineError, match=f"{name} holds .*save_pretrained it as safetensors"):
        opened("ffn_moe", folder)


@pytest.mark.parametrize(
    "names", [["consolidated"], ["model-00001-of-00002", "model-00002-of-00002"]]
)
def test_weights_without_their_index_are_named(family, own, names):
    for name in names:
        shutil.copy(own / WEIGHTS, own / f"{name}.safetensors")
    (own / WEIGHTS).unlink()
    with pytest.raises(PipelineError, match=rf"index\.json is not there.*{names[0]}\.safetensors"):
        opened(family, own)


def test_dropout_of_a_config_stays_off_whatever_memory_plan(sound, tmp_path):
    folder = Path(shutil.copytree(sound / "ffn_moe", tmp_path / "model"))
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"attention_dropout": 0.5}))
    trunk, dummy = opened("ffn_moe", folder)
    ids_BT = torch.arange(16)[None] % 8
    plain = trunk.hidden(ids_BT, dummy)
    trunk.checkpoint()
    assert torch.equal(trunk.hidden(ids_BT, dummy), plain)
