"""The base of a lora_vlm run: a pinned Qwen3-VL, from the Hub, from a folder, or built at random
from sizes.

Invariant: what is opened is what was pinned. A folder is known by the sha256 of its files, a Hub
model by its commit; nothing that trains, routes or answers knows which of the three it got, nor how
large it is.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import GenerationConfig, Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX, Qwen2Tokenizer
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.processing_utils import ProcessorMixin
from transformers.utils.logging import (
    disable_progress_bar,
    enable_progress_bar,
    is_progress_bar_enabled,
)

from ...config.base import is_folder
from ...errors import DataError, MismatchError
from ...hardware import device
from ..adapters.base import LoadedBase, ModelRef

# folder of a built base beside its pin.json, and how such a base is called in adapters
BUILT = "base"
HUB_FILES = (
    "*.json",
    "*.safetensors",
    "*.jinja",
    "merges.txt",
)  # what opening needs; no pickles, no picture of a cat
END, PAD = "<|im_end|>", "<|endoftext|>"
SPECIALS = (
    "<|im_start|>",
    END,
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
TEMPLATE = """\
{%- for turn in messages -%}
<|im_start|>{{ turn.role + '\\n' }}
{%- if turn.content is string -%}
{{ turn.content }}
{%- else -%}
{%- for part in turn.content -%}
{%- if 'text' in part -%}{{ part.text }}{%- else -%}<|vision_start|><|image_pad|><|vision_end|>{%- endif -%}
{%- endfor -%}
{%- endif -%}
<|im_end|>{{ '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant{{ '\\n' }}{%- endif -%}
"""


class PictureProcessor(Qwen3VLProcessor):
    """Qwen3-VL's processor without its video processor, which cannot be loaded unless torchvision
    is installed.

    What a processor loads is read from the parameters of its __init__, so a part that is not named
    is never sought.
    """

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **_ignored):
        names = ("image_token", "video_token", "vision_start_token", "vision_end_token")
        for name, token in zip(
            names, ("image_pad", "video_pad", "vision_start", "vision_end"), strict=True
        ):
            setattr(self, name, f"<|{token}|>")
            setattr(self, f"{name}_id", tokenizer.convert_tokens_to_ids(f"<|{token}|>"))
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def write(base, corpus: Iterable[str], folder: Path) -> dict:
    """Pin the base that the settings name into folder, building it there when they give sizes;
    return metrics.

    Raises DataError when a folder or the Hub does not hold a model.
    """
    if base.build is not None:
        build(base, folder / BUILT, corpus)
        pin = ModelRef("built", BUILT, files=_hashes(folder / BUILT))
    elif is_folder(base.model):
        pin = ModelRef(
            "folder", base.model, files=_hashes(_model_folder(Path(base.model).expanduser()))
        )
    else:
        _check_kind(_from_hub(base.model, base.revision))
        pin = ModelRef("hub", base.model, base.revision)
    (folder / "pin.json").write_text(
        json.dumps(pin.values(), indent=1, sort_keys=True) + "\n", "utf-8"
    )
    where = _located(pin, folder)
    return {"parameters": count_parameters(where), "source": pin.source, "digest": pin.digest}


def open_base(folder: Path, base) -> LoadedBase:
    """Open the base that folder/pin.json names, with the settings' dtype, attention and image
    limits.

    On a processor the weights stay mapped from their files as long as the settings' dtype is the
    files'. Raises DamagedArtifact, MismatchError when its files have changed, DataError when it
    cannot be found.
    """
    pin = ModelRef.read(folder)
    where = _located(pin, folder)
    if pin.files and _hashes(where) != pin.files:
        raise MismatchError(
            f"{where} is not the base that this run was started on: its files have changed since train_shared. "
            "Put the files back, or run train_shared and what follows it again"
        )
    model = _load(where, base)
    if device() != "cpu":
        model = model.to(device())
    return LoadedBase(model.requires_grad_(False).eval(), open_processor(where, base.image), pin)


def open_processor(folder: Path, image) -> PictureProcessor:
    """Open a model folder's tokenizer, chat template and picture preparation, with the limits of
    `image` (areas, px).

    Raises DataError when a file is missing.
    """
    try:
        processor = PictureProcessor.from_pretrained(folder, backend="pil")
    except (OSError, ValueError) as error:
        raise DataError(
            f"{folder} has no tokenizer, chat template or picture settings: {error}"
        ) from None
    processor.image_processor.size = {
        "shortest_edge": image.min_pixels,
        "longest_edge": image.max_pixels,
    }
    return processor


def count_parameters(folder: Path) -> int:
    """Return the parameters of a model folder, from the headers of its files; tied ones once.
    Raises DataError."""
    total = 0
    for path in folder.glob("*.safetensors"):
        try:
            with safe_open(path, "pt") as file:
                total += sum(
                    torch.Size(file.get_slice(key).get_shape()).numel()
                    for key in file.keys()  # noqa: SIM118
                )
        except (SafetensorError, OSError) as error:
            raise DataError(f"{path} cannot be read: {error}") from None
    return total


def build(base, folder: Path, corpus: Iterable[str]) -> None:
    """Write a random Qwen3-VL of the sizes in base.build to folder, laid out as on the Hub; same
    inputs, same bytes.

    The tokenizer is a byte-level BPE of the corpus with Qwen's splitting rule and special tokens.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sizes, tokenizer = base.build, _tokenizer(corpus, base.build.vocab_size)
    tokenizer.save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(sizes.seed)
        model = Qwen3VLForConditionalGeneration(_config(sizes, tokenizer))
    ends = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    model.generation_config = GenerationConfig(
        do_sample=False, pad_token_id=ends[1], eos_token_id=ends
    )
    with _no_bar():
        model.to(getattr(torch, base.dtype)).save_pretrained(folder)
    for path in folder.glob("*.safetensors"):
        path.chmod(0o644)  # the library leaves them readable by their owner alone
    _write_picture_settings(base.image, folder)


def _tokenizer(corpus: Iterable[str], vocab_size: int) -> Qwen2Tokenizer:
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    bpe, level = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel
    bpe.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [split, level(add_prefix_space=False, use_regex=False)]
    )
    entries = vocab_size - len(SPECIALS) - 1
    alphabet = sorted(level.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=entries, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(corpus, trainer)
    learned = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=learned["vocab"],
        merges=[tuple(pair) for pair in learned["merges"]],
        unk_token=None,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=list(SPECIALS),
        model_max_length=4096,
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def _config(sizes, tokenizer: Qwen2Tokenizer) -> Qwen3VLConfig:
    half = sizes.head_dim // 2
    third = half // 3
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_interleaved": True}
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.intermediate,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": sizes.head_dim,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "rope_parameters": rope | {"mrope_section": [half - 2 * third, third, third]},
        "initializer_range": sizes.initializer_range,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "depth": sizes.vision_layers,
        "hidden_size": sizes.vision_hidden,
        "num_heads": sizes.vision_heads,
        "intermediate_size": sizes.vision_intermediate,
        "out_hidden_size": sizes.hidden,
        "patch_size": 16,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "num_position_embeddings": 256,
        "deepstack_visual_indexes": [0],
        "initializer_range": sizes.initializer_range,
    }
    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>")
        for name, token in (
            ("image", "image_pad"),
            ("video", "video_pad"),
            ("vision_start", "vision_start"),
            ("vision_end", "vision_end"),
        )
    }
    return Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)


