"""The attack on statistics runs on any model and text, and finds members where it must."""

import json
import re

import pytest
from conftest import WORDS, documents

from benchmarks import statistics_privacy
from pipeline.data.text.tokenizer import train
from tests.test_trunk import whole

SMALL = ["--sizes", "16", "--others", "32", "--test", "4", "--tokens", "12", "--epsilon", "8"]


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """A random model, its tokenizer and three domains."""
    root = tmp_path_factory.mktemp("privacy")
    texts = {name: documents(name, 200 + 40 * (name == "shop")) for name in WORDS}
    tokenizer = train(300, [text for each in texts.values() for text in each])
    whole("llama", vocab_size=tokenizer.vocab_size, hidden_size=192).save_pretrained(root / "model")
    tokenizer.save(root / "model")
    files = []
    for name, each in texts.items():
        files.append(root / f"{name}.jsonl")
        files[-1].write_text("".join(json.dumps({"text": text}) + "\n" for text in each))
    return ["--model", str(root / "model"), "--text", *map(str, files), *SMALL]


def test_members_are_told_by_second_moments_and_hidden_by_noise(arguments, tmp_path, capsys):
    out = tmp_path / "result.md"
    assert statistics_privacy.main([*arguments, "--out", str(out)]) == 0
    text = out.read_text()
    assert "private: shop, beside sea, hall" in text
    rows = re.findall(r"^\| (.+?) \| 16 \| (.*?) \| (.*?) \| (.*?) \| (.*?) \|$", text, re.M)
    found = {name: values for name, *values in rows}
    assert list(found) == ["as they are", "means without noise", "means with noise, epsilon 8"]
    tracing, leverage, own, every = map(float, found["as they are"])
    # As many tokens as inputs are wide: each is a good part of what was summed; a guess has .5
    assert leverage > 0.7
    assert 0 <= min(tracing, own, every) <= max(tracing, own, every) <= 1
    assert float(found["means without noise"][0]) > 0.65


def test_what_cannot_be_measured_is_said(arguments, tmp_path, capsys):
    with pytest.raises(SystemExit, match="has .* documents of 12 tokens, and .* are needed"):
        statistics_privacy.main([*arguments, "--sizes", "16000"])
    with pytest.raises(SystemExit, match="cannot be read as rows"):
        statistics_privacy.main([*arguments, "--text", str(tmp_path / "none"), str(tmp_path)])
    with pytest.raises(SystemExit):
        statistics_privacy.main([*arguments, "--sizes", "10"])
    assert "multiples of 16" in capsys.readouterr().err
