"""Whole reports of both kinds, made up: every field is filled, and differs from its neighbours."""

import io
import math
from base64 import b64encode

from PIL import Image

from pipeline.report import LanguageReport, RequestReport


def small_jpeg() -> str:
    """Return a picture of one pixel in base64."""
    buffer = io.BytesIO()
    Image.new("RGB", (1, 1), "grey").save(buffer, "JPEG")
    return b64encode(buffer.getvalue()).decode()


PICTURE = f"data:image/jpeg;base64,{small_jpeg()}"
NASTY = '<script>alert("x")</script>&\x1b[31m\u202e'
DOMAINS = ("python", "c", "docs")
MACHINE = {
    "cpu": "some processor",
    "cores": 2,
    "threads": 2,
    "gpu": None,
    "dtype": "bf16",
    "system": "Linux x86_64",
    "python": "3.11.9",
    "torch": "2.13.0",
}
JOB = {
    "job": "train_shared",
    "seconds": 372.0,
    "tokens": 8_000_000,
    "tokens_per_s": 22e3,
    "data_s": 1.5,
    "forward_s": 100.0,
    "backward_s": 200.0,
    "optimizer_s": 40.0,
    "peak_mb": 812.0,
    "mfu": 0.41,
}
SEARCH = {
    "job": "lr_experts",
    "lr": 3e-4,
    "steps": 14,
    "before_nats": 3.125,
    "tried": [
        {"lr": 1e-4, "nats": 2.75},
        {"lr": 3e-4, "nats": 2.625},
        {"lr": 1e-3, "nats": 2.875},
    ],
}


def language_values(domains: tuple[str, ...] = DOMAINS) -> dict:
    """Return a complete report with an anchor, a dense row, an oracle and the stack, as values."""
    experts = ["anchor", *domains]
    shares = {}
    for domain in domains:
        others = 0.2 / (len(domains) - 1)
        shares[domain] = [0.1] + [0.7 if name == domain else others for name in domains]
    routing = {
        "share": shares,
        "agreement": 0.712,
        "agreement_by_domain": dict.fromkeys(domains, 0.7),
        "entropy": 1.31,
        "max_entropy": math.log(4),
        "max_violation": 0.25,
        "least": ["anchor", 0.1],
        "most": ["c", 0.31],
        "dead": ["docs"],
        "layers": [
            {
                "layer": i,
                "share": shares,
                "agreement": 0.6 + i / 100,
                "entropy": 1.2 + i / 100,
                "max_violation": 0.2 + i / 100,
            }
            for i in range(3)
        ],
    }
    versus = {"difference": 0.07, "interval": [0.05, 0.09]}
    quality = [
        quality_row("trunk + dummy", "part", 1.5, domains),
        *(quality_row(f"expert {domain}", "expert", 1.1, domains) for domain in domains),
        quality_row(
            "dense continued",
            "dense",
            1.4,
            domains,
            axis="same total tokens",
            versus_stack=versus,
        ),
        quality_row("random router", "router", 9.0, domains),
        quality_row("stack (top-2)", "router", 1.3, domains, is_stack=True),
        quality_row("oracle expert", "oracle", 1.0, domains),
    ]
    return {
        "run": "demo",
        "family": "ffn_moe",
        "seed": 3,
        "made": "2026-05-01T10:00:00+00:00",
        "experts": experts,
        "domains": list(domains),
        "metric": "bits per byte on held-out text",
        "model": {
            "layers": 3,
            "d_model": 64,
            "d_ff": 192,
            "vocab_size": 2048,
            "context_tokens": 128,
            "top_k": 2,
            "active_parameters": 11_800_000,
            "total_parameters": 30_100_000,
            "expert_bytes": 4_912_345,
        },
        "data": {
            "test_tokens": dict.fromkeys(domains, 41),
            "test_documents": dict.fromkeys(domains, 42),
            "train_tokens": dict.fromkeys(domains, 43),
        },
        "quality": quality,
        "opt_out": [
            {
                "removed": name,
                "ratio": {domain: 1.4 if name == domain else 1.01 for domain in domains},
                "delta_bits": dict.fromkeys(domains, 0.1),
            }
            for name in experts
        ],
        "routing": routing,
        "text_routing": text_routing(domains),
        "active": [
            {
                "top_k": k,
                "bits_per_byte": dict.fromkeys(domains, 1.2),
                "mean": 1.2 + k / 50,
                "interval": [1.1, 1.4],
                "active_parameters": k * 5_000_000,
            }
            for k in (1, 2)
        ],
        "matrix": {
            "rows": ["trunk + dummy", *experts, "stack"],
            "bits_per_byte": [
                [1.5] * len(domains),
                *([1.2 if name == domain else 1.9 for domain in domains] for name in experts),
                [1.3] * len(domains),
            ],
        },
        "criteria": [
            {
                "name": "primary",
                "text": "beats dense",
                "passed": True,
                "detail": "by 0.1",
            },
            {
                "name": "tertiary",
                "text": "all used",
                "passed": False,
                "detail": "4 %",
            },
        ],
        "wins": [
            {
                "against": "dense continued",
                "axis": "same total tokens",
                "difference": 0.1,
                "interval": [0.05, 0.15],
                "verdict": "better",
            },
            {
                "against": "dense wide",
                "axis": "same active parameters",
                "difference": -0.02,
                "interval": [-0.03, -0.01],
                "verdict": "worse",
            },
        ],
        "continuations": [
            {
                "domain": "code",
                "prompt": "def first(",
                "held_out": "items): return items[0]",
                "written": [
                    ["trunk + dummy", "the the the"],
                    ["dense total", "x): return x"],
                    ["stack (top-2)", "list): return 1"],
                ],
                "spans": [
                    {"speaker": "python", "tokens": 3, "text": "list): "},
                    {"speaker": "c", "tokens": 2, "text": "return 1"},
                ],
            }
        ],
        "samples": [
            {
                "domain": "docs",
                "spans": [
                    {"speaker": "anchor", "tokens": 2, "text": "How to\n"},
                    {"speaker": "docs", "tokens": 5, "text": "  begin"},
                    {"speaker": "base", "tokens": 1, "text": "."},
                ],
                "goes_on": True,
            }
        ],
        "speed": [dict(JOB)],
        "rates": [dict(SEARCH)],
        "machine": dict(MACHINE),
        "notes": ["one seed only; see https://example.org for more"],
    }


