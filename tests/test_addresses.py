"""What addresses hold: the arithmetic that a machine chose, and nothing that changes no result."""

import errno
import io
import itertools
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import make_text, tiny_config
from fakes import killed_at
from rich.console import Console

from pipeline import cloud, hardware
from pipeline.config.base import merge
from pipeline.config.machines import ModalConfig, TrainerConfig
from pipeline.errors import UnreadableFile
from pipeline.families.load import RUN_CONFIGS, load, parse
from pipeline.protocols import quiet
from pipeline.run import backend, dry_run, former, stages
from pipeline.run.backend import Local, run_stage
from pipeline.run.job import run_job
from pipeline.store import in_use
from pipeline.store.artifacts import Store
from pipeline.store.reading import sealed
from pipeline.train import loop
from pipeline.train.flops import JobCost
from pipeline.train.memory_plan import MemoryPlan
from tests import small, small_stack

ROOT = Path(__file__).parents[1]
PRICES = cloud.Prices.load(ROOT / "config/prices.yaml")
AUTO = {
    "ffn_moe": small.config(dtype="auto", dense__baselines=("total", "wide")),
    "lora_vlm": parse(small_stack.RUN | {"dtype": "auto"}),
}
BF16, FP32 = frozenset({"avx2", "avx512_bf16"}), frozenset({"avx2"})


def on(monkeypatch, flags):
    """Be a machine without a GPU whose processor has these flags."""
    monkeypatch.setattr(hardware, "device", lambda: "cpu")
    monkeypatch.setattr(hardware, "_cpu_flags", lambda: flags)


def found(cfg):
    """Return {job: address} of a run with its bundle."""
    addresses = stages.Addresses(cfg)
    jobs = [each for stage in stages.STAGES for each in addresses.jobs(stage)]
    return {(stage, item): address for stage, item, address in jobs}


def on_arithmetic(cfg):
    """Return the jobs that depend on the arithmetic, as the table has them: those that read it and
    those that read such a job."""
    depends = set()
    for stage in stages.STAGES:
        for item in cfg.items(stage):
            reads = "dtype" in cfg.stages[stage].reads
            if reads or depends & set(cfg.needs(stage, item)):
                depends.add((stage, item))
    return depends


@pytest.mark.parametrize("family", RUN_CONFIGS)
def test_two_kinds_of_machine_share_no_address_with_different_arithmetic(family, monkeypatch):
    cfg, of = AUTO[family], {}
    for dtype, flags in (("bf16", BF16), ("fp32", FP32)):
        on(monkeypatch, flags)
        of[dtype] = found(cfg)
        assert stages.Addresses(cfg).cfg.dtype == hardware.native_dtype() == dtype
        # said or found out, it is the same run
        assert of[dtype] == found(cfg.model_copy(update={"dtype": dtype}))
        # and nobody who has the other kind of machine may take it for nobody's
        assert set(of[dtype].values()) <= set(stages.Addresses(cfg).reachable())
    differ = {each for each in of["bf16"] if of["bf16"][each] != of["fp32"][each]}
    assert differ == on_arithmetic(cfg) > {("train_router", None), ("evaluate", None)}
    only_one = cfg.model_copy(update={"dtype": "fp32"})
    assert set(stages.Addresses(only_one).reachable()) == set(of["fp32"].values())


@pytest.mark.parametrize("family", RUN_CONFIGS)
def test_a_job_is_told_the_arithmetic_that_its_address_has(family, monkeypatch, tmp_path):
    on(monkeypatch, FP32)
    given = []

    def start(_stage, cfg, *_more):
        given.append(cfg.dtype)
        raise KeyboardInterrupt

    monkeypatch.setattr(backend, "_start", start)
    first = next(stage for stage in AUTO[family].stages if AUTO[family].items(stage))
    with pytest.raises(BaseException, match="goes on from there"):
        run_stage(first, AUTO[family], Local(Store(tmp_path)))
    assert given == ["fp32"]


