"""The tables of a report on text, described once and drawn on terminal, page and card.

Every table carries the sentence that says how to read it and where its shape comes from. The oracle
is never marked as best: it is told the domain of each document, so nobody can serve it.
"""

from collections.abc import Sequence

from .format import DASH, count, figures, fixed, interval, share, signed
from .schema.language import ByDomain, LanguageReport, QualityRow, Verdict
from .table import Cell, Row, Table, Values, at, diverge, extremes, less, lowest

# Kinds of rows that are told the domain or know only one: never the best
PARTIAL = ("oracle", "expert")
TONES: dict[Verdict, str] = {"better": "good", "worse": "bad", "tie": "", "undecided": ""}

# A word in a row's name, and where such a row comes from
ORIGINS = {
    "trunk": ("the shared part with the feed-forward network it trained with, before any expert"),
    "expert": "one expert on the trunk, also on text that it never saw",
    "dense": (
        "the trunk trained on without experts, as the dense baseline of BTX (arXiv 2403.07816)"
    ),
    "soup": "the experts' weights averaged into one model, as in model soups (arXiv 2203.05482)",
    "uniform": "every expert runs and weighs the same; needs no router",
    "posterior": (
        "experts weighted by how well each predicted the text so far (DEMix, 2108.05036; c-BTM, "
        "2303.14177)"
    ),
    "random": "gates as they were drawn: what routing without any knowledge costs",
    "centroid": (
        "each gate row is the mean input of a domain, as FlexOlmo starts its gates (arXiv "
        "2507.07024)"
    ),
    "ridge": (
        "gates in closed form from the experts' statistics, no training, as in DUME (arXiv "
        "2603.29765)"
    ),
    "stack": "trunk, experts and router as they are served",
    "oracle": (
        "each document goes to its own domain's expert; a mark to reach, nothing that can be served"
    ),
}


def quality(report: LanguageReport) -> Table:
    """Bits per byte of every row, its distance to the stack, and every domain."""
    rows = report.quality
    # marks are found before the cells, over whole columns
    best_mean = _best(rows, [row.mean for row in rows])
    best_by_domain = {}
    for domain in report.domains:
        best_by_domain[domain] = _best(rows, [row.bits_per_byte.get(domain) for row in rows])
    # too few documents decide nothing, neither of their domain nor of a mean that it is part of
    if report.too_few:
        best_mean = set()
    for domain in report.too_few:
        best_by_domain[domain] = set()
    lines = []
    for i, row in enumerate(rows):
        # the stack is not compared with itself
        ahead = row.versus_stack
        cells = [
            Cell(fixed(row.mean), interval(row.interval), best=i in best_mean),
            Cell(signed(ahead.difference), interval(ahead.interval)) if ahead else Cell(DASH),
            Cell(share(row.oracle_gain)),
        ]
        for domain in report.domains:
            bits = fixed(row.bits_per_byte.get(domain))
            # Of the stack alone: a line of them for each row would be more than a person reads
            sure = interval(row.intervals.get(domain)) if row.is_stack else ""
            cells.append(Cell(bits, sure, best=i in best_by_domain[domain]))
        lines.append(_line(row, cells))
    return Table(
        name="Quality",
        title="Bits per byte on held-out text",
        corner="row",
        columns=("mean", "stack ahead by", "oracle's gain", *report.domains),
        rows=tuple(lines),
        reading=(
            "Lower is better; in brackets the 95 % interval over documents. Stack ahead by: row "
            "minus stack, on the same documents; above zero the stack is better. Oracle's gain: "
            "0 % is the trunk, 100 % the oracle. The best row that serves every domain is marked, "
            "so neither the oracle nor an expert alone. One model for all domains, as in BAM and "
            "FlexOlmo, table 1."
        ),
    )


