"""The command `serve`: what was typed, as an application that listens."""

import argparse
import gc
import logging
from collections.abc import Callable
from pathlib import Path

from .. import garbage
from ..config.serving import ServeConfig
from ..store.bundle import about
from . import logs
from .app import Access, closed, open_bundle
from .keys import Keys
from .limits import ConnectionLimits
from .listening import listen
from .same_site import Hosts

log = logging.getLogger(__name__)


def serve(
    folder: Path,
    args: argparse.Namespace,
    keys: Keys,
    wanted: ServeConfig,
    announce: Callable[[str], None],
) -> None:
    """Serve a bundle until told to stop, as the arguments of the command say; `wanted` is what a
    configuration says of it, of which they may change some.

    Raises PipelineError for a bundle that cannot be served or an address that cannot be had, and
    KeyboardInterrupt after Ctrl-C.
    """
    # What is wrong at first sight is told before anything listens.
    about(folder)
    logs.configure(args.log_format)
    if args.log_format == "json":
        announce = _announce
    access = Access(
        keys=keys,
        hosts=Hosts(args.host, args.allowed_host),
        origins=tuple(args.allow_origin),
        open_metrics=not args.metrics_key,
    )
    wanted = wanted.model_copy(update=_typed(args))
    app = closed(access, ConnectionLimits(connections=wanted.max_connections))
    image_hosts = tuple(args.allow_image_hosts)

    def load() -> None:
        open_bundle(app, folder, wanted, image_hosts)
        # What opening has left behind goes; the rest stays for good, and to look through it for
        # what requests leave behind would hold all texts up for a third of a second
        gc.collect()
        garbage.as_usual()

    listen(
        app,
        args.host,
        args.port,
        announce,
        load=load,
        drain_seconds=args.drain_seconds,
        hang_up=keys.reload if args.api_key_file else None,
    )


def _announce(text: str) -> None:
    logs.event(log, text)


def _typed(args: argparse.Namespace) -> dict:
    """Return the limits that were typed."""
    given = {name: getattr(args, name) for name in ServeConfig.model_fields}
    return {name: value for name, value in given.items() if value is not None}
