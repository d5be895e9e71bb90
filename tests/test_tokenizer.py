"""The tokenizer through transformers' own class, which is what users and servers load it with."""

import json
from types import SimpleNamespace

import pytest

from pipeline.data.text import pretrained_tokenizer, tokenizer
from pipeline.errors import DataError
from pipeline.store.foreign import TEMPLATE_BYTES

TEXTS = [
    "the quick brown fox jumps over the lazy dog\n",
    "def f(x):\n    return x + 1\n",
    "naïve 漢字 🙂 text",
] * 20


@pytest.fixture(scope="module")
def trained():
    return tokenizer.train(300, TEXTS)


def test_every_byte_survives_the_round_trip(trained):
    for text in [*TEXTS[:3], "".join(map(chr, range(1, 300))), " two  spaces", "\r\n\ttab"]:
        assert trained.model.decode(trained.encode([text])[0].ids) == text
    assert trained.vocab_size == 300 and trained.end_id == 0


def test_training_is_deterministic(trained):
    assert tokenizer.train(300, TEXTS).model.to_str() == trained.model.to_str()


def test_text_that_spells_the_end_never_gets_its_id(trained):
    (found,) = trained.encode([f"a{tokenizer.END}b"])
    assert trained.end_id not in found.ids
    assert trained.model.decode(found.ids) == f"a{tokenizer.END}b"


def test_transformers_loads_what_is_saved_and_encodes_alike(trained, tmp_path):
    from transformers import PreTrainedTokenizerFast

    trained.save(tmp_path)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert theirs.eos_token == tokenizer.END and theirs.eos_token_id == trained.end_id
    assert len(theirs) == trained.vocab_size
    for text, ours in zip(TEXTS[:3], trained.encode(TEXTS[:3]), strict=True):
        assert theirs(text, add_special_tokens=False)["input_ids"] == ours.ids
        assert theirs.decode(ours.ids) == text
    assert (
        theirs(f"x{tokenizer.END}")["input_ids"][-1] == trained.end_id
    )  # a server may still write it


@pytest.mark.parametrize("name", ["", "tokenizer.json"])
def test_pretrained_takes_a_folder_or_its_file(trained, tmp_path, name):
    trained.save(tmp_path)
    found = tokenizer.pretrained(str(tmp_path / name))
    assert [e.ids for e in found.encode(TEXTS)] == [e.ids for e in trained.encode(TEXTS)]
    assert (found.end, found.end_id, found.vocab_size) == (
        trained.end,
        trained.end_id,
        trained.vocab_size,
    )


def test_pretrained_ignores_truncation_padding_and_bos(trained, tmp_path):
    from tokenizers import processors

    trained.save(tmp_path)
    model = tokenizer.pretrained(str(tmp_path)).model
    model.enable_truncation(4)
    model.enable_padding(length=99)
    model.post_processor = processors.TemplateProcessing(
        single=f"{tokenizer.END} $A", special_tokens=[(tokenizer.END, 0)]
    )
    model.save(str(tmp_path / "tokenizer.json"))
    found = tokenizer.pretrained(str(tmp_path))
    assert found.encode(TEXTS[:1])[0].ids == trained.encode(TEXTS[:1])[0].ids


def test_holes_in_the_vocabulary_count(tmp_path):
    raw = {
        "version": "1.0",
        "model": {"type": "WordLevel", "vocab": {"a": 0, "<end>": 70_000}, "unk_token": "a"},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": {"content": "<end>"}})
    )
    found = tokenizer.pretrained(str(tmp_path))
    assert (found.end_id, found.vocab_size) == (70_000, 70_001)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ("{}", "names none"),
        ('{"eos_token": "<gone>"}', "'<gone>', which is not in its vocabulary"),
        ("{", "not JSON"),
    ],
)
def test_an_end_of_text_token_is_required(trained, tmp_path, config, match):
    trained.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(config)
    with pytest.raises(DataError, match=match):
        tokenizer.pretrained(str(tmp_path))


def test_what_is_no_tokenizer_is_named(tmp_path):
    with pytest.raises(DataError, match="has no tokenizer.json.*save_pretrained"):
        tokenizer.pretrained(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="is not a tokenizer.json"):
        tokenizer.pretrained(str(tmp_path))


def test_a_hub_that_does_not_answer_is_a_data_error(monkeypatch):
    import huggingface_hub

    def refuse(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(
        DataError, match="no/such is no folder.*ConnectionError: no route.*its revision"
    ):
        tokenizer.pretrained("no/such")


TEMPLATE = "{% for turn in messages %}{{ turn.role }}: {{ turn.content }}\n{% endfor %}"


def test_a_chat_template_in_a_file_of_its_own_goes_where_the_tokenizer_goes(trained, tmp_path):
    """As newer models have it, beside tokenizer_config.json; a bundle has one file of both."""
    from transformers import AutoTokenizer

    trained.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    found = tokenizer.pretrained(str(tmp_path))
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    for name, text in found.stock_files([]).items():
        (bundle / name).write_text(text)
    turns = [{"role": "user", "content": "the fox"}]
    wanted, ours = (
        AutoTokenizer.from_pretrained(folder).apply_chat_template(turns, return_dict=False)
        for folder in (tmp_path, bundle)
    )
    assert ours == wanted
    # What changes what a bundle holds is looked at.
    names = []
    eye = SimpleNamespace(file=lambda _setting, _path, name: names.append(name))
    named = SimpleNamespace(tokenizer=SimpleNamespace(pretrained=str(tmp_path)))
    assert len(list(pretrained_tokenizer.seen(named, eye))) == 3
    assert names[-1] == "chat_template.jinja"
    (tmp_path / "chat_template.jinja").write_text("x" * (TEMPLATE_BYTES + 1))
    with pytest.raises(DataError, match="is no chat template: it has over 262,144 bytes"):
        tokenizer.pretrained(str(tmp_path))
