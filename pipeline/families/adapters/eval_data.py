"""The rows a run of adapters is judged on, and what the stack makes of them.

Invariant: media are opened a few requests at a time and never kept; which rows are used follows
from the run's seed and the evaluate section alone. What cannot be asked within the limits is left
out and counted.

N requests, C choices, F features of a request.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

import numpy as np

from ...config.base import NONE
from ...data.routing.dataset import RoutingRow, RoutingRows
from ...data.tasks.prepare import TaskRow, TaskRows
from ...errors import DataError
from ...metrics.answers import judge, unreadable
from ...protocols import Progress
from .. import Parts
from .config import AdapterRunConfig
from .inference import Request
from .media import Medium
from .stack import ROUTER, AdapterStack, Answer

TOGETHER = 64  # requests whose media are open at once

Row = TypeVar("Row")
Answers = tuple[str, ...]
Figures = dict[str, float | None]  # of one answer, by name; "score" is one of them


@dataclass(frozen=True)
class EvalRequest:
    """One request whose expert is known, and, where its task row is known, what is right."""

    prompt: str
    expert: str
    group: str
    open: Callable[[], list[Medium]]
    ambiguous: bool = False  # its words tell nothing: only what it comes with does
    wanted: Answers = ()  # every right answer; none: only the route can be judged

    def request(self) -> Request:
        """Return the request with its media opened. Raises DataError."""
        media = self.open()
        return Request(self.prompt, tuple(media))


@dataclass(frozen=True)
class Judged:
    """An answer and its figures."""

    text: str
    figures: Figures


@dataclass
class AdapterEvaluator:
    """The run's rows, opened on first asking, and its stack."""

    cfg: AdapterRunConfig
    parts: Parts
    stack: AdapterStack
    progress: Progress
    # set -> requests over the limits, and tasks' rows whose right answers the metric cannot read
    left_out: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.media = self.stack.model.chat.media
        self.routing = RoutingRows(self.parts.folder("routing"))
        self.tasks: dict[str, TaskRows] = {}
        # right answers by expert and row: a routed request names the row that it was made from
        self._wanted: dict[tuple[str, str], Answers] = {}
        for name in self.cfg.experts:
            rows = TaskRows(self.parts.folder("preprocess", name))
            for row in rows.rows("test"):
                self._wanted[name, row.id] = self._right_answers(name, row)
            self.tasks[name] = rows

    @property
    def most_rows(self) -> int | None:
        """Rows of each task and expert at most; None for no limit."""
        settings = self.cfg.evaluate
        return settings.smoke_rows if settings.smoke else settings.rows_per_task

    def task(self, name: str) -> list[EvalRequest]:
        """Return test rows of a task, asked as the task asks. Raises DataError where its metric can
        read no right answer of them."""
        key = f"task {name}"
        rows = self.tasks[name].rows("test")
        requests = []
        unread = 0
        for row in self._sample(rows, key, self.most_rows):
            request = self._of_task(name, row)
            if request.wanted:
                requests.append(request)
            else:
                unread += 1
        if rows and not requests:
            metric = self.cfg.loras.entry(name).metric
            why = unreadable(metric, rows[0].answer)
            raise DataError(
                f"loras.experts.{name}.metric: {metric} can read none of {unread} right answers "
                f"({why} in {rows[0].answer[:60]!r}); choose another metric, or mend the answers"
            )
        kept = self._within_limits(key, requests)
        if unread:
            self.left_out[key] = self.left_out.get(key, 0) + unread
        return kept

    def routed(self, split: str) -> list[EvalRequest]:
        """Return requests of a split of the routing set, as many of each expert."""
        by_expert: dict[str, list[RoutingRow]] = {}
        for row in self.routing.rows(split):
            own = by_expert.setdefault(row.expert, [])
            own.append(row)
        requests = []
        for name, rows in by_expert.items():
            key = f"{split} {name}"
            for row in self._sample(rows, key, self.most_rows):
                requests.append(self._of_routing(row))
        return self._within_limits(split, requests)

    @cached_property
    def learned(self) -> list[RoutingRow]:
        """The training requests of the routing set."""
        return self.routing.rows("train")

    def for_baselines(self) -> list[EvalRequest]:
        """Return training requests that baselines on frozen features learn from."""
        settings = self.cfg.evaluate
        most = settings.baseline_rows
        if settings.smoke:
            # a few of every choice, or a baseline would never have seen some of them
            smoke = settings.smoke_rows * len(self.stack.choices)
            most = min(most, smoke)
        rows = self._sample(self.learned, "baselines", most)
        requests = [self._of_routing(row) for row in rows]
        return self._within_limits("baselines", requests)

    def logits(self, requests: Sequence[EvalRequest], adapter: str = ROUTER) -> np.ndarray:
        """Return logit_NC of the router, or of another adapter that is asked the same."""
        # of no requests there are as many choices, which what follows counts
        if not requests:
            width = len(self.stack.choices)
            return np.empty((0, width))
        parts = []
        for opened, _ in self._opened(requests, f"{adapter} routes"):
            parts.append(self.stack.logits(opened, adapter))
        return np.concatenate(parts)

    def features(self, requests: Sequence[EvalRequest]) -> np.ndarray:
        """Return x_NF of the frozen base."""
        if not requests:
            return np.empty((0, 1))
        parts = []
        for opened, _ in self._opened(requests, "reading with the frozen base"):
            parts.append(self.stack.pooled(opened))
        return np.concatenate(parts)

    def answers(self, requests: Sequence[EvalRequest]) -> list[Answer]:
        """Return the stack's own answers."""
        out: list[Answer] = []
        for opened, _ in self._opened(requests, "answering"):
            out += self.stack.answer(opened)
        return out

    def scores(
        self,
        requests: Sequence[EvalRequest],
        adapters: Sequence[Sequence[str]],
        what: str,
    ) -> list[dict[str, Judged]]:
        """Return each request's answers by adapter with their figures, none of them longer than its
        own expert's may be."""
        out = []
        for opened, part in self._opened(requests, what):
            own = requests[part]
            limits = []
            for request in own:
                # what is right must fit into what may be said, whoever says it
                entry = self.cfg.loras.entry(request.expert)
                limits.append(entry.max_new_tokens)
            generated = self.stack.generate(opened, adapters[part], limits)
            for request, generations in zip(own, generated, strict=True):
                judged = {}
                for name, generation in generations.items():
                    figures = self.judge(request, generation.text)
                    judged[name] = Judged(generation.text, figures)
                out.append(judged)
        return out

    def judge(self, request: EvalRequest, text: str) -> Figures:
        """Return the figures of an answer by the metric of the request's own expert."""
        entry = self.cfg.loras.entry(request.expert)
        return judge(entry.metric, text, request.wanted)

    def answered_by(self, choice: str) -> str:
        """Return who answers a request when the router's first choice always does."""
        if choice == NONE:
            return self.cfg.loras.router.fallback
        return choice

    def _sample(
        self,
        rows: list[Row],
        key: str,
        most: int | None,
    ) -> list[Row]:
        """Return at most so many rows, drawn with the run's seed, in their own order."""
        if most is None or len(rows) <= most:
            return rows
        # every set draws by its own name, so that no other set's size moves what is drawn
        rng = np.random.default_rng([self.cfg.seed, *key.encode()])
        places = rng.choice(len(rows), most, replace=False)
        places.sort()
        return [rows[i] for i in places]

    def _within_limits(self, key: str, requests: list[EvalRequest]) -> list[EvalRequest]:
        kept = []
        for request in requests:
            if self._fits(request):
                kept.append(request)
        dropped = len(requests) - len(kept)
        if dropped:
            self.left_out[key] = dropped
        return kept

    def _fits(self, request: EvalRequest) -> bool:
        try:
            self.stack.model.check(request.request())
        except DataError:
            return False
        return True

    def _of_task(self, name: str, row: TaskRow) -> EvalRequest:
        folder = self.tasks[name].folder
        return EvalRequest(
            prompt=row.prompt,
            expert=name,
            group=row.group,
            open=lambda: self.media.open_row(folder, row),
            wanted=self._right_answers(name, row),
        )

    def _of_routing(self, row: RoutingRow) -> EvalRequest:
        folder = self.routing.folder
        number = row.source.get("row")
        of_row = (row.expert, str(number))
        return EvalRequest(
            prompt=row.prompt,
            expert=row.expert,
            group=row.group,
            open=lambda: self.media.open_row(folder, row),
            ambiguous=row.ambiguous,
            # requests that were brought along are of no task's row: only their route is judged
            wanted=self._wanted.get(of_row, ()),
        )

    def _right_answers(self, name: str, row: TaskRow) -> Answers:
        """Return every right answer of a task row that its metric can read, its own first."""
        metric = self.cfg.loras.entry(name).metric
        others = row.extra.get("answers") or ()
        # each once, in order: a set has none
        distinct = dict.fromkeys([row.answer, *map(str, others)])
        return tuple(answer for answer in distinct if unreadable(metric, answer) is None)

    def _opened(
        self, requests: Sequence[EvalRequest], what: str
    ) -> Iterator[tuple[list[Request], slice]]:
        """Yield some requests opened, and which part of all they are."""
        for start in range(0, len(requests), TOGETHER):
            self.progress(f"evaluating: {what}", start / len(requests))
            part = slice(start, start + TOGETHER)
            opened = []
            for request in requests[part]:
                opened.append(request.request())
            yield opened, part
