"""Runs on rented machines, without knowing who rents them out: modal_app.py wires this to Modal.

The client's side, where a command is typed, reads and checks it before anything starts, and plans
it with its cost; the other side does jobs in containers and says of each how it went.
"""

# modal_app.py takes all of it from here, so that it names no module of this folder.
from .client import (
    DEFAULT,
    EXPERIMENTS,
    announced,
    check,
    deploys,
    explain,
    look_at_models,
    mirror,
    overrides,
    settled,
    show_report,
    show_results,
    typed,
)
from .containers import JobResult, ModalEdge, draw_anew, not_done, orchestrate, work
from .endpoint import SERVED, deployed, entered, pinned, serve_next, served
from .estimate import (
    estimate,
    refuse_above,
    refuse_what_cannot_start,
    refuse_without_inputs,
    show_estimate,
)
from .experiments import FarStore, FarSweep, conducted, planned
from .inputs import packages
from .looks import as_recorded, looked_at
from .prices import Prices, most_gpus
from .roots import REMOVAL_S, RUN_S, begun, since, tend
from .watching import watch

__all__ = [
    "DEFAULT",
    "EXPERIMENTS",
    "REMOVAL_S",
    "RUN_S",
    "SERVED",
    "FarStore",
    "FarSweep",
    "JobResult",
    "ModalEdge",
    "Prices",
    "announced",
    "as_recorded",
    "begun",
    "check",
    "conducted",
    "deployed",
    "deploys",
    "draw_anew",
    "entered",
    "estimate",
    "explain",
    "look_at_models",
    "looked_at",
    "mirror",
    "most_gpus",
    "not_done",
    "orchestrate",
    "overrides",
    "packages",
    "pinned",
    "planned",
    "refuse_above",
    "refuse_what_cannot_start",
    "refuse_without_inputs",
    "serve_next",
    "served",
    "settled",
    "show_estimate",
    "show_report",
    "show_results",
    "since",
    "tend",
    "typed",
    "watch",
    "work",
]
