"""Check docstrings against the house style, from the syntax tree alone: nothing is imported or run.

Every public module, class, function and method has one that starts with a whole sentence, on one
line or two, that says more than the name; it names the pipeline errors the body raises, and the
shapes of arrays and tensors that go in and out.
"""

import argparse
import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BESIDE = ("modal_app.py", "modal_laptop.py")
CHECKED = ("pipeline", "scripts", "routing-generator", "benchmarks", *BESIDE)
LINE = 100
ARRAYS = {"Tensor", "ndarray", "NDArray"}
SUFFIXED = re.compile(r"[a-z][a-z0-9_]*_([A-Z][A-Z0-9]*)")  # x_BTD
SHAPE = re.compile(
    r"\[[^\]]*\b[A-Z][A-Z0-9]*\b[^\]]*\]"  # [B, T, D]
    r"|\([A-Z][A-Z0-9]*,[^)]*\)|\(\w[^()\s]*,\)"  # (B, T, D), (n+1,)
    r"|\w_[A-Z][A-Z0-9]*\b|\b(scalars?|shapes?)\b"  # x_BTD, or in words
)
THIRD_PERSON = re.compile(
    r"(This|Add|Apply|Appl|Build|Call|Check|Compute|Copy|Create|Find|Get|Give|Load|Make|Print|"
    r"Read|Return|Run|Save|Set|Start|Take|Tell|Test|Train|Write|Yield)(s|ies)\b"
)
# Words that carry no meaning
_FILLING = """
a an and at be by do does for from in into is it its of on one or our some that the their them
this to use used using with class function method module object return returns
"""
EMPTY = set(_FILLING.split())

Function = ast.FunctionDef | ast.AsyncFunctionDef
Problem = tuple[int, str]


def check(source: str, name: str, errors: dict[str, set[str]]) -> list[Problem]:
    """Return (line, problem) pairs of one module.

    name is the module's own, for example `store`; errors maps each pipeline error to itself and the
    classes above it.
    """
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        return [(error.lineno or 1, f"does not parse: {error.msg}")]
    problems = list(_sentence(tree, name, [name]))
    problems += _legend(tree, source)
    for owners, node in _public(tree, ()):
        problems += _sentence(node, node.name, [*owners, node.name])
        if isinstance(node, Function):
            problems += _raises(node, node, errors)
            problems += _shapes(node)
            continue
        # A class says what making one of it raises, so that __init__ needs no docstring.
        for item in node.body:
            if isinstance(item, Function) and item.name == "__init__":
                problems += _raises(item, node, errors)
    return sorted(problems)


def error_tree(source: str) -> dict[str, set[str]]:
    """Return each class of errors.py with the names that say it: its own and those of the classes
    above it."""
    tree: dict[str, set[str]] = {}
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ClassDef):
            continue
        names = {node.name}
        for base in node.bases:
            # Those above stand before it in the file, so that their names are known.
            if isinstance(base, ast.Name):
                names |= tree.get(base.id, set())
        tree[node.name] = names
    return tree


def _public(
    node: ast.AST, owners: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], ast.ClassDef | Function]]:
    """Yield public classes and functions; what stands inside a function is its own affair."""
    for item in ast.iter_child_nodes(node):
        # What is defined under a condition is as public as the rest.
        if isinstance(item, ast.If | ast.Try | ast.With):
            yield from _public(item, owners)
        if not isinstance(item, ast.ClassDef | Function):
            continue
        if item.name.startswith("_") or _is_stub(item, node):
            continue
        yield owners, item
        if isinstance(item, ast.ClassDef):
            yield from _public(item, (*owners, item.name))


def _is_stub(item: ast.ClassDef | Function, owner: ast.AST) -> bool:
    """Tell overloads, property setters, and a Protocol's `...` methods, which are described
    elsewhere."""
    for mark in item.decorator_list:
        # `typing.overload` and `name.setter` are known by their last part.
        if ast.unparse(mark).rpartition(".")[2] in ("overload", "setter", "deleter"):
            return True
    if not isinstance(owner, ast.ClassDef):
        return False
    protocol = any("Protocol" in ast.unparse(base) for base in owner.bases)
    return protocol and ast.unparse(item.body[0]) == "..."