def cost(report: LanguageReport) -> Table:
    """What each row of `quality` costs to run and to train, and its perplexity."""
    rows = report.quality
    best_mean = set() if report.too_few else _best(rows, [row.mean_perplexity for row in rows])
    lines = []
    for i, row in enumerate(rows):
        cells = [
            Cell(count(row.active_parameters)),
            Cell(count(row.total_parameters)),
            Cell(count(row.flops_per_token)),
            Cell(count(row.train_tokens)),
            Cell(figures(row.mean_perplexity), best=i in best_mean),
        ]
        cells += [Cell(figures(row.perplexity.get(domain))) for domain in report.domains]
        lines.append(_line(row, cells))
    heads = (
        "active parameters",
        "total parameters",
        "FLOPs per token",
        "training tokens",
        "mean perplexity",
    )
    return Table(
        name="Cost",
        title="Cost and perplexity of the same rows",
        corner="row",
        columns=(*heads, *report.domains),
        rows=tuple(lines),
        reading=(
            "What a row costs per token and what it was trained on, then its perplexity per token, "
            "comparable between rows because all share one tokenizer. Compare quality only along "
            "the axis that is written under a row's name."
        ),
    )


def origins(report: LanguageReport) -> list[tuple[str, str]]:
    """Where the rows of `quality` come from: pairs of a word in their names and an explanation."""
    names = [row.name.lower() for row in report.quality]
    # the stack's row is named after its router, and need not say what it is
    if report.stack:
        names.append("stack")
    found = []
    for word, text in ORIGINS.items():
        if any(word in name for name in names):
            found.append((word, text))
    return found


def matrix(report: LanguageReport) -> Table:
    """The heat map: each expert alone, and the stack, on each domain; coloured by the gain over the
    trunk."""
    # one line per model as it is measured, but a table of few domains reads better turned: a
    # domain is a row, and what it is compared in stands side by side
    names = report.matrix.rows if report.matrix else ()
    lines = report.matrix.bits_per_byte if report.matrix else ()
    trunk = lines[0] if lines else ()
    gains = [_gains(trunk, line, len(report.domains)) for line in lines[1:]]
    sure = [_sure(report, gain) for gain in gains]
    heats = diverge(sure)
    rows = []
    for j, domain in enumerate(report.domains):
        cells = [Cell(fixed(at(trunk, j)))]
        # the trunk has no gain over itself, so no colour
        for name, line, gain, heat in zip(names[1:], lines[1:], gains, heats, strict=True):
            bits = fixed(at(line, j))
            # an expert is named after its domain
            own = name == domain and domain not in report.too_few
            cells.append(Cell(bits, signed(gain[j]), heat=heat[j], own=own))
        rows.append(Row(domain, tuple(cells)))
    most, least = extremes(sure)
    return Table(
        name="Map",
        title="Who is good at what",
        corner="domain",
        columns=names,
        rows=tuple(rows) if lines else (),
        reading=(
            "A row is a domain's held-out text, a column a model alone; below each value, the bits "
            "per byte gained over the trunk. A strong diagonal means that experts specialised, as "
            "in DEMix and c-BTM."
        ),
        colours=(
            "Green gains, red loses, each on its own scale; framed: an expert on its own domain."
        ),
        scale=(f"{fixed(least)} worse", f"{fixed(most)} better"),
    )


def opt_out(report: LanguageReport) -> Table:
    """What is lost on each domain when one expert leaves the stack."""
    found = report.opt_out
    # perplexity ratios are coloured by what is saved, so that red is a loss as in the heat map
    gains = [_sure(report, _saved(row.ratio, report.domains)) for row in found]
    heats = diverge(gains)
    rows = []
    for row, heat in zip(found, heats, strict=True):
        cells = []
        for domain, strength in zip(report.domains, heat, strict=True):
            ratio = fixed(row.ratio.get(domain))
            change = signed(row.delta_bits.get(domain))
            own = domain == row.removed and domain not in report.too_few
            cells.append(Cell(ratio, change, heat=strength, own=own))
        rows.append(Row(row.removed, tuple(cells)))
    most, least = extremes(gains)
    return Table(
        name="Opt-out",
        title="When one expert leaves",
        corner="removed",
        columns=report.domains,
        rows=tuple(rows),
        reading=(
            "Perplexity without the expert over perplexity with it; 1 means that nothing was lost. "
            "Beside it the change in bits per byte. Opting out as in FlexOlmo, figure 4."
        ),
        colours="Red lost, green gained by the expert's absence; framed: its own domain.",
        scale=(f"{share(least, 1)} worse", f"{share(most, 1)} better"),
    )


