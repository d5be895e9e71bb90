"""What a command comes to before it is handed over: planned where it was typed, or by a container
where that has no torch, with which sizes are worked out.
"""

import io
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console

from ..config.run import RunConfig
from ..errors import PipelineError
from ..families.load import parse
from ..report.narrow import plain_console
from ..run.advice import sentence
from .baselines import with_baselines
from .client import look_at_models, mirror
from .containers import edge_of
from .estimate import (
    Expected,
    estimate,
    expected,
    refuse_above,
    refuse_what_cannot_start,
    refuse_without_inputs,
)
from .far import WIDE, FarStore, on_volume
from .looks import as_recorded
from .meters import process_age_s
from .plan_table import show_estimate
from .prices import Prices

PLAN_S = 1_800  # a container that plans may live


@dataclass(frozen=True)
class Wish:
    """What was typed: the run, its stages, and how they are to be done."""

    cfg: RunConfig
    stages: tuple[str, ...]
    sequential: bool = False
    frozen: bool = False
    expected: Expected | None = None  # None: not planned yet


@dataclass(frozen=True)
class FarPlan:
    """A plan that a container made, small enough to travel."""

    printed: str
    wrong: str  # why nothing can be started, "" where it can
    raw: dict  # the settings that the run has come to
    stages: tuple[str, ...]
    expected: Expected | None


def plans_here() -> bool:
    """Whether this machine can plan, without importing what that takes."""
    return find_spec("torch") is not None


def not_paid_for() -> float:
    """Return how long the planning machine is paid for where that is the laptop."""
    return 0.0


def planned_run(
    wish: Wish,
    prices: Prices,
    far: FarStore,
    console: Console,
    planning_s: Callable[[], float] = not_paid_for,
) -> Wish:
    """Show what a command will do and what it costs; return what it comes to, with what its data
    was when it was looked at last, and with what modal.missing_baselines makes of its stages.
    `planning_s` says how long the container lives that plans, where one does.

    Raises PipelineError for what keeps it from starting.
    """
    cfg, notes = as_recorded(wish.cfg, far.names, far.read, frozen=wish.frozen)
    near = mirror(cfg, far.folder, far.names, far.read)
    settled, stages, more = with_baselines(cfg, wish.stages, near)
    if settled != cfg:
        # Its report is another one, which may be there
        cfg, near = settled, mirror(settled, far.folder, far.names, far.read)
    notes += [*more, *look_at_models(cfg, far.mount, far.folder, far.read)]
    for note in notes:
        console.print(note, highlight=False, soft_wrap=True)
    lines = estimate(cfg, stages, near, prices)
    took_s = planning_s()
    show_estimate(cfg, lines, prices, wish.sequential, console, took_s)
    refuse_what_cannot_start(cfg, lines, far.mount, far.names)
    refuse_without_inputs(cfg, stages, near)
    refuse_above(cfg, lines, prices, wish.sequential, took_s)
    costs = expected(cfg, lines, prices, wish.sequential, planning_s())
    return Wish(cfg, stages, wish.sequential, wish.frozen, costs)


def planned_there(
    raw: dict,
    stages: tuple[str, ...],
    sequential: bool,
    frozen: bool,
    prices: Prices,
    root: Path,
    planning_s: Callable[[], float] = process_age_s,
) -> FarPlan:
    """Plan in a container that has the volume at root and is paid for meanwhile."""
    wish = Wish(parse(raw), stages, sequential, frozen)
    printed = io.StringIO()
    console = plain_console(file=printed, width=WIDE)
    wrong = ""
    try:
        with tempfile.TemporaryDirectory() as folder:
            far = on_volume(root, Path(folder))
            wish = planned_run(wish, prices, far, console, planning_s)
    except PipelineError as error:
        wrong = sentence(error, edge_of(wish.cfg, root))
    raw = wish.cfg.model_dump(mode="json")
    return FarPlan(printed.getvalue(), wrong, raw, wish.stages, wish.expected)
