"""The trunk: a transformers model whose feed-forward networks were taken out and can be put back.

B sequences, T tokens.
"""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.model.experts import clone
from pipeline.model.loss import cross_entropy
from pipeline.model.pretrained import fitted, mapped
from pipeline.model.trunk import (
    build,
    extract_ffn,
    open_tensors,
    settings_of,
)

IDS_BT = torch.randint(40, (2, 9), generator=torch.Generator().manual_seed(0))


def settings(kind: str = "qwen3", **changes) -> dict:
    """Return Hugging Face config fields of a small model."""
    rope = {"rope_type": "default", "rope_theta": 10_000.0}
    return {
        "model_type": kind,
        "vocab_size": 40,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 24,
        "max_position_embeddings": 32,
        "tie_word_embeddings": False,
        "rope_parameters": rope,
        "bos_token_id": 0,
        "eos_token_id": 0,
    } | changes


def whole(kind: str = "qwen3", **changes):
    """Return a random transformers model; the same each time."""
    from transformers import AutoConfig

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**settings(kind, **changes)), dtype=torch.float32
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def pretrained(folder):
    """Return trunk and dummy of a checkpoint, mapped from its file."""
    settings = AutoConfig.from_pretrained(folder).to_dict()
    return open_tensors(settings, *fitted(settings, mapped([folder / "model.safetensors"])))


def logits(trunk, ffn):
    """Return logits_BTV."""
    return trunk.hidden(IDS_BT, ffn) @ trunk.head.T


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["qwen3", "llama", "mistral"])
def test_trunk_and_dummy_are_the_model_they_came_from(kind, tied, tmp_path):
    model = whole(kind, tie_word_embeddings=tied)
    wanted = model(IDS_BT).logits.detach()
    model.save_pretrained(tmp_path)
    for trunk, dummy in (extract_ffn(model), pretrained(tmp_path)):
        torch.testing.assert_close(logits(trunk, dummy), wanted, rtol=0, atol=1e-5)
        assert ("lm_head.weight" in trunk.named()) is not tied
        assert not any(".mlp." in name for name in trunk.named()) and all(
            ".mlp." in name for name in dummy.named()
        )


@pytest.mark.parametrize("tied", [True, False])
def test_a_trunk_is_made_again_from_its_settings_and_tensors(tied):
    trunk, dummy = extract_ffn(whole(tie_word_embeddings=tied))
    stored = json.loads(json.dumps(settings_of(trunk)))
    again, other = build(stored)
    again.load({n: p.detach() for n, p in trunk.named().items()})
    other.load(dummy.named())
    assert torch.equal(logits(again, other), logits(trunk, dummy))
    assert torch.equal(again.head, trunk.head) and again.head is not trunk.head
    assert (again.head is again.network.model.embed_tokens.weight) is tied


def stored(model) -> tuple[dict, dict, dict]:
    """Return settings, trunk tensors and dummy tensors of a model, as an artifact holds them."""
    trunk, dummy = extract_ffn(model)
    tensors = ({n: p.detach().clone() for n, p in part.named().items()} for part in (trunk, dummy))
    return json.loads(json.dumps(settings_of(trunk))), *tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["qwen3", "llama", "mistral"])
def test_an_opened_trunk_is_a_built_and_filled_one_bit_for_bit_and_copies_nothing(
    kind, tied, dtype
):
    settings, *parts = stored(whole(kind, tie_word_embeddings=tied))
    tensors, ffn = ({n: t.to(dtype) for n, t in part.items()} for part in parts)
    built, dummy = (part.to(dtype) for part in build(settings))
    dummy.load(ffn)
    built.network.model.rotary_emb = open_tensors(settings, tensors, ffn)[
        0
    ].network.model.rotary_emb  # stays fp32
    built.load(tensors)
    wanted = logits(built.requires_grad_(False).eval(), dummy)
    trunk, own = open_tensors(settings, tensors, ffn)
    assert torch.equal(logits(trunk, own), wanted) and wanted.dtype == dtype
    for found, given in ((trunk.named(), tensors), (own.named(), ffn)):
        assert {n: p.data_ptr() for n, p in found.items()} == {
            n: t.data_ptr() for n, t in given.items()
        }
        assert not any(p.requires_grad for p in found.values())
    assert (trunk.head is trunk.network.model.embed_tokens.weight) is tied
    assert not trunk.training and not any(b.is_meta for b in trunk.buffers())


@pytest.mark.parametrize("theta", [100.0, 10_000.0])
def test_an_opened_trunk_has_the_rotary_embedding_of_its_settings(theta):
    rope = {"rope_type": "default", "rope_theta": theta}
    model = whole(rope_parameters=rope)
    wanted = model(IDS_BT).logits.detach()
    settings, tensors, ffn = stored(model)
    torch.testing.assert_close(
        logits(*open_tensors(settings, tensors, ffn)), wanted, rtol=0, atol=1e-5
    )


def test_without_its_tensors_an_opened_dummy_is_a_pattern_only():
    settings, tensors, _ = stored(whole())
    trunk, dummy = open_tensors(settings, tensors)
    assert all(p.is_meta for p in dummy.parameters()) and not any(
        p.is_meta for p in trunk.parameters()
    )


def test_opened_parts_that_do_not_fit_are_refused_by_name():
    settings, tensors, ffn = stored(whole())
    with pytest.raises(RuntimeError, match=r'Missing key.*"model\.norm\.weight"'):
        open_tensors(settings, {n: t for n, t in tensors.items() if n != "model.norm.weight"}, ffn)
    with pytest.raises(RuntimeError, match=r"model\.norm\.weight.*\[3\].*\[16\]"):
        open_tensors(settings, tensors | {"model.norm.weight": torch.zeros(3)}, ffn)
    with pytest.raises(RuntimeError, match="(?s)Missing key.*Unexpected key"):
        open_tensors(settings, tensors, tensors)


