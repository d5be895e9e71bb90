"""Every setting that is a path, of every section and family, read in every way that people write
one: taken from where the settings are defined, so that a new one is here too."""

import json
import os
from pathlib import Path

import pytest

from pipeline.config.files import override, resolve, resolve_routing_paths
from pipeline.config.paths import ENTRIES, located, settings
from pipeline.config.routing_set import RoutingSetConfig
from pipeline.config.text_data import DataConfig, FilesConfig
from pipeline.data.sources.files import sources
from pipeline.families.load import PATHS, RUN_CONFIGS
from tests import small
from tests.yaml_text import yaml_text

SETTINGS = dict(settings(PATHS))
# What a person may call a folder
NAMES = [
    "plain",
    "with space",
    "run[1]",
    "[x]",
    "a]b",
    "star*",
    "what?",
    "naïve 漢字",
    "a..b",
    "#1",
]
# Ways to write the folder DIR/NAME, in a file of DIR
WAYS = {
    "relative": "{name}",
    "dot": "./{name}",
    "around": "sub/../{name}",
    "home": "~/{name}",
    "absolute": "{root}/{name}",
}


def nested(dotted: str, value):
    """Return a mapping in which a dotted setting has a value."""
    for key in reversed(dotted.split(".")):
        value = [value] if key == ENTRIES else {key: value}
    return value


