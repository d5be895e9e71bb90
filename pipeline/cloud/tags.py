"""By what Modal's billing reports tell the costs of our apps apart."""

from collections.abc import Sequence

MOST = 63  # characters of a tag


def tags(run: str, argv: Sequence[str], bundle: str) -> dict[str, str]:
    """Return the tags of an app: the run and the entrypoint of a command, or the bundle that a
    deployment serves."""
    found = {"program": "moleforge"}
    for word in argv:
        _, ours, entrypoint = word.partition("::")
        if ours and entrypoint.isidentifier():
            found |= {"run": run, "command": entrypoint}
    address, _, _ = bundle.partition("@")
    if address:
        found["bundle"] = address
    return {name: value[:MOST] for name, value in found.items()}
