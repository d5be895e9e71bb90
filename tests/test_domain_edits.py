"""What `add`, `remove` and `replace` write: which file, which settings, what is refused. Nothing is
trained here."""

import json
import os
import shutil
import threading
from pathlib import Path

import pytest

from pipeline.__main__ import main
from pipeline.config.domain_wish import DomainWish, HubText
from pipeline.config.stated import FileChange
from pipeline.errors import ConfigError
from pipeline.families.load import load
from pipeline.run.domains import changed, write
from pipeline.run.stages import Addresses

ROOT = Path(__file__).parent.parent
TEXT = """\
# Two domains, by hand
name: two
data:
  source: files
  files:
    - {paths: [sea.jsonl], domain: sea}   # salt
    - paths: [shop/*.jsonl]
      domain: shop
partition: {domains: [sea, shop]}  # in the order of the stack
router:
  top_k: 1
  steps: 9
dense: {baselines: []}
"""
# Stated, a section has no length but the one that is stated with it
WRITTEN = "trunk:\n  steps: 1000\n  domains: [sea, shop]\n"
MORE = ("legal/*.jsonl",)


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A run of two domains below a folder that commands run in."""
    monkeypatch.chdir(tmp_path)
    # Brackets of a folder are of its name, and those of a glob are none of a folder's
    path = tmp_path / "run [1]" / "two.yaml"
    path.parent.mkdir()
    path.write_text(TEXT, "utf-8")
    return path


def after(path: Path, what, domain: str, **wish) -> str:
    """Write what a wish makes of a run, and return the text of its file."""
    change = changed(path, DomainWish(what, domain, **wish))
    write(change.files, keep_former=False)
    assert load(path) == change.after
    return path.read_text("utf-8")


def test_a_domain_comes_and_goes_and_the_file_is_what_it_was_but_for_the_trunks_domains(file):
    there = after(file, "add", "legal", paths=MORE)
    assert (
        there
        == TEXT.replace(
            "      domain: shop\n",
            "      domain: shop\n    - paths: [../legal/*.jsonl]\n      domain: legal\n",
        ).replace("[sea, shop]", "[sea, shop, legal]")
        + WRITTEN
    )
    assert load(file).experts == ("sea", "shop", "legal")
    assert after(file, "remove", "legal") == TEXT + WRITTEN
    # Now that the trunk's are written out, nothing is left of one that comes and goes
    again = file.read_text("utf-8")
    after(file, "add", "C++", paths=MORE, options={"format": "csv"})
    assert load(file).experts == ("sea", "shop", "Cplusplus")
    assert load(file).data.files[-1].format == "csv"
    assert after(file, "remove", "Cplusplus") == again


def test_other_text_takes_the_place_of_what_there_was(file, monkeypatch):
    after(file, "add", "legal", paths=MORE)
    before = file.read_text("utf-8")
    told = changed(file, DomainWish("replace", "shop", paths=("x.csv",))).told
    assert "trunk" in told[0] and "made again" in told[0]
    change = changed(file, DomainWish("replace", "legal", paths=("/data/law.csv", "s3://b/c")))
    assert change.told == ()
    write(change.files, keep_former=True)
    assert file.read_text("utf-8") == before.replace(
        "[../legal/*.jsonl]", "[/data/law.csv, s3://b/c]"
    )
    assert (file.parent / "two.yaml.former").read_text("utf-8") == before
    # Named as it is, what lies there may still be other text: nothing to write, all to make
    monkeypatch.chdir(file.parent)
    assert not changed(file, DomainWish("replace", "sea", paths=("sea.jsonl",))).files


def test_the_expert_of_a_domain_that_the_trunk_has_learned_from_goes_alone(file):
    change = changed(file, DomainWish("remove", "sea"))
    assert "general text (partition.overlap) have its text and stay as they are" in change.told[0]
    assert change.after.experts == ("shop",)
    assert change.after.partition == change.before.partition
    assert change.after.data == change.before.data
    write(change.files, keep_former=False)
    with pytest.raises(ConfigError, match="has no expert, and its text is the trunk's"):
        changed(file, DomainWish("remove", "sea"))
    # And comes back without a source: its text is still there
    assert changed(file, DomainWish("add", "sea")).after.experts == ("shop", "sea")


def test_what_an_extended_file_says_is_written_out_and_that_file_stays(file):
    (file.parent / "over").mkdir()
    over = file.parent / "over" / "over.yaml"
    over.write_text("extends: ../two.yaml\nname: over # mine\n", "utf-8")
    there = after(over, "add", "legal", paths=MORE)
    assert file.read_text("utf-8") == TEXT
    assert there.startswith("extends: ../two.yaml\nname: over # mine\n")
    cfg = load(over)
    assert cfg.experts == ("sea", "shop", "legal")
    assert [entry.paths for entry in cfg.data.files[:2]] == [
        entry.paths for entry in load(file).data.files
    ]
    assert cfg.data.files[2].paths == (str(file.parents[1] / MORE[0]),)
    assert "../sea.jsonl" in there


def test_a_source_that_every_machine_has_gets_the_domains_it_did_not_name(file):
    file.write_text("data: {source: installed}\npartition: {domains: [python, manual]}\n", "utf-8")
    assert after(file, "add", "licences") == (
        "data: {source: installed}\npartition: {domains: [python, manual, licences]}\n"
        "trunk:\n  steps: 1000\n  domains: [python, manual]\n"
        "dense:\n  domains: [python, manual]\n"
    )
    file.write_text("name: all\n", "utf-8")
    with pytest.raises(ConfigError, match="nothing names its text"):
        changed(file, DomainWish("add", "legal"))
    assert "python" not in after(file, "remove", "python").partition("expert:")[2]


def test_a_glob_is_written_so_that_other_programs_read_it(file):
    """PyYAML takes the sign in a list for the beginning of a key."""
    assert 'paths: ["' in after(file, "add", "legal", paths=("law/part-?.jsonl",))
    assert load(file).data.files[-1].paths[0].endswith("law/part-?.jsonl")


HUB = HubText("acme/law", "0123abc", "de")


def test_a_data_set_on_the_hub(file):
    file.write_text(
        "data:\n  source: hub\n  hub: [{dataset: a/b, revision: v1, domain: sea}]\n"
        "partition: {domains: [sea]}\nrouter: {top_k: 1, steps: 9}\n",
        "utf-8",
    )
    after(file, "add", "legal", hub=HUB, options={"split": "test"})
    entry = load(file).data.hub[1]
    assert (entry.dataset, entry.revision, entry.subset, entry.split, entry.domain) == (
        *("acme/law", "0123abc", "de"),
        *("test", "legal"),
    )


REFUSED = {
    "unknown": (TEXT, DomainWish("remove", "law"), "no such domain law; the run has sea, shop"),
    "unknown to replace": (TEXT, DomainWish("replace", "law", MORE), "no such domain law"),
    "there already": (TEXT, DomainWish("add", "sea", MORE), "sea has an expert already"),
    "no text": (TEXT, DomainWish("add", "law"), "law: nothing names its text"),
    "nothing to replace it": (TEXT, DomainWish("replace", "sea"), "nothing names what replaces it"),
    "all that dense baselines have": (
        TEXT.replace("[]", "[], domains: [shop]") + WRITTEN.replace("sea, shop", "sea"),
        DomainWish("remove", "shop"),
        "dense.domains names shop alone",
    ),
    "all that joint models have": (
        TEXT
        + "joint: {models: [dense], steps: 9, domains: [shop]}\n"
        + WRITTEN.replace("sea, shop", "sea"),
        DomainWish("remove", "shop"),
        "joint.domains names shop alone",
    ),
    "settings of no entry": (
        TEXT,
        DomainWish("add", "law", expert="packed", options={"format": "csv"}),
        "format: of an entry of data, and no text is named for one",
    ),
    "another source": (TEXT, DomainWish("add", "law", hub=HUB), "data.source is files, and a run"),
    "no name": (TEXT, DomainWish("add", "law", MORE, options={"formt": "csv"}), "no such setting"),
    "last": (
        TEXT + "expert: {domains: [sea], steps: 9}\n",
        DomainWish("remove", "sea"),
        "sea is the last domain with an expert",
    ),
    "no labels": (
        TEXT.replace("{domains: [sea, shop]}", "{by: clusters}"),
        DomainWish("remove", "cluster-0"),
        "partition.by is clusters, so domains have no names",
    ),
    "by a column": (
        TEXT.replace("{paths: [sea.jsonl], domain: sea}", "{paths: [all.jsonl]}"),
        DomainWish("replace", "sea", MORE),
        "sea has no entry of its own in data.files",
    ),
    "too few are left": (
        TEXT.replace("top_k: 1", "top_k: 2") + WRITTEN.replace("sea, shop", "shop"),
        DomainWish("remove", "sea"),
        "router.top_k: 2 experts per token, but the stack has 1",
    ),
    "given twice": (TEXT + "name: three\n", DomainWish("add", "law", MORE), "name is given twice"),
    "no run": ("nonsense: 1\n", DomainWish("add", "law", MORE), "does not describe a run"),
}


@pytest.mark.parametrize(("text", "wish", "why"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_refused_and_the_file_is_what_it_was(file, text, wish, why):
    file.write_text(text, "utf-8")
    with pytest.raises(ConfigError, match=why) as refused:
        changed(file, wish)
    assert file.read_text("utf-8") == text
    # One problem, where the file is YAML
    assert "problems" not in str(refused.value)


def test_an_override_is_of_no_file(file, capsys):
    words = ["add", "law", "--config", str(file), "--paths", "x", "--override", "data.seed=3"]
    assert main(words) == 2
    assert "write data.seed into it first" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_made(file, monkeypatch):
    wish = DomainWish("add", "law", MORE)
    # Whoever runs tests may be allowed everything
    monkeypatch.setattr(os, "access", lambda place, _mode: Path(place) != file)
    with pytest.raises(ConfigError, match=r"two\.yaml cannot be written"):
        changed(file, wish)
    monkeypatch.undo()
    monkeypatch.chdir(file.parents[1])
    change = changed(file, wish)
    file.write_text(TEXT + "# by somebody else\n", "utf-8")
    with pytest.raises(ConfigError, match="was changed meanwhile, and stays as it is"):
        write(change.files, keep_former=False)
    assert file.read_text("utf-8") == TEXT + "# by somebody else\n"
    # Nor is another file of the same change
    other = file.with_name("other.yaml")
    other.write_text("a: 1\n", "utf-8")
    files = (FileChange(other, "a: 1\n", "a: 2\n"), *change.files)
    with pytest.raises(ConfigError, match="was changed meanwhile"):
        write(files, keep_former=False)
    assert other.read_text("utf-8") == "a: 1\n"


def test_of_two_commands_that_have_read_the_same_one_writes(file, monkeypatch):
    """The second comes between the first one's look at the file and its change of it."""
    monkeypatch.chdir(file.parents[1])
    first, second = (changed(file, DomainWish("add", name, MORE)) for name in ("law", "maths"))
    read_bytes = Path.read_bytes
    refused = []

    def write_second():
        try:
            write(second.files, keep_former=False)
        except ConfigError as error:
            refused.append(str(error))

    beside = threading.Thread(target=write_second)

    def looked_at(path):
        found = read_bytes(path)
        if beside.ident is None:
            beside.start()
            # Long enough to write, were it let
            beside.join(timeout=0.5)
        return found

    monkeypatch.setattr(Path, "read_bytes", looked_at)
    write(first.files, keep_former=False)
    beside.join()
    assert len(refused) == 1 and "was changed meanwhile" in refused[0]
    assert "law" in file.read_text("utf-8") and "maths" not in file.read_text("utf-8")


