"""Measure how densely the code is written, and say where it is denser than we want to read.

Counted over `pipeline/` and over what stands beside it (`modal_app.py`, `modal_laptop.py`,
`scripts/`, `routing-generator/`): tokens a line of code, comment lines of their own, functions'
sizes in tokens, lines over 100 columns, and places where the formatter was switched off. nanochat
and gpt-fast have 8.4 and 8.5 tokens a line and 16 and 7 % comment lines; more than that is a line
that does several things.
"""

import argparse
import ast
import io
import statistics
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PARTS = (("pipeline",), ("modal_app.py", "modal_laptop.py", "scripts", "routing-generator"))
MOST_TOKENS_A_LINE = 8.5
LEAST_COMMENT_SHARE = 0.03
MOST_COLUMNS = 100
NO_CODE = {
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.COMMENT,
    tokenize.ENDMARKER,
    tokenize.ENCODING,
}
DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass
class Reading:
    """What was counted in some files; docstrings are no code."""

    files: int = 0
    tokens: int = 0
    lines: int = 0
    comments: int = 0
    # Tokens of each function, those of functions inside it included
    functions: list[int] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def tokens_a_line(self) -> float:
        """Tokens over lines that hold code."""
        return self.tokens / max(1, self.lines)

    @property
    def comment_share(self) -> float:
        """Lines that are a comment alone, of those and the lines of code."""
        return self.comments / max(1, self.lines + self.comments)

    def add(self, name: str, source: str) -> None:
        """Count a file's source; name is how problems call it."""
        tree = ast.parse(source)
        docstrings = {node.body[0].lineno for node in _documented(tree)}
        at: list[int] = []
        code: set[int] = set()
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT:
                self._comment(name, token)
            if token.type in NO_CODE:
                continue
            if token.type == tokenize.STRING and token.start[0] in docstrings:
                continue
            at.append(token.start[0])
            code.update(range(token.start[0], token.end[0] + 1))
        self.files += 1
        self.tokens += len(at)
        self.lines += len(code)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                inside = range(node.lineno, (node.end_lineno or node.lineno) + 1)
                self.functions.append(sum(line in inside for line in at))
        for number, line in enumerate(source.splitlines(), 1):
            # What cannot be broken (a link) carries the mark with which ruff lets it pass as well
            if len(line) > MOST_COLUMNS and "noqa: E501" not in line:
                self.problems.append(f"{name}:{number}: {len(line)} columns")

    def _comment(self, name: str, token: tokenize.TokenInfo) -> None:
        if token.line.strip().startswith("#"):
            self.comments += 1
        if token.string.startswith(("# fmt: skip", "# fmt: off")):
            self.problems.append(f"{name}:{token.start[0]}: the formatter is switched off")

    def judge(self, what: str) -> list[str]:
        """Return a line for each measure that is not kept and each place that breaks a rule."""
        found = list(self.problems)
        if self.tokens_a_line > MOST_TOKENS_A_LINE:
            found.append(
                f"{what}: {self.tokens_a_line:.2f} tokens a line, over {MOST_TOKENS_A_LINE}"
            )
        if self.comment_share < LEAST_COMMENT_SHARE:
            share = f"{self.comment_share:.1%}"
            found.append(f"{what}: {share} comment lines, under {LEAST_COMMENT_SHARE:.0%}")
        return found

    def summary(self, what: str) -> str:
        """Return one line of figures."""
        sizes = self.functions or [0]
        largest = statistics.quantiles(sizes, n=10)[-1] if len(sizes) > 1 else sizes[0]
        return (
            f"{what}: {self.tokens_a_line:.2f} tokens a line, {self.comment_share:.1%} "
            "comment lines, "
            f"functions of {statistics.median(sizes):.0f} tokens (median; 90 % below "
            f"{largest:.0f}), "
            f"{self.lines} lines in {self.files} files"
        )


def _documented(tree: ast.AST) -> Iterator[DOCUMENTED]:
    """Yield what has a docstring."""
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            yield node


def sources(root: Path, names: tuple[str, ...]) -> Iterator[Path]:
    """Yield the Python files that names stand for below root: files, and all below folders."""
    for name in names:
        place = root / name
        yield from sorted(place.rglob("*.py")) if place.is_dir() else [place]


def read(root: Path, names: tuple[str, ...]) -> Reading:
    """Count the files that names stand for."""
    reading = Reading()
    for path in sources(root, names):
        reading.add(path.relative_to(root).as_posix(), path.read_text("utf-8"))
    return reading


def main() -> int:
    """Print the measures and what breaks them; return 1 when something does."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "paths", nargs="*", help="files and folders to measure, one line each; none: the project"
    )
    asked = parser.parse_args().paths
    groups = tuple((path,) for path in asked) or PARTS
    problems = []
    for names in groups:
        what = " ".join(names)
        reading = read(Path.cwd() if asked else ROOT, names)
        print(reading.summary(what))
        problems += reading.judge(what)
    print("\n".join(problems), file=sys.stderr, end="\n" if problems else "")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
