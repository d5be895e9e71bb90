"""The report of a lora_vlm run: who routes how well, who answers what, and whether the run did what
it was asked.

Invariant: what is measured is what is served: every number comes from the stack that `assemble`
builds.

N requests.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch

from ...config.base import NONE
from ...hardware import machine
from ...metrics.answers import mean
from ...metrics.routing import GroupBootstrap
from ...protocols import Progress
from ...report import RequestReport
from ...store.artifacts import now
from ...train.loop import PHASES
from ..lora_vlm.config import LoraVlmConfig
from .eval_data import AdapterEvaluator, EvalRequest
from .inference import BASE
from .peft_io import ABOUT, read_json
from .routing_eval import NEUTRAL, TEXT, Routed, routed_sets, routing
from .stack import ROUTER, assemble

WAYS = ("stack", "choice", "oracle", "base")  # who answers a routed request


def tables(cfg: LoraVlmConfig, parts, progress: Progress) -> RequestReport:
    """Return the report of a run."""
    bench = AdapterEvaluator(cfg, parts, assemble(cfg, parts), progress)
    adapters = _adapters(bench)
    sets = routed_sets(bench)
    routes, answers = routing(bench, sets), _answers(bench, sets)
    report = {
        "run": cfg.name,
        "family": cfg.family,
        "seed": cfg.seed,
        "made": now(),
        "experts": list(cfg.experts),
        "metric": "accuracy of routes and answers on held-out requests",
        "model": _model(cfg, parts, bench),
        "requests": _requests(bench, sets),
        "routing": routes,
        "adapters": adapters,
        "answers": answers,
        "speed": _jobs(cfg, parts),
        "machine": machine(torch.get_num_threads(), _is_bf16(bench)),
        "notes": _notes(cfg, bench, routes),
    }
    report["criteria"] = criteria(cfg, sets, adapters, answers)
    return RequestReport.model_validate(report)


def criteria(
    cfg: LoraVlmConfig, sets: Mapping[str, Routed], adapters: dict, answers: list[dict]
) -> list[dict]:
    """Return the success criteria of the run, each passed or not and why."""
    wanted = cfg.evaluate
    out = [_sees(sets[name]) for name in sets if name.endswith(NEUTRAL)]
    for name in [name for name in sets if not name.endswith(NEUTRAL)] + [
        n for n in sets if n.endswith(NEUTRAL)
    ]:
        accuracy = float(sets[name].hits().mean())
        out.append(
            {
                "name": f"router, {name}",
                "text": f"the router is right for at least {wanted.min_router_accuracy:.0%}",
                "passed": accuracy >= wanted.min_router_accuracy,
                "detail": f"{accuracy:.1%} of {len(sets[name].asked)} requests",
            }
        )
    out += [_learned(adapters, wanted.min_expert_score), _special(adapters)]
    for each in answers:
        gap = each["all"]["oracle"]["score"] - each["all"]["stack"]["score"]
        out.append(
            {
                "name": f"stack, {each['set']}",
                "passed": gap <= wanted.oracle_gap,
                "text": f"the stack's answers score at most {100 * wanted.oracle_gap:g} points below the right expert's",
                "detail": f"{each['all']['stack']['score']:.3f} against {each['all']['oracle']['score']:.3f}",
            }
        )
    return out


def _sees(routed: Routed) -> dict:
    ahead = routed.ahead(TEXT)
    low, high = ahead["interval"]
    return {
        "name": f"looks, {routed.name}",
        "passed": low > 0,
        "text": "where only the picture tells, the router beats the same router without pictures",
        "detail": f"{routed.hits().mean():.1%} against {routed.hits(TEXT).mean():.1%}; "
        f"ahead by {ahead['difference']:+.3f} [{low:+.3f}, {high:+.3f}]",
    }


def _learned(adapters: dict, least: float) -> dict:
    own = {task["task"]: task["scores"][task["task"]] or 0.0 for task in adapters["tasks"]}
    worst = min(own, key=own.get)
    return {
        "name": "experts",
        "text": f"every expert scores at least {least:g} on its own task",
        "passed": own[worst] >= least,
        "detail": f"least: {worst} with {own[worst]:.3f}",
    }


def _special(adapters: dict) -> dict:
    """Return whether each expert is better on its own task than every other adapter and the base."""
    lost = []
    for task in adapters["tasks"]:
        score = {name: value or 0.0 for name, value in task["scores"].items()}
        own = score.pop(task["task"])
        best = max(score, key=score.get)
        lost += (
            [f"{best} on {task['task']} ({score[best]:.3f} against {own:.3f})"]
            if score[best] >= own
            else []
        )
    return {
        "name": "specialised",
        "text": "every expert is the best on its own task, the base included",
        "passed": not lost,
        "detail": f"not so: {', '.join(lost)}" if lost else "each one leads on its own",
    }


def _adapters(bench: AdapterEvaluator) -> dict:
    """Return what every adapter and the base score on every task's test rows."""
    names, tasks = (*bench.cfg.experts, BASE), []
    for name in bench.cfg.experts:
        asked = bench.task(name)
        judged = bench.scores(asked, [names] * len(asked), f"every adapter on {name}")
        resamples = GroupBootstrap(
            [each.group for each in asked], bench.cfg.evaluate.bootstrap, bench.cfg.seed
        )
        score = {
            adapter: np.array([each[adapter]["score"] for each in judged]) for adapter in names
        }
        metric = bench.cfg.loras.entry(name).metric
        tasks.append(
            {
                "task": name,
                "metric": metric,
                "requests": len(asked),
                "scores": {adapter: _mean(x_N) for adapter, x_N in score.items()},
                "intervals": {adapter: resamples.interval(x_N) for adapter, x_N in score.items()},
                "figures": _figures([each[name] for each in judged]),
            }
        )
    return {"adapters": list(names), "tasks": tasks}


