"""Plain batched `generate` of transformers over questions with pictures, and an engine over the
same, in turns.

Both begin with opened pictures and the texts of questions, and end with the last token of all:
tokenizing, cutting pictures into patches, the vision tower, prompts and answers. Who reads is
named, so that neither asks a router, and all answers are equally long. `generate` has transformers'
own class with PEFT's adapters, all pictures and questions at once, padded on the left.

B rows, T tokens.
"""

import random
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from PIL import Image
from transformers import Qwen3VLForConditionalGeneration

from benchmarks.measuring import progress, table
from pipeline.families.adapters.peft_io import peft_name
from pipeline.serve.chat_engine import ChatEngine
from pipeline.serve.generation import Prompt, Sampling

# What a draw gives: a question and its pictures
Question = tuple[str, tuple[Image.Image, ...]]
Spoken = list[tuple[int, ...]]


@dataclass
class Turns:
    """What one of the two took for batches of the same."""

    seconds: list[float] = field(default_factory=list)
    processor_s: list[float] = field(default_factory=list)

    def add(self, work: Callable[[], Spoken]) -> Spoken:
        """Time a batch; return what was said."""
        started = time.monotonic(), time.process_time()
        said = work()
        self.seconds.append(time.monotonic() - started[0])
        self.processor_s.append(time.process_time() - started[1])
        return said


class StockChat:
    """The base of a bundle as transformers opens it, under its adapters as PEFT does."""

    def __init__(self, folder: Path, engine: ChatEngine):
        base = Qwen3VLForConditionalGeneration.from_pretrained(
            folder / "base", dtype="auto", local_files_only=True, use_safetensors=True
        )
        self._chat = engine.stack.model.chat
        self._model: Any = None
        with warnings.catch_warnings():
            # PEFT asks transformers in a way that it is leaving
            warnings.simplefilter("ignore", FutureWarning)
            for name in engine.experts:
                adapter = folder / "adapters" / name / "adapter"
                # an adapter's own name may be that of a parameter
                known = peft_name(name)
                if self._model is None:
                    self._model = PeftModel.from_pretrained(base, adapter, adapter_name=known)
                else:
                    self._model.load_adapter(adapter, adapter_name=known)
        self._model.eval()

    def generate(self, questions: Sequence[Question], readers: Sequence[str], new: int) -> Spoken:
        """Return as many tokens for each question, of its reader."""
        inputs: dict[str, Any] = dict(self._chat.requests(questions))
        if len({*readers}) > 1:
            inputs["adapter_names"] = [peft_name(reader) for reader in readers]
        else:
            self._model.set_adapter(peft_name(readers[0]))
        with torch.no_grad():
            ids_BT = self._model.generate(
                **inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False
            )
        given = inputs["input_ids"].shape[1]
        return [tuple(ids) for ids in ids_BT[:, given:].tolist()]


def of_engine(
    engine: ChatEngine, questions: Sequence[Question], readers: Sequence[str], new: int
) -> Spoken:
    """Return the same of an engine, which is asked all of it at once."""
    never = dict.fromkeys(engine._end_ids(), -10000.0)
    running = []
    for (text, media), reader in zip(questions, readers, strict=True):
        prompt = Prompt(engine.stack.prompt_ids(text, media), media, reader)
        running.append(engine.submit(prompt, Sampling(new, 0.0, logit_bias=never)))
    said = []
    for generation in running:
        said.append(tuple(piece.token.id for piece in generation.wait() if piece.token))
    return said


def beside_generate(
    folder: Path,
    engine: ChatEngine,
    drawn: Callable[[random.Random], Question],
    counts: Sequence[int],
    rounds: int,
) -> str:
    """Return a table of both: all questions read by one adapter, and by all of them in turn."""
    stock = StockChat(folder, engine)
    draw = random.Random(0)
    lines = []
    for count in counts:
        for kind, known in (("one", engine.experts[:1]), ("all", engine.experts)):
            readers = [known[row % len(known)] for row in range(count)]
            if kind == "all" and len({*readers}) == 1:
                continue
            progress(f"generate on {count} questions, adapters: {kind}")
            batches = [[drawn(draw) for _ in range(count)] for _ in range(rounds + 1)]
            lines.append([f"{count}", kind, *_compared(engine, stock, batches, readers)])
    heads = [
        "questions",
        "adapters",
        "tokens of each answer",
        "engine, tokens/s",
        "`generate`, tokens/s",
        "ratio",
        "ratio by processor time",
        "answers alike",
    ]
    return table(heads, lines)


def _compared(
    engine: ChatEngine,
    stock: StockChat,
    batches: Sequence[Sequence[Question]],
    readers: Sequence[str],
) -> list[str]:
    """Return the cells of batches that both are given, the first of them untimed."""
    new = min(engine.stack.new_tokens(reader) for reader in readers)
    ours, theirs = Turns(), Turns()
    alike = 0
    for number, questions in enumerate(batches):
        ask = partial(of_engine, engine, questions, readers, new)
        generate = partial(stock.generate, questions, readers, new)
        if number == 0:
            ask()
            generate()
            continue
        alike += sum(map(tuple.__eq__, ours.add(ask), theirs.add(generate)))
    our_s, their_s = (statistics.median(each.seconds) for each in (ours, theirs))
    ratios = []
    for one, other in zip(ours.processor_s, theirs.processor_s, strict=True):
        ratios.append(other / one)
    tokens = len(readers) * new
    return [
        f"{new}",
        f"{tokens / our_s:.1f}",
        f"{tokens / their_s:.1f}",
        f"{their_s / our_s:.2f}",
        f"{statistics.median(ratios):.2f}",
        f"{alike} of {len(readers) * len(ours.seconds)}",
    ]
