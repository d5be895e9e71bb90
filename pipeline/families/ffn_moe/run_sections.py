"""The sections of an ffn_moe run together, and what follows from them of its experts, domains and
searches."""

from typing import Literal

from pydantic import Field

from ...config.fit import SEARCHED, FitConfig, LrSearchConfig
from ...config.text_data import TextRunConfig
from .joint.section import JointConfig
from .sections import (
    ADAPTER,
    DenseConfig,
    EvaluateConfig,
    ExpertConfig,
    RouterConfig,
    ScoreConfig,
    TrunkConfig,
)
from .stages import MODEL_STAGES, STACK


class FfnMoeSectionsConfig(TextRunConfig):
    """What a run of FFN experts states."""

    family: Literal["ffn_moe"] = Field("ffn_moe", description="Kind of experts")
    trunk: TrunkConfig = Field(TrunkConfig(steps=1000), description="The shared trunk")
    expert: ExpertConfig = Field(ExpertConfig(steps=200), description="Each expert")
    router: RouterConfig = Field(RouterConfig(steps=50), description="The gates")
    dense: DenseConfig = Field(DenseConfig(), description="Baselines")
    joint: JointConfig = Field(
        JointConfig(epochs=20), description="Models that are trained end to end"
    )
    lr_search: LrSearchConfig = Field(
        LrSearchConfig(), description="How learning rates that are auto are found"
    )
    score: ScoreConfig = Field(ScoreConfig(), description="One model, measured by itself")
    evaluate: EvaluateConfig = Field(EvaluateConfig(), description="The report")

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the experts, in stack order: domains that get one, then imported ones of no text
        here."""
        if self.expert.domains:
            return self.expert.domains
        names = self.partition.names
        beside = [name for name in self.expert.imported if name not in names]
        return (*names, *beside)

    @property
    def experts_with_text(self) -> tuple[str, ...]:
        """Those of the experts whose domain has text here to train and measure on."""
        return tuple(name for name in self.experts if name in self.partition.names)

    def has_text_for(self, expert: str) -> bool:
        """Whether there is text here to fit the gates of an imported expert on."""
        return expert in self.partition.names or expert in self.expert.imported_text

    @property
    def trunk_domains(self) -> tuple[str, ...]:
        """Domains that the trunk sees: those of general text too."""
        return self.trunk.domains or self.partition.names

    @property
    def dense_domains(self) -> tuple[str, ...]:
        """Domains that dense baselines are trained on."""
        return self.dense.domains or self.experts_with_text

    @property
    def joint_domains(self) -> tuple[str, ...]:
        """Domains that joint models are trained on."""
        both = (*self.trunk_domains, *self.dense_domains)
        return self.joint.domains or tuple(dict.fromkeys(both))

    @property
    def tokenizer_domains(self) -> tuple[str, ...]:
        """The domains whose text a tokenizer is trained on, where documents have labels."""
        return self.trunk_domains

    @property
    def scored(self) -> tuple[str, ...]:
        """The models that a run makes, as they are called where each is measured by itself."""
        # One adapter reads a whole text, so that stack has no loss of every token
        found = [] if self.expert.form == ADAPTER else [STACK]
        for kind, stage in MODEL_STAGES.items():
            found += [f"{kind}_{item}" for item in self.items(stage)]
        return tuple(found)

    @property
    def searches_shared(self) -> bool:
        """Whether the trunk's rate is searched."""
        return is_searched(self.trunk)

    @property
    def searches_experts(self) -> bool:
        """Whether the experts' rate is searched."""
        return is_searched(self.expert)

    @property
    def searches_router(self) -> bool:
        """Whether the gates' rate is searched."""
        return is_searched(self.router)

    @property
    def searches_joint(self) -> tuple[str, ...]:
        """The searches for joint models' rates: one for each model."""
        return self.joint.models if is_searched(self.joint) else ()


def is_searched(fit: FitConfig) -> bool:
    """Whether something is trained whose rate is not known."""
    return fit.lr == SEARCHED and fit.steps != 0
