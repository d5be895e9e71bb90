"""The loopback server itself: a small app that meets Modal's rules, one after another, in real
containers."""

import pytest
from rehearsal import LINUX, rehearsal

pytestmark = LINUX

APP = """
import os, pathlib, time
import modal

app = modal.App("small")
image = modal.Image.debian_slim(python_version="3.12").env({"COLOUR": "two words"})
volume = modal.Volume.from_name("small", create_if_missing=True, version=2)
PLACE = os.environ.get("PLACE", "/place")
HERE = pathlib.Path(PLACE)
given = dict(image=image, volumes={PLACE: volume}, env={"PLACE": PLACE}, timeout=60)


@app.function(**given)
def write(name: str, commit: bool):
    (HERE / name).write_text(name)
    if commit:
        volume.commit()
    seen.remote(name)  # a container that looks while this one still runs
    return seen.remote(name)


@app.function(**given, single_use_containers=True)
def seen(name: str) -> bool:
    return (HERE / name).exists()


@app.function(**given)
def reload_with_open_file() -> str:
    (HERE / "open").write_text("x")
    with open(HERE / "open"):
        try:
            volume.reload()
        except RuntimeError as error:
            return str(error)


@app.function(**given)
def stale() -> list[bool]:
    before = (HERE / "later").exists()
    write.remote("later", True)
    still = (HERE / "later").exists()
    volume.reload()
    return [before, still, (HERE / "later").exists()]


@app.function(**given, retries=modal.Retries(max_retries=2, initial_delay=0.0))
def flaky(name: str) -> int:
    volume.reload()
    count = len(list(HERE.glob(f"{name}-*")))
    (HERE / f"{name}-{count}").write_text("")
    volume.commit()
    if name == "hopeless" or count < 2:
        raise ValueError(f"{name} failed")
    return count


@app.function(**given | {"timeout": 1})
def slow():
    time.sleep(30)


@app.function(**given)
def dies() -> None:
    volume.reload()
    attempt = len(list(HERE.glob("attempt*"))) + 1
    (HERE / f"attempt{attempt}").write_text("")
    volume.commit()
    print("attempt", attempt)
    if attempt == 1:
        os._exit(1)


@app.function(**given)
def variable() -> str:
    return os.environ["COLOUR"]


@app.local_entrypoint()
def main():
    print("uncommitted", write.remote("a", False))
    print("committed", write.remote("b", True))
    print("open:", reload_with_open_file.remote())
    print("stale", stale.remote())
    print("flaky", [str(x) for x in flaky.map(["hopeful", "hopeless"], return_exceptions=True)])
    print("variable", variable.remote())
    try:
        slow.remote()
    except modal.exception.FunctionTimeoutError as error:
        print("slow:", "timeout of 1s" in str(error))


@app.local_entrypoint()
def large():
    print("bytes", len(echo.remote(b"x" * 5_000_000)))


@app.function(**given)
def echo(data: bytes) -> bytes:
    return data
"""
REFUSED = """
import modal

app = modal.App("refused")


@app.function({})
def f():
    pass
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The client in a folder with the small app."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "app.py").write_text(APP)
    with rehearsal(folder, folder, "--commits", "3600", PLACE=str(folder / "place")) as client:
        yield client


@pytest.fixture(scope="module")
def printed(small):
    """What the small app found out about the rules."""
    return small("run", "app.py::main").splitlines()


def test_what_is_not_committed_is_hidden_and_what_is_committed_is_not(printed):
    assert "uncommitted False" in printed
    assert "committed True" in printed


def test_others_commits_appear_with_a_reload(printed):
    assert "stale [False, False, True]" in printed


def test_a_reload_with_an_open_file_is_refused(printed):
    assert any(line.startswith("open: ") and "open files preventing" in line for line in printed)


def test_inputs_are_retried_as_often_as_asked(printed):
    assert "flaky ['2', 'hopeless failed']" in printed


def test_a_time_limit_ends_an_attempt(printed):
    assert "slow: True" in printed


def test_the_image_sets_variables(printed):
    assert "variable two words" in printed


def test_large_arguments_and_results_travel_as_blobs(small):
    assert "bytes 5000000" in small("run", "app.py::large")


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ("gpu='H1OO'", "no such GPU H1OO:1"),
        ("gpu=['L4', 'H100:9']", "no such GPU H100:9"),
        ("timeout=90000", "between 1 second and 24 hours"),
        ("nonpreemptible=True, gpu='L4'", "nonpreemptible is not supported"),
    ],
)
def test_what_modal_refuses_is_refused(small, asked, why):
    (small.cwd / "refused.py").write_text(REFUSED.format(asked))
    assert why in " ".join(small("run", "refused.py::f", code=1).split())


def test_files_go_to_a_volume_and_back(small, tmp_path):
    data = bytes(range(256)) * 40_000  # more than one block
    (tmp_path / "large").write_bytes(data)
    small("volume", "create", "--version", "2", "box")
    small("volume", "put", "box", str(tmp_path / "large"), "/in/large")
    assert "in/large" in small("volume", "ls", "box", "in")
    small("volume", "get", "box", "in/large", str(tmp_path / "back"))
    assert (tmp_path / "back").read_bytes() == data
    small("volume", "rm", "box", "in/large")
    assert not (small.volume("box") / "in/large").exists()


def test_an_absent_volume_and_an_absent_secret_are_errors(small):
    assert "not found" in small("volume", "ls", "absent", code=1)
    (small.cwd / "refused.py").write_text(
        REFUSED.format("secrets=[modal.Secret.from_name('absent')]")
    )
    assert "absent" in small("run", "refused.py::f", code=1)


def test_volumes_of_the_first_version_work_too(small, tmp_path):
    (tmp_path / "note").write_text("hello")
    small("volume", "create", "--version", "1", "old")
    small("volume", "put", "old", str(tmp_path / "note"), "/note")
    assert "note" in small("volume", "ls", "old")
    assert small("volume", "get", "old", "note", "-").startswith("hello")
    small("volume", "delete", "-y", "old")
    assert "old" not in small("volume", "list")


def test_code_that_cannot_be_imported_in_a_container_is_an_error_and_not_a_wait(small):
    (small.cwd / "broken.py").write_text(
        REFUSED.format("") + "if not modal.is_local():\n    import no_such_module\n"
    )
    assert "no_such_module" in small("run", "broken.py::f", code=1)


def test_what_was_printed_can_be_read_later(small, printed):
    small("secret", "create", "--force", "shown", "KEY=value")
    assert "shown" in small("secret", "list")
    assert "small" in small("app", "list")
    logs = small("app", "logs", f"ap-{1:022d}")
    assert "ValueError: hopeless failed" in logs
    assert small("container", "list", "--json").strip().startswith("[")


def test_a_container_that_dies_runs_its_input_again(small):
    done = small("run", "app.py::dies")
    assert "attempt 2" in done


def test_every_call_of_the_api_that_was_made_has_a_handler(small, printed):
    calls = [
        line
        for line in (small.state / "rpc.jsonl").read_text().splitlines()
        if '"handled": false' in line
    ]
    assert calls == []