def test_a_link_stays_one_and_rights_stay_what_they_were(file):
    real = file.with_name("real.yaml")
    file.rename(real)
    real.chmod(0o640)
    file.symlink_to(real.name)
    after(file, "add", "law", paths=MORE)
    assert file.is_symlink() and "law" in real.read_text("utf-8")
    assert real.stat().st_mode & 0o777 == 0o640
    assert sorted(each.name for each in file.parent.iterdir()) == ["real.yaml", "two.yaml"]


def test_ends_of_lines_stay_as_they_are(file):
    file.write_bytes(TEXT.replace("\n", "\r\n").encode())
    after(file, "add", "law", paths=MORE)
    assert b"\n" not in file.read_bytes().replace(b"\r\n", b"")


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """The shipped run of pictures, whose experts and routing set are in files of their own."""
    shutil.copytree(ROOT / "config", tmp_path / "config")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "config/tiny_vlm.yaml"


def _texts(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_task_comes_and_goes_in_the_files_that_a_run_names(pictures):
    before = _texts(pictures.parent)
    rows = Path("rows")
    rows.mkdir()
    for split in ("train", "test"):
        (rows / f"{split}.jsonl").write_text("{}\n", "utf-8")
    after(
        pictures,
        "add",
        "plates",
        paths=("rows",),
        options={"task": "ocr", "metric": "cer", "overrides": {"steps": 9}},
    )
    entry = load(pictures).loras.entry("plates")
    assert (entry.label, entry.task, entry.metric, entry.overrides.steps) == ("E", "ocr", "cer", 9)
    data = entry.dataset
    assert (data.path, data.train, data.valid, data.test) == (
        *(str(rows.resolve()), "train.jsonl"),
        *(None, "test.jsonl"),
    )
    there = _texts(pictures.parent)
    moved = {name for name in there if there[name] != before[name]}
    assert moved == {"tiny_loras.json", "tiny_dataset.yaml"}
    assert json.loads(there["tiny_loras.json"])["experts"][-1]["dataset"]["path"] == "../rows"
    after(pictures, "remove", "plates")
    assert _texts(pictures.parent) == before


def test_a_task_more_is_its_rows_its_adapter_and_what_joins_them(pictures):
    change = changed(pictures, DomainWish("add", "plates", MORE))
    before, after_ = (set(Addresses(cfg).reachable()) for cfg in (change.before, change.after))
    new = sorted(address.rpartition("-")[0] for address in after_ - before)
    assert new == [
        *("deploy", "evaluate", "preprocess-plates", "routing"),
        *("train_experts-plates", "train_router"),
    ]
    # All the others' are there, with equal addresses
    stay = {address for address in before if address.startswith(("train_experts", "preprocess"))}
    assert stay <= after_


def test_a_task_that_goes_takes_its_requests_and_its_wording(pictures):
    assert "color" in (pictures.parent / "paraphrases.yaml").read_text("utf-8")
    after(pictures, "remove", "color")
    cfg = load(pictures)
    assert cfg.experts == ("ocr", "count", "detect")
    assert "color" not in (pictures.parent / "paraphrases.yaml").read_text("utf-8")
    # The others' labels are what the router has learned to say
    assert cfg.loras.labels["detect"] == "D"
    assert changed(pictures, DomainWish("add", "plates", MORE)).after.loras.labels["plates"] == "A"


def test_a_finished_adapter_comes_with_rows_and_goes_where_others_are_to_be_learned(pictures):
    before = _texts(pictures.parent)
    after(pictures, "add", "plates", paths=("rows.jsonl",), expert="kits/plates")
    there = json.loads(_texts(pictures.parent)["tiny_loras.json"])["experts"][-1]
    assert there["imported"] == "../kits/plates"
    assert load(pictures).imported == {"plates": str(Path("kits/plates").resolve())}
    # Another adapter leaves the rows, other rows take its place
    after(pictures, "replace", "plates", expert="s3://b/plates")
    cfg = load(pictures)
    assert cfg.imported == {"plates": "s3://b/plates"}
    assert cfg.loras.entry("plates").dataset.path == str(Path("rows.jsonl").resolve())
    told = changed(pictures, DomainWish("replace", "plates", paths=("more.jsonl",))).told
    assert told == ("plates was imported, and is trained here on these rows now",)
    after(pictures, "replace", "plates", paths=("more.jsonl",))
    assert load(pictures).imported == {}
    after(pictures, "remove", "plates")
    assert _texts(pictures.parent) == before


def test_other_rows_for_a_task(pictures):
    synthetic = {"dataset": {"source": "synthetic", "synthetic": {"kind": "shape"}}}
    change = changed(pictures, DomainWish("replace", "ocr", options=synthetic))
    before, now = (each.loras.entry("ocr") for each in (change.before, change.after))
    assert now.dataset.synthetic.kind == "shape"
    assert now.model_copy(update={"dataset": before.dataset}) == before


def test_a_setting_of_a_task_that_is_another_leaves_the_others_and_its_rows(pictures):
    # Named in the file from its own folder on, which commands need not run in
    rows = Path("rows.jsonl")
    rows.write_text("{}\n", "utf-8")
    after(pictures, "add", "plates", paths=("rows.jsonl",), options={"overrides": {"steps": 9}})
    after(pictures, "replace", "plates", options={"overrides": {"lr": 0.5}, "task": "plates"})
    entry = load(pictures).loras.entry("plates")
    assert entry.dataset.path == str(rows.resolve())
    assert (entry.task, entry.overrides.steps, entry.overrides.lr) == ("plates", 9, 0.5)


def test_experts_of_an_extended_file_are_written_out(pictures):
    over = pictures.with_name("over.yaml")
    over.write_text("extends: tiny_vlm.yaml\nname: over\n", "utf-8")
    others = _texts(pictures.parent)
    after(over, "add", "plates", paths=MORE)
    assert load(over).experts == (*load(pictures).experts, "plates")
    with pytest.raises(
        ConfigError, match=r"paraphrases\.ocr is said in the file that this one ext"
    ):
        changed(over, DomainWish("remove", "ocr"))
    del others["over.yaml"]
    assert others.items() <= _texts(pictures.parent).items()
    over.write_text("extends: tiny_vlm.yaml\nloras: {experts: {ocr: {task: x}}}\n", "utf-8")
    with pytest.raises(ConfigError, match=r"loras\.experts lays values on a list"):
        changed(over, DomainWish("remove", "ocr"))


REFUSED_TASKS = {
    "unknown": (DomainWish("remove", "law"), "no such expert law"),
    "there already": (DomainWish("add", "ocr", MORE), "ocr has an expert already"),
    "no rows": (DomainWish("add", "law"), "law: nothing names its rows"),
    "two paths": (DomainWish("add", "law", ("a", "b")), "2 paths, and a task's rows are in one"),
    "no name": (DomainWish("add", "No Name", MORE), "must be a name of lower-case letters"),
    "none": (DomainWish("remove", "none"), "no such expert none"),
    "finished": (DomainWish("add", "law", expert="x"), "expert comes with rows"),
}


@pytest.mark.parametrize(("wish", "why"), REFUSED_TASKS.values(), ids=REFUSED_TASKS)
def test_tasks_that_cannot_be_are_refused(pictures, wish, why):
    before = _texts(pictures.parent)
    with pytest.raises(ConfigError, match=why):
        changed(pictures, wish)
    assert _texts(pictures.parent) == before


def test_shares_of_requests_are_for_a_person_to_divide(pictures):
    path = pictures.with_name("tiny_dataset.yaml")
    shares = "{color: .2, ocr: .2, count: .2, detect: .2, none: .2}"
    path.write_text(path.read_text("utf-8") + f"balance: {shares}\n", "utf-8")
    for wish in (DomainWish("add", "law", MORE), DomainWish("remove", "ocr")):
        with pytest.raises(ConfigError, match=r"dataset\.balance gives each expert a share"):
            changed(pictures, wish)


def test_of_several_files_none_is_changed_where_one_cannot_be(pictures, monkeypatch):
    """The task was in one and not in the other then, and neither `add` nor `remove` took that."""
    before = _texts(pictures.parent)
    change = changed(pictures, DomainWish("add", "plates", MORE))
    assert len(change.files) == 2
    full = change.files[1].path.name
    replaced = Path.replace

    def replace(self, target):
        if Path(target).name == full:
            raise OSError(28, "No space left on device")
        return replaced(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(ConfigError, match=f"{full} cannot be written: No space left"):
        write(change.files, keep_former=False)
    assert _texts(pictures.parent) == before


def test_the_last_task_stays(pictures):
    path = pictures.with_name("tiny_loras.json")
    path.write_text(path.read_text("utf-8").replace('"top_k": 2', '"top_k": 1'), "utf-8")
    for name in ("ocr", "count", "detect"):
        after(pictures, "remove", name)
    with pytest.raises(ConfigError, match="color is the last expert"):
        changed(pictures, DomainWish("remove", "color"))


def test_a_finished_expert_needs_no_text_here(file):
    text = TEXT.replace("steps: 9", "steps: 0")
    file.write_text(text, "utf-8")
    own = "expert:\n  steps: 200\n  imported:\n    legal: ../kits/legal\n"
    assert after(file, "add", "legal", expert="kits/legal") == text + own
    cfg = load(file)
    assert cfg.experts == ("sea", "shop", "legal") and cfg.trunk.domains is None
    assert "/b/legal" in after(file, "replace", "legal", expert="/b/legal")
    assert after(file, "remove", "legal") == text + "expert:\n  steps: 200\n"
    # With text it is measured too, which is where the trunk's domains have to be said
    after(file, "add", "legal", expert="kits/legal", paths=MORE)
    cfg = load(file)
    assert cfg.partition.domains == ("sea", "shop", "legal")
    assert cfg.trunk.domains == ("sea", "shop")
    # An expert of one's own goes for one from elsewhere, and comes back with text
    after(file, "replace", "sea", expert="s3://b/sea")
    assert load(file).expert.imported["sea"] == "s3://b/sea"
    after(file, "replace", "legal", paths=MORE)
    assert set(load(file).expert.imported) == {"sea"}
    # The text that stood for statistics it did not bring goes with it, and a person is told
    file.write_text(text + "expert: {steps: 1, imported: {sea: a}, imported_text: {sea: [b]}}\n")
    change = changed(file, DomainWish("replace", "sea", MORE))
    assert change.told[0].startswith("sea was imported from a package, and is trained here")
    assert not change.after.expert.imported_text
