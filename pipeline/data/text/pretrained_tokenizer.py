"""A pretrained tokenizer as others saved it: where its files are, here or on the Hub, and what they
say."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...config.base import GGUF, PACKAGE, is_folder
from ...config.text_data import TextRunConfig
from ...errors import DataError
from ...protocols import Eye, Seen
from ...store.foreign import TEMPLATE_BYTES, ForeignFile
from ...store.foreign import read_object as read_foreign
from ...store.model_sources import in_package

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Model

_CONFIGS = ("tokenizer_config.json", "special_tokens_map.json")
# Where newer models have it; in older ones it stands in tokenizer_config.json
_TEMPLATE = "chat_template.jinja"


def opened(name: str, revision: str | None) -> tuple["Model", dict[str, Any]]:
    """Return a pretrained tokenizer, and what its configuration says. Raises DataError."""
    from tokenizers import Tokenizer as Model

    path, config = _found(name, revision)
    if path.suffix == GGUF:
        return _of_gguf(path)
    try:
        return Model.from_file(str(path)), config
    except Exception as error:  # tokenizers raises plain Exception
        raise DataError(
            f"tokenizer.pretrained: {path} is not a tokenizer.json: it is torn, a pointer of Git "
            "LFS or of another layout. Copy it again, or save the tokenizer anew with "
            "AutoTokenizer.from_pretrained(...).save_pretrained(folder)"
        ) from error


def _of_gguf(path: Path) -> tuple["Model", dict[str, Any]]:
    """Return the tokenizer in a .gguf file, and its configuration. Raises DataError."""
    # Here, as it brings transformers
    from ...model.gguf_reading import tokenizer

    try:
        found = tokenizer(path)
    except Exception as error:  # a library raises what it likes at a file it cannot read
        reason = " ".join(str(error).split())
        raise DataError(
            f"tokenizer.pretrained: {path} has no tokenizer that transformers can read: {reason}. "
            "Name the tokenizer.json of the model that it was made from"
        ) from error
    config = {
        "bos_token": found.bos_token,
        "eos_token": found.eos_token,
        "add_bos_token": bool(found.init_kwargs.get("add_bos_token")),
        "chat_template": found.chat_template,
    }
    stated = {key: value for key, value in config.items() if value is not None}
    return found.backend_tokenizer, stated


def look(cfg: TextRunConfig) -> None:
    """Raise DataError when a pretrained tokenizer is named as a folder or file here and is not
    there; the Hub is not asked."""
    name = cfg.tokenizer.pretrained
    if name and _here(name) is None and is_folder(name):
        raise DataError(f"tokenizer.pretrained: there is no {name}; correct the path")


def vocab_size_here(cfg: TextRunConfig) -> int | None:
    """Return the size of a pretrained tokenizer as `Tokenizer.vocab_size` is; None for one that is
    no tokenizer.json on this machine, as one in a .gguf file, which takes seconds to read, is its
    model's own. Raises DataError for a torn one."""
    name = cfg.tokenizer.pretrained
    try:
        path = _here(name) if name else None
    except DataError:
        # Told by `look`
        return None
    if name is None or path is None or path.suffix == GGUF:
        return None
    return size_of(opened(name, cfg.tokenizer.revision)[0])


def size_of(model: "Model") -> int:
    """Return one more than a tokenizer's largest id, holes included: its get_vocab_size counts
    entries, and an embedding needs a row for every id up to the last."""
    return max(model.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def seen(cfg: TextRunConfig, eye: Eye) -> Iterator[Seen]:
    """Yield the files of a pretrained tokenizer that is here, as they are now; of one on the Hub
    the settings have the revision."""
    name = cfg.tokenizer.pretrained
    if not name:
        return
    setting = "tokenizer.pretrained"
    try:
        path = _here(name)
    except DataError:
        path = Path(name)
    if path is None:
        return
    yield eye.file(setting, path, path.name)
    for beside in (*_CONFIGS, _TEMPLATE) if path.suffix != GGUF else ():
        if (path.parent / beside).is_file():
            yield eye.file(setting, path.parent / beside, beside)


def _here(name: str) -> Path | None:
    """Return the tokenizer.json or .gguf file that a name means here, or None. Raises DataError for
    a folder without one."""
    path = Path(name).expanduser()
    if name.startswith(PACKAGE):
        path = in_package("tokenizer.pretrained", name)
    if path.is_dir():
        path = path / "tokenizer.json"
        if not path.is_file():
            raise DataError(
                f"tokenizer.pretrained: {name} has no tokenizer.json. Save the fast tokenizer "
                "there: AutoTokenizer.from_pretrained(...).save_pretrained(folder)"
            )
    return path if path.is_file() else None


def _found(name: str, revision: str | None) -> tuple[Path, dict[str, Any]]:
    """Return the tokenizer.json and what the files beside it say."""
    path = _here(name)
    if path is None:
        return _from_hub(name, revision)
    if path.suffix == GGUF:
        return path, {}
    beside = [path.parent / config for config in _CONFIGS]
    settings = _merged([config for config in beside if config.is_file()])
    return path, settings | _template_in(path.parent / _TEMPLATE)


def _from_hub(name: str, revision: str | None) -> tuple[Path, dict[str, Any]]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    beside = {}
    try:
        path = Path(hf_hub_download(name, "tokenizer.json", revision=revision))
        for file in (*_CONFIGS, _TEMPLATE):
            try:
                beside[file] = Path(hf_hub_download(name, file, revision=revision))
            except EntryNotFoundError:  # each may be missing
                continue
    except Exception as error:  # the hub client and the network raise what they like
        reason = " ".join(str(error).split()).rstrip(".")
        raise DataError(
            f"tokenizer.pretrained, or trunk.init where that is left out: {name} is no folder and "
            f"no file here, and the Hub did not give its tokenizer.json: {type(error).__name__}: "
            f"{reason}. Check the name, its revision and the network; if it is to be a folder, "
            "begin its path with ./"
        ) from error
    template = beside.pop(_TEMPLATE, None)
    settings = _merged(beside.values())
    return path, settings | (_template_in(template) if template else {})


def _template_in(path: Path) -> dict[str, str]:
    """Return the setting of a chat template that has a file of its own; {} where there is none.
    Raises DataError."""
    if not path.is_file():
        return {}
    try:
        template = path.read_text("utf-8")
        _check_length(template)
        return {"chat_template": template}
    except (OSError, ValueError) as error:
        raise DataError(
            f"tokenizer.pretrained: {path} is no chat template: {error}. Copy it again, or remove "
            "it, which leaves the bundle without chats"
        ) from None


def _check_length(template: Any) -> None:
    """Raise ValueError for a chat template with which a bundle would not be opened; what stands for
    several is looked at as a whole."""
    if len(str(template).encode()) > TEMPLATE_BYTES:
        raise ValueError(f"it has over {TEMPLATE_BYTES:,} bytes")


def _merged(paths: Iterable[Path]) -> dict[str, Any]:
    """Return what JSON files say together; the first to name a key has it."""
    out: dict[str, Any] = {}
    for path in paths:
        try:
            out = read_foreign(path.parent, path.name) | out
        except (ForeignFile, OSError) as error:
            raise DataError(
                f"tokenizer.pretrained: {path} is not JSON of settings: {error}"
            ) from None
        try:
            _check_length(out.get("chat_template", ""))
        except ValueError as error:
            raise DataError(
                f"tokenizer.pretrained: chat_template in {path}: {error}. Shorten it, or remove "
                "it, which leaves the bundle without chats"
            ) from None
    return out
