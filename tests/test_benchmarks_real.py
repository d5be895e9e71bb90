"""The benchmark on a real model at a toy size: rows are made of one another, scored once, told when
they fail, and the page judges what it shows."""

import gc
import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import real_model
from benchmarks.real_parts import scores, speed, variants
from benchmarks.real_parts.page import Tables, body
from benchmarks.real_parts.scores import Facts, Row
from benchmarks.real_parts.variants import TOTAL, Plan, Standing, Variant
from benchmarks.runner import Runner, StageFailed
from pipeline.families.adapters.build import train_tokenizer
from pipeline.metrics.language import Documents, Scores
from pipeline.protocols import quiet
from pipeline.run.job import run_job

DOMAINS = ("wiki", "legal", "drama")
TAUGHT = ("legal", "drama")
SMALL = {
    "partition.domains": list(DOMAINS),
    "partition.min_tokens": 100,
    "data.min_document_bytes": 1,
    "trunk.context_tokens": 16,
    "trunk.eval_tokens": 32,
    "trunk.statistics_tokens": 96,
    "expert.tokens": 128,
    "expert.lr": 1e-2,
    "expert.eval_tokens": 32,
    "expert.statistics_tokens": 64,
    "expert.warmup_steps": 1,
    "router.prompt_tokens": 4,
    "router.lr": 1e-2,
    "dense.lr": 1e-2,
    "evaluate.tokens_per_domain": 2000,
    "evaluate.bootstrap": 20,
    "runtime.threads": 1,
}


