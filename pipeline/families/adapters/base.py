"""The frozen model under every adapter: pinned, opened and checked, whatever its kind.

Invariant: what is opened is what was pinned. A folder is known by the sha256 of its files, a Hub
model by its commit; nothing that trains, routes or answers knows which of the three sources it has.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedModel

from ...config.base import is_folder
from ...errors import ConfigError, DataError, MismatchError
from ...hardware import device
from ...model.loading import check_finite, open_checkpoint
from ...store.artifacts import write_text
from ...store.foreign import ForeignFile, check_model_files
from ...store.model_files import (
    ADAPTER,
    TELLING,
    FindModel,
    check_config,
    check_weights,
    from_hub,
)
from ...store.model_sources import told_absent
from ...store.reading import damaged, reading
from ...store.reading import read_object as stored_object
from .chat import Chat
from .config import AdapterRunConfig
from .cost import DecoderSizes
from .sections import AdapterBaseConfig

PIN = "pin.json"
MODEL = "loras.base.model"
# folder of a built base beside its pin.json, and how such a base is called in adapters
BUILT = "base"


@dataclass(frozen=True)
class ModelRef:
    """Which model a run stands on."""

    source: str  # built, folder or hub
    model: str  # name or folder as configured; BUILT for a built one
    revision: str | None = None  # the Hub's commit
    # name -> sha256, unless the Hub's commit says it all
    files: dict[str, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Equal digests, equal weights: a folder may be moved, a Hub model renamed nowhere."""
        known: list = sorted(self.files.items())
        if self.source == "hub":
            known = [self.model, self.revision]
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()

    def values(self) -> dict:
        """Return what pin.json holds."""
        return asdict(self) | {"digest": self.digest}

    @classmethod
    def read(cls, folder: Path) -> "ModelRef":
        """Read folder/pin.json. Raises DamagedArtifact or UnreadableFile."""
        path = folder / PIN
        raw = stored_object(path)
        try:
            digest = raw.pop("digest")
            pin = cls(**raw)
            found = pin.digest
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise damaged(path, f"is no pin of a base ({error!r})") from None
        # a name changed by hand would otherwise open another base under the adapters
        if digest != found:
            raise damaged(path, "does not match its own digest")
        return pin


@dataclass(frozen=True)
class ModelKind:
    """The kind of model that a family's bases are."""

    name: str  # for people
    model_type: str  # in config.json
    model_class: type[PreTrainedModel]


@dataclass(frozen=True)
class LoadedBase:
    """A base ready for adapters: frozen, in evaluation mode, on the device."""

    model: PreTrainedModel
    chat: Chat
    pin: ModelRef
    sizes: DecoderSizes


def pin_base(
    base: AdapterBaseConfig, folder: Path, kind: ModelKind, build: Callable[[Path], None]
) -> dict:
    """Pin the base that the settings name into folder; `build` writes one where they give sizes.
    Returns metrics.

    Raises DataError when a folder or the Hub does not hold a model of this kind.
    """
    if base.model is None:
        where = folder / BUILT
        build(where)
        pin = ModelRef("built", BUILT, files=file_hashes(where))
    elif is_folder(base.model):
        where = _model_folder(Path(base.model).expanduser(), kind)
        _check_tensors(where, kind)
        pin = ModelRef("folder", base.model, files=file_hashes(where))
    else:
        where = from_hub(MODEL, base.model, base.revision)
        _check_files(where, kind)
        _check_tensors(where, kind)
        pin = ModelRef("hub", base.model, base.revision)
    write_text(folder / PIN, json.dumps(pin.values(), indent=1, sort_keys=True) + "\n")
    parameters = count_parameters(where)
    return {"parameters": parameters, "source": pin.source, "digest": pin.digest}


def preflight(cfg: AdapterRunConfig, find: FindModel, kind: ModelKind) -> list[str]:
    """Return what a person should know of the base before a run, as far as it is seen from here.
    Raises ConfigError for one that no adapter could be trained on."""
    base = cfg.loras.base
    if base.model is None:
        return []
    folder = find(MODEL, base.model, base.revision)
    if folder is None:
        return told_absent(MODEL, base.model)
    try:
        settings = check_config(folder)
        if settings["model_type"] != kind.model_type:
            raise ForeignFile(f"it is a {settings['model_type']}, and no {kind.name}")
        # Of the Hub's models, and of those elsewhere, only the settings are here
        if folder == Path(base.model).expanduser():
            check_weights(folder)
        # with the library's defaults, and refused where a setting is not of its type
        text = AutoConfig.for_model(**settings).get_text_config()
    except Exception as error:  # a library raises what it likes at settings of another version
        reason = " ".join(str(error).split())
        raise ConfigError(f"{MODEL}: {base.model} cannot be the base: {reason}") from error
    most = text.max_position_embeddings
    longest = max(cfg.loras.options(name).max_tokens for name in cfg.experts)
    if longest > most:
        raise ConfigError(
            f"loras.defaults.max_tokens: {longest} tokens, and {base.model} has positions for "
            f"{most} (max_position_embeddings in its config.json); set it to {most} or less"
        )
    return []