def active(report: LanguageReport) -> Table:
    """The same stack with one to all experts per token."""
    best_mean = set() if report.too_few else lowest([row.mean for row in report.active])
    # all its rows are one model, so any may be the best
    served = report.model.top_k if report.model else None
    rows = []
    for i, row in enumerate(report.active):
        cells = [
            Cell(fixed(row.mean), interval(row.interval), best=i in best_mean),
            Cell(count(row.active_parameters)),
        ]
        cells += [Cell(fixed(row.bits_per_byte.get(domain))) for domain in report.domains]
        is_served = row.top_k == served
        note = "as served" if is_served else ""
        rows.append(Row(f"k = {row.top_k}", tuple(cells), note=note, main=is_served))
    return Table(
        name="Active",
        title="Active experts",
        corner="experts",
        columns=("mean", "active parameters", *report.domains),
        rows=tuple(rows),
        reading=(
            "Bits per byte of one and the same stack when k experts run per token; no retraining. "
            "More experts cost more and need not be better; the shape is that of FlexOlmo, "
            "figure 3."
        ),
    )


def wins(report: LanguageReport) -> Table:
    """Every comparison of the stack with a rival, with the axis that the two have in common."""
    rows = []
    for win in report.wins:
        # a verdict without its axis would claim too much
        cells = (
            Cell(win.axis or "axis not stated"),
            Cell(win.verdict, tone=TONES[win.verdict]),
            Cell(signed(win.difference), interval(win.interval)),
        )
        rows.append(Row(win.against, cells))
    return Table(
        name="Wins",
        title="The stack against its rivals",
        corner="against",
        columns=("on the axis", "stack is", "ahead by"),
        rows=tuple(rows),
        reading=(
            "Rival minus stack in bits per byte, on the same documents; above zero the stack is "
            "better, and a tie is an interval that holds zero. A verdict holds on the named axis "
            "only; undecided: a domain has too few test documents."
        ),
        words=(0, 1),
    )


def continuations(report: LanguageReport) -> Table:
    """A held-out text of every domain, and how base, dense baseline and stack go on with it."""
    texts = report.continuations
    # each was given to the same networks
    writers = tuple(each.row for each in texts[0].written) if texts else ()
    rows = []
    for text in texts:
        cells = [Cell(_one_line(text.prompt)), Cell(_one_line(text.held_out))]
        cells += [Cell(_one_line(each.text)) for each in text.written]
        # a line between any two, as each takes several
        rows.append(Row(text.domain, tuple(cells), kind=text.domain))
    return Table(
        name="Continuations",
        title="How texts go on",
        corner="domain",
        columns=("beginning", "as it was written", *writers),
        rows=tuple(rows),
        reading=(
            "The first held-out text of each domain, chosen by nobody: its beginning, how it goes "
            "on, and the most probable tokens of each model after that beginning. To look at, not "
            "to judge by: the tables above do that."
        ),
        words=tuple(range(2 + len(writers))),
    )


