"""What a person sees of a job while its history grows: a bar on a terminal, lines elsewhere."""

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

# Between lines where there is no terminal.
LINE_EVERY_S = 15.0
# Names that a row may have for its loss; the first one that is there counts.
LOSSES = ("train_nats", "loss")
# What is on disk and on screen of a row: numbers, lists of them, null.
Row = dict[str, Any]


class _Pace:
    """Steps, and the figures that a person wants beside them."""

    def __init__(self, total_steps: int) -> None:
        self.total_steps = total_steps
        self.loss: float | None = None
        self.rate: float | None = None
        self.peak_mb = 0.0
        self.start(0)

    def start(self, step: int) -> None:
        self.first = step
        self.step = step
        self.since_s = time.monotonic()

    def row(self, row: Row) -> None:
        self.step = row["step"]
        # a row of an evaluation has neither loss nor rate: the last ones stay on the screen
        self.loss = next((row[key] for key in LOSSES if row.get(key) is not None), self.loss)
        self.rate = row.get("tokens_per_s") or self.rate
        self.peak_mb = max(self.peak_mb, row.get("rss_mb") or 0.0)

    @property
    def figures(self) -> str:
        shown = []
        if self.loss is not None:
            shown.append(f"loss {self.loss:.4f}")
        if self.rate:
            shown.append(f"{self.rate:,.0f} tokens/s")
        if self.peak_mb:
            shown.append(f"peak {self.peak_mb:,.0f} MB")
        return " · ".join(shown)

    @property
    def left(self) -> str:
        # steps of this attempt only: what a killed one took says nothing of this machine
        done = self.step - self.first
        to_do = self.total_steps - self.step
        if done <= 0 or to_do <= 0:
            return ""
        step_s = (time.monotonic() - self.since_s) / done
        return f"{_clock(step_s * to_do)} left"

    @property
    def ending(self) -> str:
        took = _clock(time.monotonic() - self.since_s)
        return f"step {self.step:,} of {self.total_steps:,} after {took}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02}:{rest:02}"
    return f"{minutes}:{rest:02}"


def _joined(*parts: str) -> str:
    """Return what is not empty, in a line."""
    return " · ".join(part for part in parts if part)


class ProgressLine:
    """Progress on a terminal: one line that is drawn over."""

    def __init__(self, console: Console, job: str, total_steps: int) -> None:
        self._pace = _Pace(total_steps)
        figures = TextColumn("{task.fields[figures]}", markup=False)
        name = TextColumn("{task.description}", markup=False)
        self._progress = Progress(
            name,
            BarColumn(24),
            TaskProgressColumn(),
            figures,
            console=console,
            refresh_per_second=4,
            # what a pipe reads must not end up on the screen
            redirect_stdout=sys.stdout.isatty(),
        )
        self._task = self._progress.add_task(job, total=max(total_steps, 1), figures="")

    def start(self, step: int) -> None:
        """Begin at a step."""
        self._pace.start(step)
        self._progress.update(self._task, completed=step)
        self._progress.start()

    def row(self, row: Row) -> None:
        """Take note of a row, and show it where it is time."""
        self._pace.row(row)
        self._draw()

    def step_taken(self, step: int) -> None:
        """Show a step of which there is no row: ten of a large model are minutes."""
        self._pace.step = step
        self._draw()

    def _draw(self) -> None:
        figures = _joined(self._pace.figures, self._pace.left)
        self._progress.update(self._task, completed=self._pace.step, figures=figures)

    def note(self, text: str) -> None:
        """Print a line of its own."""
        self._progress.console.print(text, markup=False, highlight=False)

    def close(self, ok: bool) -> None:
        """Leave the last figures on the screen; a second call does nothing."""
        if self._progress.live.is_started:
            ending = "" if ok else f"stopped at {self._pace.ending}"
            self._progress.update(self._task, figures=_joined(self._pace.figures, ending))
            self._progress.stop()


class Lines:
    """Progress where there is no terminal: a plain line now and then."""

    def __init__(self, console: Console, job: str, total_steps: int) -> None:
        self._console = console
        self._job = job
        self._pace = _Pace(total_steps)
        self._open = False
        self._shown_s = 0.0

    def start(self, step: int) -> None:
        """Begin at a step."""
        self._pace.start(step)
        self._open = True
        self._shown_s = time.monotonic()
        total = f"{self._pace.total_steps:,}"
        self.note(f"goes on at step {step:,} of {total}" if step else f"{total} steps")

    def row(self, row: Row) -> None:
        """Take note of a row, and show it where it is time."""
        self._pace.row(row)
        self._tell()

    def step_taken(self, step: int) -> None:
        """Take note of a step of which there is no row, and show it where it is time."""
        self._pace.step = step
        self._tell()

    def _tell(self) -> None:
        if time.monotonic() - self._shown_s < LINE_EVERY_S:
            return
        self._shown_s = time.monotonic()
        step = f"step {self._pace.step:,} of {self._pace.total_steps:,}"
        self.note(_joined(step, self._pace.figures, self._pace.left))

    def note(self, text: str) -> None:
        """Print a line of its own."""
        self._console.print(f"{self._job}: {text}", markup=False, highlight=False, soft_wrap=True)

    def close(self, ok: bool) -> None:
        """Leave the last figures on the screen; a second call does nothing."""
        if self._open:
            ending = f"{'done' if ok else 'stopped'} at {self._pace.ending}"
            self.note(_joined(ending, self._pace.figures))
        self._open = False
