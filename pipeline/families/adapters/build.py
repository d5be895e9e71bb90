"""A random base of given sizes, laid out as models on the Hub are, for tests and for trying things
out."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX, Qwen2Tokenizer

from ...model.loading import quiet_library
from ...store.artifacts import set_mode
from ...store.room import writing

START = "<|im_start|>"
END = "<|im_end|>"
PAD = "<|endoftext|>"


def train_tokenizer(
    corpus: Iterable[str], vocab_size: int, special: Sequence[str], template: str
) -> Qwen2Tokenizer:
    """Return a byte-level BPE of the corpus with Qwen's splitting rule; same corpus, same tokens.

    `special` are the special tokens in the order of their ids, `template` is the chat template, in
    Jinja.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    trainer = trainers.BpeTrainer(
        # the special tokens and PAD are added below, and count too
        vocab_size=vocab_size - len(special) - 1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(corpus, trainer)
    learned = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=learned["vocab"],
        # the library's types are those of older files; a byte-level BPE knows every text
        merges=[tuple(pair) for pair in learned["merges"]],  # type: ignore[misc]
        unk_token=None,  # type: ignore[arg-type]
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=list(special),
        model_max_length=4096,
    )
    tokenizer.chat_template = template
    return tokenizer


def save_model(model: PreTrainedModel, tokenizer: Qwen2Tokenizer, dtype: str, folder: Path) -> None:
    """Write a model and its tokenizer to folder in a dtype, as on the Hub; it answers greedily."""
    folder.mkdir(parents=True, exist_ok=True)
    with writing(folder / "tokenizer.json"):
        tokenizer.save_pretrained(folder)
    ends = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    model.generation_config = GenerationConfig(
        do_sample=False, pad_token_id=tokenizer.pad_token_id, eos_token_id=ends
    )
    with writing(folder / "model.safetensors"), quiet_library():
        model.to(getattr(torch, dtype)).save_pretrained(folder)
        for path in folder.glob("*.safetensors"):
            set_mode(path)
