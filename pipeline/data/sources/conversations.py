"""Chats as other projects write them, as prompts and answers: `messages` with roles and contents,
`conversations` of ShareGPT and LLaVA, `texts` of pairs, `prompt` and `completion` of TRL.

Invariant: an exchange is a question and its answer as they stand; nothing of a chat that is left
out of its rows passes without a reason to count.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from ..drop_stats import Dropped
from ..tasks.markup import placeholders
from . import SkippedRow
from .columns import structured

# Columns that hold chats, the first one that is there counts.
COLUMNS = ("messages", "conversations", "conversation", "texts")

_SPEAKERS = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "system": "system",
    "developer": "system",
}

# Names of who speaks, and of what is said.
_KEYS = (("role", "content"), ("from", "value"), ("role", "value"), ("from", "content"))

_PICTURE_PARTS = ("image_url", "image", "input_image")
# Where such a part has its picture, as OpenAI, transformers and Anthropic write it.
_PICTURE_KEYS = ("image_url", "image", "url", "path", "base64", "bytes", "source")
_TEXT_PARTS = ("text", "input_text", "output_text")


@dataclass
class Exchange:
    """A question with its answer, and what stood before it."""

    prompt: str
    answer: str
    system: str
    pictures: list[object] = field(default_factory=list)  # in its own turns or earlier ones


def column_of(columns: dict) -> str | None:
    """Return the column that holds a row's chat, None where there is none."""
    for name in COLUMNS:
        turns = _turns(columns.get(name))
        if turns and isinstance(turns[0], dict):
            return name
    return None


def of_prompt(columns: dict) -> dict:
    """Return a row whose prompt is turns, or the parts of one, with the chat that it is the
    beginning of in the column messages, as TRL parts prompt and completion; any other as it is."""
    asked = _turns(columns.get("prompt"))
    if not asked or not all(isinstance(each, dict) for each in asked):
        return columns
    is_turns = _is_turn(asked[0])
    if not is_turns and asked[0].get("type") not in (*_PICTURE_PARTS, *_TEXT_PARTS):
        return columns
    row = {name: value for name, value in columns.items() if name != "prompt"}
    asked = asked if is_turns else [{"role": "user", "content": asked}]
    answered = row.pop("completion", None) or row.get("answer")
    said = _turns(answered)
    if said and _is_turn(said[0]):
        row["answer"] = None
    else:
        # Whatever it is, the row's own answer counts.
        row["answer"] = answered
        said = [{"role": "assistant", "content": ""}]
    return row | {"messages": [*asked, *said]}


def said_by(speaker: str, value: object) -> object:
    """Return what a speaker says in a turn of his own, as TRL writes completions, where a value is
    that; a value that is no turns as it is. Raises Dropped for other turns than one of his, which
    would be learned with all their names and brackets."""
    value = structured(value)
    turns = list(value) if isinstance(value, list | tuple) else [value]
    speakers = [_speaker(turn) for turn in turns]
    if not speakers or None in speakers:
        return value
    ((_, content),) = _said(turns[0])
    text, pictures = _parts(content)
    if speakers != [speaker] or pictures:
        raise Dropped(
            "turns in a text",
            f"turns of {', '.join(filter(None, speakers))} stand where a text of {speaker} should; "
            "write that alone, or the whole chat as messages",
        )
    return text


def _speaker(turn: object) -> str | None:
    """Return who speaks in a turn; None for what is none."""
    for who, what in _KEYS:
        if isinstance(turn, dict) and who in turn and what in turn:
            return _SPEAKERS.get(str(turn[who]).lower())
    return None


def _is_turn(value: object) -> bool:
    return isinstance(value, dict) and any(who in value and what in value for who, what in _KEYS)


