"""Tokenizers that people bring: their special tokens never come out of text, what they put in front
leads every document, and what they lose is told; held against transformers' own class."""

import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers import processors as post
from tokenizers.trainers import BpeTrainer, UnigramTrainer, WordPieceTrainer
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.data.text import tokenizer as ours
from pipeline.data.text.tokenizer_check import check
from pipeline.errors import DataError, MismatchError
from pipeline.families.ffn_moe.evaluator import Evaluator
from pipeline.families.ffn_moe.export.gguf_tokenizer import vocabulary
from pipeline.protocols import quiet
from pipeline.serve.engine import CompletionEngine
from pipeline.serve.generation import Sampling
from pipeline.serve.opening import check_tokens
from pipeline.store.foreign import TEMPLATE_BYTES, check_model_files
from tests import small
from tests.small_text import opened, prepared
from tests.test_bundle import bundle_of
from tests.test_parity import made

TEXTS = [
    "The court hears a plea; the Judge reads <p>1,024</p> pages.\n",
    "def f(x):\n\treturn x + 1  # naïve 漢字 🙂",
    " two  spaces and </> <| marks |>",
] * 12
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def _byte_bpe() -> Tokenizer:
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    model.train_from_iterator(
        TEXTS, BpeTrainer(vocab_size=400, initial_alphabet=BYTES, show_progress=False)
    )
    return model


def _spaced_bpe() -> Tokenizer:
    """A BPE with ▁ for spaces and bytes for what it has no entry for, as of SentencePiece."""
    letters = sorted({char for text in TEXTS for char in text} - {" "})
    entries = ["<unk>", *[f"<0x{n:02X}>" for n in range(256)], "▁", *letters, "</", "s>", "<|"]
    vocab = {entry: number for number, entry in enumerate(entries)}
    merges = [("<", "/"), ("s", ">"), ("<", "|")]
    model = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    model.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    model.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return model


def _unigram() -> Tokenizer:
    model = Tokenizer(models.Unigram())
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    model.decoder = decoders.Metaspace()
    model.train_from_iterator(
        TEXTS,
        UnigramTrainer(
            vocab_size=120, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False
        ),
    )
    return model


def _word_piece() -> Tokenizer:
    model = Tokenizer(models.WordPiece(unk_token="<unk>"))
    model.normalizer = normalizers.BertNormalizer(lowercase=True)
    model.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    model.decoder = decoders.WordPiece()
    model.train_from_iterator(
        TEXTS, WordPieceTrainer(vocab_size=300, special_tokens=["<unk>"], show_progress=False)
    )
    return model


KINDS = {"bytes": _byte_bpe, "spaced": _spaced_bpe, "unigram": _unigram, "word pieces": _word_piece}
MADE = {name: make().to_str() for name, make in KINDS.items()}
SPECIALS = ["</s>", "<s>", "<|end|>", "<eos:0>"]


