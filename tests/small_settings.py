"""What each stage of a lora_vlm run leaves behind, made small and quickly, to compare two settings
by.

Left out of a product is what only repeats settings: the options in adapter.json, the digest in a
manifest.
"""

import hashlib
import itertools
import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import lora_small
import small_routing
import small_tasks
from fakes import FolderParts, train_io

from pipeline.config.base import merge
from pipeline.errors import PipelineError
from pipeline.families.adapters import evaluate
from pipeline.families.adapters.eval_data import AdapterEvaluator
from pipeline.families.adapters.routing_eval import routed_sets, routing
from pipeline.families.adapters.stack import ROUTER
from pipeline.families.load import parse
from pipeline.families.lora_vlm import family
from pipeline.families.lora_vlm.config import LoraVlmConfig
from pipeline.protocols import quiet
from pipeline.report import RequestReport
from pipeline.store.artifacts import load_tensors, save_tensors
from pipeline.train import loop
from tests import small_stack

OTHERS = [{"expert": "dots"}, {"expert": "color"}]  # sources beside the one that is changed
JSONL = {"expert": "color", "from": "jsonl", "path": "routed/rows.jsonl"}
NOBODY = {
    "expert": "none",
    "from": "synthetic",
    "synthetic": {"kind": "pattern", "train": 9, "valid": 3, "test": 4},
}
SMALL = {
    "loras.defaults.steps": 4,
    "loras.defaults.eval_every_steps": 2,
    "dataset.per_expert": {"train": 16},
}
QUICK = {"evaluate.smoke": True, "evaluate.smoke_rows": 2, "loras.router.threshold": 0.0}
ROUTED = {
    "dataset.per_expert": {"train": 16, "valid": 4, "test": 4},
    "dataset.sources": [*OTHERS, JSONL],
    "dataset.paraphrases": {"color": {"seen": ["Name it."], "held": ["Tell it."]}},
}


def written(root: Path) -> Path:
    """Write to a folder what stages read: a run before its trainings, a whole one, rows to prepare,
    rows to route."""
    lora_small.prepared(root / "small")
    small_stack.run(root / "stack")
    (root / "stack/evaluate").mkdir()
    (root / "stack/evaluate/report.json").write_text(
        RequestReport(run="small", family="lora_vlm").to_json()
    )
    (root / "stack/evaluate/report.html").write_text("<p>report</p>")
    _write_rows(root / "rows", root / "elsewhere")
    _write_requests(root)
    return root


def _write_rows(folder: Path, elsewhere: Path) -> None:
    """Write rows whose every column matters to some setting, their pictures, and others of the same
    names."""
    source, rows = small_tasks.Source(folder), []
    (elsewhere / "images").mkdir(parents=True)
    for i in range(40):
        rows.append(
            {
                "id": f"r{i}",
                "image": f"images/{i}.png",
                "other": f"images/{(i + 1) % 40}.png",
                "prompt": f"what is {i}?",
                "ask": f"who is {i}?",
                "answer": f"it  is\t{i}" + " indeed" * (9 if i == 3 else 0),
                "boxes": [
                    {"bbox": [4, 4, 20, 12], "text": f"ab{i}"},
                    {"bbox": [4, 14, 16, 20], "text": f"cd{i}"},
                ],
            }
        )
        small_tasks.picture(1000 + i).save(elsewhere / f"images/{i}.png")
        for name in (f"{i}", f"held-{i}"):
            (folder / f"images/{name}.json").write_text(
                json.dumps({"prompt": "beside", "answer": name})
            )
    path = source(rows)
    source([row | {"answer": "more"} for row in rows], "more.jsonl")
    source(
        [row | {"image": f"images/held-{i}.png"} for i, row in enumerate(rows[:8])], "held.jsonl"
    )
    path.write_text(path.read_text() + "{torn\n")


