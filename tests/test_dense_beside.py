"""A dense baseline in the bundle: a stock checkpoint beside the stack, asked by the same server.

B sequences, T tokens, V vocabulary.
"""

import json
import shutil

import pytest
import torch
from fakes import flip
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.__main__ import main
from pipeline.errors import ConfigError, DamagedArtifact, MissingArtifact
from pipeline.families.load import load
from pipeline.protocols import quiet
from pipeline.run import stages
from pipeline.run.job import run_job
from pipeline.run.outcome import outcome
from pipeline.serve.app import create
from pipeline.serve.dense import SteadyDense
from pipeline.serve.engine import CompletionEngine
from pipeline.serve.generation import Prompt, Sampling
from pipeline.store import bundle
from pipeline.store.artifacts import Store, sha256
from tests import small
from tests.test_bundle import bundle_of
from tests.test_parity import made
from tests.test_serve import NAMES, PROMPT, refused, running
from tests.written import planned, weight_bytes

DENSE = ("deploy.dense=total",)
COUNT = 8


@pytest.fixture(scope="module")
def store(bundled, tmp_path_factory):
    """A copy of that run's store, whose bundle has a dense model too."""
    torch.set_num_threads(1)
    copy = Store(shutil.copytree(bundled[1], tmp_path_factory.mktemp("beside") / "store"))
    run_job("deploy", load(bundled[0], DENSE), copy, progress=quiet)
    return copy


@pytest.fixture(scope="module")
def folder(bundled, store):
    """That bundle; read it, never change it."""
    return store.folder(stages.address(load(bundled[0], DENSE), "deploy"))


