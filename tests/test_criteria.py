"""What a criterion says is what it decided: figures around a threshold are written with the digits
that show on which side they are, and with too little measured it stays open."""

import random
import re
from decimal import Decimal
from math import inf, nextafter
from types import SimpleNamespace

import numpy as np
import pytest

from pipeline.families.adapters import criteria as of_adapters
from pipeline.families.adapters.sections import AdapterEvaluateConfig
from pipeline.families.ffn_moe.criteria import TrainTestGap, against, all_used, notes
from pipeline.metrics.bootstrap import LEAST_UNITS
from pipeline.metrics.routing import GroupBootstrap
from pipeline.report import run_facts
from pipeline.report.format import beside_limit, limit, reaches
from pipeline.report.schema.base import Criterion, Difference
from pipeline.report.schema.language import ExpertShare, LanguageReport, TextCounts
from pipeline.report.schema.requests import (
    AdapterScores,
    AnswerRow,
    AnswerScore,
    AnswerSet,
    TaskScores,
)
from tests import small

NUMBER = r"([+-]?[0-9]+(?:[.][0-9]+)?)"
NOISE = Decimal("4e-11")  # per cent: less than half of the twelfth place of a share
LIMITS = (0.25, 0.1, 0.07, 0.333, 0.255, 0.9, 0.905, 1 / 3, 0.0)


def close_to(value: float, draw: random.Random) -> float:
    """Return a number at, just beside or near a value."""
    beside = value + draw.choice((-1, 1)) * 10 ** draw.uniform(-15, -1)
    return draw.choice((beside, beside, value, nextafter(value, inf), nextafter(value, -inf)))


@pytest.mark.parametrize("first", range(0, 400, 50))
def test_a_share_never_reads_as_the_other_side_of_its_threshold(first):
    for seed in range(first, first + 50):
        reads_as_its_side(seed)


def reads_as_its_side(seed):
    draw = random.Random(seed)
    least = draw.choice(LIMITS)
    value = close_to(least, draw)
    said = Decimal(beside_limit(value, least, draw.choice((0, 1))).rstrip(" %"))
    asked = Decimal(limit(least).rstrip(" %"))
    assert (said >= asked - NOISE) == reaches(value, least)
    if abs(value - least) > 1e-12:
        assert reaches(value, least) == (value > least)


def test_a_share_is_written_with_few_digits_where_they_do():
    assert beside_limit(0.4, 0.25, 0) == "40 %"
    assert beside_limit(0.2496, 0.25, 0) == "24.96 %"
    assert beside_limit(0.2504, 0.25, 0) == "25 %"
    assert limit(0.25) == "25 %" and limit(0.255) == "25.5 %" and limit(0.07) == "7 %"


@pytest.mark.parametrize("first", range(0, 400, 50))
def test_which_half_of_a_primary_criterion_passed_is_said_and_shown(first):
    for seed in range(first, first + 50):
        says_which_half_passed(seed)


def says_which_half_passed(seed):
    draw = random.Random(seed)
    wanted = draw.choice(LIMITS[:-1])
    theirs = TrainTestGap(draw.uniform(1, 4), draw.choice((draw.uniform(1e-4, 1), -0.1, 0.0)))
    gap = draw.choice((close_to(theirs.gap * (1 - wanted), draw), -abs(theirs.gap)))
    mine = TrainTestGap(close_to(theirs.test, draw), gap)
    passed, said = against(mine, theirs, wanted)
    one, other = map(Decimal, re.search(f"{NUMBER} against {NUMBER} nats", said).groups())
    is_better = one < other
    if abs(mine.test - theirs.test) > 1e-12:
        assert is_better == (mine.test < theirs.test)
    assert ("no better" not in said) == is_better
    is_closed = False
    figures = rf"of its gap closed [(]{NUMBER} against {NUMBER}[)]"
    found = re.search(rf"(?:{NUMBER} %|all) {figures}", said)
    assert bool(found) == (theirs.gap > 0)
    if found:
        closed, gap, whole = (each and Decimal(each) for each in found.groups())
        assert (closed is None) == (mine.gap <= 0)
        closed = 100 if closed is None else closed
        is_closed = closed >= Decimal(limit(wanted).rstrip(" %")) - NOISE
        assert (float(1 - gap / (whole or 1)) >= wanted - 4e-13) == is_closed
        share = 1 - mine.gap / theirs.gap
        if abs(share - wanted) > 1e-12:
            assert is_closed == (share > wanted)
    half = {
        (True, True): "both",
        (True, False): "by the test alone",
        (False, True): "by the gap alone",
        (False, False): "neither",
    }[is_better, is_closed]
    assert said.startswith(f"{half}: ")
    assert passed == (half != "neither")


def adapters(scores: dict, rows: int) -> AdapterScores:
    """Return what experts score on their own tasks, measured on so many rows."""
    sure = (0.0, 1.0) if rows >= LEAST_UNITS else None
    tasks = []
    for name, own in scores.items():
        tasks.append(
            TaskScores(
                task=name,
                metric="exact",
                requests=rows,
                scores={name: own, "base": 0.0},
                intervals={name: sure, "base": sure},
                figures={},
            )
        )
    return AdapterScores(adapters=(*scores, "base"), tasks=tuple(tasks))


