"""The section of joint trainings."""

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from ....config.base import not_hashed
from ....config.fit import FitConfig
from ....config.labels import DomainName
from ..sections import LayerChoice, TemperatureConfig, ascending, chosen_layers

DENSE = "dense"
MOE = "moe"


class JointConfig(FitConfig):
    """Models that are trained end to end and from zero, all on the same tokens in the same order;
    their trunk has the sizes of the section trunk."""

    models: tuple[Literal["dense", "moe"], ...] = not_hashed(
        (),
        "dense: a network in every layer; moe: a mixture in `layers`. None: no joint training",
    )
    domains: tuple[DomainName, ...] | None = Field(
        None, description="Domains they train on; none: those of the trunk and of dense baselines"
    )
    mixture: Literal["natural", "equal"] = Field(
        "natural", description="Share of domains in a batch: by size, or equal"
    )
    layers: LayerChoice = Field(
        "all",
        description="Layers with a mixture: all, last:N, or their numbers from 0; elsewhere one "
        "network",
    )
    experts: int = Field(8, ge=2, description="Experts of a mixture")
    top_k: int = Field(1, ge=1, description="Experts that run per token")
    aux_weight: float = Field(
        1e-2,
        ge=0,
        description="Weight of the auxiliary loss (Switch, divided by k), which is 1 where the "
        "load is even",
    )
    capacity_factor: float | None = Field(
        None,
        gt=0,
        description="Slots per expert relative to an even load while training; a token over them "
        "goes on by the residual alone; none: dropless",
    )
    temperature: TemperatureConfig = Field(
        TemperatureConfig(), description="Softmax temperature of the gates while training"
    )
    dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of numbers dropped of what attention and feed-forward networks add to "
        "the residual stream",
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="Share of a target that is spread evenly over the vocabulary"
    )
    eval_every_steps: int = Field(
        0, ge=0, description="Steps between evaluations; 0: at the end of each epoch"
    )
    patience: int = Field(
        0,
        ge=0,
        description="Evaluations, so epochs by default, without improvement before stopping; "
        "0: never",
    )

    def in_layers(self, count: int) -> tuple[int, ...]:
        """Return the numbers of the layers with a mixture in a trunk of so many.

        Raises ValueError where the trunk has not so many.
        """
        return chosen_layers(self.layers, count)

    def ffns(self, item: str, experts: int, layers: int) -> float:
        """Return how many feed-forward networks a layer one of the models has on average with so
        many experts, in a trunk of so many layers."""
        if item != MOE:
            return 1.0
        mixtures = len(self.in_layers(layers))
        return (layers - mixtures + experts * mixtures) / layers

    @field_validator("layers")
    @classmethod
    def _layers_ascend(cls, layers: LayerChoice) -> LayerChoice:
        return ascending(layers)

    @model_validator(mode="after")
    def _can_train(self) -> Self:
        if self.top_k > self.experts:
            raise ValueError(
                f"top_k: {self.top_k} experts per token, but a mixture has {self.experts}; lower "
                "it, or raise experts"
            )
        if len(set(self.models)) < len(self.models):
            raise ValueError("models: one is named twice")
        if self.checkpointing and MOE in self.models:
            raise ValueError(
                "checkpointing: gates count the tokens of every forward pass, so none of moe is "
                "made twice; leave it out"
            )
        return self
