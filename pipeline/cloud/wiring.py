"""What modal_app.py builds its objects by: settled once where a command is typed, told to
containers by variables, so that they build the same.

Invariant: a container looks at no configuration and asks nobody.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..config.run import RunConfig
from .containers import UNNAMED
from .endpoint import entered, pinned
from .inputs import packages

# purpose -> what the secret has to hold
SECRETS = {
    "wandb": ["WANDB_API_KEY"],
    "hub": ["HF_TOKEN"],
    "storage": ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"],
    "endpoint": ["MOLEFORGE_API_KEY"],
}


@dataclass(frozen=True)
class Wiring:
    """Names, secrets and packages of an app, and its endpoint."""

    app: str = UNNAMED
    volume: str = UNNAMED
    secrets: Mapping[str, str] = field(default_factory=dict)  # names by purpose
    packages: tuple[str, ...] = ()  # with models, each with its version
    entered: str = ""  # how the endpoint is, "" where there is none
    bundle: str = ""  # that all containers of a deployment serve, "": the note's
    snapshots: bool = False  # containers start from an image of memory
    serve: str = "{}"  # what the endpoint's server takes on, as JSON

    @classmethod
    def settled(cls, cfg: RunConfig, note: bytes | None, serves: bool) -> "Wiring":
        """Return what a command with that configuration builds; `note` says what a deployment
        serves, only one that `serves` makes an endpoint. Raises ConfigError, DamagedArtifact."""
        names = {}
        for purpose in SECRETS:
            name = getattr(cfg.modal, f"{purpose}_secret")
            if name:
                names[purpose] = name
        return cls(
            app=cfg.modal.app or UNNAMED,
            volume=cfg.modal.volume or UNNAMED,
            secrets=names,
            packages=tuple(packages(cfg)),
            entered=entered(cfg.modal) if serves else "",
            bundle=pinned(note) if serves else "",
            snapshots=cfg.modal.endpoint.memory_snapshot,
            serve=cfg.serve.model_dump_json(),
        )

    @property
    def variables(self) -> dict[str, str]:
        """How containers are told."""
        return {
            "MOLEFORGE_APP": self.app,
            "MOLEFORGE_VOLUME": self.volume,
            "MOLEFORGE_SECRETS": " ".join(f"{key}={name}" for key, name in self.secrets.items()),
            "MOLEFORGE_PACKAGES": " ".join(self.packages),
            "MOLEFORGE_ENDPOINT": self.entered,
            "MOLEFORGE_BUNDLE": self.bundle,
            "MOLEFORGE_SNAPSHOT": "1" if self.snapshots else "",
            "MOLEFORGE_SERVE": self.serve,
        }

    @classmethod
    def told(cls, environ: Mapping[str, str] = os.environ) -> "Wiring":
        """Return what a container was told."""
        names = {}
        for pair in environ.get("MOLEFORGE_SECRETS", "").split():
            purpose, _, name = pair.partition("=")
            names[purpose] = name
        return cls(
            app=environ.get("MOLEFORGE_APP") or UNNAMED,
            volume=environ.get("MOLEFORGE_VOLUME") or UNNAMED,
            secrets=names,
            packages=tuple(environ.get("MOLEFORGE_PACKAGES", "").split()),
            entered=environ.get("MOLEFORGE_ENDPOINT", ""),
            bundle=environ.get("MOLEFORGE_BUNDLE", ""),
            snapshots=bool(environ.get("MOLEFORGE_SNAPSHOT")),
            serve=environ.get("MOLEFORGE_SERVE", "{}"),
        )