def text_routing(domains: tuple[str, ...]) -> dict:
    """Return where whole texts go, half of them to the base, as values."""
    prompts = []
    for i, tokens in enumerate((16, 64)):
        prompts.append(
            {
                "prompt_tokens": tokens,
                "agreement": 0.61 + 0.1 * i,
                "base_share": 0.36 + 0.1 * i,
                "bits_per_byte": dict.fromkeys(domains, 1.61 + 0.1 * i),
                "mean": 1.62 + 0.1 * i,
                "is_served": bool(i),
            }
        )
    texts = {}
    for domain in domains:
        texts[domain] = [*(6 if name == domain else 2 for name in domains), 10]
    return {
        "choices": [*domains, "base"],
        "prompt_tokens": 64,
        "temperature": 0.8,
        "threshold": 0.45,
        "texts": texts,
        "agreement_by_domain": dict.fromkeys(domains, 0.3),
        "prompts": prompts,
    }


def quality_row(name: str, kind: str, mean: float, domains=DOMAINS, **more) -> dict:
    """Return the values of one row of the quality table."""
    row = {
        "name": name,
        "kind": kind,
        "axis": "",
        "bits_per_byte": {domain: mean + 0.01 * i for i, domain in enumerate(domains)},
        "mean": mean,
        "interval": [mean - 0.01, mean + 0.01],
        "intervals": {domain: [mean - 0.05, mean + 0.05] for domain in domains},
        "perplexity": dict.fromkeys(domains, 20 * mean),
        "mean_perplexity": 20 * mean,
        "active_parameters": 7_400_000,
        "total_parameters": 30_000_000,
        "flops_per_token": 44_000_000,
        "train_tokens": 12_000_000,
        "oracle_gain": 0.5,
        "versus_stack": None,
        "is_stack": False,
    }
    return row | more


def language_report(domains: tuple[str, ...] = DOMAINS, **changes) -> LanguageReport:
    """Return the complete report on text, with other parts where they are given."""
    return LanguageReport.model_validate(language_values(domains) | changes)


