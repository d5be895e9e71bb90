"""A part that was made again at its address leaves no former result standing: every pair of stages
of which one reads the other, both families, as the tables have them.

Artifacts are made by the program's own jobs, with a stage's work replaced by one file that follows
from its inputs and from what a test calls the weather.
"""

import io
import json
import shutil
from pathlib import Path

import pytest
from conftest import tiny_config
from fakes import StubbedVolume, contents, killed_at
from rich.console import Console
from test_modal_volume import Hands

from pipeline import __main__, cloud
from pipeline.cloud.handing_out import FarJob, whole
from pipeline.errors import StaleArtifact
from pipeline.families.load import RUN_CONFIGS, load, parse
from pipeline.protocols import quiet
from pipeline.run import backend, dry_run, job, stages
from pipeline.run.advice import CommandLine, sentence
from pipeline.run.backend import Local, run_stage
from pipeline.run.job import run_job
from pipeline.store.artifacts import FORMER, Manifest, Store
from pipeline.store.lineage import Lineage
from tests import small, small_stack

CONFIGS = {
    "ffn_moe": small.config(dense__baselines=("total", "wide")),
    "lora_vlm": parse(small_stack.RUN),
}
PRICES = cloud.Prices.load(Path(__file__).parents[1] / "config/prices.yaml")


def pairs(cfg):
    """Return every (reading job, read job) of a run with its bundle."""
    found = []
    for stage in stages.STAGES:
        for item in cfg.items(stage):
            found += [((stage, item), need) for need in cfg.needs(stage, item)]
    return found


def readers(cfg, made_again):
    """Return the jobs that read one, directly or over others."""
    found = {made_again}
    for reader, read in pairs(cfg):
        if read in found:
            found.add(reader)
    return found - {made_again}


READ = [(family, read) for family, cfg in CONFIGS.items() for read in {r: 0 for _, r in pairs(cfg)}]


class World:
    """A run whose jobs cost nothing: what each leaves is a function of what it reads and of the
    weather on the day that it is made."""

    def __init__(self, cfg, store, monkeypatch):
        self.cfg, self.store, self.weather, self.made, self.said = cfg, store, {}, [], []
        monkeypatch.setattr(job, "_work", self._work)
        monkeypatch.setattr(backend.Local, "run_jobs", self._run_jobs)
        monkeypatch.setattr(dry_run, "family", lambda _name: _NoCosts)
        self.addresses = stages.Addresses(cfg)

    def _work(self, context):
        self.made.append((context.stage, context.item))
        weather = self.weather.get((context.stage, context.item), "fair")
        text = json.dumps([sorted(context.inputs.items()), weather])
        (context.folder / "part.txt").write_text(text)
        if context.row.kind == "report":
            (context.folder / "report.json").write_text(text)
        return {}

    def _run_jobs(self, stage, _cfg, items):
        for item in items:
            self.do(stage, item)
        return {}

    def do(self, stage, item=None):
        """Do one job, or find it done."""
        return run_job(stage, self.cfg, self.store, item, progress=self._say)

    def _say(self, text, _share):
        self.said.append(text)

    def run(self):
        """Do what `run` and `deploy` do."""
        self.made.clear()
        self.said.clear()
        for stage in stages.STAGES:
            if self.cfg.items(stage):
                run_stage(stage, self.cfg, Local(self.store))
        return list(self.made)

    def make_again(self, stage, item, weather="rain"):
        """Make a part again at its address, as a person does who has removed it."""
        shutil.rmtree(self.store.folder(self.addresses.of(stage, item)))
        self.weather[stage, item] = weather
        self.do(stage, item)
        self.made.clear()

    def states(self):
        """Return {job: state} as `plan` tells it."""
        told = {entry.address: entry.state for entry in dry_run.plan(self.cfg, self.store)}
        jobs = [each for stage in stages.RUN for each in self.addresses.jobs(stage)]
        return {(stage, item): told[address] for stage, item, address in jobs}


class _NoCosts:
    @staticmethod
    def cost(*_args):
        """Say that nothing is trained."""


@pytest.fixture
def world(request, tmp_path, monkeypatch):
    """A finished run of a family."""
    world = World(CONFIGS[request.param], Store(tmp_path / "store").open(), monkeypatch)
    world.run()
    return world


def test_the_families_are_all_here():
    assert CONFIGS.keys() == RUN_CONFIGS.keys()
    for cfg in CONFIGS.values():
        assert {stage for (stage, _), _ in pairs(cfg)} > {"train_experts", "evaluate", "deploy"}