def test_addresses_bring_no_torch_and_a_driver_of_a_gpu_does():
    program = """
import sys
from pipeline import hardware
from pipeline.families.load import load
from pipeline.run.stages import Addresses
hardware.DRIVERS = ()
for name in ("demo", "tiny_vlm"):
    assert list(Addresses(load(f"config/{name}.yaml")).reachable())
print("torch" in sys.modules)
hardware.DRIVERS = ("/",)
hardware.native_dtype()
print("torch" in sys.modules)
"""
    ran = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert ran.stdout.split() == ["False", "True"]


@pytest.mark.parametrize("native", [True, False])
def test_with_a_gpu_it_is_the_gpu_that_decides(monkeypatch, native):
    import torch

    def supported(including_emulation=True):
        return native or including_emulation

    on(monkeypatch, FP32 if native else BF16)
    monkeypatch.setattr(hardware, "device", lambda: "cuda")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert hardware.native_dtype() == ("bf16" if native else "fp32")


def test_another_machine_leaves_a_checkpoint_alone_and_this_one_goes_on_from_it(
    tmp_path, monkeypatch
):
    path = tiny_config(tmp_path / "tiny", dtype="auto", runtime={"save_every_s": 1e-9})
    cfg, store = load(path), Store(tmp_path / "store").open()

    def do(stage):
        console = Console(file=io.StringIO(), width=200)
        run_job(stage, cfg, store, progress=quiet, console=console)

    make_text(cfg, store)
    on(monkeypatch, BF16)
    with killed_at(7):
        do("train_shared")
    slots = store.resume(stages.address(cfg, "train_shared"))
    before = {p: p.stat().st_mtime_ns for p in slots.rglob("*") if p.is_file()}
    on(monkeypatch, FP32)
    do("train_shared")
    assert before and before == {p: p.stat().st_mtime_ns for p in slots.rglob("*") if p.is_file()}
    began = []
    monkeypatch.setattr(
        loop, "restore", lambda *args, real=loop.restore: began.append(real(*args)) or began[-1]
    )
    on(monkeypatch, BF16)
    do("train_shared")
    assert began[0].step >= 7
    dtypes = {store.manifest(each).made["machine"]["dtype"] for each in _trained(store)}
    assert dtypes == {"bf16", "fp32"} and len(_trained(store)) == 2


def _trained(store):
    return [each for each in store.addresses() if each.startswith("train_shared")]


def trainer(cfg, stage, *gpus):
    """Return a run whose stage has containers with one of these GPUs."""
    machine = TrainerConfig(gpu=gpus)
    modal = cfg.modal.model_copy(update={stage: machine})
    return cfg.model_copy(update={"modal": modal})


@pytest.mark.parametrize("family", RUN_CONFIGS)
def test_on_modal_the_machines_that_train_decide_and_the_laptop_does_not(family, monkeypatch):
    def said(cfg):
        told = []
        dtypes = set()
        for flags in (BF16, FP32):
            on(monkeypatch, flags)
            settled = cloud.settled(cfg, PRICES, told.append)
            dtypes.add(settled.dtype)
            # What is handed to containers says it, whatever they are
            on(monkeypatch, BF16 if flags == FP32 else FP32)
            raw = settled.model_dump(mode="json")
            assert found(parse(raw)) == found(cfg.model_copy(update={"dtype": settled.dtype}))
        assert len(dtypes) == 1
        return dtypes.pop(), told[0]

    cfg = AUTO[family]
    assert said(cfg)[0] == "bf16"
    # a search of a rate runs on the machine of the training that it is for
    rows = cfg.stages.items()
    trains = [stage for stage, row in rows if "dtype" in row.reads and row.machine is None]
    assert {"train_experts", "train_router"} <= set(trains)
    for stage in trains:
        for gpus in itertools.chain([()], [(kind,) for kind in PRICES.gpus]):
            dtype, why = said(trainer(cfg, stage, *gpus))
            has = bool(gpus) and gpus != ("T4",)
            assert dtype == ("bf16" if has else "fp32")
            assert (f"modal.{stage}.gpu" in why) == (not has)
        assert said(trainer(cfg, stage, "L40S", "t4:2"))[0] == "fp32"
    # what does not train does not decide, and what was said is not asked
    assert said(trainer(cfg, "evaluate"))[0] == "bf16"
    for dtype in ("fp32", "bf16"):
        given = cfg.model_copy(update={"dtype": dtype})
        assert cloud.settled(given, PRICES, pytest.fail) is given
    nothing = cfg.model_copy(update={"modal": ModalConfig(**{s: {"gpu": []} for s in trains})})
    assert said(nothing)[0] == "fp32"


