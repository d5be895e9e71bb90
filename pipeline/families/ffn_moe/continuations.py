"""How held-out texts go on: as they were written, and as several networks write them, greedily.

B sequences, T tokens, D model width, V vocabulary.
"""

from collections.abc import Collection, Sequence

import numpy as np
import torch

from ...data.text.shards import Shards
from ...hardware import device, uses_bf16
from ...model.loss import logits
from ...model.trunk import Ffn, Trunk
from ...protocols import Progress
from ...report.schema.language import Continuation, Span, WrittenText
from .. import Parts
from .config import FfnMoeConfig
from .speakers import Heard, spans
from .stock import run_tokenizer

PROMPT_TOKENS = 32  # or half of the context, where that is less
# Of the dense baselines the first that a run has: the closest rival before the others
RIVALS = ("total", "ffn", "path", "scratch", "wide")
_LEAST_TOKENS = 8  # that a document goes on for after its prompt


def writers(cfg: FfnMoeConfig, base: str, stack: str) -> set[str]:
    """Return the names of the rows that go on with texts: base, closest dense rival, stack."""
    names = {base, stack}
    rivals = [rival for rival in RIVALS if rival in cfg.dense.baselines]
    if rivals:
        names.add(f"dense {rivals[0]}")
    return names


class ContinuationWriter:
    """The beginnings of held-out texts, one a domain, and what was written after them so far."""

    def __init__(self, cfg: FfnMoeConfig, parts: Parts, shards: Shards, progress: Progress):
        # Who wants no text in the report wants none here either
        self.tokens = cfg.evaluate.continuation_tokens if cfg.evaluate.samples else 0
        self.context = cfg.trunk.context_tokens
        self.prompt = min(PROMPT_TOKENS, self.context // 2)
        self.bf16 = uses_bf16(cfg.dtype)
        self.progress = progress
        self.end_id = shards.end_id
        self.lead = len(shards.lead)
        self.documents: dict[str, np.ndarray] = {}
        self.found: dict[str, list[WrittenText]] = {}
        self.spoken: dict[str, tuple[Span, ...]] = {}
        if not self.tokens:
            return
        self.tokenizer = run_tokenizer(parts)
        for domain in shards.domains:
            ids_T = _first_document(shards, domain, self.prompt)
            if ids_T is not None:
                self.documents[domain] = ids_T
                self.found[domain] = []

    @property
    def domains(self) -> tuple[str, ...]:
        """Those that a text of goes on; none where no text is asked for."""
        return tuple(self.documents)

    def prompts(self, domains: Sequence[str]) -> torch.Tensor:
        """Return ids_BT of the beginnings of some domains' texts, with what leads them."""
        # Equally long, so that they run together
        ids = [self.documents[domain][: self.lead + self.prompt] for domain in domains]
        return torch.from_numpy(np.stack(ids)).to(device())

    def add(
        self,
        name: str,
        trunk: Trunk,
        ffn: Ffn,
        domains: Collection[str] | None = None,
        heard: Heard | None = None,
    ) -> None:
        """Let a network go on with the texts of all domains, or of some, under its row's name;
        `heard`, of the stack alone, tells who chose each token."""
        own = [domain for domain in self.documents if domains is None or domain in domains]
        if not own:
            return
        self.progress(f"{name} writes on", None)
        written_BT, speakers_BT = self._greedy(trunk, ffn, self.prompts(own), heard)
        for i, (domain, written_T) in enumerate(zip(own, written_BT.tolist(), strict=True)):
            if self.end_id in written_T:
                written_T = written_T[: written_T.index(self.end_id)]
            before_T = self._prompt(domain)
            self.found[domain].append(WrittenText(name, self.tokenizer.decode(written_T, before_T)))
            if heard is not None:
                told = spans(self.tokenizer, written_T, speakers_BT[i], before_T)
                self.spoken[domain] = told

    def texts(self) -> tuple[Continuation, ...]:
        """Return each domain's prompt with all that came after it."""
        out = []
        for domain, ids_T in self.documents.items():
            prompt_T = self._prompt(domain)
            held_out_T = ids_T[self.lead + self.prompt :][: self.tokens].tolist()
            out.append(
                Continuation(
                    domain=domain,
                    prompt=self.tokenizer.decode(prompt_T),
                    held_out=self.tokenizer.decode(held_out_T, prompt_T),
                    written=tuple(self.found[domain]),
                    spans=self.spoken.get(domain, ()),
                )
            )
        return tuple(out)

    def _greedy(
        self, trunk: Trunk, ffn: Ffn, ids_BT: torch.Tensor, heard: Heard | None
    ) -> tuple[torch.Tensor, list[list[str]]]:
        """Return the ids after a prompt, each the most probable one, and by row who chose them."""
        start = ids_BT.shape[1]
        speakers_BT: list[list[str]] = [[] for _ in ids_BT]
        dtype = torch.bfloat16 if self.bf16 else torch.float32
        autocast = torch.autocast(ids_BT.device.type, dtype, enabled=self.bf16)
        for _ in range(self.tokens):
            # The slots of a trunk know no cache: all that it can look back at runs again
            seen_BT = ids_BT[:, -self.context :]
            with torch.no_grad(), autocast:
                h_BTD = trunk.hidden(seen_BT, ffn)
            logits_BV = logits(h_BTD[:, -1], trunk.head, dtype)
            next_B1 = logits_BV.argmax(-1, keepdim=True)
            ids_BT = torch.cat([ids_BT, next_B1], 1)
            # A token is chosen where the one before it is read
            for row, spoken_T in zip(speakers_BT, heard() if heard else (), strict=False):
                row.append(spoken_T[-1])
        return ids_BT[:, start:], speakers_BT

    def _prompt(self, domain: str) -> list[int]:
        """Return the tokens that a domain's text begins with."""
        # What leads a document is nobody's text
        prompt: list[int] = self.documents[domain][self.lead : self.lead + self.prompt].tolist()
        return prompt


def _first_document(shards: Shards, domain: str, prompt: int) -> np.ndarray | None:
    """Return ids_T of the first held-out document that is long enough, what leads it included; None
    where there is none."""
    starts_n, _ = shards.documents("test", domain)
    least = len(shards.lead) + prompt + _LEAST_TOKENS
    long_enough = np.flatnonzero(np.diff(starts_n) >= least)
    if not long_enough.size:
        return None
    first = int(long_enough[0])
    stream = shards.stream("test", domain)
    return np.asarray(stream[starts_n[first] : starts_n[first + 1]], dtype=np.int64)
