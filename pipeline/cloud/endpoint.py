"""What is served on Modal and how: the note beside the bundles that `deploy` leaves, what a later
deployment makes of it, and the key that the endpoint's process has to have.

Invariant: nobody gets an endpoint without a key who has not asked for one, and the containers of
one deployment serve one bundle: it is pinned when the deployment is made.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel

from ..config.base import Name
from ..config.machines import EndpointConfig, ModalConfig
from ..config.run import RunConfig
from ..config.serving import ServeConfig
from ..errors import ConfigError, DamagedArtifact, MissingArtifact
from ..store.artifacts import Store, now, sha256
from ..store.bundle import SUMS
from ..store.lineage import Lineage
from ..store.reading import reading
from ..store.versions import FORMAT, Version, chosen
from .containers import JobResult
from .notes import parse_note, write_note

SERVED = "served.json"
KEY = "MOLEFORGE_API_KEY"
# How an endpoint is entered; an empty word: there is none.
WITH_KEY = "key"
PROXY = "proxy"  # with a token of the workspace, which Modal itself checks
PUBLIC = "public"
AGAIN = "`modal run modal_app.py::deploy --config FILE --override"
WAYS = (
    f"type {AGAIN} modal.endpoint_secret=NAME` for one with the key in that secret, with "
    "`modal.endpoint_proxy_auth=true` for one that proxy tokens of the workspace open, or with "
    "`modal.endpoint_public=true` for one that is open to everybody, then "
    "`modal deploy modal_app.py`"
)


class EndpointNote(BaseModel, frozen=True, extra="forbid"):
    """How a bundle is to be served: what its configuration said when `deploy` made or found it."""

    secret: Name | None = None
    public: bool = False
    proxy_auth: bool = False
    machine: EndpointConfig = EndpointConfig()
    serve: ServeConfig = ServeConfig()  # older notes do not say it


class ServedNote(BaseModel, frozen=True, extra="forbid"):
    """Which bundle is served, and how; older notes do not say how, nor what was served before."""

    address: str
    sums: str = ""  # sha256 of its SHA256SUMS
    endpoint: EndpointNote | None = None
    # What `deploy` left, the last one last; each is named by its address
    versions: tuple[Version, ...] = ()

    @property
    def pin(self) -> str:
        """The bundle as the containers of a deployment are told of it."""
        return f"{self.address}@{self.sums}" if self.sums else self.address


def serve_next(
    results: Sequence[JobResult], cfg: RunConfig, root: Path, publish: Callable[[], None]
) -> None:
    """Note a bundle among the results, new or found, as the one to serve, with how its
    configuration wants it served, and publish the note.

    The bundles before it stay named, as many as `deploy.keep` says, so that nobody prunes them.
    Whoever calls it is alone at the note, and sees what others have made of it.
    """
    bundles = bundles_of(results)
    if not bundles:
        return
    how = EndpointNote(
        secret=cfg.modal.endpoint_secret,
        public=cfg.modal.endpoint_public,
        proxy_auth=cfg.modal.endpoint_proxy_auth,
        machine=placed(cfg.modal),
        serve=cfg.serve,
    )
    address = bundles[-1]
    version = Version(FORMAT, address, address, _sums(root, address), now())
    # One that was made again at its address is what it is now
    before = [each for each in _versions(root) if each.address != address]
    kept = before[max(0, len(before) - cfg.deploy.keep) :]
    note = ServedNote(address=address, sums=version.sums, endpoint=how, versions=(*kept, version))
    write_note(root / SERVED, note)
    publish()


def bundles_of(results: Sequence[JobResult]) -> list[str]:
    """Return the addresses of the bundles among results, new or found."""
    return [each.address for each in results if each.stage == "deploy" and not each.error]


def _sums(root: Path, address: str) -> str:
    """Return what a bundle's list of sums hashes to, "" where there is no list."""
    with contextlib.suppress(FileNotFoundError):
        return sha256(Store(root).folder(address) / SUMS)
    return ""


def _versions(root: Path) -> tuple[Version, ...]:
    """Return the bundles that a note names so far; of one that says nothing there are none."""
    try:
        note = _read(root)
    except DamagedArtifact:
        return ()
    if note is None:
        return ()
    # Older notes name one bundle and no versions
    return note.versions or (Version(FORMAT, note.address, note.address, note.sums, ""),)


def served_addresses(root: Path) -> list[str]:
    """Return the addresses of the bundle that is served and of those that a rollback leads to.
    Raises DamagedArtifact, UnreadableFile."""
    note = _read(root)
    if note is None:
        return []
    return list(dict.fromkeys([note.address, *(each.address for each in note.versions)]))


def roll_back(root: Path, to: str | None, publish: Callable[[], None]) -> None:
    """Name a former bundle as the one to serve, by its address or the start of it, or the one
    before; how it is served stays. Raises StoreError, StaleArtifact, MissingArtifact."""
    note = _required(root)
    version = chosen(list(_versions(root)), note.address, to, SERVED)
    store = Store(root)
    store.require(version.address)
    Lineage(store).check(version.address)
    changes = {"address": version.address, "sums": _sums(root, version.address)}
    write_note(root / SERVED, note.model_copy(update=changes))
    publish()


