"""The routing set of a lora_vlm run: what dataset.yaml says about requests and whom they belong to.

Splits are train, valid, test and test_held; the last one is asked with held-out wording, of other
pictures than test.
"""

from collections.abc import Iterator
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, PlainValidator, model_validator

from .base import NONE, AdapterName, Section, Share
from .paths import path_field
from .task_data import SyntheticConfig, TaskDataConfig, read_old_spelling

ROUNDING = 1e-6  # by which shares may miss 1


def _check_balance(value: object) -> object:
    """Return equal, natural, or shares by expert. Raises ValueError."""
    if value in ("equal", "natural"):
        return value
    # A validator of its own: pydantic would report both halves of the union, neither of them clear.
    wrong = ValueError("write equal, natural, or a share of every expert, above 0 and together 1")
    if not isinstance(value, dict):
        raise wrong
    shares = {}
    for name, share in value.items():
        if not isinstance(share, int | float) or not 0 < share <= 1:
            raise wrong
        shares[str(name)] = float(share)
    # Thirds are written as .333333, so that they may miss 1 by as much.
    if abs(sum(shares.values()) - 1) > ROUNDING:
        raise wrong
    return shares


Balance = Annotated[Literal["equal", "natural"] | dict[str, float], PlainValidator(_check_balance)]


class SplitSharesConfig(Section):
    """Shares of the groups of a source that has no splits of its own."""

    train: float = Field(0.8, gt=0, lt=1, description="Share to train the router on")
    valid: float = Field(0.1, gt=0, lt=1, description="Share for early stopping and calibration")
    test: float = Field(0.1, gt=0, lt=1, description="Share for the report")

    @model_validator(mode="after")
    def _whole(self) -> Self:
        total = self.train + self.valid + self.test
        if abs(total - 1) > ROUNDING:
            raise ValueError(f"train, valid and test are {total:g} together, not 1")
        return self


class SplitRowsConfig(Section):
    """Rows by split; test_held has as many as test.

    Their pictures are others than those of test, so a source needs twice as many for test.
    """

    train: int = Field(2000, ge=1, description="Rows to train the router on")
    valid: int = Field(200, ge=1, description="Rows for early stopping and calibration")
    test: int = Field(200, ge=1, description="Rows for the report")


class RoutingSourceConfig(Section):
    """One source of requests for one expert."""

    model_config = ConfigDict(
        validate_by_name=True, validate_by_alias=True, serialize_by_alias=True
    )

    expert: AdapterName = Field(description="Whose requests these are; none: nobody's")
    # `from` cannot be a name in Python, so files say from and code says origin.
    origin: Literal["loras", "jsonl", "synthetic"] = Field(
        "loras", alias="from", description="loras (the expert's own rows), jsonl, or synthetic"
    )
    path: str | None = path_field(
        "path", None, description="File or folder of jsonl rows when from is jsonl"
    )
    image_root: str | None = path_field(
        "path", None, description="Folder that image paths start at; none: the folder of path"
    )
    image_field: str = Field("image", description="Column of the picture in jsonl rows")
    fields: dict[str, str] = Field(
        {}, description="Columns of jsonl rows by the names used here: prompt"
    )
    synthetic: SyntheticConfig | None = Field(
        None, description="Which pictures to make when from is synthetic"
    )
    weight: float = Field(
        1.0, gt=0, description="Share of the expert's rows, relative to its other sources"
    )
    per_split: SplitRowsConfig | None = Field(
        None, description="Rows wanted of this expert; none: per_expert"
    )

    @model_validator(mode="before")
    @classmethod
    def _old_spelling(cls, raw: object) -> object:
        return read_old_spelling(raw)

    @model_validator(mode="after")
    def _source_is_given(self) -> Self:
        wanted = {"jsonl": "path", "synthetic": "synthetic"}.get(self.origin)
        if wanted and not getattr(self, wanted):
            raise ValueError(f"from is {self.origin}, so {wanted} must be given")
        if self.expert == NONE and self.origin == "loras":
            raise ValueError("none has no rows among the experts'; from must be jsonl or synthetic")
        return self

    def data(self, splits: SplitSharesConfig) -> TaskDataConfig:
        """Return the same as the data of a task, which preprocess reads.

        Only for from jsonl or synthetic.
        """
        if self.origin == "synthetic":
            return TaskDataConfig(source="synthetic", synthetic=self.synthetic)
        data = TaskDataConfig(
            source="jsonl",
            path=self.path,
            image_root=self.image_root,
            image_field=self.image_field,
            fields=self.fields,
            pictures="some",
        )
        # Copied and not given above: a split may take more here than a task's rows may be asked
        # for (up to 1, there below .5), and a copy is not validated.
        return data.model_copy(update={"valid_share": splits.valid, "test_share": splits.test})

    def paths(self) -> Iterator[tuple[str, str]]:
        """Yield (setting, path) of the files and folders that the rows are read from."""
        if self.path:
            yield "path", self.path
        if self.image_root:
            yield "image_root", self.image_root


