"""The rows a lora_vlm run is judged on, and what the stack makes of them.

Invariant: pictures are opened a few at a time and never kept; which rows are used follows from the
run's seed and the evaluate section alone. What cannot be asked within the limits is left out and
counted.

N requests, C choices, F features of a request.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import numpy as np

from ...config.base import NONE
from ...data.routing.dataset import RoutingRow, RoutingRows
from ...data.tasks.prepare import TaskRow, TaskRows
from ...errors import DataError
from ...metrics.answers import judge
from ...protocols import Progress
from ..lora_vlm.config import LoraVlmConfig
from .inference import Request
from .stack import ROUTER, AdapterStack, Answer

TOGETHER = 64  # requests whose pictures are open at once


@dataclass(frozen=True)
class EvalRequest:
    """One request whose expert is known, and, where its task row is known, what is right."""

    prompt: str
    expert: str
    group: str
    open: Callable[[], list]  # the pictures
    ambiguous: bool = False
    wanted: tuple[str, ...] = ()  # every right answer; none: only the route can be judged

    def request(self) -> Request:
        """Return the request with its pictures opened. Raises DataError."""
        return Request(self.prompt, tuple(self.open()))


@dataclass
class AdapterEvaluator:
    """The run's rows, opened on first asking."""

    cfg: LoraVlmConfig
    parts: object
    stack: AdapterStack
    progress: Progress
    left_out: dict[str, int] = field(default_factory=dict)  # set -> requests over the limits

    def __post_init__(self):
        self.tasks = {
            name: TaskRows(self.parts.folder("preprocess", name)) for name in self.cfg.experts
        }
        self.routing = RoutingRows(self.parts.folder("routing"))
        self._answers = {
            (name, row.id): _wanted(row)
            for name, rows in self.tasks.items()
            for row in rows.rows("test")
        }

    @property
    def most(self) -> int | None:
        """Rows of each task and expert at most; None for no limit."""
        settings = self.cfg.evaluate
        return settings.smoke_rows if settings.smoke else settings.rows_per_task

    def task(self, name: str) -> list[EvalRequest]:
        """Return test rows of a task, asked as the task asks."""
        rows = self.tasks[name]
        asked = [
            self._of_task(name, rows, row)
            for row in self._some(rows.rows("test"), f"task {name}", self.most)
        ]
        return self._that_fit(f"task {name}", asked)

    def routed(self, split: str) -> list[EvalRequest]:
        """Return requests of a split of the routing set, as many of each expert."""
        own: dict[str, list[RoutingRow]] = {}
        for row in self.routing.rows(split):
            own.setdefault(row.expert, []).append(row)
        kept = [
            row
            for name, rows in own.items()
            for row in self._some(rows, f"{split} {name}", self.most)
        ]
        return self._that_fit(split, [self._of_routing(row) for row in kept])

    @cached_property
    def learned(self) -> list[RoutingRow]:
        """The training requests of the routing set."""
        return self.routing.rows("train")

    def for_baselines(self) -> list[EvalRequest]:
        """Return training requests that baselines on frozen features learn from."""
        most = self.cfg.evaluate.baseline_rows
        if self.cfg.evaluate.smoke:
            most = min(most, self.cfg.evaluate.smoke_rows * len(self.stack.choices))
        rows = self._some(self.learned, "baselines", most)
        return self._that_fit("baselines", [self._of_routing(row) for row in rows])

    def logits(self, asked: Sequence[EvalRequest], adapter: str = ROUTER) -> np.ndarray:
        """Return logit_NC of the router, or of another adapter that is asked the same."""
        parts = [
            self.stack.logits(requests, adapter)
            for requests, _ in self._opened(asked, f"{adapter} routes")
        ]
        return np.concatenate(parts) if parts else np.empty((0, len(self.stack.choices)))

    def features(self, asked: Sequence[EvalRequest]) -> np.ndarray:
        """Return x_NF of the frozen base."""
        parts = [
            self.stack.pooled(requests)
            for requests, _ in self._opened(asked, "reading with the frozen base")
        ]
        return np.concatenate(parts) if parts else np.empty((0, 1))

    def answers(self, asked: Sequence[EvalRequest]) -> list[Answer]:
        """Return the stack's own answers."""
        return [
            a
            for requests, _ in self._opened(asked, "answering")
            for a in self.stack.answer(requests)
        ]

    def scores(
        self, asked: Sequence[EvalRequest], adapters: Sequence[Sequence[str]], what: str
    ) -> list[dict[str, dict]]:
        """Return the figures of each request's answers, none of them longer than its own expert's
        may be."""
        out = []
        for requests, places in self._opened(asked, what):
            most = [self.cfg.loras.entry(asked[i].expert).max_new_tokens for i in places]
            said = self.stack.trial(requests, [adapters[i] for i in places], most)
            for i, each in zip(places, said, strict=True):
                out.append(
                    {name: self.judge(asked[i], answer.text) for name, answer in each.items()}
                )
        return out

    def judge(self, asked: EvalRequest, text: str) -> dict[str, float | None]:
        """Return the figures of an answer by the metric of the request's own expert."""
        return judge(self.cfg.loras.entry(asked.expert).metric, text, asked.wanted)

    def runs(self, choice: str) -> str:
        """Return who answers a request when the router's first choice always does."""
        return self.cfg.loras.router.fallback if choice == NONE else choice

    def _some(self, rows: list, key: str, most: int | None) -> list:
        """Return at most so many rows, drawn with the run's seed, in their own order."""
        if most is None or len(rows) <= most:
            return rows
        seed = [self.cfg.seed, *key.encode()]
        return [
            rows[i]
            for i in np.sort(np.random.default_rng(seed).choice(len(rows), most, replace=False))
        ]

    def _that_fit(self, key: str, asked: list[EvalRequest]) -> list[EvalRequest]:
        out = [each for each in asked if self._fits(each)]
        if len(out) < len(asked):
            self.left_out[key] = len(asked) - len(out)
        return out

    def _fits(self, asked: EvalRequest) -> bool:
        try:
            self.stack.mixed.check(asked.request())
        except DataError:
            return False
        return True

    def _of_task(self, name: str, rows: TaskRows, row: TaskRow) -> EvalRequest:
        return EvalRequest(
            row.prompt, name, row.group, lambda: rows.pictures(row), wanted=_wanted(row)
        )

    def _of_routing(self, row: RoutingRow) -> EvalRequest:
        wanted = self._answers.get((row.expert, str(row.source.get("row"))), ())
        return EvalRequest(
            row.prompt,
            row.expert,
            row.group,
            lambda: self.routing.pictures(row),
            row.ambiguous,
            wanted,
        )

    def _opened(
        self, asked: Sequence[EvalRequest], what: str
    ) -> Iterator[tuple[list[Request], range]]:
        for start, end in pairwise([*range(0, len(asked), TOGETHER), len(asked)] if asked else []):
            self.progress(f"evaluating: {what}", start / len(asked))
            yield [each.request() for each in asked[start:end]], range(start, end)


def _wanted(row: TaskRow) -> tuple[str, ...]:
    """Return every right answer of a task row."""
    return tuple(dict.fromkeys([row.answer, *map(str, row.extra.get("answers") or ())]))
