"""Chats as tokens: how a request and its answer become what the base reads, in training and in
answering alike.

Invariant: a request has the same tokens whether its answer is learned or generated, for the two are
encoded apart; only the answer and the token that ends it are learned, and nothing is ever
truncated.

B rows, T tokens of the longest, P patches of all pictures.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from ...data.drop_stats import DropStats

IGNORED = -100  # label of a token that is not learned
TURNS_KEPT = 8192  # rendered requests kept, as prompts repeat


@dataclass(frozen=True)
class Example:
    """A request and the answer to learn."""

    images: tuple[Path, ...]
    prompt: str
    answer: str


@dataclass(frozen=True)
class TokenizedRow:
    """An example as tokens; every picture is one placeholder in `prompt` until a batch expands it."""

    prompt: np.ndarray
    answer: np.ndarray
    images: tuple[int, ...]  # places in Lines.paths
    image_tokens: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Length with every picture expanded."""
        return len(self.prompt) + len(self.answer) + sum(self.image_tokens) - len(self.images)


class Chat:
    """A processor's way from requests to tokens."""

    def __init__(self, processor):
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.image_id, self.pad_id = processor.image_token_id, self.tokenizer.pad_token_id
        self.end_id = self.tokenizer.convert_tokens_to_ids("<|im_end|>")
        self._special = sorted(t for t in self.tokenizer.all_special_tokens if len(t) > 1)
        self.prompt_ids = lru_cache(TURNS_KEPT)(self._prompt_ids)
        self.answer_ids = lru_cache(TURNS_KEPT)(self._answer_ids)

    def render(self, prompt: str, images: int = 1) -> str:
        """Return a request as text up to and including the assistant's header."""
        content = [
            *({"type": "image"} for _ in range(images)),
            {"type": "text", "text": self.plain(prompt)},
        ]
        chat = [{"role": "user", "content": content}]
        return self.processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)

    def plain(self, text: str) -> str:
        """Return text in which no special token is spelled, so that a user can neither end a turn
        nor add a picture."""
        if "<" in text:
            for token in self._special:
                text = text.replace(token, f"{token[0]} {token[1:]}")
        return text

    def expand(self, ids: Sequence[int], image_tokens: Sequence[int]) -> list[int]:
        """Return ids with the i-th picture's placeholder repeated image_tokens[i] times."""
        counts, out = iter(image_tokens), []
        for token in ids:
            out.extend([token] * next(counts) if token == self.image_id else [token])
        return out

    def image_tokens(self, width: int, height: int) -> int:
        """Return the tokens of a picture of that size, px. Raises ValueError when it is too long
        and thin."""
        pictures = self.processor.image_processor
        return pictures.get_number_of_image_patches(height, width, {}) // pictures.merge_size**2

    def patches(self, images: Sequence) -> tuple[torch.Tensor, torch.Tensor]:
        """Return pixel_values [P, values] of Pillow images one after another, and image_grid_thw
        [images, 3]."""
        out = self.processor.image_processor(images=list(images), return_tensors="pt")
        return out["pixel_values"], out["image_grid_thw"]

    def requests(self, requests: Iterable[tuple[str, Sequence]]) -> dict[str, torch.Tensor]:
        """Return what the model reads to answer (prompt, Pillow images) requests; padded on the
        left."""
        prompts, images = zip(*requests, strict=True)
        flat = [image for some in images for image in some]
        pictures = (
            dict(zip(("pixel_values", "image_grid_thw"), self.patches(flat), strict=True))
            if flat
            else {}
        )
        counts = iter(pictures["image_grid_thw"].prod(-1).tolist() if flat else ())
        merged = self.processor.image_processor.merge_size**2
        ids = [
            self.expand(self.prompt_ids(prompt, len(some)), [next(counts) // merged for _ in some])
            for prompt, some in zip(prompts, images, strict=True)
        ]
        return self.tensors(ids, "left") | pictures

    def tensors(self, rows: Sequence[Sequence[int]], side: str) -> dict[str, torch.Tensor]:
        """Return input_ids, attention_mask and mm_token_type_ids, each [B, T], padded on one side."""
        longest = max(map(len, rows))
        ids_BT = torch.full((len(rows), longest), self.pad_id)
        mask_BT = torch.zeros_like(ids_BT)
        for i, row in enumerate(rows):
            part = slice(longest - len(row), longest) if side == "left" else slice(0, len(row))
            ids_BT[i, part], mask_BT[i, part] = torch.tensor(row), 1
        return {
            "input_ids": ids_BT,
            "attention_mask": mask_BT,
            "mm_token_type_ids": (ids_BT == self.image_id).int(),
        }

    def _prompt_ids(self, prompt: str, images: int = 1) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(self.render(prompt, images), add_special_tokens=False))

    def _answer_ids(self, answer: str) -> tuple[int, ...]:
        return (*self.tokenizer.encode(self.plain(answer), add_special_tokens=False), self.end_id)


@dataclass
class TokenizedDataset:
    """The examples of one split as tokens, those over the limit left out and counted."""

    chat: Chat
    paths: list[Path]  # of all pictures, in order of first use
    sizes: list[tuple[int, int]]  # of those, width and height, px
    lines: list[TokenizedRow]
    neutral: tuple[str, ...] = ()
    drops: DropStats = field(default_factory=DropStats)

    def __len__(self) -> int:
        return len(self.lines)

    @property
    def mean_tokens(self) -> int:
        """Mean length of a line, at least 1."""
        return max(1, round(sum(line.tokens for line in self.lines) / max(1, len(self.lines))))

    def targets(self, at: Iterable[int]) -> int:
        """Return the learned tokens of some lines."""
        return sum(len(self.lines[i].answer) for i in at)

    def batch(self, at: Sequence[int], neutral: Sequence[str | None] | None = None) -> dict:
        """Return input_ids, attention_mask, mm_token_type_ids, labels [B, T] of some lines, padded
        on the right.

        neutral gives a prompt to ask instead of a line's own, or None; a line without a picture is
        asked in its own.
        """
        ids, labels = [], []
        for i, asked in zip(at, neutral or [None] * len(at), strict=True):
            line = self.lines[i]
            own = (
                line.prompt.tolist()
                if asked is None or not line.images
                else self.chat.prompt_ids(asked, len(line.images))
            )
            prompt, answer = self.chat.expand(own, line.image_tokens), line.answer.tolist()
            ids.append([*prompt, *answer])
            labels.append([IGNORED] * len(prompt) + answer)
        out = self.chat.tensors(ids, "right")
        labels_BT = torch.full_like(out["input_ids"], IGNORED)
        for row, values in zip(labels_BT, labels, strict=True):
            row[: len(values)] = torch.tensor(values)
        return out | {"labels": labels_BT}

    def images(self, at: Iterable[int]) -> list[int]:
        """Return the places in paths of the pictures of some lines, in the order of their
        placeholders."""
        return [image for i in at for image in self.lines[i].images]


def encode(
    chat: Chat, examples: Iterable[Example], max_tokens: int, neutral: Sequence[str] = ()
) -> TokenizedDataset:
    """Encode examples; those longer than max_tokens, with their own or any neutral prompt, are
    counted and left out."""
    out = TokenizedDataset(chat, [], [], [], tuple(neutral))
    known: dict[Path, tuple[int, int]] = {}  # path -> place, tokens
    for number, example in enumerate(examples):
        out.drops.seen += 1
        line = _line(chat, example, out, known)
        others = [len(chat.prompt_ids(text, len(line.images))) for text in neutral if line.images]
        if line.tokens + max(0, *others, len(line.prompt)) - len(line.prompt) > max_tokens:
            out.drops.drop("over max_tokens", f"row {number}")
        else:
            out.lines.append(line)
    return out


def _line(chat: Chat, example: Example, out: TokenizedDataset, known: dict) -> TokenizedRow:
    for path in example.images:
        if path not in known:
            size = _size(path)
            known[path] = (len(out.paths), chat.image_tokens(*size))
            out.paths.append(path)
            out.sizes.append(size)
    images, tokens = (
        zip(*(known[path] for path in example.images), strict=True) if example.images else ((), ())
    )
    prompt = np.array(chat.prompt_ids(example.prompt, len(images)), np.int32)
    return TokenizedRow(prompt, np.array(chat.answer_ids(example.answer), np.int32), images, tokens)


def _size(path: Path) -> tuple[int, int]:
    """Return a picture's width and height from its header, px."""
    from PIL import Image

    with Image.open(path) as image:
        return image.size


@dataclass(frozen=True)
class Sampler:
    """Which line stands where in training: a new shuffle in every pass, whole batches only."""

    count: int
    batch: int
    seed: int

    def at(self, first: int, count: int) -> list[int]:
        """Return the lines at places first .. first + count - 1; a function of these and the seed
        alone."""
        return [self._one(place) for place in range(first, first + count)]

    def _one(self, place: int) -> int:
        per_pass = max(1, self.count // self.batch) * self.batch
        turn, place = divmod(place, per_pass)
        lap, place = divmod(place, self.count)  # fewer lines than a batch: several laps in one pass
        return int(_shuffle(self.count, self.seed, turn, lap)[place])


@lru_cache(8)
def _shuffle(count: int, *seeds: int) -> np.ndarray:
    return np.random.default_rng(seeds).permutation(count)


def prompt_augmentation(
    neutral: Sequence[str], share: float, seed: int, first: int, count: int
) -> list[str | None]:
    """Return, for each place, a neutral prompt with probability share, else None; a function of the
    place alone."""
    if not neutral or not share:
        return [None] * count
    draws = (np.random.default_rng((seed, 1, place)) for place in range(first, first + count))
    return [
        neutral[int(draw.integers(len(neutral)))] if draw.random() < share else None
        for draw in draws
    ]
