"""The text of a row of tokens, as far as it may be shown: no half characters, nothing that may turn
out to be the start of a stop string, and nothing from a stop string on."""

from collections.abc import Callable, Sequence

# Tokens that a text goes on from: enough to see whether it begins with a space.
BEFORE_TOKENS = 8
HELD_TOKENS = 64  # of bytes that are no text, after which they are shown as they are
PARTIAL = "\ufffd"  # stands for bytes that are no whole character yet

Decode = Callable[[list[int]], str]


class TextStream:
    """Takes tokens one after another and gives back each one's share of the text, in order, once it
    may be shown; a character of several tokens belongs to its last one."""

    def __init__(
        self,
        decode: Decode,
        stops: Sequence[str] = (),
        before: Sequence[int] = (),
    ):
        self.stopped = False  # a stop string was found: what comes after it is no text
        self.decode = decode
        self._stops = tuple(stops)
        # Decoded behind the tokens before them, because a decoder may treat a text's start
        # otherwise, but not behind all of them, which would take time by the square.
        self._before: list[int] = list(before[-BEFORE_TOKENS:])
        self._known = decode(self._before)  # what those say
        if self._known.endswith(PARTIAL):
            # of a character that ends among the tokens to come, nobody knows how long it will be
            self._before = []
            self._known = ""
        self._open: list[int] = []  # tokens of a character that is not whole
        self._texts: list[str] = []  # shares that are held back, those of open tokens not among

    def add(self, token: int) -> list[str]:
        """Return the shares that may be shown now that there is another token."""
        self._open.append(token)
        text = self.decode(self._before + self._open)[len(self._known) :]
        if text.endswith(PARTIAL) and len(self._open) < HELD_TOKENS:
            return self._stop(text.rstrip(PARTIAL)) or []
        stopped = self._stop(text)
        if stopped is not None:
            return stopped
        self._close(text)
        return self._free()

    def end(self) -> list[str]:
        """Return all other shares, as no token comes any more."""
        if self._open:
            text = self.decode(self._before + self._open)[len(self._known) :]
            stopped = self._stop(text)
            if stopped is not None:
                return stopped
            self._close(text)
        rest = self._texts
        self._texts = []
        return rest

    def _close(self, text: str) -> None:
        """Take the open tokens as whole, with their text."""
        self._texts += _shares(text, len(self._open))
        self._before = self._open
        self._known = self.decode(self._before)
        self._open = []

    def _stop(self, text: str) -> list[str] | None:
        """Return the shares before a stop string, where there is one in what is held back and a
        text of the open tokens; the earliest counts, as one could hide where another begins."""
        if not self._stops:
            return None
        shares = [*self._texts, *_shares(text, len(self._open))]
        joined = "".join(shares)
        ends = [joined.find(stop) for stop in self._stops if stop in joined]
        if not ends:
            return None
        self.stopped = True
        self._texts = []
        self._open = []
        return _first(shares, min(ends))

    def _free(self) -> list[str]:
        """Return the shares that lie before what may be the start of a stop string."""
        joined = "".join(self._texts)
        room = len(joined) - self._begun(joined)
        free = []
        for text in self._texts:
            room -= len(text)
            if room < 0:
                break
            free.append(text)
        self._texts = self._texts[len(free) :]
        return free

    def _begun(self, text: str) -> int:
        """Return how many characters at a text's end may begin a stop string."""
        longest = 0
        for stop in self._stops:
            for count in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:count]):
                    longest = count
                    break
        return longest


def shares_of(ids: Sequence[int], decode: Decode) -> list[str]:
    """Return each token's share of what ids say."""
    stream = TextStream(decode)
    texts: list[str] = []
    for token in ids:
        texts += stream.add(token)
    return texts + stream.end()


def _shares(text: str, tokens: int) -> list[str]:
    """Return a text as the share of the last of some tokens."""
    return [""] * (tokens - 1) + [text]


def _first(shares: Sequence[str], length: int) -> list[str]:
    """Return the shares of the first so many characters."""
    kept = []
    for text in shares:
        if length <= 0:
            break
        kept.append(text[:length])
        length -= len(text)
    return kept
