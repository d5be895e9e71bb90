"""A model as a GGUF file, which llama.cpp and what is built on it load.

Tensors come by the names of Hugging Face and are written one after another under llama.cpp's; of a
mixture each layer's experts are one tensor, of which one expert's matrix is there at a time.
Checked against llama.cpp itself in the tests.

D model width, F feed-forward width, E experts, H heads, R rows of a projection (heads times their
width).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import torch
from gguf import (
    GGML_QUANT_SIZES,
    GGML_QUANT_VERSION,
    MODEL_ARCH,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFWriter,
    LlamaFileType,
    RopeScalingType,
    get_tensor_name_map,
)
from gguf.quants import quantize

from ....errors import MismatchError
from ....model.trunk import window
from ....protocols import Progress
from ....store.room import writing
from ....store.streamed import Streamed, raw_bytes
from .gguf_tokenizer import INSTEAD, Vocabulary
from .tensors import widest

# Whose code llama.cpp runs, by the trunk's kind, as a dense model and as a mixture
DENSE = {
    "qwen3": MODEL_ARCH.QWEN3,
    "llama": MODEL_ARCH.LLAMA,
    "mistral": MODEL_ARCH.LLAMA,
}
MIXTURE = DENSE | {"qwen3": MODEL_ARCH.QWEN3MOE}
# What a matrix is kept as: its type in the file, and the file's own
KEPT = {
    "fp32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "fp16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
_STORED = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_TORCH = {KEPT[name][0]: dtype for dtype, name in _STORED.items()}
# For a mixture that transformers' classes do not hold either
ONE = "export one expert (--expert), or the mean of all of them (--dense)"
BLOCK = GGML_QUANT_SIZES[GGMLQuantizationType.Q8_0][0]  # values that share a scale
ROWS = 4096  # of a matrix that are rounded together
# Of a layer's experts, all in one tensor E F D
STACKED = {
    "gate_proj": "ffn_gate_exps",
    "up_proj": "ffn_up_exps",
    "down_proj": "ffn_down_exps",
}
# Biases that llama.cpp's code for these has no place for
_WITHOUT_BIAS = {
    MODEL_ARCH.QWEN3: ("o_proj.bias", "mlp."),
    MODEL_ARCH.QWEN3MOE: ("o_proj.bias", "mlp."),
}


@dataclass(frozen=True)
class Experts:
    """A mixture's experts, and how many of them each token takes."""

    tensors: tuple[Mapping[str, Streamed], ...]  # of each, by the names in a dense model
    gates: Mapping[int, Streamed]  # weight_ED by layer
    top_k: int


@dataclass(frozen=True)
class _Stack(Streamed):
    """A layer's matrices of all experts, as one tensor."""

    each: tuple[Streamed, ...]


@dataclass(frozen=True)
class _Packed:
    """A tensor's bytes as the file has them, made while they are written: to the library an
    array."""

    tensor: Streamed
    kind: GGMLQuantizationType

    @property
    def nbytes(self) -> int:
        """How many they are."""
        per_block, nbytes = GGML_QUANT_SIZES[self.kind]
        return prod(self.tensor.shape) // per_block * nbytes

    def tofile(self, file: BinaryIO) -> None:
        """Write them."""
        for tensor in self.tensor.each if isinstance(self.tensor, _Stack) else (self.tensor,):
            self._write(tensor, file)

    def _write(self, tensor: Streamed, file: BinaryIO) -> None:
        # A function of its own, at whose end nothing of one matrix is left
        if self.kind != GGMLQuantizationType.Q8_0:
            file.write(raw_bytes(tensor.read().to(_TORCH[self.kind])))
            return
        # Some at a time: an embedding in fp32 is larger than all that is done with it
        for some in tensor.read().flatten(0, -2).split(ROWS):
            file.write(quantize(some.float().cpu().numpy(), self.kind).tobytes())


@dataclass(frozen=True)
class Gguf:
    """A model that is to be written."""

    name: str
    settings: Mapping[str, Any]  # Hugging Face config fields of the trunk
    tensors: Mapping[str, Streamed]  # of a mixture all but its feed-forward networks
    experts: Experts | None = None  # of a mixture

    @property
    def arch(self) -> MODEL_ARCH:
        """Whose code llama.cpp runs for it."""
        return (MIXTURE if self.experts else DENSE)[self.settings["model_type"]]


