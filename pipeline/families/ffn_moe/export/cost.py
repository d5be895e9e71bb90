"""What it takes to bring a run out of its store: bytes that are written and summed, memory beside
mapped files, operations.

No weight is opened, so that a plan can tell before anything is made. L layers, D model width,
F feed-forward width, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from ....train.flops import ExpertShape, JobCost
from ... import ExportWish
from .. import passes
from ..config import FfnMoeConfig
from ..cost import adapter_parameters, dense_width, stack_shape
from ..sections import ADAPTER, ANCHOR
from ..trunk_sizes import trunk_kind
from .job import on_the_hub

# Bytes of a number; one of q8_0 is of a block of 32 that share a scale. As stored: a model is of
# one dtype, and what computes has norms in fp32.
NUMBER_BYTES = {None: 4.0, "fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "q8_0": 34 / 32}
QUANTISED_ROWS = 4096  # of a matrix that are cast together
# Of a processor: code, buffers, and what the allocator keeps, as SmolLM2-135M and a model of 1.5 B
# took it (benchmarks/memory_stages.py)
BUNDLE_BYTES = 63_000_000
STOCK_BYTES = 54_000_000
GGUF_BYTES = 38_000_000
GGUF_ROW_BYTES = 200  # names and kinds of the embedding's rows
ADAPTERS_BYTES = 68_000_000  # PEFT among it, which no other format imports
ADAPTERS_ENTRY_BYTES = 1100  # the tokenizer beside that
COPY_BYTES = 10_000_000  # torch is not even imported
TEXT_BYTES = 100  # of the tokenizer's file, by entry
# Of a matrix's singular values: its change, LAPACK's copy of that, and the factors, which are as
# large and a square of the narrower side; four squares more are what gesdd works in
SVD_MATRICES = 3
SVD_SQUARES = 5


@dataclass(frozen=True)
class _Sizes:
    """The sizes of a run's parts."""

    cfg: FfnMoeConfig
    stack: passes.StackShape
    entries: int  # of the tokenizer
    kind: str  # of the trunk, as transformers calls it

    @property
    def stored(self) -> int:
        """Bytes of a number of the trunk and its own networks in their files."""
        return self.stack.stored or 4

    @property
    def ffn(self) -> int:
        """Numbers of feed-forward networks in every layer."""
        return self.stack.shape.ffn_parameters

    @property
    def matrix(self) -> int:
        """Bytes in fp32 of a network's matrix, which is the largest that is computed."""
        return 4 * self.stack.shape.d_model * self.stack.shape.d_ff

    @property
    def merging(self) -> int:
        """Matrices in fp32 while an expert's deltas are added to one: theirs, the sum, and the
        base's where it is stored in another dtype."""
        return 2 + (self.stored != 4) if self.is_merged else 0

    @property
    def embedding(self) -> int:
        """Numbers of the embedding, which is the largest tensor that is copied."""
        return self.stack.shape.vocab_size * self.stack.shape.d_model

    @property
    def share(self) -> float:
        """Of the layers those that have experts."""
        expert = self.stack.expert
        return 1.0 if expert is None else len(expert.layers) / self.stack.shape.layers

    @property
    def has_anchor(self) -> bool:
        """Whether the trunk's own networks are an expert of the stack."""
        return self.cfg.trunk.anchor == "keep"

    @property
    def adapter(self) -> int:
        """Numbers of one expert that is an adapter, or deltas."""
        if self.cfg.expert.form == ADAPTER:
            return adapter_parameters(self.cfg, self.stack.shape)
        expert = self.stack.expert
        return 0 if expert is None else self.stack.shape.expert_parameters(expert)

    @property
    def is_merged(self) -> bool:
        """Whether an expert as a model is deltas added to the trunk."""
        return self.cfg.expert.form != "full"

    @property
    def fills_all_layers(self) -> bool:
        """Whether the stock mixture knows no layers without experts."""
        return self.kind != "qwen3"

    def mixed(self, filled: bool) -> float:
        """Numbers of all experts' networks, and of those in layers without; `filled`: each has
        one there too."""
        members = len(self.cfg.experts) + self.has_anchor
        if filled:
            return members * self.ffn
        return self.ffn * (members * self.share + 1 - self.share)

    def merging_flops(self, experts: float) -> float:
        """Operations of the products of so many experts' factors."""
        rank = self.cfg.expert.adapter_rank if self.is_merged else 0
        return 2.0 * rank * experts * self.share * self.ffn


