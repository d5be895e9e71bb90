"""An upload is the bundle or says that it is not: folders, memory, a real S3 server, and one that
tears files."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from fakes import flip
from fsspec.implementations.memory import MemoryFileSystem
from s3_server import s3_server

from pipeline.__main__ import main
from pipeline.errors import DamagedArtifact, DiskFull, StoreError
from pipeline.protocols import quiet
from pipeline.store import bundle
from pipeline.store.artifacts import inventory
from pipeline.store.upload import upload

BESIDE = ("made.json", "SHA256SUMS")  # what a bundle holds that its sums do not


class Torn(MemoryFileSystem):
    """A filesystem that loses the end of the files named in `tears`, and counts what it is sent."""

    protocol = "torn"
    store, pseudo_dirs, tears, sent = {}, [""], set(), []

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(path.replace("torn://", "memory://"))

    def put_file(self, lpath, rpath, callback=None, mode="overwrite", **kwargs):
        """Keep a file, or its first half."""
        name = Path(lpath).name
        Torn.sent.append(name)
        data = Path(lpath).read_bytes()
        self.pipe_file(rpath, data[: len(data) // 2] if name in Torn.tears else data)


@pytest.fixture
def torn():
    """The filesystem above under torn://, empty."""
    import fsspec

    fsspec.register_implementation("torn", Torn, clobber=True)
    Torn.store, Torn.tears, Torn.sent = {}, set(), []
    return Torn


def test_a_torn_upload_is_noticed_and_mended_by_the_same_command(bundled, torn):
    folder, url = bundled[2], "torn://somewhere/bundle"
    torn.tears = {"tokenizer.json"}
    with pytest.raises(
        StoreError, match=r"tokenizer\.json came back with other bytes.*Run the same command again"
    ):
        upload(folder, url, quiet)
    assert "/somewhere/bundle/tokenizer.json" in torn.store
    assert "/somewhere/bundle/SHA256SUMS" not in torn.store, "an unfinished copy is no bundle"
    sent, torn.sent, torn.tears = torn.sent, [], set()
    said = []
    upload(folder, url, lambda text, _share: said.append(text))
    assert torn.sent[0] == "tokenizer.json" and torn.sent[-1] == "SHA256SUMS", "the list goes last"
    assert sorted(sent[:-1] + torn.sent) == sorted([*bundle.read_sums(folder), *BESIDE]), (
        "nothing goes twice"
    )
    shown = "torn://somewhere/bundle"
    assert said[-1] == f"uploaded 17 files to {shown}, each compared with what is there"
    assert {Path(p).name for p in torn.store} == {*bundle.read_sums(folder), *BESIDE}
    torn.tears, torn.sent = {"SHA256SUMS"}, []
    upload(folder, url, quiet)
    assert torn.sent == []


class Interrupted(Torn):
    """A filesystem at whose operation number `at` a person types Ctrl-C, half of a file being
    sent, and at whatever it does next once more."""

    at, seen = None, 0

    @classmethod
    def begin(cls, at):
        """Count from here."""
        cls.at, cls.seen = at, 0

    def _operation(self):
        Interrupted.seen += 1
        if Interrupted.at is not None and Interrupted.seen > Interrupted.at:
            raise KeyboardInterrupt

    def put_file(self, lpath, rpath, **kwargs):
        """Keep a file; half of one when the person cannot wait."""
        try:
            self._operation()
        except KeyboardInterrupt:
            self.pipe_file(rpath, Path(lpath).read_bytes()[:-9])
            raise
        super().put_file(lpath, rpath, **kwargs)

    def exists(self, path, **kwargs):
        """Whether a file is there."""
        self._operation()
        return super().exists(path, **kwargs)

    def rm_file(self, path):
        """Remove a file."""
        self._operation()
        super().rm_file(path)

    def open(self, path, mode="rb", **kwargs):
        """Open a file that has no end for who types Ctrl-C."""
        self._operation()
        return super().open(path, mode, **kwargs)


