"""The benchmarks' pieces at a toy size: every contender trains and assembles, and the tables say
what was measured."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import assemble, measuring, memory, train_speed
from benchmarks.measuring import SIZES, Contender, Job
from benchmarks.peers import nanogpt, ours, plain, tokens
from benchmarks.peers.__main__ import work
from benchmarks.watching import Watch

TOY = SIZES["toy"]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A job on prepared text, trunk and three experts."""
    made = Job(
        "ours",
        "prepare",
        TOY,
        str(tmp_path_factory.mktemp("work")),
        steps=3,
        skip=1,
        experts=3,
        domains=3,
    )
    assert ours.prepare(made) == 3
    return made


@pytest.mark.parametrize("task", ["trunk", "expert", "router"])
def test_ours_reports_every_step_and_its_prediction(job, task):
    found = work(ours, replace(job, task=task, item=1, overrides=("dtype=fp32",)))
    assert found["steps"] == 3 and 4 < found["nats"] < 8
    assert found["tokens_per_s"] == pytest.approx(TOY.step_tokens / found["step_s"])
    assert 0 <= found["fit_mb"] <= found["peak_mb"] and found["predicted_mb"] > 0


@pytest.mark.parametrize("task", ["trunk", "expert"])
@pytest.mark.parametrize("peer", [plain, nanogpt])
def test_loops_of_our_own_learn_and_freeze_what_they_should(job, peer, task, monkeypatch):
    moved, loop = {}, peer.loop

    def watched(job, watch, model, *rest, **more):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        loop(job, watch, model, *rest, **more)
        moved.update({n: not torch.equal(before[n], p) for n, p in model.named_parameters()})

    monkeypatch.setattr(peer, "loop", watched)
    watch = Watch()
    peer.train(replace(job, task=task, micro=3, steps=12), watch)  # 3 + 1 sequences
    assert watch.nats[-1] < watch.nats[0] and len(watch.nats) == 12
    assert {n for n, m in moved.items() if m} == {
        n for n in moved if task == "trunk" or ".mlp." in n
    }


def test_accumulated_gradients_are_those_of_the_whole_batch(job):
    losses = []
    for micro in (None, 3):
        watch = Watch()
        plain.train(replace(job, task="trunk", micro=micro, steps=3), watch)
        losses.append(watch.nats)
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_trainer_counts_every_step(job):
    pytest.importorskip("accelerate")
    from benchmarks.peers import trainer

    found = work(trainer, replace(job, task="expert", micro=2))
    assert found["steps"] == 3 and 4 < found["nats"] < 8


def test_networks_have_equal_feed_forward_parameters():
    s = SIZES["prior-art"]
    assert 3 * s.d_model * s.d_ff == pytest.approx(2 * s.d_model * s.gelu_d_ff, rel=0.01)
    assert s.layers * 2 * s.d_model * s.gelu_d_ff == 8_388_608


def test_bundles_are_made_and_opened_by_ours_and_the_plain_loop(job):
    here = replace(job, experts=2)
    ours.prepare(here)
    assert plain.prepare(here) == 2
    for peer, name in ((ours, "ours-2"), (plain, "plain-2.pt")):
        (Path(job.work) / "bundles").mkdir(exist_ok=True)
        made, opened = (
            work(peer, replace(here, task="bundle")),
            work(peer, replace(here, task="open")),
        )
        assert (Path(job.work) / "bundles" / name).exists()
        assert (
            made["bytes"] > 2 * 4 * 3 * TOY.d_model * TOY.d_ff and opened["bytes"] >= made["bytes"]
        )


def test_what_does_not_fit_is_declined_with_its_reason(job):
    found = work(ours, replace(job, task="expert", overrides=("expert.lr=-1",)))
    assert "expert.lr" in found["refused"]


