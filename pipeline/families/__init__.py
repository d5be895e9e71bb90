"""The kinds of experts. A family is a package with a table of stages (`stages.py`), the functions
that its rows name, and a module `family` with the functions of the Family protocol.

What a row's function is called with, by the row's kind; a stage of several jobs passes its item
last:

    files, bundle  f(cfg, parts, folder, progress[, item]) -> metrics; writes to folder
    training       f(cfg, parts[, item]) -> Task, NoTraining for what is only written, or Search for
                   a rate that is to be found
    report         f(cfg, parts, progress) -> the report

and what a row's check: check(cfg[, item]), raises PipelineError for what keeps a job from starting
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from ..config.run import RunConfig
    from ..protocols import Eye, Progress
    from ..store.artifacts import Manifest
    from ..store.expert_package import Noise
    from ..store.history import History
    from ..store.model_files import FindModel
    from ..train.flops import JobCost

# What every job of a family imports. Local jobs are forked from a process that has it already: it
# takes seconds, and its memory is shared.
PRELOAD = {
    "ffn_moe": ["pipeline.families.ffn_moe.family", "transformers.models.qwen3.modeling_qwen3"],
    "lora_vlm": [
        "pipeline.families.lora_vlm.family",
        "transformers.models.qwen3_vl.modeling_qwen3_vl",
    ],
}
# What imports PEFT, and with it bitsandbytes, which opens the GPU as it is imported: CUDA can be
# used in no process that is forked from one that has
OPENS_GPU = frozenset({"pipeline.families.lora_vlm.family"})


# What `export` writes, and what it may round weights to.
FORMATS = {
    "hf": "the stack as Qwen3MoeForCausalLM or MixtralForCausalLM, as deploy bundles it",
    "gguf": "the stack, or with --expert or --dense a dense model, for llama.cpp",
    "dense": "the mean of the experts as one dense model of the trunk's own class",
    "expert": "one expert as a dense model of the trunk's own class (--expert)",
    "adapters": "the experts as PEFT adapters",
}
DTYPES = ("fp32", "bf16", "fp16", "q8_0")


class Parts(Protocol):
    """What earlier stages of a run left behind, loaded on asking and checked once; and who hears
    what a job is doing."""

    progress: "Progress"

    def folder(self, stage: str, item: str | None = None) -> Path:
        """Where an artifact is. Raises MissingArtifact, DamagedArtifact, StaleArtifact."""

    def manifest(self, stage: str, item: str | None = None) -> "Manifest":
        """An artifact's manifest. Raises MissingArtifact, DamagedArtifact, StaleArtifact."""

    def tensors(self, stage: str, name: str, item: str | None = None) -> "dict[str, torch.Tensor]":
        """A file's tensors. Raises MissingArtifact, DamagedArtifact, StaleArtifact."""

    def history(self, stage: str, item: str | None = None) -> "History":
        """What a training that is done did, step by step. Raises UnreadableFile and what `manifest`
        does."""

    def file_sum(self, path: Path, expected: str = "") -> str:
        """The sha256 of a file outside the store; of one that was found to be what is expected, and
        is unchanged since, without reading it. Raises OSError, UnreadableFile."""

    def eye(self) -> "Eye":
        """What looks at files outside the store."""


@dataclass(frozen=True)
class ExportWish:
    """What of a run is wanted, in which format."""

    format: str  # of FORMATS
    expert: str | None = None  # this one alone, as a dense model
    dense: bool = False  # the mean of the experts as a dense model
    dtype: str | None = None  # of DTYPES; none: as stored
    rank: int | None = None  # that full experts are compressed to, as adapters

    @property
    def words(self) -> str:
        """What is wanted, as it is typed."""
        given = (("expert", self.expert), ("dtype", self.dtype), ("rank", self.rank))
        options = [f"--{name} {value}" for name, value in given if value]
        # Full experts are compressed by a command of its own
        whole = ["compress"] if self.rank else ["export", self.format]
        return " ".join([*whole, *options, *(["--dense"] if self.dense else [])])


@dataclass(frozen=True)
class PackWish:
    """What of an expert is given away, and the words beside it."""

    statistics: bool = True
    noise: "Noise | None" = None  # none: statistics as they are
    licence: str = ""
    description: str = ""


