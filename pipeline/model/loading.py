"""Whether a checkpoint filled the model that a library opened it as.

transformers warns of what did not fit and draws the rest at random, which trains on without a word.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

_SHOWN = 3  # names in a message
_NEVER_ZERO = ("norm.weight", "embed_tokens.weight")
# Values looked at together: of each, what comes between takes five bytes
_PIECE = 1 << 20


@contextmanager
def quiet_library() -> Iterator[None]:
    """Keep transformers' progress bars and load reports off the terminal."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    level = logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def open_checkpoint(kind: Any, folder: Path, dtype: "torch.dtype | str", attn: str) -> Any:
    """Return a checkpoint as a class or auto class of transformers opens it, from the folder's own
    files: nothing is fetched, nor is a missing one taken from somewhere else.

    Raises ValueError for tensors that are missing, unknown or of another shape; OSError and other
    errors of the library when nothing can be loaded.
    """
    with quiet_library():
        model, report = kind.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=attn,
            # safetensors only, as a pickled checkpoint may run what it likes while it is opened
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            # What does not fit is reported by name, in place of an error that shows the first
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    check_report(report)
    return model


def check_report(info: Mapping[str, Any]) -> None:
    """Raise ValueError for what from_pretrained reports (output_loading_info): tensors that were
    missing, unknown or of another shape, by name and count."""
    missing = sorted(info["missing_keys"])
    unknown = sorted(info["unexpected_keys"])
    shapes = []
    for entry in sorted(info["mismatched_keys"], key=str):
        name, found, wanted = entry
        shapes.append(f"{name} {tuple(found)} for {tuple(wanted)}")
    problems = []
    if missing:
        problems.append(_counted(missing, "missing"))
    if unknown:
        problems.append(_counted(unknown, "unknown to this model"))
    if shapes:
        problems.append(_counted(shapes, "of another shape than config.json says"))
    problems += [str(error) for error in info.get("error_msgs") or ()]
    if problems:
        raise ValueError(f"its tensors do not fill it: {'; '.join(problems)}{_why(unknown)}")


def check_finite(tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Raise ValueError for tensors with NaN or infinite values, and those of nothing but zeros that
    no training leaves so, by name and count."""
    bad = []
    empty = []
    for name, tensor in tensors:
        if tensor.is_floating_point() and not _finite(tensor.detach()):
            bad.append(name)
        # Layers that are added to a model may begin with matrices of zeros, but none with these
        elif name.endswith(_NEVER_ZERO) and not tensor.detach().any():
            empty.append(name)
    bad.sort()
    empty.sort()
    if empty:
        raise ValueError(
            f"{_counted(empty, 'nothing but zeros')}, as a copy that was broken off leaves them; "
            "copy the file again"
        )
    if bad:
        raise ValueError(
            f"{_counted(bad, 'not finite (NaN or infinite)')}; the file is damaged, or its "
            "training had failed"
        )


def _finite(tensor: torch.Tensor) -> bool:
    # In pieces, as the answer takes a byte a value, and an embedding is the largest tensor there is
    pieces = tensor.reshape(-1).split(_PIECE)
    return all(bool(torch.isfinite(piece).all()) for piece in pieces)


def _counted(names: list[str], what: str) -> str:
    shown = ", ".join(names[:_SHOWN])
    if len(names) > _SHOWN:
        shown += ", ..."
    noun = "tensor is" if len(names) == 1 else "tensors are"
    return f"{len(names)} {noun} {what} ({shown})"


def _why(unknown: list[str]) -> str:
    """Return what a prefix that all names have tells of how they were saved."""
    for prefix, what in _PREFIXES.items():
        if unknown and all(name.startswith(prefix) for name in unknown):
            return f". All names begin with {prefix}, as {what}: save the model inside it"
    return ""


_PREFIXES = {
    "_orig_mod.": "torch.compile puts it there",
    "module.": "DataParallel puts it there",
    "base_model.model.": "PEFT puts it there",
    "_fsdp_wrapped_module.": "FSDP puts it there",
}
