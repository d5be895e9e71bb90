"""Folders that other people made, looked at before any library opens them: data, and nothing that
runs.

Invariant: what passes here leads nowhere outside its folder, holds no program and no pickle, and
names no code, so that no library finds anything to run or to ask about.
"""

import json
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from .reading import parse_object

# A tokenizer of a quarter million entries takes 20 MB, all other files far less.
JSON_BYTES = 256 << 20
# Those of models are of some thousand characters; each request renders it.
TEMPLATE_BYTES = 256 << 10
PROGRAMS = {".py", ".pyc", ".pyd", ".pyi", ".pth", ".so", ".dll", ".dylib", ".sh", ".zip", ".whl"}
PICKLES = {".bin", ".pt", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz", ".h5", ".msgpack"}
# Each makes a library fetch or import what a file names.
NAMES_CODE = {"auto_map", "custom_generate", "custom_pipelines", "use_kernels", "megatron_config"}
# A name with a slash is a kernel of the Hub's, which is code.
KERNELS = {
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_internal",
    "experts_implementation",
    "_experts_implementation",
}
# What names a class, by the files that are read for it; the classes are transformers' own.
CLASSES = {
    "tokenizer_class",
    "processor_class",
    "image_processor_type",
    "video_processor_type",
    "feature_extractor_type",
}
KNOWN_CLASSES = {
    "LlamaTokenizer",
    "LlamaTokenizerFast",
    "PreTrainedTokenizerFast",
    "Qwen2Tokenizer",
    "Qwen2TokenizerFast",
    "Qwen2VLImageProcessor",
    "Qwen2VLImageProcessorFast",
    "Qwen2VLImageProcessorPil",
    "Qwen3VLProcessor",
    "Qwen3VLVideoProcessor",
    "TokenizersBackend",
}
# An adapter beside a model's weights is loaded into it, from wherever it says.
NEVER = {"adapter_config.json", "adapter_model.safetensors"}
INDEX = ".safetensors.index.json"
TEMPLATE = ".jinja"
# What says how much a model builds before a tensor of it is read, and more than any has.
SIZES = {
    "num_hidden_layers": 1000,
    "depth": 1000,
    "num_experts": 10_000,
    "num_local_experts": 10_000,
    "num_attention_heads": 10_000,
    "num_heads": 10_000,
    "num_key_value_heads": 10_000,
    "head_dim": 100_000,
    "hidden_size": 1_000_000,
    "intermediate_size": 10_000_000,
    "moe_intermediate_size": 10_000_000,
    "vocab_size": 100_000_000,
    "max_position_embeddings": 1 << 31,
}
# Of the models that bundles hold: classes of transformers' own.
ARCHITECTURES = {
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "MixtralForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
}
# Too large to be looked through, and read by a library that knows data alone.
ONLY_DATA = {"tokenizer.json", "vocab.json", "report.json"}


class ForeignFile(ValueError):
    """What a folder must not hold, in words that begin with the file's name."""


def files_in(folder: Path) -> set[str]:
    """Return the files below a folder, as paths with /; hidden ones, which no library reads, are
    left out.

    Raises ForeignFile for a link or what is neither file nor folder, OSError.
    """
    found = set()
    with os.scandir(folder) as listing:
        entries = list(listing)
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_symlink():
            raise ForeignFile(
                f"{entry.name} is a link, and nothing in it may lead elsewhere; copy what it "
                "leads to"
            )
        if entry.is_dir(follow_symlinks=False):
            below = files_in(folder / entry.name)
            found |= {f"{entry.name}/{name}" for name in below}
        elif entry.is_file(follow_symlinks=False):
            found.add(entry.name)
        else:
            # reading a pipe would wait for ever
            raise ForeignFile(f"{entry.name} is neither a file nor a folder")
    return found


def check_name(name: str) -> None:
    """Raise ForeignFile for a file that holds a program or a pickle, which may run what it
    likes."""
    # a second suffix hides nothing: x.py.json is data, x.json.py is not
    suffix = Path(name).suffix.lower()
    if suffix in PROGRAMS:
        raise ForeignFile(f"{name} is a program, and only data are opened here")
    if suffix in PICKLES:
        raise ForeignFile(f"{name} may hold pickled objects, which run when they are opened")


def read_object(folder: Path, name: str, limit_bytes: int = JSON_BYTES) -> dict[str, Any]:
    """Return the JSON object in a file. Raises ForeignFile, or OSError where there is none."""
    # one byte more than may be, so that a long file is known without reading it
    with (folder / name).open("rb") as file:
        data = file.read(limit_bytes + 1)
    if len(data) > limit_bytes:
        raise ForeignFile(f"{name} is over {limit_bytes:,} bytes")
    try:
        return parse_object(data)
    except json.JSONDecodeError as error:
        where = f"from line {error.lineno}, character {error.colno} on"
        raise ForeignFile(f"{name} is not JSON: it is cut off or damaged {where}") from None
    except ValueError as error:
        # of bytes that are no text it would quote some
        why = "it is no text in UTF-8" if isinstance(error, UnicodeDecodeError) else error
        raise ForeignFile(f"{name} is not JSON that can be read: {why}") from None


def check_model_files(folder: Path, names: Iterable[str]) -> None:
    """Raise ForeignFile for a model's files, paths with / below folder, that name code, another
    adapter, an unknown class, or a shard that is not among them; OSError when one cannot be
    read."""
    names = sorted(names)
    for name in names:
        last = name.rpartition("/")[2]
        if last in NEVER:
            raise ForeignFile(f"{name} would put an adapter on the model that none knows of")
        if last.endswith(TEMPLATE):
            _check_template(name, (folder / name).stat().st_size)
        if last in ONLY_DATA or not last.endswith(".json"):
            continue
        settings = read_object(folder, name)
        check_settings(settings, name)
        if last.endswith(INDEX):
            _check_shards(settings, name, names)


def check_settings(settings: Mapping[str, Any], name: str) -> None:
    """Raise ForeignFile for settings that name code or an unknown class, at any depth; `name` is
    that of their file."""
    left: list[Any] = [settings]
    # a list and no recursion: what JSON nests as deep as it is read must not fail here
    while left:
        value = left.pop()
        if isinstance(value, list):
            left += value
        if not isinstance(value, dict):
            continue
        left += value.values()
        for key, given in value.items():
            _check_setting(key, given, name)


def without_code(value: Any) -> Any:
    """Return settings, at any depth, without what `check_settings` refuses as code or a class that
    is not known: data of others that say it all the same go on without."""
    if isinstance(value, list):
        return [without_code(each) for each in value]
    if not isinstance(value, dict):
        return value
    return {key: without_code(given) for key, given in value.items() if not _names_code(key, given)}


def _names_code(key: str, value: Any) -> bool:
    if key in CLASSES:
        return value not in (None, *KNOWN_CLASSES)
    return key in NAMES_CODE or (key in KERNELS and "/" in str(value))


def check_kind(settings: Mapping[str, Any], name: str, kinds: Collection[str]) -> None:
    """Raise ForeignFile for a model that is of none of some kinds (`model_type`), or of a class
    (`architectures`) that is not known here."""
    found = settings.get("model_type")
    # one that is no text may be nothing that a set can hold
    if not isinstance(found, str) or found not in kinds:
        known = ", ".join(sorted(kinds))
        raise ForeignFile(f"{name} is of a model of the kind {found!r}; here it is {known}")
    classes = settings.get("architectures") or []
    texts = isinstance(classes, list) and all(isinstance(each, str) for each in classes)
    if not texts or not ARCHITECTURES.issuperset(classes):
        raise ForeignFile(f"{name} is of a model of the class {classes!r}, which is not known here")


def _check_setting(key: str, value: Any, name: str) -> None:
    if key in NAMES_CODE and value:
        raise ForeignFile(f"{name} names code to run ({key}), and only data are opened here")
    if key in KERNELS and "/" in str(value):
        raise ForeignFile(f"{name} names code to run ({key}: {value!r})")
    if key in CLASSES and value not in (None, *KNOWN_CLASSES):
        raise ForeignFile(f"{name} names a class that is not known here ({key}: {value!r})")
    most = SIZES.get(key)
    if most is not None and isinstance(value, int | float) and value > most:
        raise ForeignFile(f"{name} says that {key} is {value}, and no model here is so large")
    if key == "chat_template":
        _check_template(name, len(str(value)))


def _check_template(name: str, size_bytes: int) -> None:
    if size_bytes > TEMPLATE_BYTES:
        raise ForeignFile(f"{name} has a chat template of over {TEMPLATE_BYTES:,} bytes")


def _check_shards(index: Mapping[str, Any], name: str, names: Collection[str]) -> None:
    """Raise ForeignFile for an index that names a file which is not beside it."""
    shards = index.get("weight_map")
    if not isinstance(shards, dict):
        raise ForeignFile(f"{name} is no index of tensors")
    above, slash, _ = name.rpartition("/")
    for shard in shards.values():
        if not isinstance(shard, str) or f"{above}{slash}{shard}" not in names:
            raise ForeignFile(f"{name} names {shard!r}, which is no file beside it")
