"""The report of a stack that predicts text, and its tables."""

from typing import ClassVar, Literal, NamedTuple

from pydantic import Field

from .base import BaseReport, Difference, Interval, RateSearch, ReportPart

ByDomain = dict[str, float]
# an "expert" knows one domain and the "oracle" is told which; the others serve any text, a "joint"
# mixture being trained end to end
RowKind = Literal["part", "expert", "dense", "joint", "merge", "router", "oracle"]
# "undecided": too few documents for an interval
Verdict = Literal["better", "worse", "tie", "undecided"]


class LanguageModelFacts(ReportPart):
    """Sizes of the stack."""

    layers: int
    d_model: int
    d_ff: int
    vocab_size: int
    context_tokens: int
    top_k: int = Field(description="experts that run per token")
    active_parameters: int = Field(description="parameters that run per token")
    total_parameters: int
    expert_bytes: int | None = Field(None, description="of one expert's own weights, as stored")


class TextCounts(ReportPart):
    """How much text stands behind the figures, by domain."""

    test_tokens: dict[str, int] = Field(description="tokens that are predicted")
    test_documents: dict[str, int]
    train_tokens: dict[str, int]
    too_few: tuple[str, ...] = Field((), description="domains with too few documents for a verdict")


class QualityRow(ReportPart):
    """One model, or one way of mixing models, on the held-out text."""

    name: str
    kind: RowKind
    axis: str = Field("", description="what it has in common with the stack")
    bits_per_byte: ByDomain
    mean: float = Field(description="bits per byte, mean over domains")
    interval: Interval | None = Field(
        description="95 % interval of mean, bits per byte; None where documents are too few"
    )
    intervals: dict[str, Interval] = Field(
        {},
        description="95 % interval of bits per byte, by domain; none of one with too few "
        "documents, nor in reports of before there were any",
    )
    perplexity: ByDomain = Field(description="per token")
    mean_perplexity: float = Field(description="exp of the mean loss over domains")
    active_parameters: int = Field(description="parameters that run per token")
    total_parameters: int
    flops_per_token: int = Field(description="forward pass")
    train_tokens: int | None = Field(description="tokens that went into it, all jobs together")
    oracle_gain: float | None = Field(
        description="share of the oracle's gain over the trunk; None where the oracle gains nothing"
    )
    versus_stack: Difference | None = Field(
        description="row less stack, bits per byte; None for the stack itself"
    )
    is_stack: bool = Field(description="whether this is what the run serves")


class OptOutRow(ReportPart):
    """The stack with one expert and its gate rows taken away."""

    removed: str
    ratio: ByDomain = Field(description="perplexity without the expert over perplexity with it")
    delta_bits: ByDomain = Field(description="bits per byte without the expert less with it")


# a pair in JSON too, and the fields have names here
class ExpertShare(NamedTuple):
    """An expert and the share of tokens that it takes."""

    expert: str
    share: float


class LayerRouting(ReportPart):
    """Where one layer sends tokens."""

    layer: int
    share: dict[str, tuple[float, ...]] = Field(
        description="by domain, share of its tokens that each expert takes, in the experts' order"
    )
    agreement: float | None = Field(description="share of tokens whose first choice is their own")
    entropy: float = Field(description="of the load, nats")
    max_violation: float = Field(description="MaxVio of arXiv 2408.15664; 0 is an even load")


class TokenRouting(ReportPart):
    """Where the router sends tokens, mean over layers; domains weigh the same."""

    layers: tuple[LayerRouting, ...]
    share: dict[str, tuple[float, ...]] = Field(description="as a layer's, mean over layers")
    agreement: float | None = Field(description="as a layer's, mean over layers")
    agreement_by_domain: ByDomain
    entropy: float = Field(description="of the load, nats")
    max_entropy: float = Field(description="of an even load, nats")
    max_violation: float
    least: ExpertShare
    most: ExpertShare
    dead: tuple[str, ...] = Field(description="experts that get next to nothing")