def write(folder: Path, kind: str, special: bool = True, template=None, **config) -> Path:
    """Write a tokenizer whose special tokens are marked as such or not; return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    model = Tokenizer.from_str(MADE[kind])
    model.add_tokens([AddedToken(name, special=special, normalized=False) for name in SPECIALS])
    if template:
        model.post_processor = template(model)
    model.save(str(folder / "tokenizer.json"))
    about = {"eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return folder


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_no_text_gives_the_end_or_the_start_and_none_is_lost(tmp_path, kind, special):
    found = ours.pretrained(str(write(tmp_path, kind, special)))
    draw = random.Random(kind)
    words = ["a", " ", "\n", "<", "s>", *SPECIALS[:2], *SPECIALS[:2]]
    texts = ["".join(draw.choices(words, k=draw.randint(1, 12))) for _ in range(200)]
    guarded = {found.end_id, found.model.token_to_id("<s>")}
    for text, encoded in zip(texts, found.encode(texts), strict=True):
        assert guarded.isdisjoint(encoded.ids), text
        if kind in ("bytes", "spaced"):
            assert found.model.decode(encoded.ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("kind", KINDS)
def test_an_end_that_the_vocabulary_itself_spells_is_cut_in_two(tmp_path, kind):
    """As where SentencePiece keeps </s> among its pieces, or merges make it."""
    folder = write(tmp_path, kind)
    raw = json.loads((folder / "tokenizer.json").read_text())
    vocab, end = raw["model"]["vocab"], "the" if kind != "spaced" else "</"
    if kind == "unigram":
        number = len(vocab)
        vocab.append([end, 0.0])
    else:
        number = vocab.setdefault(end, max(vocab.values()) + 1 + len(SPECIALS))
    (folder / "tokenizer.json").write_text(json.dumps(raw | {"added_tokens": []}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": end}))
    found = ours.pretrained(str(folder))
    assert found.end_id == number
    for text in (end, f"{end}{end}", f"a {end} b", f" {end}", f"{end} " * 30):
        (encoded,) = found.encode([text])
        assert number not in encoded.ids and encoded.ids


def test_an_end_of_one_sign_that_text_has_is_refused(tmp_path):
    folder = write(tmp_path, "bytes", eos_token="Ċ")
    with pytest.raises(DataError, match="becomes the special token 'Ċ' and cannot be written"):
        ours.pretrained(str(folder)).encode(["a\nb"])


def _bos(model):
    return post.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", model.token_to_id("<s>"))]
    )


def _both(model):
    ids = [(name, model.token_to_id(name)) for name in ("<s>", "</s>")]
    return post.TemplateProcessing(single="<s> $A </s>", special_tokens=ids)


def _bert(model):
    ids = [(name, model.token_to_id(name)) for name in ("</s>", "<s>")]
    return post.BertProcessing(*ids)


TEMPLATES = {"none": None, "bos": _bos, "bos and eos": _both, "as BERT": _bert}
FLAGS = [{}, {"add_bos_token": True}, {"add_bos_token": False}, {"add_eos_token": True}]


@pytest.mark.parametrize(
    ("kind", "template", "flags"), [*itertools.product(["bytes", "unigram"], TEMPLATES, FLAGS)]
)
def test_what_it_puts_in_front_is_what_transformers_says(tmp_path, kind, template, flags):
    folder = write(tmp_path / "own", kind, template=TEMPLATES[template], **flags)
    stock = AutoTokenizer.from_pretrained(folder)
    found = ours.pretrained(str(folder))
    plain = stock("court", add_special_tokens=False).input_ids
    whole = stock("court").input_ids
    place = next(n for n in range(len(whole)) if whole[n : n + len(plain)] == plain)
    front = whole[:place]
    if flags.get("add_bos_token") and not front:
        front = [stock.bos_token_id]  # as transformers 4 reads it
    assert list(found.front) == front
    # And whatever it is to be, the bundle's puts that there, and nothing behind a text
    for start in ((), found.front, found.lead, (found.model.token_to_id("<eos:0>"),)):
        (tmp_path / "bundle").mkdir(exist_ok=True)
        for name, text in found.stock_files(start).items():
            (tmp_path / "bundle" / name).write_text(text)
        again = AutoTokenizer.from_pretrained(tmp_path / "bundle")
        assert again("court").input_ids == [*start, *plain]
        assert list(again("court")) == ["input_ids", "attention_mask"]


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_that_spell_a_special_one_together_are_no_other_tokenizer(tmp_path, kind):
    """What a server tries a bundle's tokenizer with is a text of any tokens: of SentencePiece's
    kind the first is <unk>."""
    folder = write(tmp_path / "own", kind)
    model = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model.add_tokens([AddedToken(name, special=True, normalized=False) for name in ("s", "e", "<")])
    model.save(str(folder / "tokenizer.json"))
    found = ours.pretrained(str(folder))
    for start in ((), found.lead):
        (tmp_path / "bundle").mkdir(exist_ok=True)
        for name, text in found.stock_files(start).items():
            (tmp_path / "bundle" / name).write_text(text)
        check_tokens(tmp_path / "bundle", found, list(start))
        with pytest.raises(MismatchError, match="other tokens"):
            check_tokens(tmp_path / "bundle", found, [*start, 5])


NAMED = {
    "a processor": {"processor_class": "PixtralProcessor"},
    "code": {"auto_map": {"AutoTokenizer": ["x.X", None]}, "tokenizer_class": "X"},
    "code within": {"init_kwargs": [{"auto_map": {"AutoTokenizer": ["x.X", None]}}]},
}


@pytest.mark.parametrize("what", NAMED)
def test_what_names_a_class_or_code_goes_into_no_bundle(tmp_path, what):
    found = ours.pretrained(str(write(tmp_path / "own", "bytes", **NAMED[what])))
    (tmp_path / "bundle").mkdir()
    for name, text in found.stock_files(found.front).items():
        (tmp_path / "bundle" / name).write_text(text)
    check_model_files(tmp_path / "bundle", ["tokenizer.json", "tokenizer_config.json"])
    kept = json.loads((tmp_path / "bundle/tokenizer_config.json").read_text())
    assert kept["eos_token"] == "</s>" and kept["tokenizer_class"] == "PreTrainedTokenizerFast"


@pytest.mark.parametrize("several", [False, True])
def test_a_chat_template_that_no_bundle_may_have_is_refused_at_once(tmp_path, several):
    template = "x" * (TEMPLATE_BYTES + 1)
    given = [{"name": "default", "template": template}] if several else template
    folder = write(tmp_path, "bytes", chat_template=given)
    with pytest.raises(DataError, match=r"chat_template in .*tokenizer_config\.json: it has over"):
        ours.pretrained(str(folder))


@pytest.mark.parametrize("kind", ["unigram", "word pieces"])
def test_gguf_refuses_a_model_that_is_no_bpe(tmp_path, kind):
    found = ours.pretrained(str(write(tmp_path, kind)))
    with pytest.raises(MismatchError, match="it is a (Unigram|WordPiece) model and no byte-level"):
        vocabulary(found, found.vocab_size, (), (found.end_id,))


def test_dropout_of_merges_is_switched_off(tmp_path):
    folder = write(tmp_path, "bytes")
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["model"]["dropout"] = 0.5
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    found = ours.pretrained(str(folder))
    assert len({tuple(found.encode(TEXTS[:1])[0].ids) for _ in range(20)}) == 1
    assert '"dropout": null' in found.stock_files(())["tokenizer.json"]


def test_one_that_samples_all_the_same_is_refused(tmp_path, monkeypatch):
    found, count = ours.pretrained(str(write(tmp_path, "bytes"))), itertools.count()
    monkeypatch.setattr(
        ours.Tokenizer, "encode", lambda *_: [ours.Encoded([next(count)])] * len(TEXTS)
    )
    with pytest.raises(DataError, match="other tokens each time"):
        check(found, TEXTS, 0.5)


LOSSES = {
    "nothing": (lambda m: None, 0.0),
    "case": (lambda m: setattr(m, "normalizer", normalizers.Lowercase()), 2 / 85),
    "accents": (
        lambda m: setattr(
            m, "normalizer", normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])
        ),
        None,
    ),
    "spaces": (lambda m: setattr(m, "normalizer", normalizers.Replace(" ", "")), None),
    "ends": (lambda m: setattr(m, "normalizer", normalizers.Strip()), None),
}


@pytest.mark.parametrize("what", LOSSES)
def test_the_share_of_the_bytes_that_is_lost_is_counted(tmp_path, what):
    folder = write(tmp_path, "bytes")
    model = Tokenizer.from_file(str(folder / "tokenizer.json"))
    change, _ = LOSSES[what]
    change(model)
    model.save(str(folder / "tokenizer.json"))
    found = ours.pretrained(str(folder))
    # What is left is exactly what the normalizer leaves, as bytes are all there is
    wanted = 0
    for text in TEXTS:
        left = text if what == "nothing" else model.normalizer.normalize_str(text)
        kept = sum(1 for _ in _common(text.encode(), left.encode()))
        wanted += len(text.encode()) - kept
    share = wanted / sum(len(text.encode()) for text in TEXTS)
    assert (share > 0) == (what != "nothing")
    assert check(found, TEXTS, 1.0)["lost_share"] == pytest.approx(share)
    if share:
        with pytest.raises(DataError, match=r"do not survive it.*max_lost_share"):
            check(found, TEXTS, share * 0.9)


def _common(one: bytes, other: bytes):
    """Yield the bytes of the longest sequence that both have, by the textbook's table."""
    lengths = np.zeros((len(one) + 1, len(other) + 1), int)
    for i, j in itertools.product(range(len(one)), range(len(other))):
        best = max(lengths[i, j + 1], lengths[i + 1, j])
        lengths[i + 1, j + 1] = lengths[i, j] + 1 if one[i] == other[j] else best
    yield from range(lengths[-1, -1])


