"""Stores of a few files, made up: histories, manifests, roots and reports, and no tensors."""

import json
import random

from pipeline.report.schema.experiments import (
    FOLDER,
    RESULTS,
    ExperimentResults,
    TrialCriterion,
    TrialLosses,
    TrialRun,
    TrialScore,
    TrialSummary,
)
from pipeline.store.artifacts import Store, write_text
from pipeline.store.manifest import Manifest
from pipeline.store.roots import Root, leave
from tests.small_reports import language_report

TIME = 1_795_000_000.0
LAYERS, EXPERTS = (2, 4), 4


def new_store(root):
    """Return an empty store."""
    return Store(root).open()


def address(stage, item, number):
    """Return an address that nothing computes."""
    return "-".join(filter(None, (stage, item, f"{number:012x}")))


def rows(steps=60, every=10, start=5.0, experts=False, seed=0):
    """Return the rows of a training: losses that fall, a validation every other row."""
    chance = random.Random(seed)
    found = []
    for step in range(every, steps + 1, every):
        nats = start / (1 + step / steps) + chance.uniform(-0.05, 0.05)
        row = {"step": step, "tokens": step * 100, "train_nats": nats, "lr": 1e-3}
        row |= {"tokens_per_s": 900.0 + step, "rss_mb": 500.0, "time": TIME + step}
        if experts:
            row |= {"load": shares(chance), "entropy": 1.2, "temperature": 1.0}
        found.append(row)
        if step % (2 * every) == 0:
            valid = {"step": step, "tokens": step * 100, "valid_nats": nats + 0.1}
            valid |= {"epoch": step // (2 * every), "time": TIME + step + 1}
            if experts:
                valid["experts"] = {"layer": {str(layer): told(chance) for layer in LAYERS}}
            found.append(valid)
    return found


def shares(chance):
    """Return shares of experts that are one together."""
    drawn = [chance.uniform(0.5, 1.5) for _ in range(EXPERTS)]
    return [round(each / sum(drawn), 4) for each in drawn]


def told(chance):
    """Return what a layer says of its experts."""
    return {"shares": shares(chance), "entropy": 1.2, "dropped": 0.01}


def write_history(store, at, found, steps=60, every=10, tail=b""):
    """Write a history as a recorder does."""
    path = store.history(at)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [{"start": 0, "every": every, "steps": steps}, *found]
    path.write_bytes("".join(json.dumps(line) + "\n" for line in lines).encode() + tail)


def write_artifact(store, at, stage, item, metrics=(), files=(), made="2026-11-27T08:00:00Z"):
    """Write a manifest, and nothing of what it names."""
    folder = store.folder(at)
    folder.mkdir(parents=True, exist_ok=True)
    named = {name: {"sha256": "0" * 64, "bytes": 1_000} for name in files}
    done = {"at": made, "seconds": 61.5, "machine": {"cpu": "a processor", "gpu": None}}
    manifest = Manifest(at, stage, item, {}, named, dict(metrics), done)
    write_text(folder / "manifest.json", manifest.text())


def write_report(store, at, report=None):
    """Write an evaluation with its report."""
    write_artifact(store, at, "evaluate", None, files=("report.json", "report.html"))
    text = (report or language_report()).to_json()
    (store.folder(at) / "report.json").write_text(text, "utf-8")


def leave_run(store, name, addresses, begun="2026-11-27T08:00:00Z", **settings):
    """Leave the root of a run; return its id."""
    told = {"family": "ffn_moe", "name": name} | settings
    root = Root(name, "ffn_moe", begun, f"config/{name}.yaml", (), tuple(addresses), told)
    leave(store, root)
    return root.id


def leave_experiments(store, name, losses, tokens=None):
    """Leave the results of experiments in a store: `losses` has nats, bits per byte and the model's
    address by trial, of which the first is the dense one."""
    trials = []
    for trial, (nats, bits, at) in losses.items():
        score = TrialScore(
            bits_per_byte=bits, bits_per_byte_by_domain={}, bytes=9, documents=1, text="t"
        )
        run = TrialRun(
            seed=0,
            state="done",
            address=at,
            tokens=(tokens or {}).get(trial, "same"),
            losses=TrialLosses(valid=nats, train=nats - 0.5),
            score=score,
        )
        asked = TrialCriterion(
            name="primary", passed=nats < 3, number=0.0, limit=0.0, half="loss", detail="said"
        )
        trials.append(
            TrialSummary(
                name=trial,
                makes="joint moe",
                changes={},
                runs=(run,),
                valid=nats,
                gap=0.5,
                bits_per_byte=bits,
                is_dense=not trials,
                criteria=(asked,) if trials else (),
            )
        )
    results = ExperimentResults(
        experiments=name, made="2026-11-27T09:00:00Z", seeds=(0,), trials=tuple(trials)
    )
    folder = store.root / FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / RESULTS, results.to_json())
    write_text(folder / "report.html", "<p>")
    return folder / RESULTS


def filled(root):
    """Return a store with two runs that share a trunk, a torn history, a stray one, a report and a
    bundle; and the runs' ids."""
    store = new_store(root)
    trunk = address("train_shared", None, 1)
    write_history(store, trunk, rows())
    write_artifact(store, trunk, "train_shared", None, {"steps": 60, "valid_nats": 2.6})
    ids = []
    for number, name in enumerate(("first", "second")):
        expert = address("train_experts", "sea", 10 + number)
        router = address("train_router", None, 20 + number)
        write_history(store, expert, rows(start=4.0 - number, seed=number))
        write_artifact(
            store, expert, "train_experts", "sea", {"steps": 60, "plan": {"rows": [1, 2]}}
        )
        torn = b'{"step":70,"tok' if number else b""
        write_history(store, router, rows(experts=True, seed=number), steps=80, tail=torn)
        at = f"2026-11-27T0{8 + number}:00:00Z"
        addresses = [trunk, expert, router, address("evaluate", None, 30 + number)]
        addresses.append(address("deploy", None, 40 + number))
        ids.append(leave_run(store, name, addresses, at, width=64 + number))
    write_report(store, address("evaluate", None, 30))
    write_artifact(store, address("deploy", None, 40), "deploy", None, files=("SHA256SUMS",))
    write_history(store, address("train_dense", "total", 50), rows(seed=5))
    return store, ids