def writing_cost(
    cfg: FfnMoeConfig, made: Mapping[tuple[str, str | None], dict], wish: ExportWish | None
) -> JobCost | None:
    """Return what a run's bundle takes, or what is wanted of it; `made` has the metrics of finished
    jobs. None while the model is not on this machine."""
    stack = stack_shape(cfg)
    if stack is None:
        return None
    counted = made.get(("tokenizer", None), {}).get("vocab_size")
    sizes = _Sizes(cfg, stack, counted or stack.shape.vocab_size, trunk_kind(cfg))
    if wish is None:
        return _of_bundle(sizes)
    if wish.format == "hf" and wish.dtype is None:
        # The bundle's files, each compared with the list of sums, copied and read back
        written = _bundle_bytes(sizes)
        return _cost("export", wish.format, written, 3 * written, 0, COPY_BYTES, 0)
    if wish.rank:
        return _of_compressed(sizes, wish.rank, 1 if wish.expert else len(cfg.experts))
    if wish.format == "adapters":
        return _of_adapters(sizes)
    return _of_model(sizes, wish)


def _cost(
    stage: str,
    item: str | None,
    written: float,
    summed: float,
    flops: float,
    own: float,
    mapped: float,
) -> JobCost:
    return JobCost(
        stage,
        item,
        tokens=0,
        parameters=0,
        flops=flops,
        peak_bytes=int(own + mapped),
        mapped_bytes=int(mapped),
        written_bytes=int(written),
        summed_bytes=int(summed),
    )


def _bundle_bytes(sizes: _Sizes) -> float:
    """Return the bytes of a bundle's weights and tokenizer."""
    shape = sizes.stack.shape
    own = len(sizes.cfg.experts)
    stored = sizes.stored
    texts = TEXT_BYTES * sizes.entries
    if sizes.cfg.expert.form == ADAPTER:
        whole = (shape.trunk_parameters + sizes.ffn) * stored
        return whole + own * sizes.adapter * 4 + texts
    share = sizes.share
    # In layers without experts stands the trunk's network: once, or as everybody's
    plain = sizes.ffn * (1 - share)
    plain *= own + sizes.has_anchor if sizes.fills_all_layers else 1
    written = shape.trunk_parameters * stored + plain * stored
    written += sizes.ffn * share * (4 * own + stored * sizes.has_anchor)
    if sizes.is_merged:
        # Beside the merged ones the deltas and what they stand on
        written += sizes.ffn * stored + own * sizes.adapter * 4
    return written + texts + _dense_bytes(sizes)


def _dense_bytes(sizes: _Sizes) -> float:
    """Return the bytes of a dense model beside the stack, where a bundle is to hold one."""
    item = sizes.cfg.deploy.dense
    if item is None:
        return 0.0
    # What was trained is in fp32
    of_trunk = sizes.stored if item == "ffn" else 4
    networks = sizes.ffn * dense_width(sizes.cfg, item) / sizes.cfg.trunk.d_ff
    whole = sizes.stack.shape.trunk_parameters * of_trunk + networks * 4
    return whole + TEXT_BYTES * sizes.entries


def _of_bundle(sizes: _Sizes) -> JobCost:
    written = _bundle_bytes(sizes)
    own = float(BUNDLE_BYTES)
    experts = len(sizes.cfg.experts)
    whole = sizes.cfg.expert.is_whole or sizes.cfg.expert.form == ADAPTER
    # Files of the store are copied a block at a time; those that are renamed are summed twice, and
    # all of an artifact's once more when they lie there
    mapped = 0.0
    summed = 2 * written
    flops = 0.0
    if whole:
        summed += written if sizes.cfg.expert.form != ADAPTER else 0
    else:
        mapped = sizes.stack.model_bytes + experts * sizes.stack.expert_bytes
        own += sizes.merging * sizes.matrix
        flops = sizes.merging_flops(experts)
    return _cost("deploy", None, written, summed, flops, own, mapped)