def test_what_has_no_entry_is_lost_whatever_its_name_spells(tmp_path):
    found = ours.pretrained(str(write(tmp_path, "word pieces")))
    tried = check(found, ["the court Ω Ω Ω Ω"], 1.0)
    assert tried["unknown_share"] > 0.4 and tried["lost_share"] > 0.4


def config(root: Path, **sections):
    """Return the settings of a small run on documents that lie in root."""
    rows = [
        {"text": f"{text} #{n} {domain}", "domain": domain}
        for n, text in enumerate(TEXTS * 2)
        for domain in ("alpha", "beta")
    ]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return small.config(
        data={"source": "files", "files": [{"paths": [str(root / "rows.jsonl")]}]},
        partition={"domains": ("alpha", "beta"), "min_tokens": 1},
        **sections,
    )


@pytest.mark.parametrize(("flags", "bos"), [({"add_bos_token": True}, True), ({}, False)])
def test_documents_are_led_by_it_in_shards_and_nobody_guesses_it(tmp_path, flags, bos):
    own = write(tmp_path / "own", "bytes", **flags)
    cfg = config(tmp_path, tokenizer__pretrained=str(own))
    metrics = prepared(cfg, tmp_path / "out")
    shards = opened(tmp_path / "out")
    found = ours.load(tmp_path / "out/tokenizer")
    lead = [found.end_id, found.model.token_to_id("<s>")] if bos else [found.end_id]
    assert metrics["tokenizer"]["front"] == ("<s>" if bos else "nothing")
    assert metrics["tokenizer"]["lost_share"] == 0 and list(shards.lead) == lead
    stream = shards.stream("test", "alpha")
    starts, sizes = shards.documents("test", "alpha")
    for start, end, size in zip(starts, starts[1:], sizes, strict=False):
        assert stream[start : start + len(lead)].tolist() == lead
        text = found.model.decode(
            stream[start + len(lead) : end].tolist(), skip_special_tokens=False
        )
        assert len(text.encode()) == size
    evaluator = Evaluator(cfg, shards, quiet)
    documents = evaluator.documents["alpha"]
    assert documents.tokens == sum(
        end - start - len(lead) for start, end in itertools.pairwise(documents.starts_n)
    )