def half(cfg, store, stage, item, step):
    """Leave what a training leaves that was stopped at a step."""
    address = stages.address(cfg, stage, item)
    former.note_settings(store, address, stages.Addresses(cfg).cfg)
    slot = store.resume(address) / "a"
    slot.mkdir(parents=True)
    (slot / "state.json").write_text(sealed({"run": {"step": step}}))


# What a person changes of a run and what is said then: family, job, before, after, told of the job
FORMER = {
    "a rate": ("ffn_moe", ("train_experts", "alpha"), {"expert": {"lr": 0.5}}, {}, "expert.lr 0.5"),
    "a duration": (
        "ffn_moe",
        ("train_shared", None),
        {"trunk": {"tokens": 640}},
        {},
        "trunk.tokens 640",
    ),
    "a part that is read": (
        "ffn_moe",
        ("train_router", None),
        {"trunk": {"layers": 3}},
        {},
        "trunk.layers 3",
    ),
    "two": (
        "ffn_moe",
        ("train_dense", "wide"),
        {"trunk": {"beta2": 0.9}, "seed": 8},
        {"name": "other", "expert": {"init": "fresh"}},
        "seed 8, trunk.beta2 0.9",
    ),
    "arithmetic": ("ffn_moe", ("train_shared", None), {"dtype": "bf16"}, {}, "dtype bf16"),
    "defaults of adapters": (
        "lora_vlm",
        ("train_experts", "color"),
        {"loras": {"defaults": {"r": 8}}},
        {},
        "loras.defaults.r 8",
    ),
    "one expert's own": (
        "lora_vlm",
        ("train_experts", "count"),
        {"loras": {"experts": {"count": {"overrides": {"lr": 0.5}}}}},
        {},
        "loras.experts.count.overrides.lr 0.5",
    ),
    "what is new": (
        "lora_vlm",
        ("train_experts", "count"),
        {},
        {"loras": {"experts": {"count": {"overrides": {"lr": 0.5}}}}},
        "loras.experts.count.overrides.lr unset",
    ),
    "the router's": (
        "lora_vlm",
        ("train_router", None),
        {"loras": {"router": {"alpha": 3.0}}},
        {"evaluate": {"bootstrap": 99}},
        "loras.router.alpha 3.0",
    ),
}


def changed(family, changes):
    """Return a run with changes by section."""
    raw = {"ffn_moe": small.SETTINGS, "lora_vlm": small_stack.RUN}[family]
    raw = merge(raw, {"dense": {"baselines": ["wide"]}}) if family == "ffn_moe" else raw
    return parse(merge(raw, changes))


def planned(cfg, store, monkeypatch):
    """Return what `plan` prints, and what the plan of a mirror of this store prints on Modal."""
    costs = JobCost.of(
        "x", None, tokens=9, flops_per_token=1.0, parameters=1, plan=PLAN, peak_bytes=1
    )
    fake = SimpleNamespace(
        cost=lambda *_: costs, writing_cost=lambda *_: costs, preflight=lambda *_: []
    )
    monkeypatch.setattr(dry_run, "family", lambda _name: fake)
    here, far = (Console(file=io.StringIO(), width=300) for _ in range(2))
    dry_run.show_plan(cfg, store, here)
    with tempfile.TemporaryDirectory() as folder:

        def names(kind):
            return [path.name for path in (store.root / kind).glob("*")]

        def read(path):
            return (store.root / path).read_bytes() if (store.root / path).exists() else None

        mirror = cloud.mirror(cfg, Path(folder), names, read)
        wanted = [stage for stage in stages.RUN if cfg.items(stage)]
        cloud.show_estimate(cfg, cloud.estimate(cfg, wanted, mirror, PRICES), PRICES, False, far)
    return here.file.getvalue(), far.file.getvalue()