def _sentence(
    node: ast.Module | ast.ClassDef | Function, name: str, names: list[str]
) -> Iterator[Problem]:
    """Check how a docstring starts; names are those whose words it must not merely repeat."""
    # A module has no line of its own.
    line = getattr(node, "lineno", 1)
    kind = _kind(node)
    # Not cleaned: the indentation counts for the length of lines.
    text = ast.get_docstring(node, clean=False)
    if not text or not text.strip():
        yield line, f"{kind} {name} has no docstring"
        return
    first = text.partition("\n\n")[0]
    start = node.body[0]
    lines = first.split("\n")
    lines[0] = " " * start.col_offset + '"""' + lines[0]
    if "\n" not in text:
        lines[0] += '"""'
    if first.startswith("\n") or not first.rstrip().endswith((".", "?")):
        yield line, f"{kind} {name}: the docstring must start with a whole sentence and a period"
    if max(map(len, lines)) > LINE:
        yield (
            start.lineno,
            f"{kind} {name}: a line of the docstring's start is over {LINE} characters",
        )
    if "\n" not in text and _words(first) <= _words(" ".join(names)):
        yield (
            line,
            f"{kind} {name}: the docstring only repeats the name; say what the name does not",
        )
    if kind == "function" and THIRD_PERSON.match(first):
        yield line, f"function {name}: write an imperative ({first.split()[0]!r} is not one)"


def _kind(node: ast.AST) -> str:
    if isinstance(node, ast.Module):
        return "module"
    return "class" if isinstance(node, ast.ClassDef) else "function"


def _words(text: str) -> set[str]:
    """Return the words that carry meaning, without endings, also those inside a name."""
    stems = set()
    for word in re.findall(r"[A-Z]?[a-z0-9]+|[A-Z]+", text):
        lower = word.lower()
        if lower not in EMPTY:
            stems.add(re.sub(r"(ing|ed|es|s|e)$", "", lower))
    return stems


def _raises(
    function: Function, described: ast.ClassDef | Function, errors: dict[str, set[str]]
) -> Iterator[Problem]:
    """Check that a docstring names the errors of ours that a function's own body raises."""
    text = f"{ast.get_docstring(function)} {ast.get_docstring(described)}"
    # From "Raises" or "raise" on: a name before it may stand for something else.
    said = text.partition("aise")[2]
    lines: dict[str, int] = {}
    for line, error in _raised(function, errors):
        # Told once, at the first place.
        lines.setdefault(error, line)
    for error, line in lines.items():
        # The name of a class above it says enough.
        if not any(re.search(rf"\b{name}\b", said) for name in errors[error]):
            yield (
                line,
                f"function {function.name} raises {error}, and its docstring does not: add "
                f'"Raises {error} ..."',
            )


def _raised(function: Function, errors: dict[str, set[str]]) -> Iterator[tuple[int, str]]:
    """Yield (line, error) of what a function raises of errors."""
    for node in _own(function):
        if not isinstance(node, ast.Raise) or node.exc is None:
            continue
        raised = node.exc
        if isinstance(raised, ast.Call):
            raised = raised.func
        error = ast.unparse(raised).rpartition(".")[2]
        if error in errors:
            yield node.lineno, error


