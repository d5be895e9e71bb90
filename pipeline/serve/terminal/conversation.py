"""`chat`: several turns with a bundle, by lines that are typed; one that begins with / is for the
chat itself."""

import contextlib
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from ... import interrupts
from ...errors import DataError
from ...protocols import Abandoned
from ..messages import Turn
from ..prompts import NoChat
from .bundle import STACK, OpenBundle, data_urls
from .drawing import Drawing
from .one_text import check_reader

HELP = """\
/reset         forget all turns
/expert NAME   who answers from now on; without a name: who there is
/image FILE    show a picture with the next question
/quit          leave, as Ctrl-D does
Ctrl-C ends an answer, and where there is none the chat. //... is a question that begins with /."""

Say = Callable[[str], None]


class Conversation:
    """Turns so far, and who answers the next one."""

    def __init__(self, bundle: OpenBundle, drawn: Drawing, say: Say):
        self.bundle = bundle
        self.drawn = drawn
        self.say = say
        self.turns: list[Turn] = []
        self.reader = STACK
        self.pictures: tuple[str, ...] = ()  # of the next question
        self._commands: dict[str, Callable[[str], None]] = {
            "/reset": self._reset,
            "/expert": self._choose,
            "/image": self._show,
            "/help": lambda _: say(HELP),
        }

    def take(self, line: str) -> bool:
        """Do what a line asks for; return whether the chat goes on."""
        text = line.strip()
        if not text:
            return True
        try:
            if text.startswith("/") and not text.startswith("//"):
                return self._command(text)
            self.answer(text[1:] if text.startswith("//") else line)
        # A question that cannot be put is no turn, and the next one may be
        except (DataError, TimeoutError) as error:
            self.say(str(error))
        return True

    def answer(self, question: str) -> None:
        """Show the answer to a question, and keep both as turns; Ctrl-C ends the answer. Raises
        DataError, TimeoutError."""
        asked = Turn("user", question, self.pictures)
        prompt = self.bundle.question([*self.turns, asked], self.reader)
        generation = self.bundle.begin(prompt)
        self.drawn.begin(self.reader, heading=False)
        try:
            with interrupts.first_for(generation.cancel):
                for piece in generation.follow():
                    self.drawn.add(piece)
        except Abandoned:
            self.drawn.break_off()
            self.say("stopped; Ctrl-C once more ends the chat")
        except BaseException:
            self.drawn.break_off()
            raise
        else:
            self.drawn.end(generation, self.bundle.sampling.seed)
        # What was said until then is what it answered
        self.turns += [asked, Turn("assistant", self.drawn.text)]
        self.pictures = ()

    def _command(self, text: str) -> bool:
        word, _, rest = text.partition(" ")
        if word == "/quit":
            return False
        command = self._commands.get(word)
        if command is None:
            self.say(f"there is no {word}\n{HELP}")
        else:
            command(rest.strip())
        return True

    def _reset(self, _rest: str) -> None:
        self.turns = []
        self.pictures = ()
        self.say("begun anew")

    def _choose(self, name: str) -> None:
        if not name:
            others = ", ".join(self.bundle.readers)
            self.say(f"{self.reader} answers; there are {others}")
            return
        check_reader(self.bundle, name)
        self.reader = name
        self.say(f"{name} answers from now on")

    def _show(self, typed: str) -> None:
        if not typed:
            self.say("name a picture's file, as in /image photo.jpg")
            return
        shown = self.pictures
        for file in _named(typed):
            shown = (*shown, *data_urls([file]))
            try:
                # One that cannot be read would keep every question from being put
                self.bundle.question([*self.turns, Turn("user", "?", shown)], self.reader)
            except DataError as error:
                raise DataError(f"{file}: {error}") from None
        self.pictures = shown
        self.say(f"pictures of the next question: {len(self.pictures)}")


def _named(typed: str) -> list[Path]:
    """Return the files that are named as in a shell: in quotes, with blanks escaped, from ~ on. A
    name that there is as it is typed is that file. Raises DataError."""
    if Path(typed).exists():
        return [Path(typed)]
    whole = _from_home(typed)
    try:
        words = [_from_home(word) for word in shlex.split(typed)]
    except ValueError:
        # A quote that is not closed is a letter of a name
        return [whole]
    # A name with blanks that nobody has quoted is told as it was typed
    is_shell_s = len(words) == 1 or all(word.exists() for word in words)
    return words if is_shell_s and not whole.exists() else [whole]


def _from_home(path: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise DataError(f"{path} cannot be read: there is no such home") from None


def chat(
    bundle: OpenBundle,
    drawn: Drawing,
    lines: Iterable[str],
    say: Say,
    *,
    reader: str = STACK,
    pictures: Sequence[Path] = (),
) -> None:
    """Answer lines until there are none, or /quit. Raises DataError for a bundle that has no turns,
    and NoSuchReader."""
    check_reader(bundle, reader)
    try:
        bundle.question([Turn("user", "?")], reader)
    except NoChat:
        raise DataError(
            f"{bundle.engine.name} has no chat template, as its trunk came without one, so it "
            "knows no turns: have it go on with a text by generate"
        ) from None
    talk = Conversation(bundle, drawn, say)
    talk.reader = reader
    talk.pictures = data_urls(pictures)
    for line in lines:
        if not talk.take(line):
            return


def typed(ask: str) -> Iterator[str]:
    """Yield the lines that are typed at a terminal, with what readline offers where there is one,
    or those that come from a file or another program. Raises DataError for what is no text."""
    try:
        if sys.stdin.isatty():
            yield from _asked(ask)
            return
        for line in sys.stdin:
            yield line.rstrip("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"standard input is no text: {error}") from None


def _asked(ask: str) -> Iterator[str]:
    """Yield the lines that are typed at a terminal."""
    # Lines are kept for this chat alone, and in no file
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401
    while True:
        try:
            line = input(ask)
        except EOFError:
            # Ctrl-D leaves the line that it was typed on, and so does Ctrl-C
            print()
            return
        except KeyboardInterrupt:
            print()
            raise
        yield line
