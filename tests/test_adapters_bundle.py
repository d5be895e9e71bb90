"""A bundle of adapters: opened alone it answers as the run's own stack, and stock peft and
transformers read it."""

import json
import shutil
import warnings

import pytest
import torch
from peft import PeftModel
from transformers import Qwen3VLForConditionalGeneration

from pipeline.errors import ConfigError, DamagedArtifact, MismatchError, MissingArtifact
from pipeline.families import ExportWish
from pipeline.families.adapters.stack import ROUTER
from pipeline.families.lora_vlm import family
from pipeline.protocols import quiet
from pipeline.report import RequestReport
from pipeline.store.bundle import read_sums, verify
from pipeline.store.upload import upload
from tests import small_stack
from tests.cards import example_of, printed
from tests.small_stack import EXPERTS, requests


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(configuration, parts, bundle) of a small run whose report is a line."""
    root = tmp_path_factory.mktemp("run")
    cfg, parts = small_stack.run(root / "parts")
    report = parts.root / "evaluate"
    report.mkdir()
    values = RequestReport(run="small", family="lora_vlm", notes=("only a test",))
    (report / "report.json").write_text(values.to_json())
    (report / "report.html").write_text("<p>report</p>")
    folder = root / "bundle"
    folder.mkdir()
    metrics = family.bundle(cfg, parts, folder, quiet)
    assert metrics["experts"] == 3 and metrics["parameters"] > 200_000
    return cfg, parts, folder


@pytest.fixture
def copied(made, tmp_path):
    """A copy of the bundle that a test may change."""
    return shutil.copytree(made[2], tmp_path / "copy")


def test_the_bundle_alone_answers_as_the_runs_stack(made):
    cfg, parts, folder = made
    own, again = family.assemble(cfg, parts), family.reassemble(folder)
    asked = requests(8)
    assert (
        again.experts == own.experts
        and again.policy == own.policy
        and again.calibration == own.calibration
    )
    assert again.model.limits == own.model.limits
    for mine, theirs in zip(own.answer(asked), again.answer(asked), strict=True):
        assert (mine.text, mine.expert, mine.alternatives) == (
            theirs.text,
            theirs.expert,
            theirs.alternatives,
        )
    said = again.generate(asked[:2], [EXPERTS] * 2)
    assert (
        said == own.generate(asked[:2], [EXPERTS] * 2)
        and len({each.text for each in said[0].values()}) > 1
    )


def test_no_file_of_it_is_a_file_of_the_store(made):
    _, parts, folder = made
    stored = {file.stat().st_ino for file in parts.root.rglob("*") if file.is_file()}
    own = {file.stat().st_ino for file in folder.rglob("*") if file.is_file()}
    assert len(own) > 10 and stored.isdisjoint(own)


def test_it_is_whole_without_the_run(made, tmp_path):
    """Nothing in it leads outside, and it can be moved."""
    _, parts, folder = made
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    hidden = parts.root.rename(parts.root.with_name("hidden"))
    try:
        assert family.reassemble(moved).answer(requests(1))[0].text
    finally:
        hidden.rename(parts.root)
    links = [path for path in moved.rglob("*") if path.is_symlink()]
    assert not links


def test_plain_peft_and_transformers_load_it_and_say_the_same(made):
    _, _, folder = made
    stack = family.reassemble(folder)
    asked = next(request for request in requests(8) if request.media)
    core = Qwen3VLForConditionalGeneration.from_pretrained(folder / "base", dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning
        )  # peft's own
        model = PeftModel.from_pretrained(core, str(folder / "adapters" / "locate" / "adapter"))
    processor = stack.model.chat.renderer
    content = [*({"type": "image"} for _ in asked.media), {"type": "text", "text": asked.prompt}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    inputs = processor(text=[text], images=list(asked.media), return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    said = processor.tokenizer.decode(
        out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    assert stack.generate([asked], [["locate"]])[0]["locate"].text == said


def test_every_file_is_listed(made):
    _, _, folder = made
    sums = read_sums(folder)
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files == {*sums, "SHA256SUMS", "made.json"}
    verify(folder)
    for name in (*EXPERTS, ROUTER):
        assert f"adapters/{name}/adapter/adapter_model.safetensors" in sums
    assert {
        "adapters/router/calibration.json",
        "report.html",
        "README.md",
        "base/tokenizer.json",
    } <= files
    assert (
        "model.safetensors.index.json" not in files
    )  # the adapters' tensors have one name each, in every folder


def test_the_card_names_experts_and_how_to_load_them(made):
    text = (made[2] / "README.md").read_text()
    for name in EXPERTS:
        assert f"`adapters/{name}`" in text
    assert (
        'PeftModel.from_pretrained(base, "adapters/color/adapter")' in text
        and "only a test" in text
    )


def test_upload_takes_its_folders_along(made, tmp_path):
    _, _, folder = made
    upload(folder, str(tmp_path / "there"), quiet)
    verify(tmp_path / "there")
    sent = tmp_path / "there" / "adapters" / "color" / "adapter.json"
    sent.write_text("{}")
    upload(folder, str(tmp_path / "there"), quiet)
    verify(tmp_path / "there")
    assert sent.read_bytes() == (folder / "adapters" / "color" / "adapter.json").read_bytes()


def test_a_folder_that_is_no_bundle_is_refused(made, tmp_path):
    with pytest.raises(MissingArtifact, match="is not a bundle"):
        family.reassemble(tmp_path)


def test_a_changed_base_is_refused(copied):
    weights = copied / "base" / "config.json"
    weights.write_text(weights.read_text() + " ")
    with pytest.raises(MismatchError, match="its files have changed"):
        family.reassemble(copied)


@pytest.mark.parametrize("key", ["base", "experts", "policy", "limits"])
def test_a_description_without_a_part_is_damaged(copied, key):
    about = json.loads((copied / "experts.json").read_text())
    del about[key]
    (copied / "experts.json").write_text(json.dumps(about))
    with pytest.raises(DamagedArtifact, match="does not hold the stack"):
        family.reassemble(copied)


@pytest.mark.parametrize(
    "name", ["../out", "/etc/passwd", "a//b", "a/../../b", "./a", "C:/a", "a\\b"]
)
def test_a_list_of_files_that_leads_outside_is_damaged(copied, name):
    with (copied / "SHA256SUMS").open("a") as file:
        file.write(f"{'0' * 64}  {name}\n")
    with pytest.raises(DamagedArtifact, match="not a list of sha256 sums"):
        read_sums(copied)


def test_adapters_are_exported_as_they_stand_and_the_example_of_the_cards_runs(made, tmp_path):
    cfg, parts, bundled = made
    (tmp_path / "out").mkdir()
    family.export(cfg, parts, ExportWish("adapters"), tmp_path / "out", quiet)
    verify(tmp_path / "out")
    files = read_sums(tmp_path / "out")
    for name in (*EXPERTS, ROUTER):
        tensors = f"adapters/{name}/adapter/adapter_model.safetensors"
        assert files[tensors] == read_sums(bundled)[tensors]
    assert example_of(tmp_path / "out") == example_of(bundled)
    limits = cfg.loras.base.image
    card = (tmp_path / "out/README.md").read_text()
    assert f"below {limits.min_pixels:,} or above {limits.max_pixels:,} px were fitted" in card
    assert printed(tmp_path / "out")


@pytest.mark.parametrize("wish", [{"format": "gguf"}, {"format": "hf"}, {"format": "dense"}])
def test_what_no_single_network_holds_is_refused_by_name(made, wish):
    with pytest.raises(ConfigError, match=f"--format {wish['format']}: .*use --format adapters"):
        family.check_export(made[0], ExportWish(**wish))


def test_adapters_are_not_compressed(made):
    with pytest.raises(ConfigError, match="--rank: the experts of a .* run are adapters already"):
        family.check_export(made[0], ExportWish("adapters", rank=4))