def _answers(bench: AdapterEvaluator, sets: Mapping[str, Routed]) -> list[dict]:
    """Return per test split how well the stack answers beside the router's first choice, the oracle
    and the base."""
    out = []
    for name, routed in sets.items():
        keep = [i for i, each in enumerate(routed.asked) if each.wanted and each.expert != NONE]
        if name.endswith(NEUTRAL) or not keep:
            continue
        asked = [routed.asked[i] for i in keep]
        choices = [bench.stack.choices[i] for i in routed.prob_NC[keep].argmax(1)]
        out.append(
            {"set": name, **_compared(bench, asked, [bench.runs(choice) for choice in choices])}
        )
    return out


def _compared(bench: AdapterEvaluator, asked: list[EvalRequest], chosen: Sequence[str]) -> dict:
    ran = [
        tuple(dict.fromkeys((each.expert, BASE, name)))
        for each, name in zip(asked, chosen, strict=True)
    ]
    judged = bench.scores(asked, ran, "the right expert and the base on routed requests")
    answers = bench.answers(asked)
    score = {
        "stack": [
            bench.judge(each, answer.text)["score"]
            for each, answer in zip(asked, answers, strict=True)
        ],
        "choice": [scores[name]["score"] for scores, name in zip(judged, chosen, strict=True)],
        "oracle": [
            scores[each.expert]["score"] for scores, each in zip(judged, asked, strict=True)
        ],
        "base": [scores[BASE]["score"] for scores in judged],
    }
    score = {way: np.array(values) for way, values in score.items()}
    own = np.array([each.expert for each in asked])
    part = partial(_part, bench, asked, score)
    tasks = [
        {"task": name, **part(own == name)} for name in bench.cfg.experts if (own == name).any()
    ]
    return {
        "tasks": tasks,
        "all": part(np.ones(len(asked), dtype=bool)),
        "ranked_share": float(np.mean([bool(answer.others) for answer in answers])),
        "cut_share": float(np.mean([answer.finish == "length" for answer in answers])),
    }


def _part(
    bench: AdapterEvaluator,
    asked: list[EvalRequest],
    score: Mapping[str, np.ndarray],
    keep_N: np.ndarray,
) -> dict:
    groups = [each.group for each, keep in zip(asked, keep_N, strict=True) if keep]
    resamples = GroupBootstrap(groups, bench.cfg.evaluate.bootstrap, bench.cfg.seed)
    ways = {
        w: {"score": _mean(score[w][keep_N]), "interval": resamples.interval(score[w][keep_N])}
        for w in WAYS
    }
    behind = resamples.difference(score["oracle"][keep_N], score["stack"][keep_N])
    return {"requests": len(groups), **ways, "behind_oracle": behind}


