"""What modal_app.py builds its objects by: settled once where a command is typed, told to
containers by variables, so that they build the same.

Invariant: a container looks at no configuration and asks nobody.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ..config.run import RunConfig
from .containers import UNNAMED
from .endpoint import entered, pinned
from .inputs import packages
from .prices import Prices

# purpose -> what the secret has to hold
SECRETS = {
    "wandb": ["WANDB_API_KEY"],
    "hub": ["HF_TOKEN"],
    "storage": ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"],
    "endpoint": ["MOLEFORGE_API_KEY"],
}

# Of a deployment's section, what becomes of what is measured again depends on
MEASURING = {"evaluate", "regions", "max_cost_usd"}
# Where containers have the bucket with inputs
BUCKET = "/bucket"


@dataclass(frozen=True)
class Bucket:
    """A bucket that containers see, or what lies below a prefix in it."""

    name: str
    prefix: str | None = None  # ends in /
    endpoint: str | None = None  # none: of S3

    @classmethod
    def of(cls, text: str | None, endpoint: str | None) -> "Bucket | None":
        """Return the one that settings name."""
        if not text:
            return None
        name, _, prefix = text.partition("/")
        prefix = prefix.strip("/")
        return cls(name, f"{prefix}/" if prefix else None, endpoint or None)

    @property
    def text(self) -> str:
        """It as settings name it."""
        return f"{self.name}/{self.prefix or ''}"


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
    bucket: Bucket | None = None  # with inputs
    reevaluates: str = ""  # when what is served is measured again, as cron has it
    prices: str = ""  # by which that is priced, as Prices.text has them
    measures_on: str = "{}"  # and where it runs and within what limit: part of a section, as JSON

    @classmethod
    def settled(
        cls,
        cfg: RunConfig,
        note: bytes | None,
        serves: bool,
        prices: Prices,
        more: Iterable[str] = (),
    ) -> "Wiring":
        """Return what a command with that configuration builds; `note` says what a deployment
        serves, only one that `serves` makes an endpoint, `more` are packages that it needs beside
        its own. Raises ConfigError, DamagedArtifact."""
        # Of one package its own version
        needed = {text.partition("==")[0]: text for text in (*more, *packages(cfg))}
        reevaluates = (cfg.modal.reevaluate or "") if serves else ""
        names = {}
        for purpose in SECRETS:
            name = getattr(cfg.modal, f"{purpose}_secret")
            if name:
                names[purpose] = name
        return cls(
            app=cfg.modal.app or UNNAMED,
            volume=cfg.modal.volume or UNNAMED,
            secrets=names,
            packages=tuple(needed.values()),
            entered=entered(cfg.modal) if serves else "",
            bundle=pinned(note) if serves else "",
            snapshots=cfg.modal.endpoint.memory_snapshot,
            serve=cfg.serve.model_dump_json(),
            bucket=Bucket.of(cfg.modal.bucket, cfg.modal.bucket_endpoint),
            reevaluates=reevaluates,
            prices=prices.text if reevaluates else "",
            measures_on=cfg.modal.model_dump_json(include=MEASURING) if reevaluates else "{}",
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
            "MOLEFORGE_REEVALUATE": self.reevaluates,
            "MOLEFORGE_PRICES": self.prices,
            "MOLEFORGE_MEASURES_ON": self.measures_on,
            "MOLEFORGE_BUCKET": self.bucket.text if self.bucket else "",
            "MOLEFORGE_BUCKET_ENDPOINT": (self.bucket and self.bucket.endpoint) or "",
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
            reevaluates=environ.get("MOLEFORGE_REEVALUATE", ""),
            prices=environ.get("MOLEFORGE_PRICES", ""),
            measures_on=environ.get("MOLEFORGE_MEASURES_ON", "{}"),
            bucket=Bucket.of(
                environ.get("MOLEFORGE_BUCKET"), environ.get("MOLEFORGE_BUCKET_ENDPOINT")
            ),
        )
