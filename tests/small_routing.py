"""Routing sets at the smallest sizes: what preprocess would leave, settings for two experts, a set
made of it."""

import hashlib
import json
from collections import Counter
from pathlib import Path

from pipeline.config.routing_set import RoutingSetConfig
from pipeline.data.routing import dataset

WORDS = {
    "paraphrases": {
        "ocr": {"seen": ["Read it.", "Transcribe: {prompt}"], "held": ["What is written?"]},
        "count": {"seen": ["How many?"], "held": ["Give their number."]},
    },
    "neutral": {"seen": ["What is this?", "Look."], "held": ["See?"]},
}
SIZES = {"per_expert": {"train": 20, "valid": 4, "test": 5}}


def task(root: Path, expert: str, rows: list[dict] | int = 60) -> Path:
    """Write what preprocess leaves for an expert; a picture is a name such as `pen-3`, its content
    is not read."""
    folder = root / f"preprocess-{expert}"
    (folder / "images").mkdir(parents=True)
    rows = [{}] * rows if isinstance(rows, int) else rows
    with (folder / "rows.jsonl").open("w") as out:
        for i, row in enumerate(rows):
            names = row.get("pictures", [f"{expert}-{i}"])
            files = [
                f"images/{hashlib.sha256(name.encode()).hexdigest()[:16]}.png" for name in names
            ]
            for file in files:
                (folder / file).touch()
            about = {
                "id": f"{i:04}",
                "images": files,
                "prompt": f"Do {expert}.",
                "answer": "-",
                "split": ("train", "train", "train", "valid", "test", "test")[i % 6],
                "source": {"dataset": "here", "id": str(i), "revision": None},
                "group": f"sha256:{hashlib.sha256(names[0].encode()).hexdigest()}"
                if names
                else "text",
            }
            about |= {name: value for name, value in row.items() if name != "pictures"}
            out.write(json.dumps(about) + "\n")
    return folder


def settings(experts=("ocr", "count"), **changes) -> RoutingSetConfig:
    raw = {"sources": [{"expert": name} for name in experts], **SIZES, **WORDS, **changes}
    raw["paraphrases"] = {
        name: lists for name, lists in raw["paraphrases"].items() if name in experts
    }
    return RoutingSetConfig.model_validate(raw)


def generate(
    wanted: RoutingSetConfig, tasks: dict, root: Path, name="routing-1", labels=()
) -> tuple[list[dict], dict]:
    folder = root / name
    folder.mkdir(exist_ok=True)
    metrics = dataset.generate(wanted, tasks, dict(labels), folder)
    manifest = json.loads((folder / "routing.manifest.json").read_text("utf-8"))
    assert metrics["rows"] == manifest["rows"] and len(metrics["short"]) == len(manifest["short"])
    with (folder / "routing.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines], manifest


def counts(rows: list[dict], *names: str) -> Counter:
    return Counter(tuple(row[name] for name in names) for row in rows)
