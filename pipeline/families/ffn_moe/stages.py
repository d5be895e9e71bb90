"""The stages of an ffn_moe run: one row each, in the order of a run."""

from ...config.base import is_hashed
from ...config.fit import FitConfig
from ...config.stage import Stage, table

_TRAINED = ("family", "seed", "dtype")  # what every training depends on
_DURATION = ("steps", "epochs", "tokens", "batch_sequences")
_ROUTER_TOKENS = tuple(f"router.{key}" for key in _DURATION)
# Of an expert's settings those that every training has: a baseline is no expert in anything else
_FITTED = tuple(key for key, field in FitConfig.model_fields.items() if is_hashed(field))
_AS_EXPERTS = (*(f"expert.{key}" for key in _FITTED), "dense.lr")
# Those that start from zero train with the trunk's, for as many tokens as trunk and experts had
_FROM_ZERO = (*(f"expert.{key}" for key in _DURATION), *_ROUTER_TOKENS, "trunk")
# What a dense baseline's budget, size and training depend on beside the domains
BASELINE_READS: dict[str | None, tuple[str, ...]] = {
    "path": _AS_EXPERTS,
    "total": (*_AS_EXPERTS, *_ROUTER_TOKENS),
    "ffn": (*_AS_EXPERTS, *_ROUTER_TOKENS),
    "scratch": _FROM_ZERO,
    "wide": (*_FROM_ZERO, "router.top_k"),
}


# What a joint model's size and training depend on beside the domains
_SIZES = (
    *("layers", "d_model", "heads", "kv_heads", "head_dim", "d_ff"),
    *("context_tokens", "rope_theta", "tie_embeddings"),
)
JOINT_READS = (
    *(f"joint.{key}" for key in _FITTED),
    *("joint.mixture", "joint.dropout", "joint.label_smoothing"),
    *(f"trunk.{key}" for key in _SIZES),
)
# Of a mixture alone
MIXTURE_READS = tuple(
    f"joint.{key}"
    for key in ("layers", "experts", "top_k", "aux_weight", "capacity_factor", "temperature")
)

# Dense baselines that do not continue the trunk
FROM_ZERO = ("wide", "scratch")
# Of a search, by the stage whose rate it finds
SEARCHES = {
    "train_shared": "lr_shared",
    "train_experts": "lr_experts",
    "train_router": "lr_router",
    "train_dense": "lr_dense",
    "train_joint": "lr_joint",
}
# Models that a job makes whole, by what they are called before their own name
MODEL_STAGES = {"joint": "train_joint", "dense": "train_dense"}
STACK = "stack"
STACK_STAGES = ("train_shared", "train_experts", "train_router")
# A baseline's length and rate are what it is searched without
_AS_BASELINES = tuple(f"expert.{key}" for key in _FITTED if key != "lr")


def _dense_settings(item: str | None) -> str:
    return "trunk" if item in FROM_ZERO else "expert"


