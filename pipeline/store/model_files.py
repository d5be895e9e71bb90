"""Model folders that people bring, looked at before any library opens them: complete, readable, and
weights that can be trained on.

What a library makes of an incomplete folder is a model with random weights, and of a quantised one
a model that no training here can use; the files alone tell both.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..errors import DataError
from ..protocols import Eye, Seen
from .foreign import ForeignFile, read_object

# what opening a model needs, from the Hub: no pickles, no picture of a cat
HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "merges.txt")
# A pattern goes into folders too, where other layouts of the same weights lie, and beside the
# shards some have Mistral's own: as many bytes once more, which nothing here reads
NOT_FROM_HUB = ("*/*", "consolidated*.safetensors")
# Of a folder's files those that opening reads: a README may change
TELLING = (".json", ".safetensors", ".jinja")
# (setting, a model's name, revision) -> a folder with at least its config.json, or a .gguf file
FindModel = Callable[[str, str, str | None], Path | None]
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
_POINTER = b"version https://git-lfs"
_READ = {".json", ".safetensors", ".jinja", ".model", ".txt"}  # what opening a model reads
_SHOWN = 3  # names in a message
# Files that tools write beside weights they have quantised, some without a word in config.json.
_QUANTIZED_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
# Methods whose weights transformers turns back; of the others the originals are elsewhere.
_REVERSIBLE = {"bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit", "fp8", "fbgemm_fp8"}
_REVERSIBLE |= {"mxfp4", "compressed-tensors", "torchao", "quanto", "hqq"}
_FLOATS = {"F64", "F32", "F16", "BF16"}
_OTHER_WEIGHTS = {
    ".bin": "pickled weights, which may run code when they are opened",
    ".pt": "pickled weights, which may run code when they are opened",
    ".pth": "pickled weights, which may run code when they are opened",
    ".gguf": "weights for llama.cpp",
    ".h5": "weights for TensorFlow",
    ".msgpack": "weights for Flax",
}


def check_config(folder: Path) -> dict[str, Any]:
    """Return the settings in a model folder's config.json.

    Raises ForeignFile when there are none, or they say that the weights are quantised; OSError.
    """
    _check_pointers(folder)
    # Beside a model too: transformers would load it into the model, from wherever it says
    if (folder / ADAPTER).is_file():
        raise ForeignFile(
            f"{ADAPTER} says that this is an adapter and no model alone; put it into its base with "
            "PEFT's merge_and_unload, and save_pretrained that"
        )
    if not (folder / CONFIG).is_file():
        if other := _other_weights(folder):
            raise ForeignFile(other)
        raise ForeignFile(f"{CONFIG} is not there; a model folder is laid out by save_pretrained")
    settings = read_object(folder, CONFIG)
    if not isinstance(settings.get("model_type"), str):
        raise ForeignFile(f"{CONFIG} does not say what kind of model this is (model_type)")
    check_unquantized(settings)
    for name in _QUANTIZED_FILES:
        if (folder / name).is_file():
            raise ForeignFile(f"{name} says that {_quantized('a quantised format')}")
    return settings


def check_unquantized(settings: Mapping[str, Any]) -> None:
    """Raise ForeignFile for settings of a model with quantised weights."""
    for part in (settings, settings.get("text_config"), settings.get("vision_config")):
        if not isinstance(part, Mapping):
            continue
        found = part.get("quantization_config") or part.get("compression_config")
        if found:
            method = found.get("quant_method") if isinstance(found, Mapping) else None
            raise ForeignFile(
                f"{CONFIG} says that {_quantized(str(method or 'a quantised format'))}"
            )


def check_weights(folder: Path) -> None:
    """Raise ForeignFile for weights that are not all there, torn, or not numbers to train on;
    OSError."""
    for path, wanted in _files(folder):
        try:
            with safe_open(path, "pt") as file:
                names = set(file.keys())
                strange = [name for name in sorted(names) if _is_quantized(file, name)]
        except SafetensorError as error:
            raise ForeignFile(
                f"{path.name} is torn, or no safetensors file ({error}); copy it again"
            ) from None
        if strange:
            kind = f"a quantised format ({named(strange)})"
            raise ForeignFile(f"{path.name} shows that {_quantized(kind)}")
        if lacking := sorted(wanted - names):
            raise ForeignFile(
                f"{path.name} has not the {len(lacking)} tensors that {INDEX} says it has "
                f"({named(lacking)}); copy both again"
            )


def seen_in_folder(setting: str, folder: Path, eye: Eye) -> Iterator[Seen]:
    """Yield the files of a model folder that say which model it is, as they are now."""
    folder = folder.expanduser()
    try:
        paths = sorted(folder.iterdir())
    except OSError:
        # Not there, or no folder: whoever opens it is told
        paths = [folder]
    for path in paths:
        if path == folder or path.suffix in TELLING:
            yield eye.file(setting, path, path.name)


def from_hub(setting: str, model: str, revision: str | None) -> Path:
    """Return the local snapshot of a Hub model, fetched unless it is there; `setting` names it.
    Raises DataError."""
    import huggingface_hub

    try:
        found = huggingface_hub.snapshot_download(
            model,
            revision=revision,
            allow_patterns=list(HUB_FILES),
            ignore_patterns=list(NOT_FROM_HUB),
        )
    except Exception as error:  # the hub client and the network raise what they like
        section = setting.rpartition(".")[0]
        raise DataError(
            f"{setting}: {model} is no folder here, and the Hub did not give it at revision "
            f"{revision}: {type(error).__name__}: {error}. Check the name, {section}.revision, "
            "the network and HF_TOKEN"
        ) from error
    return Path(found)


def settings_from_hub(model: str, revision: str | None) -> Path | None:
    """Return a folder with the config.json of a Hub model, fetched; None without an answer."""
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(model, CONFIG, revision=revision)).parent
    except Exception:  # the hub client and the network raise what they like
        return None


def shards(folder: Path) -> list[Path]:
    """Return the files that a model folder's weights are in. Raises ForeignFile when one is
    missing, OSError."""
    return [path for path, _ in _files(folder)]


def named(names: list[str]) -> str:
    """Return the first few of some names, and how many there are beside them."""
    shown = ", ".join(names[:_SHOWN])
    more = len(names) - _SHOWN
    return f"{shown} and {more} more" if more > 0 else shown


def _files(folder: Path) -> Iterator[tuple[Path, set[str]]]:
    """Yield the files that transformers reads weights from, each with the tensors that an index
    says it has. Raises ForeignFile when one is missing, or all are."""
    if (folder / WEIGHTS).is_file():
        yield folder / WEIGHTS, set()
        return
    index = folder / INDEX
    if not index.is_file():
        raise ForeignFile(_without_weights(folder))
    shards = read_object(folder, INDEX).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ForeignFile(f"{INDEX} is no index of tensors; copy it again")
    tensors: dict[str, set[str]] = {}
    for name, shard in shards.items():
        tensors.setdefault(str(shard), set()).add(name)
    missing = [shard for shard in sorted(tensors) if not (folder / shard).is_file()]
    if missing:
        raise ForeignFile(
            f"{INDEX} names {len(tensors)} files, and {len(missing)} of them are missing "
            f"({named(missing)}); copy the rest too"
        )
    for shard in sorted(tensors):
        yield folder / shard, tensors[shard]


def _without_weights(folder: Path) -> str:
    if other := _other_weights(folder):
        return other
    if found := sorted(path.name for path in folder.glob("*.safetensors")):
        return (
            f"{INDEX} is not there, and without it nobody can tell whether {named(found)} is all; "
            f"copy it too, or name a single file {WEIGHTS}"
        )
    return f"{WEIGHTS} is not there, and no {INDEX}; copy the model's weights too"


def _other_weights(folder: Path) -> str:
    """Return what to say of weights of another format in a folder; nothing where there are none."""
    for path in sorted(folder.iterdir()):
        what = _OTHER_WEIGHTS.get(path.suffix.lower())
        if what and path.is_file():
            return (
                f"{path.name} holds {what}, and there is no {WEIGHTS}; load it where you trust it, "
                "and save_pretrained it as safetensors"
            )
    return ""


def _is_quantized(file: Any, name: str) -> bool:
    # Integers are found in buffers too, positions say; a weight is never one
    if name.rpartition(".")[2] not in ("weight", "qweight"):
        return False
    return file.get_slice(name).get_dtype() not in _FLOATS


def _quantized(method: str) -> str:
    way = "name the model that it was made from"
    if method in _REVERSIBLE:
        way = f"{way}, or load it with transformers, dequantize() it and save_pretrained that"
    return f"the weights are quantised ({method}), and training needs them whole; {way}"


def _check_pointers(folder: Path) -> None:
    """Raise ForeignFile for a file that Git LFS has not fetched yet."""
    for path in sorted(folder.iterdir()):
        if path.suffix not in _READ or not path.is_file():
            continue
        with path.open("rb") as file:
            if file.read(len(_POINTER)) == _POINTER:
                raise ForeignFile(
                    f"{path.name} is a pointer of Git LFS and not the file itself; run "
                    "`git lfs pull` in its folder"
                )