def documents(domain: str, split: str, count: int) -> list[str]:
    """Return rows of words that a domain alone has."""
    draw = random.Random(domain + split)
    words = [f"{domain[:2]}{number}" for number in range(12)]
    rows = []
    for _ in range(count):
        text = " ".join(draw.choices(words, k=20))
        rows.append(json.dumps({"text": text, "domain": domain, "split": split}))
    return rows


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with a model and the text of every domain."""
    folder = tmp_path_factory.mktemp("inputs")
    lines = []
    for domain in DOMAINS:
        for split, count in (("train", 40), ("valid", 5), ("test", 22)):
            lines += documents(domain, split, count)
    (folder / "texts.jsonl").write_text("\n".join(lines), "utf-8")
    tokenizer = train_tokenizer(lines, 320, (), "{{ messages }}")
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    return folder


class Here(Runner):
    """A runner without processes: what it was asked for is remembered."""

    ran: list[tuple[str, ...]] = []  # noqa: RUF012 (emptied by the test)

    def run(self, stage: str, *overrides: str) -> None:
        self.ran.append((stage, *overrides))
        if "expert.rank=16" in overrides:
            raise StageFailed(f"{stage} ended with 2: out of luck")
        cfg = self.config(*overrides)
        for item in cfg.items(stage):
            run_job(stage, cfg, self.store.open(), item, progress=quiet)


@pytest.fixture
def command(inputs, tmp_path, monkeypatch):
    """The arguments of a run in this process."""
    # in a process of all these tests it takes longer than anything else here
    monkeypatch.setattr(gc, "collect", lambda: 0)
    monkeypatch.setattr(real_model, "Runner", Here)
    monkeypatch.setattr(Here, "ran", [])
    settings = SMALL | {"trunk.init": str(inputs / "model")}
    overrides = []
    for key, value in settings.items():
        overrides += ["--override", f"{key}={json.dumps(value)}"]
    places = ["--store", str(tmp_path / "store"), "--out", str(tmp_path / "out")]
    common = ["--taught", *TAUGHT, "--seeds", "2", "--parallel", "1"]
    return [str(inputs / "texts.jsonl"), *places, *common, *overrides]


def page(command: list[str]) -> str:
    """Return the page that a run wrote."""
    (written,) = real_model.Path(command[command.index("--out") + 1]).glob("*.md")
    return written.read_text("utf-8")


def test_rows_are_made_scored_and_judged_and_a_second_run_does_nothing_again(
    command, monkeypatch, capsys
):
    # One that fits this context, which the other does not
    monkeypatch.setattr(variants, "PROMPTS", (8, 128))
    wanted = [
        "dense total",
        "dense total, seed 1",
        "low rank 64",
        "low rank 16",
        "adapter 64",
        "best *",
        "general text only",
    ]
    status = real_model.main([*command, "--only", *wanted])
    assert status == 1  # one failed
    text = page(command)
    assert "out of luck" in text and "low rank 16" in text
    for name in (
        TOTAL,
        f"{TOTAL}, seed 1",
        f"{TOTAL}, mean of 2 seeds",
        "low rank 64: oracle",
        "low rank 64, top-2",
        "low rank 64, no class of the base's",
        "low rank 64, top-2, trained gates",
        "adapter 64: oracle",
        "adapter 64, chosen by 8 tokens",
        "best single (",
    ):
        assert f"| {name}" in text, name
    assert " on wiki alone |" in text
    # 128 first tokens do not fit this context: a row that fails, and none after it
    assert "router.prompt_tokens: 128" in text
    assert "| low rank 64 | 256 | 0.01 |" in text and "Both are reached by" in text

    Here.ran.clear()
    monkeypatch.setattr(scores.Evaluator, "token_nats", None)
    again = [name for name in wanted if name != "low rank 16"]
    real_model.main([*command, "--only", *again])
    assert [ran for ran in Here.ran if "router.prompt_tokens=128" not in ran] == []
    before = [line for line in text.splitlines() if line.startswith("| ")]
    after = [line for line in page(command).splitlines() if line.startswith("| ")]
    assert [line for line in before if "out of luck" not in line] == after
    capsys.readouterr()


class Text:
    """Held-out text of three domains, and a base that loses one nat a byte on each document."""

    def __init__(self):
        self.shards = SimpleNamespace(domains=DOMAINS)
        self.shape = SimpleNamespace(stack_parameters=lambda _ffns: 1000)

    def scores(self, domains):
        starts_n = np.arange(0, 250, 10)
        documents = {name: Documents(name, starts_n, np.full(24, 10)) for name in domains}
        return Scores(documents, 50, 0)

    def base(self):
        return lost(wiki=0, legal=0, drama=0)


def lost(**more: float) -> dict[str, np.ndarray]:
    """Return nats of documents that lose so much more than the base, not all of them the same."""
    uneven_n = np.linspace(0.9, 1.1, 24)
    return {name: 10 + add * uneven_n for name, add in more.items()}


def row(name: str, nats: dict, *, kind="stack", tokens=100, active=1000, seed=0, form="") -> Row:
    """Return a row as if it had been trained and scored."""
    variant = Variant(name, kind, (), TAUGHT, form or name, seed, made_of=form or name)
    return Row(variant, nats, None, Facts(tokens, active_parameters=active))


def test_a_row_reaches_the_aims_by_its_interval_its_worst_untaught_domain_and_its_budget():
    tables = Tables(Text(), TAUGHT)
    tables.add(row(TOTAL, lost(wiki=0.5, legal=-2, drama=-2), kind="dense"))
    tables.add(row("good", lost(wiki=0, legal=-2, drama=-2.1)))
    tables.add(row("forgets", lost(wiki=0.2, legal=-2, drama=-2.1)))
    tables.add(row("behind", lost(wiki=0, legal=-1, drama=-1)))
    tables.add(row("wide", lost(wiki=0, legal=-2, drama=-2.1), active=1200))
    tables.add(row("long", lost(wiki=0, legal=-2, drama=-2.1), tokens=101))
    found = {verdict.name: verdict for verdict in tables.verdicts()}
    assert [name for name, verdict in found.items() if verdict.reaches] == ["good"]
    assert found["forgets"].is_ahead and found["forgets"].forgets[0] == "wiki"
    assert found["forgets"].forgets[1] == pytest.approx(0.02 / np.log(2))
    assert not found["behind"].is_ahead
    assert not found["wide"].is_as_active and not found["long"].is_as_trained
    assert "reached by: **good**" in body(tables)


def test_seeds_are_judged_by_their_mean_and_shown_apart():
    tables = Tables(Text(), TAUGHT)
    for seed, shift in enumerate((-0.4, 0.1)):
        name = f", seed {seed}" if seed else ""
        dense = lost(wiki=0, legal=-1, drama=-1)
        tables.add(row(TOTAL + name, dense, kind="dense", seed=seed, form=TOTAL))
        own = lost(wiki=0, legal=-1 + shift, drama=-1)
        tables.add(row("ours" + name, own, seed=seed, form="ours"))
    (verdict,) = tables.verdicts()
    assert verdict.name == "ours, mean of 2 seeds"
    assert verdict.difference == pytest.approx(-0.15 / 10 / 3 / np.log(2))
    apart = next(line for line in body(tables).splitlines() if line.startswith("| ours | 2 |"))
    assert apart.count("±") == 3


def test_seeds_without_the_first_are_judged_against_dense_of_the_same():
    tables = Tables(Text(), TAUGHT)
    for seed, shift in ((1, -0.4), (2, 0.1)):
        dense = lost(wiki=0, legal=-1, drama=-1)
        tables.add(row(f"{TOTAL}, seed {seed}", dense, kind="dense", seed=seed, form=TOTAL))
        # told of one seed first
        own = lost(wiki=0, legal=-1 + shift, drama=-1)
        tables.add(row(f"ours, seed {seed}", own, seed=seed, form="ours"))
        (verdict,) = tables.verdicts()
        assert verdict.is_as_trained
        assert verdict.name == ("ours, seed 1" if seed == 1 else "ours, mean of 2 seeds")
    assert verdict.difference == pytest.approx(-0.15 / 10 / 3 / np.log(2))
    text = body(tables)
    assert f"- {TOTAL}, mean of 2 seeds, all" in text and "nothing is judged" not in text


def test_forms_that_an_earlier_page_told_have_other_seeds_at_once(capsys):
    told = ("full, no class of the base's", "low rank 64, last third")
    plan = Plan(DOMAINS, TAUGHT, 2, 128, "last:1", "wiki", told)
    steps = {step.key: step for step in plan.steps()}
    best = steps["best form, seed 1"].make([])
    assert best.name == f"{told[0]}, seed 1" and best.form == told[0] and best.made_of == "full"
    assert best.overrides == ("expert.form=full", "trunk.anchor=discard", "seed=1")
    second = steps["second form, seed 1"].make([])
    assert second.made_of == told[1] and "expert.layers=last:1" in second.overrides
    with pytest.raises(SystemExit, match="2"):
        real_model.main(["texts.jsonl", "--best", "full", "half"])
    assert "'half' is no form" in capsys.readouterr().err


def test_the_best_rows_of_two_forms_are_trained_again_with_other_seeds():
    plan = Plan(DOMAINS, TAUGHT, 2, 128, "last:1", "wiki")
    steps = {step.key: step for step in plan.steps()}
    assert steps["best form, seed 1"].make([]) is None

    def scored(name: str, made_of: str, mean: float, *overrides: str) -> Standing:
        return Standing(Variant(name, "stack", overrides, TAUGHT, name, 0, made_of), mean)

    standings = [
        scored("full", "full", 1.2),
        scored("low rank 16", "low rank 16", 1.1),
        scored("low rank 16, top-2", "low rank 16", 1.0, "router.top_k=2"),
        scored("adapter 16", "adapter 16", 1.05, "expert.form=adapter"),
    ]
    best = steps["best form, seed 1"].make(standings)
    assert best.name == "low rank 16, top-2, seed 1" and best.form == "low rank 16, top-2"
    assert best.overrides == ("router.top_k=2", "seed=1")
    assert steps["second form, seed 1"].make(standings).name == "adapter 16, seed 1"
    # by token, adapters are none of those
    gates = steps["best by token, top-2, trained gates"].make(standings)
    assert gates.made_of == "low rank 16" and "router.tokens=64" in gates.overrides


def test_rank_64_is_measured_beside_its_rivals_in_rounds(command, monkeypatch, capsys):
    for name, value in {"PASS": (2, 16), "STEPS": 1}.items():
        monkeypatch.setattr(speed, name, value)
    real_model.main([*command, "--speed", "--rounds", "2"])
    text = page(command)
    assert text.count("| full |") == 1 and "| top-2 of 8 of rank 64 |" in text
    steps = [ran for ran in Here.ran if ran[0] == "train_experts"]
    assert len(steps) == 4 and len(set(steps)) == 4
    verdicts = [line for line in text.splitlines() if line.endswith((": reached", ": missed"))]
    assert len(verdicts) == 3
    capsys.readouterr()
