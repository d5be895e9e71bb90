"""An adapter as PEFT's save_pretrained leaves it, which anyone may have made: its settings and its
tensors.

Invariant: of its folder these two files are opened and nothing else, whatever lies beside them;
there is no sum to compare them with, so a copy is held against what was said before it was made.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .foreign import ForeignFile
from .package_place import ExpertSource, PackagePlace, place_of, read_start, take_tensors
from .reading import parse_object
from .tensor_header import Wanted, found_tensors

SETTINGS = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
# Of tensors in several files, as transformers' save_pretrained cuts them; PEFT opens none such
INDEXES = ("model.safetensors.index.json", "adapter_model.safetensors.index.json")
SETTINGS_BYTES = 1 << 20


@dataclass(frozen=True)
class SavedAdapter:
    """A saved adapter that was looked at: its settings are read, its tensors are not."""

    place: PackagePlace
    settings: dict[str, Any]
    bytes: int  # of its tensors

    def tensors(self) -> Wanted:
        """Return the dtype and the shape of each tensor, as the file's header says. Raises
        ForeignFile, OSError."""
        with self.place.open(TENSORS) as file:
            return found_tensors(file, TENSORS, self.bytes)

    def take(self, wanted: Wanted, target: Path) -> None:
        """Copy the tensors that are wanted. Raises what `take_tensors` does."""
        take_tensors(self.place, TENSORS, self.bytes, wanted, target)


def open_saved(source: ExpertSource) -> SavedAdapter:
    """Look at an adapter in a folder or at an fsspec URL. Raises ForeignFile for what is none or is
    too large; StoreError, OSError."""
    place = place_of(source.source, source.setting)
    if not place.has(TENSORS):
        if place.has(PICKLED):
            raise ForeignFile(
                f"{PICKLED} may hold pickled objects, which run when they are opened; load it "
                f"where you trust it, and save_pretrained it as {TENSORS}"
            )
        if any(place.has(name) for name in INDEXES):
            raise ForeignFile(
                f"its tensors are in several files, and PEFT's {TENSORS} is one; save it with a "
                "larger max_shard_size"
            )
        raise ForeignFile(f"{TENSORS} is not there; name the folder that save_pretrained wrote")
    try:
        settings = parse_object(read_start(place, SETTINGS, SETTINGS_BYTES))
    except UnicodeDecodeError:
        raise ForeignFile(f"{SETTINGS} is no text in UTF-8; copy it again") from None
    except ForeignFile:
        raise
    except ValueError as error:
        said = ascii(str(error)[:120])
        raise ForeignFile(f"{SETTINGS} is no JSON object: {said}") from None
    size = place.size(TENSORS)
    if not size:
        raise ForeignFile(f"{TENSORS} is empty, or nobody says how large it is; copy it here first")
    source.check_bytes(size, f"{TENSORS} has")
    return SavedAdapter(place, settings, size)