@pytest.mark.parametrize(("world", "again"), READ, indirect=["world"], ids=str)
def test_what_reads_a_part_that_was_made_again_is_stale_and_nothing_else(world, again):
    jobs = {(s, i) for stage in stages.STAGES for s, i, _ in world.addresses.jobs(stage)}
    assert world.run() == []
    locks = sorted(world.store.root.glob("locks/*"))
    world.make_again(*again)
    stale = readers(world.cfg, again)
    states = world.states()
    assert states.keys() == {each for each in jobs if each[0] in stages.RUN}
    assert {each for each, state in states.items() if state == "stale"} == stale & states.keys()
    assert all(states[each] == "done" for each in states.keys() - stale)
    # what is alike is made once, after what it reads; what was put aside is gone
    order = world.run()
    assert set(order) == stale and len(order) == len(stale)
    for reader, read in pairs(world.cfg):
        if reader in stale and read in stale:
            assert order.index(read) < order.index(reader)
    assert len(world.said) == len(stale)
    assert all("making it again, as" in text and "another" in text for text in world.said)
    assert world.run() == [] and set(world.states().values()) == {"done"}
    assert sorted(world.store.root.glob("locks/*")) == locks
    assert not list(world.store.root.glob("resume/*"))
    # the weather of a part alone tells two runs apart
    fresh = Store(world.store.root.with_name("fresh")).open()
    world.store = fresh
    world.run()
    assert contents(fresh.root) == contents(fresh.root.with_name("store"))


@pytest.mark.parametrize("world", CONFIGS, indirect=True)
def test_each_command_refuses_what_is_stale_below_it_by_name_and_makes_its_own_again(world):
    refused = []
    for read in {read: 0 for _, read in pairs(world.cfg)}:
        world.make_again(*read)
        stale = readers(world.cfg, read)
        # the last one first: what is made again here is current for those that read it
        for reader in [reader for reader, need in pairs(world.cfg) if need == read][::-1]:
            below = [each for each in world.cfg.needs(*reader) if each in stale]
            if not below:
                world.do(*reader)
                assert world.made.pop() == reader
                stale -= {reader}
                continue
            refused.append(reader)
            # which of the stage's jobs refuses first is not told, and may have read something else
            siblings = [each for each in stale if each[0] == reader[0]]
            theirs = [each for job in siblings for each in world.cfg.needs(*job) if each in stale]
            with pytest.raises(StaleArtifact) as error:
                run_stage(reader[0], world.cfg, Local(world.store))
            text = sentence(error.value, CommandLine())
            named = [each for each in theirs if world.addresses.of(*each) in text]
            assert named
            for stage, _ in named:
                assert f"`python -m pipeline {stage}`" in text
            assert "remove" not in text and world.made == []
            with pytest.raises(StaleArtifact):
                cloud.refuse_without_inputs(world.cfg, (reader[0],), world.store)
        world.run()
    assert {stage for stage, _ in refused} >= {"evaluate", "deploy"}


@pytest.mark.parametrize("world", CONFIGS, indirect=True)
def test_a_part_made_again_with_the_same_bytes_leaves_all_as_it_is(world):
    for read in {read: 0 for _, read in pairs(world.cfg)}:
        shutil.rmtree(world.store.folder(world.addresses.of(*read)))
        states = world.states()
        unsure = readers(world.cfg, read) & states.keys()
        assert {each for each, state in states.items() if state == "done?"} == unsure
        assert states[read] == "to do"
        assert world.run() == [read]


@pytest.mark.parametrize("world", CONFIGS, indirect=True)
def test_a_stale_artifact_is_kept_until_the_new_one_is_whole(world, monkeypatch):
    read = ("preprocess", world.cfg.items("preprocess")[0])
    world.make_again(*read)
    for stage, item in sorted(
        readers(world.cfg, read), key=lambda each: stages.STAGES.index(each[0])
    ):
        address = world.addresses.of(stage, item)
        before = world.store.manifest(address)
        for _ in range(2):  # killed once and again
            with monkeypatch.context() as patch:
                patch.setattr(job, "_work", _killed)
                with pytest.raises(OSError, match="killed"):
                    world.do(stage, item)
            assert not world.store.has(address)
            kept = world.store.resume(address) / FORMER
            assert {"part.txt", "manifest.json"} <= {path.name for path in kept.iterdir()}
        world.do(stage, item)
        assert not world.store.resume(address).exists()
        assert world.store.manifest(address).digest != before.digest


def _killed(context):
    (context.folder / "part.txt").write_text("half")
    raise OSError("killed")


@pytest.mark.parametrize("world", CONFIGS, indirect=True)
def test_no_stale_report_or_bundle_is_shown_as_current(world, monkeypatch, capsys, tmp_path):
    bundle = world.store.folder(world.addresses.of("deploy"))
    (world.store.root / "served.json").write_text(json.dumps({"address": bundle.name}))
    monkeypatch.setattr(__main__, "load", lambda *_: world.cfg)
    shown = []
    monkeypatch.setattr("pipeline.serve.command.serve", lambda folder, *_: shown.append(folder))
    store = ["--store", str(world.store.root)]
    copy = shutil.copytree(bundle, tmp_path / "copy")
    commands = (["--config", "x", *store], ["--bundle", str(bundle)])
    for command in commands:
        assert __main__.main(["serve", *command]) == 0
    assert cloud.served(world.store.root, "key", "key") == bundle
    for read in {read: 0 for _, read in pairs(world.cfg)}:
        world.make_again(*read)
        del shown[:]
        for command in commands:
            assert __main__.main(["serve", *command]) == 2
            said = capsys.readouterr().err
            assert f"{bundle.name} is stale" in said and world.addresses.of(*read) in said
            assert "`python -m pipeline deploy` again" in said
        with pytest.raises(StaleArtifact) as error:
            cloud.served(world.store.root, "key", "key")
        text = sentence(error.value, cloud.ModalEdge(world.store.root))
        assert "`modal run modal_app.py::deploy` again" in text
        assert not shown and __main__.main(["serve", "--bundle", str(copy)]) == 0
        world.run()
        assert cloud.served(world.store.root, "key", "key") == bundle


