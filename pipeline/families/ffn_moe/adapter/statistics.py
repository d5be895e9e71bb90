"""What the router of adapters knows of a domain's texts: sums over what their first tokens are on
average.

They are sums, as those of FFN experts are: an expert comes or goes without anybody's text.

B texts, T tokens, S layers that are read, D model width, N pieces of texts.
"""

from ....data.text.mixture import DomainMixture
from ....hardware import uses_bf16
from ....model.language_model import LanguageModel, pieces
from ....model.router_init import FeatureStatistics
from ....protocols import Progress, quiet
from ... import Parts
from ..config import FfnMoeConfig
from ..parts import EVALUATION_SEQUENCES, batch_of, shards_of, training_rows
from .model import stored_base

# Of a model's layers, how far up the states are read: the middle tells texts apart, the last layers
# predict tokens
READ_AT = (0.5,)
# Tokens of a piece whose average is one entry of the sums
PIECE_TOKENS = 16


def read_layers(model: LanguageModel) -> tuple[int, ...]:
    """Return the layers whose states are read."""
    layers = model.config.num_hidden_layers
    return tuple(min(layers - 1, int(share * layers)) for share in READ_AT)


def general_statistics(cfg: FfnMoeConfig, parts: Parts) -> FeatureStatistics:
    """Return the sums over the trunk's own text, which everybody may know of who has the trunk."""
    shards = shards_of(parts, cfg.trunk_domains)
    rows = training_rows(cfg, shards, "statistics", cfg.trunk_domains, how="equal")
    base = stored_base(cfg, parts)
    return text_statistics(cfg, base, rows, cfg.expert.statistics_tokens, parts.progress)


def text_statistics(
    cfg: FfnMoeConfig,
    model: LanguageModel,
    rows: DomainMixture,
    tokens: int,
    progress: Progress = quiet,
) -> FeatureStatistics:
    """Return the sums over the first tokens of rows, cut into pieces, as the model without adapters
    reads them."""
    layers = read_layers(model)
    width = model.config.hidden_size
    statistics = FeatureStatistics.empty(len(layers), width)
    available = min(tokens, rows.tokens())
    wanted = max(1, available // rows.context_tokens)
    sequences = 1 if cfg.runtime.memory_budget else EVALUATION_SEQUENCES
    for at in range(0, wanted, sequences):
        progress(f"statistics of {wanted * rows.context_tokens:,} tokens", at / wanted)
        ids_BT = batch_of(rows, at, min(sequences, wanted - at))
        x_BTSD = model.states(ids_BT[:, :-1], layers, uses_bf16(cfg.dtype))
        x_SND = pieces(x_BTSD, PIECE_TOKENS).transpose(0, 1).cpu().double()
        statistics.sum_LD += x_SND.sum(1)
        statistics.gram_LDD += x_SND.mT @ x_SND
        statistics.tokens += x_SND.shape[1]
    return statistics