class WordingConfig(Section):
    """Ways to ask for the same thing."""

    seen: tuple[str, ...] = Field((), description="Prompts in train, valid and test")
    held: tuple[str, ...] = Field((), description="Prompts in test_held alone")

    @model_validator(mode="after")
    def _apart(self) -> Self:
        both = sorted(set(self.seen) & set(self.held))
        if both:
            raise ValueError(f"held-out wording is seen too: {', '.join(both)}")
        return self


def _read_off(value: object) -> object:
    # Files of YAML 1.1, and JSON, say false where off is meant.
    return "off" if value is False else value


class DedupeConfig(Section):
    """What of an expert's rows is compared: rows alike in all of it are one request, and the others
    are counted.

    With prompt off one row of each picture is left, with image off one of each prompt; with both
    off all are left. A request of two experts, with the same pictures and prompt, is dropped in any
    case.
    """

    image: Annotated[Literal["sha256", "off"], BeforeValidator(_read_off)] = Field(
        "sha256", description="Compare the pictures' pixels, or not at all"
    )
    prompt: Annotated[Literal["normalized", "exact", "off"], BeforeValidator(_read_off)] = Field(
        "normalized",
        description="Compare prompts less case, spaces and closing marks, as they are, or not at "
        "all",
    )


class RoutingLimitsConfig(Section):
    """What a request may hold; others are dropped and counted."""

    max_images: int = Field(4, ge=1, description="Most pictures of a request")
    max_prompt_chars: int = Field(2000, ge=1, description="Longest prompt, characters")

    @property
    def max_media(self) -> int:
        """Most things beside its text that a request may come with; pictures are the only ones."""
        return self.max_images


class RoutingSetConfig(Section):
    """Requests with the expert they belong to, taken from the experts' own rows."""

    seed: int = Field(0, ge=0, description="Seed of samples, splits and wording")
    splits: SplitSharesConfig = Field(
        SplitSharesConfig(), description="Shares of sources without splits"
    )
    split_by: Literal["group", "id"] = Field(
        "group", description="What stays in one split: all rows of a picture, or a row"
    )
    per_expert: SplitRowsConfig = Field(
        SplitRowsConfig(), description="Rows of each expert when balance is equal"
    )
    balance: Balance = Field(
        "equal", description="Rows by expert: equal, natural, or a share of each"
    )
    short: Literal["error", "upsample", "accept"] = Field(
        "error",
        description="When an expert has too few rows: stop, repeat some, or take what there is",
    )
    sources: tuple[RoutingSourceConfig, ...] = Field(
        description="Where requests come from, at least one per expert"
    )
    paraphrases: dict[str, WordingConfig] = Field(
        {}, description="Ways to ask for each expert's task, by expert"
    )
    neutral: WordingConfig = Field(
        WordingConfig(), description="Prompts that fit any expert, so that the picture decides"
    )
    ambiguous_share: Share = Field(0.3, description="Share of requests with a neutral prompt")
    dedupe: DedupeConfig = Field(
        DedupeConfig(), description="What rows with the same request have in common"
    )
    limits: RoutingLimitsConfig = Field(
        RoutingLimitsConfig(), description="What a request may hold"
    )
    max_bad_share: Share = Field(
        0.05, description="Share of dropped rows of a source above which the set is not made"
    )

    @property
    def experts(self) -> tuple[str, ...]:
        """Everybody whom a request may belong to, none included, in the order of sources."""
        # A dict and no set: rows are drawn in this order, which must not depend on hashes.
        return tuple(dict.fromkeys(source.expert for source in self.sources))
