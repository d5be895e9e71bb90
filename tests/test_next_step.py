"""The last line of a command is what to type next and can be typed; reports and bundles are found
by a run's name, and runs are listed with their score."""

import os
import re
import shlex
import shutil
import stat
import time
from pathlib import Path

import pytest
from small_histories import write_artifact
from small_reports import language_report, request_report

from pipeline import metrics_of
from pipeline.__main__ import _bundle, main
from pipeline.run import next_step
from pipeline.run.arguments import parser
from pipeline.run.find import bundle_of
from pipeline.store.artifacts import Manifest, Store, inventory
from pipeline.store.imported import Origin, keep
from pipeline.store.roots import Root, leave
from scripts import backfill_history

NAMES = ("older", "mine")


def left(store, address, **files):
    """Leave an artifact in a store."""
    folder = store.begin(address)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text, "utf-8")
    stage = address.split("-")[0]
    made = {"at": "2026-01-01T00:00:00Z", "seconds": 1.0}
    store.finish(Manifest(address, stage, None, {}, inventory(folder), {}, made))
    return folder


@pytest.fixture
def kept(tmp_path):
    """A store with two runs that have a report each, and a third that has none."""
    store = Store(tmp_path / "it's a store $HOME #1 ü").open()
    for at, name in enumerate(NAMES):
        address = f"evaluate-{at:012x}"
        report = request_report() if at else language_report()
        left(store, address, report__json=report.to_json(), report__html="<p>")
        bundle = f"deploy-{at:012x}"
        left(store, bundle, README__md="x")
        leave(store, Root(name, "ffn_moe", f"2026-01-0{at + 1}", "", (), (address, bundle), {}))
        # both pages may be of one tick of the clock
        when = time.time() + at
        os.utime(store.folder(address) / "report.html", (when, when))
    leave(
        store, Root("bare", "ffn_moe", "2025-01-01", "x.yaml", (), ("evaluate-ffffffffffff",), {})
    )
    return store


def typed(capfd, code, *words):
    """Do a command in this process; return its output, or where it fails its error."""
    assert main([str(word) for word in words]) == code
    told = capfd.readouterr()
    return told.err if code else told.out


def last(text):
    """Return the words of the command that a text ends with."""
    line = text.splitlines()[-1]
    assert line.startswith("next: python -m pipeline "), line
    words = shlex.split(line)[4:]
    parser().parse_args(words)
    return words


def test_runs_have_their_scores_and_end_with_a_look_at_the_latest(kept, capfd):
    told = typed(capfd, 0, "runs", "--store", kept.root)
    lines = {
        name: next(each for each in told.splitlines() if f" {name}-" in each) for name in NAMES
    }
    stack = language_report().stack
    assert f"{stack.mean:.3f} bits per byte" in lines["older"]
    routed = request_report().routing.sets[0]
    assert f"{routed.router.accuracy:.3f} accuracy, {routed.name}" in lines["mine"]
    assert last(told) == ["open", "mine", "--browser", "--store", str(kept.root)]
    # a trial of experiments has the score of its model, and the report of all of them
    measured = "score-stack-0123456789ab"
    metrics = {"bits_per_byte": 1.25}
    write_artifact(kept, measured, "score", "stack", metrics)
    trial = ("tried.parts", "ffn_moe", "2026-01-03", "config/tried.yaml", (), (measured,), {})
    leave(kept, Root(*trial, makes=(measured,)))
    page = kept.root / "experiments" / "tried" / "report.html"
    page.parent.mkdir(parents=True)
    page.write_text("<p>")
    told = typed(capfd, 0, "runs", "--store", kept.root)
    (line,) = (each for each in told.splitlines() if " tried.parts-" in each)
    assert "1.250 bits per byte" in line and str(page) in line
    assert f"report: {page}" in typed(capfd, 0, "open", "tried.parts", "--store", kept.root)
    # one that cannot be read keeps no list from being shown
    for path in kept.root.glob("artifacts/evaluate-*/report.json"):
        path.write_text("{")
    for path in (*kept.root.glob("roots/tried.*"), page):
        path.unlink()
    again = typed(capfd, 0, "runs", "--store", kept.root)
    assert "bits per byte" not in again and "report.html" in again