def _of_adapters(sizes: _Sizes) -> JobCost:
    written = len(sizes.cfg.experts) * sizes.adapter * 4.0
    if on_the_hub(sizes.cfg) is None:
        # The trunk goes along
        written += sizes.stack.model_bytes
    own = ADAPTERS_BYTES + ADAPTERS_ENTRY_BYTES * sizes.entries
    # One expert after another
    mapped = sizes.stack.model_bytes + sizes.adapter * 4
    return _cost("export", "adapters", written, written, 0, own, mapped)


def _of_compressed(sizes: _Sizes, rank: int, experts: int) -> JobCost:
    """Return what so many full experts take that are compressed to a rank, a matrix at a time."""
    stack = sizes.stack
    layers = range(stack.shape.layers) if stack.expert is None else stack.expert.layers
    factors = 4.0 * stack.shape.expert_parameters(ExpertShape(tuple(layers), rank))
    written = experts * factors
    if on_the_hub(sizes.cfg) is None:
        written += stack.model_bytes
    narrow, wide = sorted((stack.shape.d_model, stack.shape.d_ff))
    # One expert's factors are kept until they are written
    own = ADAPTERS_BYTES + ADAPTERS_ENTRY_BYTES * sizes.entries + factors
    own += SVD_MATRICES * sizes.matrix + SVD_SQUARES * 4 * narrow**2
    mapped = stack.model_bytes + stack.expert_bytes
    # Golub and Van Loan, Matrix Computations, of the thin factors by a triangle first
    matrices = 3 * len(layers) * experts
    flops = matrices * (6.0 * wide * narrow**2 + 20.0 * narrow**3)
    return _cost("export", "adapters", written, written, flops, own, mapped)


def _of_model(sizes: _Sizes, wish: ExportWish) -> JobCost:
    """Return what a model takes that is written tensor by tensor."""
    shape = sizes.stack.shape
    experts = len(sizes.cfg.experts)
    gguf = wish.format == "gguf"
    is_mean = wish.dense or wish.format == "dense"
    is_dense = is_mean or wish.expert is not None
    # The trunk alone stays what it is, unlike what was trained
    as_stored = wish.dtype is None and (gguf or wish.expert == ANCHOR)
    unit = NUMBER_BYTES[wish.dtype] if wish.dtype or wish.expert != ANCHOR else sizes.stored
    # llama.cpp knows no layers without experts, and keeps each tensor as it is stored
    networks = sizes.ffn if is_dense else sizes.mixed(gguf or sizes.fills_all_layers)
    of_trunk = sizes.stored if as_stored else unit
    written = shape.trunk_parameters * of_trunk + networks * unit
    written += TEXT_BYTES * sizes.entries
    read = 0.0 if wish.expert == ANCHOR else float(1 if wish.expert else experts)
    # One tensor at a time: as it is made, and as it is rounded beside that
    merged = sizes.merging if read else 0
    computed = merged + (1 if merged else 2) * is_mean
    held = 1 if computed else 0
    rounded = held + unit / 4 if unit != 4 and wish.dtype else 0
    copied = sizes.embedding * of_trunk if of_trunk != sizes.stored else 0.0
    if wish.dtype == "q8_0":
        copied = QUANTISED_ROWS * shape.d_model * (4 * (sizes.stored != 4) + 2 * unit)
    own = float(STOCK_BYTES)
    if gguf:
        own = GGUF_BYTES + GGUF_ROW_BYTES * shape.vocab_size
    own += max(sizes.matrix * max(computed, rounded), copied)
    one = sizes.adapter * 4 if sizes.is_merged else sizes.stack.expert_bytes
    mapped = shape.trunk_parameters * sizes.stored + read * one
    if sizes.is_merged or sizes.share < 1 or not read or (sizes.has_anchor and not is_dense):
        mapped += sizes.ffn * sizes.stored
    flops = sizes.merging_flops(read)
    return _cost("export", wish.format, written, written, flops, own, mapped)