class PromptRow(ReportPart):
    """Texts that are routed by their first tokens, for one number of them."""

    prompt_tokens: int
    agreement: float | None = Field(
        description="share of texts of a domain with an expert that reach it, mean over domains"
    )
    base_share: float | None = Field(
        description="share of the other domains' texts that the base reads, mean over "
        "domains; None where every domain has an expert"
    )
    bits_per_byte: ByDomain
    mean: float = Field(description="bits per byte, mean over domains")
    is_served: bool


class TextRouting(ReportPart):
    """Where a router that chooses one expert for a whole text sends texts."""

    choices: tuple[str, ...] = Field(description="experts, then the base")
    prompt_tokens: int = Field(description="first tokens of a text, which choose")
    temperature: float
    threshold: float = Field(description="probability of an expert below which the base reads")
    texts: dict[str, tuple[int, ...]] = Field(description="by domain, texts that each choice reads")
    agreement_by_domain: ByDomain = Field(description="of domains with an expert")
    prompts: tuple[PromptRow, ...] = Field(description="by the number of first tokens")


class ActiveRow(ReportPart):
    """The stack with top_k experts per token, not trained again."""

    top_k: int
    bits_per_byte: ByDomain
    mean: float = Field(description="bits per byte, mean over domains")
    interval: Interval | None
    active_parameters: int


class DomainMatrix(ReportPart):
    """The trunk, each expert alone, and the stack, on every domain."""

    rows: tuple[str, ...] = Field(description="the trunk first, the stack last")
    bits_per_byte: tuple[tuple[float, ...], ...] = Field(
        description="a line per row, in the domains' order"
    )


class Win(ReportPart):
    """The stack against one rival."""

    against: str
    axis: str = Field(description="what the two have in common")
    difference: float = Field(description="rival less stack, bits per byte")
    interval: Interval | None
    verdict: Verdict = Field(description="what the stack is")


class WrittenText(NamedTuple):
    """What one network wrote."""

    row: str  # of `quality`
    text: str


class Span(ReportPart):
    """Tokens of a text, one after another, that have one speaker."""

    speaker: str = Field(description="an expert, or the base")
    tokens: int
    text: str


class SampleText(ReportPart):
    """The beginning of a held-out text, and who read each of its tokens."""

    domain: str
    spans: tuple[Span, ...]
    goes_on: bool = Field(description="whether the text is longer")


class Continuation(ReportPart):
    """How one held-out text goes on, and how networks go on with it."""

    domain: str
    prompt: str = Field(description="the beginning that all were given")
    held_out: str = Field(description="what stands there")
    written: tuple[WrittenText, ...] = Field(description="greedily, by each of the same rows")
    spans: tuple[Span, ...] = Field((), description="the stack's, by who chose each token")


class LanguageReport(BaseReport):
    """The report of a stack that predicts text."""

    texts: ClassVar[tuple[str, ...]] = ("continuations", "samples")

    kind: Literal["language"] = "language"
    domains: tuple[str, ...] = ()
    labels: dict[str, str] = Field(
        {}, description="by domain, what its data calls it, where that is not its name"
    )
    model: LanguageModelFacts | None = None
    data: TextCounts | None = None
    quality: tuple[QualityRow, ...] = Field((), description="the stack and everything to beat")
    opt_out: tuple[OptOutRow, ...] = Field((), description="when one expert leaves")
    routing: TokenRouting | None = Field(None, description="where tokens go")
    text_routing: TextRouting | None = Field(
        None, description="where texts go, when one expert reads a whole text"
    )
    active: tuple[ActiveRow, ...] = Field((), description="one to all experts per token")
    matrix: DomainMatrix | None = Field(None, description="who is good at what")
    wins: tuple[Win, ...] = ()
    rates: tuple[RateSearch, ...] = Field((), description="learning rates that were searched")
    continuations: tuple[Continuation, ...] = Field((), description="texts, as they are written on")
    samples: tuple[SampleText, ...] = Field((), description="texts, with who read each token")

    @property
    def too_few(self) -> tuple[str, ...]:
        """Domains with too few test documents for a verdict."""
        return self.data.too_few if self.data else ()

    @property
    def stack(self) -> QualityRow | None:
        """The row of what the run serves."""
        return next((row for row in self.quality if row.is_stack), None)

    @property
    def trunk(self) -> QualityRow | None:
        """The row of the shared part alone."""
        return next((row for row in self.quality if row.kind == "part"), None)
