"""What the tokenizer and each domain read outside the store, known by the documents themselves.

Invariant: files may be renamed, touched, moved, cut in other places or listed in another order, and
rows of other domains may come and go in them: a print changes with the domain's own documents, and
with what earlier domains decide of those that they share.
"""

import hashlib
import json
from collections.abc import Iterable

from ...config.text_data import TextRunConfig
from ...errors import DataError
from ...protocols import Eye, Looked, Seen
from ..sources import text
from . import pretrained_tokenizer
from .fitting import nothing_found
from .held_out import HeldOut
from .survey import Survey, survey


def look_at_tokenizer(cfg: TextRunConfig, eye: Eye) -> Looked:
    """Return what the tokenizer is made of: its own files, or the documents of its domains; and all
    documents where they have no labels."""
    files = tuple(pretrained_tokenizer.seen(cfg, eye))
    own = [[each.name, each.sum] for each in files]
    if cfg.partition.by == "labels" and cfg.tokenizer.pretrained:
        return Looked(_hashed(own), files)
    found = _surveyed(cfg, eye)
    if isinstance(found, Looked):
        return Looked(_hashed([own, found.print]), (*files, *found.seen))
    if cfg.partition.by != "labels":
        return Looked(_hashed([own, found.survey.print_of(None)]), (*files, *_seen(found.survey)))
    prints = [found.print_of(domain) for domain in cfg.tokenizer_domains]
    return Looked(_hashed([own, prints]), (*files, *_seen(found.survey, cfg.tokenizer_domains)))


def look_at_domain(cfg: TextRunConfig, domain: str, eye: Eye) -> Looked:
    """Return what the tokens of a domain are made of: its documents, or all where they have no
    labels."""
    found = _surveyed(cfg, eye)
    if isinstance(found, Looked):
        return found
    if cfg.partition.by != "labels":
        return Looked(found.survey.print_of(None), _seen(found.survey))
    lacks = nothing_found(cfg, found.survey, domain)
    told = "" if lacks is None else str(lacks)
    return Looked(found.print_of(domain), _seen(found.survey, (domain,)), told)


class _Prints:
    """A survey with what its domains hold out."""

    def __init__(self, found: Survey):
        self.survey = found
        self.held_out = HeldOut(found)

    def print_of(self, domain: str) -> str:
        """Return the print of a domain's documents and of what earlier domains decide of them."""
        own = self.survey.print_of(domain)
        if not self.survey.count(domain):
            # Two domains without a document are not told by each other's files
            return _hashed([own, domain])
        return _hashed([own, self.held_out.print_of(domain)])


def _surveyed(cfg: TextRunConfig, eye: Eye) -> _Prints | Looked:
    """Return what documents there are, or how the sources are as long as nobody can tell."""
    return eye.once("documents", lambda: _survey(cfg, eye))


def _survey(cfg: TextRunConfig, eye: Eye) -> _Prints | Looked:
    try:
        return _Prints(survey(cfg, eye))
    except DataError:
        # Whoever reads them is told why
        return Looked.of(text.seen(cfg, eye))


def _seen(found: Survey, domains: Iterable[str] | None = None) -> tuple[Seen, ...]:
    """Return what jobs of some domains read, or of all."""
    names = None if domains is None else tuple(domains)
    every: dict[Seen, None] = {}
    for file in found.files:
        if names is None or any(found.is_of(file, name) for name in names):
            every |= dict.fromkeys(file.seen)
    return tuple(every)


def _hashed(values: list) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()