def _own(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes below a function that run when it is called, so not those of functions it
    defines."""
    for item in ast.iter_child_nodes(node):
        if not isinstance(item, Function | ast.Lambda | ast.ClassDef):
            yield item
            yield from _own(item)


def _legend(tree: ast.Module, source: str) -> Iterator[Problem]:
    """Check that the lines above the first statement explain every letter of the module's shape
    suffixes."""
    statements = [node for node in tree.body if not _is_text(node)]
    lines = source.split("\n")
    if statements:
        lines = lines[: statements[0].lineno - 1]
    head = "\n".join(lines)
    seen = set()
    for line, name in sorted(_names(tree)):
        for letter in _letters(name):
            # Once a module, whichever name has the letter.
            if letter not in seen and not _is_explained(letter, head):
                yield (
                    line,
                    f"{name}: the top of the module has no legend for {letter} (for example "
                    '"D model width")',
                )
            seen.add(letter)


def _is_explained(letter: str, head: str) -> bool:
    """Whether a legend has a letter: `D model width`, `D: ...` or `D = ...`."""
    # A letter before and, or, is stands in a sentence about it and not in a legend.
    named = rf"(?<![\w]){letter}\s*[:=]?\s+\(?(?!and\b|or\b|is\b)[a-z]"
    equated = rf"\b{letter} ?= ?\w"
    return re.search(f"{named}|{equated}", head) is not None


def _is_text(node: ast.stmt) -> bool:
    if not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Constant):
        return False
    return isinstance(node.value.value, str)


def _names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id


def _letters(name: str) -> str:
    """Return the dimensions of a name's suffix; digits in it are sizes."""
    suffix = SUFFIXED.fullmatch(name)
    if suffix is None:
        return ""
    return "".join(filter(str.isalpha, suffix[1]))


def _shapes(function: Function) -> Iterator[Problem]:
    """Check that arrays that go in and out have their shapes in names or in the docstring."""
    given = function.args
    arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs]
    arrays = [each.arg for each in arguments if _is_array(each.annotation)]
    bare = [name for name in arrays if not SUFFIXED.fullmatch(name)]
    named = SUFFIXED.fullmatch(function.name) or _returns_suffixed(function)
    # With arrays in, what comes out mostly has a shape of theirs.
    returns = _is_array(function.returns) and not arrays and not named
    if (bare or returns) and not SHAPE.search(ast.get_docstring(function) or ""):
        what = ", ".join(bare) or "what it returns"
        yield (
            function.lineno,
            f"function {function.name}: name the shape of {what}: x_BTD, or [B, T, D] in the "
            "docstring",
        )


def _is_array(annotation: ast.expr | None) -> bool:
    """Tell an array, one that may be absent, and a tuple of arrays; containers of many have no one
    shape."""
    match annotation:
        case ast.Constant(value=str() as text):
            return text.rpartition(".")[2] in ARRAYS
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name in ARRAYS
        case ast.BinOp(left=left, right=right):
            return _is_array(left) or _is_array(right)
        case ast.Subscript(value=ast.Name(id="tuple" | "Optional"), slice=ast.Tuple(elts=parts)):
            return any(map(_is_array, parts))
        case ast.Subscript(value=ast.Name(id="tuple" | "Optional" | "NDArray") as kind, slice=part):
            return kind.id == "NDArray" or _is_array(part)
        case ast.Subscript(value=ast.Attribute(attr=name)):
            return name in ARRAYS
    return False


def _returns_suffixed(function: Function) -> bool:
    values = [node.value for node in _own(function) if isinstance(node, ast.Return)]
    for value in values:
        if not isinstance(value, ast.Name) or not SUFFIXED.fullmatch(value.id):
            return False
    return bool(values)


def main(arguments: list[str] | None = None) -> int:
    """Print `file:line: problem` for every problem below the given paths; return 1 when there is
    one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "paths", nargs="*", type=Path, help=f"files or folders (without: {', '.join(CHECKED)})"
    )
    paths = parser.parse_args(arguments).paths
    absent = [str(path) for path in paths if not path.exists()]
    if absent:
        parser.error(f"no such file or folder: {', '.join(absent)}")
    errors = error_tree((ROOT / "pipeline" / "errors.py").read_text("utf-8"))
    found = 0
    for file in _files(paths or [ROOT / name for name in CHECKED]):
        # A package is called by its folder.
        name = file.parent.name if file.stem in ("__init__", "__main__") else file.stem
        shown = file.relative_to(ROOT) if file.is_relative_to(ROOT) else file
        for line, problem in check(file.read_text("utf-8"), name, errors):
            print(f"{shown}:{line}: {problem}")
            found += 1
    return int(found > 0)


def _files(paths: list[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            yield from sorted(path.rglob("*.py"))
        elif path.exists():
            yield path


if __name__ == "__main__":
    sys.exit(main())
