"""A look at what a run reads outside its store: what is remembered of it, what people are told, and
that no job makes anything of what has changed since."""

import gzip
import json
import os
import shutil
import signal
from contextlib import suppress
from pathlib import Path

import fsspec
import pytest
from conftest import make_text, tiny_config
from small_sources import added, deleted, edited, hidden, picture_run, renamed, text_run
from small_tasks import picture, write_rows

from pipeline.__main__ import main
from pipeline.data.sources import task_seen
from pipeline.errors import ConfigError, DataError, PipelineError
from pipeline.families.load import load, parse
from pipeline.protocols import Looked, Seen, quiet
from pipeline.run import former, identity, job, stages
from pipeline.run.changes import changes
from pipeline.run.identity import begin, changed
from pipeline.run.job import run_job
from pipeline.store import looking, sources
from pipeline.store.artifacts import Store
from pipeline.store.reading import sealed


@pytest.fixture
def made(tmp_path):
    """(configuration, store) of a run of texts whose preprocess is made."""
    path = text_run(tmp_path / "run")
    store = Store(tmp_path / "store").open()
    cfg, _ = begin(load(path), store, makes=True)
    make_text(cfg, store)
    return path, store


def planned(path, store, capsys, *flags):
    """Return the exit code of `plan`, and all that it says, on one line."""
    code = main(["plan", "--config", str(path), "--store", str(store.root), *flags])
    said = capsys.readouterr()
    return code, " ".join((said.out + said.err).split())


TOLD = {
    edited: "1.jsonl changed",
    deleted: "1.jsonl is gone",
    added: "9.jsonl was added",
    renamed: "1.jsonl is now z-1.jsonl",
}


@pytest.mark.parametrize("change", TOLD)
def test_plan_says_which_file_it_was_and_frozen_goes_on(made, change, capsys):
    path, store = made
    address = stages.address(load(path), "preprocess", "sea")
    change(path.parent / "sea/1.jsonl")
    code, said = planned(path, store, capsys)
    assert code == 0 and address not in said
    assert f"data.files: {TOLD[change]} since it was read last, so tokenizer is made again" in said
    code, said = planned(path, store, capsys, "--frozen")
    assert code == 0 and address in said and "since it was read last" not in said
    assert "frozen: what preprocess hall, preprocess sea, preprocess shop, tokenizer read" in said


def test_files_of_another_run_of_the_same_settings_are_no_change_of_this_ones(made, tmp_path):
    path, store = made
    other = text_run(tmp_path / "other")
    added(other.parent / "sea/1.jsonl")
    cfg, _ = begin(load(other), store, makes=True)
    make_text(cfg, store)
    for file in (path, other):
        cfg, _ = begin(load(file), store)
        assert changed(cfg, store, stages.Addresses(cfg).of) == []
    edited(path.parent / "sea/1.jsonl")
    cfg, _ = begin(load(path), store)
    assert "since it was read last" in "".join(changed(cfg, store, stages.Addresses(cfg).of))


def test_frozen_goes_on_with_what_this_run_has_read_and_no_other(made, tmp_path):
    path, store = made
    first, _ = begin(load(path), store)
    file = text_run(tmp_path / "other")
    added(file.parent / "sea/1.jsonl")
    other, _ = begin(load(file, ("name=other",)), store, makes=True)
    make_text(other, store)
    sea = "preprocess/sea"
    assert first.identity[sea] != other.identity[sea]
    added(path.parent / "sea/1.jsonl")
    edited(file.parent / "sea/1.jsonl")
    assert begin(load(path), store, frozen=True)[0].identity == first.identity
    assert begin(load(file, ("name=other",)), store, frozen=True)[0].identity == other.identity
    # one that has read nothing yet goes by nobody's
    third, notes = begin(load(file, ("name=third",)), store, frozen=True)
    assert third.identity[sea] not in (first.identity[sea], other.identity[sea])
    assert "not made yet under these settings, so looked at now" in " ".join(notes)
    # of a store of an earlier version nobody knows whose it is
    for record in store.root.glob("sources/made/*.json"):
        known = json.loads(record.read_text())
        del known["runs"]
        record.write_text(json.dumps(known))
    assert begin(load(path), store, frozen=True)[0].identity == other.identity


