"""Versions of bundles at one target: what the pointer names is whole at every moment, nothing is
sent twice or left behind to be paid for, and a former one comes back with one command."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from fsspec.implementations.local import LocalFileSystem
from s3_server import s3_server
from s3fs import S3FileSystem

from pipeline.__main__ import main
from pipeline.errors import DamagedArtifact, MissingArtifact, NewerStore, StoreError
from pipeline.protocols import quiet
from pipeline.store import bundle, s3
from pipeline.store.sending import Outgoing, Sending, side_by_side
from pipeline.store.upload import upload
from pipeline.store.versions import POINTER, Version, Versions, served_folder

PART = 64 << 10
ADDRESS = "deploy-0123456789ab"
# Bytes by file: two in parts, the rest whole
SIZES = {"model-a.safetensors": 9 * PART + 5, "model-b.safetensors": 3 * PART, "config.json": 70}


def made(folder: Path, seed: int) -> Path:
    """Return a folder that is sealed as a bundle, its bytes decided by the seed."""
    draw = random.Random(seed)
    folder.mkdir()
    small = {f"text-{i}.json": 500 + i for i in range(5)}
    sums = {}
    for name, size in (SIZES | small).items():
        (folder / name).write_bytes(draw.randbytes(size))
        sums[name] = bundle.sha256(folder / name)
    bundle.write_sums(folder, sums)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Return a folder's files."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file():
            found[path.relative_to(folder).as_posix()] = path.read_bytes()
    return found


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """Three bundles, the first two of them made at one address."""
    home = tmp_path_factory.mktemp("bundles")
    return [made(home / str(seed), seed) for seed in range(3)]


@pytest.fixture(scope="module")
def store():
    """The server with its client."""
    with s3_server() as found:
        yield found


@pytest.fixture
def server(store, monkeypatch):
    """The server, nothing in it, its parts small."""
    monkeypatch.setattr(s3, "PART_BYTES", PART)
    monkeypatch.setattr("moto.s3.models.S3_UPLOAD_PART_MIN_SIZE", 1)
    watched, _, client = store
    for entry in client.list_objects_v2(Bucket="shelf").get("Contents", []):
        client.delete_object(Bucket="shelf", Key=entry["Key"])
    watched.asked.clear()
    watched.most, watched.fails = 0, lambda _asked: ""
    return watched, client


def stored(client, below: str = "") -> dict[str, bytes]:
    """Return what is in the bucket."""
    found = {}
    for entry in client.list_objects_v2(Bucket="shelf", Prefix=below).get("Contents", []):
        body = client.get_object(Bucket="shelf", Key=entry["Key"])["Body"]
        found[entry["Key"].removeprefix(below)] = body.read()
    return found


def begun(client) -> list[str]:
    """Return the files of which parts are there."""
    return [
        each["Key"] for each in client.list_multipart_uploads(Bucket="shelf").get("Uploads", [])
    ]


def publish(folder, url="s3://shelf/demo", keep=3, address=ADDRESS) -> Version:
    """Bring a bundle to a target."""
    return Versions(url).publish(folder, address, keep, quiet)


def test_versions_lie_side_by_side_and_the_pointer_names_the_last(bundles, server):
    watched, client = server
    first = publish(bundles[0])
    assert 1 < watched.most <= s3.THREADS
    sent = watched.parts()
    assert sum(part.bytes for part in sent) >= 12 * PART + 5 and len(sent) == 13
    again = publish(bundles[0])
    assert not watched.parts() and again.name == first.name
    second = publish(bundles[1])
    assert first.name != second.name and first.name.startswith(f"{ADDRESS}-")
    found = stored(client, "demo/")
    for folder, version in zip(bundles, (first, second), strict=False):
        wanted = {f"{version.name}/{name}": data for name, data in contents(folder).items()}
        assert wanted.items() <= found.items()
        assert f"{version.name}.json" in found
    pointer = json.loads(found["latest.json"])
    assert pointer["address"] == ADDRESS and pointer["name"] == second.name
    assert pointer["sums"] == bundle.sha256(bundles[1] / "SHA256SUMS")
    assert watched.asked and begun(client) == []
    # No more and no less than these
    assert len(found) == 2 * (len(contents(bundles[0])) + 1) + 1


class Dead(BaseException):
    """The process is no more."""


class Life:
    """A process that ends at one of its operations: before it, or before it hears of it."""

    def __init__(self, monkeypatch, *operations):
        self.left, self.last = None, "before"
        for home, name in (*operations, (Versions, "_write"), (Versions, "_read")):
            monkeypatch.setattr(home, name, self._mortal(getattr(home, name)))

    def _mortal(self, call):
        def asked(*args, **kwargs):
            if self.left is None:
                return call(*args, **kwargs)
            self.left -= 1
            if self.left < 0 or (self.left == 0 and self.last == "before"):
                raise Dead
            answer = call(*args, **kwargs)
            if self.left == 0:
                raise Dead
            return answer

        return asked


def pointed(client) -> str | None:
    """Return what the pointer names, having seen that it is whole."""
    try:
        pointer = client.get_object(Bucket="shelf", Key=f"demo/{POINTER}")["Body"].read()
    except client.exceptions.NoSuchKey:
        return None
    name = json.loads(pointer)["name"]
    found = stored(client, f"demo/{name}/")
    for file, digest in bundle.parse_sums(found["SHA256SUMS"].decode()).items():
        assert bundle.hashlib.sha256(found[file]).hexdigest() == digest
    return name


def test_killed_at_any_moment_it_is_gone_on_with(bundles, server, monkeypatch):
    watched, client = server
    life, draw = Life(monkeypatch, (S3FileSystem, "call_s3")), random.Random(1)
    former = publish(bundles[0]).name
    watched.asked.clear()
    publish(bundles[1], keep=0)
    all_parts = len(watched.parts())
    assert all_parts == 13
    for _ in range(2):
        publish(bundles[0], keep=0)
        watched.asked.clear()
        attempts, parts = 0, []
        while True:
            life.left, life.last = draw.randrange(3, 60), draw.choice(["before", "after"])
            try:
                new = publish(bundles[1], keep=0).name
                break
            except Dead:
                attempts += 1
            finally:
                life.left = None
            # What was current is there until the new one is whole
            assert pointed(client) is not None
        parts += watched.parts()
        assert pointed(client) == new != former
        assert begun(client) == []
        # A thread may have had its part under way each time
        assert len(parts) <= all_parts + attempts * s3.THREADS
        # What a killed removal has left goes with the next one
        publish(bundles[1], keep=0)
        names = {name.partition("/")[0] for name in stored(client, "demo/")}
        assert names == {POINTER, new, f"{new}.json"}


def test_killed_at_any_moment_a_folder_s_pointer_names_what_is_whole(
    bundles, tmp_path, monkeypatch
):
    names = ("put_file", "mv", "rm_file", "exists")
    life = Life(monkeypatch, *[(LocalFileSystem, name) for name in names])
    target, draw = tmp_path / "shelf", random.Random(3)
    publish(bundles[0], str(target), keep=0)
    for number in range(12):
        folder = bundles[number % 2 + 1]
        while True:
            life.left, life.last = draw.randrange(2, 90), draw.choice(["before", "after"])
            try:
                new = publish(folder, str(target), keep=0)
                break
            except Dead:
                life.left = None
                bundle.verify(served_folder(target))
        life.left = None
        publish(folder, str(target), keep=0)
        bundle.verify(served_folder(target))
        assert {path.name for path in target.iterdir()} == {POINTER, new.name, f"{new.name}.json"}


def test_versions_at_another_place_that_fsspec_knows(bundles):
    names = [publish(folder, "memory://shelf").name for folder in bundles]
    versions = Versions("memory://shelf/")
    assert [version.name for version in versions.known()] == names
    assert versions.roll_back(None, quiet).name == names[1]
    assert versions.current().name == names[1]
    assert publish(bundles[2], "memory://shelf", keep=0).name == names[2]
    assert [version.name for version in versions.known()] == names[2:]


KILLED = """
import sys
from pathlib import Path
from fsspec.config import conf
from pipeline.store import s3
from pipeline.store.versions import Versions
s3.PART_BYTES = int(sys.argv[3])
conf["s3"] = {"key": "a", "secret": "b", "endpoint_url": sys.argv[2]}
Versions("s3://shelf/demo").publish(Path(sys.argv[1]), "deploy-0123456789ab", 3, print)
"""


def test_a_process_that_is_killed_leaves_parts_that_the_next_one_ends(bundles, server, store):
    watched, client = server
    process = None
    killed = threading.Event()

    def fails(asked):
        if asked.is_part and len([each for each in watched.asked if each.is_part]) > 6:
            os.kill(process.pid, signal.SIGKILL)
            killed.set()
            return "before"
        return ""

    watched.fails = fails
    command = [sys.executable, "-c", KILLED, str(bundles[0]), store[1], str(PART)]
    root = Path(__file__).parent.parent
    process = subprocess.Popen(command, cwd=root, stdout=subprocess.DEVNULL)
    assert process.wait(300) == -signal.SIGKILL and killed.is_set()
    watched.fails = lambda _asked: ""
    assert begun(client) and POINTER not in stored(client, "demo/")
    kept = watched.parts()[:6]
    version = publish(bundles[0])
    again = watched.parts()
    assert 13 - len(kept) <= len(again) <= 13 - len(kept) + s3.THREADS
    assert pointed(client) == version.name and begun(client) == []


def test_requests_that_fail_now_and_then_are_made_again(bundles, server, monkeypatch):
    watched, client = server
    draw = random.Random(2)
    monkeypatch.setattr("botocore.retryhandler.delay_exponential", lambda *_a, **_k: 0)
    watched.fails = lambda _asked: draw.choice(["before", "after"]) if draw.random() < 0.1 else ""
    version = publish(bundles[0])
    watched.fails = lambda _asked: ""
    assert pointed(client) == version.name and begun(client) == []


def test_a_store_that_fails_is_told_and_the_same_command_goes_on(bundles, server, monkeypatch):
    watched, client = server
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    publish(bundles[0])
    before = pointed(client)
    watched.asked.clear()
    watched.fails = lambda asked: "before" if "partNumber=4" in asked.query else ""
    with pytest.raises(StoreError, match=r"model-a\.safetensors cannot be written.*not now"):
        publish(bundles[1])
    assert pointed(client) == before
    watched.fails = lambda _asked: ""
    first = len(watched.parts())
    assert pointed(client) == before != publish(bundles[1]).name == pointed(client)
    assert first + len(watched.parts()) <= 13 + s3.THREADS and begun(client) == []


def test_a_bucket_that_is_not_there_is_no_empty_place(bundles, server, capsys):
    assert main(["versions", "s3://shelf/empty"]) == 0
    assert "there is no version in s3://shelf/empty" in capsys.readouterr().out
    for command in ("versions", "rollback"):
        assert main([command, "s3://nowhere/demo"]) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert "s3://nowhere/demo" in said and "bucket does not exist" in said
        assert main([command, "s3://"]) == 2
        assert "s3:// names no bucket" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(StoreError, match="s3:// names no bucket"):
        publish(bundles[0], "s3://")


def test_who_may_remove_nothing_may_bring_bundles_all_the_same(bundles, server):
    watched, client = server
    watched.fails = lambda asked: "before" if asked.method == "DELETE" else ""
    names = [publish(folder).name for folder in bundles[:2]]
    assert not [asked for asked in watched.asked if asked.method == "DELETE"]
    watched.fails = lambda _asked: ""
    assert pointed(client) == names[1]
    assert [version.name for version in Versions("s3://shelf/demo").known()] == names


def test_a_place_of_any_letters_is_one(bundles, server, capsys):
    _, client = server
    place = "s3://shelf/with space/[ünï]?x=1&y#z%20+"
    first, second = (publish(folder, place).name for folder in bundles[:2])
    keys = {entry["Key"] for entry in client.list_objects_v2(Bucket="shelf")["Contents"]}
    assert f"{place.removeprefix('s3://shelf/')}/{second}.json" in keys
    assert main(["rollback", place]) == 0
    assert Versions(place).current().name == first
    assert f"versions in {place}" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("same", [True, False])
def test_two_uploaders_at_once(bundles, server, same):
    _, client = server
    for _ in range(2):
        errors, made = [], []

        def work(folder, errors=errors, made=made):
            try:
                made.append(publish(folder, keep=1).name)
            except Exception as error:
                errors.append(error)

        folders = (bundles[2], bundles[2] if same else bundles[1])
        threads = [threading.Thread(target=work, args=(folder,)) for folder in folders]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        assert pointed(client) in made and begun(client) == []
        known = Versions("s3://shelf/demo").known()
        assert {version.name for version in known} >= set(made)
        for key in stored(client):
            client.delete_object(Bucket="shelf", Key=key)


def test_what_a_killed_upload_of_another_bundle_has_left_goes_when_it_lies_idle(
    bundles, server, monkeypatch
):
    _, client = server
    key = f"demo/{ADDRESS}-00000000/model-a.safetensors"
    known = {"Bucket": "shelf", "Key": key}
    known["UploadId"] = client.create_multipart_upload(**known)["UploadId"]
    client.upload_part(**known, PartNumber=1, Body=b"x" * PART)
    publish(bundles[0])
    # Somebody may be at work on it
    assert begun(client) == [key]
    monkeypatch.setattr(s3, "IDLE_S", -1)
    publish(bundles[0])
    assert begun(client) == []


def test_where_sums_are_not_told_files_are_read_back(bundles, server, monkeypatch):
    watched, client = server
    call = s3.S3Files._call

    def silent(self, method, **values):
        answer = call(self, method, **values)
        if method == "head_object":
            answer.pop("ChecksumSHA256", None)
            answer["ETag"] = '"of what is encrypted"'
        return answer

    monkeypatch.setattr(s3.S3Files, "_call", silent)
    version = publish(bundles[0])
    reads = [asked for asked in watched.asked if asked.method == "GET" and "model-a" in asked.path]
    assert reads and pointed(client) == version.name
    # A bit that is another one is seen there
    changed = f"demo/{version.name}/text-1.json"
    client.put_object(Bucket="shelf", Key=changed, Body=b"x" * 501)
    watched.asked.clear()
    publish(bundles[0])
    sent = [asked.path for asked in watched.asked if asked.method == "PUT"]
    assert [path for path in sent if version.name + "/" in path] == [f"/shelf/{changed}"]


def test_uploads_that_may_not_be_listed_stop_nobody(bundles, server, monkeypatch):
    _, client = server
    call = s3.S3Files._call

    def refused(self, method, **values):
        if method == "list_multipart_uploads":
            raise PermissionError("AccessDenied")
        return call(self, method, **values)

    monkeypatch.setattr(s3.S3Files, "_call", refused)
    said = []
    Versions("s3://shelf/demo").publish(
        bundles[0], ADDRESS, 3, lambda text, _share: said.append(text)
    )
    assert any("cannot be listed (AccessDenied)" in text for text in said)
    assert pointed(client)


def test_a_folder_of_versions_is_served_and_rolled_back(bundles, tmp_path, capsys):
    target = tmp_path / "shelf"
    names = [publish(folder, str(target), keep=2).name for folder in bundles]
    assert served_folder(target) == served_folder(target / POINTER) == target / names[2]
    bundle.verify(served_folder(target))
    assert served_folder(bundles[0]) == bundles[0]
    assert main(["rollback", str(target)]) == 0
    assert served_folder(target).name == names[1]
    assert main(["rollback", str(target), "--to", names[0]]) == 0
    assert served_folder(target).name == names[0]
    told = capsys.readouterr().out
    assert f"latest.json names {names[0]}" in told and told.count("latest") > 3
    assert main(["rollback", str(target)]) == 2
    assert "there is no version before" in " ".join(capsys.readouterr().err.split())
    assert main(["rollback", str(target), "--to", "deploy-ffff"]) == 2
    assert "is no version" in capsys.readouterr().err
    assert main(["versions", str(target)]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert [name in row for name, row in zip(reversed(names), rows[-3:], strict=False)]
    # The oldest is current: it is not removed, whatever is to be kept
    publish(bundles[2], str(target), keep=0)
    assert {path.name for path in target.iterdir()} == {POINTER, names[2], f"{names[2]}.json"}
    assert main(["versions", str(tmp_path / "nothing")]) == 0


def test_what_the_pointer_names_is_not_removed(bundles, tmp_path):
    target = tmp_path / "shelf"
    for folder in bundles[:2]:
        publish(folder, str(target))
    versions = Versions(str(target))
    first, second = versions.known()
    assert versions.roll_back(None, quiet).name == first.name
    assert not versions._remove(first) and (target / f"{first.name}.json").exists()
    # Somebody moves the pointer to it when it begins to go
    begin = versions._fs.pipe_file

    def moved(path, data):
        begin(path, data)
        Versions(str(target)).roll_back(second.name, quiet)

    versions._fs.pipe_file = moved
    assert not versions._remove(second)
    assert served_folder(target).name == second.name
    bundle.verify(target / second.name)
    assert {version.name for version in versions.known()} == {first.name, second.name}
    # Or it goes while somebody looks whether it is whole
    versions._fs.pipe_file = begin
    other = Versions(str(target))
    look = other._is_whole

    def goes(version):
        whole = look(version)
        assert versions._remove(version)
        return whole

    other._is_whole = goes
    with pytest.raises(StoreError, match="just being removed"):
        other.roll_back(first.name, quiet)
    assert served_folder(target).name == second.name
    bundle.verify(target / second.name)
    assert not (target / first.name).exists()


POINTERS = {
    "another list": ({"sums": "0" * 64}, DamagedArtifact, "is not the list that"),
    "outside": ({"name": "../elsewhere"}, DamagedArtifact, "is no name of a folder"),
    "gone": ({"name": "deploy-1"}, MissingArtifact, "which is not there"),
    "later": ({"format": 2}, NewerStore, "update MoleForge"),
    "no field": ({"address": 7}, DamagedArtifact, "is no pointer to a bundle"),
}


@pytest.mark.parametrize("wrong", POINTERS)
def test_a_pointer_that_is_not_right_serves_nothing(bundles, tmp_path, wrong):
    changes, error, said = POINTERS[wrong]
    publish(bundles[0], str(tmp_path / "shelf"))
    pointer = tmp_path / "shelf" / POINTER
    pointer.write_text(json.dumps(json.loads(pointer.read_text()) | changes))
    with pytest.raises(error, match=said):
        served_folder(tmp_path / "shelf")


def test_a_bundle_of_before_at_the_target_is_left_as_it_is(bundles, tmp_path):
    upload(bundles[0], str(tmp_path / "shelf"), quiet)
    before = contents(tmp_path / "shelf")
    with pytest.raises(StoreError, match="is itself a bundle"):
        publish(bundles[1], str(tmp_path / "shelf"))
    assert contents(tmp_path / "shelf") == before


def test_files_of_others_and_what_killed_uploads_left_beside(bundles, tmp_path, monkeypatch):
    target = tmp_path / "shelf"
    target.mkdir()
    (target / "notes.json").write_text("{}")
    half = target / "deploy-aaaaaaaaaaaa-bbbbbbbb"
    half.mkdir()
    (half / "config.json.17-0.part").write_text("x")
    version = publish(bundles[0], str(target))
    left = target / version.name / "config.json.4711-3.part"
    left.write_text("x")
    assert half.exists() and publish(bundles[0], str(target)).name == version.name
    assert not left.exists()
    monkeypatch.setattr("pipeline.store.versions.ABANDONED_S", -1)
    publish(bundles[0], str(target))
    assert not half.exists() and (target / "notes.json").exists()


def test_a_file_that_is_written_while_it_is_sent_makes_no_bundle(tmp_path):
    folder, target = made(tmp_path / "bundle", 7), tmp_path / "shelf"

    def write(text, _share):
        if text.startswith("uploading"):
            (folder / "config.json").write_bytes(b"y" * 70)
            os.utime(folder / "config.json", ns=(1, 1))

    with pytest.raises(StoreError, match="was written while it was sent|other bytes than were"):
        Versions(str(target)).publish(folder, ADDRESS, 3, write)
    assert not (target / POINTER).exists()


def test_the_time_that_is_left_goes_by_what_went_over_the_line():
    now, said = [0.0], []
    sending = Sending("uploading", 1000, lambda *told: said.append(told), lambda: now[0])
    sending.add(500, sent=False)
    sending.tell()
    assert said == [("uploading", 0.5)] and sending.left_s is None
    now[0] = 10
    sending.add(100)
    sending.tell()
    assert said[-1] == ("uploading, 40.0 s left", 0.6)
    now[0] = 11
    sending.tell()
    assert len(said) == 2


def test_the_first_error_ends_the_others_and_ctrl_c_waits_for_nobody(tmp_path):
    done = []

    def work(item):
        if item == 3:
            raise OSError("three")
        done.append(item)

    with pytest.raises(OSError, match="three"):
        side_by_side(work, range(1000), 4, lambda: None)
    assert len(done) < 1000
    ends = threading.Event()

    def typed():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        side_by_side(lambda _item: ends.wait(60), range(8), 4, typed)
    ends.set()
    path = tmp_path / "a"
    path.write_text("x")
    file = Outgoing.of(tmp_path, "a", "")
    file.check()
    path.write_text("xy")
    with pytest.raises(StoreError, match="was written while it was sent"):
        file.check()
