"""The router: K logits of one forward pass, and a temperature fitted on requests it did not train
on."""

import json

import lora_small
import pytest
import torch
import torch.nn.functional as F

from pipeline.data.routing.dataset import RoutingRows
from pipeline.errors import DamagedArtifact, DataError
from pipeline.families.adapters import peft_io, router
from pipeline.families.adapters.router import LOWEST, Calibration, calibrate
from pipeline.families.lora_vlm import base
from pipeline.model.request_router import HIGHEST, fit_temperature, nats


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return lora_small.prepared(tmp_path_factory.mktemp("router"))


def drawn(temperature, count=4000, labels=4, seed=0):
    """Return logits_BK and targets of a router that is right as often as logits over temperature
    say."""
    torch.manual_seed(seed)
    logits_BK = 3 * torch.randn(count, labels)
    target_B = torch.multinomial((logits_BK / temperature).softmax(-1), 1)[:, 0]
    return logits_BK, target_B


@pytest.mark.parametrize("temperature", [1.2, 2.0, 5.0])
def test_the_temperature_is_found_again(temperature):
    logits_BK, target_B = drawn(temperature)
    assert fit_temperature(logits_BK, target_B, LOWEST) == pytest.approx(temperature, rel=0.1)


@pytest.mark.parametrize("count", [5, 4000])
def test_confidence_is_never_sharpened(count):
    """A few requests without a mistake are fitted best by no doubt at all, and then no threshold
    means anything."""
    logits_BK, target_B = drawn(0.2, count=count)
    target_B = logits_BK.argmax(-1) if count < 10 else target_B
    assert fit_temperature(logits_BK, target_B, LOWEST) == pytest.approx(1.0)
    labels = {"a": "A", "b": "B", "c": "C", "none": "Z"}
    found = calibrate(logits_BK, target_B.tolist(), "Which?", labels)
    torch.testing.assert_close(found.probabilities(logits_BK), logits_BK.softmax(-1))


@pytest.mark.parametrize("seed", range(4))
def test_the_temperature_is_what_torchs_lbfgs_finds(seed):
    logits_BK, target_B = drawn(1.7, count=60, seed=seed)
    log_t = torch.zeros(1, requires_grad=True)
    solver = torch.optim.LBFGS(
        [log_t], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-10
    )

    def closure():
        solver.zero_grad()
        loss = F.cross_entropy(logits_BK / log_t.exp(), target_B)
        loss.backward()
        return loss

    solver.step(closure)
    assert fit_temperature(logits_BK, target_B, LOWEST) == pytest.approx(
        log_t.exp().item(), rel=1e-3
    )


def test_a_router_that_is_always_right_or_knows_nothing_ends_at_the_range():
    logits_BK = torch.eye(4).repeat(5, 1)
    right_B = torch.arange(4).repeat(5)
    assert fit_temperature(logits_BK, right_B, LOWEST) == pytest.approx(LOWEST)
    assert fit_temperature(logits_BK, (right_B + 1) % 4, LOWEST) == pytest.approx(HIGHEST)


def test_calibration_never_costs_nats_and_keeps_the_order():
    logits_BK, target_B = drawn(3.0, count=50)
    labels = {"color": "A", "dots": "B", "zebra": "C", "none": "Z"}
    found = calibrate(logits_BK, target_B.tolist(), "Which?", labels)
    assert found.calibrated_nats < found.valid_nats == pytest.approx(nats(logits_BK, target_B))
    prob_BK = found.probabilities(logits_BK)
    assert torch.equal(prob_BK.argmax(-1), logits_BK.argmax(-1))
    assert F.nll_loss(prob_BK.log(), target_B).item() == pytest.approx(
        found.calibrated_nats, abs=1e-5
    )
    assert found.names == ("color", "dots", "zebra", "none")


def test_a_calibration_comes_back_from_its_file_with_its_order(tmp_path):
    wanted = Calibration(1.5, {"zebra": "A", "color": "B"}, "Which?", 0.4, 0.3)
    (tmp_path / "calibration.json").write_text(json.dumps(wanted.values(), sort_keys=True))
    found = Calibration.read(tmp_path)
    assert found == wanted and list(found.labels) == ["zebra", "color"]
    for text in (
        "{",
        "[]",
        "{}",
        json.dumps(wanted.values() | {"labels": 3}),
        json.dumps({"labels": [], "more": 1}),
    ):
        (tmp_path / "calibration.json").write_text(text)
        with pytest.raises(DamagedArtifact, match="calibration.json"):
            Calibration.read(tmp_path)


def test_without_requests_to_fit_on_it_says_so():
    with pytest.raises(DataError, match="no rows in the split valid"):
        calibrate(torch.zeros(0, 2), [], "Which?", {"a": "A", "b": "B"})


def test_label_logits_are_the_whole_models_last_ones_whatever_the_padding(parts):
    opened = base.open_base(parts.folder("train_shared"), parts.cfg.loras.base)
    chat = opened.chat
    rows = RoutingRows(parts.folder("routing"))
    some = [(row.prompt, rows.pictures(row)) for row in rows.rows("test")] + [
        ("No picture, but a longer wording", ())
    ]
    ids = list(peft_io.label_ids(chat.tokenizer, parts.cfg.loras.labels).values())
    together = router.label_logits(opened.model, router.ask(chat, "Which?", some), ids)
    assert together.shape == (len(some), 2) and together.dtype == torch.float32
    for request, row in zip(some, together, strict=True):
        alone = chat.requests([(f"Which? {request[0]}", request[1])])
        with torch.no_grad():
            wanted = opened.model(**alone).logits[0, -1, ids]
        torch.testing.assert_close(row, wanted, atol=1e-4, rtol=1e-4)


def test_what_the_router_leaves_is_an_adapter_and_its_calibration(parts, tmp_path):
    run = lora_small.train(parts, "router", slots=tmp_path)
    about, raw = run.files["adapter.json"], run.files["calibration.json"]
    assert about["labels"] == raw["labels"] == [["color", "A"], ["dots", "B"]]
    assert about["instruction"] == raw["instruction"] == lora_small.INSTRUCTION
    found = Calibration.read(run.folder)
    opened = base.open_base(parts.folder("train_shared"), parts.cfg.loras.base)
    model = peft_io.load(opened.model, run.folder, "router", opened.pin)
    chat, rows = opened.chat, RoutingRows(parts.folder("routing"))
    valid = rows.rows("valid")
    asked = router.ask(chat, found.instruction, ((row.prompt, rows.pictures(row)) for row in valid))
    ids = peft_io.label_ids(chat.tokenizer, found.labels)
    logits_BK = router.label_logits(model, asked, list(ids.values()))
    target_B = torch.tensor([found.names.index(row.expert) for row in valid])
    assert nats(logits_BK, target_B, found.temperature) == pytest.approx(
        found.calibrated_nats, abs=1e-4
    )


def test_the_instruction_stands_before_the_request():
    assert router.routing_prompt("Which?", "Count.") == "Which? Count."
