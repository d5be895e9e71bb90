"""Rows of a task with pictures: where they come from, and how large pictures are."""

from collections.abc import Iterator
from typing import Literal, Self, get_args

from pydantic import Field, model_validator

from .base import AdapterName, Section, Share
from .paths import path_field

# What data/sources/synthetic.py can make; here because no layer below it may ask it.
SyntheticKind = Literal["color", "digits", "count", "locate", "shape", "compare", "pattern"]
SYNTHETIC_KINDS: tuple[str, ...] = get_args(SyntheticKind)


class ImageLimitsConfig(Section):
    """How large pictures are, by area; a picture outside is resized when it is prepared.

    One token per 1024 px: the base merges 2 x 2 patches of 16 x 16 px into one.
    """

    min_pixels: int = Field(65_536, ge=1024, description="Least area of a picture, px")
    max_pixels: int = Field(1_048_576, ge=1024, description="Largest area of a picture, px")

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.min_pixels > self.max_pixels:
            raise ValueError(
                f"min_pixels {self.min_pixels} is more than max_pixels {self.max_pixels}"
            )
        return self


class SyntheticConfig(Section):
    """Synthetic pictures of a task, for a base that is built or for trying things out."""

    kind: SyntheticKind = Field(description="What the pictures show")
    train: int = Field(2000, ge=1, description="Pictures to train on")
    valid: int = Field(100, ge=1, description="Pictures for early stopping and calibration")
    test: int = Field(200, ge=1, description="Pictures for the report")
    size_px: int = Field(64, ge=32, le=2048, description="Width and height, px")
    seed: int = Field(0, ge=0, description="Seed of the pictures")


def read_old_spelling(raw: object) -> object:
    """Return settings of a source with `drawn`, the old word, as `synthetic`.

    Raises ValueError where both are given: it is not ours to say which of the two counts.
    """
    if not isinstance(raw, dict):
        return raw
    renamed = dict(raw)
    if "drawn" in renamed:
        if "synthetic" in renamed:
            raise ValueError("drawn is the old word for synthetic, and both are given; keep one")
        renamed["synthetic"] = renamed.pop("drawn")
    # A routing source calls it `from` in files and `origin` here, where from is a keyword.
    for key in ("source", "from", "origin"):
        if renamed.get(key) == "drawn":
            renamed[key] = "synthetic"
    return renamed


# Fields that say where rows lie
PLACES = ("path", "image_root")


