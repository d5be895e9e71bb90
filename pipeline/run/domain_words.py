"""What is typed of a domain that comes, goes or is replaced, as a wish."""

import argparse
import re
from typing import Any, Literal

from ..config.base import merge
from ..config.domain_wish import DomainWish, HubText
from ..config.files import assigned
from ..errors import ConfigError

ABOUT = {
    "add": "add a domain (a task, of lora_vlm) to a configuration and make what is new",
    "remove": "take a domain and its expert out of a configuration, and refit the router",
    "replace": "give a domain other text, rows or another finished expert, and make what changes",
}
_HUB = re.compile(r"([^@\s]+)@([^@:\s]+)(?::(\S+))?")


def add_arguments(sub: argparse.ArgumentParser, command: str) -> None:
    """Give the parser of one of these commands what they take beside --config and --store."""
    sub.add_argument("domain", metavar="DOMAIN", help="its name, or its label in the data")
    if command != "remove":
        source = sub.add_mutually_exclusive_group()
        source.add_argument(
            "--paths",
            nargs="+",
            default=[],
            metavar="GLOB",
            help="files with its text, globs or URLs; of lora_vlm the file or folder of its rows",
        )
        source.add_argument(
            "--hub", type=_hub, metavar="DATASET@REVISION[:SUBSET]", help="a data set on the Hub"
        )
        sub.add_argument(
            "--expert",
            metavar="PATH|URL",
            help="a finished expert: its package, or an adapter's folder as PEFT saved it",
        )
        sub.add_argument("--task", metavar="KIND", help="kind of task, for reports (lora_vlm)")
        sub.add_argument(
            "--option",
            action="append",
            default=[],
            metavar="a.b=value",
            help="another setting of the new entry (format=csv; metric=cer), may be repeated",
        )
    sub.add_argument("--yes", action="store_true", help="do not ask, as without a terminal")
    sub.add_argument(
        "--keep-former", action="store_true", help="keep each file as it was, as FILE.former"
    )
    sub.add_argument(
        "--modal", action="store_true", help="change FILE alone, and tell what makes it on Modal"
    )


def _hub(text: str) -> HubText:
    found = _HUB.fullmatch(text)
    if found is None:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not DATASET@REVISION or DATASET@REVISION:SUBSET"
        )
    return HubText(*found.groups())


def wish_of(args: argparse.Namespace) -> DomainWish:
    """Return what was typed as a wish. Raises ConfigError."""
    if args.override:
        raise ConfigError(
            f"{args.command} changes {args.config}, and --override is no part of that; write "
            f"{args.override[0].partition('=')[0]} into it first"
        )
    what: Literal["add", "remove", "replace"] = args.command
    if what == "remove":
        return DomainWish(what, args.domain)
    options: dict[str, Any] = {}
    for item in args.option:
        options = merge(options, assigned(item, "--option"))
    if args.task is not None:
        options["task"] = args.task
    return DomainWish(what, args.domain, tuple(args.paths), args.hub, args.expert, options)