def _write_picture_settings(image, folder: Path) -> None:
    """Write the Hub's two processor files, under the class names that the Hub gives."""
    both = {
        "size": {"shortest_edge": image.min_pixels, "longest_edge": image.max_pixels},
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "processor_class": "Qwen3VLProcessor",
    }
    kinds = {
        "preprocessor_config.json": {"image_processor_type": "Qwen2VLImageProcessorFast"},
        "video_preprocessor_config.json": {"video_processor_type": "Qwen3VLVideoProcessor"},
    }
    for name, kind in kinds.items():
        (folder / name).write_text(json.dumps(both | kind, indent=1) + "\n", "utf-8")


def _located(pin: ModelRef, folder: Path) -> Path:
    """Return the folder of the pinned model's files. Raises DataError."""
    if pin.source == "built":
        return folder / BUILT
    if pin.source == "folder":
        return _model_folder(Path(pin.model).expanduser())
    return _from_hub(pin.model, pin.revision)


def _model_folder(folder: Path) -> Path:
    missing = [name for name in ("config.json", "tokenizer.json") if not (folder / name).is_file()]
    if missing or not any(folder.glob("*.safetensors")):
        raise DataError(
            f"loras.base.model: {folder} is no model folder: it has no {' and no '.join(missing) or '*.safetensors'}. "
            "Give a folder as save_pretrained or the Hub lays it out"
        )
    _check_kind(folder)
    return folder


def _check_kind(folder: Path) -> None:
    """Raise DataError for another kind of model, which the library would fill up with random
    weights of any size."""
    try:
        kind = json.loads((folder / "config.json").read_text("utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder / 'config.json'} does not say what kind of model this is ({error!r})"
        ) from None
    if kind != "qwen3_vl":
        raise DataError(
            f"{folder} holds a {kind}; loras.base.model must be a Qwen3-VL (model_type qwen3_vl)"
        )


def _from_hub(model: str, revision: str | None) -> Path:
    """Return the local snapshot of a Hub model, fetched unless it is there. Raises DataError."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=list(HUB_FILES)))
    except Exception as error:  # the hub client and the network raise what they like
        raise DataError(
            f"loras.base.model: {model} is no folder here, and the Hub did not give it at revision {revision}: "
            f"{type(error).__name__}: {error}. Check the name, loras.base.revision, the network and HF_TOKEN"
        ) from error


def _hashes(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file at the top of a model folder."""
    out = {}
    for path in sorted(
        p
        for p in folder.iterdir()
        if p.is_file() and p.suffix in (".json", ".safetensors", ".jinja")
    ):
        with open(path, "rb") as file:
            out[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return out


def _load(where: Path, base) -> Qwen3VLForConditionalGeneration:
    try:
        with _no_bar():
            return Qwen3VLForConditionalGeneration.from_pretrained(
                where,
                dtype=getattr(torch, base.dtype),
                attn_implementation=base.attn,
                local_files_only=True,
            )
    except (SafetensorError, ImportError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise DataError(
            f"{where} cannot be loaded as a Qwen3-VL: {type(error).__name__}: {error}"
        ) from error


@contextmanager
def _no_bar() -> Iterator[None]:
    """Keep the library's progress bars off the terminal."""
    shown = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            enable_progress_bar()