def shown_versions(root: Path) -> tuple[list[Version], str]:
    """Return the bundles that may be served, the last one last, and which one is."""
    note = _required(root)
    return list(_versions(root)), note.address


def _read(root: Path) -> ServedNote | None:
    """Return what is to be served, None where there is no note. Raises DamagedArtifact,
    UnreadableFile."""
    try:
        with reading(root / SERVED):
            return _note((root / SERVED).read_bytes())
    except FileNotFoundError:
        return None


def _required(root: Path) -> ServedNote:
    note = _read(root)
    if note is None:
        raise MissingArtifact("there is no bundle to serve yet", stages=("deploy",))
    return note


def served(root: Path, key: str | None, entered: str, pin: str = "") -> Path:
    """Return the folder of the bundle to serve, for a process that has that key and was deployed to
    be entered that way.

    `pin` is what the deployment was told of the bundle: all of its containers serve that one,
    whatever the note has come to say; "" goes by the note. Raises MissingArtifact when no bundle
    was made, ConfigError when it would be open unasked or is not the one that was deployed,
    StaleArtifact when the bundle is of parts that were made again since.
    """
    note = _required(root)
    if not key and entered not in (PUBLIC, PROXY):
        raise ConfigError(f"there is no {KEY}, and nobody asked for an open endpoint: {WAYS}")
    # A bundle may be made after the deployment: the open endpoint is not to serve it meanwhile.
    if not key and note.endpoint and note.endpoint.secret:
        raise ConfigError(
            f"this bundle is to be served with the key in {note.endpoint.secret}, and the endpoint "
            "was deployed without one: type `modal deploy modal_app.py`"
        )
    if not key and entered == PUBLIC and note.endpoint and note.endpoint.proxy_auth:
        raise ConfigError(
            "this bundle is to be served for proxy tokens alone, and the endpoint was deployed for "
            "everybody: type `modal deploy modal_app.py`"
        )
    address, _, sums = (pin or note.pin).partition("@")
    store = Store(root)
    Lineage(store).check(address)
    found = _sums(root, address)
    if sums and not found:
        raise MissingArtifact(f"{address}, which is to be served, is not on the volume any more")
    if sums and found != sums:
        raise ConfigError(
            f"{address} was made again since it was deployed, and the containers of a deployment "
            "serve one bundle: type `modal deploy modal_app.py`"
        )
    return store.folder(address)


def pinned(content: bytes | None) -> str:
    """Return the bundle that a deployment is to serve, "" where none is made yet; `content` is the
    note's. Raises DamagedArtifact."""
    return "" if content is None else _note(content).pin


def deployed(cfg: RunConfig, environ: Mapping[str, str], content: bytes | None) -> RunConfig:
    """Return the configuration of a deployment: $MOLEFORGE_CONFIG's, with the way in of the served
    bundle where it names none; without one, the endpoint that the bundle's note says.

    `content` is the note's, if there is one. Raises ConfigError when no key is named and nobody
    asked for an open endpoint.
    """
    how = None if content is None else _note(content).endpoint
    modal = cfg.modal
    explicit = bool(environ.get("MOLEFORGE_CONFIG"))
    if how and modal.endpoint_public and (how.secret or how.proxy_auth):
        wanted = f"with the key in {how.secret}" if how.secret else "for proxy tokens alone"
        raise ConfigError(
            f"the bundle is to be served {wanted}, but $MOLEFORGE_CONFIG asks for an open "
            f"endpoint: {WAYS}"
        )
    if how:
        # Who names one of the two does not drop the other
        changes: dict = {
            "endpoint_secret": modal.endpoint_secret or how.secret,
            "endpoint_proxy_auth": modal.endpoint_proxy_auth or how.proxy_auth,
        }
        if not entered(modal):
            changes["endpoint_public"] = how.public
            if not explicit:
                changes["endpoint"] = how.machine
        modal = modal.model_copy(update=changes)
    serve = cfg.serve if how is None or explicit else how.serve
    if not entered(modal):
        raise ConfigError(f"this endpoint would be open to everybody, and nobody asked: {WAYS}")
    return cfg.model_copy(update={"modal": modal, "serve": serve})


def entered(modal: ModalConfig) -> str:
    """Return how an endpoint of these settings is entered."""
    if modal.endpoint_secret:
        return WITH_KEY
    if modal.endpoint_proxy_auth:
        return PROXY
    return PUBLIC if modal.endpoint_public else ""


def placed(modal: ModalConfig) -> EndpointConfig:
    """Return the machine of an endpoint with the regions that it runs in."""
    machine = modal.endpoint
    if machine.regions or not modal.regions:
        return machine
    return machine.model_copy(update={"regions": modal.regions})


def _note(content: bytes) -> ServedNote:
    try:
        return parse_note(ServedNote, content)
    # of pydantic too
    except ValueError:
        raise DamagedArtifact(
            f"{SERVED} on the volume does not say what to serve", stage="deploy"
        ) from None
