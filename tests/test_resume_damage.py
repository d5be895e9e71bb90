"""Jobs that were killed half-way, of both families: whatever happens to what they left behind, they
end in the bytes of an undisturbed run, or in one sentence with every file as it was.

What happens is drawn from everything that can be done to a file or a folder, by accident or by a
copy that went wrong, with times that jump.
"""

import io
import itertools
import json
import os
import random
import re
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path

import lora_small
import pytest
import torch
from conftest import tiny_config
from fakes import Killed, contents, dying, flip, told
from rich.console import Console

from pipeline.config.base import merge
from pipeline.config.run import RunConfig
from pipeline.errors import BudgetError, StoreError
from pipeline.families.load import load, parse
from pipeline.run import stages, training
from pipeline.run.dry_run import state_of
from pipeline.run.job import run_job
from pipeline.store.artifacts import Store, inventory
from pipeline.store.lineage import Lineage
from pipeline.store.reading import sealed

FAMILIES = ("ffn_moe", "lora_vlm")
STAGE = "train_experts"
RUNTIME = {"threads": 1, "save_every_s": 1e-9}
KILLED_BEFORE = (5, 4)  # step, of the first expert and of the second


@dataclass
class Half:
    """A store in which two experts were killed half-way, and what both come to."""

    cfg: RunConfig
    root: Path
    wanted: dict[str, str]

    @property
    def own(self):
        """Address of the expert that is gone on with."""
        return stages.address(self.cfg, STAGE, self.cfg.items(STAGE)[0])

    @property
    def other(self):
        """Address of the other one."""
        return stages.address(self.cfg, STAGE, self.cfg.items(STAGE)[1])

    def copied(self, root):
        """Return this with a store of its own."""
        shutil.copytree(self.root, root, symlinks=True)
        return replace(self, root=root)

    def resume(self, address=None):
        """Where the checkpoints of a job are."""
        return Store(self.root).resume(address or self.own)

    def make(self, stage=STAGE, item=None):
        """Do one job; return the lines that a person sees of it."""
        item = item or self.cfg.items(stage)[0]
        said = []
        console = Console(file=io.StringIO(), width=10_000)
        store = Store(self.root).open()
        run_job(
            stage,
            self.cfg,
            store,
            item,
            progress=lambda text, _share: said.append(text),
            console=console,
        )
        return said + console.file.getvalue().splitlines()

    def check(self):
        """Fail unless the expert has the bytes of an undisturbed one."""
        made = {name: digest for name, digest in contents(self.root).items() if self.own in name}
        assert made == {name: digest for name, digest in self.wanted.items() if self.own in name}


def dies_before(step):
    """Return what fits a task and is killed before a step."""
    fit = training.fit
    return lambda task, place: fit(dying(task, step), place)


def half_done(cfg, folder):
    """Make what comes before the experts of a run, kill two of these, and do both undisturbed in a
    copy."""
    half = Half(cfg, folder / "store", {})
    for stage in itertools.takewhile(lambda name: name != STAGE, cfg.stages):
        for item in cfg.items(stage):
            half.make(stage, item)
    whole = half.copied(folder / "whole")
    for item, step in zip(cfg.items(STAGE), KILLED_BEFORE, strict=False):
        whole.make(STAGE, item)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training, "fit", dies_before(step))
            with pytest.raises(Killed):
                half.make(STAGE, item)
    half.wanted = contents(whole.root)
    return half


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """{family: two experts half-way}; copy them."""
    text = tiny_config(tmp_path_factory.mktemp("tiny"), runtime=RUNTIME)
    quick = ("trunk.steps=2", "expert.steps=6", "expert.eval_every_steps=2")
    fewer = ("expert.statistics_tokens=64", "expert.eval_tokens=64", "trunk.eval_tokens=64")
    cfgs = {
        "ffn_moe": load(text, quick + fewer),
        "lora_vlm": parse(merge(lora_small.SETTINGS, {"runtime": RUNTIME})),
    }
    return {name: half_done(cfg, tmp_path_factory.mktemp(name)) for name, cfg in cfgs.items()}


