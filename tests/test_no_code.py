"""Folders that somebody else made: nothing in them runs or leads outside, and what is wrong with
them is said in a sentence."""

import ast
import builtins
import contextlib
import json
import os
import random
import shutil
from pathlib import Path

import pytest

import pipeline
from pipeline.errors import DataError, PipelineError
from pipeline.families.adapters.base import ModelRef, locate
from pipeline.families.ffn_moe.pretrained import open_pretrained
from pipeline.families.lora_vlm.base import QWEN3_VL, open_chat
from pipeline.serve.app import create
from pipeline.store.artifacts import sha256
from pipeline.store.bundle import SUMS
from tests import small, small_stack
from tests.test_bundle import bundle_of
from tests.test_parity import made

FAMILIES = ("ffn_moe", "lora_vlm")
OF_THE_RUN = ("report.json", "made.json")


@pytest.fixture(scope="module")
def bundles(tasks_bundle, tmp_path_factory):
    """A sound bundle of each family, by its name; read them, never change them."""
    root = tmp_path_factory.mktemp("sound")
    (root / "ffn").mkdir()
    ffn = bundle_of(*made(root / "ffn", "qwen3", True), root / "ffn" / "bundle")
    return {"ffn_moe": ffn, "lora_vlm": tasks_bundle}


@pytest.fixture
def sentinel(tmp_path, monkeypatch):
    """A file that code from a bundle writes; whoever is asked whether to run it says yes."""
    path = tmp_path / "it ran"
    monkeypatch.setattr(builtins, "input", lambda *_: "y")
    monkeypatch.setenv("SENTINEL", str(path))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    return path


EVIL = """
import os
open(os.environ["SENTINEL"], "w").close()
class Evil:
    pass
"""


def resum(folder: Path) -> None:
    """List every file as it is now, so that only what it says is wrong."""
    lines = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != SUMS:
            lines.append(f"{sha256(path)}  {path.relative_to(folder).as_posix()}\n")
    (folder / SUMS).write_text("".join(lines))


def edit(path: Path, **changes) -> None:
    """Change keys of a JSON file, which may not be there yet."""
    values = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(values | changes))


def model_of(folder: Path) -> Path:
    """Return where a bundle's model files are."""
    return folder / "base" if (folder / "base").is_dir() else folder


AUTO = {
    "AutoConfig": "evil.Evil",
    "AutoModel": "evil.Evil",
    "AutoModelForCausalLM": "evil.Evil",
    "AutoTokenizer": ["evil.Evil", "evil.Evil"],
    "AutoProcessor": "evil.Evil",
    "AutoImageProcessor": "evil.Evil",
}
EXPLOIT = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
# What a library reads wherever it finds it, or runs
PICKED_UP = (
    "evil.py",
    "adapter_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "additional_chat_templates/other.jinja",
    "processor_config.json",
    "tokenizer.model",
    "merges.txt",
    "custom_generate/generate.py",
    "pytorch_model.bin",
    "model.pt",
    "weights.pkl",
    "adapters/color/adapter/adapter_model.bin",
    "kernel.so",
)