def test_low_rank_experts_train_on_a_pinned_model(job, tmp_path):
    here = replace(job, work=str(tmp_path), pinned=True, task="low_rank")
    here = replace(here, overrides=("expert.rank=2",))
    assert work(ours, replace(here, task="prepare")) == {"made": 0}
    assert (tmp_path / "train_shared" / "pin.json").exists()
    found = work(ours, here)
    assert found["steps"] == 3 and found["predicted_mb"] > 0


def test_a_fresh_process_prints_what_it_measured_and_one_that_fails_is_told(job, monkeypatch):
    found = measuring.run(replace(job, peer="plain", task="expert"))
    assert found["steps"] == 3 and found["imports_mb"] > 50
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(SystemExit, match=r"plain failed at expert \(exit status 1\)"):
        measuring.run(replace(job, peer="plain", task="expert"))


def test_memory_sees_tensors_and_tells_mapped_data_apart(tmp_path):
    watch = Watch()
    held = torch.ones(10_000_000)  # 40 MB
    path = tmp_path / "data.bin"
    path.write_bytes(bytes(20_000_000))
    mapped = torch.from_file(str(path), size=5_000_000)
    assert mapped.sum() == 0 and held.sum() > 0
    watch.mark("here")
    del held, mapped
    found = watch.result(1)
    assert 58 < found["here_mb"] < 70 and found["here_mb"] <= found["peak_mb"]
    assert 19.9 < found["data_mb"] < 21 and 19.9 < found["data_share_mb"] < 21


def test_rates_leave_the_first_steps_out():
    watch = Watch(skip=2)
    watch.start_s, watch.ends_s = 0.0, [10.0, 20.0, 21.0, 22.0]
    found = watch.result(100)
    assert (
        found["step_s"] == 1.0 and found["tokens_per_s"] == 100.0 and found["first_step_s"] == 10.0
    )


def test_text_can_be_learned_and_is_the_same_every_time():
    ids_N = tokens.draw(64, 5000, seed=1)
    assert (ids_N == tokens.draw(64, 5000, seed=1)).all()
    assert ids_N.min() >= 1 and ids_N.max() < 64
    follows = ids_N[1:] == 1 + (ids_N[:-1] * 31 + 1) % 63
    assert 0.5 < follows.mean() < 0.7


def test_contenders_are_read_from_their_names(job):
    found = [Contender.of(n, job).job for n in ("ours", "trainer:4", "nanogpt-compiled")]
    assert [(j.peer, j.micro, j.compiled) for j in found] == [
        ("ours", None, False),
        ("trainer", 4, False),
        ("nanogpt", None, True),
    ]
    assert found[1].sizes == TOY


@pytest.mark.parametrize(
    ("text", "wanted"), [("172MB", 172), ("1GB", 1000), ("512MiB", 536.870912)]
)
def test_budgets_are_read_in_their_units(text, wanted):
    assert memory.megabytes(text) == pytest.approx(wanted)


def rate(peer: str, task: str) -> float:
    """Return a made-up rate: ours is 10 times as fast as anyone, and an expert twice as fast as a
    trunk."""
    return (1000.0 if peer == "ours" else 100.0) * (2 if task == "expert" else 1)


def pretend(job: Job) -> dict:
    """Return what a job might have measured."""
    both = {
        "seconds": 2.0,
        "bytes": 10**7,
        "steps": 3,
        "nats": 5.0,
        "first_step_s": 1.0,
        "step_s": 0.1,
    }
    sizes = {
        "peak_mb": 160.0,
        "fit_mb": 150.0,
        "file_mb": 20.0,
        "data_mb": 10.0,
        "data_share_mb": 5.0,
    }
    return (
        both
        | sizes
        | {"predicted_mb": 150.0, "flops_per_s": 1e12, "tokens_per_s": rate(job.peer, job.task)}
    )


