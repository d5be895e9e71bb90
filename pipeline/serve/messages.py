"""What chat clients send as messages, and how it is said that one question at a time is answered.

Checked before pydantic sees it: a message is one of several things to it, and it would tell what is
wrong with each of them.
"""

from collections.abc import Mapping

PARTS = ("text", "image_url")
_INSTRUCTING = ("system", "developer")
_EXAMPLE = '{"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}'


def one_question(given: object) -> object:
    """Return the messages of a request as they came. Raises ValueError, in words for who wrote the
    client, unless they are one message of the user made of texts and pictures."""
    if not isinstance(given, list) or not all(isinstance(each, Mapping) for each in given):
        raise ValueError('give a list of one message, as in [{"role": "user", "content": "..."}]')
    roles = [each.get("role") for each in given]
    for role in roles:
        if role in _INSTRUCTING:
            raise ValueError(
                f"a {role} message is not read: experts were trained on single questions; leave it "
                "out, or write what it asks for into the question"
            )
    if len(given) != 1:
        raise ValueError(
            f"{len(given)} messages came, and one message is answered, without earlier turns: send "
            "the last question alone, with what it needs of the others in it"
        )
    if roles != ["user"]:
        raise ValueError(f"the role of the one message must be user, not {roles[0]!r}")
    _check_content(given[0].get("content"))
    return given


def _check_content(content: object) -> None:
    if isinstance(content, str):
        return
    if not isinstance(content, list) or not content:
        raise ValueError("content must be a text, or a list of parts of text and image_url")
    for number, part in enumerate(content):
        problem = _problem(part)
        if problem:
            raise ValueError(f"part {number} of content: {problem}")


def _problem(part: object) -> str:
    """Return what is wrong with a part of a message; "" where nothing is."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(part, Mapping) or kind not in PARTS:
        found = f"type {kind!r}" if kind is not None else "no type"
        return f"it has {found}, and {' and '.join(PARTS)} are read; a picture is {_EXAMPLE}"
    value = part.get(kind)
    if kind == "text":
        return "" if isinstance(value, str) else "text must be a text"
    url = value.get("url") if isinstance(value, Mapping) else None
    if not isinstance(url, str):
        return f"image_url must be an object with a url, as in {_EXAMPLE}"
    return ""
