"""How many tokens a second does a bundle give to many clients, and what does it cost each of them?

python -m benchmarks.serve_throughput BUNDLE --out benchmarks/serve_throughput_epyc_2026-11-27.md

Clients ask one request after another for so long, of mixed lengths and readers, and with pictures
where the bundle takes any; one in ten leaves in the middle of its answer. Of what is not cut off
some answers, drawn at random, are held against the same request alone (--held, of each round); of
rounds of minutes memory is told at the end of each. Beside it, in turns with it, transformers' own
`generate` on the stock checkpoint: one text after another, and batches of as many equally long ones
as there are clients; of questions with pictures, under one adapter and under several
(plain_chat.py). Claims are ratios within this run. The exit status is 1 where an answer differs.

B rows, T tokens.
"""

import argparse
import random
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import psutil
import torch
from PIL import Image, ImageDraw

from benchmarks import plain_chat
from benchmarks.measuring import finish, hardware, percentiles, progress, table
from pipeline.config.serving import Dtype
from pipeline.serve.chat_engine import ChatEngine
from pipeline.serve.engine import CompletionEngine
from pipeline.serve.engines import engine_of
from pipeline.serve.generation import Capacity, Generation, Prompt, Sampling
from pipeline.serve.opening import open_model

CLIENTS = (1, 4, 16, 64)
SECONDS = 60.0
LEAVING = 0.1  # of requests
PROMPT_TOKENS = (4, 16, 64, 200)
NEW_TOKENS = (16, 64, 256)
QUESTIONS = ("what is in the picture?", "how many are there?", "which one is it, and where?")
WARM_UP = 3  # requests before anything is timed
HELD = 12  # answers of a round that are held against the same alone, unless it is said


@dataclass
class Round:
    """What so many clients had."""

    clients: int
    seconds: float = 0.0
    tokens: int = 0
    requests: int = 0
    left: int = 0
    first_s: list[float] = field(default_factory=list)
    next_s: list[float] = field(default_factory=list)
    held: int = 0  # answers that were asked for again, alone
    different: int = 0  # of these
    early_mb: float = 0.0  # highest in the first tenth of the time
    peak_mb: float = 0.0
    minutes_mb: list[float] = field(default_factory=list)  # at the end of each

    @property
    def rate(self) -> float:
        """Tokens a second, over all clients."""
        return self.tokens / self.seconds


class Kept:
    """A few of many answers, each as likely as any other to be among them (reservoir sampling):
    all of them alone would take as long again as there are clients, and their pictures would be
    what the memory of a round is full of."""

    def __init__(self, most: int, seed: int):
        self.generations: list[Generation] = []
        self._most = most
        self._offered = 0
        self._draw = random.Random(seed)

    def offer(self, generation: Generation) -> None:
        """Keep an answer, or not."""
        self._offered += 1
        if len(self.generations) < self._most:
            self.generations.append(generation)
            return
        place = self._draw.randrange(self._offered)
        if place < self._most:
            self.generations[place] = generation


