"""What the files of a pretrained model rule out is told by the plan, by the laptop before Modal,
and by the first stage: before anything is paid for."""

import json
import random
import shutil
from contextlib import nullcontext
from pathlib import Path

import lora_small
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline import cloud
from pipeline.config.base import merge
from pipeline.errors import ConfigError, DataError, MismatchError
from pipeline.families import family
from pipeline.families.ffn_moe.pretrained import open_pretrained, stated_settings
from pipeline.families.load import parse
from pipeline.protocols import quiet
from pipeline.store.model_sources import ModelSource, on_this_machine
from tests import small
from tests.test_parity import whole
from tests.test_pins import written

MOUNT = "/volume"
VLM = lora_small.SETTINGS


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A sound model of each family, by its name; read them, never change them."""
    root = tmp_path_factory.mktemp("sound")
    whole("llama").save_pretrained(root / "ffn_moe")
    parts = lora_small.prepared(root / "parts")
    shutil.copytree(parts.folder("train_shared") / "base", root / "lora_vlm")
    return root


def config(name: str, model: str, **changes):
    """Return a run's settings whose trunk or base is a model of some name or folder."""
    if name == "ffn_moe":
        return small.config(trunk__init=model, tokenizer__pretrained="own", **changes)
    base = {"model": model, "dtype": "float32"}
    if not model.startswith("/"):
        base["revision"] = "0" * 40
    loras = {key: value for key, value in VLM["loras"].items() if key != "base"}
    return parse(merge(VLM | {"loras": loras | {"base": base}}, changes))


def edit(folder: Path, **changes) -> None:
    """Change keys of config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def here(cfg) -> list[str]:
    """Look at a run's models as the plan does."""
    return family(cfg.family).preflight(cfg, on_this_machine)


def laptop(name: str, folder: Path, tmp_path: Path) -> list[str]:
    """Look at a model as the laptop does that has none of it: a volume holds the folder."""
    cfg = config(name, f"{MOUNT}/inputs/model")

    def read(path):
        file = folder / Path(path).relative_to("inputs/model")
        return file.read_bytes() if file.exists() else None

    return cloud.look_at_models(cfg, MOUNT, tmp_path / "mirror", read)


FAMILIES = ("ffn_moe", "lora_vlm")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_sound_model_is_nothing_to_speak_of(name, sound, tmp_path):
    assert here(config(name, str(sound / name))) == []
    assert laptop(name, sound / name, tmp_path) == []
    # One of the Hub of which nothing is here is not waited for
    assert len(here(config(name, "no/such"))) == 1


WRONG = {
    "another kind": ({"model_type": "bert"}, "bert"),
    "quantised": ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
    "no kind": ({"model_type": None}, "model_type"),
}


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("name", FAMILIES)
def test_what_no_stage_could_use_is_refused_everywhere(name, what, sound, tmp_path):
    folder = shutil.copytree(sound / name, tmp_path / "model")
    changes, said = WRONG[what]
    edit(folder, **changes)
    for look in (
        lambda: here(config(name, str(folder))),
        lambda: laptop(name, folder, tmp_path),
    ):
        with pytest.raises(ConfigError, match=said):
            look()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_that_is_not_there_is_no_name_on_the_hub(name, tmp_path):
    with pytest.raises(ConfigError, match="is no folder here"):
        here(config(name, str(tmp_path / "gone")))
    with pytest.raises(ConfigError, match="the volume has no inputs/model/config.json.*volume put"):
        laptop(name, tmp_path / "gone", tmp_path)