def test_a_plan_leaves_no_trace_of_what_it_saw(made, capsys):
    path, store = made
    edited(path.parent / "sea/1.jsonl")
    # a second time too, as the first one has made nothing
    for _ in range(2):
        assert "sea" in str(planned(path, store, capsys)) and "1.jsonl changed" in str(
            planned(path, store, capsys)
        )


def test_frozen_makes_nothing_of_files_that_are_others_now(made, tmp_path):
    """Its address would say that it was made of what was read before."""
    path, store = made
    cfg, _ = begin(load(path), store, frozen=True)
    shutil.rmtree(store.folder(stages.address(cfg, "preprocess", "sea")))
    edited(path.parent / "sea/1.jsonl")
    again, notes = begin(load(path), store, frozen=True, makes=True)
    assert again.identity == cfg.identity and len(notes) == 1
    with pytest.raises(DataError, match=r"data.files: 1.jsonl changed since it was looked at"):
        run_job("preprocess", again, store, "sea", progress=quiet)
    assert not list(store.root.glob("artifacts/preprocess-sea*"))
    other, notes = begin(load(path, ("data.valid_share=0.2",)), store, frozen=True)
    assert other.identity != cfg.identity
    assert "not made yet under these settings, so looked at now: what preprocess hall" in notes[0]


@pytest.mark.parametrize("when", ["before", "while it is read"])
@pytest.mark.parametrize("change", TOLD)
def test_a_job_refuses_what_is_no_longer_what_was_looked_at(change, when, tmp_path, monkeypatch):
    path = text_run(tmp_path / "run")
    store = Store(tmp_path / "store").open()
    cfg, _ = begin(load(path), store, makes=True)
    file = path.parent / "sea/1.jsonl"
    if when == "before":
        change(file)
    else:
        real = job._work

        def work(context):
            done = real(context)
            change(file)
            return done

        monkeypatch.setattr(job, "_work", work)
    with pytest.raises(DataError, match=f"data.files: {TOLD[change]} since it was looked at"):
        run_job("tokenizer", cfg, store, progress=quiet)
    assert not list(store.root.glob("artifacts/*"))
    monkeypatch.undo()
    # the same command looks anew, and makes what is there now
    made = run_job("tokenizer", begin(load(path), store)[0], store, progress=quiet)
    assert made.address == stages.address(load(path), "tokenizer")


def test_a_file_that_is_torn_while_it_is_read_is_told_as_changed(tmp_path, monkeypatch):
    path = tiny_config(tmp_path / "run")
    sea = tmp_path / "run/sea.jsonl"
    packed = sea.with_name("sea.jsonl.gz")
    packed.write_bytes(gzip.compress(sea.read_bytes()))
    path.write_text(path.read_text().replace("sea.jsonl", "sea.jsonl.gz"))
    store = Store(tmp_path / "store").open()
    cfg, _ = begin(load(path), store, makes=True)
    real = job._work

    def torn(context):
        packed.write_bytes(packed.read_bytes()[:200])
        return real(context)

    monkeypatch.setattr(job, "_work", torn)
    with pytest.raises(DataError, match=r"sea.jsonl.gz changed since it was looked at"):
        run_job("tokenizer", cfg, store, progress=quiet)