class TaskDataConfig(Section):
    """Where the rows of one task come from."""

    source: Literal["hub", "jsonl", "folder", "synthetic"] = Field(
        description="hub, jsonl, folder (of images), or synthetic"
    )
    path: str | None = path_field(
        "path", None, description="Folder of the jsonl files or of the images, or one jsonl file"
    )
    id: str | None = Field(None, description="Dataset on the Hub")
    revision: str | None = Field(None, description="Commit of the dataset on the Hub")
    subset: str | None = Field(None, description="Configuration name of the dataset on the Hub")
    allow_fewer_rows: bool = Field(
        False, description="Take a split on the Hub that has fewer rows than its metadata says"
    )
    split: str | None = Field(
        None, description="The one split to read and divide, when train is none"
    )
    train: str | None = Field(
        None, description="File, or split on the Hub, of the training rows; none: divide split"
    )
    valid: str | None = Field(
        None, description="The same for validation; none: a share of the training rows"
    )
    test: str | None = Field(
        None, description="The same for the report; none: a share of the training rows"
    )
    # Of groups and not of rows: rows of one picture in two splits would be known beforehand.
    valid_share: float = Field(
        0.1, gt=0, lt=0.5, description="Share of groups held out when valid is none"
    )
    test_share: float = Field(
        0.1, gt=0, lt=0.5, description="Share of groups held out when test is none"
    )
    image_root: str | None = path_field(
        "path", None, description="Folder that image paths start at and stay in; none: path"
    )
    image_field: str = Field(
        "image", description="Column of the picture: a path, bytes, or an image feature"
    )
    rows_field: str | None = Field(
        None, description="List of the rows, of a .json file that is one object with several"
    )
    turns: Literal["one", "first", "each"] = Field(
        "one",
        description="Of chats with several exchanges: none is read (one), the first, or each as a "
        "row of its own without what came before",
    )
    pictures: Literal["every", "some", "none"] = Field(
        "every",
        description="Rows that have one: every (others are dropped and counted), some, or none: "
        "text alone",
    )
    frames: Literal["one", "first"] = Field(
        "one",
        description="Animations and documents of several pages: one refuses them, first takes the "
        "first frame or page",
    )
    fields: dict[str, str] = Field(
        {}, description="Columns by the names that templates and metrics use"
    )
    synthetic: SyntheticConfig | None = Field(
        None, description="Which pictures to make when source is synthetic"
    )
    ocr: bool = Field(
        False, description="Answers are transcripts: text cleaned, boxes put in reading order"
    )
    regions: bool = Field(
        False, description="With ocr: one row for each box with text, its picture cut out"
    )
    region_padding: float = Field(
        0.1, ge=0, le=2, description="Room around a cut-out box, share of its height"
    )
    box_format: Literal["xyxy", "xywh", "cxcywh"] = Field(
        "xyxy",
        description="Corners of boxes, a corner and a size as in COCO, or a middle and a size as "
        "in YOLO",
    )
    box_units: Literal["pixels", "thousandths", "fractions"] | None = Field(
        None,
        description="What boxes are counted in: pixels, or thousandths or fractions of the sides; "
        "none: pixels, and what cannot be pixels is refused",
    )
    class_names: tuple[str, ...] = Field(
        (), description="Names of boxes' classes, where the rows have their numbers, from 0"
    )
    markup: Literal["refused", "text"] = Field(
        "refused",
        description="Special tokens of other formats (<|box_start|>, <ref>, [INST]) in prompts and "
        "answers: refused, or text to learn",
    )
    max_answer_chars: int = Field(
        4000, ge=1, description="Longer answers are dropped and counted, characters"
    )
    max_bad_share: Share = Field(
        0.05, description="Share of dropped rows above which preprocess stops"
    )
    near_duplicates: Literal["drop", "keep", "off"] = Field(
        "drop",
        description="Pictures compressed or resized anew: in one split, and rows that another "
        "split states are bad (drop); told (keep); not looked for (off)",
    )
    limit: int | None = Field(None, ge=1, description="Most rows to read of each split; none: all")

    @model_validator(mode="before")
    @classmethod
    def _old_spelling(cls, raw: object) -> object:
        return read_old_spelling(raw)

    @model_validator(mode="after")
    def _source_is_given(self) -> Self:
        needs = {
            # The revision is required: without it a rerun would read the Hub's newest rows.
            "hub": ("id", "revision"),
            "jsonl": ("path",),
            "folder": ("path",),
            "synthetic": ("synthetic",),
        }
        missing = [name for name in needs[self.source] if not getattr(self, name)]
        if missing:
            raise ValueError(f"source is {self.source}, so {' and '.join(missing)} must be given")
        return self

    @model_validator(mode="after")
    def _pictures_can_be_absent(self) -> Self:
        if self.pictures == "every":
            return self
        if self.ocr:
            what = "ocr reads"
        elif self.source not in ("hub", "jsonl"):
            # Folders are lists of pictures, and synthetic rows are made around one.
            what = f"rows of the source {self.source} have"
        else:
            return self
        raise ValueError(f"pictures is {self.pictures}, but {what} a picture; leave it at every")

    def paths(self) -> Iterator[tuple[str, str]]:
        """Yield (setting, path) of the files and folders that the rows are read from."""
        for name in PLACES:
            place = getattr(self, name)
            if place:
                yield name, place


class TaskConfig(Section):
    """One task: its rows, and how a row becomes a prompt and an answer."""

    name: AdapterName = Field(description="Name of the adapter and of the expert in answers")
    task: str = Field("", description="Kind of task, for reports")
    description: str = Field("", description="What the expert does, for people")
    dataset: TaskDataConfig = Field(description="Where its rows come from")
    prompt: str = Field(
        "{prompt}", min_length=1, description="Template of a prompt, with columns in braces"
    )
    answer: str = Field(
        "{answer}", min_length=1, description="Template of an answer, with columns in braces"
    )
    metric: Literal["exact", "cer", "iou", "count", "caption"] = Field(
        "exact", description="How answers are judged"
    )