def test_ctrl_c_typed_again_and_again_leaves_a_bundle_or_none(bundled, tmp_path):
    import fsspec

    fsspec.register_implementation("torn", Interrupted, clobber=True)
    folder, url = bundled[2], "torn://shelf"
    older = shutil.copytree(folder, tmp_path / "older")
    (older / "report.html").write_text("older")
    sums = bundle.read_sums(older) | {"report.html": bundle.sha256(older / "report.html")}
    (older / "SHA256SUMS").write_text("".join(f"{d}  {n}\n" for n, d in sums.items()))
    whole = {
        name: (folder / name).read_bytes() for name in [*bundle.read_sums(folder), bundle.SUMS]
    }
    Torn.store, Torn.tears, Torn.sent = {}, set(), []
    Interrupted.begin(None)
    upload(older, url, quiet)
    begun = dict(Torn.store)
    Interrupted.begin(None)
    upload(folder, url, quiet)
    operations = Interrupted.seen
    assert operations > 30
    fs = Interrupted()
    for at in range(0, operations, 3):
        Torn.store = dict(begun)
        for again in (at, at // 2):
            Interrupted.begin(again)
            with pytest.raises(KeyboardInterrupt):
                upload(folder, url, quiet)
            Interrupted.begin(None)
            stored = {name.removeprefix("/shelf/"): fs.cat_file(name) for name in Torn.store}
            # what is taken for a bundle is one: its list goes last, and half a list lists nothing
            for home in (older, folder):
                if stored.get(bundle.SUMS) == (home / bundle.SUMS).read_bytes():
                    for name in bundle.read_sums(home):
                        assert stored[name] == (home / name).read_bytes(), f"{at}: {name}"
        upload(folder, url, quiet)
        found = {name: fs.cat_file(f"/shelf/{name}") for name in whole}
        assert found == whole


def test_a_file_that_changed_at_the_target_is_sent_again(bundled, torn):
    upload(bundled[2], "torn://b", quiet)
    fs, torn.sent = torn(), []
    data = fs.cat_file("/b/model-trunk.safetensors")
    fs.pipe_file("/b/model-trunk.safetensors", data[:-1] + bytes([data[-1] ^ 1]))
    upload(bundled[2], "torn://b", quiet)
    assert (
        torn.sent == ["model-trunk.safetensors"]
        and fs.cat_file("/b/model-trunk.safetensors") == data
    )


def test_an_earlier_bundle_at_the_target_is_replaced_whole(bundled, tmp_path):
    older = shutil.copytree(bundled[2], tmp_path / "older")
    extra, target = older / "model-expert-009-gone.safetensors", tmp_path / "deep" / "target"
    extra.write_bytes(b"x")
    sums = bundle.read_sums(older) | {extra.name: inventory(older)[extra.name]["sha256"]}
    (older / "SHA256SUMS").write_text("".join(f"{d}  {n}\n" for n, d in sums.items()))
    upload(older, str(target), quiet)
    (target / "notes.txt").write_text("not ours")
    assert (target / extra.name).exists()
    upload(bundled[2], f"file://{target}", quiet)
    assert not (target / extra.name).exists() and (target / "notes.txt").exists()
    bundle.verify(target)
    assert (
        subprocess.run(
            ["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=target, check=False
        ).returncode
        == 0
    )


def test_a_damaged_bundle_is_not_uploaded(bundled, tmp_path, torn):
    folder = shutil.copytree(bundled[2], tmp_path / "copy")
    flip(folder / "report.html")
    with pytest.raises(DamagedArtifact, match=r"report\.html"):
        upload(folder, "torn://b", quiet)
    assert torn.store == {}


def test_an_upload_that_cannot_work_names_the_target_and_not_its_password(
    bundled, tmp_path, monkeypatch, torn
):
    with pytest.raises(StoreError, match="s4://bucket/x is no folder and no URL"):
        upload(bundled[2], "s4://bucket/x", quiet)
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="file/below cannot be written"):
        upload(bundled[2], str(tmp_path / "file" / "below"), quiet)

    def refuse(*_, **__):
        raise PermissionError("no such key")

    monkeypatch.setattr(torn, "put_file", refuse)
    with pytest.raises(StoreError, match=r"torn://\*\*\*@host/.* PermissionError: no such key"):
        upload(bundled[2], "torn://me:secret@host/x", quiet)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torn, "put_file", full)
    with pytest.raises(DiskFull, match="no room to write torn://b"):
        upload(bundled[2], "torn://b", quiet)


