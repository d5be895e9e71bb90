"""Runs on rented machines, without knowing who rents them out: modal_app.py wires this to Modal.

The client's side, where a command is typed, reads and checks it before anything starts, and plans
it with its cost; the other side does jobs in containers and says of each how it went.
"""

# modal_app.py takes all of it from here, so that it names no module of this folder.
from .baselines import with_baselines
from .calls import ATTEMPTS, Call, by_calls
from .client import check, look_at_models, mirror, settled, show_report, show_results
from .command import (
    DEFAULT,
    EXPERIMENTS,
    afterwards,
    announced,
    as_typed,
    deploying,
    deploys,
    explain,
    flags_of,
    named,
    overrides,
    refuse_client,
    shipped,
    typed,
)
from .containers import JobResult, ModalEdge, draw_anew, not_done, orchestrate, work
from .endpoint import SERVED, WAYS, deployed, entered, placed, serve_next, served
from .estimate import (
    CONDUCTOR,
    Expected,
    estimate,
    expected,
    refuse_above,
    refuse_what_cannot_start,
    refuse_without_inputs,
)
from .experiments import FarStore, FarSweep, conducted, planned
from .leases import Leases
from .ledger import Ledger, show_costs
from .looks import as_recorded, looked_at
from .meters import at_work
from .plan_table import show_estimate
from .planning import (
    PLAN_S,
    FarPlan,
    Wish,
    planned_run,
    planned_there,
    plans_here,
    refuse_planning_here,
)
from .prices import Prices, most_gpus
from .roots import REMOVAL_S, begun, since, tend
from .standing import endpoint_told, storage_told
from .tags import tags
from .watching import watch
from .wiring import SECRETS, Wiring

__all__ = [
    "ATTEMPTS",
    "CONDUCTOR",
    "DEFAULT",
    "EXPERIMENTS",
    "PLAN_S",
    "REMOVAL_S",
    "SECRETS",
    "SERVED",
    "WAYS",
    "Call",
    "Expected",
    "FarPlan",
    "FarStore",
    "FarSweep",
    "JobResult",
    "Leases",
    "Ledger",
    "ModalEdge",
    "Prices",
    "Wiring",
    "Wish",
    "afterwards",
    "announced",
    "as_recorded",
    "as_typed",
    "at_work",
    "begun",
    "by_calls",
    "check",
    "conducted",
    "deployed",
    "deploying",
    "deploys",
    "draw_anew",
    "endpoint_told",
    "entered",
    "estimate",
    "expected",
    "explain",
    "flags_of",
    "look_at_models",
    "looked_at",
    "mirror",
    "most_gpus",
    "named",
    "not_done",
    "orchestrate",
    "overrides",
    "placed",
    "planned",
    "planned_run",
    "planned_there",
    "plans_here",
    "refuse_above",
    "refuse_client",
    "refuse_planning_here",
    "refuse_what_cannot_start",
    "refuse_without_inputs",
    "serve_next",
    "served",
    "settled",
    "shipped",
    "show_costs",
    "show_estimate",
    "show_report",
    "show_results",
    "since",
    "storage_told",
    "tags",
    "tend",
    "typed",
    "watch",
    "with_baselines",
    "work",
]
