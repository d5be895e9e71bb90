"""Jobs on a volume that hides what is not committed or reloaded, and what each deliberate mistake
leads to."""

import json
import mmap
from pathlib import Path

import pytest
from conftest import make_text
from fakes import StubbedVolume, contents

from pipeline import cloud
from pipeline.cloud import containers
from pipeline.errors import DamagedArtifact, Interrupted, MissingArtifact, OldStore, StoreError
from pipeline.families.load import load, parse
from pipeline.run import stages
from pipeline.run.advice import sentence
from pipeline.store import artifacts
from pipeline.store.artifacts import Store

EDGE = cloud.ModalEdge(Path("/store"))
TEXT = ("tokenizer", "preprocess")


def nothing():
    """Stand for a commit or a reload that somebody forgot."""


@pytest.fixture
def volume(tmp_path):
    """A volume of this test's own."""
    return StubbedVolume(tmp_path)


def work(view, cfg, stage, items=(None,), publish=None, refresh=None):
    """Do jobs in a container of their own."""
    raw = cfg.model_dump(mode="json")
    return cloud.work(
        stage, raw, list(items), view.path, publish or view.commit, refresh or view.reload
    )


def test_uncommitted_writes_are_seen_by_nobody(volume):
    here, there = volume.view(), volume.view()
    (here.path / "a").write_text("1")
    there.reload()
    assert not (there.path / "a").exists()
    here.commit()
    assert not (there.path / "a").exists()
    there.reload()
    assert (there.path / "a").read_text() == "1"
    assert (here.commits, there.reloads) == (1, 2)


def test_a_removal_is_committed_too_and_the_last_writer_wins(volume):
    one, other = volume.view(), volume.view()
    (one.path / "a").write_text("one")
    (one.path / "b").write_text("one")
    one.commit()
    (other.path / "a").write_text("other")
    other.commit()
    one.reload()
    assert (one.path / "a").read_text() == "other"
    (one.path / "b").unlink()
    one.commit()
    assert not (volume.path / "b").exists()


def test_a_reload_is_refused_while_a_file_is_open_or_mapped(volume):
    view = volume.view()
    (view.path / "a").write_text("1")
    with (
        (view.path / "a").open("rb") as file,
        pytest.raises(RuntimeError, match=r"open files.*: a"),
    ):
        view.reload()
    with (view.path / "a").open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    with pytest.raises(RuntimeError, match="open files"):
        view.reload()
    mapped.close()
    view.reload()


@pytest.fixture(scope="module")
def early(tmp_path_factory):
    """(volume, view) with nothing on it: a container that was started before anything was
    committed."""
    volume = StubbedVolume(tmp_path_factory.mktemp("prepared"))
    return volume, volume.view()


@pytest.fixture(scope="module")
def prepared(early, finished):
    """(volume, configuration) after preprocess was done by one container; later ones only add to
    it."""
    volume, _ = early
    cfg = load(finished[0])
    for stage in TEXT:
        outcomes = work(volume.view(), cfg, stage, cfg.items(stage))
        assert {outcome.state for outcome in outcomes} == {"made"}
    return volume, cfg


def test_stages_find_each_others_artifacts_across_containers(prepared, finished):
    volume, cfg = prepared
    trunk, expert = volume.view(), volume.view()
    often = cfg.model_copy(
        update={"runtime": cfg.runtime.model_copy(update={"save_every_s": 1e-9})}
    )
    assert work(trunk, often, "train_shared")[0].state == "made"
    assert trunk.reloads == 1
    assert trunk.commits >= 3  # checkpoints and the artifact
    made = work(expert, cfg, "train_experts", cfg.experts)
    assert [(each.item, each.error) for each in made] == [(name, "") for name in cfg.experts]
    assert expert.reloads == 1
    router = volume.view()
    assert work(router, cfg, "train_router")[0].metrics["steps"] == 16
    done = (*TEXT, "train_shared", "train_experts", "train_router")
    wanted = {
        name: sha for name, sha in contents(finished[1]).items() if name.split("-")[0] in done
    }
    assert contents(volume.path) == wanted and {name.split("-")[0] for name in wanted} == set(done)


def test_a_missing_refresh_shows(early, prepared):
    _, cfg = prepared
    [outcome] = work(early[1], cfg, "train_shared", refresh=nothing)
    assert "is not in" in outcome.error and "modal run modal_app.py::tokenizer" in outcome.error


def test_a_missing_commit_shows(prepared):
    volume, cfg = prepared
    changed = cfg.model_copy(update={"trunk": cfg.trunk.model_copy(update={"steps": 3})})
    first, second = volume.view(), volume.view()
    assert work(first, changed, "train_shared", publish=nothing)[0].state == "made"
    [outcome] = work(second, changed, "train_experts", cfg.experts[:1])
    assert "train_shared" in outcome.error and "is not in" in outcome.error


