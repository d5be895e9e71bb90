"""Runs on rented machines, without knowing who rents them out: modal_app.py wires this to Modal.

The client's side, where a command is typed, reads and checks it before anything starts, and plans
it with its cost; the other side does jobs in containers and says of each how it went.
"""

# modal_app.py takes all of it from here, so that it names no module of this folder.
from .baselines import with_baselines
from .calls import ATTEMPTS, Call, by_calls, takes
from .client import check, look_at_models, mirror, settled, show_report, show_results
from .command import (
    announced,
    deploys,
    explain,
    flags_of,
    named,
    refuse_client,
    typed,
)
from .commands import Commands, named_as
from .containers import LONGEST_START_S, IsLost, JobResult, ModalEdge, work
from .endpoint import SERVED, deployed, placed, serve_next, served
from .estimate import (
    CONDUCTOR,
    Expected,
    estimate,
    expected,
    refuse_above,
    refuse_what_cannot_start,
    refuse_without_inputs,
)
from .experiments import (
    FarSweep,
    FarSweepPlan,
    conducted,
    planned_sweep,
    planned_sweep_there,
    pricing,
)
from .far import Far, FarError, FarStore
from .given import DEFAULT, Given, overrides
from .handing_out import FarJob, not_done, orchestrate
from .leases import Leases, is_alive
from .ledger import Ledger, show_costs
from .looks import as_recorded, looked_at, looked_at_once
from .meters import at_work
from .next_step import Typed, after_stages, deploying
from .plan_table import show_estimate
from .planning import (
    PLAN_S,
    FarPlan,
    Wish,
    not_paid_for,
    planned_run,
    planned_there,
    plans_here,
)
from .prices import Prices, locked_cuda, most_gpus
from .reevaluation import NOTE as REEVALUATED
from .reevaluation import (
    due,
    note_bundle,
    note_reevaluation,
    once_more,
    packages_again,
    priced_again,
    reevaluated_as,
    tell_change,
)
from .roots import REMOVAL_S, begun, since
from .running_costs import deployment_told, endpoint_told
from .serving import application
from .tags import tags
from .tending import Tended, tend
from .wiring import BUCKET, SECRETS, Wiring

__all__ = [
    "ATTEMPTS",
    "BUCKET",
    "CONDUCTOR",
    "DEFAULT",
    "LONGEST_START_S",
    "PLAN_S",
    "REEVALUATED",
    "REMOVAL_S",
    "SECRETS",
    "SERVED",
    "Call",
    "Commands",
    "Expected",
    "Far",
    "FarError",
    "FarJob",
    "FarPlan",
    "FarStore",
    "FarSweep",
    "FarSweepPlan",
    "Given",
    "IsLost",
    "JobResult",
    "Leases",
    "Ledger",
    "ModalEdge",
    "Prices",
    "Tended",
    "Typed",
    "Wiring",
    "Wish",
    "after_stages",
    "announced",
    "application",
    "as_recorded",
    "at_work",
    "begun",
    "by_calls",
    "check",
    "conducted",
    "deployed",
    "deploying",
    "deployment_told",
    "deploys",
    "due",
    "endpoint_told",
    "estimate",
    "expected",
    "explain",
    "flags_of",
    "is_alive",
    "locked_cuda",
    "look_at_models",
    "looked_at",
    "looked_at_once",
    "mirror",
    "most_gpus",
    "named",
    "named_as",
    "not_done",
    "not_paid_for",
    "note_bundle",
    "note_reevaluation",
    "once_more",
    "orchestrate",
    "overrides",
    "packages_again",
    "placed",
    "planned_run",
    "planned_sweep",
    "planned_sweep_there",
    "planned_there",
    "plans_here",
    "priced_again",
    "pricing",
    "reevaluated_as",
    "refuse_above",
    "refuse_client",
    "refuse_what_cannot_start",
    "refuse_without_inputs",
    "serve_next",
    "served",
    "settled",
    "show_costs",
    "show_estimate",
    "show_report",
    "show_results",
    "since",
    "tags",
    "takes",
    "tell_change",
    "tend",
    "typed",
    "with_baselines",
    "work",
]