def locate(pin: ModelRef, folder: Path, kind: ModelKind) -> Path:
    """Return the folder of the pinned model's files; `folder` is that of its pin. Raises
    DataError."""
    if pin.source == "built":
        return folder / BUILT
    if pin.source == "folder":
        return _model_folder(Path(pin.model).expanduser(), kind)
    return from_hub(MODEL, pin.model, pin.revision)


def pinned_files(folder: Path, kind: ModelKind) -> tuple[ModelRef, Path]:
    """Return the pin in folder, and where the files are that it names.

    Raises DamagedArtifact, MismatchError when the files have changed, DataError when they cannot be
    found.
    """
    pin = ModelRef.read(folder)
    where = locate(pin, folder, kind)
    # a Hub model has none: its commit is in the path that it was fetched to
    if pin.files and file_hashes(where) != pin.files:
        raise MismatchError(
            f"{where} is not the base that this run was started on: its files have changed since "
            "train_shared. Put the files back, or make the base and what follows it again",
            stage="train_shared",
        )
    # a folder elsewhere was looked at where it was found
    if pin.source != "folder":
        _check_files(where, kind)
    return pin, where


def load_model(where: Path, base: AdapterBaseConfig, kind: ModelKind) -> PreTrainedModel:
    """Open a model folder with the settings' dtype and attention: frozen, in evaluation mode, on
    the device.

    On a processor the weights stay mapped from their files as long as the settings' dtype is the
    files'. Raises DataError, also for tensors that are missing, unknown or of another shape.
    """
    model = _open(where, kind, getattr(torch, base.dtype), base.attn)
    if device() != "cpu":
        model = model.to(device())  # type: ignore[arg-type]  # the library wraps it untyped
    return model.requires_grad_(False).eval()


def _open(where: Path, kind: ModelKind, dtype: "torch.dtype | str", attn: str) -> PreTrainedModel:
    try:
        model: PreTrainedModel = open_checkpoint(kind.model_class, where, dtype, attn)
    except Exception as error:  # a library raises what it likes at a file it cannot read
        reason = " ".join(str(error).split())
        raise DataError(
            f"{where} cannot be loaded as a {kind.name}: {type(error).__name__}: {reason}"
        ) from error
    return model


def _check_tensors(where: Path, kind: ModelKind) -> None:
    """Raise DataError for a model whose tensors do not fill it, or are not finite."""
    model = _open(where, kind, "auto", "sdpa")
    try:
        check_finite(model.named_parameters())
    except ValueError as error:
        raise DataError(f"{MODEL}: {where}: {error}") from None


def count_parameters(folder: Path) -> int:
    """Return the parameters of a model folder, from the headers of its files; tied ones once.
    Raises DataError."""
    total = 0
    for path in folder.glob("*.safetensors"):
        try:
            with safe_open(path, "pt") as file:
                for key in file.keys():  # noqa: SIM118 (a safetensors file is no mapping)
                    total += torch.Size(file.get_slice(key).get_shape()).numel()
        except (SafetensorError, OSError) as error:
            raise DataError(f"{path} cannot be read: {error}") from None
    return total


def _model_folder(folder: Path, kind: ModelKind) -> Path:
    missing = [name for name in ("config.json", "tokenizer.json") if not (folder / name).is_file()]
    # an adapter has no config.json, and is told what to do about it
    if missing and not (folder / ADAPTER).is_file():
        lacks = " and no ".join(missing)
        raise DataError(
            f"{MODEL}: {folder} is no model folder: it has no {lacks}. Give a folder as "
            "save_pretrained or the Hub lays it out"
        )
    _check_files(folder, kind)
    return folder


def _check_files(folder: Path, kind: ModelKind) -> None:
    """Raise DataError for a model that names code, that is not complete, or of another kind, which
    the library would fill up with random weights of any size."""
    try:
        settings = check_config(folder)
        found = settings.get("model_type")
        if found == kind.model_type:
            check_weights(folder)
            names = [path.name for path in folder.iterdir() if path.is_file()]
            check_model_files(folder, names)
    except (ForeignFile, OSError) as error:
        raise DataError(f"{MODEL}: {folder}: {error}") from None
    if found != kind.model_type:
        raise DataError(
            f"{folder} holds a {found}; {MODEL} must be a {kind.name} "
            f"(model_type {kind.model_type})"
        )


def file_hashes(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file at the top of a model folder."""
    out = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix in TELLING:
            with reading(path), path.open("rb") as file:
                out[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return out