PROGRAMS = {
    train_speed: [],
    assemble: ["--experts", "2", "4"],
    memory: ["--experts", "2", "4", "--budgets", "none", "172MB"],
}


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.__name__.rpartition(".")[2])
def test_programs_write_a_dated_result_and_fail_when_a_target_is_missed(
    program, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(measuring, "run", pretend)
    monkeypatch.setattr(memory, "run", pretend)
    monkeypatch.setattr(sys, "argv", ["x", "--work", "/secret/place"])
    command = [
        "--rounds",
        "2",
        "--work",
        str(tmp_path),
        "--out",
        str(tmp_path / "out.md"),
        *PROGRAMS[program],
    ]
    assert program.main(command) == 0
    shown, written = capsys.readouterr().out, (tmp_path / "out.md").read_text()
    assert shown.strip() in written and "/secret" not in written and "torch" in written
    assert "ModularForge's" not in shown and "missed" not in shown

    monkeypatch.setattr(measuring, "run", lambda job: pretend(job) | _poor(job))
    monkeypatch.setattr(memory, "run", lambda job: pretend(job) | _poor(job))
    assert program.main(command) == 1
    capsys.readouterr()


def _poor(job: Job) -> dict:
    return {"tokens_per_s": 100.0, "peak_mb": 100.0 * job.experts}


def test_mfu_is_the_share_of_the_rate_of_products_in_the_same_round(job, monkeypatch, capsys):
    monkeypatch.setattr(measuring, "run", pretend)
    assert train_speed.main(["--rounds", "1", "--work", job.work]) == 0
    trunk_mflop = 6 * (
        8.405 + 4.194 + 8.389 + 4 * 512 * 512 / 1e6
    )  # 6 per weight; attention of half the context
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| ours |"))
    mfu = float(row.split("|")[4])
    assert mfu == pytest.approx(1000 * trunk_mflop * 1e6 / 1e12, abs=0.01)
    monkeypatch.setattr("benchmarks.peers.__main__.product_flops_per_s", lambda bf16: 7.0)
    assert work(ours, replace(job, task="product")) == {"flops_per_s": 7.0}


@pytest.mark.parametrize(("size", "millions"), [("100m", 110), ("350m", 342), ("1b", 992)])
def test_larger_sizes_have_the_parameters_of_their_names(size, millions):
    pytest.importorskip("accelerate")
    from benchmarks.peers import gpt, trainer

    with torch.device("meta"):
        networks = trainer.network(SIZES[size]), gpt.GPT(SIZES[size], bias=False)
    for network in networks:
        assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(
            millions, rel=0.01
        )
    assert SIZES[size].vocab_size < 2**16  # which tokens.stream reads
    trunk, expert = (SIZES[size].flops_per_token(task) for task in ("trunk", "expert"))
    assert 6e6 * millions < trunk < 7.5e6 * millions and 0.6 < expert / trunk < 0.9


def test_a_gpu_is_asked_for_its_peak_and_waited_for(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: asked.append("reset"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: asked.append("wait"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3_000_000)
    watch = Watch(skip=0, device="cuda")
    watch.step(1.0)
    watch.mark("here")
    found = watch.result(8)
    assert asked == ["reset", "wait"] and found["here_mb"] == found["peak_mb"] == 3.0


@pytest.mark.parametrize(("device", "seen"), [("cpu", ""), ("cuda", "3")])
def test_contenders_see_one_gpu_or_none(job, device, seen, monkeypatch):
    def started(command, env, **_):
        assert env["CUDA_VISIBLE_DEVICES"] == seen and json.loads(command[-1])["device"] == device
        return SimpleNamespace(returncode=0, stdout="{}", stderr="")

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4")
    monkeypatch.setattr(measuring.subprocess, "run", started)
    assert measuring.run(replace(job, device=device)) == {}


@pytest.mark.parametrize("program", [train_speed, memory], ids=["train_speed", "memory"])
def test_a_gpu_that_is_not_there_is_refused_and_one_that_is_there_is_named(
    program, monkeypatch, tmp_path, capsys
):
    command = [
        "--device",
        "cuda",
        "--rounds",
        "1",
        "--work",
        str(tmp_path),
        "--out",
        str(tmp_path / "out.md"),
    ]
    monkeypatch.setattr(measuring, "found_device", lambda: "cpu")
    with pytest.raises(SystemExit):
        program.main(command)
    assert "--device: cuda needs a GPU that PyTorch sees" in capsys.readouterr().err

    jobs = []
    monkeypatch.setattr(measuring, "found_device", lambda: "cuda")
    monkeypatch.setattr(measuring, "run", lambda job: jobs.append(job) or pretend(job))
    monkeypatch.setattr(memory, "run", measuring.run)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _number: "Test GPU")
    assert program.main([*command, *PROGRAMS[program], "--modularforge", "/nowhere"]) == 0
    assert {job.device for job in jobs if job.task not in ("prepare", "bundle", "open")} == {"cuda"}
    assert {job.device for job in jobs if job.task in ("bundle", "open")} <= {"cpu"}
    assert "modularforge" not in {job.peer for job in jobs if job.task == "expert"}
    written = (tmp_path / "out.md").read_text()
    assert "Test GPU" in written and "max_memory_allocated" in written and "VmHWM" not in written
    capsys.readouterr()


def test_options_that_make_no_sense_are_refused(capsys):
    for command in (
        ["--contenders", "nobody"],
        ["--contenders", "modularforge"],
        ["--rounds", "0"],
    ):
        with pytest.raises(SystemExit):
            train_speed.main(command)
    assert "there are ours, plain" in capsys.readouterr().err


STAND_IN = {  # as much of ModularForge's interface as its driver uses
    "config": "from types import SimpleNamespace as N\n"
    "class ModularForgeConfig:\n"
    "    @staticmethod\n"
    "    def from_yaml(path):\n"
    "        return N(model=N(), training=N(num_workers=0), data=N(), assembly=N())\n",
    "data.dataset": "class TextDataset(list):\n"
    "    def __init__(self, texts, tokenizer, length):\n"
    "        ids = tokenizer.encode(texts[0], add_special_tokens=True)\n"
    "        super().__init__(ids[i : i + length] for i in range(0, len(ids) - length, length))\n",
    "model.assembled_model": "AssembledMoEModel = None\n",
    "model.module_trainer_model": "ModuleTrainerModel = None\n",
    "model.shared": "SharedComponents = None\n",
    "assembly.assembler": "StreamingAssembler = None\n",
    "training.module_trainer": "ModuleTrainer = None\n",
    "training.shared_trainer": "import torch\n"
    "class SharedTrainer:\n"
    "    def __init__(self, cfg):\n"
    "        self.cfg = cfg\n"
    "    def train(self, loader, valid, folder):\n"
    "        weight = torch.nn.Parameter(torch.ones(1))\n"
    "        optimizer = torch.optim.AdamW([weight])\n"
    "        for _ in loader:\n"
    "            weight.sum().backward()\n"
    "            optimizer.step()\n"
    "        return {'final_train_loss': 7.0, 'peak_memory_mb': 0.9}\n",
}


def test_modularforge_is_driven_through_its_own_interface(job, tmp_path):
    for name, text in STAND_IN.items():
        path = tmp_path / "modularforge" / f"{name.replace('.', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    found = measuring.run(
        replace(job, peer="modularforge", task="trunk", modularforge=str(tmp_path))
    )
    assert (found["steps"], found["nats"], found["own_memory_claim_mb"]) == (3, 7.0, 0.9)


def test_a_job_survives_its_way_into_a_process(job, monkeypatch):
    sent = {}

    def started(command, **_):
        sent.update(json.loads(command[-1]))
        return SimpleNamespace(returncode=0, stdout='noise\n{"made": 1}\n', stderr="")

    monkeypatch.setattr(measuring.subprocess, "run", started)
    assert measuring.run(job) == {"made": 1}
    assert (
        Job(
            **sent
            | {"sizes": measuring.Sizes(**sent["sizes"]), "overrides": tuple(sent["overrides"])}
        )
        == job
    )
