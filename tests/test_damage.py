"""What lies in a store may be damaged or out of reach, file by file: it is named, told from what is
as good as ever, and never ends in a traceback.

The variants are made from the stores of two runs, one of each family: every manifest, every file of
JSON, every field, every read.
"""

import errno
import json
import os
import random
import re
import shutil

import pytest
from fakes import MALFORMED, FaultyReads, flip, told
from test_job import stored

from pipeline import report
from pipeline.__main__ import main
from pipeline.data.routing.dataset import RoutingRows
from pipeline.data.tasks.rows import read_rows
from pipeline.data.text import tokenizer
from pipeline.data.text.shards import Shards
from pipeline.errors import DamagedArtifact, DataError, StoreError
from pipeline.families.adapters.base import ModelRef
from pipeline.families.adapters.router import Calibration
from pipeline.families.load import load
from pipeline.protocols import quiet
from pipeline.run import stages
from pipeline.run.dry_run import plan
from pipeline.run.job import run_job
from pipeline.store import manifest as manifests
from pipeline.store.artifacts import Reader, Store
from pipeline.store.mark import parse_format
from pipeline.store.reading import parse_object, read_object, sealed, unsealed

# What a system says of files that may be as good as ever.
REFUSALS = (errno.EACCES, errno.EIO, errno.ESTALE, errno.EMFILE)
FAMILIES = ("ffn_moe", "lora_vlm")


@pytest.fixture(scope="module")
def whole(finished, tmp_path_factory):
    """{family: (configuration, store)} up to the router or the report; read them, never change
    them."""
    adapters = stored(tmp_path_factory.mktemp("adapters"))
    run_job("evaluate", *adapters, progress=quiet)
    return {"ffn_moe": (load(finished[0]), Store(finished[1])), "lora_vlm": adapters}


@pytest.fixture
def copied(whole, tmp_path):
    """A copy of either run's store, to be damaged."""

    def copy(family):
        cfg, store = whole[family]
        root = tmp_path / family
        shutil.copytree(store.root, root, symlinks=True)
        return cfg, Store(root)

    return copy


def changed(text, draw):
    """Return a text with one bit of a digit, a letter or anything else changed."""
    data = bytearray(text, "utf-8")
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(7)
    return data


def fields(text):
    """Yield (start, end) of every key and every value in the lines of an indented JSON text."""
    for line in re.finditer(r'^ +("[^"]*")?(: )?(.*?),?$', text, re.MULTILINE):
        for group in (1, 3):
            if line[group]:
                yield line.span(group)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bit_of_any_field_of_any_manifest_is_its_own_damage(copied, family):
    _, store = copied(family)
    draw = random.Random(7)
    count = 0
    for address in store.addresses():
        path = store.folder(address) / manifests.NAME
        text = path.read_text()
        whole = manifests.read(path.parent)
        for start, end in fields(text):
            other = text[:start].encode() + changed(text[start:end], draw) + text[end:].encode()
            path.write_bytes(other)
            with pytest.raises(DamagedArtifact) as damaged:
                store.require(address)
            assert str(damaged.value).startswith(f"{path} is torn or its bytes have changed")
            said = told(damaged.value)
            assert (
                f"; remove {path.parent} and run `python -m pipeline {whole.stage}` again" in said
            )
            count += 1
        path.write_text(text)
        assert store.require(address) == whole
    # the names of all sums and sizes, and the figures of each training
    assert count > 1000


@pytest.mark.parametrize("family", FAMILIES)
def test_no_damaged_manifest_makes_another_artifact_look_wrong(copied, family):
    """Whatever a command reads on the way, the one that it names is the one that was damaged."""
    cfg, store = copied(family)
    shutil.rmtree(store.folder(stages.address(cfg, "evaluate")))
    for address in store.addresses():
        path = store.folder(address) / manifests.NAME
        whole = path.read_text()
        # a digit of a sum: what is compared with other manifests' inputs
        at = whole.index('"sha256": "') + 12
        flip(path, at)
        with pytest.raises(DamagedArtifact) as damaged:
            run_job("evaluate", cfg, store, progress=quiet)
        assert damaged.value.remove == path.parent
        others = [other for other in store.addresses() if other != address]
        assert not [other for other in others if other in told(damaged.value)]
        with pytest.raises(DamagedArtifact, match=re.escape(str(path))):
            plan(cfg, store)
        path.write_text(whole)


@pytest.mark.parametrize("content", MALFORMED, ids=range(len(MALFORMED)))
def test_what_is_no_json_of_an_object_is_refused_in_words(content):
    for reader in (parse_format, unsealed):
        with pytest.raises(ValueError, match=r"^\S.*\S$"):
            reader(content)
    with pytest.raises(ValueError, match=r"^\S.*\S$"):
        parse_object(content)


