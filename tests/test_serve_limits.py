"""Limits of a server, from a configuration, a command line or Modal to where they hold."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline import cloud
from pipeline.config.machines import EndpointConfig, ModalConfig
from pipeline.config.serving import ServeConfig
from pipeline.errors import ConfigError
from pipeline.families.ffn_moe.config import FfnMoeConfig
from pipeline.run.arguments import parser
from pipeline.run.serve_flags import LIMITS
from pipeline.serve import command, from_bundle
from pipeline.serve.generation import Capacity
from pipeline.serve.keys import Keys
from pipeline.serve.limits import ConnectionLimits, RequestLimits
from pipeline.serve.networks import tokens_to_read

ROOT = Path(__file__).parent.parent
OTHERS = {
    "dtype": "bf16",
    "max_batch": 3,
    "max_prefill_tokens": 40,
    "max_cache": 5_000_000,
    "max_waiting": 7,
    "max_new_tokens": 9,
    "max_context": 77,
    "max_seconds": 8.5,
    "max_body_bytes": 12_345,
    "max_connections": 6,
}
# Where each one comes to: an object of these, and its field
REACHES = {
    "dtype": ("engine", "dtype"),
    "max_batch": ("capacity", "rows"),
    "max_prefill_tokens": ("capacity", "prefill_tokens"),
    "max_cache": ("capacity", "cache_bytes"),
    "max_waiting": ("capacity", "waiting"),
    "max_new_tokens": ("limits", "new_tokens"),
    "max_context": ("limits", "context_tokens"),
    "max_seconds": ("limits", "seconds"),
    "max_body_bytes": ("limits", "body_bytes"),
    "max_connections": ("connections", "connections"),
}


def reached(monkeypatch, wanted: ServeConfig, *typed: str) -> dict:
    """Return what a server is given by the command `serve`, with a bundle and a model left out."""
    seen = {}

    def engine_of(_folder, capacity, dtype):
        seen["capacity"] = capacity
        seen["engine"] = SimpleNamespace(dtype=dtype)

    def service(_engine, _prompts, limits, _bundle):
        seen["limits"] = limits

    def closed(_access, connections):
        seen["connections"] = connections

    monkeypatch.setattr(from_bundle, "engine_of", engine_of)
    monkeypatch.setattr(from_bundle, "Service", service)
    for name in ("about", "identity", "TextPrompts"):
        monkeypatch.setattr(from_bundle, name, lambda *_: {"serves": "completions"})
    monkeypatch.setattr(command, "about", lambda _folder: {})
    monkeypatch.setattr(command, "closed", closed)
    monkeypatch.setattr(command.logs, "configure", lambda _kind: None)
    monkeypatch.setattr(command, "open_bundle", lambda _app, *more: from_bundle.open_service(*more))
    monkeypatch.setattr(command, "listen", lambda *_, load, **_more: load())
    args = parser().parse_args(["serve", "--bundle", "b", *typed])
    command.serve(Path("b"), args, Keys(), wanted, print)
    return seen


def place(seen: dict, name: str):
    """Return what a limit came to."""
    where, field = REACHES[name]
    return getattr(seen[where], field)


def test_limits_reach_the_server(monkeypatch):
    usual = reached(monkeypatch, ServeConfig())
    assert usual["capacity"] == Capacity()
    assert usual["limits"] == RequestLimits()
    assert usual["connections"] == ConnectionLimits()
    assert RequestLimits.of("chat", ServeConfig()).body_bytes == 32 << 20
    assert OTHERS.keys() == REACHES.keys() == ServeConfig.model_fields.keys()
    assert {"dtype", *LIMITS} == OTHERS.keys()
    by_setting = reached(monkeypatch, ServeConfig(**OTHERS))
    typed = []
    for name, value in OTHERS.items():
        shown = f"{value / 1e6}MB" if name == "max_cache" else str(value)
        typed += [f"--{name.replace('_', '-')}", shown]
    by_flag = reached(monkeypatch, ServeConfig(), *typed)
    before = reached(monkeypatch, ServeConfig(**OTHERS), "--max-batch", "5")
    for name, value in OTHERS.items():
        assert place(by_setting, name) == place(by_flag, name) == value
        assert place(usual, name) != value
        assert place(before, name) == (5 if name == "max_batch" else value)


def test_what_a_step_reads_goes_by_the_size_of_the_model_unless_it_is_said(monkeypatch, capsys):
    own = reached(monkeypatch, ServeConfig(**OTHERS), "--max-prefill-tokens", "auto")
    assert own["capacity"].prefill_tokens is None
    for wrong in ("0", "Auto", "1.5"):
        with pytest.raises(SystemExit):
            parser().parse_args(["serve", "--bundle", "b", "--max-prefill-tokens", wrong])
        assert "nor auto" in capsys.readouterr().err
    with pytest.raises(ValueError, match="max_prefill_tokens"):
        ServeConfig(max_prefill_tokens=0)
    # a random one of tests, SmolLM2-135M and Qwen3-VL-2B
    found = [tokens_to_read(size, "cpu") for size in (1, 700_000, 134_515_008, 2_127_532_032)]
    assert found == [2048, 2048, 256, 256]
    # as the setting's description has it
    sizes = (16_000_000, 33_000_000, 67_000_000, 68_000_000)
    assert [tokens_to_read(size, "cpu") for size in sizes] == [2048, 1024, 512, 256]
    sizes = (8_000_000_000, 34_000_000_000, 35_000_000_000)
    assert [tokens_to_read(size, "cuda") for size in sizes] == [2048, 512, 256]


@pytest.mark.parametrize("size", ["2", "0GB", "-1GB", "many", "1e9"])
def test_a_size_has_a_unit(size, capsys):
    with pytest.raises(SystemExit):
        parser().parse_args(["serve", "--bundle", "b", f"--max-cache={size}"])
    assert "--max-cache" in capsys.readouterr().err


def test_an_endpoint_on_modal_has_the_limits_of_its_configuration(tmp_path):
    wanted = ServeConfig(max_batch=3, max_waiting=90)
    cfg = FfnMoeConfig(serve=wanted, modal=ModalConfig(endpoint_public=True))
    cloud.serve_next([cloud.JobResult("deploy", None, "d-1", "found")], cfg, tmp_path, print)
    content = (tmp_path / cloud.SERVED).read_bytes()
    assert cloud.deployed(FfnMoeConfig(), {}, content).serve == wanted
    own = {"MOLEFORGE_CONFIG": "mine.yaml"}
    assert cloud.deployed(FfnMoeConfig(), own, content).serve == ServeConfig()


@pytest.mark.parametrize(
    ("serve", "said"),
    [
        ({"max_batch": 2, "max_waiting": 5}, "max_inputs: 64 requests .* over 6 of one client"),
        ({"max_seconds": 150}, "timeout_s: Modal ends a request after 150 s"),
    ],
)
def test_what_a_container_would_be_given_and_not_take_is_told(serve, said):
    prices = cloud.Prices.load(ROOT / "config/prices.yaml")
    cfg = FfnMoeConfig(serve=ServeConfig(**serve))
    with pytest.raises(ConfigError, match=said):
        cloud.check(cfg, prices, "/store")
    fits = EndpointConfig(max_inputs=6, target_inputs=2, timeout_s=300)
    cloud.check(cfg.model_copy(update={"modal": ModalConfig(endpoint=fits)}), prices, "/store")
