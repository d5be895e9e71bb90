"""modal_app.py where it is typed: the configuration that a command is about, and what commands ask
of Modal by its client."""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import modal

from pipeline import cloud
from pipeline.config.run import RunConfig
from pipeline.errors import PipelineError
from pipeline.families.ffn_moe.config import FfnMoeConfig
from pipeline.run.advice import sentence
from pipeline.store.room import writing

HERE = Path(__file__).parent
PRICES = HERE / "config/prices.yaml"
VOLUME = os.environ.get("MOLEFORGE_VOLUME_PATH", "/store")


def locked_cuda() -> str:
    """Return the CUDA that the image's torch brings; containers have no lock to read."""
    return cloud.locked_cuda((HERE / "requirements.lock").read_text("utf-8"))


def volume_called(name: str) -> modal.Volume:
    """Return the volume of that name."""
    # Version 2 is the one that many containers may write to at once
    return modal.Volume.from_name(name, create_if_missing=True, version=2)


def asked_for(argv: list[str], environ: Mapping[str, str]) -> tuple[RunConfig, cloud.Wiring]:
    """Return the configuration that a command is about, and what is built by it; inside a container
    that is settled already. Exits with 1 and a sentence for what cannot be."""
    if not modal.is_local():
        return FfnMoeConfig(), cloud.Wiring.told()
    edge = cloud.ModalEdge(Path(VOLUME))
    serves = cloud.deploys(argv)
    note = None
    more: tuple[str, ...] = ()
    try:
        cloud.refuse_client(modal.__version__)
        cfg = cloud.announced(argv, environ)
        edge = cloud.ModalEdge(Path(VOLUME), cfg.modal.volume)
        if serves:
            note = _read(volume_called(cfg.modal.volume), cloud.SERVED)
            cfg = cloud.deployed(cfg, environ, note)
            again = _read(volume_called(cfg.modal.volume), cloud.REEVALUATED)
            more = cloud.packages_again(cfg.modal, again)
            cfg = cfg.model_copy(update={"modal": cloud.reevaluated_as(cfg.modal, again)})
        prices = cloud.Prices.load(PRICES)
        cloud.check(cfg, prices, VOLUME)
        if serves:
            for line in cloud.deployment_told(cfg.modal, prices, locked_cuda()):
                sys.stdout.write(f"{line}\n")
        return cfg, cloud.Wiring.settled(cfg, note, serves, prices, more)
    except PipelineError as error:
        sys.exit(f"error: {sentence(error, edge)}")
    except modal.exception.Error as error:
        sys.exit(f"error: what is to be served cannot be read from the volume: {error}")


def secrets_called(names: Mapping[str, str], argv: list[str]) -> dict[str, modal.Secret]:
    """Return secrets by purpose; on the laptop they are looked up at once, before images are
    built."""
    found = {}
    for purpose, name in names.items():
        keys = cloud.SECRETS[purpose]
        found[purpose] = modal.Secret.from_name(name, required_keys=keys)
        if not (modal.is_local() and cloud.typed(argv)):
            continue
        try:
            found[purpose].hydrate()
        except modal.exception.Error as error:
            pairs = " ".join(f"{key}=..." for key in keys)
            sys.exit(
                f"error: modal.{purpose}_secret: {error}; make it with `modal secret create {name} "
                f"{pairs}`, or set modal.{purpose}_secret to null"
            )
    return found


def _read(volume: modal.Volume, path: str) -> bytes | None:
    try:
        return b"".join(volume.read_file(path))
    except (FileNotFoundError, modal.exception.NotFoundError):
        return None


@contextmanager
def _reached() -> Iterator[None]:
    """Have what Modal refuses, and a line that is down, told by FarError."""
    try:
        yield
    except modal.exception.Error as error:
        raise cloud.FarError(f"{type(error).__name__}: {error}") from None


class LaptopCall:
    """A call of a function of the app."""

    def __init__(self, call: modal.FunctionCall) -> None:
        self._call = call

    def get(self, timeout: float | None = None) -> Any:
        """Return what it comes to. Raises TimeoutError, FarError."""
        with _reached():
            return self._call.get(timeout)


class Laptop:
    """What commands ask of Modal: a cloud.Far. `functions` are those of the app, by name."""

    mount = VOLUME

    def __init__(
        self,
        wiring: cloud.Wiring,
        volume: modal.Volume,
        claims: modal.Dict,
        functions: Mapping[str, Any],
    ) -> None:
        self._wiring = wiring
        self._volume = volume
        self._claims = claims
        self._functions = functions

    def names(self, folder: str) -> list[str]:
        """Return the names in a folder of the volume."""
        with _reached():
            try:
                return [Path(entry.path).name for entry in self._volume.listdir(folder)]
            except modal.exception.NotFoundError:
                return []

    def read(self, path: str) -> bytes | None:
        """Return a file of the volume, None where there is none."""
        with _reached():
            return _read(self._volume, path)

    def stored_bytes(self) -> int:
        """Return what lies on the volume."""
        with _reached():
            return sum(entry.size for entry in self._volume.listdir("/", recursive=True))

    def begin(self, function: str, *given: Any) -> LaptopCall:
        """Have a container do a function of the app."""
        with _reached():
            return LaptopCall(self._functions[function].spawn(*given))

    def is_alive(self, run: str, addresses: Sequence[str]) -> bool:
        """Whether anybody is at a run still."""
        with _reached():
            return cloud.is_alive(self._claims, run, addresses)

    def is_deployed(self) -> bool:
        """Whether the app is."""
        with _reached():
            try:
                modal.App.lookup(self._wiring.app)
            except modal.exception.NotFoundError:
                return False
            return True

    def deploy(self, environ: Mapping[str, str]) -> int:
        """Deploy what the note on the volume says, with those variables; return the exit code."""
        wanted = {"MOLEFORGE_APP": self._wiring.app, "MOLEFORGE_VOLUME": self._wiring.volume}
        command = [sys.executable, "-m", "modal", "deploy", str(HERE / "modal_app.py")]
        # Another process, as what an app is made of is settled while modal_app.py is imported
        return subprocess.run(command, env={**environ, **wanted}, check=False).returncode

    def copy(self, path: str, folder: Path) -> None:
        """Copy a folder of the volume into one here, over what is there."""
        above = PurePosixPath(path).parent
        with _reached():
            for entry in self._volume.listdir(path, recursive=True):
                there = entry.path.strip("/")
                if entry.type.name != "FILE":
                    continue
                copy = folder / PurePosixPath(there).relative_to(above)
                with writing(copy):
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    with copy.open("wb") as file:
                        for chunk in self._volume.read_file(there):
                            file.write(chunk)
