"""Configuration files: how they are put together, and that every problem is named at once with its
place."""

from copy import deepcopy
from pathlib import Path

import pytest

from pipeline.config.base import Section, is_hashed, merge
from pipeline.config.files import parse_yaml
from pipeline.config.fit import FitConfig
from pipeline.errors import ConfigError
from pipeline.families.ffn_moe.config import FfnMoeConfig
from pipeline.families.load import describes_run, load
from pipeline.run.stages import address
from tests import small

SHIPPED = sorted(filter(describes_run, (Path(__file__).parent.parent / "config").glob("*.yaml")))


def write(path: Path, text: str) -> Path:
    """Write a configuration file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")
    return path


def problems(path: Path, *overrides: str) -> str:
    """Return the text of the error that loading raises."""
    with pytest.raises(ConfigError) as error:
        load(path, overrides)
    return str(error.value)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_every_shipped_configuration_loads(path):
    assert load(path).name


@pytest.mark.parametrize("text", ["", "# a comment\n", "{}", "---\n"])
def test_a_file_that_states_nothing_is_no_wish_for_hours_of_defaults(tmp_path, text):
    path = write(tmp_path / "a.yaml", text)
    assert "a.yaml states nothing" in problems(path)
    assert load(path, ("seed=0",)) == FfnMoeConfig()
    extending = write(tmp_path / "b.yaml", "extends: a.yaml\nname: mine\n")
    assert load(extending).name == "mine"


def test_all_problems_at_once_each_with_name_and_line(tmp_path):
    path = write(
        tmp_path / "bad.yaml",
        "trunk:\n  steps: 10\n  lr: -1\n  layers: two\nexpert:\n  steps: 5\n  init: old\n"
        "rooter:\n  top_k: 2\n"
        "router:\n  steps: 1\n  init: rows\n  top_kk: 3\n",
    )
    text = problems(path, "dense.lr=no")
    assert "(7 problems)" in text
    for line in (
        "trunk.lr: must be greater than 0 or 'auto' (found -1) [bad.yaml line 3]",
        "trunk.layers: must be a whole number (found 'two') [bad.yaml line 4]",
        "expert.init: must be 'trunk' or 'fresh' (found 'old') [bad.yaml line 7]",
        "rooter: no such setting; did you mean router? [bad.yaml line 8]",
        "router.top_kk: no such setting (found 3); did you mean top_k? [bad.yaml line 13]",
        "dense.lr: must be a number or 'auto' (found 'no') [--override]",
        "router.init: rows are learned by coordinated experts; set expert.coordinate: true",
    ):
        assert f"\n  {line}" in text


def test_a_wrong_setting_invents_no_problem_between_sections(tmp_path):
    path = write(
        tmp_path / "a.yaml",
        "trunk:\n  steps: 1\n  lr: -1\n  anchor: keep\n"
        "expert:\n  steps: 1\n  coordinate: true\n  lr: -1\n"
        "router:\n  steps: 1\n  init: rows\n  top_k: 5\n",
    )
    text = problems(path)
    assert "(2 problems)" in text and "trunk.lr" in text and "expert.lr" in text


def test_lines_are_of_lists_too(tmp_path):
    text = problems(
        write(tmp_path / "a.yaml", "name: x\ndata:\n  source: files\n  files:\n    - domain: a\n")
    )
    assert "data.files.0.paths: must be given [a.yaml line 4]" in text


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("trunk: [1, 2", "is not YAML"),
        ("? [{trunk: 1}]\n: 2", "is not YAML: a key must be a name"),
        ("- a\n- b", "must hold sections"),
        ("extends: [a.yaml]", "extends must be the path of one file"),
        (
            "extends: gone.yaml",
            "gone.yaml does not exist. What it names starts at the folder of a.yaml",
        ),
        ("extends: ../gone.yaml", "extends ../gone.yaml, but"),
        ("extends: a.yaml", "extends itself"),
        ("extends: b/back.yaml", "extends itself, by way of a.yaml -> back.yaml"),
        ("trunk:", "trunk: must be a section of its own"),
        ("trunk: &a {x: [*a]}", "an alias (*name) stands within what it names"),
        ("trunk: " + "[" * 2000, "is not YAML: it is nested too deep"),
        ("joint: {layers: [true]}", "joint.layers: must be a whole number"),
        ("trunk: {steps: .nan}", "trunk.steps"),
        ("trunk: {steps: 1, lr: .inf}", "trunk.lr: must be a finite number or 'auto'"),
    ],
)
def test_files_that_cannot_be_read_say_why(tmp_path, text, wanted):
    write(tmp_path / "b" / "back.yaml", "extends: ../a.yaml")
    assert wanted in problems(write(tmp_path / "a.yaml", text))


def test_a_file_that_is_not_there_points_at_those_that_are(tmp_path):
    assert "config/" in problems(tmp_path / "gone.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    assert "is not UTF-8 (byte 0); save it as UTF-8" in problems(tmp_path / "bytes.yaml")
    assert "is a folder; name the file in it" in problems(tmp_path)


def test_a_chain_of_files_is_laid_on_top_of_each_other(tmp_path):
    write(
        tmp_path / "base" / "deep.yaml",
        "seed: 1\ntrunk: {steps: 100, lr: 0.5, layers: 3}\nrouter: {steps: 7}",
    )
    write(tmp_path / "base" / "middle.yaml", "extends: deep.yaml\nseed: 2\ntrunk: {layers: 5}")
    cfg = load(write(tmp_path / "top.yaml", "extends: base/middle.yaml\ntrunk: {d_model: 96}"))
    assert (cfg.seed, cfg.trunk.steps, cfg.trunk.lr, cfg.trunk.layers, cfg.trunk.d_model) == (
        2,
        100,
        0.5,
        5,
        96,
    )
    assert cfg.router.steps == 7


@pytest.mark.parametrize("key", ["steps: 5", "epochs: 2", "tokens: 640"])
def test_one_duration_replaces_another(tmp_path, key):
    write(tmp_path / "base.yaml", "trunk: {steps: 100}\nexpert: {tokens: 5}")
    path = write(tmp_path / "a.yaml", f"extends: base.yaml\ntrunk: {{{key}}}")
    name, _, value = key.partition(": ")
    found = load(path).trunk
    assert [n for n in ("steps", "epochs", "tokens") if getattr(found, n) is not None] == [name]
    assert getattr(found, name) == float(value) and load(path).expert.tokens == 5
    assert (
        load(path, ("trunk.epochs=3",)).trunk.epochs == 3
        and load(path, ("trunk.epochs=3",)).trunk.steps is None
    )


def test_durations(tmp_path):
    assert "give only one of steps, epochs, tokens" in problems(
        write(tmp_path / "two.yaml", "trunk: {steps: 1, tokens: 5}")
    )
    text = problems(
        write(tmp_path / "none.yaml", "trunk: {layers: 1}\nexpert: {lr: 1}\nrouter: {top_k: 1}")
    )
    assert all(
        f"{s}: give one of {s}.steps, {s}.epochs, {s}.tokens" in text
        for s in ("trunk", "expert", "router")
    )
    fit = FitConfig(epochs=2.5, batch_sequences=4)
    assert (
        fit.resolve_steps(10, 160) == 10
        and FitConfig(tokens=400, batch_sequences=4).resolve_steps(10, 0) == 10
    )
    assert (
        FitConfig(tokens=1).resolve_steps(100, 0) == 1
        and FitConfig(steps=0).resolve_steps(1, 1) == 0
    )


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("trunk.lr=3e-4", 3e-4),
        ("trunk.lr=1E2", 100.0),
        ("trunk.lr=.5", 0.5),
        ("trunk.layers=1_2", 12),
        ("trunk.domains=[python, manual]", ("python", "manual")),
        ("trunk.domains=null", None),
        ("trunk.init=~", None),
        ("trunk.init=no", "no"),
        ("trunk.init=on", "on"),
        ("trunk.init=a=b.c", "a=b.c"),
        ("trunk.tie_embeddings=false", False),
        ("trunk.tie_embeddings=True", True),
        ("trunk.init='1e3'", "1e3"),
    ],
)
def test_overrides_are_yaml_1_2(tmp_path, override, wanted):
    path = write(
        tmp_path / "a.yaml", "trunk: {steps: 1}\ntokenizer: {pretrained: x}\ndense: {baselines: []}"
    )
    value = getattr(load(path, (override,)).trunk, override.partition("=")[0].partition(".")[2])
    assert value == wanted and type(value) is type(wanted)


def test_later_overrides_win_and_reach_into_sections(tmp_path):
    path = write(tmp_path / "a.yaml", "router: {steps: 1, temperature: {start: 3}}")
    cfg = load(path, ("seed=1", "seed=2", "router.temperature.end=0.5", "router.tokens=64"))
    assert cfg.seed == 2 and (cfg.router.temperature.start, cfg.router.temperature.end) == (3, 0.5)
    assert cfg.router.tokens == 64 and cfg.router.steps is None


@pytest.mark.parametrize("override", ["seed", "=3", "trunk..lr=1", ".seed=1"])
def test_an_override_that_is_not_one_is_refused(tmp_path, override):
    assert "section.field=value" in problems(write(tmp_path / "a.yaml", ""), override)


def test_an_override_may_be_wrong_in_every_other_way(tmp_path):
    path = write(tmp_path / "a.yaml", "")
    assert "is not YAML" in problems(path, "seed=[1")
    assert "trunk.lrr: no such setting (found 1); did you mean lr? [--override]" in problems(
        path, "trunk.steps=1", "trunk.lrr=1"
    )
    assert "extends: no such setting" in problems(path, "extends=b.yaml")
    assert "seed: " in problems(path, "seed.deep=1")


def test_paths_start_at_the_file_that_names_them(tmp_path, monkeypatch):
    paths = "[text/*.txt, /abs/*.txt, 's3://bucket/*.txt']"
    files = f"data: {{source: files, files: [{{paths: {paths}, domain: python}}]}}\n"
    write(
        tmp_path / "base" / "base.yaml",
        files + "partition: {domains: [python]}\nrouter: {steps: 1, top_k: 1}",
    )
    top = write(tmp_path / "elsewhere" / "top.yaml", "extends: ../base/base.yaml")
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / "base" / "base.yaml", top, Path("elsewhere/top.yaml")):
        assert load(path).data.files[0].paths == (
            f"{tmp_path}/base/text/*.txt",
            "/abs/*.txt",
            "s3://bucket/*.txt",
        )
    override = "data.files=[{paths: [mine.txt], domain: python}]"
    assert load(top, (override,)).data.files[0].paths == (f"{tmp_path}/elsewhere/mine.txt",)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("router: {steps: 1, top_k: 5}", "router.top_k: 5 experts per token, but the stack has 4"),
        (
            "expert: {steps: 1, domains: [python]}",
            "router.top_k: 2 experts per token, but the stack has 1; lower it, or name more in "
            "expert.domains",
        ),
        (
            "expert: {steps: 1, domains: [python, cobol]}",
            "expert.domains: no such domain cobol; partition has python",
        ),
        ("trunk: {steps: 1, domains: [cobol]}", "trunk.domains: no such domain cobol"),
        ("trunk: {steps: 1, domains: [python, python]}", "trunk.domains: a domain is named twice"),
        ("partition: {domains: [a, a]}", r"domains must name each label once, and has a twice"),
        ("partition: {domains: []}", "domains must name at least one label"),
        (
            "partition: {by: random, count: 2}\n"
            "expert: {steps: 1, domains: [random-0, random-1, random-2]}",
            "expert.domains: 3 experts, but the partition has 2 domains",
        ),
        ("router: {steps: 1, init: rows}", "set expert.coordinate: true"),
        (
            "trunk: {steps: 1, init: m}\ntokenizer: {pretrained: m}",
            "dense.baselines: wide trains from zero",
        ),
        (
            "trunk: {steps: 1, d_model: 100, heads: 3}",
            "d_model 100 is not a multiple of heads 3; set head_dim",
        ),
        ("trunk: {steps: 1, heads: 4, kv_heads: 3}", "heads 4 is not a multiple of kv_heads 3"),
        ("trunk: {steps: 1, d_model: 90, heads: 10}", "must be even"),
        ("data: {source: files}", "data.files needs at least one entry"),
        ("data: {source: hub}", "data.hub needs at least one entry"),
        ("name: 'a/b'", "name: must be a name of at most 64 letters"),
    ],
)
def test_what_does_not_fit_together_is_named(tmp_path, text, wanted):
    assert wanted in problems(write(tmp_path / "a.yaml", text))


def test_an_anchor_makes_room_for_one_more(tmp_path):
    path = write(
        tmp_path / "a.yaml", "trunk: {steps: 1, anchor: keep}\nrouter: {steps: 1, top_k: 5}"
    )
    assert load(path).router.top_k == 5
    assert "the stack has 5" in problems(path, "router.top_k=6")


def test_a_configuration_never_changes():
    cfg = FfnMoeConfig()
    for section, name in ((cfg, "seed"), (cfg.trunk, "lr"), (cfg.router.temperature, "start")):
        with pytest.raises(ValueError, match="frozen"):
            setattr(section, name, 1)


def test_merge_changes_neither_side():
    base, over = {"a": {"steps": 1, "x": [1]}, "b": 2}, {"a": {"tokens": 3}, "b": {"c": 4}}
    kept = deepcopy([base, over])
    assert merge(base, over) == {"a": {"tokens": 3, "x": [1]}, "b": {"c": 4}}
    assert [base, over] == kept


def test_a_mapping_over_a_list_is_laid_on_the_entries_it_names():
    base = {"a": [{"name": "x", "steps": 1}, {"name": "y"}]}
    assert merge(base, {"a": {"x": {"tokens": 2}}}) == {
        "a": [{"name": "x", "tokens": 2}, {"name": "y"}]
    }
    assert merge(base, {"a": [{"name": "z"}]}) == {"a": [{"name": "z"}]}
    with pytest.raises(ConfigError, match="a: no entry is named z; there are x, y"):
        merge(base, {"a": {"z": {}}})


def test_names_of_domains_follow_the_partition():
    for by, names in (
        ("clusters", ("cluster-0", "cluster-1")),
        ("random", ("random-0", "random-1")),
        ("curriculum", ("level-0", "level-1")),
    ):
        assert FfnMoeConfig(partition={"by": by, "count": 2}).experts == names
    assert FfnMoeConfig(expert={"steps": 1, "domains": ["manual", "python"]}).experts == (
        "manual",
        "python",
    )


ELSEWHERE = {  # a `not_hashed` field leaves its own stage alone and moves the stages that read it
    "trunk.anchor": ("keep", "train_shared", "train_router"),
    "expert.domains": (("headers", "python"), "train_shared", "train_router"),
    "partition.overlap": (0.3, "preprocess", "train_experts"),
    "dense.baselines": (("path",), "train_shared", "evaluate"),
    "dense.domains": (("python",), "train_router", "train_dense"),
    "joint.models": (("dense",), "train_shared", "evaluate"),
    "expert.imported": ({"python": "packed"}, "train_shared", "train_experts"),
}
# Beside an import alone; test_expert_package.py has its address
BESIDE = {"expert.imported_text"}
# And one that changes no result moves nothing; that it changes none is shown in test_settings.py
NOWHERE = {
    "trunk.checkpointing": True,
    "expert.checkpointing": True,
    "router.checkpointing": False,
    "joint.checkpointing": True,
    "tokenizer.max_lost_share": 0.5,
    "expert.imported_bytes": 10**9,
    "expert.imported_slack": 1.0,
}


def changed(dotted: str, value) -> FfnMoeConfig:
    """Return the default configuration with one setting changed."""
    raw = FfnMoeConfig().model_dump()
    *above, name = dotted.split(".")
    place = raw
    for key in above:
        place = place[key]
    place[name] = value
    return FfnMoeConfig.model_validate(raw)


def moved(dotted: str, value) -> set[tuple[str, str | None]]:
    """Return the jobs whose address is another after one setting has changed."""
    old, new = FfnMoeConfig(), changed(dotted, value)
    jobs = [
        ("preprocess", "python"),
        ("train_shared", None),
        ("train_experts", "python"),
        ("train_router", None),
        ("train_dense", "path"),
        ("evaluate", None),
    ]
    return {
        (stage, item)
        for stage, item in jobs
        if address(old, stage, item) != address(new, stage, item)
    }


def test_not_hashed_fields_are_not_in_the_address_of_their_own_stage():
    marked = {
        f"{key}.{name}"
        for key, section in FfnMoeConfig.model_fields.items()
        if isinstance(section.annotation, type) and issubclass(section.annotation, Section)
        for name, field in section.annotation.model_fields.items()
        if not is_hashed(field)
    }
    assert marked == ELSEWHERE.keys() | NOWHERE.keys() | BESIDE
    assert not any(moved(*each) for each in NOWHERE.items())
    for dotted, (value, still, moves) in ELSEWHERE.items():
        stages = {stage for stage, _ in moved(dotted, value)}
        assert still not in stages and moves in stages, dotted
    assert ("train_experts", "python") not in moved("expert.domains", ("headers", "python"))
    assert ("train_dense", "path") not in moved("dense.baselines", ("path",))


def test_what_no_result_depends_on_is_in_no_address():
    assert not moved("runtime.threads", 1) and not moved("runtime.save_every_s", 1.0)
    assert moved("name", "other") == {("evaluate", None)}


def test_a_router_sweep_keeps_trunk_and_experts():
    assert {stage for stage, _ in moved("router.top_k", 1)} == {"train_router", "evaluate"}
    assert {stage for stage, _ in moved("expert.lr", 0.5)} == {
        "train_experts",
        "train_router",
        "train_dense",
        "evaluate",
    }
    assert len(moved("trunk.lr", 0.5)) == 5 and len(moved("data.seed", 9)) == 6


def test_a_key_given_twice_is_an_error_with_its_line(tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text("trunk:\n  lr: 1e-3\n  lr: 2e-3\n")
    with pytest.raises(ConfigError, match=r"lr is given twice[\s\S]*line 3"):
        load(path)


@pytest.mark.parametrize(
    ("changes", "may"),
    [
        ({}, False),
        ({"expert__moments": "bf16"}, False),
        ({"expert__moments": "int8"}, True),
        ({"runtime__memory_budget": "8GB"}, True),
    ],
)
def test_a_run_knows_whether_it_may_keep_8_bit_moments(changes, may):
    assert small.config(**changes).may_keep_int8 == may


def test_classes_of_settings_say_that_they_are():
    """An object that is made from settings has its name for itself: Trunk from TrunkConfig."""
    strange = []
    waiting = [Section]
    while waiting:
        for kind in waiting.pop().__subclasses__():
            waiting.append(kind)
            if kind.__module__.startswith("pipeline.") and not kind.__name__.endswith("Config"):
                strange.append(f"{kind.__module__}.{kind.__name__}")
    assert strange == []


def test_aliases_of_aliases_are_looked_through_once_each():
    """Ten of each in the next: 10**12 values if each is looked through where it stands."""
    lines = ["a0: &a0 [x]"]
    for level in range(1, 13):
        lines.append(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]")
    assert parse_yaml("\n".join(lines))["a1"] == [["x"]] * 10
