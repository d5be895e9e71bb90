"""Changes to a request that should not change who answers it: other words, another order of labels,
and what a family says of its media.

Invariant: a change is a function of the request alone, so a repeated evaluation makes the same
ones.
"""

import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace

from ...config.routing_set import RoutingSetConfig
from .eval_data import EvalRequest
from .media import Medium

OWN = "{prompt}"  # in a wording: the request's own words


def change_media(request: EvalRequest, change: Callable[[Medium], Medium]) -> EvalRequest:
    """Return a request whose media are changed when they are opened."""

    def changed() -> list[Medium]:
        # when it is asked for, as media are not kept
        return [change(medium) for medium in request.open()]

    return replace(request, open=changed)


def reword(request: EvalRequest, dataset: RoutingSetConfig) -> EvalRequest | None:
    """Return a request in other words for the same thing, held-out ones first; None where there are
    none."""
    if request.ambiguous:
        wording = dataset.neutral
    elif request.expert in dataset.paraphrases:
        wording = dataset.paraphrases[request.expert]
    else:
        return None
    for texts in (wording.held, wording.seen):
        others = []
        for text in sorted(texts):
            if text != request.prompt and OWN not in text:
                others.append(text)
        if others:
            # a checksum rather than `hash`, which differs from one process to the next
            number = zlib.crc32(request.prompt.encode())
            prompt = others[number % len(others)]
            return replace(request, prompt=prompt)
    return None


def reorder_labels(instruction: str, labels: Mapping[str, str]) -> str | None:
    """Return the router's instruction with its lines about the labels in reverse; None unless it
    has one for each."""
    lines = instruction.splitlines()
    about = []
    for i, line in enumerate(lines):
        told = [label for label in labels.values() if _is_about(line, label)]
        if told:
            about.append(i)
    if len(about) < len(labels) or len(labels) < 2:
        return None
    out = list(lines)
    turned = reversed(about)
    for i, other in zip(about, turned, strict=True):
        out[i] = lines[other]
    return "\n".join(out)


def _is_about(line: str, label: str) -> bool:
    # "A: colours", "- B) text", "Z = nobody"; a sentence that begins with A is none
    begins = rf"\W*{re.escape(label)}\s*[:.)=\-–]"
    return re.match(begins, line) is not None
