"""One thread that has the model: texts come and go between its passes.

A step takes on who waits, reads some tokens of new texts, gives every text that is read a token,
and lets go of those that ended or that nobody waits for. Rows that get a token stand in the first
slots, side by side, those that are being read behind them. Where a dense model stands beside the
stack, its rows are read in passes of their own.

Invariant: only this thread runs the network or changes a row; others add to the line, cancel, and
read pieces.

B rows of a pass, T tokens of the longest, N tokens of one row, D model width, V vocabulary.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ..protocols import POLL_S
from .gates import GateChoice
from .generation import Capacity, Overloaded, Stats
from .networks import Chunk, Network
from .rows import QuestionRow, ServedRow, TextRow
from .sampling import Drawn, check_numbers, draw_all
from .slot_cache import PLACES
from .waiting_line import WaitingLine, has_room

# After which a thread without work ends; the next request starts another.
LINGER_S = 2.0
# The reasons that a text ends for, beside stop and length.
CANCELLED = "cancelled"
FAILED = "failed"

_log = logging.getLogger(__name__)


class Scheduler:
    """Runs rows on a network, as many at once as there is room for."""

    def __init__(self, network: Network, capacity: Capacity, stats: Stats):
        self.network = network
        self.capacity = capacity
        self.prefill_tokens = capacity.prefill_tokens or network.prefill_tokens
        self.stats = stats
        self.stepped: Callable[[int, float], None] | None = None  # told of each step's rows
        self.ended: Callable[[ServedRow, str], None] | None = None  # and of each row's end
        stats.rows = capacity.rows
        stats.prefill_tokens = self.prefill_tokens
        self._line: WaitingLine[ServedRow] = WaitingLine()
        self._next: list[ServedRow] = []  # that follow from one which had its turn
        self._rows: list[ServedRow] = []  # by slot
        self._speaking = 0  # how many of them, from the first on, are read
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closing = False

    def add(self, row: ServedRow) -> None:
        """Put a row into the line. Raises Overloaded."""
        with self._changed:
            waiting = len(self._line)
            room = self.capacity.waiting + self.capacity.rows - len(self._rows)
            own = self._line.of(row.client)
            if self._closing or not has_room(own, waiting, room):
                self.stats.refused += 1
                full = waiting >= room
                raise Overloaded(waiting if full else own, self._closing, one_client=not full)
            self._line.add(row)
            self.stats.waiting = len(self._line)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="scheduler")
                self._thread.start()
            self._changed.notify_all()

    def close(self, seconds: float | None = None) -> None:
        """Take nothing more on; return once all that was taken on has ended, at the latest after so
        long, and then end the rest with Overloaded."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            thread = self._thread
        if thread is None:
            return
        thread.join(seconds)
        if thread.is_alive():
            with self._changed:
                rows = [*self._rows, *self._next, *self._line.take(lambda _row: True)]
            for row in rows:
                row.order.fail(Overloaded(0, closing=True))
            thread.join()

    def _run(self) -> None:
        # No daemon, as Python ends those in the middle of a product, and torch ends the process
        # then as if it had failed; so it looks itself whether the program is over
        while self._wait() and threading.main_thread().is_alive():
            started = time.monotonic()
            try:
                with torch.no_grad():
                    spoke = self._step()
            except Exception as error:  # a fault of ours: whoever asks next is served all the same
                _log.exception("a step failed")
                self._fail_all(error)
                continue
            if spoke and self.stepped:
                self.stepped(spoke, time.monotonic() - started)

    def _wait(self) -> bool:
        """Wait until there is work; False where the thread is to end."""
        with self._changed:
            until = time.monotonic() + LINGER_S
            while not self._has_work and not self._closing and time.monotonic() < until:
                if not threading.main_thread().is_alive():
                    break
                self._changed.wait(POLL_S)
            if self._has_work:
                return True
            if not self._closing:
                # whoever comes next finds none, and starts one
                self.network.cache.clear()
            self._thread = None
            return False

    @property
    def _has_work(self) -> bool:
        return bool(self._rows or self._next or len(self._line))

    def _step(self) -> int:
        """Do what the invariant of this module says; return how many texts had a token."""
        self._let_go()
        self._take_on()
        to_read = list(self._to_read())
        if self.network.packs:
            # one pass reads every weight once for both; who is new draws in the next one
            speaking = self._speaking_chunks()
            self._pass([*speaking, *to_read])
        else:
            self._pass(to_read)
            self._let_go()
            speaking = self._speaking_chunks()
            self._pass(speaking)
        self.stats.steps += 1
        self.stats.step_rows += len(speaking)
        return len(speaking)

    def _speaking_chunks(self) -> list[Chunk]:
        """Return the newest token of each text that is read."""
        chunks = []
        for slot, row in enumerate(self._rows[: self._speaking]):
            if isinstance(row, TextRow):
                chunks.append(Chunk(row, slot, (row.last,), row.read))
        return chunks

    def _let_go(self) -> None:
        """Free the rows that nobody waits for, or whose time is over."""
        for row in list(self._rows):
            self._drop_where_over(row)
        with self._changed:
            gone = self._line.take(lambda row: row.order.is_over() or row.order.is_late)
            self.stats.waiting = len(self._line)
        for row in gone:
            reason = CANCELLED if row.order.is_over() else FAILED
            if reason is FAILED:
                row.end_late()
            self._tell_end(row, reason)
        given_up = [row for row in self._next if row.order.is_over()]
        self._next = [row for row in self._next if row not in given_up]
        for row in given_up:
            self._tell_end(row, CANCELLED)

    def _drop_where_over(self, row: ServedRow) -> None:
        if row.order.is_over():
            self._free(row, CANCELLED)
        elif row.order.is_late:
            self._free(row, row.end_late() or FAILED)

    def _take_on(self) -> None:
        """Give rows to those who wait, as far as there is room."""
        begun: list[ServedRow] = []
        # As many as a step reads: what comes with a text has to be encoded first, and whoever is
        # given tokens already waits for that
        while len(self._rows) < self.capacity.rows and _given(begun) < self.prefill_tokens:
            row = self._whose_turn()
            if row is None or not self._fits(row):
                break
            self._leave_line(row)
            row.begin()
            self._rows.append(row)
            begun.append(row)
        self.stats.running = len(self._rows)
        if begun:
            places = max(row.places for row in self._rows)
            most = self.capacity.cache_bytes // self.network.place_bytes
            self.network.cache.reserve(len(self._rows), places, most)
            self._guarded(begun, self.network.prepare)

    def _whose_turn(self) -> ServedRow | None:
        if self._next:
            return self._next[0]
        with self._changed:
            return self._line.first(Counter(row.client for row in self._rows))

    def _leave_line(self, row: ServedRow) -> None:
        if self._next:
            del self._next[0]
            return
        with self._changed:
            self._line.remove(row)
            self.stats.waiting = len(self._line)

    def _fits(self, row: ServedRow) -> bool:
        """Whether keys and values of one more row have room; alone every row has."""
        if not self._rows:
            # what a longer one needed is given back, as nobody needs it now
            self.network.cache.clear()
            return True
        places = max(each.places for each in (*self._rows, row)) + PLACES
        size = places * (len(self._rows) + 1) * self.network.place_bytes
        return size <= self.capacity.cache_bytes

    def _to_read(self) -> Iterator[Chunk]:
        """Yield what is read next of rows that are not read yet: those that were read least first,
        so that a long one does not keep others from beginning."""
        most = self.prefill_tokens
        waiting = sorted(self._rows[self._speaking :], key=lambda row: row.chunks)
        if self.network.packs:
            yield from self._packed(waiting, most)
            return
        longest = 0
        for taken, row in enumerate(waiting):
            # a batch is as wide as its longest: what only fills it up counts
            if longest * (taken + 1) > most:
                return
            share = max(1, most // (taken + 1))
            count = min(len(row.ids) - row.read, share)
            if longest and max(longest, count) * (taken + 1) > most:
                return
            longest = max(longest, count)
            yield self._next_of(row, count)

    def _packed(self, waiting: Sequence[ServedRow], most: int) -> Iterator[Chunk]:
        """Yield what is read next of these, one behind the other, at most so many tokens."""
        for row in waiting:
            if not most:
                return
            count = min(len(row.ids) - row.read, most)
            most -= count
            yield self._next_of(row, count)

    def _next_of(self, row: ServedRow, count: int) -> Chunk:
        """Return the next so many tokens of a row that is being read."""
        slot = self._rows.index(row)
        return Chunk(row, slot, row.ids[row.read : row.read + count], row.read)

    def _pass(self, chunks: Sequence[Chunk]) -> None:
        """Run one pass of each model that has rows in it, and do with every row what follows."""
        of_stack = [chunk for chunk in chunks if self.network.reads(chunk.row) is self.network]
        others = [chunk for chunk in chunks if self.network.reads(chunk.row) is not self.network]
        for own in (of_stack, others):
            by_row = {id(chunk.row): chunk for chunk in own}
            rows = [chunk.row for chunk in own]
            if rows:
                self._guarded(rows, partial(self._run_chunks, by_row))

    def _run_chunks(self, by_row: Mapping[int, Chunk], rows: Sequence[ServedRow]) -> None:
        self._run_rows([by_row[id(row)] for row in rows])

    def _guarded(
        self, rows: Sequence[ServedRow], work: Callable[[Sequence[ServedRow]], None]
    ) -> None:
        """Do work with rows together; where that fails, with one after another, so that only those
        end that it fails with."""
        try:
            work(rows)
        except Exception as error:  # libraries raise what they like
            if len(rows) > 1:
                for row in rows:
                    self._guarded([row], work)
                return
            _log.exception("a text ended with an error")
            rows[0].order.fail(error)
            self._free(rows[0], FAILED)

    def _run_rows(self, chunks: Sequence[Chunk]) -> None:
        # A row that an earlier attempt freed has moved others
        chunks = [replace(chunk, slot=self._rows.index(chunk.row)) for chunk in chunks]
        network = self.network.reads(chunks[0].row)
        batch = network.batch(chunks)
        x_BTD, told = network.read(batch)
        wanted = []
        for at, chunk in enumerate(chunks):
            if chunk.row.needs_logits and chunk.end >= len(chunk.row.ids):
                wanted.append(at)
        logit_BV = network.logits(batch.last(x_BTD)[wanted])
        # From here on nothing fails for all of them, and what was read stays read
        for chunk, own, choices in zip(chunks, batch.own, told, strict=True):
            row = chunk.row
            self.stats.prompt_tokens += max(0, min(chunk.end, len(row.ids)) - row.read)
            row.read = chunk.end
            row.chunks += 1
            with self._failing_alone(row):
                if row.scores is not None:
                    next_ids = row.ids[chunk.start + 1 : chunk.end + 1]
                    x_ND = x_BTD.flatten(0, 1)[own][: len(next_ids)]
                    row.scored(network.scored(x_ND, next_ids, row.scores))
                if row.tells_all:
                    row.heard(choices)
        self._answer([chunks[at].row for at in wanted], logit_BV, [told[at] for at in wanted])
        for chunk in chunks:
            if not chunk.row.needs_logits and not chunk.row.is_reading:
                self._free(chunk.row, "stop")

    @contextmanager
    def _failing_alone(self, row: ServedRow) -> Iterator[None]:
        """End a row with what is raised inside."""
        try:
            yield
        except Exception as error:  # a decoder's, say, at tokens of this text
            _log.exception("a text ended with an error")
            row.order.fail(error)
            self._free(row, FAILED)
            if isinstance(error, ArithmeticError):
                # what it kept may be no numbers: a mask multiplies it by 0, which makes it none
                self.network.cache.wipe([each.read for each in self._rows])

    def _answer(
        self, rows: Sequence[ServedRow], logit_BV: Tensor, told: Sequence[Sequence[GateChoice]]
    ) -> None:
        """Give rows that are read their next token, or their answer."""
        texts: list[TextRow] = []
        places = []
        for at, row in enumerate(rows):
            if row.order.is_over():
                continue  # given up while the pass ran: its row is free before the next one
            if isinstance(row, TextRow):
                texts.append(row)
                places.append(at)
            elif isinstance(row, QuestionRow):
                with self._failing_alone(row):
                    check_numbers(logit_BV[at])
                    self._next += row.answered(logit_BV[at])
                self._free(row, "stop")
        if not texts:
            return
        samplers = [row.sampler for row in texts]
        drawn = draw_all(samplers, logit_BV[places])
        for at, row, token in zip(places, texts, drawn, strict=True):
            with self._failing_alone(row):
                if isinstance(token, Exception):
                    raise token
                self._take(row, token, told[at][-1])

    def _take(self, row: TextRow, token: Drawn, choice: GateChoice) -> None:
        """Give a text its next token."""
        finish = row.take(token, choice)
        self._count(choice)
        if finish:
            self._free(row, finish)
        elif self._rows.index(row) >= self._speaking:
            self._promote(row)

    def _count(self, choice: GateChoice) -> None:
        stats = self.stats
        stats.completion_tokens += 1
        for experts in choice.experts:
            for expert in experts:
                name = self.network.speakers[expert]
                stats.spoken[name] = stats.spoken.get(name, 0.0) + 1

    def _promote(self, row: ServedRow) -> None:
        """Have a row among those that get tokens."""
        slot = self._rows.index(row)
        first = self._speaking
        if slot != first:
            other = self._rows[first]
            self.network.cache.swap(slot, first, max(row.read, other.read))
            self._rows[first] = row
            self._rows[slot] = other
        self._speaking += 1

    def _free(self, row: ServedRow, reason: str) -> None:
        """Let a row go, and close the gap that it leaves."""
        if row not in self._rows:
            return
        gap = self._rows.index(row)
        if gap < self._speaking:
            self._speaking -= 1
            self._fill(gap, self._speaking)
            gap = self._speaking
        self._fill(gap, len(self._rows) - 1)
        self._rows.pop()
        self.stats.running = len(self._rows)
        self._tell_end(row, reason)

    def _fill(self, gap: int, source: int) -> None:
        if gap != source:
            moved = self._rows[source]
            self.network.cache.move(source, gap, moved.read)
            self._rows[gap] = moved

    def _tell_end(self, row: ServedRow, reason: str) -> None:
        if isinstance(row, TextRow):
            if reason == CANCELLED:
                self.stats.cancelled += 1
            elif reason == FAILED:
                self.stats.failed += 1
            else:
                self.stats.finished += 1
        if self.ended:
            self.ended(row, reason)

    def _fail_all(self, error: Exception) -> None:
        """End everything that runs."""
        with self._changed:
            rows = [*self._rows, *self._next]
            self._rows = []
            self._next = []
            self._speaking = 0
        for row in rows:
            row.order.fail(error)


def _given(rows: Sequence[ServedRow]) -> int:
    """Return how many tokens rows begin with."""
    return sum(len(row.ids) for row in rows)