def test_the_newest_report_is_found_by_name_and_opened(kept, tmp_path, capfd, monkeypatch):
    opened = tmp_path / "opened"
    browser = tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\nprintf %s "$1" > {shlex.quote(str(opened))}\n')
    browser.chmod(browser.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("BROWSER", f"{browser} %s")
    pages = {}
    for at, name in enumerate(NAMES):
        pages[name] = kept.folder(f"evaluate-{at:012x}") / "report.html"
    told = typed(capfd, 0, "open", "--store", kept.root)
    assert f"report: {pages['mine']}" in told and not opened.exists()
    assert last(told) == ["open", "--browser", "--store", str(kept.root)]
    told = typed(capfd, 0, "open", "older", "--browser", "--store", kept.root)
    assert f"report: {pages['older']}" in told and last(told)[:2] == ["metrics", "older"]
    assert opened.read_text() == pages["older"].resolve().as_uri()
    together = kept.root / "experiments" / "reference" / "report.html"
    together.parent.mkdir(parents=True)
    together.write_text("<p>")
    os.utime(together, (time.time() + 9, time.time() + 9))
    for words in ([], ["reference"]):
        told = typed(capfd, 0, "open", *words, "--store", kept.root)
        assert str(together) in told and "taken for the experiments" not in told
    # a run of the same name is reached by its id, and what is of it by its name
    shutil.copytree(together.parent, kept.root / "experiments" / "older")
    told = typed(capfd, 0, "open", "older", "--store", kept.root)
    assert str(pages["older"]) not in told
    (run,) = re.findall(r"older is taken for the experiments; (older-\S+) is the run", told)
    for words in ([run], ["older", "evaluate"]):
        assert str(pages["older"]) in typed(capfd, 0, "open", *words, "--store", kept.root)
    told = typed(capfd, 2, "open", "bare", "--store", kept.root)
    assert "nothing of bare" in told
    # begun again with other settings, and not made yet
    leave(kept, Root("mine", "ffn_moe", "2026-02-01", "", (), ("evaluate-eeeeeeeeeeee",), {}))
    for name in ("mine", "evaluate-000000000001"):
        assert str(pages["mine"]) in typed(capfd, 0, "open", name, "--store", kept.root)
    for folder in kept.root.glob("artifacts/evaluate-*"):
        (folder / "report.html").unlink()
    assert "no report of mine" in typed(capfd, 2, "open", "mine", "--store", kept.root)
    monkeypatch.setattr("webbrowser.open", lambda _uri: False)
    told = typed(capfd, 0, "open", "reference", "--browser", "--store", kept.root)
    assert "no browser can be started here" in told


def test_a_bundle_is_found_by_its_runs_name(kept, tmp_path, monkeypatch):
    assert bundle_of(kept, "older") == kept.folder("deploy-000000000000")
    assert bundle_of(kept, "nobody") is None and bundle_of(kept, "bare") is None
    for words in (["serve", "--bundle", "mine"], ["chat", "--bundle", "mine"]):
        args = parser().parse_args([*words, "--store", str(kept.root)])
        with _bundle(args) as folder:
            assert folder == kept.folder("deploy-000000000001").resolve()
    # a folder of that name is meant before a run, if it is a bundle
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    with _bundle(args) as folder:
        assert folder == kept.folder("deploy-000000000001").resolve()
    (tmp_path / "mine" / "SHA256SUMS").write_text("")
    with _bundle(args) as folder:
        assert str(folder) == "mine"


def test_what_is_only_listed_ends_with_what_removes_it(kept, tiny, capfd):
    told = typed(capfd, 0, "rm", "older", "--config", tiny, "--store", kept.root)
    words = last(told)
    assert words[:2] == ["rm", "older"] and "--yes" in words and str(tiny) in words
    assert last(typed(capfd, 0, *words))[0] == "runs"
    assert not kept.folder("evaluate-000000000000").exists()
    told = typed(capfd, 0, "prune", "--config", tiny, "--store", kept.root)
    assert last(told)[0] == "runs"
    left(kept, "train_shared-aaaaaaaaaaaa")
    # orphans go by --yes where they were asked for
    told = typed(capfd, 0, "prune", "--config", tiny, "--store", kept.root)
    assert last(told)[0] == "runs"
    words = last(typed(capfd, 0, "prune", "--orphans", "--config", tiny, "--store", kept.root))
    assert {"--orphans", "--yes"} <= set(words)
    typed(capfd, 0, *words)
    assert not kept.folder("train_shared-aaaaaaaaaaaa").exists()


def test_a_plan_ends_with_the_run_as_it_was_typed(tiny, store_path, capfd):
    flags = ["--override", "trunk.domains=[sea, hall]", "--override", "seed=3"]
    told = typed(capfd, 0, "plan", "--config", tiny, "--store", store_path, *flags)
    assert last(told) == ["run", "--config", str(tiny), *flags, "--store", str(store_path)]


def test_what_is_all_done_ends_with_a_look_and_a_stage_with_the_next_one(
    finished, store_path, capfd
):
    path, store = finished[0], shutil.copytree(finished[1], store_path)
    flags = ["--config", path, "--store", store]
    assert last(typed(capfd, 0, "plan", *flags))[:3] == ["open", "tiny", "--browser"]
    assert last(typed(capfd, 0, "tokenizer", *flags))[:3] == ["open", "tiny", "--browser"]
    told = typed(capfd, 0, "tokenizer", *flags, "--override", "expert.steps=3")
    words = last(told)
    assert words[0] == "train_experts" and "expert.steps=3" in words
    assert last(typed(capfd, 0, "metrics", "train_dense", *flags[2:]))[0] == "metrics"
    # a run of that name that has nothing of it stands in nobody's way
    one = last(typed(capfd, 0, "metrics", "tiny", "train_shared", *flags[2:]))
    assert one[:2] == ["history", "show"] and one[2].startswith("train_shared-")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["export", "--format", "hf", "--to", "x y"], ["chat", "--bundle", "x y"]),
        (
            ["kit", "sea", "--to", "k"],
            ["kit", "--pack", "k", "--paths", "FILES", "--to", "PACKAGE"],
        ),
        (
            ["kit", "--pack", "k", "--to", "p"],
            ["add", "DOMAIN", "--config", "FILE", "--expert", "p"],
        ),
        (["deploy"], ["chat", "--config", "x.yaml"]),
    ],
)
def test_what_comes_out_is_used_next(words, expected, monkeypatch):
    monkeypatch.delenv("MOLEFORGE_STORE", raising=False)
    needs_config = words[0] in ("export", "deploy")
    args = parser().parse_args([*words, *(["--config", "x.yaml"] if needs_config else [])])
    follows = {
        "export": next_step.after_export,
        "kit": next_step.after_kit,
        "deploy": lambda args: next_step.same(args, "chat"),
    }
    assert shlex.split(follows[words[0]](args))[3:] == expected
    parser().parse_args(expected)