def test_a_file_left_open_before_the_refresh_shows(prepared):
    volume, cfg = prepared
    view = volume.view()
    with (
        (view.path / "store.json").open("rb"),
        pytest.raises(RuntimeError, match=r"open files.*store\.json"),
    ):
        work(view, cfg, "train_shared")


def seen_halfway(volume, finish):
    """Finish an artifact while the volume is committed at every flush; return what another
    container made of it."""
    view, verdicts = volume.view(), []

    def look():
        view.commit()
        other = Store(volume.view().path)
        if other.has("thing-1"):
            try:
                other.require("thing-1")
                verdicts.append("whole")
            except DamagedArtifact:
                verdicts.append("damaged")

    finish(Store(view.path, publish=look), look)
    look()
    return verdicts


def test_a_manifest_before_its_tensors_shows_and_ours_comes_last(volume, monkeypatch):
    flush = artifacts.flush

    def manifest_of(home):
        folder = home.begin("thing-1")
        (folder / "tensors").write_bytes(b"0" * 1000)
        return artifacts.Manifest("thing-1", "thing", None, {}, artifacts.inventory(folder))

    # files flushed when the manifest was there already: a machine that dies then leaves it alone
    early = []

    def flushed(home, look, path):
        look()
        early.extend([path.name] if home.has("thing-1") else [])
        flush(path)

    def ours(home, look):
        monkeypatch.setattr(artifacts, "flush", lambda path: flushed(home, look, path))
        home.finish(manifest_of(home))
        monkeypatch.setattr(artifacts, "flush", flush)

    def hasty(home, look):
        manifest = manifest_of(home)
        (home.folder("thing-1") / "tensors").unlink()
        artifacts.write_text(home.folder("thing-1") / "manifest.json", manifest.text())
        look()  # Modal commits in the background, whenever it likes
        (home.folder("thing-1") / "tensors").write_bytes(b"0" * 1000)

    assert set(seen_halfway(volume, ours)) == {"whole"}
    assert "tensors" not in early
    assert seen_halfway(volume, hasty) == ["damaged", "whole"]


def test_a_stop_is_published_and_becomes_what_modal_runs_again(prepared, monkeypatch):
    volume, cfg = prepared
    view = volume.view()

    def stopped(*_args, **_options):
        (view.path / "resume").mkdir(exist_ok=True)
        (view.path / "resume/half").write_text("way")
        raise Interrupted("stopped and saved at step 3")

    monkeypatch.setattr(containers, "run_job", stopped)
    with pytest.raises(KeyboardInterrupt, match="step 3"):
        work(view, cfg, "train_shared")
    assert (volume.path / "resume/half").exists()


class Hands:
    """What hands out jobs in the place of Modal: each container's items run here, some are lost."""

    def __init__(self, volume, cfg, lost=(), together=False):
        self.volume, self.cfg, self.lost, self.together, self.given = (
            volume,
            cfg,
            lost,
            together,
            [],
        )

    def __call__(self, jobs):
        for batch in [jobs] if self.together else [[job] for job in jobs]:
            self.given += [(job.stage, job.item) for job in batch]
            lost = [job for job in batch if job.item in self.lost]
            kept = [job.item for job in batch if job.item not in self.lost]
            result = work(self.volume.view(), self.cfg, jobs[0].stage, kept) if kept else []
            yield batch, TimeoutError("hit its timeout of 5s") if lost else result


def orchestrate(volume, cfg, wanted, hands, lines=None):
    """Hand out jobs as modal_app.py does."""
    view = volume.view()
    artifacts = Store(view.path, refresh=view.reload)
    said = (lambda _text: None) if lines is None else lines.append
    return cloud.orchestrate(cfg, wanted, artifacts, hands, "modal run x::y", said)


@pytest.mark.parametrize("together", [False, True])
def test_what_failed_is_named_the_rest_is_kept_and_only_the_missing_is_done_again(
    prepared, together
):
    volume, cfg = prepared
    steps = 3 + together
    cfg = cfg.model_copy(update={"expert": cfg.expert.model_copy(update={"steps": steps})})
    hands, lines = Hands(volume, cfg, lost=["shop"], together=together), []
    outcomes = orchestrate(
        volume, cfg, (*TEXT, "train_shared", "train_experts", "train_router"), hands, lines
    )
    states = {each.name: each.state for each in outcomes}
    assert states["tokenizer"] == states["preprocess sea"] == "found"
    assert [states[f"train_experts {name}"] for name in cfg.experts] == ["made", "failed", "made"]
    assert not any(each.stage == "train_router" for each in outcomes)
    assert "2 of 3 jobs of train_experts are finished and kept" in lines[-1]
    assert "train_experts shop: TimeoutError: hit its timeout" in lines[-1]
    assert "run again: modal run x::y" in lines[-1]
    again = Hands(volume, cfg)
    assert [each.state for each in orchestrate(volume, cfg, ("train_experts",), again)] == [
        "found",
        "made",
        "found",
    ]
    assert again.given == [("train_experts", "shop")]