def _write_requests(root: Path) -> None:
    """Write prepared rows of two experts, some alike, of several pictures or long, and requests in
    JSONL."""
    for expert, several in (("color", 2), ("dots", 1)):
        rows = [
            {
                "pictures": [
                    f"{expert}-{i // several}",
                    *([f"{expert}-b{i // several}"] if i % 10 < 2 else []),
                ],
                "prompt": ("Do it", "do  it", "Do another", "Do that" + " please" * 5)[
                    (i + i // 8) % 4
                ],
                "split": None if several > 1 else ("train", "train", "valid", "test")[i % 4],
            }
            for i in range(80)
        ]
        small_routing.task(root / "routed", expert, rows)
    (root / "routed/images").mkdir()
    rows = []
    for i in range(30):
        small_tasks.picture(2000 + i).save(root / f"routed/images/{i}.png")
        rows.append(
            {
                "id": f"j{i}",
                "image": f"images/{i}.png",
                "other": f"images/{29 - i}.png",
                "prompt": f"Ask {i}",
                "ask": f"Beg {i}",
            }
        )
    small_tasks.write_rows(root / "routed/rows.jsonl", rows)
    small_tasks.write_rows(root / "routed/more.jsonl", rows[:20])


def run_of(root: Path, raw: dict, *changes: dict) -> LoraVlmConfig:
    """Return a run with changes by dotted names; paths of what is in root are made whole."""
    for name, value in itertools.chain.from_iterable(change.items() for change in changes):
        value = _whole(root, value)
        for part in reversed(name.split(".")):
            value = {part: value}
        raw = merge(raw, value)
    return parse(raw)


def _whole(root: Path, value):
    if (
        isinstance(value, str)
        and value.startswith(("rows", "routed", "elsewhere"))
        and (root / value).exists()
    ):
        return str(root / value)
    if isinstance(value, dict):
        return {
            key: each if key in ("train", "split") else _whole(root, each)
            for key, each in value.items()
        }
    return [_whole(root, each) for each in value] if isinstance(value, list) else value


def product(root: Path, stage: str, folder: Path, *changes: dict) -> str:
    """Return what a stage leaves behind: a digest of what matters, or the text of its error."""
    raw, first, make = PRODUCTS[stage]
    folder.mkdir()
    try:
        return hashlib.sha256(
            repr(make(run_of(root, raw, first, *changes), root, folder)).encode()
        ).hexdigest()
    except PipelineError as error:
        return f"{type(error).__name__}: {error}"


def _files(folder: Path) -> list:
    return [
        (p.relative_to(folder).as_posix(), p.read_bytes())
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    ]


def _prepared(cfg, _root, folder):
    item = cfg.tasks[-1] if "none" in cfg.tasks else "color"
    family.prepare(cfg, None, folder, quiet, item)
    return _files(folder)


def _shared(cfg, _root, folder):
    family.shared(cfg, None).write(folder)
    return _files(folder)


def _fitted(cfg, parts, folder, item):
    task = lora_small.task_of(SimpleNamespace(cfg=cfg, folder=parts.folder), item)
    if task.options.eval_every_steps == 1:  # patience and keep want evaluations that get worse
        worse = itertools.count(1.0)
        task = replace(task, validate=lambda: next(worse))
    here = train_io(folder, save_every_s=1e9)
    files = task.export(loop.fit(task, here)["kept_step"])
    about = {
        key: value
        for key, value in files["adapter.json"].items()
        if key not in ("options", "instruction")
    }
    told = [
        (row["step"], row.get("valid_nats")) for row in here.recorder.rows if "valid_nats" in row
    ]
    save_tensors(folder / "tensors", files["adapter/adapter_model.safetensors"])
    tensors = load_tensors(folder / "tensors")
    return about, told, [(name, tensors[name].numpy().tobytes()) for name in sorted(tensors)]


def _expert(cfg, root, folder):
    return _fitted(cfg, FolderParts(cfg, root / "small"), folder, "color")


def _router(cfg, root, folder):
    return _fitted(cfg, FolderParts(cfg, root / "small"), folder, ROUTER)


def _router_with_none(cfg, root, folder):
    return _fitted(cfg, FolderParts(cfg, root / "stack"), folder, ROUTER)[1:]


def _routed(cfg, root, folder):
    parts = FolderParts(cfg, root / "routed")
    family.route_data(cfg, parts, folder, quiet)
    text = (folder / "routing.jsonl").read_text()
    return text.replace(str(root), "")


def _answered(cfg, root, _folder):
    said = family.assemble(cfg, FolderParts(cfg, root / "stack")).answer(small_stack.requests(12))
    return [(each.text, each.expert, each.others) for each in said]


def _reported(cfg, root, _folder):
    found = family.measure(cfg, FolderParts(cfg, root / "stack"), quiet)
    return found.model_dump_json(exclude={"made", "machine", "speed", "notes"})


@cache
def _measured(root) -> SimpleNamespace:
    """Return what the report is drawn from, measured once: settings of what is drawn do not enter
    it."""
    cfg = run_of(root, small_stack.RUN, QUICK)
    parts = FolderParts(cfg, root / "stack")
    bench = AdapterEvaluator(cfg, parts, family.assemble(cfg, parts), quiet)
    report = family.measure(cfg, parts, quiet)
    return SimpleNamespace(bench=bench, sets=routed_sets(bench), report=report)


def _asked(cfg, root, _folder):
    bench = replace(_measured(root).bench, cfg=cfg)
    asked = [*bench.task("color"), *bench.routed("test"), *bench.for_baselines()]
    return [(each.prompt, each.expert, each.group) for each in asked]


def _routing(cfg, root, _folder):
    found = _measured(root)
    return routing(replace(found.bench, cfg=cfg), found.sets)


def _criteria(cfg, root, _folder):
    found = _measured(root)
    return list(evaluate.criteria(cfg, found.sets, found.report.adapters, found.report.answers))


def _bundled(cfg, root, folder):
    family.bundle(cfg, FolderParts(cfg, root / "stack"), folder, quiet)
    return (folder / "experts.json").read_bytes()


LEARNING = {"loras.defaults.steps": 3, "loras.defaults.warmup_steps": 1}
NONE = {"dataset.sources": [*OTHERS, NOBODY], "loras.router.none_label": "Z"}
PRODUCTS = {  # stage: (its run, changes of it that both sides have, what it makes)
    "preprocess": (lora_small.SETTINGS, {}, _prepared),
    "preprocess of nobody's": (lora_small.SETTINGS, NONE, _prepared),
    "train_shared": (lora_small.SETTINGS, {}, _shared),
    "train_experts": (lora_small.SETTINGS, SMALL, _expert),
    "train_router": (lora_small.SETTINGS, SMALL, _router),
    "train_router of nobody's": (small_stack.RUN, LEARNING, _router_with_none),
    "routing": (lora_small.SETTINGS, ROUTED, _routed),
    "answers": (small_stack.RUN, QUICK, _answered),
    "evaluate": (small_stack.RUN, QUICK, _reported),
    "rows of the report": (small_stack.RUN, QUICK, _asked),
    "routing of the report": (small_stack.RUN, QUICK, _routing),
    "criteria of the report": (small_stack.RUN, QUICK, _criteria),
    "deploy": (small_stack.RUN, {}, _bundled),
}
