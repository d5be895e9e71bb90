"""What only runs where there is a GPU, on one that is pretended: every stage of each family and
what a bundle answers are those of the processor, and nothing needs two devices to be one."""

import io
import os
import threading

import lora_small
import pytest
import torch
from conftest import make_text, tiny_config
from pretended_gpu import pretended_gpu
from rich.console import Console

from pipeline import hardware
from pipeline.__main__ import main
from pipeline.config.base import merge
from pipeline.errors import PipelineError
from pipeline.families.load import load, parse
from pipeline.model.trunk import Trunk
from pipeline.protocols import quiet
from pipeline.run import stages
from pipeline.run.job import run_job
from pipeline.store.artifacts import Store, load_tensors

QUICK = {"steps": 3, "warmup_steps": 1, "eval_every_steps": 2, "eval_tokens": 256}


def of_text(**expert):
    """Return a function of a folder that gives the settings of a small mixture."""

    def settings(folder):
        sections = {
            "trunk": QUICK,
            "expert": QUICK | {"statistics_tokens": 64} | expert,
            "router": QUICK if expert.get("form") != "adapter" else {"steps": 0, "top_k": 1},
            "dense": {"baselines": ["total"] if "layers" in expert else []},
            "evaluate": {"tokens_per_domain": 128, "bootstrap": 10},
            "runtime": {"save_every_s": 1e-9},
        }
        return load(tiny_config(folder, **sections))

    return settings


def of_tasks(_folder):
    """Return the settings of a small mixture of adapters over a model that sees."""
    quick = {"steps": 2, "warmup_steps": 1, "eval_every_steps": 1, "eval_tokens": 60}
    changes = {
        "loras": {"defaults": quick | {"checkpointing": True}},
        "evaluate": {
            "rows_per_task": 8,
            "baseline_rows": 8,
            "consistency_rows": 1,
            "bootstrap": 10,
        },
    }
    return parse(merge(lora_small.SETTINGS, changes))


RUNS = {
    "low_rank": of_text(form="low_rank", rank=4, layers="last:1", checkpointing=True),
    "adapter": of_text(form="adapter", rank=4),
    "tasks": of_tasks,
}


@pytest.fixture(scope="module", params=RUNS)
def both(request, tmp_path_factory):
    """(settings, the processor's store, the GPU's) of a run with its bundle."""
    folder = tmp_path_factory.mktemp(request.param)
    cfg = RUNS[request.param](folder / "data")
    made = []
    for name, gpu in (("processor", False), ("gpu", True)):
        store = Store(folder / name).open()
        done(cfg, store) if not gpu else on_gpu(done, cfg, store)
        made.append(store)
    return cfg, *made


def on_gpu(function, *args):
    """Call a function in a process that sees a GPU."""
    with pretended_gpu():
        return function(*args)


def done(cfg, store):
    """Do every stage of a run, its bundle too."""
    for stage in (*stages.RUN, "deploy"):
        for _, item, _ in stages.jobs(cfg, stage):
            run_job(stage, cfg, store, item, progress=quiet, console=Console(file=io.StringIO()))


def tensor_files(folder):
    """Return the files of tensors below a folder, from there."""
    return {path.relative_to(folder) for path in folder.rglob("*.safetensors")}


def test_every_stage_leaves_what_the_processor_leaves(both):
    cfg, here, there = both
    compared = 0
    for stage in (*stages.RUN, "deploy"):
        for _, item, _ in stages.jobs(cfg, stage):
            folders = []
            for store in (here, there):
                made = run_job(stage, cfg, store, item, progress=quiet)
                folders.append(store.folder(made.address))
                assert made.metrics or stage in ("tokenizer", "preprocess", "evaluate")
            names = [
                {str(path.relative_to(f)) for path in f.rglob("*.safetensors")} for f in folders
            ]
            assert names[0] == names[1]
            for name in names[0]:
                ours, its = (load_tensors(folder / name) for folder in folders)
                torch.testing.assert_close(its, ours, rtol=2e-3, atol=1e-4)
                compared += len(ours)
    assert compared > 40


def test_a_bundle_answers_as_on_the_processor(both, capsys):
    cfg, here, _ = both
    bundle = here.folder(run_job("deploy", cfg, here, progress=quiet).address)
    command = ["generate", "--bundle", str(bundle), "--json", "--max-tokens", "8"]
    for sampling in (("--temperature", "0"), ("--seed", "3", "--top-p", "0.9")):
        told = []
        for call in (main, lambda given: on_gpu(main, given)):
            assert call([*command, *sampling, "what of 3: tide reef"]) == 0
            told.append(capsys.readouterr().out)
        assert told[0] == told[1] and '"finish"' in told[0]


def test_a_training_on_a_gpu_adds_numbers_up_in_one_order(store_path, tmp_path):
    """Or one that was interrupted would go on to other bytes; reports and servers need not."""
    cfg = of_text()(tmp_path / "data")
    store = Store(store_path).open()
    with pretended_gpu():
        make_text(cfg, store)
        before = torch.are_deterministic_algorithms_enabled()
        run_job("train_shared", cfg, store, progress=quiet)
        assert torch.are_deterministic_algorithms_enabled() and not before
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


@pytest.mark.parametrize("budget", [None, "2GB"])
def test_a_job_that_fills_the_gpu_ends_in_what_to_set(budget, store_path, tmp_path, monkeypatch):
    """It is no crash: Modal would try it again, and pay for each try."""
    path = tiny_config(tmp_path / "data")
    cfg = load(path, [] if budget is None else [f"runtime.memory_budget={budget}"])
    store = Store(store_path).open()
    make_text(cfg, store)

    def full(*_args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")

    monkeypatch.setattr(Trunk, "hidden", full)
    most = "64000MB" if budget is None else "1600MB"
    with (
        pretended_gpu(),
        pytest.raises(PipelineError, match=f"set runtime.memory_budget to {most}"),
    ):
        run_job("train_shared", cfg, store, progress=quiet)

    def unknown(*_args):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")

    monkeypatch.setattr(Trunk, "hidden", unknown)
    text = (
        "train_shared: torch has no code for a pretended GPU; run on the processor, with CUDA_VIS"
    )
    with pretended_gpu(), pytest.raises(PipelineError, match=text):
        run_job("train_shared", cfg, store, progress=quiet)
    monkeypatch.setattr(Trunk, "hidden", lambda *_: 1 / 0)
    with pretended_gpu(), pytest.raises(ZeroDivisionError):
        run_job("train_shared", cfg, store, progress=quiet)


def test_what_a_gpu_refuses_is_refused():
    with pretended_gpu():
        there = torch.ones(2, 3, device="cuda")
        with pytest.raises(RuntimeError, match="at least two devices"):
            there + torch.ones(2, 3)
        with pytest.raises(RuntimeError, match="at least two devices"):
            there.index_select(0, torch.tensor([1]))
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        assert there[torch.tensor([1])].device.type == "cuda"  # as torch takes such an index
        assert (there * torch.tensor(2.0)).sum().item() == 12  # and a number
        assert hardware.device() == "cuda"
    assert hardware.device() == "cpu"


def test_gradients_come_back_from_the_gpu_in_every_thread():
    found = []

    def work():
        layer = torch.nn.Linear(3, 2).to("cuda")
        x = torch.ones(4, 3, requires_grad=True)
        with torch.autocast("cuda", torch.bfloat16):
            y = layer(x.to("cuda"))
        y.float().square().sum().backward()
        found.extend((y.dtype, layer.weight.grad.device.type, x.grad.device.type))

    with pretended_gpu():
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert found == [torch.bfloat16, "cuda", "cpu"]