def test_a_damaged_artifact_is_a_failure_told_in_commands_of_modal(prepared):
    volume, cfg = prepared
    changed = cfg.model_copy(update={"trunk": cfg.trunk.model_copy(update={"steps": 2})})
    address, lines = stages.address(changed, "train_shared"), []
    [made] = orchestrate(volume, changed, ("train_shared",), Hands(volume, changed))
    (volume.path / f"artifacts/{address}/trunk.safetensors").unlink()
    [found] = orchestrate(volume, changed, ("train_shared",), Hands(volume, changed), lines)
    assert (made.state, found.state) == ("made", "failed")
    assert "trunk.safetensors is gone" in found.error
    assert (
        f"`modal volume rm -r moleforge artifacts/{address}` and run "
        "`modal run modal_app.py::train_shared` again" in found.error
    )
    assert "0 of 1 jobs of train_shared" in lines[-1]


def test_domains_made_by_containers_have_the_bytes_of_a_local_run(volume, tiny, tmp_path):
    cfg = load(tiny)
    hands, lines = Hands(volume, cfg, lost=["shop"]), []
    outcomes = orchestrate(volume, cfg, TEXT, hands, lines)
    assert [each.state for each in outcomes] == ["made", "made", "failed", "made"]
    assert "2 of 3 jobs of preprocess are finished and kept" in lines[-1]
    again = Hands(volume, cfg)
    outcomes = orchestrate(volume, cfg, TEXT, again)
    assert [each.state for each in outcomes] == ["found", "found", "made", "found"]
    assert again.given == [("preprocess", "shop")]
    local = Store(tmp_path / "store").open()
    make_text(cfg, local)
    assert contents(volume.path) == contents(local.root) != {}


def test_a_domain_that_cannot_be_is_an_answer(volume, tiny):
    raw = load(tiny).model_dump(mode="json")
    raw["partition"]["domains"] += ["moon"]
    few = tiny.parent / "few.jsonl"
    few.write_text('{"text": "the one document that there is"}\n')
    raw["data"]["files"] += [{"paths": [str(few)], "domain": "moon"}]
    wrong, lines = parse(raw), []
    *made, failed = orchestrate(volume, wrong, TEXT, Hands(volume, wrong), lines)
    assert all(each.state == "made" for each in made)
    assert failed.item == "moon" and "moon has 1 distinct documents" in failed.error
    assert "run again: modal run x::y" in lines[-1]


def test_the_bundle_made_last_is_served(volume, tiny):
    view, cfg = volume.view(), load(tiny)
    with pytest.raises(MissingArtifact) as error:
        cloud.served(view.path, None, "public")
    assert "run `modal run modal_app.py::deploy`" in sentence(error.value, EDGE)
    for outcome in (
        cloud.JobResult("deploy", None, "deploy-1", "found"),
        cloud.JobResult("deploy", None, "deploy-2", "failed", "why"),
        cloud.JobResult("evaluate", None, "evaluate-1", "made"),
    ):
        cloud.serve_next([outcome], cfg, view.path, view.commit)
    assert view.commits == 1
    assert cloud.served(volume.path, None, "public") == volume.path / "artifacts/deploy-1"


def test_a_volume_of_an_older_version_is_refused_on_the_laptop_and_in_a_container(
    volume, tiny, tmp_path
):
    view, cfg = volume.view(), load(tiny)
    (view.path / "store.json").write_text(json.dumps({"format": 1}))
    view.commit()
    with pytest.raises(OldStore, match="the volume moleforge has store format 1") as error:
        cloud.mirror(cfg, tmp_path / "mirror", lambda _folder: [], lambda _path: b'{"format": 1}')
    assert "type `modal volume rename moleforge NAME`" in sentence(error.value, EDGE)
    with pytest.raises(StoreError, match=r"store\.json of the volume moleforge cannot be read"):
        cloud.mirror(cfg, tmp_path / "mirror", lambda _folder: [], lambda _path: b"{")
    [failed] = work(volume.view(), cfg, "preprocess")
    assert failed.state == "failed" and "modal volume rename moleforge NAME" in failed.error
