"""What is said about a wrong setting: for every setting of either family and everything that YAML
can write there, in words that need no Python."""

import re
from collections.abc import Iterator

import pytest
from pydantic import BaseModel, ValidationError

from pipeline.config.problems import explain
from pipeline.config.wording import holder, section_class
from pipeline.errors import ConfigError
from pipeline.families.load import RUN_CONFIGS, load
from tests.yaml_text import yaml_text

NUMBERS = [True, 3, -3, 0, 2.5, 1e30]
ODD = [*NUMBERS, None, "x", "", "12 apples", "1.2.3MB", [], ["a", 1], [1], [[]], {}, {"zz": 1}]
ODD += [[{"zz": 1}]]
# Names of Python's or pydantic's that nobody writes into YAML
JARGON = re.compile(
    r"Input should|tuple|dict|boolean|valid (string|integer|number)|instance of|pars(e|ing)|literal"
    r"|constrained|function-|validat|None|True|False|\bint\b|\bstr\b|Value error|Field required"
)


def _settings(kind: type[BaseModel], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, field in kind.model_fields.items():
        section = section_class(field.annotation)
        yield (*above, name)
        if section is not None:
            yield from _settings(section, (*above, name))


def _nested(names: tuple[str, ...], value: object) -> dict:
    for name in reversed(names):
        value = {name: value}
    return value


@pytest.mark.parametrize("family", RUN_CONFIGS)
def test_whatever_stands_at_a_setting_is_refused_in_plain_words(tmp_path, family):
    kind = RUN_CONFIGS[family]
    refused = 0
    for names in _settings(kind):
        for value in ODD:
            raw = _nested(names, value)
            try:
                kind.model_validate(raw)
            except ValidationError as error:
                text = explain(error.errors(), raw, tmp_path / "a.yaml", kind)
            else:
                continue
            refused += 1
            # What was found is the file's own; it is repeated as it stands there.
            ours = re.sub(r"\(found .*\)", "", text)
            assert not JARGON.search(ours), text
            assert max(map(len, text.splitlines())) < 400, text
            lines = text.splitlines()[1:]
            subjects = [line.split(": ")[0] for line in lines if ": " in line]
            assert len(set(subjects)) == len(subjects), text  # a setting is named once
    assert refused > 500


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("trunk: {step: 4}", "did you mean steps?"),
        ("trunk: {steps: 4}\nroutr: {top_k: 1}", "did you mean router?"),
        ("trunk: {steps: 4, top_k: 2}", "there are joint.top_k and router.top_k"),
        ("partition: {by: label}", "did you mean labels?"),
        ("dtype: BF16", "did you mean bf16?"),
        ("runtime: {thread: 1}", "did you mean threads?"),
        ("modal: {train_shared: {timeout: 3}}", "did you mean timeout"),
    ],
)
def test_the_name_that_was_meant_is_said(tmp_path, typed, meant):
    path = tmp_path / "a.yaml"
    path.write_text(typed, "utf-8")
    with pytest.raises(ConfigError) as error:
        load(path)
    assert meant in str(error.value)


def test_a_setting_of_several_types_is_one_problem(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("runtime: {threads: many}", "utf-8")
    with pytest.raises(ConfigError, match="1 problem") as error:
        load(path)
    assert "must be a whole number or 'auto' (found 'many')" in str(error.value)


@pytest.mark.parametrize("value", [4, 1, 999_999])
def test_a_budget_without_its_unit_is_not_taken_as_bytes(tmp_path, value):
    path = tmp_path / "a.yaml"
    path.write_text(f"runtime: {{memory_budget: {value}}}", "utf-8")
    with pytest.raises(ConfigError, match=f"write the unit, as {value}GB"):
        load(path)


@pytest.mark.parametrize("family", RUN_CONFIGS)
def test_what_a_setting_of_a_run_names_is_told_from_a_run(tmp_path, family):
    for place, section in RUN_CONFIGS[family].model_fields.items():
        kind = section_class(section.annotation)
        if kind is None:
            continue
        path = tmp_path / f"{place}.yaml"
        own = dict.fromkeys(kind.model_fields.keys(), 1)
        # extends and the keys that a run has too belong to no section alone.
        path.write_text(yaml_text(own), "utf-8")
        with pytest.raises(ConfigError, match="is no run but what the setting"):
            load(path)
        assert holder(own, (RUN_CONFIGS[family],)) == place


def test_a_file_of_something_else_is_told_by_its_keys(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("colour: red\nshape: round\n", "utf-8")
    with pytest.raises(ConfigError, match=r"none of its keys \(colour, shape\) is among a run's"):
        load(path)
