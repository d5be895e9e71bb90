"""What is told of a text: its tokens with their probabilities and their experts."""

from collections.abc import Callable, Iterable, Sequence

from .answers import (
    Alternative,
    AnswerShare,
    ChatLogprobs,
    ChatToken,
    CompletionLogprobs,
    LikelyToken,
    ToldToken,
)
from .engine import expert_shares, top_name
from .generation import Finish, Piece, RequestChoice, Token
from .text_stream import PARTIAL

DIGITS = 4  # of a probability, a weight or a time in an answer
IMPOSSIBLE = -9999.0  # nats, as OpenAI writes it

Spell = Callable[[Sequence[int]], list[str]]  # each token's own text, from its number


class Telling:
    """What has been told of one text."""

    def __init__(self) -> None:
        self.text = ""
        self.drawn: list[Piece] = []  # those with a token
        self.finish: Finish | None = None

    def add(self, piece: Piece) -> None:
        """Have a piece told."""
        self.text += piece.text
        self.finish = piece.finish
        if piece.token is not None:
            self.drawn.append(piece)

    @property
    def tokens(self) -> list[Token]:
        """The tokens of the text."""
        return tokens_of(self.drawn)


def tokens_of(pieces: Iterable[Piece]) -> list[Token]:
    """Return the tokens of those pieces that have one."""
    return [piece.token for piece in pieces if piece.token is not None]


def experts_told(tokens: Iterable[Token], names: Sequence[str]) -> list[ToldToken]:
    """Return tokens with who spoke them."""
    told: list[ToldToken] = []
    for token in tokens:
        experts = [list(layer) for layer in token.experts]
        weights = []
        for layer in token.weights:
            weights.append([round(weight, DIGITS) for weight in layer])
        told.append(
            {
                "id": token.id,
                "text": token.text,
                "experts": experts,
                "weights": weights,
                "top": top_name(token, names),
            }
        )
    return told


def shares_told(tokens: Sequence[Token], names: Sequence[str]) -> list[AnswerShare]:
    """Return each expert's share of tokens."""
    out: list[AnswerShare] = []
    for name, shares in zip(names, expert_shares(tokens, len(names)), strict=True):
        share = round(shares["share"], DIGITS)
        weight = round(shares["weight"], DIGITS)
        out.append({"name": name, "share": share, "weight": weight})
    return out


def completion_logprobs(drawn: Iterable[Piece], offset: int, spell: Spell) -> CompletionLogprobs:
    """Return probabilities as completions have them; `offset` is where in the text the first of
    the tokens begins."""
    out: CompletionLogprobs = {
        "tokens": [],
        "token_logprobs": [],
        "top_logprobs": [],
        "text_offset": [],
    }
    for piece in drawn:
        own, likely = _spelled(piece, spell)
        out["tokens"].append(own["token"])
        out["text_offset"].append(offset)
        offset += len(piece.text)
        if piece.logprob is None:
            # the first one of a prompt that is echoed
            out["token_logprobs"].append(None)
            out["top_logprobs"].append(None)
            continue
        out["token_logprobs"].append(own["logprob"])
        # The drawn one is always among them, as OpenAI has it; of two with one text the likelier.
        top = {own["token"]: own["logprob"]}
        for each in likely:
            top.setdefault(each["token"], each["logprob"])
        out["top_logprobs"].append(top)
    return out


def chat_logprobs(drawn: Iterable[Piece], spell: Spell) -> ChatLogprobs:
    """Return probabilities as chats have them."""
    content: list[ChatToken] = []
    for piece in drawn:
        own, likely = _spelled(piece, spell)
        content.append({**own, "top_logprobs": likely})
    return {"content": content, "refusal": None}


def alternatives_told(choice: RequestChoice) -> list[Alternative]:
    """Return whom a router might have chosen."""
    out: list[Alternative] = []
    for name, probability in choice.alternatives:
        out.append({"expert": name, "probability": round(probability, DIGITS)})
    return out


def _spelled(piece: Piece, spell: Spell) -> tuple[LikelyToken, list[LikelyToken]]:
    """Return a piece's token and the likeliest in its place, with their own texts."""
    ids = [token.id for token in tokens_of([piece])]
    own, *others = spell([*ids, *[token for token, _ in piece.likeliest]])
    likely = []
    for text, (_, logprob) in zip(others, piece.likeliest, strict=True):
        likely.append(_token(text, logprob))
    return _token(own, piece.logprob), likely


def _token(text: str, logprob: float | None) -> LikelyToken:
    # A part of a character has bytes too, but the text here is not made of them.
    data = None if PARTIAL in text else list(text.encode())
    # What cannot be drawn has none that JSON could write.
    return {"token": text, "logprob": max(IMPOSSIBLE, logprob or 0.0), "bytes": data}