def test_an_export_elsewhere_has_its_card(monkeypatch):
    # Nor is it a bundle that was rounded on its way
    rounded = ["--format", "hf", "--dtype", "bf16", "--to", "x"]
    elsewhere = ["--format", "hf", "--to", "s3://b/x"]
    for flags in (["--format", "gguf", "--to", "x/"], elsewhere, rounded):
        args = parser().parse_args(["export", "--config", "x.yaml", *flags])
        told = next_step.after_export(args)
        assert told == f"read {args.to.rstrip('/')}/README.md, which has an example"


@pytest.mark.parametrize(
    ("target", "versions", "expected"),
    [
        ("there", 2, ["rollback", "there"]),
        ("there", 1, ["serve", "--bundle", "there"]),
        ("s3://b/x", 1, ["versions", "s3://b/x"]),
    ],
)
def test_versions_lead_back_or_to_the_server(target, versions, expected):
    args = parser().parse_args(["versions", target])
    assert shlex.split(next_step.after_versions(args, versions))[3:] == expected
    args = parser().parse_args(["rollback", target])
    assert shlex.split(next_step.after_versions(args, 1))[3] != "rollback"


@pytest.mark.parametrize(("value", "root"), [(None, "store"), ("", "store"), ("there", "there")])
def test_every_program_takes_the_same_store_by_itself(value, root, tmp_path, monkeypatch):
    monkeypatch.delenv("MOLEFORGE_STORE", raising=False)
    if value is not None:
        monkeypatch.setenv("MOLEFORGE_STORE", value)
    for args in (parser().parse_args(["runs"]), backfill_history.parser().parse_args(["old"])):
        assert args.store == Path(root)
        assert next_step.in_store(args) == []
    # Neither does the function for other programs know another
    monkeypatch.chdir(tmp_path)
    rows = [{"step": step, "train_nats": 3.0} for step in (1, 2)]
    keep(Store(Path(root)).open(), Origin("csv", "log.csv", "elsewhere", "1"), rows)
    assert metrics_of("elsewhere").steps == 2
