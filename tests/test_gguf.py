"""What a GGUF file holds of a trunk and of a tokenizer, held against llama.cpp, and what is refused
by name.
"""

import weakref
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from gguf.quants import dequantize, quantize
from tokenizers import Regex, decoders, models, normalizers, trainers
from tokenizers import Tokenizer as Model
from tokenizers import pre_tokenizers as pre
from transformers import AutoConfig
from transformers.convert_slow_tokenizer import generate_merges

from pipeline.data.text.tokenizer import END, Tokenizer, _ready, pretrained, train
from pipeline.errors import MismatchError
from pipeline.families import ExportWish
from pipeline.families.ffn_moe.export.formats import check
from pipeline.families.ffn_moe.export.gguf_file import Experts, Gguf, write_gguf
from pipeline.families.ffn_moe.export.gguf_sentencepiece import BYTES
from pipeline.families.ffn_moe.export.gguf_tokenizer import LLAMA3, QWEN2, vocabulary
from pipeline.families.ffn_moe.pretrained import stated_settings
from pipeline.protocols import quiet
from pipeline.store.model_sources import ModelSource
from pipeline.store.streamed import Streamed
from tests import small
from tests.test_export import TEXTS, Llama, same_in_llama
from tests.test_trunk import whole

STRANGE = (
    "Ünïcödé  naïve, \t\n\n  x\r\n\r\n   end   ",
    "你好，世界。 мир ١٢٣٤٥ ½ ² Ⅷ ＡＢＣ １２３",
    "I'M it'S we'Ve they'rE don't 'S 'll I'LL",
    "🙂👩‍👩‍👧 ok..!!??\n\n\n 12345678 1,234.56 x=1;y=22",
    "a\u00a0b\u3000c\u2028d\u200b e   ",
    f"{END} spelled",
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """A byte-level BPE as a run trains one."""
    return train(300, TEXTS)


def written(model, tokenizer: Tokenizer, folder: Path) -> list[str]:
    """Write a dense model as a stock checkpoint and as a GGUF file; return the notes."""
    settings = model.config.to_dict()
    words = vocabulary(tokenizer, settings["vocab_size"], (), (tokenizer.end_id,))
    tensors = {name: Streamed.of(p) for name, p in model.named_parameters()}
    model.save_pretrained(folder)
    for name, text in tokenizer.stock_files(()).items():
        (folder / name).write_text(text)
    return write_gguf(folder / "x.gguf", Gguf("x", settings, tensors), words, None, quiet)


@pytest.mark.parametrize("dtype", [None, "q8_0"])
def test_of_a_layers_experts_one_is_there_at_a_time(dtype, tokenizer, tmp_path):
    model = whole("qwen3", vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=64)
    settings = model.config.to_dict()
    trunk, first = {}, {}
    for name, parameter in model.named_parameters():
        (first if ".mlp." in name else trunk)[name] = parameter.detach()
    read = []

    def one(tensor: torch.Tensor) -> Streamed:
        def copied() -> torch.Tensor:
            assert all(earlier() is None for earlier in read), "one before it is still there"
            made = tensor.clone()
            read.append(weakref.ref(made))
            return made

        return Streamed(tuple(tensor.shape), tensor.dtype, copied)

    each = [first, {name: -2 * tensor for name, tensor in first.items()}]
    gates = {layer: Streamed.of(torch.ones(2, 32)) for layer in range(2)}
    experts = Experts(tuple({n: one(t) for n, t in own.items()} for own in each), gates, 1)
    streamed = {name: Streamed.of(tensor) for name, tensor in trunk.items()}
    words = vocabulary(tokenizer, settings["vocab_size"], (), (tokenizer.end_id,))
    write_gguf(tmp_path / "x.gguf", Gguf("x", settings, streamed, experts), words, dtype, quiet)
    assert len(read) == 2 * len(first)
    for tensor in GGUFReader(tmp_path / "x.gguf").tensors:
        if tensor.name.endswith("ffn_down_exps.weight"):
            layer = tensor.name.split(".")[1]
            name = f"model.layers.{layer}.mlp.down_proj.weight"
            wanted = torch.stack([own[name] for own in each]).numpy()
            if dtype:
                wanted = dequantize(quantize(wanted, tensor.tensor_type), tensor.tensor_type)
            found = dequantize(tensor.data, tensor.tensor_type)
            assert (found.reshape(wanted.shape) == wanted).all()


def test_the_tokenizer_of_a_file_is_its_own_whatever_lies_beside_it(tokenizer, tmp_path):
    written(whole("llama", vocab_size=tokenizer.vocab_size), tokenizer, tmp_path)
    for name, text in train(270, TEXTS[:1]).stock_files(()).items():
        (tmp_path / name).write_text(text)
    own = pretrained(str(tmp_path / "x.gguf"))
    assert own.end_id == tokenizer.end_id
    assert own.encode(TEXTS) == tokenizer.encode(TEXTS)


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e3,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
BIASED = {"attention_bias": True, "mlp_bias": True}
HELD = {
    "biases": ("llama", BIASED | {"tie_word_embeddings": True}),
    "llama3": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "linear": ("mistral", {"rope_parameters": LINEAR}),
    "qwen3, linear": ("qwen3", {"rope_parameters": LINEAR}),
}


@pytest.mark.parametrize("case", HELD)
def test_what_a_trunk_may_have_is_held(case, tokenizer, tmp_path):
    kind, sizes = HELD[case]
    torch.manual_seed(1)
    sizes = sizes | {"max_position_embeddings": 128, "vocab_size": tokenizer.vocab_size}
    model = whole(kind, **sizes)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    assert written(model, tokenizer, tmp_path) == []
    same_in_llama(tmp_path / "x.gguf", tmp_path, TEXTS[0])


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_positions_that_a_file_stretches_are_read_of_it(kind, tokenizer, tmp_path):
    written(
        whole(kind, vocab_size=tokenizer.vocab_size, rope_parameters=LINEAR), tokenizer, tmp_path
    )
    file = tmp_path / "x.gguf"
    read = AutoConfig.for_model(**stated_settings(ModelSource(file)))
    assert read.rope_parameters == LINEAR
    # Any other word of as many letters
    file.write_bytes(file.read_bytes().replace(b"linear", b"longer", 1))
    with pytest.raises(ValueError, match=r"stretched by longer .*; name the checkpoint"):
        stated_settings(ModelSource(file))


def test_a_part_of_a_split_model_says_how_many_there_are(tmp_path):
    file = tmp_path / "x-00002-of-00003.gguf"
    writer = GGUFWriter(file, "")
    writer.add_uint16("split.count", 3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    # A later one has no word of what it is of
    with pytest.raises(ValueError, match="one of 3 files .*--merge"):
        stated_settings(ModelSource(file))


NOT_HELD = {
    "activation": ("llama", {"hidden_act": "gelu"}, r"have gelu \(hidden_act\), and .* silu in a"),
    "bias": ("qwen3", {"attention_bias": True}, r"no place for .*o_proj\.bias in a qwen3"),
    "llama3": ("qwen3", {"rope_parameters": LLAMA3_ROPE}, "stretch positions by llama3 in a qwen3"),
    "layers": (
        "qwen3",
        {
            "layer_types": ["full_attention", "sliding_attention"],
            "sliding_window": 8,
            "use_sliding_window": True,
        },
        "layers differ in attention",
    ),
}


@pytest.mark.parametrize(("kind", "sizes", "said"), NOT_HELD.values(), ids=NOT_HELD)
def test_what_it_cannot_hold_is_refused_by_name(kind, sizes, said, tokenizer, tmp_path):
    model = whole(kind, vocab_size=tokenizer.vocab_size, **sizes)
    with pytest.raises(MismatchError, match=rf"{said}.*format hf \(one expert: in expert"):
        written(model, tokenizer, tmp_path)


@pytest.mark.parametrize(("kind", "sizes", "said"), NOT_HELD.values(), ids=NOT_HELD)
def test_a_plan_refuses_it_too_before_anything_is_made(kind, sizes, said, tmp_path):
    whole(kind, **sizes).config.save_pretrained(tmp_path)
    cfg = small.config(trunk__init=str(tmp_path), trunk__steps=0)
    for wish in (ExportWish("gguf"), ExportWish("gguf", expert="alpha")):
        with pytest.raises(MismatchError, match=said):
            check(cfg, wish)


def test_a_plan_refuses_biased_experts_together_and_takes_one(tmp_path):
    whole("llama", mlp_bias=True).config.save_pretrained(tmp_path)
    cfg = small.config(trunk__init=str(tmp_path), trunk__steps=0)
    with pytest.raises(MismatchError, match="in the experts of a llama model"):
        check(cfg, ExportWish("gguf"))
    check(cfg, ExportWish("gguf", expert="alpha"))
    check(cfg, ExportWish("gguf", dense=True))


def test_biases_of_experts_are_refused_and_not_left_out(tokenizer, tmp_path):
    model = whole("llama", vocab_size=tokenizer.vocab_size, mlp_bias=True)
    trunk, ffn = {}, {}
    for name, parameter in model.named_parameters():
        (ffn if ".mlp." in name else trunk)[name] = Streamed.of(parameter.detach())
    gates = {layer: Streamed.of(torch.ones(2, 16)) for layer in range(2)}
    mixture = Gguf("x", model.config.to_dict(), trunk, Experts((ffn, ffn), gates, 1))
    words = vocabulary(tokenizer, tokenizer.vocab_size, (), (tokenizer.end_id,))
    said = r"no place for .*gate_proj\.bias in the experts of a llama model.*--expert"
    with pytest.raises(MismatchError, match=said):
        write_gguf(tmp_path / "x.gguf", mixture, words, None, quiet)


def test_a_short_window_becomes_the_context(tokenizer, tmp_path):
    model = whole("mistral", vocab_size=tokenizer.vocab_size, sliding_window=8)
    (note,) = written(model, tokenizer, tmp_path)
    assert "Texts are of 8 tokens at most" in note
    found = GGUFReader(tmp_path / "x.gguf").get_field("llama.context_length")
    assert found.contents() == 8


def bpe(cuts, ignore_merges: bool = False, normalizer=None) -> Tokenizer:
    """Return a byte-level BPE that cuts texts in some way."""
    model = Model(models.BPE(ignore_merges=ignore_merges))
    model.pre_tokenizer = cuts
    model.decoder = decoders.ByteLevel()
    if normalizer:
        model.normalizer = normalizer
    alphabet = sorted(pre.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator([*TEXTS, *STRANGE], trainer)
    return _ready(model, END, {})


def bytes_after(*cuts) -> pre.PreTokenizer:
    """Return some cuts, and then bytes without GPT-2's own."""
    return pre.Sequence([*cuts, pre.ByteLevel(add_prefix_space=False, use_regex=False)])


WORDS = pre.ByteLevel(add_prefix_space=False)
KNOWN = {
    "gpt-2": lambda: bpe(WORDS),
    "smollm": lambda: bpe(pre.Sequence([pre.Digits(individual_digits=True), WORDS])),
    "smaug-bpe": lambda: bpe(bytes_after(pre.Split(Regex(LLAMA3), "isolated"))),
    "llama-bpe": lambda: bpe(bytes_after(pre.Split(Regex(LLAMA3), "isolated")), True),
    "qwen2": lambda: bpe(bytes_after(pre.Split(Regex(QWEN2), "removed", invert=True))),
}


def sentencepiece(legacy: bool, complete: bool = True) -> Tokenizer:
    """Return a tokenizer as transformers converts one from SentencePiece; incomplete: with one way
    to each piece alone, as a BPE learns them."""
    learned = Model(models.BPE())
    learned.normalizer = normalizers.Replace(" ", "▁")
    learned.pre_tokenizer = pre.Split(Regex("▁?[^▁]+"), "isolated")
    trainer = trainers.BpeTrainer(vocab_size=300, show_progress=False)
    learned.train_from_iterator(TEXTS, trainer)
    order = sorted(learned.get_vocab(), key=learned.token_to_id)
    pieces = ["<unk>", "<s>", "</s>", *BYTES, *order]
    vocab = {piece: token for token, piece in enumerate(pieces)}
    ranked = {piece: -float(token) for piece, token in vocab.items()}
    merges = generate_merges(vocab, ranked, {"<unk>", "<s>", "</s>", *BYTES})
    if not complete:
        merges = list({left + right: (left, right) for left, right in merges}.values())
    bpe = models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    model = Model(bpe)
    if legacy:
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        model.normalizer = normalizers.Sequence(steps)
    else:
        model.pre_tokenizer = pre.Metaspace(prepend_scheme="first", split=False)
    model.add_special_tokens(["<unk>", "<s>", "</s>"])
    ends = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    model.decoder = decoders.Sequence([*ends, decoders.Strip(" ", 1, 0)])
    return _ready(model, "</s>", {"bos_token": "<s>", "add_bos_token": True})


KNOWN |= {
    "legacy": lambda: sentencepiece(True),
    "default": lambda: sentencepiece(False),
}


@pytest.mark.parametrize("name", KNOWN)
def test_llama_cpp_cuts_texts_as_the_tokenizer_does(name, tmp_path):
    tokenizer = KNOWN[name]()
    # More rows than entries, as pretrained embeddings have
    written(whole("llama", vocab_size=tokenizer.vocab_size + 3), tokenizer, tmp_path)
    words = vocabulary(tokenizer, tokenizer.vocab_size + 3, (), (tokenizer.end_id,))
    assert words.pre == ("default" if name == "legacy" else name)
    llama = Llama(tmp_path / "x.gguf")
    for text in (*STRANGE, *TEXTS[:5]):
        (encoded,) = tokenizer.encode([text])
        # What spells a special token is text, as in a run
        found = llama.ask("/tokenize", content=text, add_special=True, parse_special=False)
        assert found["tokens"] == encoded.ids, text


def words_only() -> Tokenizer:
    """Return a tokenizer of whole words."""
    model = Model(models.WordLevel({END: 0, "w": 1}, unk_token=END))
    return _ready(model, END, {})


UNKNOWN = {
    "words": (words_only, "it is a WordLevel model and no byte-level BPE"),
    "lower case": (lambda: bpe(WORDS, normalizer=normalizers.Lowercase()), "changes the text"),
    "own pattern": (
        lambda: bpe(bytes_after(pre.Split(Regex("..?"), "isolated"))),
        r"cuts texts by '\.\.\?'",
    ),
    "prefix": (lambda: bpe(pre.ByteLevel(add_prefix_space=True)), "add_prefix_space"),
    "pieces in one way alone": (lambda: sentencepiece(True, False), "some of its parts alone"),
    "whole words": (lambda: bpe(WORDS, ignore_merges=True), "cuts texts by"),
}


@pytest.mark.parametrize(("make", "said"), UNKNOWN.values(), ids=UNKNOWN)
def test_a_tokenizer_that_llama_cpp_has_none_like_is_refused(make, said):
    tokenizer = make()
    with pytest.raises(MismatchError, match=f"{said}.*export it in the format hf"):
        vocabulary(tokenizer, tokenizer.vocab_size, (), (tokenizer.end_id,))


def test_two_tokens_in_front_are_refused_and_nfc_is_told(tokenizer):
    with pytest.raises(MismatchError, match="begins with 2 tokens"):
        vocabulary(tokenizer, 300, (0, 1), (0,))
    composed = bpe(WORDS, normalizer=normalizers.NFC())
    (note,) = vocabulary(composed, composed.vocab_size, (), (composed.end_id,)).notes
    assert "NFC" in note
