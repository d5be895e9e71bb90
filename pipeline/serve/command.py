"""The command `serve`: what was typed, as an application that listens."""

import argparse
import logging
from collections.abc import Callable
from pathlib import Path

from ..store.bundle import about
from . import logs
from .app import Access, closed, open_bundle
from .keys import Keys
from .limits import ConnectionLimits, RequestLimits
from .listening import listen
from .same_site import Hosts

log = logging.getLogger(__name__)


def serve(
    folder: Path, args: argparse.Namespace, keys: Keys, announce: Callable[[str], None]
) -> None:
    """Serve a bundle until told to stop, as the arguments of the command say.

    Raises PipelineError for a bundle that cannot be served or an address that cannot be had, and
    KeyboardInterrupt after Ctrl-C.
    """
    # What is wrong at first sight is told before anything listens.
    serves = str(about(folder).get("serves"))
    logs.configure(args.log_format)
    if args.log_format == "json":
        announce = _announce
    access = Access(
        keys=keys,
        hosts=Hosts(args.host, args.allowed_host),
        origins=tuple(args.allow_origin),
        open_metrics=not args.metrics_key,
    )
    app = closed(access, ConnectionLimits(connections=args.max_connections))
    limits = RequestLimits.of(serves, _changes(args))
    listen(
        app,
        args.host,
        args.port,
        announce,
        load=lambda: open_bundle(app, folder, limits),
        drain_seconds=args.drain_seconds,
        hang_up=keys.reload if args.api_key_file else None,
    )


def _announce(text: str) -> None:
    logs.event(log, text)


def _changes(args: argparse.Namespace) -> dict:
    """Return the limits that were typed."""
    return {
        "body_bytes": args.max_body_bytes,
        "new_tokens": args.max_new_tokens,
        "context_tokens": args.max_context,
        "waiting": args.max_waiting,
        "seconds": args.max_seconds,
        "image_hosts": tuple(args.allow_image_hosts),
    }
