"""Documents of text: where they come from, how they become domains and tokens."""

from typing import Literal, Self

from pydantic import Field, model_validator

from .base import Name, Section, Share, not_hashed
from .run import RunConfig

# What data/sources/installed.py finds on every machine; here so that defaults need no data layer.
INSTALLED_DOMAINS = ("python", "headers", "manual", "licences")


class FilesConfig(Section):
    """One entry of data.files."""

    paths: tuple[str, ...] = Field(
        min_length=1,
        description="Globs or fsspec URLs of .txt .md .jsonl .parquet .csv, compressed or not; "
        "relative ones start at the configuration file's folder",
    )
    domain: Name | None = Field(
        None, description="Label of every document here; none: read from data.label_field"
    )


class HubConfig(Section):
    """One entry of data.hub: a dataset that `datasets` can stream."""

    dataset: str = Field(description="Name on the Hub, as in `datasets.load_dataset`")
    subset: str | None = Field(None, description="Configuration name of the dataset")
    split: str = Field("train", description="Split to stream")
    # Required: without it the Hub's newest would be read, and the same configuration would not
    # give the same run.
    revision: str = Field(description="Commit or tag to pin, so that a rerun reads the same text")
    domain: Name | None = Field(
        None, description="Label of every document here; none: read from data.label_field"
    )


class DataConfig(Section):
    """Where documents come from and which are held out."""

    source: Literal["installed", "files", "hub"] = Field(
        "installed", description="installed (real text found on every machine), files, or hub"
    )
    files: tuple[FilesConfig, ...] = Field((), description="What to read when source is files")
    hub: tuple[HubConfig, ...] = Field((), description="What to stream when source is hub")
    text_field: str = Field("text", description="Column that holds a document's text")
    label_field: str = Field("domain", description="Column that holds a document's domain")
    split_field: str | None = Field(
        None, description="Column with train, valid or test; none: split by a hash of the text"
    )
    megabytes_per_domain: float | None = Field(
        None,
        gt=0,
        description="Stop reading a label after so many MB (10^6 bytes) of text; none: no limit",
    )
    min_document_bytes: int = Field(
        16, ge=1, description="Shorter documents are dropped and counted, bytes"
    )
    max_document_bytes: int = Field(
        65_536, ge=1024, description="Longer documents are cut into pieces of this, bytes"
    )
    max_bad_share: Share = Field(
        0.05, description="Unreadable share of documents above which preprocess stops"
    )
    valid_share: float = Field(
        0.05, gt=0, lt=0.5, description="Share of documents held out for early stopping"
    )
    test_share: float = Field(
        0.05, gt=0, lt=0.5, description="Share of documents held out for the report"
    )
    seed: int = Field(
        0, ge=0, description="Seed of splits, samples and clusters (training has its own)"
    )

    @model_validator(mode="after")
    def _source_is_given(self) -> Self:
        # A source's entries have its name; one without entries has nothing to be given
        if getattr(self, self.source, None) == ():
            raise ValueError(
                f"source is {self.source}, so data.{self.source} needs at least one entry"
            )
        return self


class PartitionConfig(Section):
    """How documents become domains, one per expert."""

    by: Literal["labels", "clusters", "random", "curriculum"] = Field(
        "labels",
        description="labels, clusters (TF-IDF, balanced k-means), random, or curriculum (by "
        "difficulty)",
    )
    domains: tuple[Name, ...] = Field(
        INSTALLED_DOMAINS, description="Labels to keep, in expert order, when by is labels"
    )
    count: int = Field(4, ge=1, le=256, description="Number of domains when by is not labels")
    difficulty: Literal["length", "rarity", "compression"] = Field(
        "compression", description="Score that orders documents when by is curriculum"
    )
    sample_documents: int = Field(
        20_000, ge=10, description="Documents that clusters and difficulty are fitted on"
    )
    min_tokens: int = Field(
        10_000, ge=1, description="Fewest training tokens of a domain; less is an error"
    )
    overlap: float = not_hashed(
        0.1, "Share of general text (all domains) in an expert's batches", ge=0.0, lt=1.0
    )

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        if self.by != "labels":
            return self
        if not self.domains or len(set(self.domains)) < len(self.domains):
            raise ValueError("domains must name at least one label, each once")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """Domain names in expert order."""
        if self.by == "labels":
            return self.domains
        stems = {"clusters": "cluster", "random": "random", "curriculum": "level"}
        stem = stems[self.by]
        return tuple(f"{stem}-{i}" for i in range(self.count))


class TokenizerConfig(Section):
    """Byte-level BPE trained on the mixture, or a pretrained one."""

    pretrained: str | None = Field(
        None, description="Folder, tokenizer.json or Hub name; none: train one"
    )
    revision: str | None = Field(None, description="Commit to pin when pretrained is a Hub name")
    # At least one entry per byte, the end of a text, and one merge.
    vocab_size: int = Field(
        4096, ge=258, le=2**20, description="Entries to train, with the end-of-text token"
    )
    sample_megabytes: float = Field(
        20.0, gt=0, description="Text the tokenizer is trained on, MB, equal per domain"
    )


class TextRunConfig(RunConfig):
    """A run that is trained on documents, of whatever family: what `data/text` reads of it."""

    data: DataConfig = Field(DataConfig(), description="Where documents come from")
    partition: PartitionConfig = Field(
        PartitionConfig(), description="How documents become domains"
    )
    tokenizer: TokenizerConfig = Field(TokenizerConfig(), description="How text becomes tokens")
