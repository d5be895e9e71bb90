"""Which engine runs a bundle, by what the bundle says of itself."""

from pathlib import Path

from ..config.serving import Dtype
from ..errors import DamagedArtifact
from ..store.bundle import about
from .adapters import AdapterEngine
from .chat_engine import ChatEngine
from .engine import CompletionEngine
from .generation import Capacity

# By the form of a bundle's experts, where it says one; who chooses for each token says none.
OF_TEXT: dict[str, type[CompletionEngine]] = {"adapter": AdapterEngine}


def engine_of(
    folder: Path, capacity: Capacity | None = None, dtype: Dtype = "fp32"
) -> CompletionEngine | ChatEngine:
    """Return the engine of a bundle, opened and held against its stack.

    Raises MissingArtifact, DamagedArtifact, NewerStore or MismatchError for one that cannot be
    served, ConfigError for one that is not run in that dtype.
    """
    described = about(folder)
    # Bundles that do not say it are of completions, as all were before there were others.
    serves = described.get("serves", "completions")
    if serves == "chat":
        return ChatEngine(folder, capacity, dtype)
    if serves != "completions":
        raise DamagedArtifact(f"{folder} serves {serves!r}, which is no service here")
    kind = OF_TEXT.get(str(described.get("form")), CompletionEngine)
    return kind(folder, capacity, dtype)
