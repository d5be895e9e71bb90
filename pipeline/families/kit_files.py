"""The files of a kit that every family writes: what it is for, settings, instructions."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..store.artifacts import write_text
from ..store.reading import as_kind, sealed, unsealed

FORMAT = 1
ABOUT = "kit.json"
SETTINGS = "expert.yaml"
README = "README.md"


@dataclass(frozen=True)
class KitFacts:
    """What kit.json says: which expert is wanted, and on what."""

    domain: str
    trunk: str  # fingerprints; of a base with its own tokenizer both are the digest of its pin
    tokenizer: str
    format: int = FORMAT


def write_facts(folder: Path, facts: KitFacts) -> None:
    """Write kit.json, which is what makes the folder a kit and comes last. Raises DiskFull."""
    write_text(folder / ABOUT, sealed(asdict(facts), indent=1))


def read_kit(folder: Path) -> KitFacts:
    """Return what a kit is for. Raises DataError for a folder that is none."""
    try:
        values = unsealed((folder / ABOUT).read_bytes(), indent=1)
        facts = as_kind(KitFacts, values)
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} is no kit: {ABOUT}: {error}; name the folder of one") from None
    if facts.format > FORMAT:
        raise DataError(
            f"{folder} is of format {facts.format}, and this version reads up to {FORMAT}; update "
            "MoleForge"
        )
    return facts


def settings_text(sections: Mapping[str, Any], theirs: str) -> str:
    """Return expert.yaml; `theirs` says in words which of the settings are the trainer's own."""
    lines = [
        "# One expert, trained where its text lies. What it must agree in with the others is",
        f"# here; {theirs} are yours.",
    ]
    for key, value in sections.items():
        if not isinstance(value, dict):
            lines.append(f"{key}: {json.dumps(value)}")
            continue
        lines.append(f"{key}:")
        lines += [f"  {name}: {json.dumps(each)}" for name, each in value.items()]
    return "\n".join(lines) + "\n"


def readme_text(domain: str, model: str, data: str, gives: str, tells: str) -> str:
    """Return README.md: where the model is from, where the data go, what is given away, and what
    that tells of the data."""
    return f"""# An expert for {domain}

This folder has what it takes to train one expert on data of your own, here, and to give away that
expert and nothing else.

{model}

Put {data} (or name others with `--paths`). MoleForge is run from a clone of it, in which
`make .venv/runtime.stamp` installs what it needs; there, with the path of this folder in the
place of KIT:

    .venv/bin/python -m pipeline kit --pack KIT --to expert-{domain}

It trains, and leaves in `expert-{domain}` what to give back: {gives}. Nothing else leaves your
machine, and that only by your hand.

{tells} `docs/kits.md` of MoleForge says what each of them shows, and what was measured.
"""