def test_a_lossy_one_is_refused_by_preprocess_or_told_in_its_metrics(tmp_path):
    own = write(tmp_path / "own", "word pieces")
    with pytest.raises(DataError, match="do not survive it"):
        prepared(config(tmp_path, tokenizer__pretrained=str(own)), tmp_path / "out")
    cfg = config(tmp_path, tokenizer={"pretrained": str(own), "max_lost_share": 0.9})
    assert prepared(cfg, tmp_path / "told")["tokenizer"]["lost_share"] > 0.1


@pytest.mark.parametrize("front", ["bos", "nothing", "from zero"])
def test_the_endpoint_and_stock_tools_give_the_same_text(tmp_path, front):
    cfg, parts = made(tmp_path, "llama", True)
    if front == "from zero":
        # Only who made the trunk is different, which is all that is asked here
        cfg = cfg.model_copy(update={"trunk": cfg.trunk.model_copy(update={"init": None})})
    words = {f"w{n}": n for n in range(small.VOCAB)}
    model = Tokenizer(models.WordLevel(words, unk_token="w1"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    if front == "bos":
        model.post_processor = post.TemplateProcessing(single="w2 $A", special_tokens=[("w2", 2)])
    folder = bundle_of(cfg, parts, tmp_path / "bundle", model)
    engine = CompletionEngine(folder)
    ids = engine.encode("w5 w7 w11")
    assert ids == {"bos": [2], "nothing": [], "from zero": [0]}[front] + [5, 7, 11]
    done = engine.complete(ids, Sampling(max_tokens=4, temperature=0))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("w5 w7 w11", return_tensors="pt")
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    out_BT = stock.generate(**prompt, do_sample=False, max_new_tokens=4)
    assert out_BT[0, : len(ids)].tolist() == ids
    said = tokenizer.decode(out_BT[0, len(ids) :], skip_special_tokens=True)
    assert done.text == said
    # An empty text begins somewhere in either
    assert engine.complete(engine.encode(""), Sampling(max_tokens=2, temperature=0)).text
    assert len(engine.trace(ids)) == 3


@pytest.mark.parametrize("end", [0, [ours.END], [0], {"content": 0}, {"id": 0}, None, True])
def test_an_end_that_is_no_text_names_the_setting(tmp_path, end):
    ours.train(300, ["some text"]).save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": end}))
    with pytest.raises(DataError, match='Put "eos_token" into the tokenizer_config'):
        ours.pretrained(str(tmp_path))


@pytest.mark.parametrize("content", ["[]", "{", "version https://git-lfs.github.com/spec/v1\n", ""])
def test_a_torn_or_other_tokenizer_file_says_what_to_do(tmp_path, content):
    ours.train(300, ["some text"]).save(tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match=r"Copy it again, or save the tokenizer anew"):
        ours.pretrained(str(tmp_path))
