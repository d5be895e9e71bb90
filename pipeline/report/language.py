"""The tables of a report, described once and drawn twice (terminal and page).

Every table carries the sentence that says how to read it and where its shape comes from. The oracle
is never marked as best: it is told the domain of each document, so nobody can serve it.
"""

from .format import DASH, count, figures, finite, fixed, interval, megabytes, seconds, share, signed
from .table import Cell, Row, Table, at, best, diverge, domains_of, extremes, less, part

ORIGINS = (  # a word in a row's name, and where such a row comes from
    ("trunk", "the shared part with the feed-forward network it trained with, before any expert"),
    ("expert", "one expert on the trunk, also on text that it never saw"),
    (
        "dense",
        "the trunk trained on without experts, as the dense baseline of BTX (arXiv 2403.07816)",
    ),
    ("soup", "the experts' weights averaged into one model, as in model soups (arXiv 2203.05482)"),
    ("uniform", "every expert runs and weighs the same; needs no router"),
    (
        "posterior",
        "experts weighted by how well each predicted the text so far (DEMix, 2108.05036; c-BTM, 2303.14177)",
    ),
    ("random", "gates as they were drawn: what routing without any knowledge costs"),
    (
        "centroid",
        "each gate row is the mean input of a domain, as FlexOlmo starts its gates (arXiv 2507.07024)",
    ),
    (
        "ridge",
        "gates in closed form from the experts' statistics, no training, as in DUME (arXiv 2603.29765)",
    ),
    ("stack", "trunk, experts and router as they are served"),
    (
        "oracle",
        "each document goes to its own domain's expert; a mark to reach, nothing that can be served",
    ),
)


def quality(report: dict) -> Table:
    """T1: bits per byte of every row, its distance to the stack, and every domain."""
    domains = domains_of(report)
    means = best(_t1(report), lambda row: row.get("mean"))
    winners = [
        best(_t1(report), lambda row, d=d: part(row, "bits_per_byte").get(d)) for d in domains
    ]
    rows = []
    for i, row in enumerate(_t1(report)):
        mean = Cell(fixed(row.get("mean")), interval(row.get("interval")), best=i in means)
        each = [
            Cell(fixed(part(row, "bits_per_byte").get(d)), best=i in winner)
            for d, winner in zip(domains, winners, strict=True)
        ]
        rows.append(_t1_row(row, mean, _versus(row), Cell(share(row.get("oracle_gain"))), *each))
    reading = (
        "Lower is better; in brackets the 95 % interval over documents. Stack ahead by: row minus stack, on the same "
        "documents; above zero the stack is better. Oracle's gain: 0 % is the trunk, 100 % the oracle. The best row "
        "that serves every domain is marked, so neither the oracle nor an expert alone. "
        "One model for all domains, as in BAM and FlexOlmo, table 1."
    )
    heads = ("mean", "stack ahead by", "oracle's gain", *domains)
    return Table("T1", "Bits per byte on held-out text", "row", heads, tuple(rows), reading)


def cost(report: dict) -> Table:
    """T1, second half: what each row costs to run and to train, and its perplexity."""
    domains = domains_of(report)
    means = best(_t1(report), lambda row: row.get("mean_perplexity"))
    rows = []
    for i, row in enumerate(_t1(report)):
        counts = [
            Cell(count(row.get(k)))
            for k in ("active_parameters", "total_parameters", "flops_per_token", "train_tokens")
        ]
        each = [Cell(figures(part(row, "perplexity").get(d))) for d in domains]
        rows.append(
            _t1_row(row, *counts, Cell(figures(row.get("mean_perplexity")), best=i in means), *each)
        )
    heads = (
        "active parameters",
        "total parameters",
        "FLOPs per token",
        "training tokens",
        "mean perplexity",
        *domains,
    )
    reading = (
        "What a row costs per token and what it was trained on, then its perplexity per token, "
        "comparable between rows because all share one tokenizer. "
        "Compare quality only along the axis that is written under a row's name."
    )
    return Table("T1", "Cost and perplexity of the same rows", "row", heads, tuple(rows), reading)