@pytest.fixture(params=FAMILIES)
def half(request, halves, tmp_path):
    """A copy of one of them."""
    return halves[request.param].copied(tmp_path / "store")


def _rewrite(change):
    """Return what changes the bytes of a file."""
    return lambda path, draw: path.write_bytes(change(path.read_bytes(), draw))


def _replaced(put):
    """Return what removes a file and puts something in its place."""

    def replace_it(path, _draw):
        path.unlink()
        put(path)

    return replace_it


OF_FILES = {
    "cut": _rewrite(lambda data, draw: data[: draw.randrange(len(data))]),
    "zeros": _rewrite(lambda data, _draw: bytes(len(data))),
    "flipped": lambda path, draw: flip(path, draw.randrange(path.stat().st_size)),
    "grown": _rewrite(lambda data, draw: data + draw.randbytes(9)),
    "removed": _replaced(lambda _path: None),
    "a folder": _replaced(Path.mkdir),
    "a link to nothing": _replaced(lambda path: path.symlink_to("nowhere")),
}
OF_FOLDERS = {
    "removed": lambda _path: None,
    "a file": lambda path: path.write_text("mine"),
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
}


def changed(cfg, **runtime):
    """Return a configuration with another runtime, which no address depends on."""
    return cfg.model_copy(update={"runtime": cfg.runtime.model_copy(update=runtime)})


def smallest_budget(half):
    """Return the least memory that the expert says it needs."""
    half.cfg = changed(half.cfg, memory_budget=1)
    with pytest.raises(BudgetError) as refused:
        half.make()
    megabytes = int(re.search(r"smallest that works is (\d+)MB", str(refused.value))[1])
    # what is loaded already differs a little from one attempt to the next
    return (megabytes + 1) * 10**6


def swapped(one, other):
    """Let two files or folders have each other's names."""
    between = one.with_name("between")
    one.rename(between)
    other.rename(one)
    between.rename(other)