def rows(where: str, columns: dict, turns: str) -> Iterator[tuple[str, dict | SkippedRow]]:
    """Yield a row as it is, or with its chat as columns prompt, answer and system.

    turns is one (a chat of several exchanges is skipped), first, or each: then there are as many
    rows, and they say in `group` that they belong together.
    """
    name = column_of(columns)
    if name is None:
        yield where, columns
        return
    try:
        found = list(_exchanges(_turns(columns[name])))
        if not found:
            raise Dropped("no exchange", f"{name} holds no question with an answer")
        if len(found) > 1 and turns == "one":
            raise Dropped(
                "several turns",
                f"{name} has {len(found)} exchanges, and an expert is asked one thing; set "
                "dataset.turns to each (a row for each, without what came before) or first",
            )
        _check_pictures(found)
    except Dropped as error:
        yield where, SkippedRow(error.reason, str(error))
        return
    if len(found) == 1 or turns == "first":
        yield where, columns | _as_columns(found[0], columns)
        return
    identity = columns.get("id") or where
    for number, exchange in enumerate(found, 1):
        own = {"id": f"{identity}/{number}", "group": columns.get("group") or str(identity)}
        yield f"{where} turn {number}", columns | own | _as_columns(exchange, columns)


def _check_pictures(found: list[Exchange]) -> None:
    """Raise Dropped where a later question brings pictures of its own: which of the row's they
    are, the row does not say."""
    for number, exchange in enumerate(found[1:], 2):
        if placeholders(exchange.prompt) and not exchange.pictures:
            raise Dropped(
                "pictures in later turns",
                f"question {number} has a placeholder of a picture; write a row for each question "
                "with the pictures that it is about",
            )


def _as_columns(exchange: Exchange, columns: dict) -> dict:
    """Return what an exchange adds to a row; columns of the row's own that say the same stay."""
    said: dict[str, object] = {"prompt": exchange.prompt, "answer": exchange.answer}
    if exchange.system:
        said["system"] = exchange.system
    if exchange.pictures:
        said["images"] = exchange.pictures
    return {key: value for key, value in said.items() if columns.get(key) in (None, "", [])}


def _turns(value: object) -> list:
    # Tables of text alone have a chat as JSON.
    value = structured(value)
    return list(value) if isinstance(value, list | tuple) else []


def _exchanges(turns: list) -> Iterator[Exchange]:
    """Yield the exchanges of a chat. Raises Dropped."""
    system: list[str] = []
    pictures: list[object] = []
    asked: str | None = None
    for turn in turns:
        for speaker, content in _said(turn):
            text, own_pictures = _parts(content)
            pictures += own_pictures
            if speaker == "system":
                system.append(text)
            elif speaker == "user" and asked is None:
                asked = text
            elif speaker == "assistant" and asked is not None:
                yield Exchange(asked, text, "\n".join(system), list(pictures))
                asked = None
            else:
                raise Dropped(
                    "turns out of order",
                    f"the {speaker} speaks where the other one should; user and assistant take "
                    "turns, the user first",
                )
    # A question at the end has no answer to learn, and what came before it is whole.


def _said(turn: object) -> Iterator[tuple[str, object]]:
    """Yield who speaks in a turn and what is said, of a pair both. Raises Dropped."""
    if isinstance(turn, dict):
        for who, what in _KEYS:
            if who in turn and what in turn:
                speaker = _SPEAKERS.get(str(turn[who]).lower())
                if speaker is None:
                    known = ", ".join(_SPEAKERS)
                    raise Dropped(
                        "unknown speaker", f"{turn[who]!r} is none of {known}; rename or leave out"
                    )
                yield speaker, turn[what]
                return
        if {"user", "assistant"} <= turn.keys():
            yield "user", turn["user"]
            yield "assistant", turn["assistant"]
            return
    shown = ", ".join(map(str, turn)) if isinstance(turn, dict) else type(turn).__name__
    raise Dropped(
        "unread turn", f"a turn has {shown}, where role and content or from and value were wanted"
    )


def _parts(content: object) -> tuple[str, list[object]]:
    """Return the text of a turn and the pictures in it. Raises Dropped."""
    if content is None:
        return "", []
    if isinstance(content, str):
        return content, []
    if isinstance(content, dict):
        content = [content]
    texts = []
    pictures = []
    for part in content if isinstance(content, list | tuple) else [content]:
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(part, dict) and (kind in _TEXT_PARTS or (kind is None and "text" in part)):
            texts.append(str(part.get("text") or ""))
        elif isinstance(part, dict) and kind in _PICTURE_PARTS:
            # One without a picture only says where one of the row's own belongs.
            pictures += [part[key] for key in _PICTURE_KEYS if part.get(key)]
        else:
            shown = kind or type(part).__name__
            raise Dropped("unread part", f"a message has a part {shown!r}, not text or a picture")
    return "\n".join(filter(None, texts)), pictures
