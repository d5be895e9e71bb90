"""T5, where the router sends tokens: shares per domain and layer, agreement, entropy, balance.

Shares are drawn on one fixed scale from 0 to 100 %, so layers and runs can be compared by eye.
"""

from dataclasses import replace

from .format import DASH, finite, fixed, share
from .table import Cell, Row, Table, at, domains_of, part


def mean(report: dict) -> Table:
    """T5: share of each domain's tokens that each expert takes, mean over layers."""
    shares = part(report, "T5").get("share")
    reading = (
        "Of each domain's routed tokens, the share that each expert takes, mean over layers; a row adds up to 100 %. "
        "Drawn as in BTX, figure 3, and FlexOlmo, figure 2."
    )
    table = _shares(report, shares, "Where tokens go", reading)
    agreement = part(part(report, "T5"), "agreement_by_domain")
    if not agreement:
        return table
    rows = (
        replace(row, cells=(*row.cells, Cell(share(agreement.get(row.name))))) for row in table.rows
    )
    return replace(table, columns=(*table.columns, "agreement"), rows=tuple(rows))


def layers(report: dict) -> list[Table]:
    """T5 layer by layer: the same shares, one small table per layer."""
    layers = part(report, "T5").get("layers") or ()
    return [
        _shares(report, layer.get("share"), f"layer {layer.get('layer', i)}", "", unit="")
        for i, layer in enumerate(layers)
        if isinstance(layer, dict)
    ]


def facts(report: dict) -> list[tuple[str, str]]:
    """T5 in a few numbers, as pairs of name and value; empty without T5."""
    found = part(report, "T5")
    if not found:
        return []
    dead = found.get("dead")
    return [
        ("agreement with the domain", share(found.get("agreement"), 1)),
        (
            "entropy of the load",
            f"{fixed(found.get('entropy'))} of {fixed(found.get('max_entropy'))} nats",
        ),
        ("MaxVio", fixed(found.get("max_violation"))),
        ("least used", _used(found.get("least"))),
        ("most used", _used(found.get("most"))),
        ("dead experts", DASH if dead is None else ", ".join(map(str, dead)) or "none"),
    ]


def by_layer(report: dict) -> Table:
    """T5, one line per layer: agreement, entropy and balance."""
    layers = [layer for layer in part(report, "T5").get("layers") or () if isinstance(layer, dict)]
    rows = tuple(
        Row(
            str(layer.get("layer", i)),
            (
                Cell(share(layer.get("agreement"), 1)),
                Cell(fixed(layer.get("entropy"))),
                Cell(fixed(layer.get("max_violation"))),
            ),
        )
        for i, layer in enumerate(layers)
    )
    reading = (
        "Agreement: share of tokens sent to their own domain's expert. Entropy of the mean load, in nats; at most the "
        "logarithm of the number of experts. MaxVio: how far the busiest expert lies over an even load, relative to "
        "it; 0 is even (auxiliary-loss-free balancing, arXiv 2408.15664)."
    )
    return Table(
        "T5", "Routing by layer", "layer", ("agreement", "entropy, nats", "MaxVio"), rows, reading
    )


def _shares(report: dict, shares, title: str, reading: str, unit: str = " %") -> Table:
    experts = tuple(map(str, report.get("experts") or ()))
    rows = []
    for domain in domains_of(report):
        line = shares.get(domain) if isinstance(shares, dict) else None
        values = [finite(at(line, i)) for i in range(len(experts))]
        cells = [
            Cell(share(v).removesuffix(" %") + unit * (v is not None), heat=v, own=e == domain)
            for v, e in zip(values, experts, strict=True)
        ]
        rows.append(Row(domain, tuple(cells)))
    colours = "Framed: the domain's own expert." * bool(reading)
    lines = tuple(rows) if shares else ()
    return Table("T5", title, "domain", experts, lines, reading, colours, scale=("0 %", "100 %"))


def _used(pair) -> str:
    if not isinstance(pair, list | tuple) or len(pair) != 2:
        return DASH
    return f"{pair[0]} ({share(pair[1], 1)})"
