"""The model card of a bundle, in Markdown: what it is, how good by which comparison, how to load it.

Every number comes from the report through the same tables as page and terminal, so no two of them disagree.
"""

from . import tables
from .cells import Cell, Table, part
from .digits import count

HEAD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [mixture-of-experts, moleforge]
---
"""


def card(report: dict, about: dict) -> str:
    """Return README.md of a bundle; about is its experts.json."""
    run = str(about.get("run") or "run")
    sections = [
        f"{HEAD}\n# {_plain(run)}\n",
        _what(report, about),
        _experts(about),
        _load(about),
        "## How good it is\n\nOn held-out text; report.html has it in full. A win holds on the axis it names.\n",
        *(_table(table) for table in (tables.wins(report), tables.quality(report), tables.criteria(report))),
        _notes(report, about),
    ]
    return "\n".join(section for section in sections if section)


def _what(report: dict, about: dict) -> str:
    model = part(report, "model")
    return (
        f"A mixture of {len(about['experts'])} experts, {about['top_k']} of them active per token, trained in parts "
        f"with MoleForge: a shared trunk, experts that never met while they trained, and a router that joins them. "
        f"It is an ordinary `{about['architecture']}` with {count(model.get('total_parameters'))} parameters, "
        f"{count(model.get('active_parameters'))} of them active per token, in fp32.\n"
    )


def _experts(about: dict) -> str:
    lines = ["## Experts", "", "| number | expert | domain | trained as | file |", "| ---: | --- | --- | --- | --- |"]
    for i, expert in enumerate(about["experts"]):
        domain = expert["domain"] or "all (the dummy of the trunk's training, kept)"
        lines.append(f"| {i} | {expert['name']} | {domain} | `{expert['address']}` | `{expert['file']}` |")
    lines.append(f"\nTrunk `{about['trunk']['address']}`, router `{about['router']['address']}`.\n")
    return "\n".join(lines)


def _load(about: dict) -> str:
    return f"""## Use

```
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")
```

```
sha256sum --check --quiet SHA256SUMS       # every file is what was bundled
python -m pipeline serve --bundle .        # /v1/completions, and /v1/route: which expert took which token
```

While it trained, every text began with token {about["start_id"]} and ended where the next one began. Put that token in
front of a prompt, as the server above does. Texts were cut at {about["context_tokens"]} tokens at most.
"""


def _table(table: Table) -> str:
    """Return a table of the report; nothing where it has no rows."""
    if not table.rows:
        return ""
    words = {i for i in range(len(table.columns)) if i in table.words}
    rules = ["---", *("---" if i in words else "---:" for i in range(len(table.columns)))]
    lines = [f"### {table.title}", "", _line([table.corner, *table.columns]), _line(rules)]
    for row in table.rows:
        name = f"**{_plain(row.name)}**" if row.main else _plain(row.name)
        note = f" ({_plain(row.note)})" if row.note else ""
        lines.append(_line([name + note, *map(_cell, row.cells)]))
    return "\n".join([*lines, "", table.reading, ""])


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(cell: Cell) -> str:
    text = f"**{_plain(cell.text)}**" if cell.best else _plain(cell.text)
    return f"{text} {_plain(cell.small)}".rstrip()


def _notes(report: dict, about: dict) -> str:
    lines = [f"- {_plain(str(note))}" for note in report.get("notes") or ()]
    lines.append("- A base model: it goes on with a text and was not taught to follow instructions or to refuse any.")
    lines.append(f"- What it has not seen in {', '.join(e['name'] for e in about['experts'])} it does not know.")
    return "\n".join(["## To know", "", *lines, ""])


def _plain(text: str) -> str:
    """Return text without what would end a cell or start markup."""
    return " ".join(text.replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;").split())