def answers(stack: float, oracle: float, sure=(0.0, 1.0)) -> AnswerSet:
    scores = {"stack": stack, "choice": stack, "oracle": oracle, "base": 0.0}
    ways = {way: AnswerScore(score=score, interval=sure) for way, score in scores.items()}
    row = AnswerRow(requests=40, behind_oracle=None, **ways)
    return AnswerSet(set="test", tasks=(), all=row, ranked_share=0.0, cut_share=0.0)


def routed(right: int, requests: int):
    """Return a set with so many requests, of which so many reach their own expert."""
    hit_N = np.arange(requests) < right
    resamples = GroupBootstrap([str(i) for i in range(requests)], 100, 0)
    ahead = resamples.difference(hit_N.astype(float), np.zeros(requests))
    return SimpleNamespace(
        name="test, neutral prompts",
        requests=range(requests),
        bootstrap=resamples,
        hits=lambda row="router": hit_N.astype(float),
        ahead=lambda row: Difference.model_validate(ahead),
    )


@pytest.mark.parametrize("first", range(0, 150, 50))
def test_the_criteria_of_adapters_say_what_they_decided(first):
    for seed in range(first, first + 50):
        says_what_it_decided(seed)


def says_what_it_decided(seed):
    draw = random.Random(seed)
    wanted = AdapterEvaluateConfig(
        min_router_accuracy=draw.choice((0.9, 0.905, 0.125)),
        min_expert_score=draw.choice((0.9, 0.85, 0.125)),
        oracle_gap=draw.choice((0.02, 0.025, 0.005)),
    )
    requests = draw.choice((LEAST_UNITS, 200, 3000))
    right = round(requests * wanted.min_router_accuracy) + draw.choice((-1, 0, 1))
    oracle = draw.uniform(0.3, 1)
    stack = close_to(oracle - wanted.oracle_gap, draw)
    own = close_to(wanted.min_expert_score, draw)
    found = of_adapters.criteria(
        SimpleNamespace(evaluate=wanted),
        {"test, neutral prompts": routed(right, requests)},
        adapters({"a": own, "b": 1.1}, LEAST_UNITS),
        [answers(stack, oracle)],
    )
    by_name = {each.name.split(",")[0]: each for each in found}
    router = by_name["router"]
    assert router.passed == (right >= round(requests * wanted.min_router_accuracy, 6))
    said, asked = (re.search(NUMBER + " %", text)[1] for text in (router.detail, router.text))
    assert (Decimal(said) >= Decimal(asked)) == router.passed
    experts = by_name["experts"]
    said = re.search(f"with {NUMBER}", experts.detail)[1]
    assert (float(said) >= wanted.min_expert_score - 4e-13) == experts.passed
    near = by_name["stack"]
    said = re.search(f"{NUMBER} points below: {NUMBER} against {NUMBER}", near.detail)
    points, lower, upper = map(float, said.groups())
    if abs(oracle - stack - wanted.oracle_gap) > 1e-12:
        assert near.passed == (oracle - stack < wanted.oracle_gap)
    assert (points <= 100 * wanted.oracle_gap + 4e-11) == near.passed
    assert (upper - lower <= wanted.oracle_gap + 4e-13) == near.passed


@pytest.mark.parametrize("few", [1, 2, 12, LEAST_UNITS - 1])
def test_what_was_measured_on_few_stays_open_and_is_named(few):
    sets = {"test, neutral prompts": routed(few, few)}
    scores = adapters({"a": 0.99, "b": 0.98}, few)
    cfg = SimpleNamespace(evaluate=AdapterEvaluateConfig())
    found = list(of_adapters.criteria(cfg, sets, scores, [answers(0.9, 0.9, None)]))
    assert [each.passed for each in found] == [None] * 5
    (note,) = of_adapters.measured_on_few(sets, scores, "picture")
    assert f"({few} requests)" in note and f"a ({few} rows), b ({few} rows)" in note
    enough = {"test, neutral prompts": routed(LEAST_UNITS, LEAST_UNITS)}
    scores = adapters({"a": 0.99}, LEAST_UNITS)
    assert not list(of_adapters.measured_on_few(enough, scores, "picture"))


def test_experts_and_domains_are_named_as_the_tables_show_them():
    routing = SimpleNamespace(least=ExpertShare("Family-law", 0.03), entropy=0.5, max_entropy=0.7)
    labels = {"Family-law": "Family law"}
    assert all_used(routing, 0.05, labels).detail.startswith("least Family law 3.0 %,")
    assert all_used(routing, 0.05, {}).detail.startswith("least Family-law 3.0 %,")
    cfg = small.config(partition__domains=("Family law", "code"))
    names = cfg.partition.names
    counts = TextCounts(
        test_tokens=dict.fromkeys(names, 9),
        test_documents=dict.fromkeys(names, 2),
        train_tokens=dict.fromkeys(names, 9),
        too_few=names,
    )
    few = notes(cfg, 0.0, counts)[1]
    assert "measured: Family law 2, code 2." in few


def test_an_open_criterion_is_neither_passed_nor_failed_nor_coloured():
    each = [Criterion(name=str(p), text="t", passed=p, detail="d") for p in (True, False, None)]
    report = LanguageReport(run="r", family="ffn_moe", criteria=tuple(each))
    cells = [row.cells[0] for row in run_facts.criteria(report).rows]
    assert [(cell.text, cell.tone) for cell in cells] == [
        ("pass", "good"),
        ("fail", "bad"),
        ("open", ""),
    ]
    assert run_facts.tiles(report) == [("criteria passed", "1 of 3", "1 open")]
