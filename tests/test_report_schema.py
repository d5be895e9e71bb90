"""The report's schema: what it refuses, what survives the file, and that every field is shown."""

import copy
import io
import json
import math
from collections.abc import Iterator

import pytest
from pydantic import BaseModel, ValidationError
from rich.console import Console

from pipeline.errors import NewerStore, StoreError
from pipeline.report import LanguageReport, RequestReport, card, page, read, show
from pipeline.report.schema.base import SCHEMA_VERSION, ReportPart
from tests.small_reports import language_values, request_values
from tests.test_report_card import ABOUT, ABOUT_ADAPTERS

KINDS = [
    (LanguageReport, language_values(), ABOUT),
    (RequestReport, request_values(), ABOUT_ADAPTERS),
]
# What only report.json holds: no table has a place for it
UNSHOWN = (
    "metric",
    "machine.system",
    "machine.python",
    "speed.mfu",
    "requests.",  # how many were left out is in the notes, in words
    "routing.threshold",  # the card has it from the bundle
    "routing.calibration.reliability.",
    "text_routing.temperature",
    "answers.ranked_share",
    "answers.cut_share",
)


def leaves(value, path: tuple = ()) -> Iterator[tuple]:
    """Yield the path of every value but None that is neither a mapping nor a list."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, (*path, key))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from leaves(inner, (*path, i))
    elif value is not None:
        yield path


def changed(values: dict, path: tuple) -> dict:
    """Return values with another one at path, of the same type."""
    values = copy.deepcopy(values)
    inner = values
    for key in path[:-1]:
        inner = inner[key]
    old = inner[path[-1]]
    match old:
        case bool():
            new = not old
        case int():
            new = 2 * old + 1
        case float():
            new = old * 0.9 + 0.017
        case str():
            new = {"better": "tie", "worse": "tie", "router": "merge"}.get(old, f"{old}X")
    inner[path[-1]] = new
    return values


def shown(kind: type[BaseModel], values: dict, about: dict) -> Iterator[str]:
    """Yield everything that a report is shown as, the terminal last, which takes longest."""
    report = kind.model_validate(values)
    yield page(report, {})
    yield card(report, about)
    out = io.StringIO()
    show(report, Console(file=out))
    yield out.getvalue()


def test_every_field_of_a_report_is_shown_somewhere():
    """On page, terminal or card; that the other kind shows a field that both have is enough."""
    seen, unseen = set(), set()
    for kind, values, about in KINDS:
        before = list(shown(kind, values, about))
        for path in leaves(values):
            name = ".".join(key for key in path if isinstance(key, str))
            if name in seen:
                continue
            try:
                after = shown(kind, changed(values, path), about)
                differ = any(one != other for one, other in zip(before, after, strict=True))
            except ValidationError:  # a word of a fixed list, which a model checks already
                continue
            (seen if differ else unseen).add(name)
    assert {name for name in unseen - seen if not name.startswith(UNSHOWN)} == set()
    stale = [name for name in UNSHOWN if any(each.startswith(name) for each in seen)]
    assert stale == []


@pytest.mark.parametrize(("kind", "values", "about"), KINDS)
def test_the_sample_of_these_tests_fills_every_field(kind, values, about):
    """Else a field could be left out of every table and no test would see it."""
    missing = []

    def walk(part: BaseModel, path: str) -> None:
        for name in type(part).model_fields:
            value = getattr(part, name)
            if name not in part.model_fields_set and name not in ("kind", "schema_version"):
                # fields with a default need stand in one of several rows only
                missing.append(f"{path}{name}")
            for inner in value if isinstance(value, tuple) else [value]:
                if isinstance(inner, BaseModel):
                    walk(inner, f"{path}{name}.")

    walk(kind.model_validate(values), "")
    # What labels and few documents change is the whole of test_report_{labels,few}
    assert set(missing) <= {"routing.sets.rows.router_ahead", "labels", "data.too_few"}


@pytest.mark.parametrize(("kind", "values", "about"), KINDS)
def test_a_field_that_is_misspelt_is_refused_where_the_report_is_built(kind, values, about):
    def parts(value) -> Iterator[dict]:
        if isinstance(value, dict):
            yield value
            for inner in value.values():
                yield from parts(inner)
        elif isinstance(value, list):
            for inner in value:
                yield from parts(inner)

    for number in range(len(list(parts(values)))):
        again = copy.deepcopy(values)
        list(parts(again))[number]["misspelt"] = "x"
        with pytest.raises(ValidationError):
            kind.model_validate(again)


@pytest.mark.parametrize(("kind", "values", "about"), KINDS)
def test_the_file_gives_the_same_report_back(kind, values, about):
    report = kind.model_validate(values)
    assert json.loads(report.to_json())["schema_version"] == SCHEMA_VERSION
    assert read(report.to_json()) == report
    assert type(read(report.to_json().encode())) is kind


def test_what_is_not_finite_survives_the_file():
    values = language_values()
    values["quality"][0] |= {"mean": math.nan, "mean_perplexity": math.inf}
    text = LanguageReport.model_validate(values).to_json()
    row = read(text).quality[0]
    assert math.isnan(row.mean)
    assert row.mean_perplexity == math.inf


def test_a_report_cannot_be_changed():
    report = LanguageReport.model_validate(language_values())
    with pytest.raises(ValidationError):
        report.quality[0].mean = 0.0


def test_every_model_is_frozen_and_refuses_what_it_does_not_know():
    def below(kind: type) -> Iterator[type]:
        for each in kind.__subclasses__():
            yield each
            yield from below(each)

    models = list(below(ReportPart))
    assert len(models) > 20
    for model in models:
        assert model.model_config["frozen"]
        assert model.model_config["extra"] == "forbid"
        assert model.__doc__


@pytest.mark.parametrize(
    ("text", "error", "wanted"),
    [
        ("{", StoreError, "cannot be read"),
        ("[]", StoreError, "no schema version"),
        ('{"schema_version": "9"}', StoreError, "no schema version"),
        ('{"run": "old", "T1": []}', StoreError, "no schema version.*evaluate again"),
        (f'{{"schema_version": {SCHEMA_VERSION + 1}}}', NewerStore, "update MoleForge"),
        ('{"schema_version": 1, "kind": "other"}', StoreError, "kind"),
        ('{"schema_version": 1, "kind": "language", "run": "x"}', StoreError, "family: Field req"),
        (
            '{"schema_version": 1, "kind": "language", "run": "x", "family": "y", "T1": []}',
            StoreError,
            "T1",
        ),
    ],
)
def test_what_is_no_report_is_told_in_one_sentence(text, error, wanted):
    with pytest.raises(error, match=wanted) as told:
        read(text)
    assert "\n" not in str(told.value)