def crafted(name: str):
    """Return a list of (id, what makes it of a sound bundle) for one family."""

    def in_model(file, **changes):
        return lambda folder: edit(model_of(folder) / file, **changes)

    def about(**changes):
        return lambda folder: edit(folder / "experts.json", **changes)

    def entry(**changes):
        def change(folder):
            values = json.loads((folder / "experts.json").read_text())
            values["experts"][0] |= changes
            (folder / "experts.json").write_text(json.dumps(values))

        return change

    out = {}
    names = ["config.json", "tokenizer_config.json", "generation_config.json"]
    names += ["trunk.json"] if name == "ffn_moe" else ["preprocessor_config.json"]
    for file in names:
        out[f"auto_map in {file}"] = in_model(file, auto_map=AUTO)
        out[f"auto_map below in {file}"] = in_model(file, text_config={"auto_map": AUTO})
        out[f"a kernel in {file}"] = in_model(file, _attn_implementation="someone/kernels")
    for key, value in (("num_hidden_layers", 10**9), ("vocab_size", 10**12), ("head_dim", 1e8)):
        out[f"a model of {key} {value}"] = in_model("config.json", **{key: value})
        out[f"a part of {key} {value}"] = in_model("config.json", text_config={key: value})
    if name == "ffn_moe":
        for value in (["EvilForCausalLM"], "Qwen3MoeForCausalLM", [3], [["x"]], {"x": "y"}):
            out[f"the class {value}"] = in_model("config.json", architectures=value)
    for kind in ("evil", "gpt2", None, 3, ["qwen3_moe"]):
        out[f"the kind {kind}"] = in_model("config.json", model_type=kind, auto_map=AUTO)
        out[f"the kind {kind}, no code"] = in_model("config.json", model_type=kind)
    out["class of a tokenizer"] = in_model("tokenizer_config.json", tokenizer_class="Evil")
    long = "x" * (300 << 10)
    out["long template"] = in_model("tokenizer_config.json", chat_template=long)
    shards = {"x": "../../model.safetensors"}
    out["shards outside"] = in_model("model.safetensors.index.json", weight_map=shards)
    for key, value in (("serves", "os"), ("serves", ["chat"]), ("family", "os"), ("family", 3)):
        out[f"{key} {value}"] = about(**{key: value})
    for key in ("experts", "format", "run", "policy", "limits", "top_k"):
        for value in (None, [], "x", -1):
            if not (key == "run" or (name == "ffn_moe") == (key in ("policy", "limits"))):
                out[f"{key} {value}"] = about(**{key: value})
    for path in ("../x", "/etc/passwd", "a/../../b", "nowhere", 3, None):
        where = {"file": path} if name == "ffn_moe" else {"name": path}
        out[f"an expert at {path}"] = entry(**where)
    if name == "lora_vlm":
        adapter = "adapters/color/adapter/adapter_config.json"
        for key, value in (
            ("megatron_config", {"x": 1}),
            ("loftq_config", {"loftq_bits": 4}),
            ("init_lora_weights", "pissa"),
            ("auto_mapping", {"parent_library": "evil", "base_model_class": "Evil"}),
            ("peft_type", "EVIL"),
            ("layer_replication", [[0, 2]]),
            ("r", "x"),
        ):
            out[f"an adapter's {key}"] = lambda folder, key=key, value=value: edit(
                folder / adapter, **{key: value}
            )
        template = "base/chat_template.jinja"
        out["exploit"] = lambda folder: (folder / template).write_text(EXPLOIT)
        for key, value in (("attn", "someone/kernels"), ("dtype", "load"), ("image", "x")):
            base = {"dtype": "float32", "attn": "sdpa"}
            out[f"{key} {value}"] = lambda folder, base=base | {key: value}: edit(
                folder / "experts.json",
                base=json.loads((folder / "experts.json").read_text())["base"] | base,
            )
        for source, model in (("folder", "/etc"), ("folder", "."), ("hub", "../base"), ("x", "y")):
            out[f"a base from {source} {model}"] = lambda folder, to=(source, model): repin(
                folder, *to
            )
    return out


def repin(folder: Path, source: str, model: str) -> None:
    """Have a bundle's pin name another base, with a digest that fits."""
    old = ModelRef.read(folder)
    new = ModelRef(source, model, "0" * 40, {} if source == "hub" else old.files)
    (folder / "pin.json").write_text(json.dumps(new.values()))


def refused(folder: Path, sentinel: Path) -> str:
    """Open a crafted bundle as a server does; return what it says, having run nothing."""
    with pytest.raises(PipelineError) as error:
        create(folder)
    assert not sentinel.exists()
    said = str(error.value)
    assert " at 0x" not in said
    assert "\n" not in said
    return said


CRAFTED = [(name, craft) for name in FAMILIES for craft in crafted(name)]


@pytest.mark.parametrize(("name", "craft"), CRAFTED, ids=lambda value: str(value))
def test_a_crafted_bundle_is_refused_and_runs_nothing(name, craft, bundles, sentinel, tmp_path):
    folder = shutil.copytree(bundles[name], tmp_path / "copy")
    crafted(name)[craft](folder)
    (model_of(folder) / "evil.py").write_text(EVIL)
    resum(folder)
    refused(folder, sentinel)
    # without it only what names it is wrong
    (model_of(folder) / "evil.py").unlink()
    resum(folder)
    refused(folder, sentinel)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("file", PICKED_UP)
