"""What is wanted of a run's domains: one more, one less, or another text or expert for one."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .labels import domain_name, label_text


@dataclass(frozen=True)
class HubText:
    """A data set on the Hub."""

    dataset: str
    revision: str
    subset: str | None = None


@dataclass(frozen=True)
class DomainWish:
    """A wish, as it was typed: at most one of paths, hub and expert is given."""

    what: Literal["add", "remove", "replace"]
    domain: str  # its name, or what its data calls it
    paths: tuple[str, ...] = ()  # from where the command runs
    hub: HubText | None = None
    expert: str | None = None  # where a finished one is
    options: Mapping[str, Any] = field(default_factory=dict)  # of the new entry, beside these

    @property
    def name(self) -> str:
        """The domain's name."""
        return domain_name(label_text(self.domain) or self.domain)
