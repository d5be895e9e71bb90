"""A language model in a .gguf file, llama.cpp's format, read by transformers' own tables: its
settings, its tensors under Hugging Face's names, its tokenizer.

A quantised tensor can not be computed with as it lies in the file: it is turned into bf16, one
tensor after another, so that no more than one is ever held in fp32.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from mmap import ACCESS_READ, mmap
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from .loading import quiet_library

MAGIC = b"GGUF"
# By the names of gguf's types; every other is a quantised one
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float32}
DECODED = torch.bfloat16
# Parts of entries' names that say what the library passes over, and where all entries are: the
# longest vocabulary takes a tenth of it
TELLING = (b".rope.scal", b"split.count")
HEAD_BYTES = 1 << 26


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the file: what it is called by Hugging Face, and what it becomes."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


def check_magic(path: Path) -> None:
    """Raise ValueError for a file that is no .gguf file, OSError."""
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise ValueError("it does not begin as a .gguf file does; copy it again")


def settings(path: Path) -> dict[str, Any]:
    """Return a model's settings by the names of Hugging Face config fields, without defaults.

    Raises ValueError and what else the library raises at a file that it cannot read.
    """
    state = path.stat()
    return dict(_settings(str(path), state.st_mtime_ns, state.st_size))


@lru_cache(maxsize=2)
def _settings(path: str, _mtime_ns: int, _bytes: int) -> dict[str, Any]:
    # Seconds, as the vocabulary is read word by word: kept for the process
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    check_magic(Path(path))
    try:
        with quiet_library():
            return dict(load_gguf_checkpoint(path)["config"])
    except Exception:
        _read_whole(path)
        raise


def positions(path: Path) -> dict[str, Any]:
    """Return how a file of a kind that trunks are of stretches positions, as a Hugging Face config
    field: the library passes over it. Raises ValueError for a way that has no name there, and for
    one of several files that are a model together."""
    state = path.stat()
    return dict(_positions(str(path), state.st_mtime_ns, state.st_size))


@lru_cache(maxsize=2)
def _positions(name: str, _mtime_ns: int, _bytes: int) -> dict[str, Any]:
    path = Path(name)
    # Seconds are saved, as the vocabulary is read word by word: nearly no file has these entries
    with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as content:
        if all(content.find(entry, 0, HEAD_BYTES) < 0 for entry in TELLING):
            return {}
    stated = _read_whole(name)
    arch = stated("general.architecture")
    rope = f"{arch}.rope"
    # As llama.cpp takes what is not said, and what was said by older files
    kind = stated(f"{rope}.scaling.type") or "linear"
    factor = stated(f"{rope}.scaling.factor") or stated(f"{rope}.scale_linear") or 1.0
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return {}
    if kind != "linear":
        raise ValueError(
            f"its positions are stretched by {kind} (rope.scaling.type), which transformers does "
            f"not read of a {arch} file; name the checkpoint that it was made from"
        )
    return {"rope_scaling": {"rope_type": kind, "factor": float(factor)}}


def _read_whole(path: str) -> Callable[[str], Any]:
    """Return what tells a file's entries by their keys, None of one that is not there. Raises
    ValueError for a file that ends before what its header says it has, and for one of several that
    are a model together."""
    from gguf import GGUFReader

    try:
        fields = GGUFReader(path).fields
    except Exception as error:  # numpy's, of whatever array was cut
        raise ValueError(f"the file is torn ({error}); copy it again") from None

    def stated(key: str) -> Any:
        return fields[key].contents() if key in fields else None

    parts = stated("split.count") or 1
    if parts > 1:
        raise ValueError(
            f"it is one of {parts} files that a model was split into; make one of them "
            "(llama-gguf-split --merge FIRST OUT), and name that"
        )
    return stated


class GgufTensors:
    """The tensors of a .gguf file: told at once, decoded one after another."""

    def __init__(self, path: Path):
        from gguf import GGUFReader
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.modeling_gguf_pytorch_utils import (
            TENSOR_PROCESSORS,
            TensorProcessor,
            get_gguf_hf_weights_map,
        )

        stated = settings(path)
        self._reader = GGUFReader(path)
        config = AutoConfig.for_model(**stated)
        with torch.device("meta"):
            network = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        kind = TENSOR_PROCESSORS.get(self._architecture(), TensorProcessor)
        self._processor = kind(config=stated)
        names = get_gguf_hf_weights_map(network, self._processor)
        shapes = network.state_dict()
        self._found = []
        self.unknown = []
        for tensor in self._reader.tensors:
            if tensor.name not in names:
                self.unknown.append(tensor.name)
                continue
            name = names[tensor.name]
            dtype = PLAIN.get(tensor.tensor_type.name, DECODED)
            stored = StoredTensor(name, tuple(shapes[name].shape), dtype)
            # Of some kinds the library does not read the width of a head, and takes its default
            if int(tensor.n_elements) != prod(stored.shape):
                raise ValueError(
                    f"{tensor.name} has {int(tensor.n_elements)} numbers, and transformers takes "
                    f"it for {stored.shape} of a {config.model_type} model; name the checkpoint "
                    "that it was made from"
                )
            self._found.append((stored, tensor))
        if self.unknown:
            raise ValueError(
                f"its tensors {', '.join(sorted(self.unknown)[:3])} have no place in a "
                f"{config.model_type} model as transformers reads it, and without them it would be "
                "another model; name the checkpoint that it was made from"
            )

    def _architecture(self) -> str:
        field = self._reader.fields["general.architecture"]
        return str(field.contents())

    @property
    def is_quantized(self) -> bool:
        """Whether any tensor is."""
        return any(tensor.tensor_type.name not in PLAIN for _, tensor in self._found)

    @property
    def stored(self) -> list[StoredTensor]:
        """What there is, in the order in which it is decoded; of a quantised file all of it in
        bf16."""
        found = [stored for stored, _ in self._found]
        if not self.is_quantized:
            return found
        return [StoredTensor(each.name, each.shape, DECODED) for each in found]

    def decoded(self, place: int) -> Tensor:
        """Return the tensor at a place of `stored`, of the shape and dtype that it says."""
        from gguf import dequantize

        stored = self.stored[place]
        tensor = self._found[place][1]
        weights = dequantize(tensor.data, tensor.tensor_type)
        # Of llama's files the rows of queries and keys stand in another order
        weights = self._processor.process(weights=weights, name=tensor.name).weights
        # dequantize gives fp32 or the file's own pages, which nobody may write to
        return torch.from_numpy(weights.copy()).to(stored.dtype).reshape(stored.shape)


def tokenizer(path: Path) -> Any:
    """Return the tokenizer that a .gguf file carries, as transformers reads it.

    Raises what the library raises at a file that it cannot read.
    """
    from transformers import AutoTokenizer

    check_magic(path)
    # A tokenizer.json in the folder it is looked for in would be taken in its place
    with quiet_library(), TemporaryDirectory() as empty:
        found: Any = AutoTokenizer.from_pretrained(
            empty, gguf_file=str(path.resolve()), local_files_only=True, trust_remote_code=False
        )
        return found
