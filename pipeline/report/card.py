"""The model card of a bundle, in Markdown: what it is, how good by which comparison, how to load
it.

Every number comes from the report through the same tables as page and terminal, so no two of them
disagree.
"""

from . import common, language, requests
from .format import count
from .schema import LanguageReport, Report, RequestReport
from .table import Cell, Table

HEAD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [mixture-of-experts, moleforge]
---
"""
ADAPTERS_HEAD = """---
library_name: peft
pipeline_tag: image-text-to-text
tags: [mixture-of-experts, lora, moleforge]
---
"""


def card(report: Report, about: dict) -> str:
    """Return README.md of a bundle; about is its experts.json."""
    if isinstance(report, LanguageReport):
        return _language_card(report, about)
    return _request_card(report, about)


def _language_card(report: LanguageReport, about: dict) -> str:
    run = str(about.get("run") or "run")
    sections = [
        f"{HEAD}\n# {_plain(run)}\n",
        _what(report, about),
        _experts(about),
        _load(about),
        "## How good it is\n\nOn held-out text; report.html has it in full. A win holds on the axis it names.\n",
        *(
            _table(table)
            for table in (
                language.wins(report),
                language.quality(report),
                common.criteria(report),
            )
        ),
        _notes(report, about),
    ]
    return "\n".join(section for section in sections if section)


def _request_card(report: RequestReport, about: dict) -> str:
    run = str(about.get("run") or "run")
    shown = (
        requests.routes,
        requests.answers,
        requests.adapters,
        requests.calibration,
        common.criteria,
    )
    sections = [
        f"{ADAPTERS_HEAD}\n# {_plain(run)}\n",
        _what_adapters(about),
        _adapters(about),
        _load_adapters(about),
        "## How good it is\n\nOn held-out requests; report.html has it in full.\n",
        *(_table(table(report)) for table in shown),
        "\n".join(
            [
                "## To know",
                "",
                *(f"- {_plain(note)}" for note in report.notes),
                "",
            ]
        ),
    ]
    return "\n".join(section for section in sections if section)


def _what_adapters(about: dict) -> str:
    base = about["base"]
    where = f"revision `{base['revision']}`" if base["revision"] else "in the folder `base`"
    return (
        f"{len(about['experts'])} experts, each a LoRA adapter for one task on the frozen vision-language model "
        f"{_plain(str(base['model']))} ({where}), and a router that is one more adapter: it answers a request with an "
        f"expert's label, a single token. Made with MoleForge. The adapters never met while they trained.\n"
    )


def _adapters(about: dict) -> str:
    head = "| expert | label | task | what it does | judged by | trained as | folder |"
    lines = ["## Experts", "", head, "| --- | --- | --- | --- | --- | --- | --- |"]
    for e in about["experts"]:
        cells = [
            e["name"],
            e["label"],
            e["task"],
            e["description"],
            e["metric"],
            f"`{e['address']}`",
            f"`{e['folder']}`",
        ]
        lines.append(_line([_plain(str(cell)) for cell in cells]))
    router, policy = about["router"], about["policy"]
    lines += [
        "",
        f"Router `{router['address']}` in `{router['folder']}`; its temperature is in calibration.json there. Below a "
        f"confidence of {policy['threshold']:g} the likeliest {policy['top_k']} experts answer and the best answer is "
        f"taken; a request that is nobody's goes to {policy['fallback']}. Weights are never averaged.\n",
    ]
    return "\n".join(lines)


def _load_adapters(about: dict) -> str:
    base, first = about["base"], about["experts"][0]
    name = base["model"] if base["revision"] else "base"
    more = f', revision="{base["revision"]}"' if base["revision"] else ""
    return f"""## Use

```
from peft import PeftModel
from transformers import Qwen3VLForConditionalGeneration

base = Qwen3VLForConditionalGeneration.from_pretrained("{name}"{more})
{first["name"]} = PeftModel.from_pretrained(base, "{first["folder"]}/adapter")
```

```
sha256sum --check --quiet SHA256SUMS       # every file is what was bundled
python -m pipeline serve --bundle .        # /v1/chat/completions and /v1/route, with the router in front
```

Pictures were trained on with {base["image"]["min_pixels"]:,} to {base["image"]["max_pixels"]:,} px; keep them so.
"""


def _what(report: LanguageReport, about: dict) -> str:
    model = report.model
    total = count(model.total_parameters if model else None)
    active = count(model.active_parameters if model else None)
    return (
        f"A mixture of {len(about['experts'])} experts, {about['top_k']} of them active per token, trained in parts "
        f"with MoleForge: a shared trunk, experts that never met while they trained, and a router that joins them. "
        f"It is an ordinary `{about['architecture']}` with {total} parameters, "
        f"{active} of them active per token, in fp32.\n"
    )


def _experts(about: dict) -> str:
    lines = [
        "## Experts",
        "",
        "| number | expert | domain | trained as | file |",
        "| ---: | --- | --- | --- | --- |",
    ]
    for i, expert in enumerate(about["experts"]):
        domain = expert["domain"] or "all (the dummy of the trunk's training, kept)"
        lines.append(
            f"| {i} | {expert['name']} | {domain} | `{expert['address']}` | `{expert['file']}` |"
        )
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


def _notes(report: LanguageReport, about: dict) -> str:
    lines = [f"- {_plain(note)}" for note in report.notes]
    lines.append(
        "- A base model: it goes on with a text and was not taught to follow instructions or to refuse any."
    )
    lines.append(
        f"- What it has not seen in {', '.join(e['name'] for e in about['experts'])} it does not know."
    )
    return "\n".join(["## To know", "", *lines, ""])


def _plain(text: str) -> str:
    """Return text without what would end a cell or start markup."""
    return " ".join(text.replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;").split())