def test_upload_to_memory(bundled):
    import fsspec

    upload(bundled[2], "memory://some/bundle/", quiet)
    fs = fsspec.filesystem("memory")
    for name in [*bundle.read_sums(bundled[2]), *BESIDE]:
        assert fs.cat_file(f"/some/bundle/{name}") == (bundled[2] / name).read_bytes()
    fs.rm("/some", recursive=True)


@pytest.fixture
def s3():
    """A client of an S3 server of our own with one bucket, shelf; requests go over a socket."""
    with s3_server() as (_, _, client):
        yield client


def test_upload_to_an_s3_server(bundled, s3, tmp_path):
    folder = bundled[2]
    upload(folder, "s3://shelf/models/tiny", quiet)
    listed = {o["Key"]: o for o in s3.list_objects_v2(Bucket="shelf")["Contents"]}
    assert listed.keys() == {f"models/tiny/{n}" for n in [*bundle.read_sums(folder), *BESIDE]}
    for key in listed:
        body = s3.get_object(Bucket="shelf", Key=key)["Body"].read()
        assert body == (folder / Path(key).name).read_bytes()
    before = {key: o["LastModified"] for key, o in listed.items()}
    s3.put_object(Bucket="shelf", Key="models/tiny/README.md", Body=b"other")
    upload(folder, "s3://shelf/models/tiny", quiet)
    after = s3.get_object(Bucket="shelf", Key="models/tiny/README.md")["Body"].read()
    assert after == (folder / "README.md").read_bytes() and len(before) == 17
    with pytest.raises(StoreError, match="s3://nowhere/x"):
        upload(folder, "s3://nowhere/x", quiet)
    assert [b["Name"] for b in s3.list_buckets()["Buckets"]] == ["shelf"], (
        "a misspelt bucket is not made"
    )


def exported(bundled, to, *options) -> int:
    """Return the exit code of an export of the finished run."""
    command = ["export", "--config", str(bundled[0]), "--store", str(bundled[1]), "--to", str(to)]
    return main([*command, *options])


def test_the_command_brings_the_bundle_to_a_folder_and_to_a_url(bundled, tmp_path, torn):
    assert exported(bundled, tmp_path / "here", "--format", "hf") == 0
    assert exported(bundled, "torn://shelf", "--format", "hf") == 0
    bundle.verify(tmp_path / "here")
    names = {*bundle.read_sums(bundled[2]), *BESIDE}
    assert {path.name for path in (tmp_path / "here").iterdir()} == names
    assert {Path(path).name for path in torn.store} == names


def test_what_is_exported_is_there_whole_or_not_at_all(bundled, tmp_path, capsys, monkeypatch):
    here = tmp_path / "here"

    def full(*_):
        raise OSError(28, "No space left on device", str(tmp_path))

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.families.ffn_moe.export.formats.write_sums", full)
        assert exported(bundled, here, "--format", "dense") == 2
    assert "no room to write" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert exported(bundled, here, "--format", "dense") == 0
    first = bundle.read_sums(here)
    bundle.verify(here)
    # Of another kind over it: what that has not is taken away
    assert exported(bundled, here, "--format", "gguf", "--dense") == 0
    bundle.verify(here)
    found = {path.name for path in here.iterdir()}
    assert "model.safetensors" in first and "model.safetensors" not in found
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_the_command_that_compresses_writes_adapters_and_says_what_they_keep(
    bundled, tmp_path, capsys
):
    to = tmp_path / "here"
    common = ["--config", str(bundled[0]), "--store", str(bundled[1]), "--to", str(to)]
    assert main(["compress", *common, "--rank", "2"]) == 0
    bundle.verify(to)
    names = [path.name for path in (to / "adapters").iterdir()]
    assert len(names) > 1 and [path.name for path in tmp_path.iterdir()] == ["here"]
    said = " ".join(capsys.readouterr().err.split())
    kept = re.findall(r"Rank 2 keeps (\d+)% of the squared change that the expert (\w+)", said)
    assert sorted(names) == sorted(name for _, name in kept)
    assert all(0 < int(share) < 100 for share, _ in kept)


def test_an_export_is_not_put_among_somebodys_files(bundled, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    assert exported(bundled, tmp_path, "--format", "hf") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "--to:" in said and "holds something else; name a new or empty folder" in said
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
