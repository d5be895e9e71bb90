"""What every training has, of whatever family: its length, its steps, and how they are spent.

Defaults live in the classes; files state only what differs. A field marked `not_hashed` is not read
by the stage its section is named after, or leaves its result as it is to the last bit: changing it
leaves that stage's artifacts alone.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from .base import Section, Share, not_hashed

SEARCHED = "auto"  # a rate that is found by short trainings before the training itself
LearningRate = Annotated[float, Field(gt=0)] | Literal["auto"]


class FitConfig(Section):
    """Settings of one training run; give exactly one of steps, epochs, tokens."""

    steps: int | None = Field(None, ge=0, description="Optimizer steps")
    epochs: float | None = Field(None, gt=0, description="Passes over the training tokens")
    tokens: int | None = Field(None, gt=0, description="Training tokens")
    batch_sequences: int = Field(16, ge=1, description="Sequences per optimizer step")
    micro_batch_sequences: int | None = Field(
        None,
        ge=1,
        description="Sequences per forward pass, the rest is accumulated; none: chosen by the plan",
    )
    moments: Literal["fp32", "bf16", "int8"] | None = Field(
        None,
        description="Adam's two moments (int8 needs bitsandbytes); none: fp32, or less where "
        "memory_budget asks for it",
    )
    gradients: Literal["fp32", "bf16"] | None = Field(
        None,
        description="Sums of gradients over micro-batches; none: fp32, or bf16 where memory_budget "
        "asks for it",
    )
    # The same numbers, made twice
    checkpointing: bool | None = not_hashed(
        None,
        "Make each layer's activations again in the backward pass; none: where memory_budget asks",
    )
    fuse_optimizer: bool = Field(
        False,
        description="Step inside the backward pass, so that gradients never add up; needs one "
        "micro-batch and clip_norm 0",
    )
    compile: bool = Field(
        False, description="torch.compile the forward pass (needs a C++ compiler; about a minute)"
    )
    lr: LearningRate = Field(
        1e-3, description="Peak learning rate; auto: found by short trainings first (lr_search)"
    )
    min_lr_share: Share = Field(0.1, description="Learning rate at the end as a share of the peak")
    warmup_steps: int = Field(20, ge=0, description="Steps of linear warm-up")
    schedule: Literal["cosine", "constant"] = Field(
        "cosine", description="Learning rate after warm-up"
    )
    weight_decay: float = Field(0.1, ge=0, description="AdamW decay of matrices; vectors get none")
    beta2: float = Field(
        0.95, gt=0, lt=1, description="AdamW second-moment decay; the first is 0.9"
    )
    clip_norm: float = Field(1.0, ge=0, description="Largest gradient norm; 0: no clipping")
    eval_every_steps: int = Field(
        100, ge=0, description="Steps between evaluations; 0: only at the end"
    )
    eval_tokens: int = Field(16_384, ge=1, description="Validation tokens per evaluation")
    patience: int = Field(
        0, ge=0, description="Evaluations without improvement before stopping; 0: never"
    )
    keep: Literal["best", "last"] = Field("best", description="State that becomes the artifact")

    @property
    def rate(self) -> float:
        """The peak learning rate, of a training whose rate is known."""
        if isinstance(self.lr, str):
            # Whoever makes a Task has put the rate that was found in its place
            raise AssertionError("a training whose rate nobody has searched")
        return self.lr

    def resolve_steps(self, context_tokens: int, epoch_tokens: int) -> int:
        """Return optimizer steps, whichever way the duration was given.

        A sequence has `context_tokens`, a pass over the training set `epoch_tokens`.
        """
        if self.steps is not None:
            return self.steps
        step_tokens = self.batch_sequences * context_tokens
        if self.tokens is not None:
            return max(1, round(self.tokens / step_tokens))
        if self.epochs is None:
            # Sections that are trained ask for a duration of theirs, so this is a mistake of ours.
            raise AssertionError("a training without steps, epochs or tokens")
        return max(1, round(self.epochs * epoch_tokens / step_tokens))

    @model_validator(mode="after")
    def _one_duration(self) -> Self:
        # None of them is allowed here: a section that is trained asks for one itself.
        given = [each for each in (self.steps, self.epochs, self.tokens) if each is not None]
        if len(given) > 1:
            raise ValueError("give only one of steps, epochs, tokens")
        return self

    @model_validator(mode="after")
    def _fused_steps_are_whole(self) -> Self:
        if self.fuse_optimizer and self.clip_norm:
            # The norm of all gradients is known only when the last of them is, and by then the
            # first have been stepped with and freed.
            raise ValueError(
                f"fuse_optimizer needs clip_norm 0, not {self.clip_norm:g}: "
                "it knows no norm in time"
            )
        if self.fuse_optimizer and self.micro_batch_sequences not in (None, self.batch_sequences):
            raise ValueError(
                "fuse_optimizer steps in every backward pass, so micro_batch_sequences can only be "
                f"batch_sequences {self.batch_sequences}, not {self.micro_batch_sequences}"
            )
        return self


class LrSearchConfig(Section):
    """How a rate that is `auto` is found: each of a few rates trains for a few steps, and the
    lowest that gains about as much on validation text as the best is taken."""

    share: float = Field(
        0.1,
        gt=0,
        le=1,
        description="Training tokens of a search as a share of the trainings that it is for",
    )
    steps: int | None = Field(
        None, ge=1, description="Steps of each rate; none: what share allows, at least a few"
    )