def lead(report: LanguageReport) -> str:
    """Return the result in two sentences: what the stack reached, and how it compares on each axis;
    empty without a stack."""
    stack = report.stack
    if stack is None:
        return ""
    # an interval that is missing leaves a blank behind
    reached = f"{fixed(stack.mean)} bits per byte {interval(stack.interval)}".rstrip()
    groups = []
    words: dict[Verdict, str] = {
        "better": "better than",
        "tie": "level with",
        "worse": "worse than",
        "undecided": "on too few test documents to be compared with",
    }
    for verdict, word in words.items():
        rivals = []
        for win in report.wins:
            if win.verdict == verdict:
                rivals.append(f"{win.against} ({win.axis or 'axis not stated'})")
        if rivals:
            groups.append(f"{word} {', '.join(rivals)}")
    compared = f"It is {'; '.join(groups)}." if groups else ""
    return f"The stack reaches {reached}. {compared}"


def sizes(report: LanguageReport) -> str:
    """Return how large an expert is in a sentence, or nothing where it is not known."""
    if not report.model or report.model.expert_bytes is None:
        return ""
    return f"An expert's own weights are {_bytes(report.model.expert_bytes)}, as stored."


def _bytes(number: int) -> str:
    # a delta may be a few hundred kB, and whole MB would hide it
    return f"{count(number)}B"


def tiles(report: LanguageReport) -> list[tuple[str, str, str]]:
    """Return the numbers at the top as name, value and what stands beside it."""
    out = []
    stack = report.stack
    trunk = report.trunk
    if stack:
        out.append(("bits per byte", fixed(stack.mean), interval(stack.interval)))
    if stack and trunk:
        gain = fixed(less(trunk.mean, stack.mean))
        out.append(("gained over the trunk", gain, f"trunk {fixed(trunk.mean)}"))
    if stack:
        out.append(("of the oracle's gain", share(stack.oracle_gain), "reached by the stack"))
    if report.model:
        whole = f"of {count(report.model.total_parameters)}"
        out.append(("parameters per token", count(report.model.active_parameters), whole))
        if report.model.expert_bytes is not None:
            size = _bytes(report.model.expert_bytes)
            out.append(("an expert", size, "its own weights, as stored"))
    if report.routing:
        agreement = share(report.routing.agreement)
        out.append(("routing agreement", agreement, f"{len(report.experts)} experts"))
    return out


def data(report: LanguageReport) -> Table:
    """How much text stands behind the numbers, per domain."""
    rows = []
    found = report.data
    if found:
        for domain in report.domains:
            cells = (
                Cell(count(found.train_tokens.get(domain))),
                Cell(count(found.test_tokens.get(domain))),
                Cell(count(found.test_documents.get(domain))),
            )
            rows.append(Row(domain, cells))
    return Table(
        name="Data",
        title="Text per domain",
        corner="domain",
        columns=("training tokens", "test tokens", "test documents"),
        rows=tuple(rows),
        reading=(
            "Tokens to train on, and the held-out tokens and documents that every row is measured "
            "on."
        ),
    )


def _one_line(text: str) -> str:
    return " ".join(text.split()) or DASH


def _line(row: QualityRow, cells: Sequence[Cell]) -> Row:
    return Row(row.name, tuple(cells), note=row.axis, kind=row.kind, main=row.is_stack)


def _best(rows: Sequence[QualityRow], values: Sequence[float | None]) -> set[int]:
    """Return the positions of the lowest value among rows that serve every domain as one model."""
    # positions must stay those of all rows, so the others are blanked and not dropped
    contending = []
    for row, value in zip(rows, values, strict=True):
        contending.append(None if row.kind in PARTIAL else value)
    return lowest(contending)


def _sure(report: LanguageReport, gains: Values) -> Values:
    """Return what is coloured, in the domains' order: nothing of a domain with too few
    documents."""
    return [
        None if domain in report.too_few else gain
        for domain, gain in zip(report.domains, gains, strict=True)
    ]


def _gains(trunk: Sequence[float], line: Sequence[float], domains: int) -> Values:
    return [less(at(trunk, j), at(line, j)) for j in range(domains)]


def _saved(ratio: ByDomain, domains: Sequence[str]) -> Values:
    """Return what is saved on each domain by an expert's absence, as a share of the perplexity."""
    return [less(1, ratio.get(domain)) for domain in domains]
