"""The configuration of LoRA experts: files named by files, what is refused and where, what each
address holds."""

import copy
import json
from pathlib import Path

import pytest
from yaml_text import yaml_text

from pipeline.config import task_data
from pipeline.data.sources.synthetic import KINDS
from pipeline.errors import ConfigError
from pipeline.families.adapters.sections import RANKS
from pipeline.families.load import describes_run, load, parse
from pipeline.hardware import native_dtype
from pipeline.run import stages

CONFIG = Path(__file__).parent.parent / "config"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SYNTHETIC = {"source": "synthetic", "synthetic": {"kind": "color"}}
LORAS = {
    "base": {"build": {}},
    "defaults": {"steps": 5, "lr": 0.5, "max_tokens": 99},
    "experts": [
        {"name": "color", "label": "A", "dataset": SYNTHETIC},
        {
            "name": "ocr",
            "label": "B",
            "dataset": {"source": "jsonl", "path": "rows"},
            "overrides": {"r": 8},
        },
    ],
    "router": {"r": 32, "epochs": 3},
}
DATASET = {
    "sources": [{"expert": "color"}, {"expert": "ocr", "from": "loras"}],
    "neutral": {"seen": ["What is it?"], "held": ["And this?"]},
}
WHOLE = {"name": "small", "family": "lora_vlm", "loras": LORAS, "dataset": DATASET}


def changed(*changes: tuple[str, object]) -> dict:
    """Return the small run with values put at dotted places; numbers are places in lists, +
    appends, None removes."""
    raw = copy.deepcopy(WHOLE)
    for dotted, value in changes:
        *path, last = dotted.split(".")
        inner = raw
        for part in path:
            inner = inner[int(part)] if isinstance(inner, list) else inner.setdefault(part, {})
        if last == "+":
            inner.append(value)
        elif value is None:
            del inner[int(last) if isinstance(inner, list) else last]
        else:
            inner[int(last) if isinstance(inner, list) else last] = value
    return raw