class Family(Protocol):
    """What is asked of a kind of experts beside its stages."""

    def cost(
        self,
        cfg: "RunConfig",
        stage: str,
        item: str | None,
        made: Mapping[tuple[str, str | None], dict],
        bf16: bool,
    ) -> "JobCost | None":
        """What a training will spend, as far as the metrics of finished jobs tell; None for what
        needs no training."""

    def writing_cost(
        self,
        cfg: "RunConfig",
        made: Mapping[tuple[str, str | None], dict],
        wish: ExportWish | None,
    ) -> "JobCost | None":
        """What it takes to write a run's bundle, or what is wanted of it, as far as the metrics of
        finished jobs tell; None where nobody can tell, or before its model is here."""

    def preflight(self, cfg: "RunConfig", find: "FindModel") -> list[str]:
        """What a person should know of the models that a run names, from their files as `find` has
        them, before anything is made. Raises ConfigError for what no stage could use."""

    def assemble(self, cfg: "RunConfig", parts: Parts) -> Any:
        """The finished stack; what is measured is what is served."""

    def reassemble(self, folder: Path) -> Any:
        """The finished stack again, from a bundle alone."""

    def check_export(self, cfg: "RunConfig", wish: ExportWish) -> None:
        """Raises ConfigError for a format that a run has nothing for."""

    def export(
        self, cfg: "RunConfig", parts: Parts, wish: ExportWish, folder: Path, progress: "Progress"
    ) -> None:
        """Write what is wanted, with a card and SHA256SUMS, to an empty folder. Raises
        MissingArtifact, DamagedArtifact, MismatchError for what the format cannot hold."""

    def write_kit(self, cfg: "RunConfig", parts: Parts, domain: str, folder: Path) -> None:
        """Write what somebody needs to train one expert elsewhere to an empty folder. Raises
        ConfigError for experts that cannot be, MissingArtifact, DamagedArtifact."""

    def check_kit(self, cfg: "RunConfig", parts: Parts, kit: Path) -> None:
        """Raises MismatchError where what a kit's expert is trained on is not here, DataError for
        what is no kit."""

    def check_pack(self, cfg: "RunConfig", wish: PackWish) -> None:
        """Raises ConfigError for what of an expert cannot be given away, before it is trained."""

    def pack(
        self, cfg: "RunConfig", parts: Parts, item: str, wish: PackWish, folder: Path, kit: Path
    ) -> None:
        """Write a kit's trained expert to an empty folder, to be imported elsewhere. Raises
        ConfigError, MissingArtifact, DamagedArtifact."""


class TrialModels(Protocol):
    """What is asked of a family whose runs may be trials of experiments."""

    def model_job(self, cfg: Any, makes: str) -> tuple[str, str | None]:
        """The job in which a trial's model ends: its validation rows are the model's. Raises
        ConfigError for what no job of the run makes."""

    def score_job(self, cfg: Any, makes: str) -> tuple[str, str | None]:
        """The job that measures that model, with metrics as TrialScore has them, in units that any
        tokenizer's share."""

    def token_job(self, cfg: Any) -> tuple[str, str | None]:
        """The job that decides what a token is: losses a token of two trials compare where it is
        one and the same."""

    def model_sizes(self, cfg: Any, parts: Parts, job: tuple[str, str | None]) -> tuple[int, int]:
        """The parameters of that model that run per token, and all of them. Raises
        MissingArtifact, DamagedArtifact."""

    def write_model(
        self,
        cfg: Any,
        parts: Parts,
        job: tuple[str, str | None],
        folder: Path,
        progress: "Progress",
    ) -> None:
        """Write a dense model to an empty folder as a checkpoint that stock tools open. Raises
        MissingArtifact, DamagedArtifact, DiskFull."""


def family(name: str) -> Family:
    """Return the family's module; importing it brings torch."""
    return import_module(f".{name}.family", __name__)


def stage_function(name: str, function: str) -> Callable[..., Any]:
    """Return the function that a row of a family's table names; importing it brings torch."""
    module, _, inner = function.rpartition(".")
    found = import_module(f".{name}.{module}", __name__)
    return getattr(found, inner)
