"""Where the router sends tokens: shares per domain and layer, agreement, entropy, balance.

Shares are drawn on one fixed scale from 0 to 100 %, so layers and runs can be compared by eye.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from .format import finite, fixed, percent, share
from .schema import ExpertShare, LanguageReport
from .table import Cell, Row, Table, at


def mean(report: LanguageReport) -> Table:
    """Share of each domain's tokens that each expert takes, mean over layers."""
    routing = report.routing
    table = _shares(
        report,
        routing.share if routing else {},
        title="Where tokens go",
        unit=" %",
        reading=(
            "Of each domain's routed tokens, the share that each expert takes, mean over layers; a "
            "row adds up to 100 %. Drawn as in BTX, figure 3, and FlexOlmo, figure 2."
        ),
        colours="Framed: the domain's own expert.",
    )
    if routing is None or not routing.agreement_by_domain:
        return table
    rows = []
    for row in table.rows:
        # no domain without an expert of its own has one
        agreement = Cell(share(routing.agreement_by_domain.get(row.name)))
        rows.append(replace(row, cells=(*row.cells, agreement)))
    return replace(table, columns=(*table.columns, "agreement"), rows=tuple(rows))


def layers(report: LanguageReport) -> list[Table]:
    """The same shares, one small table per layer."""
    if report.routing is None:
        return []
    # many of them side by side have no room for a reading or the sign of per cent
    found = report.routing.layers
    return [_shares(report, layer.share, title=f"layer {layer.layer}") for layer in found]


def facts(report: LanguageReport) -> list[tuple[str, str]]:
    """The routing in a few numbers, as pairs of name and value; empty without routing."""
    routing = report.routing
    if routing is None:
        return []
    # an entropy says little without the greatest that it could be
    entropy = f"{fixed(routing.entropy)} of {fixed(routing.max_entropy)} nats"
    return [
        ("agreement with the domain", share(routing.agreement, 1)),
        ("entropy of the load", entropy),
        ("MaxVio", fixed(routing.max_violation)),
        ("least used", _used(routing.least)),
        ("most used", _used(routing.most)),
        ("dead experts", ", ".join(routing.dead) or "none"),
    ]


def by_layer(report: LanguageReport) -> Table:
    """One line per layer: agreement, entropy and balance."""
    rows = []
    for layer in report.routing.layers if report.routing else ():
        cells = (
            Cell(share(layer.agreement, 1)),
            Cell(fixed(layer.entropy)),
            Cell(fixed(layer.max_violation)),
        )
        rows.append(Row(str(layer.layer), cells))
    return Table(
        name="Routing",
        title="Routing by layer",
        corner="layer",
        columns=("agreement", "entropy, nats", "MaxVio"),
        rows=tuple(rows),
        reading=(
            "Agreement: share of tokens sent to their own domain's expert. Entropy of the mean "
            "load, in nats; at most the logarithm of the number of experts. MaxVio: how far the "
            "busiest expert lies over an even load, relative to it; 0 is even (auxiliary-loss-free "
            "balancing, arXiv 2408.15664)."
        ),
    )


def _shares(
    report: LanguageReport,
    shares: Mapping[str, Sequence[float]],
    title: str,
    unit: str = "",
    reading: str = "",
    colours: str = "",
) -> Table:
    rows = []
    for domain in report.domains if shares else ():
        line = shares.get(domain, ())
        cells = []
        for i, expert in enumerate(report.experts):
            # heat and unit are for numbers only
            value = finite(at(line, i))
            text = percent(value) + (unit if value is not None else "")
            cells.append(Cell(text, heat=value, own=expert == domain))
        rows.append(Row(domain, tuple(cells)))
    return Table(
        name="Routing",
        title=title,
        corner="domain",
        columns=report.experts,
        rows=tuple(rows),
        reading=reading,
        colours=colours,
        scale=("0 %", "100 %"),
    )


def _used(most: ExpertShare) -> str:
    return f"{most.expert} ({share(most.share, 1)})"