def files(folder):
    """Return the files below a folder that have bytes, in order."""
    found = (path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    return sorted(found)


def harm_a_file(half, draw):
    harm = draw.choice(sorted(OF_FILES))
    OF_FILES[harm](draw.choice(files(half.resume())), draw)


def harm_a_folder(half, draw):
    folder = draw.choice([half.resume(), half.resume() / "a", half.resume() / "b"])
    shutil.rmtree(folder)
    OF_FOLDERS[draw.choice(sorted(OF_FOLDERS))](folder)


def swap_two_files(half, draw):
    swapped(*draw.sample(files(half.resume()), 2))


def swap_the_slots(half, _draw):
    swapped(half.resume() / "a", half.resume() / "b")


def copy_a_file_over_another(half, draw):
    source = draw.choice(files(half.resume()) + files(half.resume(half.other)))
    shutil.copyfile(source, draw.choice(files(half.resume())))


def copy_a_slot_over_the_other(half, draw):
    source, target = draw.sample("ab", 2)
    shutil.rmtree(half.resume() / target)
    shutil.copytree(half.resume() / source, half.resume() / target)


def put_another_jobs_slot_there(half, draw):
    target = half.resume() / draw.choice("ab")
    shutil.rmtree(target)
    shutil.copytree(half.resume(half.other) / draw.choice("ab"), target)


def put_another_jobs_folder_there(half, draw):
    if draw.random() < 0.5:
        shutil.rmtree(half.resume())
    shutil.copytree(half.resume(half.other), half.resume(), dirs_exist_ok=True)


def leave_things_about(half, draw):
    names = ("best-99.safetensors", "best-1.safetensors.part", "c", ".tmpXYZ123", "threads.json")
    (half.resume() / draw.choice(names)).write_bytes(draw.randbytes(50))
    (half.resume() / draw.choice("ab") / "state.json.part").write_bytes(b"{")


HARMS = [
    harm_a_file,
    harm_a_file,
    harm_a_file,
    harm_a_folder,
    swap_two_files,
    swap_the_slots,
    copy_a_file_over_another,
    copy_a_slot_over_the_other,
    put_another_jobs_slot_there,
    put_another_jobs_folder_there,
    leave_things_about,
]


def let_clocks_jump(half, draw, monkeypatch):
    """Give every file a time of its own, in the past or to come, and let no two looks at the clock
    agree."""
    for path in half.root.rglob("*"):
        at = draw.uniform(1e8, 4e9)
        os.utime(path, (at, at), follow_symlinks=False)
    monkeypatch.setattr("time.time", lambda: draw.uniform(0, 4e9))
    gmtime = time.gmtime
    monkeypatch.setattr("time.gmtime", lambda *_: gmtime(draw.uniform(0, 4e9)))


@pytest.mark.parametrize("harm", range(len(HARMS)), ids=lambda i: HARMS[i].__name__)
def test_whatever_happens_to_checkpoints_ends_the_same_or_in_a_sentence(half, harm, monkeypatch):
    draw = random.Random(f"{half.cfg.family} {harm}")
    HARMS[harm](half, draw)
    let_clocks_jump(half, draw, monkeypatch)
    before = inventory(half.resume()) if half.resume().is_dir() else {}
    try:
        half.make()
    except StoreError as refused:
        left = inventory(half.resume()) if half.resume().is_dir() else {}
        assert {name: left.get(name) for name in before} == before
        said = told(refused)
        assert str(half.resume()) in said and "\n" not in said
    else:
        half.check()


def of_another_job(half):
    """Let the other expert's checkpoints have all inputs of this one's, as two experts on one trunk
    have, and one expert at two rates."""
    own = json.loads((half.resume() / "a" / "state.json").read_text())["run"]["inputs"]
    for path in half.resume(half.other).glob("?/state.json"):
        numbers = json.loads(path.read_text())
        numbers.pop("checksum")
        numbers["run"]["inputs"] = own
        path.write_text(sealed(numbers))
    return half.resume(half.other)


def test_checkpoints_of_another_job_are_told_and_never_gone_on_from(half):
    other = of_another_job(half)
    shutil.rmtree(half.resume())
    shutil.copytree(other, half.resume())
    # as a plan has it too
    assert state_of(half.own, Lineage(Store(half.root))) == "at step 0"
    said = [line for line in half.make() if "checkpoint" in line]
    assert len(said) == 2
    for line in said:
        assert f"is of {half.other}, and this job makes {half.own} (kept as " in line
        assert ".other-" in line and line.endswith("; starting over at step 0")
    half.check()


def test_one_of_another_job_beside_ones_own_costs_one_checkpoint(half):
    other = of_another_job(half)
    shutil.rmtree(half.resume() / "a")
    shutil.copytree(other / "b", half.resume() / "a")
    # a best state of the same name, which the slot that is gone on from needs
    said = [line for line in half.make() if "checkpoint" in line]
    assert len(said) == 1 and f"is of {half.other}" in said[0]
    assert said[0].endswith("; going on from the other one, step 5")
    half.check()


def test_other_threads_and_another_budget_are_told_and_kept(half):
    half.cfg = changed(half.cfg, memory_budget=smallest_budget(half))
    torch.set_num_threads(2)
    said = " ".join(half.make())
    assert "from step 5 on with threads 2 (1 before)" in said
    assert "not that of an undisturbed run bit for bit" in said
    before, now = Store(half.root).manifest(half.own).metrics["rounding"]
    assert (before["step"], before["threads"]) == (0, 1)
    assert (now["step"], now["threads"]) == (5, 2)
    assert now["sequences at a time"] <= before["sequences at a time"]