PLAN = MemoryPlan(micro_batch_sequences=1)


def refused(path):
    """Take the place of Path.iterdir in a folder that this user may not read."""
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


@pytest.mark.parametrize("case", FORMER)
def test_a_checkpoint_under_a_former_value_is_told(case, tmp_path, monkeypatch):
    family, (stage, item), before, after, wanted = FORMER[case]
    there, here, store = changed(family, before), changed(family, after), Store(tmp_path).open()
    half(there, store, stage, item, 40)
    name = stages.label(stage, item)
    line = f"{name}: a checkpoint at step 40 exists under {wanted} (here "
    for text in planned(here, store, monkeypatch):
        assert text.count(line) == 1
    told = former.former_checkpoint(stages.Addresses(here), stage, item, store)
    assert told.startswith(line) and "begins at step 0" in told
    # whoever sets that goes on from it, and is told nothing
    assert former.former_checkpoint(stages.Addresses(there), stage, item, store) == ""
    assert "exists under" not in "".join(planned(there, store, monkeypatch))
    # what may not be looked at is not taken for absent
    with monkeypatch.context() as patch:
        patch.setattr(Path, "iterdir", refused)
        with pytest.raises(UnreadableFile, match="resume cannot be read"):
            former.former_checkpoint(stages.Addresses(here), stage, item, store)
    # neither is who has begun
    half(here, store, stage, item, 3)
    assert "exists under" not in "".join(planned(here, store, monkeypatch))


def test_another_run_is_no_former_value_and_the_nearest_one_is_told(tmp_path):
    store, here = Store(tmp_path).open(), changed("ffn_moe", {})
    job = ("train_experts", "alpha")

    def told():
        return former.former_checkpoint(stages.Addresses(here), *job, store)

    others = {"lr": 0.5, "beta2": 0.5, "weight_decay": 0.5, "warmup_steps": 3}
    half(changed("ffn_moe", {"expert": others}), store, *job, 90)
    assert told() == ""
    half(changed("ffn_moe", {"expert": {"lr": 0.25, "beta2": 0.5}}), store, *job, 80)
    assert "step 80 exists under expert.lr 0.25, expert.beta2 0.5 (here 0.01, 0.95)" in told()
    half(changed("ffn_moe", {"expert": {"lr": 0.125}}), store, *job, 1)
    half(changed("ffn_moe", {"expert": {"lr": 0.0625}}), store, *job, 2)
    assert "step 2 exists under expert.lr 0.0625 (here 0.01)" in told()
    # what a run in progress makes, as another trial of experiments, is nobody's former value
    of_other = stages.address(changed("ffn_moe", {"expert": {"lr": 0.0625}}), *job)
    with in_use.using(store, [of_other]):
        assert "step 1 exists under expert.lr 0.125 (here 0.01)" in told()
    # one that says nothing, or that no longer is what its settings say, is left out
    for path in store.root.glob("resume/*/settings.json"):
        path.write_text("{}")
    assert told() == ""


def test_a_training_that_begins_says_it_and_notes_its_settings(tmp_path):
    path = tiny_config(tmp_path / "tiny", runtime={"save_every_s": 1e-9})
    store, said = Store(tmp_path / "store").open(), []

    def do(stage, *overrides):
        console = Console(file=io.StringIO(), width=200)
        say = lambda text, _share: said.append(text)  # noqa: E731
        run_job(stage, load(path, overrides), store, progress=say, console=console)

    make_text(load(path), store)
    with killed_at(7):
        do("train_shared", "trunk.lr=0.25")
    do("train_shared", "trunk.steps=8")
    [told] = [text for text in said if "exists under" in text]
    assert told.startswith(
        "train_shared: a checkpoint at step 7 exists under trunk.steps 40, trunk.lr 0.25 (here 8, 0"
    )
    half_done = stages.address(load(path, ("trunk.lr=0.25",)), "train_shared")
    assert former.saved_step(store, half_done) == 7
