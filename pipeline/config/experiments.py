"""An experiments file: one base, what trials change of it, and what is asked of them.

It describes no run: each trial is the base with changes, checked as any run is.
"""

import hashlib
import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from .base import Name, Section, Share

# What a trial may make: the whole stack in parts, or one model, trained end to end or continued
MODEL = re.compile(r"stack|(joint|dense) [a-z][a-z0-9_]*")
# By dotted names of settings; sections in each other may stand there as in a run's file
Changes = dict[str, Any]
# What a run may be called at most
LONGEST_NAME = 64
# Of the digest in a name that would be longer
DIGEST = 6


def _each_once(seeds: tuple[int, ...] | None) -> tuple[int, ...] | None:
    # One run counted twice would be a spread of nothing
    twice = sorted({seed for seed in seeds or () if (seeds or ()).count(seed) > 1})
    if twice:
        raise ValueError(f"name each seed once; {', '.join(map(str, twice))} is there again")
    return seeds


Seeds = Annotated[tuple[Annotated[int, Field(ge=0)], ...], AfterValidator(_each_once)]


def run_name(experiments: str, trial: str) -> str:
    """Return what the run of a trial is called, whichever seed it has."""
    return cut(f"{experiments}.{trial}")


def cut(name: str) -> str:
    """Return a name that a run may have: the end of a longer one is a digest of the whole, so that
    two of them stay two."""
    if len(name) <= LONGEST_NAME:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:DIGEST]
    return f"{name[: LONGEST_NAME - DIGEST - 1]}-{digest}"


class TrialConfig(Section):
    """One trial: what is changed of the base, and which model is made of that."""

    makes: str = Field(
        "stack",
        description="stack: trunk, experts and gates in parts; joint NAME: a model of "
        "joint.models; dense NAME: one of dense.baselines",
    )
    change: Changes = Field({}, description="Settings by dotted name, over the base")
    seeds: Seeds | None = Field(
        None, min_length=1, description="Seeds of this trial; none: those of the file"
    )

    @field_validator("makes")
    @classmethod
    def _is_model(cls, makes: str) -> str:
        if not MODEL.fullmatch(makes):
            raise ValueError(f"{makes} is no model; write stack, joint NAME or dense NAME")
        return makes


class GridConfig(TrialConfig):
    """Trials that differ in a few settings, every value of one with every value of the others."""

    over: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(
        ...,
        min_length=1,
        description="Values by dotted name; settings that go together are one name with commas, "
        "whose values are lists",
    )


class RangeConfig(Section):
    """What a search may choose for one setting."""

    low: float | None = Field(None, description="Least value of a number")
    high: float | None = Field(None, description="Greatest value of a number")
    log: bool = Field(False, description="Whether ratios count, and not differences")
    whole: bool = Field(False, description="Whether the number is a whole one")
    choices: list[Any] | None = Field(
        None, min_length=1, description="Values to choose from, in place of a range"
    )

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if self.choices is not None:
            if self.low is not None or self.high is not None or self.log or self.whole:
                raise ValueError("choices stand alone; leave out low, high, log and whole")
            return self
        if self.low is None or self.high is None or self.low > self.high:
            raise ValueError("give low and high, the lesser one first, or choices")
        if self.log and self.low <= 0:
            raise ValueError(f"log needs a low above 0, not {self.low:g}")
        if self.whole and (self.low % 1 or self.high % 1):
            raise ValueError("low and high of a whole number are whole numbers")
        return self

    @property
    def ends(self) -> list[Any]:
        """All of its choices, or both ends of its range."""
        if self.choices is not None:
            return list(self.choices)
        both = (self.low, self.high)
        return [int(end or 0) if self.whole else end for end in both]


class SearchConfig(TrialConfig):
    """Trials that are chosen one after another by what those before came to."""

    space: dict[str, RangeConfig] = Field(
        ..., min_length=1, description="What may be chosen, by dotted name"
    )
    trials: int = Field(..., ge=1, description="How many are tried")
    at_once: int = Field(
        1, ge=1, description="Trials that are chosen together, as they are trained side by side"
    )
    sampler: Literal["tpe", "random"] = Field(
        "tpe", description="How values are chosen: by a model of what did well, or by chance"
    )
    random_trials: int = Field(
        5, ge=0, description="First trials, which are chosen by chance and never pruned"
    )
    prune: bool = Field(
        True,
        description="End a training whose validation loss is above the median of those before it",
    )
    prune_after: int = Field(
        1, ge=0, description="Validations of a training before which it is not ended"
    )


class CriteriaConfig(Section):
    """What is asked of every trial but the dense one; nothing is made by it."""

    dense: Name = Field("dense", description="The trial that others are held against")
    gap_of: Name | None = Field(
        None, description="The trial whose gap is to be closed; none: the dense one"
    )
    gap_share: Share = Field(0.25, description="Share by which the gap has to be smaller (primary)")
    speed_share: float = Field(
        0.5,
        gt=0,
        description="Least tokens per second of processor time, as a share of the dense model's "
        "(secondary)",
    )
    min_expert_share: Share = Field(
        0.05, description="Least share of tokens of every expert (tertiary)"
    )


# Every experiments file has one of these, and no run or part of one has any.
KINDS = frozenset({"trials", "grids", "searches"})


class ExperimentsConfig(Section):
    """Everything an experiments file says."""

    base: dict[str, Any] = Field(..., description="A run's settings, or the path of its file")
    seeds: Seeds = Field(
        (0,), min_length=1, description="Each trial is made once with each of them"
    )
    trials: dict[Name, TrialConfig] = Field({}, description="Trials by name")
    grids: dict[Name, GridConfig] = Field({}, description="Grids by name, which their trials begin")
    searches: dict[Name, SearchConfig] = Field({}, description="Searches by name, likewise")
    criteria: CriteriaConfig = Field(CriteriaConfig(), description="What is asked of the trials")

    @model_validator(mode="after")
    def _something_to_do(self) -> Self:
        if not (self.trials or self.grids or self.searches):
            raise ValueError("name at least one trial, grid or search")
        return self