def request_values() -> dict:
    """Return a complete report on requests with two experts and none, as values."""

    def router_row(name: str, accuracy: float, **more) -> dict:
        row = {
            "name": name,
            "accuracy": accuracy,
            "interval": [accuracy - 0.04, accuracy + 0.04],
            "top_k_accuracy": accuracy + 0.02,
            "nats": 0.345,
            "ece": 0.067,
            "is_router": False,
        }
        return row | more

    ahead = {"difference": 0.471, "interval": [0.412, 0.523]}

    def routed(name: str, requests: int) -> dict:
        return {
            "name": name,
            "requests": requests,
            "rows": [
                router_row("router", 0.931, is_router=True),
                router_row("text only", 0.46, router_ahead=ahead),
            ],
        }

    def answered(score: float) -> dict:
        ways = {}
        for i, way in enumerate(("stack", "choice", "oracle", "base")):
            value = score + i / 100
            ways[way] = {"score": value, "interval": [value - 0.05, value + 0.05]}
        behind = {"difference": 0.0213, "interval": [0.0112, 0.0314]}
        return ways | {"requests": 77, "behind_oracle": behind}

    return {
        "run": "look",
        "family": "lora_vlm",
        "seed": 4,
        "made": "2026-05-02T10:00:00+00:00",
        "experts": ["color", "count"],
        "metric": "accuracy of routes and answers",
        "model": {
            "base": "a base",
            "revision": "f00d",
            "dtype": "float32",
            "base_parameters": 741_000,
            "adapter_parameters": 295_000,
            "adapters": 3,
        },
        "requests": {
            "sets": {"test": 210, "test, neutral prompts": 105},
            "left_out": {"task count": 6},
            "trained_on": 900,
        },
        "routing": {
            "choices": ["color", "count", "none"],
            "top_k": 2,
            "temperature": 1.49,
            "threshold": 0.8,
            "sets": [routed("test", 210), routed("test, neutral prompts", 105)],
            "confusion": {"test": [[61, 7, 2], [3, 62, 5], [1, 8, 61]]},
            "recall": {"test": [0.871, 0.886, None]},
            "calibration": [
                {
                    "set": "test",
                    "nats_before": 0.411,
                    "nats_after": 0.322,
                    "ece_before": 0.133,
                    "ece_after": 0.044,
                    "reliability": [{"share": 1.0, "confidence": 0.91, "accuracy": 0.931}],
                }
            ],
            "coverage": [
                {
                    "set": "test",
                    "points": [
                        {"threshold": 0.0, "coverage": 1.0, "accuracy": 0.931},
                        {"threshold": 0.9, "coverage": 0.62, "accuracy": 0.984},
                    ],
                }
            ],
            "none": [{"set": "test", "requests": 70, "auroc": 0.987, "auroc_of_confidence": 0.876}],
            "consistency": [
                {"change": "crop", "requests": 40, "same": 0.925},
                {"change": "order of labels", "requests": 0, "same": None},
            ],
        },
        "adapters": {
            "adapters": ["color", "count", "base"],
            "tasks": [
                {
                    "task": name,
                    "metric": metric,
                    "requests": 50,
                    "scores": {"color": 0.81, "count": 0.72, "base": 0.13},
                    "intervals": {"color": [0.7, 0.9], "count": [0.6, 0.8], "base": None},
                    "figures": figures,
                }
                for name, metric, figures in (
                    ("color", "exact", {}),
                    ("count", "count", {"absolute error": 0.567, "readable": None}),
                )
            ],
        },
        "rates": [SEARCH | {"job": "lr_experts color"}],
        "misrouted": [
            {
                "set": "test_held",
                "own": "count",
                "prompt": "how many red ones?",
                "pictures": [PICTURE],
                "choice": "color",
                "confidence": 0.765,
            }
        ],
        "examples": [
            {
                "set": "test",
                "own": "color",
                "prompt": "what colour?",
                "pictures": [PICTURE],
                "right": "red",
                "answers": [{"way": "stack", "by": "color", "text": "reddish", "score": 0.284}],
            }
        ],
        "answers": [
            {
                "set": "test",
                "tasks": [answered(0.711) | {"task": "color"}, answered(0.522) | {"task": "count"}],
                "all": answered(0.633),
                "ranked_share": 0.21,
                "cut_share": 0.03,
            }
        ],
        "criteria": [
            {
                "name": "router",
                "text": "sends well",
                "passed": True,
                "detail": "93 %",
            },
        ],
        "speed": [dict(JOB, job="train_experts color")],
        "machine": dict(MACHINE, gpu="some card"),
        "notes": ["only a test"],
    }


def request_report(**changes) -> RequestReport:
    """Return the complete report on requests, with other parts where they are given."""
    return RequestReport.model_validate(request_values() | changes)


def histories(rows: int = 30) -> dict[str, list[dict]]:
    """Return the histories of a trunk, two experts and a router."""
    steps = []
    for s in range(1, rows + 1):
        steps.append(
            {
                "step": s,
                "tokens": s * 1000,
                "train_nats": 9 - s / 10,
                "lr": 1e-3,
                "tokens_per_s": 2e4,
                "rss_mb": 800.0 + s,
            }
        )
    for row in steps[::10]:
        row["valid_nats"] = row["train_nats"] + 0.1
    routed = [row | {"load": [0.25] * 4, "entropy": 1.38, "temperature": 1.0} for row in steps]
    return {
        "train_shared": steps,
        "train_experts python": list(steps),
        "train_experts c": list(steps),
        "train_router": routed,
    }


def spoiled(value):
    """Return a value in which every float is NaN."""
    if isinstance(value, dict):
        return {key: spoiled(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [spoiled(inner) for inner in value]
    return math.nan if isinstance(value, float) else value