def test_no_pipe_is_waited_for(tmp_path):
    texts, pictures = text_run(tmp_path / "text"), picture_run(tmp_path / "pictures")
    for place in ("text/sea/pipe.jsonl", "pictures/two/train/class1/pipe.txt"):
        os.mkfifo(tmp_path / place)
    picture(1).save(tmp_path / "pictures/two/train/class1/pipe.png")
    for place in ("one/images/3.png", "own/images/3.png"):
        hidden(tmp_path / "pictures" / place)

    def waited(_signal, _frame):
        raise AssertionError("it waits for somebody to write")

    store = Store(tmp_path / "store").open()
    before = signal.signal(signal.SIGALRM, waited)
    signal.alarm(60)
    try:
        cfg, _ = begin(load(texts), store)
        with pytest.raises(DataError, match=r"pipe.jsonl is a pipe or a device"):
            run_job("tokenizer", cfg, store, progress=quiet)
        cfg, _ = begin(load(pictures), store)
        for task in cfg.tasks:
            with suppress(DataError):
                run_job("preprocess", cfg, store, task, progress=quiet)
        hidden(tmp_path / "pictures/own/rows.jsonl")
        with pytest.raises(PipelineError):
            run_job("routing", begin(load(pictures), store)[0], store, progress=quiet)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_sums_outlive_a_process_and_a_list_that_is_damaged_costs_time_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "a"
    file.write_text("one")
    monkeypatch.setattr(looking, "SETTLED_NS", -(10**18))
    read = []
    real = looking.FileSums._hash
    monkeypatch.setattr(
        looking.FileSums, "_hash", lambda self, name: read.append(name) or real(self, name)
    )

    def look(root):
        monkeypatch.setattr(looking, "_known", {})
        sums = looking.FileSums(root)
        found = sums.of(file)
        sums.save()
        return found

    store = Store(tmp_path / "store").open().root
    assert look(store) == look(store) and len(read) == 1
    kept = store / "sources/sums.txt"
    kept.write_bytes(kept.read_bytes().replace(b"0", b"1", 1))
    first = look(store)
    assert len(read) == 2 and first == look(store)
    # no store, or one that may not be written: the user's own list
    for root in (tmp_path / "none", tmp_path / "readonly"):
        assert look(root) == first
    assert look(tmp_path / "none") == first and len(read) == 3
    assert not (tmp_path / "none").exists()
    file.write_text("two")
    assert look(store) != first
    assert len(read) == 4
    # within a tick of the clock a file may change and keep its times: it is read again
    monkeypatch.setattr(looking, "SETTLED_NS", 10**18)
    file.write_text("six")
    assert look(store) == look(store) and len(read) == 6