def test_a_seal_holds_what_json_makes_of_values():
    values = {"at": (1, 2), "by": {10: "a", 9: "b"}, "nan": float("nan"), "x": 0.1 + 0.2, "é": "ü"}
    for indent in (None, 1):
        text = sealed(values, indent)
        assert text == sealed(unsealed(text.encode(), indent), indent)
        for at in range(len(text)):
            data = bytearray(text.encode())
            data[at] ^= 1
            with pytest.raises(ValueError, match="."):
                unsealed(bytes(data), indent)


def test_numbers_that_transformers_writes_are_no_damage():
    # model_max_length of a tokenizer without one
    assert parse_object(b'{"model_max_length": 1000000000000000019884624838656}')


def json_files(store):
    """Return every file of JSON of a store, those of checkpoints and notes aside."""
    every = sorted(path for path in store.root.rglob("*.json") if path.is_file())
    # What was looked at is looked at again where a record is lost
    return [path for path in every if store.root / "sources" not in path.parents]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_file_of_json_may_hold_anything(copied, family, capfd):
    """A command that reads a store ends in a sentence that names the file and what to remove."""
    cfg, store = copied(family)
    draw = random.Random(3)
    shutil.rmtree(store.folder(stages.address(cfg, "evaluate")))
    for path in json_files(store):
        whole = path.read_bytes()
        for content in draw.sample(MALFORMED, 3):
            path.write_bytes(content)
            with pytest.raises(StoreError) as damaged:
                run_job("evaluate", cfg, store.open(), progress=quiet)
            assert str(path) in str(damaged.value) or path.name == "store.json"
            assert damaged.value.remove in path.parents or damaged.value.remove == path
        path.write_bytes(whole)


READERS = {
    "shards.json": lambda path: Shards(path.parent),
    "tokenizer_config.json": lambda path: tokenizer.load(path.parent),
    "tokenizer.json": lambda path: tokenizer.load(path.parent),
    "trunk.json": read_object,
    "report.json": lambda path: report.read(path.read_bytes()),
    "pin.json": lambda path: ModelRef.read(path.parent),
    "calibration.json": lambda path: Calibration.read(path.parent),
    "adapter.json": read_object,
    "routing.manifest.json": lambda path: RoutingRows(path.parent),
    "routing.jsonl": lambda path: list(RoutingRows(path.parent)),
    "rows.jsonl": lambda path: list(read_rows(path.parent)),
}


@pytest.mark.parametrize("name", READERS)
def test_every_reader_by_itself_refuses_what_it_cannot_use(whole, tmp_path, name):
    """Without the sums of a manifest before it, as tools and tests call it."""
    found = []
    for _, store in whole.values():
        found += store.root.glob(f"artifacts/*/{name}")
    folder = tmp_path / "artifacts" / found[0].parent.name
    shutil.copytree(found[0].parent, folder)
    READERS[name](folder / name)
    for content in MALFORMED:
        if name.endswith(".jsonl") and not content.strip():
            continue
        (folder / name).write_bytes(content)
        with pytest.raises((StoreError, DataError)) as refused:
            READERS[name](folder / name)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("error", REFUSALS, ids=errno.errorcode.get)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_cannot_be_read_is_no_damage(copied, family, error, monkeypatch):
    """A read of whatever artifact fails: told as the system's word, and nothing to remove."""
    _, store = copied(family)
    addresses = store.addresses()

    def read_all():
        reader = Reader(store.open())
        for address in addresses:
            for name in reader.manifest(address).files:
                if name.endswith(".safetensors"):
                    reader.tensors(address, name)
            reader.folder(address)
            for name in READERS:
                path = store.folder(address) / name
                if name in reader.manifest(address).files and name != "report.json":
                    READERS[name](path)

    with monkeypatch.context() as patch:
        reads = FaultyReads(patch, store.root)
        reads.fail(None, 0)
        read_all()
        count = reads.seen
        # others for each errno, so that together they are most of them
        for at in random.Random(error).sample(range(count), min(count, 60)):
            reads.fail(at, error)
            with pytest.raises(StoreError) as said:
                read_all()
            reads.fail(None, 0)
            text = told(said.value)
            assert os.strerror(error) in text
            assert not isinstance(said.value, DamagedArtifact)
            assert "remove" not in text.replace("removed", "")
    assert count > 100
    read_all()


