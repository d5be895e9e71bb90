"""What a routing row asks: its own words, a paraphrase, or a neutral prompt that leaves the answer
to the picture.

Invariant: held-out wordings occur in test_held alone; which wordings a row is offered, and in which
order, depends on the seed and the row alone.
"""

import hashlib
from collections.abc import Iterator, Sequence

from ...config.routing_set import RoutingSetConfig, WordingConfig
from ...errors import ConfigError
from .rows import normalized

OWN = "{prompt}"  # in a paraphrase: the row's own prompt


class PromptChooser:
    """The wordings of every expert and the neutral ones."""

    def __init__(self, settings: RoutingSetConfig):
        self.paraphrases, self.neutral = settings.paraphrases, settings.neutral
        self.seed, self.max_chars = settings.seed, settings.limits.max_prompt_chars

    @property
    def seen(self) -> list[str]:
        """Every wording that training rows may have beside their own."""
        return [text for _, lists in self._lists() for text in lists.seen]

    def check(self, experts: tuple[str, ...]) -> None:
        """Raise ConfigError for wordings of an unknown expert, or both seen and held out."""
        if strange := sorted(set(self.paraphrases) - set(experts)):
            raise ConfigError(
                f"dataset.paraphrases: unknown expert {', '.join(strange)}; the sources have {', '.join(experts)}"
            )
        seen = {normalized(text): where for where, lists in self._lists() for text in lists.seen}
        for where, lists in self._lists():
            for text in lists.held:
                if normalized(text) in seen:
                    raise ConfigError(
                        f"{where}.held: {text!r} also stands in {seen[normalized(text)]}.seen; a held-out wording must "
                        "not be trained with, so remove one of the two"
                    )

    def held(self, expert: str) -> bool:
        """Tell whether an expert has wordings of its own for test_held."""
        lists = self.paraphrases.get(expert)
        return bool(lists and lists.held)

    @property
    def any_held(self) -> bool:
        """Whether any expert has."""
        return any(map(self.held, self.paraphrases))

    def options(
        self, row: str, prompt: str, expert: str, split: str, neutral: bool
    ) -> Iterator[tuple[str, bool]]:
        """Yield (text, whether it is neutral) for a row, the likeliest first; with neutral, those
        before the others."""
        held = split == "test_held"
        if neutral:
            for text in self._turned(
                self.neutral.held if held else self.neutral.seen, row, "neutral"
            ):
                yield text, True
        lists = self.paraphrases.get(expert)
        seen = [OWN, *(lists.seen if lists and not held else ())]
        own = lists.held if held and self.held(expert) else seen
        for text in self._turned(list(dict.fromkeys(own)), row, "paraphrase"):
            filled = text.replace(OWN, prompt)
            if len(filled) <= self.max_chars:
                yield filled, False

    def _turned(self, texts: Sequence[str], row: str, purpose: str) -> list[str]:
        """Return texts begun at a place that the row decides."""
        start = keyed(self.seed, purpose, row) % max(1, len(texts))
        return [*texts[start:], *texts[:start]]

    def _lists(self) -> Iterator[tuple[str, WordingConfig]]:
        yield from (
            (f"dataset.paraphrases.{name}", lists)
            for name, lists in sorted(self.paraphrases.items())
        )
        yield "dataset.neutral", self.neutral


def keyed(seed: int, purpose: str, text: str) -> int:
    """Return a 63-bit number that looks random, the same in every process."""
    digest = hashlib.blake2b(
        f"{purpose}\0{text}".encode(), digest_size=8, key=str(seed).encode()
    ).digest()
    return int.from_bytes(digest, "little") >> 1
