"""Rows of one batch under adapters of their own, held against PEFT's own `adapter_names`."""

import gc
import warnings
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen3Config, Qwen3ForCausalLM

from pipeline.families.adapters import row_adapters
from pipeline.families.adapters.peft_io import NO_ADAPTER, peft_name
from pipeline.families.adapters.row_adapters import RowAdapters
from tests.small_engines import SIZES, VOCAB

# Each on other projections and of another rank and scale; PEFT's word for the base is no adapter
TARGETS = {
    "ash": (2, 3, ["q_proj", "down_proj"]),
    "birch": (5, 8, ["q_proj", "v_proj", "down_proj"]),
    "cedar": (3, 1, ["down_proj", "gate_proj"]),
}
MANY = ("ash", None, "cedar", "birch", "ash", None)


def adapted():
    """Return a random model with three random adapters."""
    torch.manual_seed(1)
    model = Qwen3ForCausalLM(Qwen3Config(**SIZES))
    with warnings.catch_warnings():  # peft asks transformers in a way that it is leaving
        warnings.simplefilter("ignore", FutureWarning)
        for name, (rank, alpha, modules) in TARGETS.items():
            shape = LoraConfig(
                r=rank, lora_alpha=alpha, target_modules=modules, init_lora_weights=False
            )
            if name == "ash":
                model = get_peft_model(model, shape, adapter_name=peft_name(name))
            else:
                model.add_adapter(peft_name(name), shape)
    return model.requires_grad_(False).eval()


def peft_own(model, ids_BT, names):
    """Return the logits that PEFT has for rows of these readers."""
    known = [NO_ADAPTER if name is None else peft_name(name) for name in names]
    return model(input_ids=ids_BT, adapter_names=known).logits


def ids(names):
    """Return random tokens for so many rows."""
    return torch.randint(VOCAB, (len(names), 7), generator=torch.Generator().manual_seed(2))


# all in two products; one adapter after another; what a layer has of the two cheaper
@pytest.mark.parametrize("start", [10**9, 0, row_adapters.START])
@pytest.mark.parametrize("names", [MANY, ("birch",) * 3, (None, None), ("ash", None), (None,)])
def test_rows_are_what_peft_makes_of_them(names, start, monkeypatch):
    monkeypatch.setattr(row_adapters, "START", start)
    model = adapted()
    wanted = peft_own(model, ids(names), names)
    rows = RowAdapters(model)
    for _ in range(2):  # what was kept of the first pass is that of the second
        with rows.reading(names):
            found = model(input_ids=ids(names)).logits
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    # beside it the model is PEFT's
    torch.testing.assert_close(peft_own(model, ids(names), names), wanted, rtol=1e-4, atol=1e-5)


def test_the_adapters_of_a_layer_take_two_products(monkeypatch):
    monkeypatch.setattr(row_adapters, "START", 10**9)
    model = adapted()
    rows = RowAdapters(model)
    seen = []
    linear = torch.nn.functional.linear

    def counted(*given):
        seen.append(1)
        return linear(*given)

    monkeypatch.setattr(row_adapters.F, "linear", counted)
    with rows.reading(MANY):
        model(input_ids=ids(MANY))
    base = [name for name, each in model.named_modules() if type(each) is torch.nn.Linear]
    products = [name for name in base if "lora_" not in name]
    adapting = {name for name in base if name.endswith("base_layer")}
    assert len(seen) == len(products) + 2 * len(adapting)


def test_an_adapter_that_is_not_finite_stays_in_its_rows():
    model = adapted()
    wanted = peft_own(model, ids(MANY), MANY)
    for name, weight in model.named_parameters():
        if peft_name("ash") in name:
            weight.fill_(float("nan"))
    with RowAdapters(model).reading(MANY):
        found = model(input_ids=ids(MANY)).logits
    others = [row for row, name in enumerate(MANY) if name != "ash"]
    torch.testing.assert_close(found[others], wanted[others], rtol=1e-4, atol=1e-5)
    assert found[0].isnan().all()


def test_two_that_serve_one_model_do_not_meet_and_keep_no_copy():
    model = adapted()
    wanted = peft_own(model, ids(MANY), MANY)
    first, second = RowAdapters(model), RowAdapters(model)
    for rows in (second, first, second):
        with rows.reading(MANY):
            found = model(input_ids=ids(MANY)).logits
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    storages = {layer.lora_A[name].weight.untyped_storage().data_ptr() for name in layer.lora_A}
    assert len(storages) == 1


def test_an_unknown_name_and_an_error_leave_nothing_behind():
    model = adapted()
    wanted = peft_own(model, ids(MANY), MANY)
    rows = RowAdapters(model)
    with pytest.raises(KeyError, match="oak"), rows.reading(["oak"]):
        pass
    with pytest.raises(IndexError), rows.reading(MANY):
        model(input_ids=ids(MANY) + VOCAB)
    with pytest.raises(ValueError, match="2 rows are read by 6"), rows.reading(MANY):
        model(input_ids=ids(MANY[:2]))
    torch.testing.assert_close(peft_own(model, ids(MANY), MANY), wanted)


def test_a_model_that_is_let_go_is_gone_at_once():
    model = adapted()
    rows = RowAdapters(model)
    with rows.reading(MANY):
        model(input_ids=ids(MANY))
    layer = weakref.ref(model.base_model.model.model.layers[0].mlp.down_proj)
    gc.disable()
    try:
        del model
        assert layer() is None
    finally:
        gc.enable()