SHAPES = {
    "a link that leads nowhere": lambda path: path.symlink_to(path.with_name("nowhere")),
    "a file": lambda path: path.write_text("mine"),
    "a loop": lambda path: path.symlink_to(path),
}
PLACES = (
    "",
    "artifacts",
    "resume",
    "history",
    "locks",
    "jobs",
    "runs",
    "roots",
    "artifacts/ADDRESS",
)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("shape", SHAPES)
def test_what_lies_in_the_place_of_a_folder_is_said_and_left(copied, shape, place, capfd, finished):
    cfg, store = copied("ffn_moe")
    address = stages.address(cfg, "evaluate")
    path = store.root / place.replace("ADDRESS", address)
    if path.exists():
        shutil.move(path, path.with_name("elsewhere"))
    SHAPES[shape](path)
    before = (path.lstat().st_ino, path.lstat().st_mtime_ns)
    for command in ("plan", "evaluate"):
        code = main([command, "--config", str(finished[0]), "--store", str(store.root)])
        said = capfd.readouterr().err
        assert code == 2 and "Traceback" not in said
        assert str(path) in said.replace("\n", "")
    assert (path.lstat().st_ino, path.lstat().st_mtime_ns) == before


@pytest.mark.parametrize("shape", ["link", "folder"])
def test_a_manifest_that_is_no_file_is_damage_and_removes_nothing(copied, shape):
    """Taken for absent, the artifact would be emptied and made again."""
    cfg, store = copied("ffn_moe")
    address = stages.address(cfg, "evaluate")
    path = store.folder(address) / manifests.NAME
    path.rename(store.root / "kept.json")
    path.symlink_to(store.root / "nowhere") if shape == "link" else path.mkdir()
    before = sorted(path.parent.iterdir())
    with pytest.raises(DamagedArtifact, match=f"manifest.json is a {shape}"):
        run_job("evaluate", cfg, store, progress=quiet)
    assert sorted(path.parent.iterdir()) == before


def test_an_artifact_in_another_ones_place_is_named(copied):
    cfg, store = copied("ffn_moe")
    sea, hall = (stages.address(cfg, "train_experts", name) for name in ("sea", "hall"))
    shutil.rmtree(store.folder(sea))
    shutil.copytree(store.folder(hall), store.folder(sea))
    with pytest.raises(DamagedArtifact, match=f"is that of {hall}") as damaged:
        store.require(sea)
    assert damaged.value.remove == store.folder(sea)


@pytest.mark.parametrize("content", MALFORMED, ids=range(len(MALFORMED)))
def test_a_damaged_mark_alone_is_said_and_costs_nothing(copied, content):
    _, store = copied("lora_vlm")
    mark = store.root / "store.json"
    mark.write_bytes(content)
    with pytest.raises(StoreError, match=r"its store\.json alone is damaged") as damaged:
        store.open()
    said = told(damaged.value)
    assert f"remove {mark} and run the same command" in said and "as good as it was" in said
    # what is advised works
    mark.unlink()
    assert [store.open().require(address) for address in store.addresses()]


def test_every_bit_of_a_mark_counts(store_path):
    mark = Store(store_path).open().root / "store.json"
    whole = mark.read_bytes()
    for at in range(8 * len(whole)):
        data = bytearray(whole)
        data[at // 8] ^= 1 << at % 8
        mark.write_bytes(data)
        # never another version's, which would be told to leave the store
        with pytest.raises(DamagedArtifact):
            Store(store_path).open()


def test_a_manifest_without_a_seal_is_damage(copied):
    _, store = copied("lora_vlm")
    address = store.addresses()[0]
    path = store.folder(address) / manifests.NAME
    values = json.loads(path.read_text())
    values.pop("checksum")
    path.write_text(json.dumps(values, indent=1))
    with pytest.raises(DamagedArtifact, match="it has no checksum"):
        store.require(address)


@pytest.mark.parametrize(
    "change",
    [
        {"files": {"a": {"sha256": 1, "bytes": 1}}},
        {"files": {"a": {"sha256": "x", "bytes": True}}},
        {"files": {"a": {}}},
        {"files": []},
        {"inputs": {"a": None}},
        {"metrics": None},
        {"stage": 7},
    ],
)
def test_a_sealed_manifest_of_other_types_is_damage_too(copied, change):
    _, store = copied("lora_vlm")
    address = store.addresses()[0]
    path = store.folder(address) / manifests.NAME
    values = unsealed(path.read_bytes(), manifests.INDENT) | change
    path.write_text(sealed(values, manifests.INDENT))
    with pytest.raises(DamagedArtifact, match=re.escape(str(path))):
        store.require(address)