class Asking:
    """Random requests to an engine, the same for the same seed.

    long: answers to questions are as long as a reader gives any, up to one of NEW_TOKENS, whatever
    ends them.
    """

    def __init__(self, engine: Any, seed: int, long: bool = False):
        self.engine = engine
        self.long = long
        self.draw = random.Random(seed)

    def next(self) -> tuple[Prompt, Sampling]:
        """Return another request."""
        draw, engine = self.draw, self.engine
        reader = draw.choice((None, None, None, *engine.readers))
        if isinstance(engine, ChatEngine):
            new = draw.choice(NEW_TOKENS) if self.long else None
            return self._question(reader), Sampling(new, 0.0, past_end=self.long)
        new = min(draw.choice(NEW_TOKENS), engine.context_tokens // 2)
        most = max(1, engine.context_tokens - new)
        count = min(draw.choice(PROMPT_TOKENS), most)
        return Prompt(drawn_ids(draw, engine, count), reader=reader), Sampling(new, 0.0)

    def _question(self, reader: str | None) -> Prompt:
        stack = self.engine.stack
        text, media = question(self.draw)
        return Prompt(stack.prompt_ids(text, media), media, reader, stack.routing_ids(text, media))


def drawn_ids(draw: random.Random, engine: Any, count: int) -> tuple[int, ...]:
    """Return random tokens that end no text, led by what leads one."""
    led = list(engine.start_ids)[:count]
    ends = engine._end_ids()
    while len(led) < count:
        token = draw.randrange(engine.network.vocab_size)
        if token not in ends:
            led.append(token)
    return tuple(led)


def question(draw: random.Random) -> plain_chat.Question:
    """Return a random question with no, one or two pictures."""
    media = tuple(_picture(draw) for _ in range(draw.choice((0, 1, 1, 2))))
    return draw.choice(QUESTIONS), media


def _picture(draw: random.Random) -> Image.Image:
    side = draw.choice((128, 192, 256))
    image = Image.new("RGB", (side, side), "white")
    for _ in range(3):
        x, y = draw.randrange(side // 2), draw.randrange(side // 2)
        colour = tuple(draw.randrange(256) for _ in range(3))
        ImageDraw.Draw(image).rectangle([x, y, x + side // 3, y + side // 4], fill=colour)
    return image


def served(
    engine: Any, clients: int, seconds: float, held: int = HELD, long: bool = False
) -> Round:
    """Let so many clients ask for so long, and hold some of what they were told against the same
    alone."""
    found = Round(clients)
    lock = threading.Lock()
    kept = Kept(held, clients)
    until = time.monotonic() + seconds

    def client(number: int) -> None:
        asking = Asking(engine, number, long)
        while time.monotonic() < until:
            generation = engine.submit(*asking.next(), client=str(number))
            leaves = asking.draw.random() < LEAVING
            times = list(_followed(generation, 2 if leaves else None))
            with lock:
                found.requests += 1
                found.left += leaves
                found.tokens += generation.completion_tokens
                if times:
                    found.first_s.append(times[0] - generation.times.asked)
                    found.next_s += [later - before for before, later in pairwise(times)]
                if not leaves:
                    kept.offer(generation)

    threads = [threading.Thread(target=client, args=(at,)) for at in range(clients)]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    process = psutil.Process()
    while any(thread.is_alive() for thread in threads):
        found.peak_mb = max(found.peak_mb, process.memory_info().rss / 1e6)
        if time.monotonic() < started + seconds / 10:
            found.early_mb = found.peak_mb
        if time.monotonic() >= started + 60 * (len(found.minutes_mb) + 1):
            found.minutes_mb.append(process.memory_info().rss / 1e6)
            progress(f"minute {len(found.minutes_mb)}: {found.minutes_mb[-1]:,.0f} MB")
        time.sleep(0.1)
    found.seconds = time.monotonic() - started
    found.held = len(kept.generations)
    for generation in kept.generations:
        alone = engine.submit(generation.prompt, generation.sampling)
        found.different += spoken(alone) != spoken(generation)
    return found


def _followed(generation: Generation, most: int | None) -> Iterator[float]:
    """Yield when each token came; who leaves does so after some."""
    for seen, piece in enumerate(generation.follow(), start=1):
        if piece.token:
            yield time.monotonic()
        if most is not None and seen >= most:
            return


def spoken(generation: Generation) -> tuple[int, ...]:
    """Return the tokens of a text."""
    return tuple(piece.token.id for piece in generation.wait() if piece.token)


def plain(folder: Path, engine: CompletionEngine, rows: int, rounds: int) -> float:
    """Return tokens a second of `generate` on batches of equally long texts."""
    model: Any = open_model(folder)
    draw = random.Random(rows)
    new = min(32, engine.context_tokens // 2)
    count = min(64, engine.context_tokens - new)
    rates = []
    for _ in range(rounds):
        ids_BT = torch.tensor([drawn_ids(draw, engine, count) for _ in range(rows)])
        started = time.monotonic()
        with torch.no_grad():
            model.generate(
                ids_BT,
                attention_mask=torch.ones_like(ids_BT),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
            )
        rates.append(rows * new / (time.monotonic() - started))
    return statistics.median(rates)


def alike(engine: CompletionEngine, rows: int, rounds: int) -> float:
    """Return tokens a second of the engine on what `plain` gives `generate`."""
    draw = random.Random(rows)
    new = min(32, engine.context_tokens // 2)
    count = min(64, engine.context_tokens - new)
    never = dict.fromkeys(engine._end_ids(), -10000.0)
    rates = []
    for _ in range(rounds):
        prompts = [Prompt(drawn_ids(draw, engine, count)) for _ in range(rows)]
        started = time.monotonic()
        running = [engine.submit(each, Sampling(new, 0.0, logit_bias=never)) for each in prompts]
        drawn = 0
        for generation in running:
            generation.wait()
            drawn += generation.completion_tokens
        rates.append(drawn / (time.monotonic() - started))
    return statistics.median(rates)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit status."""
    args = _arguments(argv)
    torch.set_num_threads(args.threads)
    capacity = Capacity(rows=max(args.clients), prefill_tokens=args.prefill_tokens)
    engine = engine_of(args.bundle, capacity, args.dtype)
    asking = Asking(engine, -1, args.long)
    for _ in range(WARM_UP):
        engine.submit(*asking.next()).wait()
    rounds = []
    for clients in args.clients:
        progress(f"{clients} clients for {args.seconds:.0f} s")
        rounds.append(served(engine, clients, args.seconds, args.held, args.long))
    text = _rounds(rounds) + _minutes(rounds)
    notes = NOTES
    if isinstance(engine, CompletionEngine):
        text += "\n" + _beside_generate(args, engine)
        notes += OF_TEXTS
    elif isinstance(engine, ChatEngine):
        text += "\n" + plain_chat.beside_generate(
            args.bundle, engine, question, args.clients, args.rounds
        )
        notes += OF_QUESTIONS
    finish(
        args,
        "serve_throughput",
        f"Serving {engine.name} to many clients",
        text,
        notes,
        hardware(args.threads, ("torch", "transformers")),
    )
    return int(any(each.different for each in rounds))


def _rounds(rounds: Sequence[Round]) -> str:
    one = rounds[0].rate
    lines = []
    for each in rounds:
        lines.append(
            [
                f"{each.clients}",
                f"{each.rate:.1f}",
                f"{each.rate / one:.2f}",
                f"{each.requests}, {each.left} left",
                percentiles(each.first_s, digits=3),
                percentiles(each.next_s, 1e3),
                f"{each.early_mb:,.0f}, {each.peak_mb:,.0f}",
                f"{each.different} of {each.held}",
            ]
        )
    heads = [
        "clients",
        "tokens/s",
        "times one client's",
        "requests",
        "first token, p50 / p95 s",
        "next token, p50 / p95 ms",
        "peak MB: first tenth, whole",
        "answers unlike alone",
    ]
    return table(heads, lines)


def _minutes(rounds: Sequence[Round]) -> str:
    """Return the memory at the end of each minute, of rounds of several."""
    lines = []
    for each in rounds:
        if len(each.minutes_mb) > 1:
            lines.append([f"{each.clients}", ", ".join(f"{mb:,.0f}" for mb in each.minutes_mb)])
    return "\n" + table(["clients", "MB at the end of each minute"], lines) if lines else ""


def _beside_generate(args: argparse.Namespace, engine: CompletionEngine) -> str:
    lines = []
    for rows in args.clients:
        progress(f"generate on {rows} equally long texts")
        theirs = plain(args.bundle, engine, rows, args.rounds)
        ours = alike(engine, rows, args.rounds)
        lines.append([f"{rows}", f"{ours:.1f}", f"{theirs:.1f}", f"{ours / theirs:.2f}"])
    return table(["texts", "engine, tokens/s", "`generate`, tokens/s", "ratio"], lines)


NOTES = (
    "Clients are threads of the serving process: what HTTP adds is not in these figures. Times "
    "are of the clock on the wall."
)
OF_TEXTS = (
    " `generate` runs the stock checkpoint, all texts of a batch as long as each other, which "
    "costs it no padding."
)
OF_QUESTIONS = (
    " `generate` is transformers' own class with PEFT's adapters, in turns with the engine on the "
    "same questions and pictures, as many at once; whose adapter reads is named, so that neither "
    "asks the router. The times of both hold all from opened pictures and texts on: tokenizing, "
    "cutting pictures into patches, the vision tower, prompts and answers. Several adapters in one "
    "batch are PEFT's `adapter_names`."
)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--clients", type=int, nargs="+", default=list(CLIENTS))
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument(
        "--held",
        type=int,
        default=HELD,
        help="answers of a round that are held against the same alone (default: %(default)s; they "
        "take memory with their pictures, and time of one text after another)",
    )
    parser.add_argument(
        "--long",
        action="store_true",
        help="have questions answered by 16, 64 or 256 tokens, or as many as a reader gives, "
        "whatever ends an answer (default: answers end by themselves)",
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--prefill-tokens",
        type=int,
        help="as serve.max_prefill_tokens (default: by the model's size)",
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=get_args(Dtype), default="fp32")
    parser.add_argument("--out", type=Path)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
