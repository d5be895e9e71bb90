"""The report of a lora_vlm run against plain calls on the same rows, and the verdicts drawn from
it."""

import io
import json
from base64 import b64decode
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops
from rich.console import Console

from pipeline.families.adapters import eval_data, evaluate, shown
from pipeline.families.adapters.eval_data import AdapterEvaluator, EvalRequest
from pipeline.families.adapters.evaluate import criteria
from pipeline.families.adapters.peft_io import peft_name
from pipeline.families.adapters.perturb import change_media, reorder_labels, reword
from pipeline.families.adapters.sections import AdapterEvaluateConfig
from pipeline.families.load import parse
from pipeline.families.lora_vlm import family
from pipeline.families.lora_vlm.perturb import PERTURBATIONS, crop, recompress, resize
from pipeline.metrics.routing import GroupBootstrap
from pipeline.protocols import quiet
from pipeline.report import RequestReport, page, read, show
from pipeline.report.schema.base import Difference
from pipeline.report.schema.requests import (
    AdapterScores,
    AnswerRow,
    AnswerScore,
    AnswerSet,
    TaskScores,
)
from tests import small_stack
from tests.small_stack import EXPERTS


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(configuration, parts, report) of a small run."""
    cfg, parts = small_stack.run(tmp_path_factory.mktemp("run") / "parts")
    return cfg, parts, family.measure(cfg, parts, quiet)


@pytest.fixture(scope="module")
def bench(made):
    """Its rows and its stack."""
    cfg, parts, _ = made
    return AdapterEvaluator(cfg, parts, family.assemble(cfg, parts), quiet)


def changed(cfg, **fields):
    """Return a configuration with other settings of the evaluation."""
    return cfg.model_copy(update={"evaluate": cfg.evaluate.model_copy(update=fields)})


def test_the_report_is_plain_json_without_anything_infinite(made):
    text = made[2].to_json()
    json.loads(text, parse_constant=pytest.fail)
    assert read(text) == made[2]


@pytest.fixture(scope="module")
def smoke(made):
    """The report of a smoke evaluation."""
    return family.measure(changed(made[0], smoke=True, smoke_rows=2), made[1], quiet)


def test_the_same_run_gives_the_same_report(made, smoke):
    again = family.measure(changed(made[0], smoke=True, smoke_rows=2), made[1], quiet)
    assert again == smoke.model_copy(update={"made": again.made})


def test_routes_are_those_of_the_stack_on_each_set(made, bench):
    _, _, report = made
    sets = {each.name: each for each in report.routing.sets}
    assert list(sets) == [
        "test",
        "test, neutral prompts",
        "test_held",
        "test_held, neutral prompts",
    ]
    for split in ("test", "test_held"):
        rows = bench.routing.rows(split)
        requests = [
            eval_data.Request(row.prompt, tuple(bench.routing.pictures(row))) for row in rows
        ]
        choices = bench.stack.route(requests)
        right = [choice.expert == row.expert for choice, row in zip(choices, rows, strict=True)]
        neutral = [hit for hit, row in zip(right, rows, strict=True) if row.ambiguous]
        assert sets[split].requests == len(rows) == 24
        assert sets[split].rows[0].accuracy == pytest.approx(np.mean(right))
        assert sets[f"{split}, neutral prompts"].rows[0].accuracy == pytest.approx(np.mean(neutral))
        count_CC = report.routing.confusion[split]
        assert np.trace(count_CC) == sum(right) and np.sum(count_CC) == 24
    assert [row.name for row in sets["test"].rows] == [
        "router",
        "majority",
        "text only",
        "frozen base, asked",
        "frozen base, centroid",
        "frozen base, regression",
    ]


def test_where_only_the_picture_tells_text_is_near_chance(made):
    """12 requests of four kinds; the wordings tell nothing."""
    neutral = next(each for each in made[2].routing.sets if each.name == "test, neutral prompts")
    accuracy = {row.name: row.accuracy for row in neutral.rows}
    assert accuracy["text only"] <= 0.5


def test_an_adapters_score_is_that_of_plain_generation(made, bench):
    _, _, report = made
    task = next(each for each in report.adapters.tasks if each.task == "count")
    asked = bench.task("count")
    assert task.requests == len(asked) == 8
    model, chat = bench.stack.model.model, bench.stack.model.chat
    model.set_adapter(peft_name("locate"))
    right = []
    for each in asked:
        inputs = chat.requests([(each.prompt, each.open())])
        with torch.no_grad():
            out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        said = chat.tokenizer.decode(
            out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        digits = "".join(c if c in "-0123456789" else " " for c in said).split()
        right.append(bool(digits) and digits[0] == each.wanted[0].split()[0])
    assert task.scores["locate"] == pytest.approx(np.mean(right))
    assert set(task.scores) == {*EXPERTS, "base"} and set(task.figures) == {
        "absolute error",
        "readable",
    }


def test_routed_requests_know_the_answers_of_their_task_rows(bench):
    routed = bench.routed("test")
    assert {each.expert for each in routed} == {*EXPERTS, "none"}
    by_picture = {
        each.open()[0].tobytes(): each.wanted
        for name in EXPERTS
        for each in map(_of(bench, name), _test(bench, name))
    }
    for each in routed:
        assert each.wanted == (
            () if each.expert == "none" else by_picture[each.open()[0].tobytes()]
        )
    assert sum(each.ambiguous for each in routed) == 12


def _test(bench, name: str):
    return bench.tasks[name].rows("test")


def _of(bench, name: str):
    return lambda row: bench._of_task(name, row)


def test_the_oracle_is_each_requests_own_expert(made, bench):
    held = next(each for each in made[2].answers if each.set == "test_held")
    asked = [each for each in bench.routed("test_held") if each.wanted]
    said = bench.stack.generate(
        [each.request() for each in asked], [[each.expert] for each in asked]
    )
    score = [
        bench.judge(each, one[each.expert].text)["score"]
        for each, one in zip(asked, said, strict=True)
    ]
    assert held.all.oracle.score == pytest.approx(np.mean(score))
    assert held.all.requests == len(asked) == 18
    answers = bench.stack.answer([each.request() for each in asked])
    score = [bench.judge(each, one.text)["score"] for each, one in zip(asked, answers, strict=True)]
    assert held.all.stack.score == pytest.approx(np.mean(score))
    assert held.ranked_share == np.mean([bool(one.others) for one in answers])


def test_a_smoke_evaluation_takes_few_rows_of_everything(smoke):
    assert [task.requests for task in smoke.adapters.tasks] == [2, 2, 2]
    assert smoke.requests.sets["test"] == 8
    assert all(each.requests <= 2 for each in smoke.routing.consistency)
    assert any("smoke" in note for note in smoke.notes)


def test_some_requests_are_shown_with_their_pictures_and_answers(made, bench, smoke):
    report = made[2]
    assert report.misrouted and report.examples
    for told in report.misrouted:
        routed = bench.routed(told.set)
        (asked,) = [each for each in routed if _is_shown(each, told)]
        (choice,) = bench.stack.route([asked.request()])
        assert (choice.expert, asked.expert) == (told.choice, told.own)
        assert choice.expert != told.own
        assert choice.confidence == pytest.approx(told.confidence, abs=1e-5)
    assert [each.own for each in report.examples] == [name for name in EXPERTS for _ in range(2)]
    for told in report.examples:
        first = next(each for each in bench.routed(told.set) if _is_shown(each, told))
        assert told.right == first.wanted[0] and first.expert == told.own
        (answer,) = bench.stack.answer([first.request()])
        ways = {given.way: given for given in told.answers}
        assert (ways["stack"].by, ways["stack"].text) == (answer.expert, answer.text)
        most = bench.cfg.loras.entry(told.own).max_new_tokens
        (said,) = bench.stack.generate([first.request()], [[told.own, "base"]], [most])
        assert ways["right expert"].text == said[told.own].text
        assert ways["base"].text == said["base"].text
        for given in told.answers:
            assert given.score == bench.judge(first, given.text)["score"]
    none = changed(made[0], smoke=True, smoke_rows=2, samples=0)
    silent = family.measure(none, made[1], quiet)
    assert silent == smoke.model_copy(update={"made": silent.made, "misrouted": (), "examples": ()})


def _is_shown(asked, told) -> bool:
    """Whether a request is the one that a report shows, by its words and what its picture shows."""
    pictures = [Image.open(io.BytesIO(b64decode(each.split(",")[1]))) for each in told.pictures]
    media = asked.open()
    if asked.prompt != told.prompt or len(media) != len(pictures):
        return False
    for medium, small in zip(media, pictures, strict=True):
        assert max(small.size) <= 192 and not small.getexif()
        difference = ImageChops.difference(medium.convert("RGB").resize(small.size), small)
        if np.asarray(difference, dtype=float).mean() > 8:
            return False
    return True


def test_pictures_of_a_report_are_small_all_together(bench, monkeypatch):
    asked = bench.routed("test")
    monkeypatch.setattr(shown, "THUMBNAILS_BYTES", 9000)
    gallery = shown.Gallery(bench)
    pictures = [gallery._thumbnails(each) for each in asked]
    assert 5000 < sum(len(each) for row in pictures for each in row) <= 9000


def test_rows_over_the_limits_are_left_out_and_counted(made, monkeypatch):
    cfg, parts, _ = made
    stack = family.assemble(cfg, parts)
    bench = AdapterEvaluator(cfg, parts, stack, quiet)
    longest = max(len(each.prompt) for each in bench.task("count"))
    monkeypatch.setattr(
        stack.model,
        "limits",
        type(stack.model.limits)(prompt_characters=longest - 1, tokens=10_000),
    )
    again = AdapterEvaluator(cfg, parts, stack, quiet)
    kept = again.task("count")
    assert kept and len(kept) + again.left_out["task count"] == 8
    assert max(len(each.prompt) for each in kept) < longest


def test_what_was_too_long_to_train_with_is_in_the_notes(made, monkeypatch):
    _, parts, report = made
    assert not any("trained without" in note for note in report.notes)
    rows = {
        "train": {"kept": 3, "dropped": {"over max_tokens": 2}},
        "valid": {"kept": 1, "dropped": {}},
    }
    of_count = parts.folder("train_experts", "count") / "adapter.json"
    monkeypatch.setattr(
        evaluate, "read_object", lambda path: {"rows": rows} if path == of_count else {}
    )
    found = list(evaluate._dropped_rows(parts, "count", "train_experts", "count"))
    assert found == ["count was trained without 2 of its 5 train rows, which are over max_tokens."]


def test_the_report_is_shown_whole_on_terminal_and_page(made):
    report = made[2]
    out = io.StringIO()
    show(report, Console(file=out, width=120))
    html = page(report, {})
    for said in (
        "frozen base, centroid",
        "locate (iou, 8 rows)",
        "recompression",
        "belong",
        "test_held",
    ):
        assert said in out.getvalue()
    for said in (
        "Where requests go",
        "Who can do what",
        "What the answers are worth",
        "Who goes where, test_held",
        "neutral prompts",
    ):
        assert said in html
    assert "bits per byte" not in html
    router = report.routing.sets[0].rows[0].accuracy
    assert f"The router sends {100 * router:.1f} % of test requests" in html


@pytest.mark.parametrize("gone", ["routing", "adapters", "answers", "criteria", "speed"])
def test_a_report_that_lacks_a_part_is_still_shown(made, gone):
    kept = made[2].model_dump(exclude={gone})
    report = RequestReport.model_validate(kept)
    assert not getattr(report, gone)
    show(report, Console(file=io.StringIO()))
    assert page(report, {}).endswith("</html>")


def routed(name: str, own: list[int], router: list[int], text: list[int]):
    """Return a set whose choices are given."""
    one = np.eye(2)
    hits = {"router": np.array(router) == own, "text only": np.array(text) == own}
    resamples = GroupBootstrap([str(i) for i in range(len(own))], 200, 0)

    def ahead(row):
        return Difference.model_validate(
            resamples.difference(hits["router"].astype(float), hits[row].astype(float))
        )

    return SimpleNamespace(
        name=name,
        requests=own,
        bootstrap=resamples,
        hits=lambda row="router": hits[row].astype(float),
        ahead=ahead,
        one=one,
    )


def verdicts(router: list[int], scores: dict, stack: float) -> dict[str, bool]:
    """Return the criteria by name, for 20 requests of two experts with the text at chance."""
    own = [0, 1] * 10
    sets = {name: routed(name, own, router, [0] * 20) for name in ("test", "test, neutral prompts")}
    tasks = [
        TaskScores(
            task=task,
            metric="exact",
            requests=20,
            scores=each,
            intervals={task: (0.0, 1.0)},
            figures={},
        )
        for task, each in scores.items()
    ]
    adapters = AdapterScores(adapters=("a", "b", "base"), tasks=tuple(tasks))
    ways = {
        way: AnswerScore(score=score, interval=(0.0, 1.0))
        for way, score in {"stack": stack, "choice": stack, "oracle": 0.9, "base": 0.0}.items()
    }
    row = AnswerRow(requests=20, behind_oracle=None, **ways)
    answers = [AnswerSet(set="test", tasks=(), all=row, ranked_share=0.0, cut_share=0.0)]
    cfg = SimpleNamespace(evaluate=AdapterEvaluateConfig())
    found = list(criteria(cfg, sets, adapters, answers))
    assert all(each.text and each.detail for each in found)
    return {each.name: each.passed for each in found}


GOOD = {"a": {"a": 0.95, "b": 0.1, "base": 0.0}, "b": {"a": 0.2, "b": 0.92, "base": 0.3}}


def test_a_good_run_passes_every_criterion():
    found = verdicts([0, 1] * 10, GOOD, 0.88)
    assert len(found) == 6 and all(found.values())


@pytest.mark.parametrize(
    ("router", "scores", "stack", "failed"),
    [
        (
            [0] * 20,
            GOOD,
            0.88,
            {"looks, test, neutral prompts", "router, test", "router, test, neutral prompts"},
        ),
        ([0, 1] * 10, GOOD | {"a": {"a": 0.8, "b": 0.1, "base": 0.0}}, 0.88, {"experts"}),
        ([0, 1] * 10, GOOD | {"a": {"a": 0.95, "b": 0.1, "base": 0.95}}, 0.88, {"specialised"}),
        ([0, 1] * 10, GOOD, 0.84, {"stack, test"}),
    ],
)
def test_what_falls_short_fails_its_own_criterion_only(router, scores, stack, failed):
    assert {
        name for name, passed in verdicts(router, scores, stack).items() if not passed
    } == failed


def test_changed_pictures_show_the_same_and_are_not_the_same():
    image = small_stack.pictures(1)[0].resize((100, 80))
    assert crop(image).size == (90, 72) and resize(image).size == (75, 60)
    again = recompress(image)
    assert again.size == image.size and again.mode == "RGB"
    assert 0 < np.asarray(ImageChops.difference(image, again), dtype=float).mean() < 12
    asked = EvalRequest("look", "color", "g", lambda: [image])
    assert [change_media(asked, change).open()[0].size for change in PERTURBATIONS.values()] == [
        (90, 72),
        (75, 60),
        (100, 80),
    ]
    assert all(change(Image.new("RGB", (1, 1))).size == (1, 1) for change in (resize, recompress))


def test_rewording_takes_held_out_words_of_the_same_expert():
    dataset = parse(small_stack.RUN).dataset
    asked = EvalRequest("do color", "color", "g", list)
    assert reword(asked, dataset).prompt == "tell me the color"
    assert reword(EvalRequest("tell me the color", "color", "g", list), dataset).prompt in (
        "color please",
        "do color",
    )
    assert reword(EvalRequest("look", "color", "g", list, ambiguous=True), dataset).prompt in (
        "what do you see?",
        "tell me",
    )
    assert reword(EvalRequest("x", "other", "g", list), dataset) is None
    assert reword(asked, dataset) == reword(asked, dataset)


def test_the_order_of_labels_is_turned_only_where_they_are_listed():
    labels = {"a": "A", "b": "B", "none": "Z"}
    listed = "Who should answer?\n- A: colours\n- B) text\nZ = nobody\nAnswer with a letter."
    assert (
        reorder_labels(listed, labels)
        == "Who should answer?\nZ = nobody\n- B) text\n- A: colours\nAnswer with a letter."
    )
    assert reorder_labels("Answer with one letter.", labels) is None
    assert reorder_labels("A: colours\nB: text", labels) is None