def taken(raw, dotted: str):
    """Return the value of a dotted setting."""
    for key in dotted.split("."):
        raw = raw[0] if key == ENTRIES else raw[key]
    return raw


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A folder with a folder of each name in it, which is home, and not where the program runs."""
    home = tmp_path / "home [of] one"
    (home / "sub").mkdir(parents=True)
    for name in NAMES:
        (home / name).mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("HOME", str(home))
    return home


def test_the_table_has_what_both_families_read_and_write():
    sections = {name.partition(".")[0] for name in SETTINGS}
    assert {"data", "tokenizer", "trunk", "deploy", "loras", "dataset"} <= sections
    # A path that is not said to be one is found by what its description says
    assert not [name for name in undeclared(*RUN_CONFIGS.values()) if name not in SETTINGS]


def undeclared(*sections, above=""):
    """Yield the settings of text whose descriptions speak of a folder or file to be given."""
    from pydantic import BaseModel

    for section in sections:
        for name, field in section.model_fields.items():
            dotted = f"{above}.{name}" if above else name
            kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
            entries = getattr(field.annotation, "__origin__", None) in (tuple, list)
            below = f"{dotted}.{ENTRIES}" if entries else dotted
            for kind in kinds:
                if isinstance(kind, type) and issubclass(kind, BaseModel):
                    yield from undeclared(kind, above=below)
            words = (field.description or "").lower()
            if str in kinds and words.startswith(("folder", "file or folder", "globs or", "path")):
                yield below


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dotted", SETTINGS)
def test_a_path_means_the_same_however_it_is_written(root, dotted, way):
    for name in NAMES:
        text = WAYS[way].format(name=name, root=root)
        (root / "run.yaml").write_text(yaml_text(nested(dotted, text)))
        found = taken(resolve(root / "run.yaml", PATHS), dotted)
        if SETTINGS[dotted] == "glob":
            continue  # below, as what it means shows in what it finds
        assert found == os.path.normpath(root / name), (name, text)
        # Over a file from elsewhere, a path is still the file's that states it
        (root / "sub" / "over.yaml").write_text("extends: ../run.yaml\n")
        assert taken(resolve(root / "sub" / "over.yaml", PATHS), dotted) == found
        # And as an override of the file, whose quotes are YAML's
        if ENTRIES not in dotted:
            _, typed = override(f"{dotted}={json.dumps(text)}", root, PATHS)
            assert taken(typed, dotted) == found


@pytest.mark.parametrize("dotted", SETTINGS)
def test_urls_and_names_on_the_hub_stay_as_they_are(root, dotted):
    kept = ["s3://bucket/a[1]/*.jsonl", "file:///x/../y"]
    if SETTINGS[dotted] == "model":
        kept += ["acme/tiny", "gpt2", "acme/tiny[1]"]
    for text in kept:
        (root / "run.yaml").write_text(yaml_text(nested(dotted, text)))
        assert taken(resolve(root / "run.yaml", PATHS), dotted) == text


def test_a_folder_that_is_there_is_meant_before_a_name_on_the_hub(root):
    (root / "acme" / "tiny").mkdir(parents=True)
    assert located("acme/tiny", "model", root) == str(root / "acme" / "tiny")
    assert located("acme/other", "model", root) == "acme/other"
    # Written as a path it is one, whether it is there or not
    assert located("./acme/other", "model", root) == str(root / "acme" / "other")
    assert located("~/acme/other", "model", root) == str(root / "acme" / "other")
    assert located("~nobody-here/x", "path", root).endswith("~nobody-here/x")


@pytest.mark.parametrize("way", WAYS)
def test_files_of_text_are_found_in_folders_of_any_name(root, way):
    for name in NAMES:
        for file in ("rows.txt", "row[2].txt", "r*w.txt"):
            (root / name / file).write_text(f"{name} {file}")
    for name in NAMES:
        for file in ("rows.txt", "row[2].txt", "r*w.txt", "row*.txt"):
            text = f"{WAYS[way].format(name=name, root=root)}/{file}"
            found = read_files(root, text)
            wanted = (
                {f"{name} {file}"}
                if file != "row*.txt"
                else {f"{name} rows.txt", f"{name} row[2].txt"}
            )
            assert wanted <= found and (name in ("star*", "what?") or found == wanted), text


def test_brackets_that_name_nothing_are_a_choice_of_signs(root):
    for number in (1, 2, 3):
        (root / f"part{number}").mkdir()
        (root / f"part{number}" / "rows.txt").write_text(str(number))
    assert read_files(root, "part[12]/rows.txt") == {"1", "2"}
    assert read_files(root, "part[!12]/*.txt") == {"3"}


def read_files(root: Path, text: str) -> set[str]:
    """Return the texts of the files that a path in a file of root means."""
    (root / "run.yaml").write_text(yaml_text({"data": {"files": [{"paths": [text]}]}}))
    paths = resolve(root / "run.yaml", PATHS)["data"]["files"][0]["paths"]
    entry = FilesConfig(paths=tuple(paths), domain="alpha", documents="file")
    data = DataConfig(source="files", files=(entry,))
    cfg = small.config().model_copy(update={"data": data})
    found = set()
    for _, files in sources(cfg):
        for file in files:
            found |= {row["text"] for _, row in file.rows() if isinstance(row, dict)}
    return found


def test_files_that_hold_sections_are_named_in_any_of_these_ways(root):
    base = {"loras": {"base": {"model": "./[x]"}}, "dataset": {"sources": [{"path": "plain"}]}}
    (root / "run[1]" / "loras.json").write_text(json.dumps(base["loras"]))
    (root / "run[1]" / "set.yaml").write_text(
        yaml_text(base["dataset"] | {"paraphrases": "~/p.yaml"})
    )
    (root / "p.yaml").write_text("alpha: {seen: [x]}\n")
    for way in WAYS.values():
        folder = way.format(name="run[1]", root=root)
        named = {"loras": f"{folder}/loras.json", "dataset": f"{folder}/set.yaml"}
        (root / "run.yaml").write_text(yaml_text(named))
        found = resolve(root / "run.yaml", PATHS)
        # Relative to the file that states it, which is the named one
        assert found["loras"]["base"]["model"] == str(root / "run[1]" / "[x]")
        assert found["dataset"]["sources"][0]["path"] == str(root / "run[1]" / "plain")
        assert found["dataset"]["paraphrases"] == {"alpha": {"seen": ["x"]}}
        (root / "over.yaml").write_text(f"extends: {json.dumps(folder + '/../run.yaml')}\n")
        assert resolve(root / "over.yaml", PATHS) == found


def test_the_routing_generators_own_file_reads_them_alike(root):
    names = [name for name, _ in settings({"dataset": PATHS["dataset"]})]
    assert names and RoutingSetConfig.model_fields.keys() >= {"sources"}
    for dotted in names:
        raw = nested(dotted, "~/plain")["dataset"]
        found = resolve_routing_paths(raw, root)
        assert taken({"dataset": found}, dotted) == str(root / "plain")
