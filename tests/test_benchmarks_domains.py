"""The benchmark on domains that come and go at a toy size, by the product's own commands, and that
its checks see what they are for."""

import json

import local_jobs
import pytest
import torch
from conftest import documents
from test_domain_docs import FROM_ZERO
from yaml_text import yaml_text

from benchmarks import domains_come_and_go
from benchmarks.domain_parts.page import Page
from benchmarks.domain_parts.state import Made, others
from benchmarks.runner import StageFailed
from pipeline.__main__ import main

quick = local_jobs.quick  # a fixture
GENERAL, CORRECTED, GUEST = "sea", "shop", "hall"


def in_process(words) -> float:
    """Carry out a command without a process of its own."""
    assert main(list(words)) == 0
    return 1.0


def no_removal(words) -> float:
    """Fail where a domain is to be removed."""
    if words[0] == "remove":
        raise StageFailed("remove ended with 2")
    return in_process(words)


@pytest.fixture
def command(tmp_path, monkeypatch):
    """The arguments of a run in this process."""
    files = []
    for domain in (GENERAL, CORRECTED, GUEST):
        rows = []
        for number, text in enumerate(documents(domain)):
            split = {0: "test", 1: "valid"}.get(number % 8, "train")
            rows.append(json.dumps({"text": f"{number} {text}", "split": split}) + "\n")
        path = tmp_path / f"texts/{domain}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(rows), "utf-8")
        files.append(str(path))
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml_text(FROM_ZERO), "utf-8")
    places = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    who = ["--guest", GUEST, "--corrected", CORRECTED, "--general", GENERAL]
    return [*files, "--config", str(config), *places, *who, "--tokens", "512"]


def test_all_of_it_by_the_commands_where_it_was_stopped_once(command, tmp_path, monkeypatch):
    monkeypatch.setattr(domains_come_and_go, "typed", no_removal)
    assert domains_come_and_go.main(command) == 1
    (page,) = (tmp_path / "out").glob("*.md")
    text = page.read_text("utf-8")
    assert "Not complete" in text and "## `add" in text and "## `remove" not in text
    monkeypatch.setattr(domains_come_and_go, "typed", in_process)
    code = domains_come_and_go.main(command)
    text = page.read_text("utf-8")
    checks = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 3 and cells[1] in ("yes", "**no**"):
            checks[cells[0]] = cells[1] == "yes"
    # A toy learns too little for the aims, which are judged; what has to stay stays at any size
    kept = {what: holds for what, holds in checks.items() if not what.startswith("aim")}
    assert len(kept) == 9 and all(kept.values())
    assert len(checks) == 13 and code == int(not all(checks.values()))
    assert "Not complete" not in text and str(tmp_path) not in text
    masked = tmp_path / f"work/corrected/{CORRECTED}.jsonl"
    texts = [json.loads(line)["text"] for line in masked.read_text("utf-8").splitlines()]
    assert all(each.startswith("# ") for each in texts)


def test_what_is_another_artifact_is_seen():
    old = {"train_shared": Made("train_shared-1", "a"), "train_router": Made("train_router-1", "b")}
    new = {"train_shared": Made("train_shared-1", "c"), "train_router": Made("train_router-1", "b")}
    assert others(old, new) == ["train_shared"]
    page = Page(("wiki",), "drama", "legal")
    page._same("add", old, new, ["train_shared"], "trunk")
    page._same("add", old, new, ["train_router"], "router")
    assert [check.holds for check in page.checks] == [False, True]
    assert not page.reached


def test_logits_are_compared_bit_by_bit():
    zero = {"wiki": torch.tensor([0.0, 1.0])}
    negative = {"wiki": torch.tensor([-0.0, 1.0])}
    assert domains_come_and_go._same_bits(zero, zero) == (2, 0)
    assert domains_come_and_go._same_bits(zero, negative) == (2, 1)


def test_domains_that_are_one_are_refused(command, capsys):
    with pytest.raises(SystemExit):
        domains_come_and_go.main([*command, "--guest", GENERAL])
    assert "these are domains apart" in capsys.readouterr().err