def _figures(judged: Sequence[Mapping]) -> dict[str, float | None]:
    """Return the means of a metric's own figures."""
    return {
        name: mean(judged, name)
        for name in dict.fromkeys(k for each in judged for k in each)
        if name != "score"
    }


def _mean(score_N: np.ndarray) -> float | None:
    return float(score_N.mean()) if len(score_N) else None


def _model(cfg: LoraVlmConfig, parts, bench: AdapterEvaluator) -> dict:
    core, base = bench.stack.mixed.core, cfg.loras.base
    lora = [p.numel() for name, p in core.named_parameters() if ".lora_" in name]
    return {
        "base": base.model or "built at random",
        **({"revision": base.revision} if base.revision else {}),
        "dtype": base.dtype,
        "base_parameters": sum(p.numel() for p in core.parameters()) - sum(lora),
        "adapter_parameters": sum(lora),
        "adapters": len(bench.stack.mixed.adapters),
    }


def _requests(bench: AdapterEvaluator, sets: Mapping[str, Routed]) -> dict:
    """Return how many requests stand behind the numbers, and how many were left out because they
    are over a limit."""
    routed = {name: len(each.asked) for name, each in sets.items()}
    return {"sets": routed, "left_out": bench.left_out, "trained_on": len(bench.learned)}


def _jobs(cfg: LoraVlmConfig, parts) -> list[dict]:
    """Return throughput, time by phase and peak memory of every training, from the manifests."""
    out = []
    for stage in ("train_experts", "train_router"):
        for item in cfg.items(stage):
            m = parts.manifest(stage, item).metrics
            kept = {
                key: m.get(key) for key in ("seconds", "tokens", "tokens_per_s", "peak_mb", "mfu")
            }
            phases = {f"{phase}_s": m.get(f"{phase}_s", 0.0) for phase in PHASES}
            out.append({"job": f"{stage} {item}" if item else stage, **kept, **phases})
    return out


def _is_bf16(bench: AdapterEvaluator) -> bool:
    return bench.stack.mixed.core.dtype == torch.bfloat16


def _notes(cfg: LoraVlmConfig, bench: AdapterEvaluator, routes: dict) -> list[str]:
    """Return what a reader of the report has to know beside it."""
    out = [
        "Intervals resample pictures with all their requests, paired across rows; they do not cover training seeds."
    ]
    if cfg.evaluate.smoke:
        out.append(
            f"A smoke evaluation: at most {cfg.evaluate.smoke_rows} rows of each set, too few to decide much."
        )
    if cfg.loras.base.model is None:
        out.append(
            "The base is random: the numbers show that the pipeline works, not what a pretrained base reaches."
        )
    untested = [each["change"] for each in routes["consistency"] if not each["requests"]]
    if "order of labels" in untested:
        out.append(
            "The router's instruction does not list its labels, so their order is nowhere it could matter."
        )
    if "other words" in untested:
        out.append(
            "dataset.paraphrases and dataset.neutral hold no other words, so rewording was not tried."
        )
    for name, count in bench.left_out.items():
        out.append(f"{count} rows of {name} are over the limits of a request and were left out.")
    return out + _untrained(cfg, bench)


def _untrained(cfg: LoraVlmConfig, bench: AdapterEvaluator) -> list[str]:
    """Return which trainings left rows out as too long, from what their adapters say."""
    out = []
    for name, stage in (
        *((name, "train_experts") for name in cfg.experts),
        (ROUTER, "train_router"),
    ):
        folder = bench.parts.folder(stage, name if stage == "train_experts" else None)
        for split, rows in read_json(folder / ABOUT).get("rows", {}).items():
            if count := sum(rows["dropped"].values()):
                whole = count + rows["kept"]
                out.append(
                    f"{name} was trained without {count} of its {whole} {split} rows, which are over max_tokens."
                )
    return out
