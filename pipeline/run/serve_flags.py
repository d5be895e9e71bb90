"""What can be typed behind `serve`: which bundle, where it listens, who may ask, and how much."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import get_args

from pydantic.fields import FieldInfo

from ..config.serving import ServeConfig
from .typed_numbers import port, positive, positive_or_auto, seconds, size

KEY = "MOLEFORGE_API_KEY"
# The numbers of the section `serve`, each with how it is typed and in which unit.
LIMITS: dict[str, tuple[Callable[[str], float | str], str]] = {
    "max_batch": (positive, "N"),
    "max_prefill_tokens": (positive_or_auto, "N"),
    "max_cache": (size, "SIZE"),
    "max_waiting": (positive, "N"),
    "max_new_tokens": (positive, "N"),
    "max_context": (positive, "N"),
    "max_seconds": (seconds, "S"),
    "max_body_bytes": (positive, "N"),
    "max_connections": (positive, "N"),
}
EPILOG = f"""\
Keys come from ${KEY} (several: one a line) and --api-key-file; with any, /v1 wants one as
a bearer token. The file is read again when it has changed, and at SIGHUP.

SIGTERM and Ctrl-C let what was asked come to its end, for --drain-seconds.

  python -m pipeline serve --config mine.yaml
  python -m pipeline serve --bundle DIR --host 0.0.0.0 --api-key-file keys.txt \\
      --allowed-host llm.example.org --log-format json"""


def add_arguments(sub: argparse.ArgumentParser) -> None:
    """Give the command `serve` its arguments."""
    which = sub.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="serve the bundle that deploy made of this YAML file",
    )
    which.add_argument(
        "--bundle",
        type=Path,
        metavar="DIR|RUN",
        help="serve this folder, or what the latest.json in it names; or the bundle of a run, by "
        "its name",
    )
    sub.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="NAME",
        help="address to listen on (default 127.0.0.1)",
    )
    sub.add_argument(
        "--port", type=port, default=8000, metavar="N", help="port; 0: any free one (default 8000)"
    )
    _add_access(sub.add_argument_group("who may ask"))
    _add_limits(sub.add_argument_group("how much"))
    _add_operation(sub.add_argument_group("operation"))
    sub.epilog = EPILOG
    sub.formatter_class = argparse.RawDescriptionHelpFormatter


def _add_access(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--public",
        action="store_true",
        help="serve other machines without a key, which else is refused",
    )
    group.add_argument(
        "--api-key-file", type=Path, metavar="FILE", help="keys, one a line; # begins a comment"
    )
    group.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="name that requests may be sent to, beside what --host is; *.example.org: any below "
        "it, *: any (may be repeated)",
    )
    group.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="pages of this origin may ask, https://example.org for one (may be repeated; default: "
        "pages of this server alone)",
    )
    group.add_argument(
        "--allow-image-hosts",
        nargs="+",
        action="extend",
        default=[],
        metavar="HOST",
        help="fetch pictures that requests name at these hosts; *: any of the open network, and "
        "never one of a private network (default: pictures come inside requests alone)",
    )
    group.add_argument(
        "--metrics-key",
        action="store_true",
        help="/metrics wants a key too; else it is open, as vLLM's is",
    )


def add_dtype(to: "argparse._ActionsContainer") -> None:
    """Add the flag of what products run in, to every command that opens a bundle to be asked."""
    # without a default: what is not typed is as the configuration's section `serve` has it
    dtype = ServeConfig.model_fields["dtype"]
    choices = get_args(dtype.annotation)
    to.add_argument("--dtype", choices=choices, help=_told(dtype, dtype.default))


def _add_limits(group: "argparse._ArgumentGroup") -> None:
    add_dtype(group)
    for name, (kind, unit) in LIMITS.items():
        field = ServeConfig.model_fields[name]
        default = None if field.default is None else _shown(field.default)
        flag = f"--{name.replace('_', '-')}"
        group.add_argument(flag, type=kind, metavar=unit, help=_told(field, default))


def _told(field: FieldInfo, default: str | None) -> str:
    """Return the help of a setting's flag."""
    told = str(field.description)
    shown = "" if default is None else f" (default {default})"
    return f"{told[:1].lower()}{told[1:]}{shown}"


def _shown(default: float | str) -> str:
    if isinstance(default, str):
        return default
    gibibytes = default / (1 << 30)
    return f"{gibibytes:g}GiB" if gibibytes >= 1 else f"{default:g}"


def _add_operation(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--log-format",
        choices=("plain", "json"),
        default="plain",
        help="json: an object a line (default plain)",
    )
    group.add_argument(
        "--drain-seconds",
        type=seconds,
        default=25.0,
        metavar="S",
        help="for which SIGTERM and Ctrl-C let answers come to their end (default 25)",
    )
