"""Where the router sends tokens: shares per domain and layer, agreement, entropy, balance.

Shares are drawn on one fixed scale from 0 to 100 %, so layers and runs can be compared by eye.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from .format import count, finite, fixed, percent, share
from .schema.language import ExpertShare, LanguageReport
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


def texts(report: LanguageReport) -> Table:
    """Where whole texts go: by domain, how many of them each choice reads."""
    routing = report.text_routing
    if routing is None:
        return Table(name="Texts", title="", corner="", columns=(), rows=(), reading="")
    rows = []
    for domain in report.domains:
        line = routing.texts.get(domain, ())
        total = sum(line)
        cells = []
        for choice, read in zip(routing.choices, line, strict=False):
            heat = read / total if total else None
            cells.append(Cell(count(read), heat=heat, own=choice == domain))
        cells.append(Cell(share(routing.agreement_by_domain.get(domain))))
        rows.append(Row(domain, tuple(cells)))
    prompt = routing.prompt_tokens
    threshold = fixed(routing.threshold, 2)
    return Table(
        name="Texts",
        title="Where texts go",
        corner="domain",
        columns=(*routing.choices, "agreement"),
        rows=tuple(rows),
        reading=(
            f"Held-out texts of each domain, by who reads them after their first {prompt} tokens; "
            f"the base reads what no adapter reaches a probability of {threshold} on. Agreement: "
            "share that reaches the domain's own adapter."
        ),
        colours="Colour: share of the row; framed: the domain's own adapter.",
        scale=("0 %", "100 %"),
    )


def prompts(report: LanguageReport) -> Table:
    """How many first tokens it takes to choose."""
    rows = []
    for line in report.text_routing.prompts if report.text_routing else ():
        cells = [
            Cell(fixed(line.mean)),
            Cell(share(line.agreement, 1)),
            Cell(share(line.base_share, 1)),
        ]
        cells += [Cell(fixed(line.bits_per_byte.get(domain))) for domain in report.domains]
        note = "as served" if line.is_served else ""
        rows.append(Row(str(line.prompt_tokens), tuple(cells), note=note, main=line.is_served))
    return Table(
        name="Prompts",
        title="First tokens that choose",
        corner="tokens",
        columns=("mean", "agreement", "left to the base", *report.domains),
        rows=tuple(rows),
        reading=(
            "Bits per byte when so many tokens of a text, which the base says, choose who says the "
            "rest. Agreement: texts that reach their domain's own adapter; left to the base: those "
            "of domains without one."
        ),
    )


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