@pytest.mark.parametrize("name", FAMILIES)
def test_torn_weights_are_told_by_the_plan(name, sound, tmp_path):
    folder = shutil.copytree(sound / name, tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(ConfigError, match="torn"):
        here(config(name, str(folder)))


@pytest.mark.parametrize("model", ["a/b/c", "models/of mine", "no name"])
@pytest.mark.parametrize("name", FAMILIES)
def test_what_can_be_no_name_on_the_hub_is_told(name, model):
    with pytest.raises(ConfigError, match=f"{model} is no folder here and no name on the Hub"):
        here(config(name, model))


@pytest.mark.parametrize("share", [0.005, 0.05, 0.5, 0.95])
def test_a_gguf_file_that_ends_anywhere_is_torn(share, tmp_path):
    file = written(tmp_path / "x.gguf", "llama", "F32")
    assert here(config("ffn_moe", str(file))) == []
    with file.open("r+b") as cut:
        cut.truncate(round(share * file.stat().st_size))
    with pytest.raises(ConfigError, match="the file is torn .*; copy it again"):
        here(config("ffn_moe", str(file)))


@pytest.mark.parametrize("positions", [4, small.CONTEXT - 1, small.CONTEXT, 10**6])
def test_a_context_longer_than_the_positions_is_refused(sound, tmp_path, positions):
    folder = shutil.copytree(sound / "ffn_moe", tmp_path / "model")
    edit(folder, max_position_embeddings=positions)
    cfg = config("ffn_moe", str(folder))
    if positions >= small.CONTEXT:
        assert here(cfg) == []
        return
    with pytest.raises(ConfigError, match=rf"trunk\.context_tokens: .*set it to {positions} or"):
        here(cfg)
    folder = shutil.copytree(sound / "lora_vlm", tmp_path / "base")
    text = json.loads((folder / "config.json").read_text())["text_config"]
    edit(folder, text_config=text | {"max_position_embeddings": positions})
    with pytest.raises(ConfigError, match=rf"max_tokens: .*set it to {positions} or less"):
        here(config("lora_vlm", str(folder)))


@pytest.mark.parametrize("layers", ["last:2", [1], "last:3", [0, 2]])
def test_layers_that_the_trunk_has_not_are_refused(layers, sound, tmp_path):
    cfg = config("ffn_moe", str(sound / "ffn_moe"), expert__layers=layers)
    elsewhere = config("ffn_moe", f"{MOUNT}/inputs/model", expert__layers=layers)

    def read(path):
        return (sound / "ffn_moe" / Path(path).relative_to("inputs/model")).read_bytes()

    looks = (
        lambda: here(cfg),
        lambda: cloud.look_at_models(elsewhere, MOUNT, tmp_path, read),
    )
    for look in looks:
        if layers in ("last:2", [1]):
            assert look() == []
            continue
        with pytest.raises(ConfigError, match=r"expert\.layers: .*the trunk has.*(model|ffn_moe)"):
            look()


@pytest.mark.parametrize("value", ["many", [4], {}, 1.5, True])
def test_positions_that_are_no_number_are_refused_in_a_sentence(sound, tmp_path, value):
    for name in FAMILIES:
        folder = shutil.copytree(sound / name, tmp_path / name)
        positions = {"max_position_embeddings": value}
        edit(folder, **(positions if name == "ffn_moe" else {"text_config": positions}))
        with pytest.raises(ConfigError, match="cannot be .*max_position_embeddings"):
            here(config(name, str(folder)))
    edit(folder, text_config=value)
    with pytest.raises(ConfigError, match="cannot be the base") if value != {} else nullcontext():
        here(config("lora_vlm", str(folder)))


@pytest.mark.parametrize(
    "changes",
    [
        {"max_position_embeddings": "many"},
        {"hidden_size": "wide"},
        {"num_hidden_layers": [2]},
        {"num_attention_heads": 0, "head_dim": None},
        {"layer_types": ["unheard of"]},
    ],
    ids=lambda changes: next(iter(changes)),
)
@pytest.mark.parametrize("name", FAMILIES)
def test_sizes_that_are_none_leave_a_plan_without_them(name, sound, tmp_path, changes):
    folder = shutil.copytree(sound / name, tmp_path / "model")
    stated = json.loads((folder / "config.json").read_text())
    if name == "lora_vlm":
        changes = {"text_config": stated["text_config"] | changes}
    edit(folder, **changes)
    cfg = config(name, str(folder))
    for item in cfg.items("train_experts"):
        assert family(name).cost(cfg, "train_experts", item, {}, False) is None
    (folder / "config.json").write_text("{")
    assert family(name).cost(cfg, "train_experts", item, {}, False) is None


def odd(seed: int) -> tuple[str, dict]:
    """Return a kind of model and settings of it, some of which stock mixtures have no place for."""
    draw = random.Random(seed)
    kind = draw.choice(["llama", "qwen3", "mistral"])
    choices = {
        "llama": [{"attention_bias": True}, {"mlp_bias": True}, {}],
        "qwen3": [
            {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
            {
                "use_sliding_window": True,
                "sliding_window": 4,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            {"attention_bias": True},
            {},
        ],
        # Its class passes a bias over
        "mistral": [{"sliding_window": 8}, {"sliding_window": None}, {"attention_bias": True}],
    }
    return kind, draw.choice(choices[kind])


@pytest.mark.parametrize("seed", range(12))
def test_what_cannot_be_bundled_is_told_exactly_where_deploy_would_refuse(seed, tmp_path):
    kind, changes = odd(seed)
    sizes = {
        "vocab_size": small.VOCAB,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes | changes))
    model.save_pretrained(tmp_path / "model")
    notes = here(config("ffn_moe", str(tmp_path / "model")))
    # A bias, or layers that differ, are all that Mixtral and Qwen3-MoE lack
    biased = any("bias" in name for name, _ in model.named_parameters())
    mixed = len(set(model.config.to_dict().get("layer_types") or [0])) > 1
    assert bool(notes) == (mixed or (biased and kind != "qwen3"))
    for note in notes:
        assert "cannot be bundled" in note and "choose another trunk.init" in note
    assert notes == laptop("ffn_moe", tmp_path / "model", tmp_path)
    # Adapters are bundled beside the model, which is no mixture then
    router = {"steps": 0, "top_k": 1, "prompt_tokens": 4}
    adapters = config("ffn_moe", str(tmp_path / "model"), expert__form="adapter", router=router)
    assert here(adapters) == []


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "original_max_position_embeddings": 32,
}
HALVES = ["full_attention", "sliding_attention"]
STRANGE = {
    "a way that none knows": ("rope_type is 'su'", {"rope_scaling": {"type": "su"}}),
    "a number as text": ("rope_theta is '1e4'", {"rope_theta": "1e4", "rope_parameters": None}),
    "each kind its own": ("rope_parameters differ", {"rope_parameters": {"full_attention": YARN}}),
    "half a head": (
        "partial_rotary_factor is 0.5",
        {"rope_scaling": YARN | {"partial_rotary_factor": 0.5}},
    ),
    "no numbers": ("rope_parameters of rope_type yarn", {"rope_scaling": YARN | {"factor": 0}}),
    "long and short": (
        "original_max_position_embeddings",
        {"rope_scaling": LONG | {"original_max_position_embeddings": 16}},
    ),
    "too few of them": (
        "rope_parameters of rope_type longrope",
        {
            "rope_scaling": LONG
            | {"original_max_position_embeddings": 32, "short_factor": [1.0] * 3}
        },
    ),
    "a Ministral": (
        "layer_types has full_attention",
        {"model_type": "mistral", "sliding_window": 4, "layer_types": HALVES},
    ),
    "windows of a Llama": ("layer_types has sliding", {"layer_types": HALVES}),
    "a window of nothing": (
        "layer_types has sliding.*sliding_window None",
        {"model_type": "qwen3", "layer_types": HALVES, "sliding_window": 4},
    ),
    "no window": ("sliding_window is 0", {"model_type": "mistral", "sliding_window": 0}),
    "what comes is seen": ("is_causal is false", {"is_causal": False}),
    "no activation": ("hidden_act is 'swoosh'", {"hidden_act": "swoosh"}),
    "padding outside": ("pad_token_id is 999", {"pad_token_id": 999}),
}


@pytest.mark.parametrize("what", STRANGE)
def test_what_the_class_would_not_compute_is_refused_by_the_field(what, sound, tmp_path):
    said, changes = STRANGE[what]
    folder = shutil.copytree(sound / "ffn_moe", tmp_path / "model")
    edit(folder, **changes)
    cfg = config("ffn_moe", str(folder))
    for look in (lambda: here(cfg), lambda: laptop("ffn_moe", folder, tmp_path)):
        with pytest.raises(ConfigError, match=said):
            look()
    with pytest.raises(MismatchError, match=said):
        open_pretrained(cfg)


def test_what_was_asked_of_a_class_once_is_nothing_of_the_model(sound, tmp_path):
    folder = shutil.copytree(sound / "ffn_moe", tmp_path / "model")
    asked = {"return_dict": False, "output_attentions": True, "output_hidden_states": True}
    edit(folder, **asked)
    cfg = config("ffn_moe", str(folder))
    assert here(cfg) == []
    trunk, dummy = open_pretrained(cfg)
    ids_BT = torch.arange(6).unsqueeze(0)
    with torch.no_grad():
        found = trunk.hidden(ids_BT, dummy) @ trunk.head.T
        wanted = whole("llama")(ids_BT).logits
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert not asked.keys() & stated_settings(ModelSource(folder)).keys()


def planned(cfg, tmp_path: Path) -> str:
    """Return what `plan` prints."""
    from rich.console import Console

    from pipeline.run import dry_run
    from pipeline.store.artifacts import Store

    console = Console(record=True, width=200)
    dry_run.show_plan(cfg, Store(tmp_path / "store"), console)
    return console.export_text()


def test_a_plan_tells_no_time_where_the_model_is_not_here(tmp_path):
    cfg = config("ffn_moe", "nobody/nothing", trunk__revision="0" * 40, dense__baselines=())
    told = planned(cfg, tmp_path)
    assert "to train: cannot be told before the model is on this machine" in told
    assert "0 s" not in told


@pytest.mark.parametrize("name", ["ffn_moe", "lora_vlm"])
def test_a_model_that_is_not_here_is_told_to_be_taken_for_one_on_the_hub(name):
    """A slip in the path of a folder would be asked of the Hub without a word."""
    (told,) = here(config(name, "models/tiny-qwen"))
    assert "models/tiny-qwen is not on this machine" in told
    assert "begin its path with ./" in told


def test_the_plan_prints_it_and_the_first_stage_says_it(tmp_path, monkeypatch):
    from pipeline.families.ffn_moe import family as ffn

    folder = tmp_path / "model"
    whole("llama", attention_bias=True).save_pretrained(folder)
    cfg = config("ffn_moe", str(folder))
    told = planned(cfg, tmp_path)
    assert "note: trunk.init: the trunk (llama) has attention_bias" in told
    assert "to train: " in told and "cannot be told before" not in told
    said = []
    monkeypatch.setattr(ffn.text, "make_tokenizer", lambda *_: {})
    monkeypatch.setattr(ffn, "survey", lambda *_: None)

    class Parts:
        def eye(self):
            return None

    ffn.tokenizer(cfg, Parts(), tmp_path, lambda text, _share: said.append(text))
    assert any("cannot be bundled" in text for text in said)
    edit(folder, model_type="bert")
    with pytest.raises(ConfigError, match="bert"):
        ffn.tokenizer(cfg, Parts(), tmp_path, quiet)
    assert torch.is_tensor(whole("llama", attention_bias=True).lm_head.weight)


def test_a_tokenizer_that_has_more_entries_than_the_trunk_is_told_before_text_is_read(
    sound, tmp_path
):
    """As where tokens were added to it and the model was saved before: preprocess may be hours."""
    model = shutil.copytree(sound / "ffn_moe", tmp_path / "model")
    entries = json.loads((model / "config.json").read_text())["vocab_size"]
    tokenizer = Tokenizer(WordLevel({f"t{i}": i for i in range(entries)}, unk_token="t0"))
    tokenizer.save(str(model / "tokenizer.json"))
    cfg = small.config(trunk__init=str(model), tokenizer__pretrained=str(model))
    assert here(cfg) == []
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save(str(model / "tokenizer.json"))
    with pytest.raises(
        MismatchError, match=f"has {entries}: tokens were added .* Remove those from"
    ):
        here(cfg)
    Tokenizer(WordLevel({}, unk_token="t0")).save(str(model / "tokenizer.json"))
    assert here(cfg) == []
    (model / "tokenizer.json").write_text("torn")
    with pytest.raises(DataError, match=r"tokenizer.json: it is torn"):
        here(cfg)
