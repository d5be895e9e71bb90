"""The mark of a store: which format it has, so that no version reads or changes another one's."""

from pathlib import Path

from ..errors import DamagedArtifact, NewerStore, OldStore
from .reading import absence, parse_object, read_bytes, unsealed

MARK = "store.json"
# Raised when what is in a store is laid out or written differently.
FORMAT = 2


def read_format(root: Path) -> int:
    """Return the format that a store's mark states. Raises DamagedArtifact or UnreadableFile."""
    mark = root / MARK
    try:
        return parse_format(read_bytes(mark))
    except (ValueError, DamagedArtifact) as error:
        why = absence(mark) if isinstance(error, DamagedArtifact) else error
        raise DamagedArtifact(
            f"{root} cannot be used as a store: its {MARK} alone is damaged ({why}), and what lies "
            "beside it is as good as it was",
            remove=mark,
            root=root,
        ) from None


def parse_format(data: bytes) -> int:
    """Return the format that the bytes of a store.json state. Raises ValueError.

    It is sealed, or a flipped bit would make the store another version's; one that states its
    format alone is of a time when it was not.
    """
    values = parse_object(data)
    if values.keys() != {"format"}:
        values = unsealed(data)
    found = values.get("format")
    if type(found) is not int or found < 1:
        raise ValueError("it states no format")
    return found


def check_format(found: int, root: Path | str) -> None:
    """Raise OldStore or NewerStore when a store's format is not the one of this version."""
    if found < FORMAT:
        raise OldStore(
            f"{root} has store format {found}, this version reads {FORMAT}: what an earlier "
            "MoleForge made stays as it is and has to be made again in another store",
            root=Path(root),
        )
    if found > FORMAT:
        raise NewerStore(
            f"{root} has store format {found}, this version reads up to {FORMAT}",
            root=Path(root),
            remedy="update MoleForge",
        )