def test_a_file_that_holds_nothing_any_more_is_not_gone_and_is_named(made, capsys):
    path, store = made
    for name in ("shop", "hall"):
        (path.parent / f"{name}.jsonl").write_text("")
    _, said = planned(path, store, capsys)
    assert "shop.jsonl changed since it was read last, so preprocess shop is made again" in said
    assert "hall.jsonl changed since it was read last, so preprocess hall is made again" in said
    assert "is gone" not in said
    typed = ("--config", str(path), "--store", str(store.root))
    assert main(["tokenizer", *typed]) == 0 and main(["preprocess", *typed]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "preprocess hall: no usable document in data.files, 1 seen: 1 empty" in said


def test_frozen_says_so_where_what_was_made_is_gone_too(made):
    path, store = made
    edited(path.parent / "sea/1.jsonl")
    cfg, _ = begin(load(path), store, frozen=True, makes=True)
    shutil.rmtree(store.folder(stages.address(cfg, "preprocess", "sea")))
    with pytest.raises(DataError, match=r"1.jsonl changed .* do it again, without --frozen, as"):
        run_job("preprocess", cfg, store, "sea", progress=quiet)


@pytest.mark.parametrize("name", ["a\u2028b", "a\nb", "a\rb", "a\udcffb", "a b"])
def test_sums_are_kept_of_files_of_any_name(tmp_path, monkeypatch, name):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(looking, "SETTLED_NS", -(10**18))
    store = Store(tmp_path / "store").open().root
    file = tmp_path / name
    file.write_text("one")
    sums = looking.FileSums(store)
    found = sums.of(file)
    sums.save()
    monkeypatch.setattr(looking, "_known", {})
    monkeypatch.setattr(looking.FileSums, "_hash", _lost)
    assert looking.FileSums(store).of(file) == found


def test_links_are_followed_to_files_and_folders_but_not_to_where_they_are_in(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/a.png").write_text("a")
    (folder / "link.png").symlink_to(tmp_path / "elsewhere/a.png")
    (folder / "lost.png").symlink_to(tmp_path / "nothing")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "all").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/round").symlink_to(folder)
    (tmp_path / "elsewhere/here").symlink_to(".")
    eye = looking.Looking(looking.FileSums())
    found = {each.name: each.sum for each in eye.below("x", folder)}
    assert found.keys() == {"link.png", "lost.png", "loop.png", "all/a.png"}
    assert found["link.png"] == eye.file("x", tmp_path / "elsewhere/a.png", "a").sum
    assert found["lost.png"] == looking.GONE and found["loop.png"] == looking.UNREADABLE


def test_what_a_command_looked_at_is_not_a_setting(tmp_path):
    path = tiny_config(tmp_path / "run")
    for override in ("identity.a=b", "identity=null"):
        with pytest.raises(ConfigError, match="identity is no setting"):
            load(path, (override,))
    with pytest.raises(ConfigError) as raised:
        load(path, ("identitty=1",))
    assert "did you mean identity" not in str(raised.value)
    cfg = stages.Addresses(load(path)).cfg
    assert parse(json.loads(cfg.model_dump_json())) == cfg


def test_pictures_that_rows_name_are_remembered_by_what_the_rows_are(tmp_path, monkeypatch):
    path = picture_run(tmp_path / "run")
    store = Store(tmp_path / "store").open()
    read = []
    real = task_seen._read
    monkeypatch.setattr(
        task_seen, "_read", lambda name, *more: read.append(name) or real(name, *more)
    )
    for _ in range(2):
        monkeypatch.setattr(task_seen, "_named", {})
        first = begin(load(path), store)[0].identity
    # the rows of two sources are alike
    assert read == ["one", "none"]
    kept = next((store.root / "sources").glob("pictures-*.json"))
    kept.write_text(kept.read_text().replace("images", "imagos"))
    monkeypatch.setattr(task_seen, "_named", {})
    assert begin(load(path), store)[0].identity == first and len(read) == 3


def test_a_picture_that_a_row_names_by_its_whole_path_is_looked_at(tmp_path):
    path = picture_run(tmp_path / "run")
    # The folder has two names, and the row has the other one
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "run/one")
    rows = tmp_path / "run/one/rows.jsonl"
    first, *more = map(json.loads, rows.read_text().splitlines())
    shown = tmp_path / "run/one" / first["image"]
    first["image"] = str(link / first["image"])
    write_rows(rows, [first, *more])
    before = stages.address(load(path), "preprocess", "one")
    edited(shown)
    assert stages.address(load(path), "preprocess", "one") != before


def test_a_record_that_is_lost_or_torn_tells_nothing(made):
    path, store = made
    cfg, _ = begin(load(path), store)
    name = identity.recipe(cfg, "preprocess", "sea")
    assert sources.print_of(store, "made", name, cfg.name) == cfg.identity["preprocess/sea"]
    seen = sources.looked_at(store, cfg.identity["preprocess/sea"])
    assert {Path(each.name).name for each in seen.seen} == {"0.jsonl", "1.jsonl", "2.jsonl"}
    (store.root / f"sources/made/{name}.json").write_text("{")
    assert sources.print_of(store, "made", name, cfg.name) == ""
    assert ("preprocess", "sea") not in identity.recorded(cfg, store, "made")


def test_a_checkpoint_on_other_data_is_no_former_value(made, monkeypatch):
    """Whoever has edited a file is told which; that a rate was another beside it helps nobody."""
    path, store = made
    job, now = ("train_experts", "sea"), ("expert.lr=0.25",)
    there = stages.Addresses(load(path))
    former.note_settings(store, there.of(*job), there.cfg)
    slot = store.resume(there.of(*job)) / "a"
    slot.mkdir()
    (slot / "state.json").write_text(sealed({"run": {"step": 40}}))
    told = former.former_checkpoint(stages.Addresses(load(path, now)), *job, store)
    assert "at step 40 exists under expert.lr 0.003 (here 0.25)" in told
    file = path.parent / "sea/1.jsonl"
    before = file.read_bytes()
    edited(file)
    for overrides in ((), now):
        here = stages.Addresses(load(path, overrides))
        assert former.former_checkpoint(here, *job, store) == ""
    file.write_bytes(before)
    here = stages.Addresses(load(path, now))
    assert former.former_checkpoint(here, *job, store) == told
    # A version that did not look has noted none: nothing is read to find out
    note = slot.parent / former.NOTE
    note.write_text(sealed(former.kept_settings(there.cfg)))
    monkeypatch.setattr(identity, "look_at", _lost)
    assert former.former_checkpoint(here, *job, store) == ""


