"""What a routing row asks: its own words, a paraphrase, or a neutral prompt that leaves the answer
to the picture.

Invariant: held-out wordings occur in test_held alone; which wordings a row is offered, and in which
order, depends on the seed and the row alone.
"""

import hashlib
from collections.abc import Iterator, Sequence

from ...config.routing_set import RoutingSetConfig, WordingConfig
from ...errors import ConfigError
from ..tasks.groups import normalized

# In a paraphrase: the row's own prompt.
OWN = "{prompt}"


class PromptChooser:
    """The wordings of every expert and the neutral ones."""

    def __init__(self, settings: RoutingSetConfig):
        self.paraphrases = settings.paraphrases
        self.neutral = settings.neutral
        self.seed = settings.seed
        self.max_chars = settings.limits.max_prompt_chars

    @property
    def seen(self) -> list[str]:
        """Every wording that training rows may have beside their own."""
        texts: list[str] = []
        for _, wordings in self._by_setting():
            texts += wordings.seen
        return texts

    def check(self, experts: tuple[str, ...]) -> None:
        """Raise ConfigError for wordings of an unknown expert, or both seen and held out."""
        unknown = sorted(set(self.paraphrases) - set(experts))
        if unknown:
            raise ConfigError(
                f"dataset.paraphrases: unknown expert {', '.join(unknown)}; the sources have "
                f"{', '.join(experts)}"
            )
        # Of all experts together: what one trains with, another cannot hold out.
        seen_in = {}
        for setting, wordings in self._by_setting():
            for text in wordings.seen:
                seen_in[normalized(text)] = setting
        for setting, wordings in self._by_setting():
            for text in wordings.held:
                if normalized(text) in seen_in:
                    raise ConfigError(
                        f"{setting}.held: {text!r} also stands in {seen_in[normalized(text)]}.seen;"
                        " a held-out wording must not be trained with, so remove one of the two"
                    )

    def has_held(self, expert: str) -> bool:
        """Tell whether an expert has wordings of its own for test_held."""
        wordings = self.paraphrases.get(expert)
        return bool(wordings and wordings.held)

    @property
    def any_held(self) -> bool:
        """Whether any expert has."""
        return any(map(self.has_held, self.paraphrases))

    def options(
        self,
        row: str,
        prompt: str,
        expert: str,
        split: str,
        neutral: bool,
    ) -> Iterator[tuple[str, bool]]:
        """Yield (text, whether it is neutral) for a row, the likeliest first; with neutral, those
        before the others."""
        is_held = split == "test_held"
        if neutral:
            texts = self.neutral.held if is_held else self.neutral.seen
            for text in self._rotated(texts, row, "neutral"):
                yield text, True

        # An expert without held-out wordings is asked with its rows' own prompts in test_held.
        wordings = self.paraphrases.get(expert)
        own: Sequence[str] = [OWN]
        if wordings and is_held and wordings.held:
            own = wordings.held
        elif wordings and not is_held:
            own = [OWN, *wordings.seen]
        # A wording that is written twice would be twice as likely.
        for text in self._rotated(list(dict.fromkeys(own)), row, "paraphrase"):
            filled = text.replace(OWN, prompt)
            if len(filled) <= self.max_chars:
                yield filled, False

    def _rotated(self, texts: Sequence[str], row: str, purpose: str) -> list[str]:
        """Return texts begun at a place that the row decides."""
        # Rotated and not shuffled: each of them comes first for as many rows as any other.
        start = keyed_number(self.seed, purpose, row) % max(1, len(texts))
        return [*texts[start:], *texts[:start]]

    def _by_setting(self) -> Iterator[tuple[str, WordingConfig]]:
        for name, wordings in sorted(self.paraphrases.items()):
            yield f"dataset.paraphrases.{name}", wordings
        yield "dataset.neutral", self.neutral


def keyed_number(seed: int, purpose: str, text: str) -> int:
    """Return a 63-bit number that looks random, the same in every process."""
    # Python's own hash() is salted by process.
    key = str(seed).encode()
    digest = hashlib.blake2b(f"{purpose}\0{text}".encode(), digest_size=8, key=key).digest()
    # SQLite's integers are signed, so the highest bit goes.
    return int.from_bytes(digest, "little") >> 1