@pytest.mark.parametrize("world", CONFIGS, indirect=True)
def test_modal_s_side_knows_it_by_mirrored_manifests_and_makes_it_again(world, tmp_path):
    cfg, volume = world.cfg, StubbedVolume(tmp_path / "volume")
    view = volume.view()
    shutil.copytree(world.store.root, view.path, dirs_exist_ok=True)
    view.commit()
    read = ("train_shared", None)
    far = Store(volume.path)
    world.make_again(*read)
    shutil.rmtree(volume.path / "artifacts")
    shutil.copytree(world.store.root / "artifacts", volume.path / "artifacts")
    stale = readers(cfg, read)

    def names(folder):
        return [path.name for path in (volume.path / folder).glob("*")]

    def content(path):
        return (volume.path / path).read_bytes() if (volume.path / path).exists() else None

    wanted = [stage for stage in stages.STAGES if cfg.items(stage)]
    mirror = cloud.mirror(cfg, tmp_path / "mirror", names, content)
    lines = {each.address: each for each in cloud.estimate(cfg, wanted, mirror, PRICES)}
    told = {each: lines[world.addresses.of(*each)].state for each in stale}
    assert set(told.values()) == {"stale"}
    console = Console(file=io.StringIO(), width=200)
    cloud.show_estimate(cfg, list(lines.values()), PRICES, False, console)
    assert f"made on another {world.addresses.of(*read)} than" in console.file.getvalue()
    with pytest.raises(StaleArtifact):
        cloud.refuse_without_inputs(cfg, ("deploy",), mirror)
    cloud.refuse_without_inputs(cfg, wanted, mirror)

    hands, there = Hands(volume, cfg), volume.view()
    found = Store(there.path, refresh=there.reload)
    for round_of_all in (stale, set()):
        hands.given.clear()
        results = cloud.orchestrate(cfg, wanted, found, hands, "typed", lambda _text: None)
        assert set(hands.given) == round_of_all
        assert {(each.stage, each.item) for each in results if each.state == "made"} == round_of_all
        assert not [each.error for each in results if each.error]
    # one that is stale and was not made again is no result
    assert whole(FarJob(world.addresses, "deploy", None), found, "found").state == "found"
    other = Manifest("train_shared-x", "train_shared", None, {}, {})
    assert Lineage(far).change(other.address) is None


def test_the_real_thing_trains_again_what_stands_on_other_text(tmp_path):
    """Other documents under the same address, as when data was mended and preprocess made again;
    one expert is done by then, the other stopped half-way."""
    path = tiny_config(tmp_path / "tiny", runtime={"save_every_s": 1e-9})
    # nothing is looked at, so that the address stays
    cfg, said = load(path).model_copy(update={"identity": {}}), []
    store, wanted = Store(tmp_path / "store").open(), Store(tmp_path / "wanted").open()

    def do(at, stage, item=None):
        console = Console(file=io.StringIO(), width=400)
        run_job(stage, cfg, at, item, progress=quiet, console=console)
        said.append(console.file.getvalue())

    text = [("tokenizer", None), *(("preprocess", name) for name in cfg.partition.names)]
    jobs = [*text, ("train_shared", None), ("train_experts", "sea")]
    for each in jobs:
        do(store, *each)
    with killed_at(7):
        do(store, "train_experts", "shop")
    half = stages.address(cfg, "train_experts", "shop")
    assert dry_run.state_of(half, Lineage(store)) == "at step 7"

    rows = (tmp_path / "tiny/sea.jsonl").read_text()
    (tmp_path / "tiny/sea.jsonl").write_text(rows.replace("tide", "wave"))
    for each in text:
        shutil.rmtree(store.folder(stages.address(cfg, *each)))
    for each in text:
        do(store, *each)
    assert dry_run.state_of(half, Lineage(store)) == "to do"
    del said[:]
    for at in (store, wanted):
        for each in (*jobs, ("train_experts", "shop")):
            do(at, *each)
    assert contents(store.root) == contents(wanted.root)
    told = [text for text in said if "was trained on another" in text]
    assert len(told) == 1 and "starting over at step 0" in told[0] and ".stale-" in told[0]
