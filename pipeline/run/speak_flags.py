"""What can be typed to have a bundle speak: a prompt, who reads it, how texts go on."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import DataError
from .serve_flags import add_dtype

ABOUT = {
    "generate": "go on with a text, or answer a question, each token in its expert's colour",
    "chat": "talk with a bundle, several turns; /help there",
}
# Of each, what a person has to know before trying it
MORE = {
    "generate": """\
On a terminal text comes as it is drawn, with a legend at its end; elsewhere, or
with NO_COLOR set, it is plain text. Names are those of the experts, base and
dense (where the bundle holds them) and stack: whom the router chooses.

  python -m pipeline generate --config mine.yaml "The reef"
  python -m pipeline generate "The reef" --compare stack law base --config mine.yaml
  git log -5 | python -m pipeline generate --bundle bundles/mine --json - > tokens.jsonl
  python -m pipeline generate --config vlm.yaml --image photo.jpg "How many dots?\"""",
    "chat": """\
/reset forgets all turns, /expert NAME says who answers from now on, /image FILE
shows a picture with the next question, /quit or Ctrl-D leaves. Ctrl-C ends an
answer, and where there is none the chat. What is typed is kept in no file.

  python -m pipeline chat --config mine.yaml --temperature 0.7""",
}
NOT_TYPED: dict[str, Any] = {"default": argparse.SUPPRESS}


def add_generate(sub: argparse.ArgumentParser) -> None:
    """Give the command `generate` its arguments."""
    sub.add_argument(
        "prompt",
        metavar="PROMPT",
        help="the text; -: standard input, in UTF-8, without its last line's end",
    )
    _add_bundle(sub)
    who = sub.add_mutually_exclusive_group()
    _add_expert(who)
    who.add_argument(
        "--compare",
        nargs="+",
        metavar="NAME",
        help="several readers, one after another with one seed; behind the prompt",
    )
    told = _add_told(sub)
    told.add_argument(
        "--json", action="store_true", help="a line of JSON for each token, and one for the end"
    )
    _add_sampling(sub)


def add_chat(sub: argparse.ArgumentParser) -> None:
    """Give the command `chat` its arguments."""
    _add_bundle(sub)
    _add_expert(sub)
    _add_told(sub)
    _add_sampling(sub)


def prompt(args: argparse.Namespace) -> str:
    """Return the text that was typed, or that comes in. Raises DataError for what is no text."""
    if args.prompt != "-":
        text: str = args.prompt
        try:
            # What was typed in another encoding than the terminal's
            text.encode()
        except UnicodeEncodeError:
            raise DataError("the prompt is no text in this terminal's encoding") from None
        return text
    try:
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"standard input is no UTF-8: {error}; convert it") from None


def readers(args: argparse.Namespace) -> list[str]:
    """Return the names of who is to read, none where nobody was named."""
    if getattr(args, "compare", None):
        return list(args.compare)
    return [args.expert] if args.expert else []


def sampling(args: argparse.Namespace) -> dict[str, Any]:
    """Return what was typed of how texts go on, under the names that requests have for it."""
    out = {name: value for name, value in vars(args).items() if name in _SAMPLING}
    if "stop" in out:
        out["stop"] = tuple(out["stop"])
    if "logit_bias" in out:
        out["logit_bias"] = dict(out["logit_bias"])
    return out


def _add_bundle(sub: argparse.ArgumentParser) -> None:
    which = sub.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--config", type=Path, metavar="FILE", help="the bundle that deploy made of this YAML file"
    )
    which.add_argument(
        "--bundle", type=Path, metavar="DIR|RUN", help="this folder, or the bundle of that run"
    )
    add_dtype(sub)


def _add_expert(to: "argparse._ActionsContainer") -> None:
    to.add_argument("--expert", metavar="NAME", help="who reads: an expert, base or dense")


def _add_told(sub: argparse.ArgumentParser) -> "argparse._MutuallyExclusiveGroup":
    sub.add_argument(
        "--image",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="a picture that the question is about, may be repeated",
    )
    told = sub.add_mutually_exclusive_group()
    told.add_argument(
        "--experts", action="store_true", help="tell who spoke as tables, behind the text"
    )
    return told


def _add_sampling(sub: argparse.ArgumentParser) -> None:
    group = sub.add_argument_group("how the text goes on, in the words of the API")
    for name, (kind, metavar, text) in _SAMPLING.items():
        flag = f"--{name.replace('_', '-')}"
        action = "append" if name in ("stop", "logit_bias") else "store"
        group.add_argument(flag, type=kind, metavar=metavar, help=text, action=action, **NOT_TYPED)


def _between(low: float, high: float) -> Callable[[str], float]:
    """Return what reads a number from low to high."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        # not `value < low`, which NaN would pass
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is no number from {low:g} to {high:g}")
        return value

    return read


def _whole(low: int, high: int) -> Callable[[str], int]:
    """Return what reads a whole number from low to high."""

    def read(text: str) -> int:
        digits = text.removeprefix("-")
        if not (digits.isascii() and digits.isdecimal() and low <= int(text) <= high):
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {low} to {high}")
        return int(text)

    return read


def _share(text: str) -> float:
    value = _between(0, 1)(text)
    if not value:
        raise argparse.ArgumentTypeError("0 leaves no token to draw")
    return value


def _stop(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("an empty text ends every text")
    return text


def _bias(text: str) -> tuple[int, float]:
    token, _, value = text.partition("=")
    return _whole(0, 2**31 - 1)(token), _between(-100, 100)(value)


# By the name that requests have for it: what reads it, what stands for its value, what it does
_SAMPLING: dict[str, tuple[Callable[[str], Any], str, str]] = {
    "max_tokens": (_whole(1, 2**31 - 1), "N", "tokens at most (default: 256; of tasks: their own)"),
    "temperature": (_between(0, 2), "T", "0: the likeliest each time (default: 1; of tasks: 0)"),
    "top_p": (_share, "P", "share of the probability that tokens are drawn from"),
    "top_k": (_whole(0, 2**31 - 1), "K", "how many of the likeliest are drawn from; 0: all"),
    "min_p": (_between(0, 1), "P", "share of the likeliest's probability that a token needs"),
    "seed": (_whole(-(2**63), 2**63 - 1), "N", "same seed and prompt, same text"),
    "stop": (_stop, "TEXT", "ends the text and is no part of it, may be repeated"),
    "presence_penalty": (_between(-2, 2), "X", "taken once from the logit of a drawn token"),
    "frequency_penalty": (_between(-2, 2), "X", "taken as often as the token was drawn"),
    "logit_bias": (_bias, "ID=X", "added to a token's logit, may be repeated"),
}
# What gives each command its arguments
ADD = {"generate": add_generate, "chat": add_chat}
