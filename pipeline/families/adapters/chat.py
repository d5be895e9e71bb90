"""Chats as tokens: how a request and its answer become what the base reads, in training and in
answering alike.

Invariant: a request has the same tokens whether its answer is learned or generated, for the two are
encoded apart; only the answer and the token that ends it are learned, and nothing is ever
truncated.

B rows, T tokens of the longest.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from ...data.drop_stats import DropStats
from .media import Media, Medium

IGNORED = -100  # label of a token that is not learned
PROMPTS_KEPT = 8192  # rendered and encoded prompts kept, as they repeat

Role = Literal["system", "user", "assistant"]
Tensors = dict[str, torch.Tensor]  # what a model takes, by name
Side = Literal["left", "right"]  # where shorter rows are padded
Prompts = Sequence[str | None]  # by row: what to ask instead of its own prompt, or None


@dataclass(frozen=True)
class ChatTurn:
    """What one side of a chat said, and how many media it showed with it."""

    role: Role
    text: str
    media: int = 0


@dataclass(frozen=True)
class Example:
    """A request and the answer to learn."""

    media: tuple[Path, ...]
    prompt: str
    answer: str


@dataclass(frozen=True)
class TokenizedRow:
    """An example as tokens; a medium is one placeholder in `prompt` until a batch expands it."""

    prompt: np.ndarray
    answer: np.ndarray
    media: tuple[int, ...]  # places in TokenizedDataset.paths
    media_tokens: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Length with every medium expanded."""
        # each medium's tokens take the place of its one placeholder
        of_media = sum(self.media_tokens) - len(self.media)
        of_text = len(self.prompt) + len(self.answer)
        return of_text + of_media


class Chat:
    """A base's way from requests to tokens.

    `renderer` has the chat template: the tokenizer, or the processor of a base that reads more than
    text. `end` is the token that ends a turn.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        renderer: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        media: Media | None = None,
        end: str | None = None,
    ):
        self.tokenizer = tokenizer
        self.renderer = renderer or tokenizer
        self.media = media or Media()
        self.pad_id = tokenizer.pad_token_id
        self.end_id = tokenizer.convert_tokens_to_ids(end or tokenizer.eos_token)
        # single characters among them would take letters out of every prompt
        special = tokenizer.all_special_tokens
        self._special = sorted(token for token in special if len(token) > 1)
        # the same prompts and labels come again and again, so their tokens are kept
        self.prompt_ids = lru_cache(PROMPTS_KEPT)(self._prompt_ids)
        self.answer_ids = lru_cache(PROMPTS_KEPT)(self._answer_ids)

    def render(self, turns: Sequence[ChatTurn], *, goes_on: bool = False) -> str:
        """Return turns as text up to and including the assistant's header, or, where the last one
        goes on, up to its own end."""
        messages: list[Any] = []
        for turn in turns:
            text = self.escape(turn.text)
            # the library's types know no content but a text
            content = self.media.content(text, turn.media)
            messages.append({"role": turn.role, "content": content})
        rendered = self.renderer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=not goes_on,
            continue_final_message=goes_on,
        )
        return str(rendered)

    def escape(self, text: str) -> str:
        """Return text in which no special token is spelled, so that a user can neither end a turn
        nor add a medium."""
        if "<" in text:
            for token in self._special:
                text = text.replace(token, f"{token[0]} {token[1:]}")
        return text

    def expand(self, ids: Sequence[int], media_tokens: Sequence[int]) -> list[int]:
        """Return ids with the i-th medium's placeholder repeated media_tokens[i] times."""
        counts = iter(media_tokens)
        out: list[int] = []
        for token in ids:
            if token == self.media.placeholder_id:
                out += [token] * next(counts)
            else:
                out.append(token)
        return out

    def requests(self, requests: Iterable[tuple[str, Sequence[Medium]]]) -> Tensors:
        """Return what the model reads to answer (prompt, opened media) requests; padded on the
        left."""
        asked = list(requests)
        flat: list[Medium] = []
        for _, media in asked:
            flat += media
        # all at once, as the model takes them: one after another over the rows
        inputs, tokens = self.media.raw_inputs(flat)
        counts = iter(tokens)
        rows = []
        for prompt, media in asked:
            own = [next(counts) for _ in media]
            ids = self.prompt_ids(prompt, len(media))
            rows.append(self.expand(ids, own))
        return self.tensors(rows, "left") | inputs

    def tensors(self, rows: Sequence[Sequence[int]], side: Side) -> Tensors:
        """Return input_ids, attention_mask and what media add to them, each [B, T], padded on one
        side."""
        longest = max(map(len, rows))
        shape = (len(rows), longest)
        ids_BT = torch.full(shape, self.pad_id)
        mask_BT = torch.zeros_like(ids_BT)
        for i, row in enumerate(rows):
            start = longest - len(row) if side == "left" else 0
            part = slice(start, start + len(row))
            ids_BT[i, part] = torch.tensor(row)
            mask_BT[i, part] = 1
        inputs = {"input_ids": ids_BT, "attention_mask": mask_BT}
        return inputs | self.media.token_inputs(ids_BT)

    def turn_ids(self, turns: Sequence[ChatTurn], *, goes_on: bool = False) -> tuple[int, ...]:
        """Return the ids of turns, a placeholder for each medium, ready to be answered."""
        text = self.render(turns, goes_on=goes_on)
        # the template writes every special token itself: the tokenizer must not add its own
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return tuple(ids)

    def _prompt_ids(self, prompt: str, media: int = 0) -> tuple[int, ...]:
        return self.turn_ids([ChatTurn("user", prompt, media)])

    def _answer_ids(self, answer: str) -> tuple[int, ...]:
        text = self.escape(answer)
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return (*ids, self.end_id)