def kept_as(dtype: str | None) -> str:
    """Return in words what matrices are kept as."""
    return dtype or "what the store has"


def write_gguf(
    path: Path, model: Gguf, vocabulary: Vocabulary, dtype: str | None, progress: Progress
) -> list[str]:
    """Write a model; return what people should know of what the format has not held.

    dtype: of KEPT, what matrices are rounded to, None as they are. Raises MismatchError for what
    the format cannot hold, DiskFull.
    """
    notes = list(vocabulary.notes)
    writer = GGUFWriter(path, MODEL_ARCH_NAMES[model.arch])
    named = _told(writer, model, notes)
    writer.add_name(model.name)
    writer.add_file_type(KEPT[dtype or _dtype_of(named)][1])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    vocabulary.write(writer)
    with writing(path):
        _write_all(writer, named, dtype, progress)
    return notes


def check_gguf(model: Gguf) -> None:
    """Raise MismatchError for a model that the format cannot hold; none of its tensors is read."""
    _told(GGUFWriter(None, MODEL_ARCH_NAMES[model.arch]), model, [])


def _told(writer: GGUFWriter, model: Gguf, notes: list[str]) -> dict[str, Streamed]:
    """Tell a writer of a model's sizes; return its tensors by llama.cpp's names. Raises
    MismatchError."""
    _check_activation(model)
    named = _renamed(model)
    if model.experts:
        named |= _stacked(model, model.experts)
    return named | _describe(writer, model, notes)


def _dtype_of(named: Mapping[str, Streamed]) -> str:
    """Return what the largest matrix is kept as, which a file is called after."""
    largest = max(named.values(), key=lambda tensor: tensor.nbytes)
    return _STORED[largest.dtype]


