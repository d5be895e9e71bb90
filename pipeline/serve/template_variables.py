"""The variables that a chat template reads beside the chat itself: `enable_thinking` of Qwen3's,
the date of Llama's.

vLLM passes over names that a template does not read; here they are refused, so that a slip in one
changes no answer unseen.
"""

from collections.abc import Mapping
from inspect import signature
from typing import Annotated, Any

from jinja2 import Environment, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser
from pydantic import Field

Scalar = bool | int | float | Annotated[str, Field(max_length=2000)] | None
# What transformers gives to every template.
_GIVEN = {"messages", "raise_exception", "strftime_now", "dict", "namespace"}


class _Generation(Extension):
    """The tag by which templates mark what an assistant says: here it is what stands in it."""

    tags = {"generation"}  # noqa: RUF012  # as Jinja declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Return what stands in the tag."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def variables_of(tokenizer: Any) -> frozenset[str]:
    """Return the names that the chat template of a tokenizer (of transformers) reads and that a
    request may give values to: neither the chat, nor what is a field of its own, nor the names of
    special tokens."""
    # Only parsed: nothing of it is run.
    reader = Environment(extensions=[loopcontrols, _Generation])  # noqa: S701
    try:
        read = find_undeclared_variables(reader.parse(tokenizer.get_chat_template()))
    except TemplateError:
        # Whoever sends a chat is told
        return frozenset()
    own = signature(tokenizer.apply_chat_template).parameters
    return frozenset(read).difference(_GIVEN, own, tokenizer.special_tokens_map)


def unread(given: Mapping[str, Scalar], read: frozenset[str]) -> str:
    """Return what is wrong with names that a template does not read; "" with none."""
    strange = [name for name in given if name not in read]
    if not strange:
        return ""
    known = f"it reads {', '.join(sorted(read))}" if read else "it reads none"
    return f"the model's chat template reads no {', '.join(strange)}; {known}"
