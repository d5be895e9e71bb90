"""What is served on Modal and how: the note beside the bundles that `deploy` leaves, what a later
deployment makes of it, and the key that the endpoint's process has to have.

Invariant: nobody gets an endpoint without a key who has not asked for one.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from pydantic import BaseModel

from ..config.base import Name
from ..config.machines import EndpointConfig, ModalConfig
from ..config.run import RunConfig
from ..errors import ConfigError, DamagedArtifact, MissingArtifact
from ..store.artifacts import Store, write_text
from ..store.lineage import Lineage
from ..store.reading import parse_object, reading
from .containers import JobResult

SERVED = "served.json"
KEY = "MOLEFORGE_API_KEY"
# How an endpoint is entered; an empty word: there is none.
WITH_KEY = "key"
PUBLIC = "public"
AGAIN = "`modal run modal_app.py::deploy --config FILE --override"
WAYS = (
    f"type {AGAIN} modal.endpoint_secret=NAME` for one with the key in that secret, or "
    f"{AGAIN} modal.endpoint_public=true` for one that is open to everybody, "
    "then `modal deploy modal_app.py`"
)


class EndpointNote(BaseModel, frozen=True, extra="forbid"):
    """How a bundle is to be served: what its configuration said when `deploy` made or found it."""

    secret: Name | None = None
    public: bool = False
    machine: EndpointConfig = EndpointConfig()


class ServedNote(BaseModel, frozen=True, extra="forbid"):
    """Which bundle is served, and how; older notes do not say how."""

    address: str
    endpoint: EndpointNote | None = None


def serve_next(
    results: list[JobResult], cfg: RunConfig, root: Path, publish: Callable[[], None]
) -> None:
    """Note a bundle among the results, new or found, as the one to serve, with how its
    configuration wants it served, and publish the note."""
    bundles = [each.address for each in results if each.stage == "deploy" and not each.error]
    if not bundles:
        return
    how = EndpointNote(
        secret=cfg.modal.endpoint_secret,
        public=cfg.modal.endpoint_public,
        machine=cfg.modal.endpoint,
    )
    note = ServedNote(address=bundles[-1], endpoint=how)
    write_text(root / SERVED, note.model_dump_json())
    publish()


def served_address(root: Path) -> str:
    """Return the address of the bundle that is served, "" where none is. Raises DamagedArtifact,
    UnreadableFile."""
    try:
        with reading(root / SERVED):
            return _note((root / SERVED).read_bytes()).address
    except FileNotFoundError:
        return ""


def served(root: Path, key: str | None, entered: str) -> Path:
    """Return the folder of the bundle to serve, for a process that has that key and was deployed to
    be entered that way.

    Raises MissingArtifact when no bundle was made, ConfigError when it would be open unasked,
    StaleArtifact when the bundle is of parts that were made again since.
    """
    try:
        with reading(root / SERVED):
            content = (root / SERVED).read_bytes()
    except FileNotFoundError:
        raise MissingArtifact("there is no bundle to serve yet", stages=("deploy",)) from None
    note = _note(content)
    if not key and entered != PUBLIC:
        raise ConfigError(f"there is no {KEY}, and nobody asked for an open endpoint: {WAYS}")
    # A bundle may be made after the deployment: the open endpoint is not to serve it meanwhile.
    if not key and note.endpoint and note.endpoint.secret:
        raise ConfigError(
            f"this bundle is to be served with the key in {note.endpoint.secret}, and the endpoint "
            "was deployed without one: type `modal deploy modal_app.py`"
        )
    store = Store(root)
    Lineage(store).check(note.address)
    return store.folder(note.address)


def deployed(cfg: RunConfig, environ: Mapping[str, str], content: bytes | None) -> RunConfig:
    """Return the configuration of a deployment: $MOLEFORGE_CONFIG's, with the way in of the served
    bundle where it names none; without one, the endpoint that the bundle's note says.

    `content` is the note's, if there is one. Raises ConfigError when no key is named and nobody
    asked for an open endpoint.
    """
    how = None if content is None else _note(content).endpoint
    modal = cfg.modal
    explicit = bool(environ.get("MOLEFORGE_CONFIG"))
    if how and not (modal.endpoint_secret or modal.endpoint_public):
        changes: dict = {"endpoint_secret": how.secret, "endpoint_public": how.public}
        if not explicit:
            changes["endpoint"] = how.machine
        modal = modal.model_copy(update=changes)
    if modal.endpoint_public and how and how.secret:
        raise ConfigError(
            f"the bundle is to be served with the key in {how.secret}, but $MOLEFORGE_CONFIG asks "
            f"for an open endpoint: {WAYS}"
        )
    if not entered(modal):
        raise ConfigError(f"this endpoint would be open to everybody, and nobody asked: {WAYS}")
    return cfg.model_copy(update={"modal": modal})


def entered(modal: ModalConfig) -> str:
    """Return how an endpoint of these settings is entered."""
    if modal.endpoint_secret:
        return WITH_KEY
    return PUBLIC if modal.endpoint_public else ""


def _note(content: bytes) -> ServedNote:
    try:
        return ServedNote.model_validate(parse_object(content))
    # of pydantic too
    except ValueError:
        raise DamagedArtifact(
            f"{SERVED} on the volume does not say what to serve", stage="deploy"
        ) from None