@dataclass
class TokenizedDataset:
    """The examples of one split as tokens, those over the limit left out and counted."""

    chat: Chat
    paths: list[Path] = field(default_factory=list)  # of all media, in order of first use
    path_tokens: list[int] = field(default_factory=list)  # of each of those
    rows: list[TokenizedRow] = field(default_factory=list)
    drops: DropStats = field(default_factory=DropStats)
    _places: dict[Path, int] = field(default_factory=dict, repr=False)  # in paths

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def mean_tokens(self) -> int:
        """Mean length of a row, at least 1."""
        if not self.rows:
            return 1
        total = sum(row.tokens for row in self.rows)
        mean = round(total / len(self.rows))
        return max(1, mean)

    def target_count(self, at: Iterable[int]) -> int:
        """Return the learned tokens of some rows."""
        count = 0
        for i in at:
            count += len(self.rows[i].answer)
        return count

    def batch(self, at: Sequence[int], prompts: Prompts | None = None) -> Tensors:
        """Return input_ids, attention_mask, labels [B, T], and what media add to them, of some
        rows, padded on the right.

        A row without media is asked in its own prompt, whatever `prompts` says.
        """
        ids = []
        labels = []
        others = prompts or [None] * len(at)
        for i, other in zip(at, others, strict=True):
            row = self.rows[i]
            prompt: Sequence[int] = row.prompt.tolist()
            # a neutral prompt asks about what the request comes with; without it nothing is asked
            if other is not None and row.media:
                count = len(row.media)
                prompt = self.chat.prompt_ids(other, count)
            expanded = self.chat.expand(prompt, row.media_tokens)
            answer = row.answer.tolist()
            ids.append([*expanded, *answer])
            labels.append([IGNORED] * len(expanded) + answer)
        # on the right: training looks at no next token, and positions begin at 0 for every row
        out = self.chat.tensors(ids, "right")
        labels_BT = torch.full_like(out["input_ids"], IGNORED)
        for row_labels_T, values in zip(labels_BT, labels, strict=True):
            row_labels_T[: len(values)] = torch.tensor(values)
        return out | {"labels": labels_BT}

    def media(self, at: Iterable[int]) -> list[tuple[int, ...]]:
        """Return for some rows the places in paths of their media, in the order of their
        placeholders."""
        return [self.rows[i].media for i in at]

    def add(self, example: Example) -> TokenizedRow:
        """Return an example as tokens, its media known from now on; the rows are as they were."""
        media = tuple(self._place(path) for path in example.media)
        tokens = [self.path_tokens[i] for i in media]
        prompt = self.chat.prompt_ids(example.prompt, len(media))
        answer = self.chat.answer_ids(example.answer)
        return TokenizedRow(
            # a split is held as a whole, and a list of Python's numbers is nine times as large
            prompt=np.array(prompt, np.int32),
            answer=np.array(answer, np.int32),
            media=media,
            media_tokens=tuple(tokens),
        )

    def _place(self, path: Path) -> int:
        """Return the place of a medium in paths; each file is looked at once."""
        place = self._places.get(path)
        if place is None:
            place = len(self.paths)
            self._places[path] = place
            self.paths.append(path)
            tokens = self.chat.media.file_tokens(path)
            self.path_tokens.append(tokens)
        return place


def encode(
    chat: Chat,
    examples: Iterable[Example],
    max_tokens: int,
    neutral: Sequence[str] = (),
) -> TokenizedDataset:
    """Encode examples; those longer than max_tokens, with their own or any neutral prompt, are
    counted and left out."""
    dataset = TokenizedDataset(chat)
    for number, example in enumerate(examples):
        dataset.drops.seen += 1
        row = dataset.add(example)
        longest = len(row.prompt)
        if row.media:
            # any of them may take the place of the row's own prompt, and nothing is ever truncated
            for text in neutral:
                other = chat.prompt_ids(text, len(row.media))
                longest = max(longest, len(other))
        rest = row.tokens - len(row.prompt)
        if rest + longest > max_tokens:
            dataset.drops.drop("over max_tokens", f"row {number}")
        else:
            dataset.rows.append(row)
    return dataset


@dataclass(frozen=True)
class Sampler:
    """Which row stands where in training: a new shuffle in every pass, whole batches only."""

    count: int
    batch: int
    seed: int

    def at(self, first: int, count: int) -> list[int]:
        """Return the rows at places first .. first + count - 1; a function of these and the seed
        alone."""
        places = range(first, first + count)
        return [self._row(place) for place in places]

    def _row(self, place: int) -> int:
        batches = max(1, self.count // self.batch)
        number, place = divmod(place, batches * self.batch)
        # fewer rows than a batch: several laps over them in one pass
        lap, place = divmod(place, self.count)
        shuffled = _shuffle(self.count, self.seed, number, lap)
        return int(shuffled[place])


# each place of a batch asks for the same one
@lru_cache(8)
def _shuffle(count: int, *seeds: int) -> np.ndarray:
    rng = np.random.default_rng(seeds)
    return rng.permutation(count)


def prompt_augmentation(
    neutral: Sequence[str],
    share: float,
    seed: int,
    first: int,
    count: int,
) -> list[str | None]:
    """Return, for each place, a neutral prompt with probability share, else None; a function of the
    place alone."""
    if not neutral or not share:
        return [None] * count
    out: list[str | None] = []
    for place in range(first, first + count):
        # a generator for each place: what a resumed run draws does not depend on where it began;
        # the 1 keeps these numbers apart from the shuffles', which have the same seed
        rng = np.random.default_rng((seed, 1, place))
        if rng.random() < share:
            number = int(rng.integers(len(neutral)))
            out.append(neutral[number])
        else:
            out.append(None)
    return out
