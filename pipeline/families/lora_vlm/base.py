"""The base of a lora_vlm run: a pinned Qwen3-VL, from the Hub, from a folder, or built at random
from sizes."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.processing_utils import ProcessorMixin

from ...config.task_data import ImageLimitsConfig
from ...errors import DataError
from ...store.artifacts import write_text
from ..adapters.base import LoadedBase, ModelKind, load_model, pin_base, pinned_files
from ..adapters.build import END, START, save_model, train_tokenizer
from ..adapters.chat import Chat, ChatTurn
from .config import VlmBaseConfig, VlmBuildConfig
from .cost import VlmSizes
from .image_cache import CachedImages

QWEN3_VL = ModelKind("Qwen3-VL", "qwen3_vl", Qwen3VLForConditionalGeneration)
# in the order of their ids
SPECIAL = (
    START,
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
# how configuration and processor call four of them
TOKENS = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}
PATCH_PX = 16  # width and height of a patch
# a picture is a film of two equal frames; 2 x 2 patches become one token
FRAMES = 2
MERGED = 2
# the Hub's chat template, as far as requests here go; its bytes are in the digest of every base
# that was built
TEMPLATE = """\
{%- for turn in messages -%}
<|im_start|>{{ turn.role + '\\n' }}
{%- if turn.content is string -%}
{{ turn.content }}
{%- else -%}
{%- for part in turn.content -%}
{%- if 'text' in part -%}{{ part.text }}{%- else -%}\
<|vision_start|><|image_pad|><|vision_end|>{%- endif -%}
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

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        **_ignored: Any,
    ):
        for name, token in TOKENS.items():
            setattr(self, name, token)
            setattr(self, f"{name}_id", tokenizer.convert_tokens_to_ids(token))
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def write(base: VlmBaseConfig, corpus: Iterable[str], folder: Path) -> dict:
    """Pin the base that the settings name into folder, building it there when they give sizes;
    return metrics.

    `corpus` is what a built one's tokenizer learns from. Raises DataError when a folder or the Hub
    does not hold a Qwen3-VL.
    """
    return pin_base(base, folder, QWEN3_VL, lambda where: build(base, where, corpus))


def open_base(folder: Path, base: VlmBaseConfig) -> LoadedBase:
    """Open the base that folder/pin.json names, with the settings' dtype, attention and image
    limits.

    Raises DamagedArtifact, MismatchError when its files have changed, DataError when it cannot be
    found.
    """
    pin, where = pinned_files(folder, QWEN3_VL)
    model = load_model(where, base, QWEN3_VL)
    sizes = VlmSizes.of_config(model.config.to_dict())
    return LoadedBase(model, open_chat(where, base.image), pin, sizes)


def open_chat(folder: Path, limits: ImageLimitsConfig) -> Chat:
    """Open a model folder's way from requests to tokens, with limits of pictures' areas. Raises
    DataError when a file is missing, or its chat template does not render."""
    processor = open_processor(folder, limits)
    chat = Chat(processor.tokenizer, processor, CachedImages(processor), END)
    try:
        # here and not at the first request; the library renders in Jinja's sandbox
        chat.render([ChatTurn("user", "", 1)])
    except Exception as error:  # a template raises what it likes
        raise DataError(
            f"{folder} has a chat template that cannot be rendered: {type(error).__name__}: {error}"
        ) from None
    return chat


def open_processor(folder: Path, limits: ImageLimitsConfig) -> PictureProcessor:
    """Open a model folder's tokenizer, chat template and picture preparation, with limits of
    pictures' areas.

    Raises DataError when a file is missing.
    """
    try:
        # the other backend of the preparation is torchvision, and resizes a little differently
        processor = PictureProcessor.from_pretrained(
            folder, backend="pil", local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"{folder} has no tokenizer, chat template or picture settings: {error}"
        ) from None
    processor.image_processor.size = _size(limits)
    return processor


def settings_of(kept: Mapping[str, Any]) -> VlmBaseConfig:
    """Return the settings to open a base with from what a bundle says of it. Raises KeyError,
    TypeError or ValueError where that is too little."""
    # not validated: a bundle's base is neither named nor built, it is there
    return VlmBaseConfig.model_construct(
        dtype=kept["dtype"], attn=kept["attn"], image=ImageLimitsConfig(**kept["image"])
    )


def build(base: VlmBaseConfig, folder: Path, corpus: Iterable[str]) -> None:
    """Write a random Qwen3-VL of the sizes in base.build to folder, laid out as on the Hub; same
    inputs, same bytes."""
    sizes = base.build
    if sizes is None:
        raise ValueError("only settings with sizes describe a base to build")
    tokenizer = train_tokenizer(corpus, sizes.vocab_size, SPECIAL, TEMPLATE)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(sizes.seed)
        model = Qwen3VLForConditionalGeneration(_config(sizes, tokenizer))
    save_model(model, tokenizer, base.dtype, folder)
    _write_picture_settings(base.image, folder)


def _config(sizes: VlmBuildConfig, tokenizer: Qwen2Tokenizer) -> Qwen3VLConfig:
    # positions in time, height and width share the pairs of a head, as evenly as they divide
    pairs = sizes.head_dim // 2
    third = pairs // 3
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
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5e6,
            "mrope_interleaved": True,
            "mrope_section": [pairs - 2 * third, third, third],
        },
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
        "patch_size": PATCH_PX,
        "temporal_patch_size": FRAMES,
        "spatial_merge_size": MERGED,
        "num_position_embeddings": 256,
        "deepstack_visual_indexes": [0],
        "initializer_range": sizes.initializer_range,
    }
    ids: dict[str, Any] = {}
    for name, token in TOKENS.items():
        ids[f"{name}_id"] = tokenizer.convert_tokens_to_ids(token)
    return Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)


def _write_picture_settings(limits: ImageLimitsConfig, folder: Path) -> None:
    """Write the Hub's two processor files, under the class names that the Hub gives."""
    both = {
        "size": _size(limits),
        "patch_size": PATCH_PX,
        "temporal_patch_size": FRAMES,
        "merge_size": MERGED,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "processor_class": "Qwen3VLProcessor",
    }
    kinds = {
        "preprocessor_config.json": {"image_processor_type": "Qwen2VLImageProcessorFast"},
        "video_preprocessor_config.json": {"video_processor_type": "Qwen3VLVideoProcessor"},
    }
    for name, kind in kinds.items():
        write_text(folder / name, json.dumps(both | kind, indent=1) + "\n")


def _size(limits: ImageLimitsConfig) -> dict[str, int]:
    """Return limits as the library takes them: it says edge and means area, px."""
    return {"shortest_edge": limits.min_pixels, "longest_edge": limits.max_pixels}
