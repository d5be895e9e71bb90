"""Credentials are in no configuration, and in nothing that is printed or kept: planted in settings,
in URLs, in the environment and in what libraries raise."""

import pytest
from conftest import PLANTED

from pipeline.__main__ import main
from pipeline.credentials import credential, masked
from pipeline.errors import ConfigError, StoreError
from pipeline.families.load import load
from pipeline.store.upload import translate_errors

KEY = "Abcdefghijklmnop0123456789ABCDEF"
URLS = {
    "password": (f"s3://me:{KEY}@bucket/x.jsonl", "a password in a URL"),
    "basic": (f"https://{KEY}@host/x.jsonl", "a password in a URL"),
    "aws": (f"https://h/x.jsonl?a=1&X-Amz-Signature={KEY}&b=2", "a URL that is signed"),
    "google": (f"https://h/x.jsonl?X-Goog-Signature={KEY}", "a URL that is signed"),
    "azure": (f"https://h/x.jsonl?sv=1&sig={KEY}", "a URL that is signed"),
    "token": (f"https://h/x.jsonl?token={KEY}", "a URL that is signed"),
}
TOKENS = {
    "hub": f"hf_{KEY}",
    "openai": f"sk-proj-{KEY}",
    "aws": "AKIAABCDEFGHIJKLMNOP",
    "github": f"ghp_{KEY}0123",
    "modal": f"as-{KEY[:22]}",
}
HARMLESS = [
    "s3://bucket/path/x.jsonl",
    "abfs://container@account.dfs.core.windows.net/x",
    "sftp://me@host/x.jsonl",
    "https://host/a@b/x.jsonl?download=true&q=a@b",
    "https://host:8080/x.jsonl",
    "HuggingFaceTB/SmolLM2-135M",
    "0123456789abcdef0123456789abcdef01234567",  # a revision, which a key of W&B looks like
    "task-oriented",
    "risk-averse-experts-of-the-second-kind",
]


@pytest.mark.parametrize("name", URLS)
def test_a_url_that_opens_by_itself_is_refused_in_a_file_and_by_a_flag(tiny, name):
    url, said = URLS[name]
    for setting in ("data.files", "deploy.upload"):
        value = f"[{{paths: ['{url}'], domain: sea}}]" if setting == "data.files" else f"'{url}'"
        with pytest.raises(ConfigError, match=rf"{setting}.* holds {said}") as refused:
            load(tiny, (f"{setting}={value}",))
        assert KEY not in str(refused.value)
    tiny.write_text(f"{tiny.read_text()}\ndeploy:\n  upload: '{url}'\n")
    with pytest.raises(ConfigError, match=rf"deploy.upload holds {said}") as refused:
        load(tiny)
    assert KEY not in str(refused.value)
    assert KEY not in masked(f"GET {url} failed")


@pytest.mark.parametrize("name", TOKENS)
def test_a_key_where_the_name_of_a_secret_belongs_is_refused(tiny, name):
    token = TOKENS[name]
    with pytest.raises(ConfigError, match="modal.endpoint_secret holds a key") as refused:
        load(tiny, (f"modal.endpoint_secret={token}",))
    assert token not in str(refused.value)
    assert masked(f"no such key: {token}.") == "no such key: ***."


def test_what_the_environment_holds_is_refused_by_the_variable_s_name(tiny, monkeypatch):
    monkeypatch.setenv("MOLEFORGE_API_KEY", "planted-sesame")
    monkeypatch.setenv("OTHER_KEY", "short")
    with pytest.raises(ConfigError, match=r"holds the value of \$MOLEFORGE_API_KEY") as refused:
        load(tiny, ("modal.endpoint_secret=planted-sesame",))
    assert "sesame" not in str(refused.value)
    assert masked("short planted-sesame") == "short ***"
    # The place of a file with a key is none
    monkeypatch.setenv("OTHER_KEY", str(tiny))
    assert masked(str(tiny)) == str(tiny)


@pytest.mark.parametrize("text", HARMLESS)
def test_what_only_looks_like_one_stays(text):
    assert credential(text) == ""
    assert masked(f"see {text}").count("***") == ("//" in text and "@" in text.split("/")[2])


# What repeats what it was given: a name, a value, a text that is no YAML, a path, a URL
REPEATED = [
    "trunk.{key}=3",
    "trunk.steps={key}",
    "trunk.steps=[{key}",
    "{key}",
    "trunk.init=/absent/{key}",
    "trunk.init=https://me:{key}@host/model",
]


@pytest.mark.parametrize("override", REPEATED)
def test_no_message_repeats_one(tiny, store_path, capfd, override):
    token = TOKENS["hub"]
    given = ["--override", override.format(key=token), "--store", str(store_path)]
    assert main(["plan", "--config", str(tiny), *given]) == 2
    printed = "".join(capfd.readouterr())
    assert "error:" in printed and token not in printed and KEY not in printed


def test_an_error_of_a_library_is_told_without_one(monkeypatch):
    monkeypatch.setenv("FSSPEC_FTP_PASSWORD", "planted-sesame")
    url = f"ftp://me:{KEY}@host/x"
    with pytest.raises(StoreError) as told, translate_errors(url, "--to"):
        raise OSError(f"{url}?token={KEY} with planted-sesame")
    said = "OSError: ftp://***@host/x?token=*** with ***"
    assert said in str(told.value) and "--to: ftp://***@host/x cannot" in str(told.value)


def test_nothing_that_a_run_keeps_holds_what_its_environment_held(bundled):
    kept = [path for path in bundled[1].rglob("*") if path.is_file()]
    assert len(kept) > 40
    for path in kept:
        content = path.read_bytes()
        for name, value in PLANTED.items():
            assert value.encode() not in content, (name, path)
