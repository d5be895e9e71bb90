"""Settings that no product shows: that they reach the Hub, the processes, the recorder and the
loop."""

from types import SimpleNamespace

import numpy as np
import pytest

from pipeline.data.sources import text
from pipeline.data.text import tokenizer
from pipeline.errors import Interrupted, PipelineError
from pipeline.families.ffn_moe import evaluator as evaluating
from pipeline.families.ffn_moe import parts
from pipeline.families.ffn_moe import train as ffn_moe
from pipeline.families.ffn_moe.criteria import train_test_gap
from pipeline.families.ffn_moe.parts import shards_of, stored_trunk
from pipeline.model.trunk import Trunk
from pipeline.protocols import quiet
from pipeline.run import backend, context, job, stages, training
from pipeline.store.artifacts import Manifest, Store
from tests import small

LABELS = ("a", "b")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One whole small run with every dense baseline."""
    return small.trained(tmp_path_factory.mktemp("run") / "run")


def test_the_family_is_looked_up(monkeypatch, tmp_path):
    asked = []

    def stage_function(family, name):
        asked.append((family, name))
        return lambda *_: {}

    monkeypatch.setattr(context, "stage_function", stage_function)
    cfg = small.config()
    job.run_job("tokenizer", cfg, Store(tmp_path), progress=print)
    assert asked == [(cfg.family, "family.tokenizer")]


def test_source_and_hub_decide_what_is_opened(monkeypatch):
    import datasets

    asked = []
    found = datasets.Dataset.from_list([{"text": "x" * 20, "domain": "b"}]).to_iterable_dataset()
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda *a, **k: asked.append((a, k)) or found,
    )
    entry = {
        "dataset": "some/set",
        "subset": "small",
        "split": "valid",
        "revision": "abc",
        "domain": "a",
    }
    cfg = small.config(data={"source": "hub", "hub": [entry]}, partition__domains=LABELS)
    found = [
        (domain, row["text"])
        for domain, files in text.sources(cfg)
        for file in files
        for _, row in file.rows()
    ]
    assert found == [("a", "x" * 20)]
    assert asked == [
        (("some/set", "small"), {"split": "valid", "revision": "abc", "streaming": True})
    ]
    installed = small.config(
        data={"source": "installed", "hub": [entry]}, partition__domains=("manual", "python")
    )
    assert {domain for domain, _ in text.sources(installed)} == {"manual", "python"}


def test_fewer_rows_are_taken_where_they_are_allowed(monkeypatch):
    import datasets

    rows = datasets.Dataset.from_list([{"text": "x" * 20}] * 3).to_iterable_dataset()
    rows.info.splits = datasets.SplitDict.from_split_dict(
        {"train": {"name": "train", "num_examples": 4}}
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda *_a, **_k: rows)
    entry = {"dataset": "some/set", "revision": "abc", "domain": "a"}
    for allowed in (True, False):
        given = entry | {"allow_fewer_rows": allowed}
        cfg = small.config(data={"source": "hub", "hub": [given]}, partition__domains=LABELS)
        [(_, [found])] = [(label, list(files)) for label, files in text.sources(cfg)]
        if allowed:
            assert len(list(found.rows())) == 3
        else:
            with pytest.raises(PipelineError, match=r"some/set\[train\] gave 3 rows, .* says 4"):
                list(found.rows())


def test_revisions_reach_the_hub(monkeypatch, trained):
    import huggingface_hub

    seen = []

    def refuse(*args, revision=None, **_):
        seen.append((args[0], revision))
        raise OSError("nothing is there")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    cfg = small.config(
        trunk__init="some/model",
        trunk__revision="abc",
        tokenizer={"pretrained": "some/tokens", "revision": "def"},
    )
    for ask in (
        lambda: ffn_moe.shared(cfg, trained),
        lambda: tokenizer.pretrained(cfg.tokenizer.pretrained, cfg.tokenizer.revision),
    ):
        with pytest.raises(PipelineError, match="nothing is there"):
            ask()
    assert seen == [("some/model", "abc"), ("some/tokens", "def")]


def test_batches_of_the_report_change_their_number_and_no_figure(trained, monkeypatch):
    sizes, scores, real = {}, {}, parts.token_loss
    for batch in (2, 16):
        cfg = small.config(evaluate__batch_sequences=batch)
        sizes[batch] = []
        monkeypatch.setattr(
            parts,
            "token_loss",
            lambda *a, batch=batch: sizes[batch].append(len(a[2])) or real(*a),
        )
        bench = evaluating.Evaluator(cfg, shards_of(trained, trained.cfg.partition.names), quiet)
        trunk, dummy = stored_trunk(cfg, trained)
        scores[batch] = np.concatenate([bench.token_nats(trunk, dummy, d) for d in small.DOMAINS])
        # training text behind a gap too, of which there is more than a batch
        row = evaluating.NetworkRow(
            name="base", kind="part", trunk=trunk, ffn=dummy, train_tokens=0
        )
        bench.scores = SimpleNamespace(nats_per_token=lambda _row: 0.0)
        scores[batch] = [*scores[batch], train_test_gap(cfg, bench, row).gap]
    assert max(sizes[2]) == 2 and max(sizes[16]) == 16 and sum(sizes[2]) == sum(sizes[16])
    np.testing.assert_allclose(scores[2], scores[16], rtol=1e-4, atol=1e-5)


def test_documents_are_resampled_as_often_as_asked(trained, monkeypatch):
    """Its documents are too few for an interval, so no figure of the report moves."""
    asked = []
    monkeypatch.setattr(evaluating, "Scores", lambda *given: asked.append(given[1:]))
    for resamples in (17, 321):
        cfg = small.config(evaluate__bootstrap=resamples)
        evaluating.Evaluator(cfg, shards_of(trained, trained.cfg.partition.names), quiet)
    assert asked == [(17, cfg.data.seed), (321, cfg.data.seed)]


def test_runtime_reaches_the_training_loop(monkeypatch, tmp_path):
    kept = {}

    def fit(_task, io):
        kept["io"] = io
        return {"kept_step": 0}

    class Recorder:
        def __init__(self, *_args, **named):
            kept["recorder"] = named

        def close(self, ok=True):
            """Do nothing."""

    task = SimpleNamespace(steps=1, bf16=False, export=lambda _step: {})
    monkeypatch.setattr(context, "stage_function", lambda *_: lambda *_: task)
    monkeypatch.setattr(training, "Recorder", Recorder)
    monkeypatch.setattr(training, "fit", fit)
    runtime = {
        "save_every_s": 7.5,
        "log_every_steps": 3,
        "wandb": "offline",
        "wandb_project": "mine",
        "wandb_group": "ours",
    }
    parts = context.StoredParts(small.config(runtime=runtime), Store(tmp_path))
    training.train(context.JobContext("train_shared", None, parts, "x", print))
    assert (kept["io"].save_every_s, kept["io"].log_every_steps) == (7.5, 3)
    assert (kept["recorder"]["wandb_mode"], kept["recorder"]["project"]) == ("offline", "mine")
    assert kept["recorder"]["group"] == "ours"


@pytest.mark.parametrize(
    ("section", "stage"),
    [
        ("trunk", "train_shared"),
        ("expert", "train_experts alpha"),
        ("router", "train_router"),
        ("expert", "train_dense path"),
        ("trunk", "train_dense wide"),
        ("joint", "train_joint dense"),
        ("joint", "train_joint moe"),
    ],
)
def test_means_reach_their_training(trained, section, stage, monkeypatch):
    # Gates count the tokens of every pass, so none is made twice
    divides = section != "router" and not stage.endswith("moe")
    compiled, (name, _, item) = [], stage.partition(" ")
    monkeypatch.setattr(ffn_moe.torch, "compile", lambda loss: compiled.append(loss) or loss)
    settings = {
        "fuse_optimizer": True,
        "clip_norm": 0,
        "compile": True,
        "checkpointing": divides,
    }
    for changes in ({}, {section: settings, "runtime": {"memory_budget": "8GB"}}):
        task = small.MAKERS[name](small.config(**changes), trained, *([item] if item else []))
        memory_plan, given = task.memory_plan, bool(changes)
        assert (memory_plan.fuse_optimizer, memory_plan.compile, bool(compiled)) == (
            given,
            given,
            given,
        )
        assert memory_plan.checkpointing == (given and divides)
        assert memory_plan.budget_bytes == (8 * 10**9 if given else None)
        trunks = [
            c.cell_contents
            for c in (task.loss.__closure__ or ())
            if isinstance(c.cell_contents, Trunk)
        ]
        if section == "joint":
            trunks = [task.loss.__self__.model.trunk]
        assert [trunk.network.is_activation_checkpointing for trunk in trunks] == [
            memory_plan.checkpointing
        ]


@pytest.mark.parametrize(("threads", "wanted"), [(3, 3), (0, 4), ("auto", 4)])
def test_threads_reach_the_job(monkeypatch, tmp_path, threads, wanted):
    given = []

    def start(_stage, _cfg, _store, _item, threads, *_more):
        given.append(threads)
        raise KeyboardInterrupt

    monkeypatch.setattr(backend, "_start", start)
    monkeypatch.setattr(backend, "cores", lambda: 8)
    jobs = backend.Local(Store(tmp_path), parallel=2)
    with pytest.raises(Interrupted, match="goes on from there"):
        jobs.run_jobs("train_experts", small.config(runtime__threads=threads), ["alpha", "beta"])
    assert given == [wanted]


@pytest.mark.parametrize("target", [None, "s3://bucket/path"])
def test_a_bundle_is_uploaded_where_it_is_asked_to_go(monkeypatch, tmp_path, target):
    asked = []

    class Asked:
        def __init__(self, where):
            self.where = where

        def publish(self, folder, address, keep, _progress):
            asked.append((folder, address, self.where, keep))

    monkeypatch.setattr(job, "Versions", Asked)
    cfg, store = small.config(deploy={"upload": target, "keep": 7}), Store(tmp_path)
    folder = store.begin(stages.address(cfg, "deploy"))
    store.finish(Manifest(folder.name, "deploy", None, {}, {}))
    assert job.run_job("deploy", cfg, store, progress=print).address == folder.name
    assert asked == ([(folder, folder.name, target, 7)] if target else [])
