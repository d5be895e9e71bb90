"""Documents of text: where they come from, how they become domains and tokens."""

import codecs
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from .base import Name, Section, Share, not_hashed
from .labels import DomainName, domain_name, label_text
from .paths import path_field
from .run import RunConfig

# What data/sources/installed.py finds on every machine; here so that defaults need no data layer.
INSTALLED_DOMAINS = ("python", "headers", "manual", "licences")


class FilesConfig(Section):
    """One entry of data.files."""

    paths: tuple[str, ...] = path_field(
        "glob",
        min_length=1,
        description="Globs or fsspec URLs, compressed or not (docs/data.md lists the formats); "
        "relative ones start at the configuration file's folder",
    )
    domain: DomainName | None = Field(
        None, description="Label of every document here; none: read from data.label_field"
    )
    format: Literal["auto", "text", "jsonl", "json", "csv", "tsv", "parquet", "arrow"] = Field(
        "auto", description="What the files are; auto: by their names"
    )
    encoding: str | None = Field(
        None,
        description="How text in them is encoded, such as cp1252; none: UTF-8, or what a byte "
        "order mark says",
    )
    documents: Literal["auto", "paragraphs", "file"] = Field(
        "auto",
        description="What a document is in a text file: what data.paragraph_bytes hold, ended at "
        "a paragraph's end, or the file; auto: the file, unless fewer than 20 text files match",
    )

    @field_validator("encoding")
    @classmethod
    def _is_encoding(cls, name: str | None) -> str | None:
        try:
            if name is not None:
                codecs.getincrementaldecoder(name)
                # Refuses what encodes no text, as hex does
                b" ".decode(name)
        except UnicodeDecodeError:
            pass  # a space of one byte, in an encoding of two
        except LookupError:
            raise ValueError(
                f"{name!r} is no encoding of text; cp1252, latin-1 or utf-16 would be"
            ) from None
        return name


class HubConfig(Section):
    """One entry of data.hub: a dataset that `datasets` can stream."""

    dataset: str = Field(description="Name on the Hub, as in `datasets.load_dataset`")
    subset: str | None = Field(None, description="Configuration name of the dataset")
    split: str = Field("train", description="Split to stream")
    # Required: without it the Hub's newest would be read, and the same configuration would not
    # give the same run.
    revision: str = Field(description="Commit or tag to pin, so that a rerun reads the same text")
    domain: DomainName | None = Field(
        None, description="Label of every document here; none: read from data.label_field"
    )
    allow_fewer_rows: bool = Field(
        False, description="Take a split that has fewer rows than its own metadata says"
    )


class DataConfig(Section):
    """Where documents come from and which are held out."""

    source: Literal["installed", "files", "hub"] = Field(
        "installed", description="installed (real text found on every machine), files, or hub"
    )
    files: tuple[FilesConfig, ...] = Field((), description="What to read when source is files")
    hub: tuple[HubConfig, ...] = Field((), description="What to stream when source is hub")
    text_field: str = Field(
        "text", description="Column that holds a document's text; `doc.body`: a field inside one"
    )
    label_field: str = Field(
        "domain", description="Column that holds a document's domain; `meta.source` as above"
    )
    split_field: str | None = Field(
        None, description="Column with train, valid or test; none: split by a hash of the text"
    )
    megabytes_per_domain: float | None = Field(
        None,
        gt=0,
        description="Stop reading a label after so many MB (10^6 bytes) of text, files in their "
        "order; where domains are clusters all text has one label unless its entry names a "
        "domain; none: no limit",
    )
    min_document_bytes: int = Field(
        16, ge=1, description="Shorter documents are dropped and counted, bytes"
    )
    max_document_bytes: int = Field(
        65_536, ge=1024, description="Longer documents are cut into pieces of this, bytes"
    )
    paragraph_bytes: int = Field(
        4096,
        ge=64,
        description="Size of the documents that a long text file is split into, bytes at most",
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
    domains: tuple[DomainName, ...] = Field(
        INSTALLED_DOMAINS,
        description="Labels to keep, in expert order, when by is labels; one that is no name "
        "(`C++`) gets one",
    )
    labels: dict[Name, tuple[str, ...]] = Field(
        {},
        description="Labels of the data by the domain they belong to, all of them, where its name "
        "is not the only one: `{law: [Family law, Criminal law]}`",
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

    @model_validator(mode="before")
    @classmethod
    def _keep_labels(cls, raw: Any) -> Any:
        """Note the label of each domain that gets a name for it, so that data and reports have
        it."""
        if not isinstance(raw, dict):
            return raw
        given = raw.get("labels") or {}
        domains = raw.get("domains")
        if not isinstance(given, dict) or not isinstance(domains, list | tuple):
            return raw
        labels = {}
        for name, found in given.items():
            each = found if isinstance(found, list | tuple) else [found]
            labels[label_text(name)] = [label_text(label) for label in each]
        for domain in domains:
            label = label_text(domain)
            if label is not None and domain_name(label) != label:
                labels.setdefault(domain_name(label), [label])
        return raw | {"labels": labels}

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        if self.by != "labels":
            return self
        if not self.domains:
            raise ValueError("domains must name at least one label")
        again = sorted({name for name in self.domains if self.domains.count(name) > 1})
        if again:
            raise ValueError(
                f"domains must name each label once, and has {', '.join(again)} twice; where two "
                "labels get one name, name the domains yourself and give their labels under labels"
            )
        strange = [name for name in self.labels if name not in self.domains]
        if strange:
            raise ValueError(f"labels are given for {', '.join(strange)}, not one of domains")
        every = [label for labels in self.labels.values() for label in labels]
        twice = sorted({label for label in every if every.count(label) > 1})
        if twice:
            raise ValueError(f"labels: {', '.join(twice)} belongs to two domains")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """Domain names in expert order."""
        if self.by == "labels":
            return self.domains
        stems = {"clusters": "cluster", "random": "random", "curriculum": "level"}
        stem = stems[self.by]
        return tuple(f"{stem}-{i}" for i in range(self.count))

    @property
    def domain_of(self) -> dict[str, str]:
        """Domain by label: its own name where it has no others."""
        found: dict[str, str] = {}
        for name in self.names:
            found |= dict.fromkeys(self.labels.get(name, (name,)), name)
        return found

    @property
    def shown_labels(self) -> dict[str, str]:
        """By domain, what its data calls it, for people; without those called by their name."""
        found: dict[str, str] = {}
        for name in self.names:
            label = ", ".join(self.labels.get(name, (name,)))
            if label != name:
                found[name] = label
        return found


class TokenizerConfig(Section):
    """Byte-level BPE trained on the mixture, or a pretrained one."""

    pretrained: str | None = path_field(
        "model",
        None,
        description="Folder, tokenizer.json, .gguf file, package:NAME or Hub name; none: that of a "
        "pretrained trunk, or train one",
    )
    revision: str | None = Field(None, description="Commit to pin when pretrained is a Hub name")
    max_lost_share: Share = not_hashed(
        0.01,
        "Share of the text's bytes that a pretrained one may lose (lower-cased, unknown, dropped) "
        "before preprocess refuses it",
    )
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

    @property
    def tokenizer_domains(self) -> tuple[str, ...]:
        """The domains whose text a tokenizer is trained on, where documents have labels."""
        return self.partition.names