def stock_greedy(folder, ids: list[int]) -> tuple[list[int], list[float]]:
    """Return the tokens that transformers' own greedy generate goes on with, and their nats."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    options = {"return_dict_in_generate": True, "output_logits": True}
    out = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=COUNT, **options)
    tokens = out.sequences[0, len(ids) :].tolist()
    nats = []
    for token, logit_BV in zip(tokens, out.logits, strict=True):
        nats.append(logit_BV[0].log_softmax(-1)[token].item())
    return tokens, nats


def test_the_dense_model_goes_along_as_a_stock_checkpoint(bundled, store, folder):
    path, _, plain = bundled
    cfg = load(path, DENSE)
    assert stages.address(load(path), "deploy") == plain.name != folder.name
    bundle.verify(folder)
    sums, former = bundle.read_sums(folder), bundle.read_sums(plain)
    own = {name for name in sums if name.startswith("dense/")}
    assert sums.keys() - own == former.keys()
    # nothing else of the bundle is another
    differ = {name for name in former if sums[name] != former[name]}
    assert differ <= {"README.md", "experts.json"}
    assert (bundle.about(plain)["format"], bundle.about(folder)["format"]) == (2, 4)
    assert "`dense/`" in (folder / "README.md").read_text()

    model, report = AutoModelForCausalLM.from_pretrained(folder / "dense", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(model).__name__ == "Qwen3ForCausalLM"
    stored = store.folder(stages.address(cfg, "train_dense", "total")) / "model.safetensors"
    kept = model.state_dict()
    assert all(torch.equal(kept[name], each) for name, each in load_file(stored).items())
    tokens = [AutoTokenizer.from_pretrained(each)(PROMPT).input_ids for each in (folder, plain)]
    assert AutoTokenizer.from_pretrained(folder / "dense")(PROMPT).input_ids == tokens[0]
    assert tokens[0] == tokens[1]

    metrics = store.require(folder.name).metrics
    size = sum((folder / name).stat().st_size for name in own)
    assert metrics["dense_bytes"] == size > stored.stat().st_size
    assert f"dense total is {size / 1e6:.1f} MB of it" in outcome(metrics)


@pytest.mark.parametrize("item", ["path", "wide"])
def test_a_plan_counts_its_bytes(item, tmp_path):
    changes = {"dense__baselines": (item,), "deploy__dense": item}
    cfg, parts = made(tmp_path, "qwen3", True, **changes)
    folder = bundle_of(cfg, parts, tmp_path / "bundle")
    found = planned(cfg, None, small.VOCAB)
    assert weight_bytes(folder) == pytest.approx(found.written_bytes, rel=0.05)
    assert weight_bytes(folder / "dense") > 0.15 * found.written_bytes


def test_its_answers_are_transformers_own_beside_the_stack_s(folder):
    engine = CompletionEngine(folder)
    ids = engine.encode(PROMPT)
    asked = []
    for _ in range(3):
        for reader in (None, "dense", NAMES[0]):
            prompt = Prompt(tuple(ids), reader=reader)
            asked.append(engine.submit(prompt, Sampling(COUNT, 0.0, logprobs=0)))
    wanted = {None: stock_greedy(folder, ids), "dense": stock_greedy(folder / "dense", ids)}
    # so that what is crossed is seen: models this small go on alike, and are not as sure of it
    apart = torch.tensor(wanted[None][1]) - torch.tensor(wanted["dense"][1])
    assert apart.abs().min() > 1e-2
    for generation in asked:
        reader = generation.prompt.reader
        pieces = [piece for piece in generation.wait() if piece.token]
        if reader in wanted:
            tokens, nats = wanted[reader]
            assert [piece.token.id for piece in pieces] == tokens
            assert [piece.logprob for piece in pieces] == pytest.approx(nats, abs=1e-4)
        assert all(bool(piece.token.experts) == (reader != "dense") for piece in pieces)
    # its tokens are counted, and are no expert's
    assert engine.stats.completion_tokens == len(asked) * COUNT
    assert set(engine.stats.spoken) <= set(NAMES)
    engine.close()


def test_a_server_lists_it_and_tells_that_it_has_no_experts(folder):
    with running(create(folder)) as client:
        listed = client.get("/v1/models").json()["data"]
        assert [each["id"] for each in listed][-1] == "dense"
        own = client.get("/v1/models/dense").json()
        assert own == listed[-1]
        assert (own["parent"], own["baseline"]) == ("tiny", "total")
        body = {"model": "dense", "prompt": PROMPT, "temperature": 0, "max_tokens": COUNT}
        answer = client.post("/v1/completions", json=body | {"return_experts": True}).json()
        assert answer["model"] == "dense"
        assert "expert" not in answer
        (choice,) = answer["choices"]
        told = choice["experts"]
        for token in told["tokens"]:
            assert (token["experts"], token["weights"], token["top"]) == ([], [], None)
        assert [each["share"] for each in told["experts"]] == [0.0] * len(NAMES)
        tokenizer = AutoTokenizer.from_pretrained(folder / "dense")
        ids = tokenizer(PROMPT).input_ids
        wanted, _ = stock_greedy(folder / "dense", ids)
        assert choice["text"] == tokenizer.decode(wanted, skip_special_tokens=True)
        route = client.post("/v1/route", json={"model": "dense", "text": PROMPT})
        refused(route, 400, "only tiny routes, as it has no experts", "model")
        chat = {"model": "dense", "messages": [{"role": "user", "content": "a"}]}
        answer = client.post("/v1/chat/completions", json=chat)
        # of it as of the stack: the trunk came without a template
        refused(answer, 400, "has no chat template", "messages", "no_chat_template")


def test_a_bundle_without_one_has_none(bundled):
    engine = CompletionEngine(bundled[2])
    assert engine.network.beside is None
    assert "dense" not in engine.readers


def test_it_is_asked_in_a_terminal(folder, capsys):
    asked = ["generate", PROMPT, "--bundle", str(folder), "--json", "--temperature", "0"]
    assert main([*asked, "--max-tokens", str(COUNT), "--compare", "stack", "dense"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    own = [line for line in lines if line["reader"] == "dense" and "id" in line]
    ids = AutoTokenizer.from_pretrained(folder)(PROMPT).input_ids
    assert [line["id"] for line in own] == stock_greedy(folder / "dense", ids)[0]


def test_in_bf16_it_runs_so_too(folder):
    engine = CompletionEngine(folder, dtype="bf16")
    assert isinstance(engine.network.beside, SteadyDense)
    ids = tuple(engine.encode(PROMPT))
    alone = engine.submit(Prompt(ids, reader="dense"), Sampling(4, 0.0)).wait()
    beside = []
    for reader in ("dense", None, "dense"):
        beside.append(engine.submit(Prompt(ids, reader=reader), Sampling(4, 0.0)))
    first, _, last = (generation.wait() for generation in beside)
    assert first == last == alone
    engine.close()


def changed(folder, name: str, **values) -> None:
    """Write other values into a JSON file of a bundle, and the sums as the files are then."""
    path = folder / name
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | values))
    bundle.write_sums(folder, {each: sha256(folder / each) for each in _listed(folder)})


def _listed(folder):
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in {bundle.SUMS, bundle.MADE} | bundle.OF_STORE:
            yield name


CRAFTED = {
    "code": ("config.json", {"auto_map": {"AutoModel": "x.Y"}}, "names code to run"),
    "another kind": ("config.json", {"model_type": "gpt2"}, "of a model of the kind 'gpt2'"),
    "an unknown class": ("config.json", {"architectures": ["Evil"]}, "is not known here"),
    "other tokens": ("config.json", {"vocab_size": 7}, "another vocab_size than the trunk"),
    "other keys": ("config.json", {"num_key_value_heads": 1}, "another num_key_value_heads"),
    "an adapter": ("adapter_config.json", {}, "is no file of such a bundle"),
}


@pytest.mark.parametrize("craft", CRAFTED)
def test_one_that_is_another_than_it_says_is_refused(craft, folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    name, values, said = CRAFTED[craft]
    changed(copy, f"dense/{name}", **values)
    with pytest.raises(DamagedArtifact, match=said):
        create(copy)


def test_a_file_of_it_that_was_changed_is_refused(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    flip(copy / "dense" / "model.safetensors")
    with pytest.raises(DamagedArtifact, match=r"dense/model\.safetensors is not what was bundled"):
        create(copy)
    # nor is it left unsaid in experts.json
    shutil.copy(folder / "dense" / "model.safetensors", copy / "dense")
    about = json.loads((copy / "experts.json").read_text())
    del about["dense"]
    (copy / "experts.json").write_text(json.dumps(about))
    changed(copy, "experts.json")
    with pytest.raises(DamagedArtifact, match=r"dense/config\.json is no file of such a bundle"):
        create(copy)


def test_one_that_is_not_trained_is_asked_for_by_its_command(bundled, store, tmp_path):
    path = bundled[0]
    copy = Store(shutil.copytree(store.root, tmp_path / "store"))
    cfg = load(path, ("deploy.dense=path",))
    shutil.rmtree(copy.folder(stages.address(cfg, "train_dense", "path")))
    with pytest.raises(MissingArtifact) as error:
        run_job("deploy", cfg, copy, progress=quiet)
    assert error.value.stages == ("train_dense",)


def test_a_run_that_has_no_such_model_is_told(bundled, tmp_path):
    path = bundled[0]
    for override, said in (
        ("deploy.dense=wide", r"deploy\.dense: wide is no dense baseline.*has total, path"),
        ("deploy.dense=none", r"deploy\.dense: none is no dense baseline"),
    ):
        with pytest.raises(ConfigError, match=said):
            load(path, (override,))
    adapters = ("expert.form=adapter", "router.steps=0", "router.top_k=1")
    with pytest.raises(ConfigError, match=r"deploy\.dense: a bundle of adapters holds no dense"):
        load(path, (*DENSE, *adapters))
    with pytest.raises(ConfigError, match=r"deploy\.dense: a run of lora_vlm trains no dense"):
        load("config/tiny_vlm.yaml", DENSE)
