"""Texts of errors: whatever a library says, none tells where an object lies in memory."""

import inspect
import io
import pickle
import threading
from pathlib import Path

import pytest
from PIL import Image

from pipeline.data.images.images import BadImage, open_checked
from pipeline.errors import PipelineError
from pipeline.serve.refusals import ApiError


def kinds(base: type = PipelineError) -> list[type]:
    """Return a class of errors and all that are made of it."""
    return [base, *(kind for below in base.__subclasses__() for kind in kinds(below))]


OBJECTS = (object(), io.BytesIO(), threading.Lock(), kinds, map(str, ()), iter("").__next__)
OTHERS = {"address": "a", "stages": (), "items": (), "failed": {}, "remove": Path("x")}
OTHERS |= {"smallest_bytes": 1}


@pytest.mark.parametrize("value", OBJECTS, ids=lambda value: type(value).__name__)
def test_no_error_of_the_project_tells_an_address(value):
    assert "0x" in repr(value)
    for kind in kinds():
        texts, keywords = [], {}
        for name, field in inspect.signature(kind).parameters.items():
            if field.kind is field.KEYWORD_ONLY and field.default is field.empty:
                keywords[name] = OTHERS[name]
            elif field.kind is not field.KEYWORD_ONLY and field.default is field.empty:
                texts.append(OTHERS.get(name, f"cannot read {value!r}"))
        error = kind(*texts, **keywords)
        assert "cannot read" in str(error)
        for each in (error, pickle.loads(pickle.dumps(error))):  # noqa: S301
            assert "0x" not in str(each)
            assert type(each) is kind


def test_nor_does_an_answer():
    for value in OBJECTS:
        assert "0x" not in ApiError(400, f"cannot read {value!r}").message


def test_what_is_no_picture_is_said_without_a_word_of_the_library():
    for content in (b"", b"GIF", b"\x89PNG", b"no picture"):
        with pytest.raises(BadImage) as error:
            open_checked(content)
        assert "BytesIO" not in str(error.value)
    with pytest.raises(BadImage, match="at most 4 square px"):
        open_checked(Image.new("RGB", (3, 3)), max_pixels=4)