def origins(report: dict) -> list[tuple[str, str]]:
    """Where the rows of T1 come from, as pairs of the word in their names and an explanation."""
    names = [
        f"{row.get('row', '')} {'stack' if row.get('is_stack') is True else ''}".lower()
        for row in _t1(report)
    ]
    return [(word, text) for word, text in ORIGINS if any(word in name for name in names)]


def matrix(report: dict) -> Table:
    """The heat map: each expert alone, and the stack, on each domain; coloured by the gain over the
    trunk."""
    data = part(report, "matrix")
    names, domains = [str(n) for n in data.get("rows") or ()], domains_of(report)
    values = [
        [finite(at(line, j)) for j in range(len(domains))]
        for line in data.get("bits_per_byte") or ()
    ]
    base = values[0] if values else []
    gains = [[less(b, v) for b, v in zip(base, line, strict=True)] for line in values]
    heats = diverge(gains[1:])
    rows = []
    for j, domain in enumerate(domains):
        cells = [Cell(fixed(at(base, j)))]
        for i, name in enumerate(names[1 : len(values)]):
            gain, own = gains[i + 1][j], name in (domain, f"expert {domain}")
            cells.append(Cell(fixed(values[i + 1][j]), signed(gain), heat=heats[i][j], own=own))
        rows.append(Row(domain, tuple(cells)))
    reading = (
        "A row is a domain's held-out text, a column a model alone; below each value, the bits per byte gained over "
        "the trunk. A strong diagonal means that experts specialised, as in DEMix and c-BTM."
    )
    colours = "Green gains, red loses, each on its own scale; framed: an expert on its own domain."
    heads, lines = tuple(names[: len(values)]), tuple(rows) if values else ()
    top, bottom = extremes(gains[1:])
    scale = (f"{fixed(bottom)} worse", f"{fixed(top)} better")
    return Table(
        "Map", "Who is good at what", "domain", heads, lines, reading, colours, scale=scale
    )


def opt_out(report: dict) -> Table:
    """T3: what is lost on each domain when one expert leaves the stack."""
    domains = domains_of(report)
    found = [row for row in part(report, "T3").get("rows") or () if isinstance(row, dict)]
    gains = [[less(1, part(row, "ratio").get(d)) for d in domains] for row in found]
    heats, (top, bottom) = diverge(gains), extremes(gains)
    rows = []
    for row, heat in zip(found, heats, strict=True):
        removed = str(row.get("removed", DASH))
        cells = [
            Cell(
                fixed(part(row, "ratio").get(d)),
                signed(part(row, "delta_bits").get(d)),
                heat=h,
                own=d == removed,
            )
            for d, h in zip(domains, heat, strict=True)
        ]
        rows.append(Row(removed, tuple(cells)))
    reading = (
        "Perplexity without the expert over perplexity with it; 1 means that nothing was lost. Beside it the change in "
        "bits per byte. Opting out as in FlexOlmo, figure 4."
    )
    colours = "Red lost, green gained by the expert's absence; framed: its own domain."
    scale = (f"{share(bottom, 1)} worse", f"{share(top, 1)} better")
    return Table(
        "T3",
        "When one expert leaves",
        "removed",
        domains,
        tuple(rows),
        reading,
        colours,
        scale=scale,
    )


def active(report: dict) -> Table:
    """T6: the same stack with k = 1..E experts per token."""
    domains = domains_of(report)
    found = [row for row in report.get("T6") or () if isinstance(row, dict)]
    means = best(found, lambda row: row.get("mean"))
    used = part(report, "model").get("top_k")
    rows = []
    for i, row in enumerate(found):
        mean = Cell(fixed(row.get("mean")), interval(row.get("interval")), best=i in means)
        each = [Cell(fixed(part(row, "bits_per_byte").get(d))) for d in domains]
        k = row.get("top_k")
        cells = (mean, Cell(count(row.get("active_parameters"))), *each)
        rows.append(Row(f"k = {k}", cells, note="as served" if k == used else "", main=k == used))
    reading = (
        "Bits per byte of one and the same stack when k experts run per token; no retraining. "
        "More experts cost more and need not be better; the shape is that of FlexOlmo, figure 3."
    )
    return Table(
        "T6",
        "Active experts",
        "experts",
        ("mean", "active parameters", *domains),
        tuple(rows),
        reading,
    )


