"""Full experts compressed to low-rank ones (FlexMoRE, 2602.08818), one matrix after another."""

from torch import Tensor

from ....errors import ConfigError, MismatchError
from ....model.experts import Expert
from ....model.low_rank import PROJECTIONS, compress
from ... import Parts
from ..parts import stored_experts, stored_trunk
from .job import Job
from .tensors import PREFIX


class Compressing:
    """Compresses experts of a run to the rank that is wished for."""

    def __init__(self, job: Job, parts: Parts):
        """Open what they are changes of. Raises ConfigError for a rank that is none of its
        matrices', MismatchError for networks that change in more than matrices."""
        self.rank: int = job.wish.rank or 0
        self._job = job
        self._parts = parts
        _, self._base = stored_trunk(job.cfg, parts)
        least = min(job.settings["hidden_size"], job.settings["intermediate_size"])
        if self.rank > least:
            raise ConfigError(
                f"--rank {self.rank}: matrices of this trunk's networks have a rank of {least} at "
                "most; give less"
            )
        if len(self._base.named()) > len(PROJECTIONS) * len(self._base.layers):
            raise MismatchError(
                "the trunk's networks have biases, which experts change and adapters do not; "
                "export with --format expert"
            )

    def tensors(self, name: str) -> tuple[dict[str, Tensor], str]:
        """Return an expert's factors by PEFT's names, and in a sentence how much they keep."""
        expert = self._opened(name)
        found: dict[str, Tensor] = {}
        kept = 0.0
        whole = 0.0
        for done, layer in enumerate(expert.own_layers):
            self._job.progress(f"compressing {name}", done / len(expert.own_layers))
            part = compress(expert, self._base, self.rank, [layer])
            for key, factor in part.expert.named().items():
                found[f"{PREFIX}{key}"] = factor.detach()
            kept += part.kept
            whole += part.whole
        share = kept / whole if whole else 1.0
        told = (
            f"Rank {self.rank} keeps {share:.0%} of the squared change that the expert {name} "
            "makes to the trunk's matrices."
        )
        self._job.progress(told, None)
        return found, told

    def _opened(self, name: str) -> Expert:
        # One alone is opened and hashed
        cfg = self._job.cfg
        expert = cfg.expert.model_copy(update={"domains": (name,)})
        trunk = cfg.trunk.model_copy(update={"anchor": "discard"})
        alone = cfg.model_copy(update={"expert": expert, "trunk": trunk})
        found = dict(stored_experts(alone, self._parts, self._base))
        return found[name]
