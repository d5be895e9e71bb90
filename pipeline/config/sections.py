"""The sections of an ffn_moe run, and those that every run has (Fit, Deploy, Runtime).

Defaults live in the classes; files state only what differs. A field marked `later` is not read by
the stage its section is named after, so changing it leaves that stage's artifacts alone.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from .base import Bytes, Name, Section, Share, later

INSTALLED_DOMAINS = ("python", "headers", "manual", "licences")


class Files(Section):
    """One entry of data.files."""

    paths: tuple[str, ...] = Field(
        min_length=1,
        description="Globs or fsspec URLs of .txt .md .jsonl .parquet .csv, compressed or not; "
        "relative ones start at the configuration file's folder",
    )
    domain: Name | None = Field(None, description="Label of every document here; none: read from data.label_field")


class Hub(Section):
    """One entry of data.hub: a dataset that `datasets` can stream."""

    dataset: str = Field(description="Name on the Hub, as in `datasets.load_dataset`")
    subset: str | None = Field(None, description="Configuration name of the dataset")
    split: str = Field("train", description="Split to stream")
    revision: str = Field(description="Commit or tag to pin, so that a rerun reads the same text")
    domain: Name | None = Field(None, description="Label of every document here; none: read from data.label_field")


class Data(Section):
    """Where documents come from and which are held out."""

    source: Literal["installed", "files", "hub"] = Field(
        "installed", description="installed (real text found on every machine), files, or hub"
    )
    files: tuple[Files, ...] = Field((), description="What to read when source is files")
    hub: tuple[Hub, ...] = Field((), description="What to stream when source is hub")
    text_field: str = Field("text", description="Column that holds a document's text")
    label_field: str = Field("domain", description="Column that holds a document's domain")
    split_field: str | None = Field(
        None, description="Column with train, valid or test; none: split by a hash of the text"
    )
    megabytes_per_domain: float | None = Field(
        None, gt=0, description="Stop reading a label after so many MB (10^6 bytes) of text; none: no limit"
    )
    min_document_bytes: int = Field(16, ge=1, description="Shorter documents are dropped and counted, bytes")
    max_document_bytes: int = Field(65_536, ge=1024, description="Longer documents are cut into pieces of this, bytes")
    max_bad_share: Share = Field(0.05, description="Unreadable share of documents above which preprocess stops")
    valid_share: float = Field(0.05, gt=0, lt=0.5, description="Share of documents held out for early stopping")
    test_share: float = Field(0.05, gt=0, lt=0.5, description="Share of documents held out for the report")
    seed: int = Field(0, ge=0, description="Seed of splits, samples and clusters (training has its own)")

    @model_validator(mode="after")
    def _source_is_given(self) -> Self:
        if self.source != "installed" and not getattr(self, self.source):
            raise ValueError(f"source is {self.source}, so data.{self.source} needs at least one entry")
        return self


class Partition(Section):
    """How documents become domains, one per expert."""

    by: Literal["labels", "clusters", "random", "curriculum"] = Field(
        "labels", description="labels, clusters (TF-IDF, balanced k-means), random, or curriculum (by difficulty)"
    )
    domains: tuple[Name, ...] = Field(
        INSTALLED_DOMAINS, description="Labels to keep, in expert order, when by is labels"
    )
    count: int = Field(4, ge=1, le=256, description="Number of domains when by is not labels")
    difficulty: Literal["length", "rarity", "compression"] = Field(
        "compression", description="Score that orders documents when by is curriculum"
    )
    sample_documents: int = Field(20_000, ge=10, description="Documents that clusters and difficulty are fitted on")
    min_tokens: int = Field(10_000, ge=1, description="Fewest training tokens of a domain; less is an error")
    overlap: float = later(0.1, "Share of general text (all domains) in an expert's batches", ge=0.0, lt=1.0)

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        if self.by == "labels" and (not self.domains or len(set(self.domains)) < len(self.domains)):
            raise ValueError("domains must name at least one label, each once")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """Domain names in expert order."""
        stem = {"clusters": "cluster", "random": "random", "curriculum": "level"}
        return self.domains if self.by == "labels" else tuple(f"{stem[self.by]}-{i}" for i in range(self.count))


class Tokenizer(Section):
    """Byte-level BPE trained on the mixture, or a pretrained one."""

    pretrained: str | None = Field(None, description="Folder, tokenizer.json or Hub name; none: train one")
    revision: str | None = Field(None, description="Commit to pin when pretrained is a Hub name")
    vocab_size: int = Field(4096, ge=258, le=2**20, description="Entries to train, with the end-of-text token")
    sample_megabytes: float = Field(20.0, gt=0, description="Text the tokenizer is trained on, MB, equal per domain")


class Fit(Section):
    """Settings of one training run; give exactly one of steps, epochs, tokens."""

    steps: int | None = Field(None, ge=0, description="Optimizer steps")
    epochs: float | None = Field(None, gt=0, description="Passes over the training tokens")
    tokens: int | None = Field(None, gt=0, description="Training tokens")
    batch_sequences: int = Field(16, ge=1, description="Sequences per optimizer step")
    micro_batch_sequences: int | None = Field(
        None, ge=1, description="Sequences per forward pass, the rest is accumulated; none: chosen by the plan"
    )
    moments: Literal["fp32", "bf16", "int8"] | None = Field(
        None,
        description="Adam's two moments (int8 needs bitsandbytes); none: fp32, or less where memory_budget asks for it",
    )
    gradients: Literal["fp32", "bf16"] | None = Field(
        None, description="Sums of gradients over micro-batches; none: fp32, or bf16 where memory_budget asks for it"
    )
    checkpointing: bool | None = Field(
        None, description="Make each layer's activations again in the backward pass; none: where memory_budget asks"
    )
    fuse_optimizer: bool = Field(
        False,
        description="Step inside the backward pass, so that gradients never add up; needs one micro-batch and "
        "clip_norm 0",
    )
    compile: bool = Field(False, description="torch.compile the forward pass (needs a C++ compiler; about a minute)")
    lr: float = Field(1e-3, gt=0, description="Peak learning rate")
    min_lr_share: Share = Field(0.1, description="Learning rate at the end as a share of the peak")
    warmup_steps: int = Field(20, ge=0, description="Steps of linear warm-up")
    schedule: Literal["cosine", "constant"] = Field("cosine", description="Learning rate after warm-up")
    weight_decay: float = Field(0.1, ge=0, description="AdamW decay of matrices; vectors get none")
    beta2: float = Field(0.95, gt=0, lt=1, description="AdamW second-moment decay; the first is 0.9")
    clip_norm: float = Field(1.0, ge=0, description="Largest gradient norm; 0: no clipping")
    eval_every_steps: int = Field(100, ge=0, description="Steps between evaluations; 0: only at the end")
    eval_tokens: int = Field(16_384, ge=1, description="Validation tokens per evaluation")
    patience: int = Field(0, ge=0, description="Evaluations without improvement before stopping; 0: never")
    keep: Literal["best", "last"] = Field("best", description="State that becomes the artifact")

    def resolve_steps(self, context_tokens: int, epoch_tokens: int) -> int:
        """Return optimizer steps, whichever way the duration was given."""
        if self.steps is not None:
            return self.steps
        wanted = self.tokens if self.tokens is not None else self.epochs * epoch_tokens
        return max(1, round(wanted / (self.batch_sequences * context_tokens)))

    @model_validator(mode="after")
    def _one_duration(self) -> Self:
        if sum(x is not None for x in (self.steps, self.epochs, self.tokens)) > 1:
            raise ValueError("give only one of steps, epochs, tokens")
        return self

    @model_validator(mode="after")
    def _fused_steps_are_whole(self) -> Self:
        if self.fuse_optimizer and self.clip_norm:
            raise ValueError(f"fuse_optimizer needs clip_norm 0, not {self.clip_norm:g}: it knows no norm in time")
        if self.fuse_optimizer and self.micro_batch_sequences not in (None, self.batch_sequences):
            raise ValueError(
                f"fuse_optimizer steps in every backward pass, so micro_batch_sequences can only be "
                f"batch_sequences {self.batch_sequences}, not {self.micro_batch_sequences}"
            )
        return self


class Trunk(Fit):
    """The shared trunk and its temporary feed-forward network, the dummy."""

    init: str | None = Field(None, description="Folder or Hub name of a Qwen3, Llama or Mistral model; none: new")
    revision: str | None = Field(None, description="Commit to pin when init is a Hub name")
    layers: int = Field(4, ge=1, description="Transformer layers (new trunk)")
    d_model: int = Field(192, ge=8, description="Width of the residual stream (new trunk)")
    heads: int = Field(3, ge=1, description="Attention heads (new trunk)")
    kv_heads: int | None = Field(None, ge=1, description="Key-value heads; none: as many as heads")
    head_dim: int | None = Field(None, ge=2, description="Width of a head; none: d_model / heads")
    d_ff: int = Field(512, ge=8, description="Width of the dummy's and each expert's SwiGLU (new trunk)")
    context_tokens: int = Field(256, ge=8, description="Tokens per training sequence")
    rope_theta: float = Field(10_000.0, gt=0, description="Base of the rotary embedding (new trunk)")
    tie_embeddings: bool = Field(True, description="LM head shares the embedding's weights (new trunk)")
    domains: tuple[Name, ...] | None = Field(None, description="Domains the trunk sees; none: all")
    mixture: Literal["natural", "equal"] = Field(
        "natural", description="Share of domains in a batch: by size, or equal"
    )
    anchor: Literal["discard", "keep"] = later(
        "discard", "keep: the dummy stays in the stack as expert 0; discard: it only helps training"
    )

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.head_dim is None and self.d_model % self.heads:
            raise ValueError(f"d_model {self.d_model} is not a multiple of heads {self.heads}; set head_dim")
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")
        if (self.head_dim or self.d_model // self.heads) % 2:
            raise ValueError("the width of a head must be even (rotary embedding)")
        return self


class Expert(Fit):
    """One expert: a feed-forward network per layer, trained on its own domain over the frozen trunk."""

    init: Literal["trunk", "fresh"] = Field("trunk", description="Start from a copy of the dummy, or at random")
    coordinate: bool = Field(
        False, description="Train beside the frozen dummy with a two-way gate (FlexOlmo) instead of alone"
    )
    coordinate_bias: float = Field(-0.5, le=0, description="Start of the expert's gate bias when coordinate is on")
    z_weight: float = Field(1e-3, ge=0, description="z-loss weight of the two-way gate when coordinate is on")
    statistics_tokens: int = Field(65_536, ge=1, description="Own tokens summed into the expert's router statistics")
    domains: tuple[Name, ...] | None = later(None, "Domains that get an expert, in order; none: all")


class Temperature(Section):
    """Softmax temperature of the gates while they train: linear, then constant; folded into the export."""

    start: float = Field(1.0, gt=0, description="Temperature at the first step")
    end: float = Field(1.0, gt=0, description="Temperature at the end of the ramp and after")
    epochs: float | None = Field(
        None, gt=0, description="Length of the ramp in passes over the training tokens; none: all of router training"
    )


class Router(Fit):
    """One linear gate per layer; zero steps assemble the stack without any training."""

    init: Literal["uniform", "random", "centroid", "ridge", "rows"] = Field(
        "ridge",
        description="Gate rows before training: zeros, random, mean input, closed form (DUME), or the coordinated "
        "experts' own rows (FlexOlmo)",
    )
    ridge_lambda: float = Field(1e-2, gt=0, description="Ridge penalty relative to the mean squared input")
    margin: float = Field(
        4.0, gt=0, description="Mean lead of a domain's own expert in gate logits after centroid or ridge, nats"
    )
    top_k: int = Field(2, ge=1, description="Experts that run per token")
    temperature: Temperature = Field(Temperature(), description="Softmax temperature while training")
    balance: Literal["none", "aux", "bias"] = Field(
        "none",
        description="Load balance: none, auxiliary loss (Switch, divided by k), or selection bias (aux-loss-free)",
    )
    balance_weight: float = Field(1e-2, ge=0, description="Weight of the auxiliary loss, or step of the bias")
    z_weight: float = Field(1e-3, ge=0, description="Weight of the router z-loss (ST-MoE)")
    noise: float = Field(0.0, ge=0, description="Standard deviation of noise on gate logits while training")
    capacity_factor: float | None = Field(
        None, gt=0, description="Slots per expert relative to an even load while training; none: dropless"
    )

    @model_validator(mode="after")
    def _one_forward_pass(self) -> Self:
        if self.checkpointing:
            raise ValueError("checkpointing: the gates count the tokens of every forward pass, so none is made twice")
        return self


class Dense(Section):
    """Dense baselines, each named by what it has in common with the stack."""

    baselines: tuple[Literal["total", "path", "ffn", "wide", "scratch"], ...] = later(
        ("total", "path", "ffn", "wide"),
        "total: trunk continued, same total tokens; path: trunk continued, tokens of one expert's path; ffn: total, "
        "but only its FFN trains; wide: same active parameters, from zero; scratch: total, from zero",
    )
    lr: float | None = Field(None, gt=0, description="Peak learning rate of continued baselines; none: expert.lr")


class Evaluate(Section):
    """What the report measures."""

    tokens_per_domain: int = Field(32_768, ge=64, description="Test tokens per domain, whole documents")
    batch_sequences: int = Field(16, ge=1, description="Sequences per forward pass")
    bootstrap: int = Field(1000, ge=10, description="Resamples of documents behind each 95 % interval")
    min_expert_share: Share = Field(0.05, description="Least share of tokens of every expert (tertiary criterion)")
    gap_share: Share = Field(0.25, description="Share of dense's train-test gap to close (primary criterion)")


class Deploy(Section):
    """What becomes of the bundle; no result depends on it, so no address does."""

    upload: str | None = Field(
        None, min_length=1, description="Folder or fsspec URL (s3://bucket/path) for a checked copy; none: no copy"
    )


class Runtime(Section):
    """How a run is carried out; no result depends on it, so no address does."""

    threads: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        "auto",
        description="Processor threads per job; auto: measured as a job starts, 0: all cores over the "
        "parallel jobs (give a number where two runs must agree bit for bit)",
    )
    memory_budget: Bytes | None = Field(
        None, description="Most memory of a job above the level after imports, such as 350MB or 8GB; none: no limit"
    )
    save_every_s: float = Field(60.0, gt=0, description="Seconds between checkpoints")
    log_every_steps: int = Field(10, ge=1, description="Steps between history rows")
    wandb: Literal["off", "offline", "online"] = Field("off", description="Also log to Weights & Biases")
    wandb_project: str = Field("moleforge", description="Project name there")

    def most_threads(self, share: int) -> int:
        """Return the threads of a job whose share of the cores is that many; auto may settle for fewer."""
        return max(1, share) if self.threads in (0, "auto") else self.threads