def wins(report: dict) -> Table:
    """Every comparison of the stack with a rival, with the axis that the two have in common."""
    rows = []
    for win in report.get("wins") or ():
        verdict = str(win.get("verdict", DASH))
        tone = {"better": "good", "worse": "bad"}.get(verdict, "")
        change = Cell(signed(win.get("difference")), interval(win.get("interval")))
        axis = str(win.get("axis") or "axis not stated")
        rows.append(
            Row(str(win.get("against", DASH)), (Cell(axis), Cell(verdict, tone=tone), change))
        )
    reading = (
        "Rival minus stack in bits per byte, on the same documents; above zero the stack is better, and a tie is an "
        "interval that holds zero. A verdict holds on the named axis only."
    )
    heads = ("on the axis", "stack is", "ahead by")
    return Table(
        "Wins", "The stack against its rivals", "against", heads, tuple(rows), reading, words=(0, 1)
    )


def criteria(report: dict) -> Table:
    """The success criteria of the configuration, passed or failed."""
    rows = []
    for item in report.get("criteria") or ():
        passed = item.get("passed")
        word = {True: "pass", False: "fail"}.get(passed, DASH) if isinstance(passed, bool) else DASH
        tone = {"pass": "good", "fail": "bad"}.get(word, "")
        cells = (
            Cell(word, tone=tone),
            Cell(str(item.get("text") or "")),
            Cell(str(item.get("detail") or "")),
        )
        rows.append(Row(str(item.get("name", DASH)), cells))
    reading = "What the run was asked to achieve; thresholds come from the evaluate section of the configuration."
    heads = ("result", "asked", "found")
    return Table(
        "Criteria", "Success criteria", "criterion", heads, tuple(rows), reading, words=(0, 1, 2)
    )


def speed(report: dict) -> Table:
    """Wall-clock, throughput and memory of every job."""
    rows = []
    for job in part(report, "speed").get("jobs") or ():
        cells = (
            Cell(seconds(job.get("seconds"))),
            Cell(count(job.get("tokens"))),
            Cell(count(job.get("tokens_per_s"))),
            *(
                Cell(seconds(job.get(k)))
                for k in ("data_s", "forward_s", "backward_s", "optimizer_s")
            ),
            Cell(megabytes(job.get("peak_mb"))),
        )
        rows.append(Row(str(job.get("job", DASH)), cells))
    heads = (
        "time",
        "tokens",
        "tokens per second",
        "data",
        "forward",
        "backward",
        "optimizer",
        "peak memory",
    )
    reading = "One process per job, on the machine named at the top; what is left of the time is evaluation and saving."
    return Table("Speed", "Time and memory", "job", heads, tuple(rows), reading)


def data(report: dict) -> Table:
    """How much text stands behind the numbers, per domain."""
    found, keys = part(report, "data"), ("train_tokens", "test_tokens", "test_documents")
    rows = [
        Row(d, tuple(Cell(count(part(found, k).get(d))) for k in keys)) for d in domains_of(report)
    ]
    reading = (
        "Tokens to train on, and the held-out tokens and documents that every row is measured on."
    )
    heads = ("training tokens", "test tokens", "test documents")
    return Table("Data", "Text per domain", "domain", heads, tuple(rows) if found else (), reading)


def _t1(report: dict) -> list[dict]:
    return [row for row in report.get("T1") or () if isinstance(row, dict)]


def _t1_row(row: dict, *cells: Cell) -> Row:
    name, axis = str(row.get("row", DASH)), str(row.get("axis") or "")
    return Row(name, cells, axis, str(row.get("kind") or ""), row.get("is_stack") is True)


def _versus(row: dict) -> Cell:
    found = part(row, "versus_stack")
    return Cell(signed(found.get("difference")), interval(found.get("interval")))
