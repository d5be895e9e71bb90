"""What to type next on Modal: the line that commands end with."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..config.machines import ModalConfig
from ..config.run import RunConfig
from ..credentials import masked
from ..run.stages import RUN
from .containers import UNNAMED
from .endpoint import entered
from .given import Given

APP_FILE = "modal_app.py"


@dataclass(frozen=True)
class Typed:
    """A command of `modal` by its words, and how another one is typed in its place."""

    argv: tuple[str, ...]

    def command(self, name: str, *words: str) -> str:
        """Return another command of the same app: where it is, and Modal's own flags, stay."""
        before: tuple[str, ...] = ("modal", "run")
        file = APP_FILE
        for at, word in enumerate(self.argv):
            path, colons, _ = word.partition("::")
            if colons:
                before, file = ("modal", *self.argv[1:at]), path
                break
        return shlex.join([*before, f"{file}::{name}", *words])

    def again(self, given: Given) -> str:
        """Return the same command with the flags that stand for settings written out, without the
        credentials in it. Raises ConfigError."""
        if given == replace(given, input="", checkpoint="", bucket="", smoke=False):
            return as_typed(self.argv)
        others = []
        words = list(self.argv[1:])
        while words:
            word = words.pop(0)
            flag, equals, _ = word.partition("=")
            if flag in _WRITTEN_OUT:
                # Its value is a word of its own
                words = words if equals else words[1:]
                continue
            others.append(word)
        return masked(shlex.join(["modal", *others, *given.words()]))


_WRITTEN_OUT = ("--config", "--override", "--input", "--checkpoint", "--bucket")


def as_typed(argv: Sequence[str]) -> str:
    """Return a command of `modal` as a person types it again, without the credentials in it."""
    return masked(f"modal {shlex.join(argv[1:])}")


def after_stages(
    typed: Typed, cfg: RunConfig, stages: Sequence[str], given: Given, environ: Mapping[str, str]
) -> str:
    """Return what follows the stages of a command: the next one that its run has, the bundle, or
    what serves it."""
    if "deploy" in stages:
        return deploying(cfg.modal, environ)
    last = max((RUN.index(name) for name in stages if name in RUN), default=-1)
    for name in RUN[last + 1 :]:
        if cfg.items(name):
            return typed.command(name, *given.words())
    if not entered(cfg.modal):
        given = replace(given, override=f"{given.override} modal.endpoint_secret=NAME".strip())
    return typed.command("deploy", *given.words())


def deploying(modal: ModalConfig, environ: Mapping[str, str]) -> str:
    """Return the command that deploys an endpoint of this section; it reads no configuration, so
    variables tell it the names of app and volume where the environment has others."""
    words = []
    for field in ("app", "volume"):
        variable = f"MOLEFORGE_{field.upper()}"
        name = getattr(modal, field) or UNNAMED
        if name != (environ.get(variable) or UNNAMED):
            words.append(f"{variable}={name}")
    return " ".join([*words, "modal deploy modal_app.py"])