def written(folder: Path, *changes: tuple[str, object]) -> Path:
    """Write a run as three files in three folders, as people do; return the one to load."""
    raw = changed(*changes)
    for name, key in (("inner/loras.json", "loras"), ("other/set.yaml", "dataset")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(
            json.dumps(raw[key], indent=1) if name.endswith("json") else yaml_text(raw[key])
        )
        raw[key] = name
    (folder / "run.yaml").write_text(yaml_text(dict(sorted(raw.items()))))
    return folder / "run.yaml"


def problems(folder: Path, *changes: tuple[str, object]) -> str:
    """Return the text of the error that loading raises."""
    with pytest.raises(ConfigError) as error:
        load(written(folder, *changes))
    return str(error.value)


def addresses(*changes: tuple[str, object]) -> dict[str, str]:
    """Return every job's address by its name."""
    cfg = parse(changed(*changes))
    return {
        stages.label(s, i): here
        for stage in stages.STAGES
        for s, i, here in stages.jobs(cfg, stage)
    }


@pytest.mark.parametrize(
    "path", [CONFIG / "tiny_vlm.yaml", CONFIG / "qwen3vl.yaml"], ids=lambda p: p.stem
)
def test_a_run_is_the_same_after_it_has_travelled(path):
    cfg = load(path)
    again = parse(json.loads(json.dumps(cfg.model_dump(mode="json"))))
    assert again == cfg
    assert list(stages.Addresses(again).reachable()) == list(stages.Addresses(cfg).reachable())
    assert [again.loras.options(name) for name in again.experts] == [
        cfg.loras.options(name) for name in cfg.experts
    ]


def test_the_real_configuration_is_of_seven_experts_over_a_pinned_base():
    cfg = load(CONFIG / "qwen3vl.yaml")
    assert len(cfg.experts) == 7 and cfg.loras.base.model == "Qwen/Qwen3-VL-2B-Instruct"
    assert len(cfg.loras.base.revision) == 40 and cfg.loras.base.build is None
    eight = f"loras.base={{model: Qwen/Qwen3-VL-8B-Instruct, revision: {COMMIT}}}"
    assert load(CONFIG / "qwen3vl.yaml", (eight,)).loras.base.model.endswith("8B-Instruct")


def test_synthetic_kinds_are_those_that_can_be_made():
    assert set(task_data.SYNTHETIC_KINDS) == set(KINDS)


def test_the_old_word_for_synthetic_goes_on_to_be_read():
    """`drawn` was the word in files of before; of both in one section neither is taken."""
    nobody = {"expert": "none", "from": "drawn", "drawn": {"kind": "shape", "seed": 3}}
    label = ("loras.router.none_label", "C")
    old = changed(
        ("loras.experts.0.dataset", {"source": "drawn", "drawn": {"kind": "color"}}),
        ("dataset.sources.+", nobody),
        label,
    )
    new = changed(
        (
            "dataset.sources.+",
            {"expert": "none", "from": "synthetic", "synthetic": {"kind": "shape", "seed": 3}},
        ),
        label,
    )
    assert parse(old) == parse(new)
    assert "drawn" not in parse(old).model_dump_json()
    both = {"source": "synthetic", "drawn": {"kind": "color"}, "synthetic": {"kind": "color"}}
    with pytest.raises(ValueError, match="drawn is the old word for synthetic, and both are given"):
        parse(changed(("loras.experts.0.dataset", both)))


def test_paths_start_at_the_file_that_states_them(tmp_path):
    path = written(
        tmp_path,
        (
            "loras.experts.0.dataset",
            {"source": "folder", "path": "/far/away", "image_root": "../pictures"},
        ),
        ("loras.base", {"model": "./base"}),
        ("dataset.sources.1", {"expert": "ocr", "from": "jsonl", "path": "more.jsonl"}),
    )
    cfg = load(path)
    color, ocr = cfg.loras.experts
    assert (color.dataset.path, color.dataset.image_root) == (
        "/far/away",
        str(tmp_path / "pictures"),
    )
    assert ocr.dataset.path == str(tmp_path / "inner/rows")
    assert cfg.dataset.sources[1].path == str(tmp_path / "other/more.jsonl")
    assert cfg.loras.base.model == str(tmp_path / "inner/base")
    assert {
        ("loras.experts.ocr.dataset.path", ocr.dataset.path),
        ("loras.base.model", cfg.loras.base.model),
    } <= set(cfg.paths())


def test_paraphrases_may_be_a_file_of_their_own(tmp_path):
    path = written(tmp_path, ("dataset.paraphrases", "words.yaml"))
    (tmp_path / "other/words.yaml").write_text("color: {seen: [Which color], held: [What tint]}\n")
    assert load(path).dataset.paraphrases["color"].held == ("What tint",)


def test_a_file_that_names_another_set_of_experts_has_nothing_of_the_first(tmp_path):
    written(tmp_path)
    (tmp_path / "two.json").write_text(json.dumps(LORAS | {"defaults": {"steps": 1}}))
    (tmp_path / "two.yaml").write_text("extends: run.yaml\nloras: two.json\n")
    assert load(tmp_path / "two.yaml").loras.defaults.lr == 1e-4  # and not .5
    (tmp_path / "three.yaml").write_text("extends: run.yaml\nloras: {defaults: {steps: 1}}\n")
    assert load(tmp_path / "three.yaml").loras.defaults.lr == 0.5
    assert load(tmp_path / "run.yaml", ("loras=two.json",)).loras.defaults.lr == 1e-4


def test_an_override_reaches_an_expert_by_its_name(tmp_path):
    path = written(tmp_path)
    cfg = load(path, ("loras.experts.ocr.overrides.epochs=2", "loras.experts.ocr.dataset.limit=7"))
    ocr = cfg.loras.options("ocr")
    assert (ocr.steps, ocr.epochs, ocr.r, cfg.loras.entry("ocr").dataset.limit) == (None, 2.0, 8, 7)
    assert cfg.loras.options("color").steps == 5
    with pytest.raises(ConfigError, match="no entry is named ocd; there are color, ocr"):
        load(path, ("loras.experts.ocd.overrides.epochs=2",))


def test_experts_and_router_have_of_the_defaults_what_they_do_not_state():
    cfg = parse(WHOLE)
    color, ocr, router = (cfg.loras.options(name) for name in ("color", "ocr", "router"))
    assert (color.lr, color.max_tokens, color.steps, color.r) == (0.5, 99, 5, 16)
    assert (ocr.lr, ocr.r) == (0.5, 8)
    assert (router.lr, router.r, router.steps, router.epochs) == (0.5, 32, None, 3.0)
    assert cfg.loras.router.max_tokens == 99


def test_every_problem_is_named_with_its_file_and_line(tmp_path):
    text = problems(
        tmp_path,
        ("loras.experts.1.overrides", {"r": 7, "lrr": 1}),
        ("loras.experts.0.label", "two words"),
        ("loras.defaults.targets", "(q_proj"),
        ("dataset.balance", {"color": 2}),
        ("dataset.sources.0.weigth", 1),
        ("evaluate", {"oracle_gap": 2}),
    )
    assert "(7 problems)" in text
    for line in (
        "loras.experts.ocr.overrides.r: "
        "vLLM serves the ranks 1, 8, 16, 32, 64, 128, 256, 320, 512 (found 7) [",
        "loras.experts.ocr.overrides.lrr: no such setting (found 1); did you mean lr? "
        "[loras.json line ",
        "loras.experts.color.label: ",
        "loras.defaults.targets: not a regular expression: ",
        "dataset.balance: write equal, natural, or a share of every expert, above 0 and together 1",
        "dataset.sources.0.weigth: no such setting (found 1); did you mean weight? [set.yaml line ",
        "evaluate.oracle_gap: must be at most 1 (found 2) [run.yaml line 3]",
    ):
        assert line in text, text


WRONG = {
    "finished without rows": (
        ("loras.experts.0", {"name": "color", "label": "A", "imported": "x"}),
        "loras.experts.color: the router is taught by requests, so a finished adapter (imported) "
        "comes with rows of its task; name them under dataset",
    ),
    "no experts": (("loras.experts", []), "loras.experts: give at least one expert"),
    "name twice": (("loras.experts.1.name", "color"), "loras.experts: two experts are named color"),
    "reserved": (
        ("loras.experts.0.name", "default"),
        "loras.experts: default means something else here",
    ),
    "reserved too": (
        ("loras.experts.0.name", "router"),
        "loras.experts: router means something else here",
    ),
    "no name": (
        ("loras.experts.0.name", "Color"),
        "loras.experts.Color.name: must be a name of lower-case letters",
    ),
    "vLLM's word": (
        ("loras.experts.0.name", "__base__"),
        "loras.experts.__base__.name: must be a name of lower-case letters",
    ),
    "label twice": (("loras.experts.1.label", "A"), "the label 'A' is given twice"),
    "rank": (("loras.defaults.r", 12), "loras.defaults.r: vLLM serves the ranks"),
    "threshold": (
        ("loras.router.threshold", 1.5),
        "loras.router.threshold: must be at most 1",
    ),
    "unknown": (("loras.bases", {}), "loras.bases: no such setting"),
    "no duration": (
        ("loras.defaults.steps", None),
        "loras.experts.color.overrides: give one of steps, epochs, tokens",
    ),
    "two durations": (
        ("loras.defaults.epochs", 1),
        "loras.defaults: give only one of steps, epochs, tokens",
    ),
    "fallback": (
        ("loras.router.fallback", "nobody"),
        "loras.router.fallback: nobody is neither base nor an expert",
    ),
    "top_k": (
        ("loras.router.top_k", 3),
        "loras.router.top_k: 3 experts per answer, but there are 2",
    ),
    "no requests": (
        ("dataset.sources.1", None),
        "dataset.sources: no requests for ocr; add {expert: ocr",
    ),
    "whose": (
        ("dataset.sources.+", {"expert": "odd"}),
        "no such expert odd; loras.experts has color, ocr",
    ),
    "none without label": (
        (
            "dataset.sources.+",
            {"expert": "none", "from": "synthetic", "synthetic": {"kind": "shape"}},
        ),
        "loras.router.none_label: the routing set has requests for none",
    ),
    "label without none": (
        ("loras.router.none_label", "Z"),
        "loras.router.none_label: nothing teaches the router",
    ),
    "none of loras": (
        ("dataset.sources.+", {"expert": "none"}),
        "none has no rows among the experts'",
    ),
    "jsonl where": (("dataset.sources.0.from", "jsonl"), "from is jsonl, so path must be given"),
    "shares": (
        ("dataset.balance", {"color": 1.0}),
        "dataset.balance: name a share for each of color, ocr",
    ),
    "splits": (
        ("dataset.splits", {"train": 0.5}),
        "dataset.splits: train, valid and test are 0.7 together, not 1",
    ),
    "wording of whom": (
        ("dataset.paraphrases", {"odd": {}}),
        "dataset.paraphrases: no such expert odd",
    ),
    "held and seen": (
        ("dataset.neutral.held", ["What is it?"]),
        "held-out wording is seen too: What is it?",
    ),
    "no neutral": (("dataset.neutral", {}), "dataset.neutral: ambiguous_share is above 0"),
    "hub unpinned": (
        ("loras.experts.0.dataset", {"source": "hub", "id": "a/b"}),
        "source is hub, so revision must be given",
    ),
    "base unpinned": (
        ("loras.base", {"model": "a/b"}),
        "revision must be the commit of a/b to pin",
    ),
    "base at a branch": (("loras.base", {"model": "a/b", "revision": "main"}), "(found 'main')"),
    "no base": (
        ("loras.base", {}),
        "give either model (a pretrained base) or build (a random one)",
    ),
    "two bases": (
        ("loras.base.model", "/a"),
        "give either model (a pretrained base) or build (a random one)",
    ),
    "sizes": (("loras.base.build.kv_heads", 3), "heads 4 is not a multiple of kv_heads 3"),
    "areas": (
        ("loras.base.image", {"min_pixels": 9999, "max_pixels": 2000}),
        "min_pixels 9999 is more than",
    ),
    "synthetic what": (
        ("loras.experts.0.dataset.synthetic.kind", "cats"),
        "loras.experts.color.dataset.synthetic.kind: ",
    ),
}


@pytest.mark.parametrize(("change", "wanted"), WRONG.values(), ids=WRONG)
def test_what_is_refused(tmp_path, change, wanted):
    assert wanted in problems(tmp_path, change)


def test_what_does_not_fit_together_is_told_beside_what_is_wrong_alone(tmp_path):
    text = problems(
        tmp_path,
        ("loras.experts.1.label", "A"),
        ("loras.router.threshold", 7),
        ("dataset.sources.1", None),
    )
    for wanted in (
        "the label 'A' is given twice",
        "loras.router.threshold: ",
        "no requests for ocr",
        "(3 problems)",
    ):
        assert wanted in text


def test_a_wrong_default_is_reported_once(tmp_path):
    text = problems(tmp_path, ("loras.defaults.lr", -1))
    assert text.count("greater than 0") == 1 and "loras.defaults.lr" in text


def test_files_that_cannot_be_read_say_why(tmp_path):
    path = written(tmp_path)
    for content, wanted in (
        ("{", "loras.json is not JSON: "),
        ('{"base": 1, "base": 2}', "loras.json is not JSON: base is given twice"),
        ("[]", "loras.json must hold sections"),
    ):
        (tmp_path / "inner/loras.json").write_text(content)
        with pytest.raises(ConfigError, match=wanted):
            load(path)
    (tmp_path / "inner/loras.json").unlink()
    with pytest.raises(ConfigError, match=r"loras\.json does not exist"):
        load(path)


def test_a_family_that_there_is_not():
    with pytest.raises(ConfigError, match=r"there is no \['moe'\]; the families are"):
        parse(WHOLE | {"family": ["moe"]})
    with pytest.raises(ConfigError, match="there is no 'moe'; the families are ffn_moe, lora_vlm"):
        parse({"family": "moe"})


def test_files_about_runs_are_told_from_what_runs_name():
    found = {path.name for path in CONFIG.glob("*.yaml") if not describes_run(path)}
    assert found == {
        *("prices.yaml", "dataset.yaml", "tiny_dataset.yaml", "paraphrases.yaml"),
        *("experiments.yaml", "experiments_small.yaml", "experiments_real.yaml"),
    }


def test_every_rank_of_vllm_is_allowed():
    assert [parse(changed(("loras.defaults.r", r))).loras.defaults.r for r in RANKS] == list(RANKS)


EVERYTHING = set(addresses())
OTHER_DTYPE = {"bf16": "fp32", "fp32": "bf16"}[native_dtype()]  # than auto is here
COLOR, OCR = {"train_experts color"}, {"train_experts ocr"}
JOINED = {"routing", "train_router", "evaluate", "deploy"}
REPORT = {"evaluate", "deploy"}
CHANGES = {
    "an expert's options": (("loras.experts.0.overrides", {"lr": 0.1}), COLOR | REPORT),
    "an expert's label": (("loras.experts.0.label", "C"), JOINED),
    "an expert's data": (
        ("loras.experts.0.dataset.limit", 7),
        {"preprocess color"} | COLOR | JOINED,
    ),
    "an expert's prompt": (
        ("loras.experts.0.prompt", "Say."),
        {"preprocess color"} | COLOR | JOINED,
    ),
    "how answers are judged": (("loras.experts.0.metric", "cer"), REPORT),
    "how long answers are": (("loras.experts.0.max_new_tokens", 9), REPORT),
    "what an expert does": (("loras.experts.0.description", "in other words"), {"deploy"}),
    "the kind of a task": (("loras.experts.0.task", "another kind"), {"deploy"}),
    "the defaults": (("loras.defaults.lr", 0.1), COLOR | OCR | {"train_router"} | REPORT),
    "the router's options": (("loras.router.r", 8), {"train_router"} | REPORT),
    "the router's question": (("loras.router.instruction", "Who?"), {"train_router"} | REPORT),
    "when it is unsure": (("loras.router.threshold", 0.1), REPORT),
    "how many answer then": (("loras.router.top_k", 1), REPORT),
    "who answers then": (("loras.router.fallback", "ocr"), REPORT),
    "the routing set": (("dataset.seed", 1), JOINED),
    "neutral prompts": (("dataset.neutral.seen", ["Well?"]), JOINED),
    "the base": (
        ("loras.base.build.layers", 3),
        {"train_shared", "train_router"} | COLOR | OCR | REPORT,
    ),
    "sizes of pictures": (("loras.base.image", {"max_pixels": 70000}), EVERYTHING),
    "the report": (("evaluate", {"bootstrap": 11}), REPORT),
    "the seed": (("seed", 1), EVERYTHING - {"train_shared"}),
    "arithmetic": (("dtype", OTHER_DTYPE), {"train_router"} | COLOR | OCR | REPORT),
    "the name": (("name", "other"), REPORT),
    "how it runs": (("runtime", {"threads": 3}), set()),
    "where it runs": (("modal", {"max_gpus": 3}), set()),
}


@pytest.mark.parametrize(("change", "wanted"), CHANGES.values(), ids=CHANGES)
def test_a_setting_changes_the_addresses_of_what_reads_it(change, wanted):
    before, after = addresses(), addresses(change)
    assert {job for job in before if before[job] != after[job]} == wanted


def test_neutral_prompts_are_in_the_address_of_an_expert_that_trains_with_them():
    share = ("loras.experts.0.overrides", {"neutral_share": 0.5})
    before, after = addresses(share), addresses(share, ("dataset.neutral.seen", ["Well?"]))
    assert {job for job in before if before[job] != after[job]} == COLOR | JOINED


def test_one_more_task_remakes_nothing_of_the_others():
    entry = {
        "name": "count",
        "label": "C",
        "dataset": {"source": "synthetic", "synthetic": {"kind": "count"}},
    }
    before = addresses()
    after = addresses(("loras.experts.+", entry), ("dataset.sources.+", {"expert": "count"}))
    assert {job for job in after if after[job] != before.get(job)} == {
        "preprocess count",
        "train_experts count",
        *JOINED,
    }


def test_jobs_and_what_they_read():
    none = {"expert": "none", "from": "jsonl", "path": "/none.jsonl"}
    cfg = parse(changed(("dataset.sources.+", none), ("loras.router.none_label", "Z")))
    assert cfg.items("preprocess") == ("color", "ocr", "none")
    assert cfg.items("train_experts") == cfg.experts == ("color", "ocr")
    assert cfg.items("train_dense") == ()
    assert cfg.items("routing") == cfg.items("train_shared") == (None,)
    assert cfg.needs("preprocess", "ocr") == cfg.needs("train_shared", None) == []
    assert cfg.needs("train_experts", "ocr") == [("preprocess", "ocr"), ("train_shared", None)]
    assert cfg.needs("routing", None) == [("preprocess", name) for name in ("color", "ocr", "none")]
    assert cfg.needs("train_router", None) == [("train_shared", None), ("routing", None)]
    for stage in stages.STAGES:  # what a job reads is made before it
        for item in cfg.items(stage):
            assert all(
                list(stages.STAGES).index(need) < list(stages.STAGES).index(stage)
                for need, _ in cfg.needs(stage, item)
            )
    assert cfg.loras.labels == {"color": "A", "ocr": "B", "none": "Z"}
    assert (
        cfg.task("none").dataset.path == "/none.jsonl" and cfg.task("ocr") == cfg.loras.experts[1]
    )


def test_messages_name_the_settings_of_a_training():
    cfg = parse(WHOLE)
    assert cfg.section("train_experts", "ocr") == "loras.experts.ocr.overrides"
    assert cfg.section("train_router", None) == "loras.router"