def _write_all(
    writer: GGUFWriter, named: Mapping[str, Streamed], dtype: str | None, progress: Progress
) -> None:
    """Write what a writer has been told, and the tensors."""
    packed = {}
    for name, tensor in named.items():
        kind = _kind(name, tensor, dtype)
        packed[name] = _Packed(tensor, kind)
        # The dtype of numpy counts where no kind is given, so any but bytes will do
        numpy_dtype = np.dtype("f4")
        nbytes = packed[name].nbytes
        writer.add_tensor_info(name, tensor.shape, numpy_dtype, nbytes, raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for done, content in enumerate(packed.values()):
            progress("writing the GGUF file", done / len(packed))
            writer.write_tensor_data(cast("np.ndarray", content))
    finally:
        writer.close()


def _kind(name: str, tensor: Streamed, dtype: str | None) -> GGMLQuantizationType:
    """Return what a tensor is kept as: gates, norms and biases in fp32 in any case."""
    if len(tensor.shape) < 2 or "ffn_gate_inp" in name:
        return GGMLQuantizationType.F32
    kind = KEPT[dtype or _STORED[tensor.dtype]][0]
    if kind == GGMLQuantizationType.Q8_0 and tensor.shape[-1] % BLOCK:
        return GGMLQuantizationType.F16
    return kind


def _check_activation(model: Gguf) -> None:
    # No entry of the file names it: llama.cpp has one for each kind of model
    act = model.settings.get("hidden_act", "silu")
    if act not in ("silu", "swish"):
        raise MismatchError(
            f"its networks have {act} (hidden_act), and llama.cpp computes silu in a "
            f"{MODEL_ARCH_NAMES[model.arch]} model; {INSTEAD}"
        )


def _renamed(model: Gguf) -> dict[str, Streamed]:
    """Return tensors by llama.cpp's names. Raises MismatchError for one that has no place there."""
    arch = model.arch
    names = get_tensor_name_map(arch, model.settings["num_hidden_layers"])
    without = _WITHOUT_BIAS.get(arch, ())
    out = {}
    for name, tensor in model.tensors.items():
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        biased = name.endswith(".bias") and any(part in name for part in without)
        if found is None or biased:
            raise MismatchError(
                f"llama.cpp has no place for {name} in a {MODEL_ARCH_NAMES[arch]} model; {INSTEAD}"
            )
        out[found] = _turned(model, name, tensor)
    return out


def _turned(model: Gguf, name: str, tensor: Streamed) -> Streamed:
    """Return a query or key projection with its rows as llama.cpp turns them: for this one kind of
    model neighbours, where Hugging Face turns a head's halves against each other."""
    turns = ".q_proj." in name or ".k_proj." in name
    if model.arch != MODEL_ARCH.LLAMA or not turns:
        return tensor
    heads = model.settings["num_attention_heads"]
    if ".k_proj." in name:
        heads = model.settings.get("num_key_value_heads") or heads

    def read() -> torch.Tensor:
        halves = tensor.read().unflatten(0, (heads, 2, -1))
        return halves.transpose(1, 2).reshape(tensor.shape)

    return Streamed(tensor.shape, tensor.dtype, read)


def _stacked(model: Gguf, experts: Experts) -> dict[str, Streamed]:
    """Return a mixture's gates and experts by llama.cpp's names. Raises MismatchError for a tensor
    that experts have no place for there."""
    for name in experts.tensors[0]:
        if name.endswith(".bias"):
            raise MismatchError(
                f"llama.cpp has no place for {name} in the experts of a "
                f"{MODEL_ARCH_NAMES[model.arch]} model; {ONE}"
            )
    out = {}
    for layer in range(model.settings["num_hidden_layers"]):
        out[f"blk.{layer}.ffn_gate_inp.weight"] = experts.gates[layer]
        for projection, name in STACKED.items():
            own = f"model.layers.{layer}.mlp.{projection}.weight"
            each = [tensors[own] for tensors in experts.tensors]
            shape = (len(each), *each[0].shape)
            stacked = _Stack(shape, widest(each), _no_whole, tuple(each))
            out[f"blk.{layer}.{name}.weight"] = stacked
    return out


def _no_whole() -> torch.Tensor:
    raise AssertionError("all experts of a layer are never read at once")


def _describe(writer: GGUFWriter, model: Gguf, notes: list[str]) -> dict[str, Streamed]:
    """Add the model's sizes to the metadata; return tensors that go with them."""
    settings = model.settings
    heads = settings["num_attention_heads"]
    head_dim = settings.get("head_dim") or settings["hidden_size"] // heads
    writer.add_vocab_size(settings["vocab_size"])
    writer.add_context_length(_context(model, notes))
    writer.add_embedding_length(settings["hidden_size"])
    writer.add_block_count(settings["num_hidden_layers"])
    writer.add_feed_forward_length(settings["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(settings.get("num_key_value_heads") or heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(settings["rms_norm_eps"])
    writer.add_rope_dimension_count(head_dim)
    if model.experts:
        writer.add_expert_count(len(model.experts.tensors))
        writer.add_expert_used_count(model.experts.top_k)
        writer.add_expert_feed_forward_length(settings["intermediate_size"])
    return _rotary(writer, model.arch, settings)


def _context(model: Gguf, notes: list[str]) -> int:
    """Return how many tokens a text may have. Raises MismatchError for layers that differ in what
    they look back on."""
    settings = model.settings
    longest = settings["max_position_embeddings"]
    kinds = set(settings.get("layer_types") or ())
    if len(kinds) > 1:
        # One expert of them has the same layers
        instead = "export one expert in the format expert" if model.experts else INSTEAD
        raise MismatchError(
            f"layers differ in attention ({', '.join(sorted(kinds))}), and llama.cpp has one for "
            f"all of them in such a model; {instead}"
        )
    back = window(settings)
    if back and back < longest:
        notes.append(
            f"Texts are of {back:,} tokens at most here, as the model looks back no further and "
            "llama.cpp would let it."
        )
        return back
    return longest


def _rotary(
    writer: GGUFWriter, arch: MODEL_ARCH, settings: Mapping[str, Any]
) -> dict[str, Streamed]:
    """Add how positions turn queries and keys; return the tensor that says it where it is one.

    Raises MismatchError for a way that llama.cpp has not.
    """
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = settings.get("rope_parameters") or {}
    theta = float(rope.get("rope_theta") or settings["rope_theta"])
    kind = rope.get("rope_type", "default")
    writer.add_rope_freq_base(theta)
    if kind == "default":
        return {}
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
        return {}
    if kind != "llama3" or arch != MODEL_ARCH.LLAMA:
        raise MismatchError(
            f"llama.cpp does not stretch positions by {kind} in a {MODEL_ARCH_NAMES[arch]} model; "
            f"{INSTEAD}"
        )
    # What it computes is left to the library that trained the model
    config = AutoConfig.for_model(**settings)
    slow, _ = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    width = 2 * len(slow)
    plain = theta ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)
    return {"rope_freqs.weight": Streamed.of(plain / slow)}
