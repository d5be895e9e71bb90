"""Experts that come of kits, each trained on text of its own in a store of its own: what tests of a
run that they join need."""

from pathlib import Path

from conftest import documents

from pipeline.__main__ import main

PACKAGE = {"expert.json", "expert.safetensors", "statistics.safetensors"}
GUESTS = {"ledger": "shop", "harbour": "sea"}


def done(*arguments) -> None:
    """Give a command, which must end well."""
    assert main([str(argument) for argument in arguments]) == 0


def guests(config: Path, store: Path, root: Path, *short: str) -> dict[str, Path]:
    """Return packages by name, made below root of a run's kits; short is what a training here
    overrides."""
    packages = {}
    for name, like in GUESTS.items():
        home = root / name
        done("kit", name, "--config", config, "--store", store, "--to", home / "kit")
        text = home / "private"
        text.mkdir()
        for number, document in enumerate(documents(like)):
            (text / f"{number}.txt").write_text(document[::-1])
        packages[name] = home / "package"
        done(
            *("kit", "--pack", home / "kit", "--to", packages[name], "--store", home / "store"),
            *("--paths", text / "*.txt", "--licence", "CC0", *short),
        )
    return packages