def test_what_a_library_would_pick_up_is_refused_listed_or_not(
    name, file, bundles, sentinel, tmp_path
):
    folder = shutil.copytree(bundles[name], tmp_path / "copy")
    for place in (folder / file, model_of(folder) / file):
        if place.exists():
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(EVIL if place.suffix == ".py" else "{}")
        assert place.name in refused(folder, sentinel)
        if place.parent == folder or place.suffix not in (".json", ".jinja", ".txt"):
            resum(folder)
            assert place.name in refused(folder, sentinel)
        place.unlink()
        shutil.copy(bundles[name] / SUMS, folder / SUMS)


@pytest.mark.parametrize("name", FAMILIES)
def test_links_pipes_and_torn_lists_are_refused(name, bundles, sentinel, tmp_path):
    folder = shutil.copytree(bundles[name], tmp_path / "copy")
    own = model_of(folder) / "config.json"
    own.rename(tmp_path / "config.json")
    own.symlink_to(tmp_path / "config.json")
    assert "is a link" in refused(folder, sentinel)
    own.unlink()
    os.mkfifo(own)
    assert "neither a file nor a folder" in refused(folder, sentinel)
    own.unlink()
    shutil.copy(tmp_path / "config.json", own)
    (folder / "more").symlink_to(tmp_path)
    assert "is a link" in refused(folder, sentinel)
    (folder / "more").unlink()
    for line in ("../x", "/etc/passwd", "a//b", "c:x", "./experts.json"):
        (folder / SUMS).write_text(f"{'0' * 64}  {line}\n")
        assert "not a list of sha256 sums" in refused(folder, sentinel)
    (folder / SUMS).write_bytes(b"\xff\xfe")
    assert "SHA256SUMS cannot be read" in refused(folder, sentinel)


@pytest.mark.parametrize("name", FAMILIES)
def test_notes_beside_a_bundle_do_no_harm(name, bundles, tmp_path):
    folder = shutil.copytree(bundles[name], tmp_path / "copy")
    for note in ("LICENSE", "NOTES.md", "notes.txt", ".gitattributes", ".cache/x.py"):
        (folder / note).parent.mkdir(exist_ok=True)
        (folder / note).write_text("")
    create(folder)


MALFORMED = (
    b"",
    b"[]",
    b"{",
    b"null",
    b'"x"',
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b"{}",
    b'{"format": 1e999}',
    b"{" + b'"a": ' + b"9" * 5000 + b"}",
)
# What Python's own reader takes, and JSON's grammar or a second reader does not
ODD = {
    "a key twice": (b"{", b'{"model_type": "evil", "model_type": "evil", '),
    "a key of theirs twice": (b"{", b'{"x": {"a": 1, "a": 2}, '),
    "no number": (b"{", b'{"x": NaN, '),
    "no end": (b"{", b'{"x": -Infinity, '),
    "too large": (b"{", b'{"x": 1e999, '),
    "too long": (b"{", b'{"x": ' + b"9" * 400 + b", "),
    "no UTF-8": (b"{", b'{"x": "\xff", '),
    "another encoding": (b"{", b"\xef\xbb\xbf{"),
}


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
@pytest.mark.parametrize("name", FAMILIES)
def test_json_that_two_may_read_otherwise_is_refused(name, odd, bundles, sentinel, tmp_path):
    folder = shutil.copytree(bundles[name], tmp_path / "copy")
    own = ["experts.json", "config.json", "tokenizer_config.json", "generation_config.json"]
    if name == "lora_vlm":
        own += ["pin.json", "adapters/color/adapter/adapter_config.json"]
    for file in own:
        path = folder / file if (folder / file).exists() else model_of(folder) / file
        before = path.read_bytes()
        path.write_bytes(before.replace(*odd, 1))
        resum(folder)
        assert path.name in refused(folder, sentinel)
        path.write_bytes(before)


