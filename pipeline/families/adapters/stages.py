"""The stages of a run of adapters: one row each, in the order of a run.

Invariant: what is said of one expert enters the addresses of its own data and adapter, the routing
set, the router and the report, and no other expert's.
"""

from ...config.stage import Stage, table

_TRAINED = ("family", "seed", "dtype")  # what every training depends on
SEARCHES = {"train_experts": "lr_experts", "train_router": "lr_router"}  # of a training's rate
_UP_TO_ROUTER = ("preprocess", "train_shared", "train_experts", "routing", "train_router")


STAGES = table(
    # Tasks need nothing of each other, so each is a job of its own
    Stage(
        "preprocess",
        "read each task, make its rows",
        "family.prepare",
        check="family.look_at_task",
        items="tasks",
        reads=("family", "seed"),
        reads_also="task_reads",
        secrets=("hub", "storage"),
    ),
    # Before hours of training: what the routing set may find missing is found now
    Stage(
        "routing",
        "make the routing set: requests from the tasks' own rows, with the expert each belongs to",
        "family.route_data",
        check="family.look_at_routing",
        needs=("preprocess",),
        reads=("family", "dataset"),
        reads_also="routing_reads",
        secrets=("hub", "storage"),
    ),
    Stage(
        "train_shared",
        "pin or build the base that every expert stands on",
        "family.shared",
        kind="training",
        reads=("family",),
        reads_also="base_reads",
        settings="loras.base",
        secrets=("wandb", "hub"),
        after=("preprocess",),
    ),
    # Each on its own rows: an expert's rate moves with what is said of it, as its adapter does
    Stage(
        "lr_experts",
        "find the learning rate of each expert on its own task, where it is auto",
        "family.lr_expert",
        kind="training",
        items="searches_experts",
        needs=("preprocess", "train_shared"),
        needs_own=("preprocess",),
        reads=(*_TRAINED, "lr_search"),
        reads_also="expert_reads",
        settings="loras.experts.{item}.overrides",
        version=2,  # a rate that keeps eight tenths of the best gain is as good
        machine="train_experts",
        secrets=("wandb", "hub"),
    ),
    Stage(
        "train_experts",
        "train each expert's adapter on its own task over the frozen base",
        "family.expert",
        kind="training",
        check="family.look_at_adapter",
        items="experts",
        needs=("preprocess", "train_shared", "lr_experts"),
        # Its own rows alone: what is said of another expert's data leaves this adapter as it is
        needs_own=("preprocess", "lr_experts"),
        reads=_TRAINED,
        reads_also="expert_reads",
        settings="loras.experts.{item}.overrides",
        # An imported one comes from where packages lie
        secrets=("wandb", "hub", "storage"),
        after=("lr_experts",),
    ),
    Stage(
        "lr_router",
        "find the learning rate of the router's adapter, where it is auto",
        "family.lr_router",
        kind="training",
        when="searches_router",
        needs=("train_shared", "routing"),
        reads=(*_TRAINED, "lr_search"),
        reads_also="router_reads",
        settings="loras.router",
        version=2,  # a rate that keeps eight tenths of the best gain is as good
        machine="train_router",
        secrets=("wandb", "hub"),
    ),
    Stage(
        "train_router",
        "join the experts: train the router's adapter on the routing set",
        "family.router",
        kind="training",
        needs=("train_shared", "routing", "lr_router"),
        reads=_TRAINED,
        reads_also="router_reads",
        settings="loras.router",
        secrets=("wandb", "hub"),
        after=("lr_router",),
    ),
    Stage(
        "evaluate",
        "measure the stack, write report.json and report.html, print the tables",
        "family.measure",
        kind="report",
        needs=(*_UP_TO_ROUTER, *SEARCHES.values()),
        # The name too, as the report shows it
        reads=("family", "name", "evaluate"),
        reads_also="report_reads",
        version=2,  # the report is of a schema
        secrets=("hub",),
    ),
    Stage(
        "deploy",
        "write the stack as a bundle: a folder that stock tools load; upload it where "
        "deploy.upload says",
        "family.bundle",
        kind="bundle",
        needs=(*_UP_TO_ROUTER, "evaluate"),
        reads=("family", "name"),
        reads_also="bundle_reads",
        in_run=False,
        secrets=("hub", "storage"),
    ),
)
