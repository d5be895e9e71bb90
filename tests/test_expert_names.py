"""An expert may be called like any parameter, module or attribute of the libraries below."""

import copy
import random
import string

import lora_small
import pytest
import torch
from peft.tuners.lora import LoraLayer
from pydantic import TypeAdapter, ValidationError
from torch import nn

from pipeline.config.base import AdapterName
from pipeline.families.adapters import peft_io
from pipeline.families.adapters.inference import BatchRow, GenerationLimits, MultiAdapterModel
from pipeline.families.adapters.sections import RESERVED
from pipeline.families.load import parse
from pipeline.families.lora_vlm import base

TRIED = 14  # names that are loaded side by side


def names_of(model: nn.Module) -> list[str]:
    """Return every word that a parameter, a module or an attribute of the model is called by, where
    our rule allows it as a name, and one-letter parts of those."""
    words = {"weight", "bias", "lora_a", "base_layer", "adapter", "a", "q", "x" * 64}
    for key, _ in model.named_parameters():
        words |= {part.lower() for part in key.split(".")}
    for kind in (nn.ModuleDict, LoraLayer, type(model)):
        words |= {name.strip("_").lower() for name in dir(kind)}
    rule = TypeAdapter(AdapterName)
    allowed = []
    for word in sorted(words - {*RESERVED}):
        try:
            allowed.append(rule.validate_python(word))
        except ValidationError:
            continue
    return allowed


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    parts = lora_small.prepared(tmp_path_factory.mktemp("names"))
    return parts.cfg.loras, parts.folder("train_shared")


@pytest.mark.parametrize("seed", range(3))
def test_an_adapter_of_any_name_is_kept_loaded_and_asked_as_what_it_is(place, tmp_path, seed):
    loras, folder = place
    opened = base.open_base(folder, loras.base)
    draw = random.Random(seed)
    names = draw.sample(names_of(opened.model), TRIED)
    # one within the other, and the ones that the library's own keys hold
    names = [*dict.fromkeys([*names, "weight", "a", "ab", "lora_a", "q_proj", "layers"])]
    draw.shuffle(names)

    options = loras.options("color")
    kept = {}
    for number, name in enumerate(names):
        # as it was opened: to open it again takes longer
        fresh = copy.deepcopy(opened.model)
        torch.manual_seed(number)
        model = peft_io.add(fresh, name, options)
        with torch.no_grad():
            for parameter in peft_io.adapter_parameters(model, name).values():
                parameter.normal_(std=0.1)
        files = peft_io.files(model, name, opened.pin, {})
        kept[name] = files[peft_io.TENSORS]
        lora_small.write(files, tmp_path / name)
        if number:
            assert kept[name].keys() == kept[names[0]].keys(), "a key lost a part of itself"
            continue
        with torch.no_grad():
            asked = opened.chat.requests([("How many dots are there?", ())])
            alone = model.eval()(**asked).logits[:, -1]

    model = opened.model
    for name in names:
        model = peft_io.load(model, tmp_path / name, name, opened.pin)
    for name in names:
        found = peft_io.files(model, name, opened.pin, {})[peft_io.TENSORS]
        assert all(torch.equal(found[key], kept[name][key]) for key in kept[name]), name

    together = MultiAdapterModel(model, opened.chat, GenerationLimits())
    assert together.adapters == tuple(names)
    ids = together.encode("How many dots are there?", ())
    rows = [BatchRow(ids, (), name) for name in names]
    every = list(range(alone.shape[-1]))
    logits = together.label_logits(rows, every)
    torch.testing.assert_close(logits[:1], alone)
    # each row under its own adapter: no two of them answer alike
    assert len({tuple(row) for row in logits.tolist()}) == len(names)


@pytest.mark.parametrize("name", [*RESERVED, "Color", "a.b", "a-b", "", "1st", "é", "a b", "a\n"])
def test_what_may_be_no_name_is_refused_when_the_configuration_is_read(name):
    entry = dict(lora_small.SETTINGS["loras"]["experts"][0], name=name)
    loras = lora_small.SETTINGS["loras"] | {"experts": [entry]}
    # everything else that is said of its former name is told beside it
    with pytest.raises(ValidationError, match=r"name that expert otherwise|experts\.0\.name"):
        parse(lora_small.SETTINGS | {"loras": loras})


@pytest.mark.parametrize("seed", range(3))
def test_a_domain_may_be_called_anything_but_the_trunks_own_network(seed):
    draw = random.Random(seed)
    letters = string.ascii_letters + string.digits
    names = ["weight", "mlp.experts.0", "gate", "base", "default", "shared"]
    names += ["".join(draw.choices(letters, k=draw.randrange(1, 64))) for _ in range(4)]
    raw = {"family": "ffn_moe", "partition": {"by": "labels", "domains": names}}
    assert parse(raw).experts == tuple(names)
    # Where a bundle holds the trunk, that is who reads as base
    for section in ({"trunk": {"anchor": "keep"}}, {"expert": {"form": "low_rank"}}):
        with pytest.raises(ValidationError, match="base is what the bundle's trunk is asked for"):
            parse(raw | section)
    names[draw.randrange(len(names))] = "anchor"
    for kept in ("keep", "discard"):
        raw = raw | {"trunk": {"anchor": kept}}
        with pytest.raises(ValidationError, match="anchor is the trunk's own network"):
            parse(raw)