@pytest.mark.parametrize("tied", [True, False])
def test_a_trunk_of_its_own_trains_and_leaves_what_it_was_opened_from(tied):
    settings, tensors, ffn = stored(whole(tie_word_embeddings=tied))
    before = {n: t.clone() for n, t in tensors.items()}
    trunk, dummy = open_tensors(settings, tensors, ffn)
    wanted = logits(trunk, dummy)
    trunk.unfreeze()
    assert torch.equal(logits(trunk, dummy), wanted) and all(
        p.requires_grad for p in trunk.parameters()
    )
    assert (trunk.head is trunk.network.model.embed_tokens.weight) is tied
    with torch.no_grad():
        for parameter in trunk.parameters():
            parameter.add_(1)
    assert all(torch.equal(t, before[n]) for n, t in tensors.items())
    assert not torch.allclose(logits(trunk, dummy), wanted)


def test_one_trunk_serves_several_networks():
    trunk, dummy = extract_ffn(whole())
    other = clone(dummy)
    with torch.no_grad():
        other.layers[1].down_proj.weight.mul_(-1)
    first = logits(trunk, dummy)
    assert not torch.allclose(logits(trunk, other), first)
    assert torch.equal(logits(trunk, dummy), first)
    seen = []
    trunk.hidden(
        IDS_BT, lambda layer, x: seen.append((layer, tuple(x.shape))) or torch.zeros_like(x)
    )
    assert seen == [(0, (2, 9, 16)), (1, (2, 9, 16))]
    assert not any("ffn" in name for name in trunk.state_dict())


def test_later_tokens_do_not_change_earlier_ones():
    trunk, dummy = extract_ffn(whole())
    changed = IDS_BT.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % 40
    h_BTD, other_BTD = trunk.hidden(IDS_BT, dummy), trunk.hidden(changed, dummy)
    assert torch.equal(h_BTD[:, :6], other_BTD[:, :6]) and not torch.allclose(
        h_BTD[:, 6:], other_BTD[:, 6:]
    )


def test_a_frozen_trunk_gets_no_gradient_and_passes_one_on():
    trunk, dummy = extract_ffn(whole())
    trunk.requires_grad_(False).eval()
    own = clone(dummy)
    h_BTD = trunk.hidden(IDS_BT[:, :-1], own)
    cross_entropy(h_BTD.flatten(0, 1), trunk.head, IDS_BT[:, 1:].flatten()).backward()
    assert all(p.grad is None for p in trunk.parameters())
    assert all(p.grad.abs().sum() > 0 for p in own.parameters())
    assert all(p.grad is None for p in dummy.parameters())


@pytest.mark.parametrize("tied", [True, False])
def test_the_loss_and_every_gradient_are_those_of_the_whole_model(tied):
    model = whole(tie_word_embeddings=tied)
    model(IDS_BT, labels=IDS_BT).loss.backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    trunk, dummy = extract_ffn(model)
    h_BTD = trunk.hidden(IDS_BT[:, :-1], dummy)
    (
        cross_entropy(h_BTD.flatten(0, 1), trunk.head, IDS_BT[:, 1:].flatten(), chunk_tokens=5) / 16
    ).backward()
    found = {n: p.grad for n, p in {**trunk.named(), **dummy.named()}.items()}
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6)


def test_tensors_that_do_not_fit_are_refused_by_name():
    trunk, dummy = extract_ffn(whole())
    tensors = {n: p.detach() for n, p in trunk.named().items()}
    with pytest.raises(RuntimeError, match=r'Missing key.*"model\.norm\.weight"'):
        trunk.load({n: t for n, t in tensors.items() if n != "model.norm.weight"})
    with pytest.raises(RuntimeError, match='Unexpected key.*"extra"'):
        trunk.load(tensors | {"extra": torch.zeros(1)})
    with pytest.raises(RuntimeError, match=r"model\.norm\.weight.*\[3\].*\[16\]"):
        trunk.load(tensors | {"model.norm.weight": torch.zeros(3)})
    with pytest.raises(RuntimeError, match="(?s)Missing key.*Unexpected key"):
        dummy.load(tensors)


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_an_fp32_run_on_a_bf16_file_computes_in_fp32_with_the_files_values(kind):
    model = whole(kind, attention_bias=True).to(torch.bfloat16)
    settings, tensors, ffn = stored(model)
    settings["mlp_bias"] = False
    exact = {n: t.float() for n, t in tensors.items()}, {n: t.float() for n, t in ffn.items()}
    wanted = logits(*open_tensors(settings, *exact))
    trunk, dummy = open_tensors(settings, tensors, ffn, torch.float32)
    h_BTD = trunk.hidden(IDS_BT, dummy)
    found = h_BTD @ trunk.head.float().T
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    for name, parameter in trunk.named().items():
        if "norm" not in name:
            assert parameter.data_ptr() == tensors[name].data_ptr()


def test_what_is_trained_on_a_bf16_file_is_a_copy_in_fp32():
    settings, tensors, ffn = stored(whole().to(torch.bfloat16))
    trunk, dummy = open_tensors(settings, tensors, ffn, torch.float32)
    wanted = trunk.hidden(IDS_BT, dummy)
    trunk.unfreeze()
    own = clone(dummy)
    assert torch.equal(trunk.hidden(IDS_BT, own), wanted)
    for parameter in (*trunk.parameters(), *own.parameters()):
        assert parameter.dtype == torch.float32 and parameter.requires_grad