def test_nothing_in_the_program_lets_a_library_run_what_a_file_names():
    """Every call that opens a model, a tokenizer or a processor says so itself."""
    root = Path(pipeline.__file__).parent.parent
    files = [*root.glob("*.py")]
    for folder in ("pipeline", "scripts", "benchmarks"):
        files += (root / folder).rglob("*.py")
    opened = 0
    for file in files:
        text = file.read_text("utf-8")
        if "from_pretrained" not in text and "from_config" not in text:
            assert "trust_remote_code" not in text
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert ast.unparse(node.value) == "False", (file, node.value.lineno)
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            # one of our own has the name of transformers'
            ours = ast.unparse(node.func.value) in ("Shape", "cls")
            if node.func.attr not in ("from_pretrained", "from_config") or ours:
                continue
            if file.is_relative_to(root / "pipeline"):
                said = {keyword.arg for keyword in node.keywords}
                assert "trust_remote_code" in said, (file, node.lineno)
                opened += 1
    assert opened > 5


@pytest.mark.parametrize("name", FAMILIES)
def test_malformed_json_of_every_file_is_a_sentence(name, bundles, sentinel, tmp_path):
    folder = shutil.copytree(bundles[name], tmp_path / "copy")
    # of these nothing is read, and weights' headers are tested elsewhere
    files = sorted(path for path in folder.rglob("*.json") if path.name not in OF_THE_RUN)
    draw = random.Random(name)
    for path in files:
        before = path.read_bytes()
        broken = [before[: len(before) // 2], *draw.sample(MALFORMED, 3)]
        for content in broken:
            path.write_bytes(content)
            resum(folder)
            if not content.endswith(b"}"):
                refused(folder, sentinel)
                continue
            # an object that says too little may say enough to be opened
            with contextlib.suppress(PipelineError):
                create(folder)
        path.write_bytes(before)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_file_with_any_key_gone_or_of_another_type_never_ends_in_a_traceback(
    name, bundles, sentinel, tmp_path
):
    folder = shutil.copytree(bundles[name], tmp_path / "copy")
    draw = random.Random(name)
    files = ["experts.json", "trunk.json", "config.json", "tokenizer_config.json"]
    if name == "lora_vlm":
        files = ["experts.json", "pin.json", "adapters/router/calibration.json"]
        files += ["adapters/color/adapter.json", "adapters/color/adapter/adapter_config.json"]
    for file in files:
        before = (folder / file).read_text()
        for _ in range(3):
            values = json.loads(before)
            key = draw.choice(sorted(values))
            values.pop(key)
            if draw.random() < 0.7:
                values[key] = draw.choice((None, -1, "x", [], {}, {"x": [1]}, 1e400, True))
            (folder / file).write_text(json.dumps(values))
            resum(folder)
            with contextlib.suppress(PipelineError):
                create(folder)
        (folder / file).write_text(before)
    assert not sentinel.exists()


@pytest.mark.parametrize(
    "file", ["config.json", "tokenizer_config.json", "preprocessor_config.json"]
)
def test_a_base_folder_that_names_code_is_refused(file, bundles, sentinel, tmp_path):
    where = shutil.copytree(bundles["lora_vlm"] / "base", tmp_path / "base")
    (where / "evil.py").write_text(EVIL)
    edit(where / file, auto_map=AUTO)
    with pytest.raises(DataError, match=rf"{file} names code to run \(auto_map\)"):
        locate(ModelRef("folder", str(where)), where, QWEN3_VL)
    # opened past that check, the library is still told to run none
    with contextlib.suppress(DataError):
        open_chat(where, small_stack.BASE.image)
    assert not sentinel.exists()


@pytest.mark.parametrize("kind", ["evil", "llama"])
def test_a_trunk_that_names_code_is_refused(kind, sentinel, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "auto_map": AUTO}))
    (tmp_path / "evil.py").write_text(EVIL)
    cfg = small.config(trunk__init=str(tmp_path))
    with pytest.raises(PipelineError, match=r"a trunk can be one of|names code to run"):
        open_pretrained(cfg)
    assert not sentinel.exists()