STAGES = table(
    Stage(
        "tokenizer",
        "make the tokenizer, and the domains where documents have no labels",
        "family.tokenizer",
        check="family.look_at_documents",
        reads=("family",),
        reads_also="tokenizer_reads",
        machine="preprocess",
        secrets=("hub", "storage"),
    ),
    # A domain's tokens know of no other domain, so that one can be added and another taken away
    Stage(
        "preprocess",
        "read the documents of each domain and make its token shards",
        "family.prepare",
        check="family.look_at_documents",
        items="partition.names",
        needs=("tokenizer",),
        reads=("family",),
        reads_also="shards_read",
        secrets=("hub", "storage"),
        after=("tokenizer",),
    ),
    # Searches have no jobs where a rate is a number, so that addresses of such runs know none
    Stage(
        "lr_shared",
        "find the trunk's learning rate, where it is auto",
        "family.lr_shared",
        kind="training",
        when="searches_shared",
        needs=("tokenizer", "preprocess"),
        reads=(*_TRAINED, "trunk", "lr_search"),
        settings="trunk",
        version=2,  # a rate that keeps eight tenths of the best gain is as good
        machine="train_shared",
        secrets=("wandb", "hub"),
        after=("tokenizer", "preprocess"),
    ),
    Stage(
        "train_shared",
        "train the shared trunk with its temporary feed-forward network, the dummy",
        "family.shared",
        kind="training",
        needs=("tokenizer", "preprocess", "lr_shared"),
        reads=(*_TRAINED, "trunk"),
        settings="trunk",
        secrets=("wandb", "hub"),
        after=("tokenizer", "preprocess", "lr_shared"),
    ),
    # On the trunk's domains mixed: which get an expert is no part of it, so that one can be added
    Stage(
        "lr_experts",
        "find the learning rate of all experts on the trunk's domains mixed, where it is auto",
        "family.lr_experts",
        kind="training",
        when="searches_experts",
        needs=("preprocess", "train_shared"),
        reads=(*_TRAINED, "expert", "partition.overlap", "lr_search"),
        settings="expert",
        version=2,  # a rate that keeps eight tenths of the best gain is as good
        machine="train_experts",
        secrets=("wandb", "hub"),
    ),
    Stage(
        "train_experts",
        "train each expert on its own domain over the frozen trunk",
        "family.expert",
        kind="training",
        check="family.look_at_package",
        items="experts",
        needs=("tokenizer", "preprocess", "train_shared", "lr_experts"),
        reads=(*_TRAINED, "expert", "partition.overlap"),
        settings="expert",
        # An imported one comes from where packages lie
        secrets=("wandb", "hub", "storage"),
        after=("lr_experts",),
    ),
    Stage(
        "lr_router",
        "find the gates' learning rate, where it is auto",
        "family.lr_router",
        kind="training",
        when="searches_router",
        needs=("preprocess", "train_shared", "train_experts"),
        reads=(*_TRAINED, "router", "trunk.anchor", "lr_search"),
        settings="router",
        version=3,  # a rate that keeps eight tenths of the best gain is as good
        machine="train_router",
        secrets=("wandb", "hub"),
    ),
    Stage(
        "train_router",
        "join the experts: train the gates alone, from a closed form",
        "family.router",
        kind="training",
        needs=("preprocess", "train_shared", "train_experts", "lr_router"),
        reads=(*_TRAINED, "router", "trunk.anchor"),
        settings="router",
        secrets=("wandb", "hub"),
        after=("lr_router",),
    ),
    Stage(
        "lr_dense",
        "find the learning rate of continued baselines by what they train, where it is auto",
        "family.lr_dense",
        kind="training",
        items="searches_dense",
        needs=("preprocess", "train_shared"),
        reads=(*_TRAINED, *_AS_BASELINES, "lr_search"),
        settings="dense",
        version=2,  # a rate that keeps eight tenths of the best gain is as good
        machine="train_dense",
        secrets=("wandb", "hub"),
    ),
    Stage(
        "train_dense",
        "train the dense baselines the stack is compared with",
        "family.dense",
        kind="training",
        items="dense.baselines",
        needs=("preprocess", "train_shared", "lr_shared", "lr_dense"),
        # Of the searches the one for as much as it trains, whichever others are compared
        needs_own=("lr_dense",),
        reads=_TRAINED,
        reads_also="dense_reads",
        settings=_dense_settings,
        secrets=("wandb", "hub"),
        after=("lr_dense",),
    ),
    # A search for each model: at the rate that suits one of them the other would be told short
    Stage(
        "lr_joint",
        "find the learning rate of each joint model by itself, where it is auto",
        "family.lr_joint",
        kind="training",
        items="searches_joint",
        needs=("tokenizer", "preprocess"),
        reads=(*_TRAINED, "lr_search"),
        reads_also="joint_reads",
        settings="joint",
        version=3,  # a rate that keeps eight tenths of the best gain is as good
        machine="train_dense",
        secrets=("wandb", "hub"),
        after=("tokenizer", "preprocess"),
    ),
    # Reads no trunk of the run, nor anything that was trained for it
    Stage(
        "train_joint",
        "train whole models from zero, a mixture or dense, to hold the stack against",
        "family.joint",
        kind="training",
        items="joint.models",
        needs=("tokenizer", "preprocess", "lr_joint"),
        needs_own=("lr_joint",),
        reads=_TRAINED,
        reads_also="joint_reads",
        settings="joint",
        machine="train_dense",
        secrets=("wandb", "hub"),
        after=("tokenizer", "preprocess", "lr_joint"),
    ),
    # Of trials of experiments, which have one model each and nothing to compare it with here
    Stage(
        "score",
        "measure each model by itself, in bits per byte of held-out text",
        "score.score",
        items="scored",
        needs=("preprocess", *STACK_STAGES, *MODEL_STAGES.values()),
        reads=("score",),
        in_run=False,
        machine="evaluate",
        secrets=("hub",),
    ),
    Stage(
        "evaluate",
        "measure the stack, write report.json and report.html, print the tables",
        "family.measure",
        kind="report",
        needs=(
            "tokenizer",
            "preprocess",
            "train_shared",
            "train_experts",
            "train_router",
            "train_dense",
            "train_joint",
            *SEARCHES.values(),
        ),
        # The run's name stands in the report
        reads=("name", "evaluate"),
        version=2,  # the report is of a schema
        secrets=("hub",),
    ),
    Stage(
        "deploy",
        "write the stack as a bundle: a folder that stock tools load; upload it where "
        "deploy.upload says",
        "family.bundle",
        kind="bundle",
        needs=(
            "tokenizer",
            "train_shared",
            "train_experts",
            "train_router",
            "evaluate",
            "train_dense",  # the one that goes along, where one does
        ),
        reads=("family", "name"),
        version=3,  # its settings say how wide heads are
        in_run=False,
        secrets=("hub", "storage"),
    ),
)