def test_files_that_are_the_same_are_not_said_to_have_changed():
    one, two = (Seen("data.files", name, name * 64, 9) for name in "ab")
    before = Looked("before", (one, two))
    assert changes(before, Looked("after", (two, one))).endswith(
        "the order in which files are read has changed"
    )
    # What an earlier domain holds out of shared documents, say
    assert changes(before, Looked("after", (one, two))).endswith(
        "which documents of the same files count has changed"
    )


def test_pictures_that_a_routing_set_only_names_are_held_against_the_look_again(tmp_path):
    path = picture_run(tmp_path / "run")
    store = Store(tmp_path / "store").open()
    cfg, _ = begin(load(path), store, makes=True)
    for stage, item in (("train_router", None), ("evaluate", None), ("train_experts", "one")):
        identity.check_unchanged(cfg, store, stage, item)
    edited(tmp_path / "run/own/images/3.png")
    for stage in ("routing", "train_router", "evaluate"):
        with pytest.raises(DataError, match=r"images/3.png changed since it was looked at"):
            identity.check_unchanged(cfg, store, stage, None)
    identity.check_unchanged(cfg, store, "train_experts", "one")


def test_a_url_is_known_by_what_its_server_says(tmp_path, monkeypatch):
    memory = fsspec.filesystem("memory")
    path = text_run(tmp_path / "run")
    for i in range(3):
        file = tmp_path / f"run/sea/{i}.jsonl"
        memory.pipe(f"/looking/sea/{i}.jsonl", file.read_bytes())
    path.write_text(path.read_text().replace("sea/*.jsonl", "memory://looking/sea/*.jsonl"))
    store = Store(tmp_path / "store").open()
    first, notes = begin(load(path), store, makes=True)
    assert notes == [] and begin(load(path), store)[0].identity == first.identity
    with monkeypatch.context() as patch:
        patch.setattr(type(memory), "glob", _lost)
        # never read: without its server nobody knows what it is
        assert begin(load(path), store)[0].identity != first.identity
    make_text(first, store)
    for lost in ("glob", "info"):
        with monkeypatch.context() as patch:
            patch.setattr(type(memory), lost, _lost)
            again, notes = begin(load(path), store, makes=True)
        assert again.identity == first.identity
        # a laptop, which goes by the last look, does so too
        looked = identity.recorded(again, store, "looked")
        assert looked.items() <= identity.recorded(again, store, "made").items()
        (note,) = notes
        assert note.startswith("a server cannot be asked for what preprocess ")
        assert note.endswith("tokenizer read, so what was read before is gone on with")
    memory.pipe("/looking/sea/1.jsonl", b'{"text": "another tide"}\n' * 40)
    assert begin(load(path), store)[0].identity != first.identity
    memory.rm("/looking", recursive=True)
    assert begin(load(path), store)[0].identity != first.identity


def _lost(*_args, **_kwargs):
    raise OSError("the line is down")


def test_a_command_says_what_has_changed_and_frozen_does_nothing_again(made, capsys):
    path, store = made
    typed = ["preprocess", "--config", str(path), "--store", str(store.root), "--frozen"]
    edited(path.parent / "sea/1.jsonl")
    assert main(typed) == 0
    assert len(list(store.root.glob("artifacts/*"))) == 4
    assert "frozen: what preprocess hall, preprocess sea," in capsys.readouterr().err
    gone = ["deploy", "--config", str(path), "--store", str(store.root)]
    shutil.rmtree(path.parent / "sea")
    assert main(gone) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "data.files: 0.jsonl is gone, 1.jsonl is gone, 2.jsonl is gone" in said
    assert "since it was read last; --frozen goes on with what was read then" in said
