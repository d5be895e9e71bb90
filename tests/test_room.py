"""A lack of room is known as one, whoever says it and whatever became of it on the way."""

import errno
import os
import sqlite3
import traceback
from pathlib import Path

import pytest
from fakes import told
from safetensors import SafetensorError

from pipeline.data.routing.dataset import _faults_of_table
from pipeline.errors import ConfigError, DataError, DiskFull, UnreadableFile
from pipeline.store.room import NO_ROOM, translate_disk_errors, writing

NUMBERS = sorted(NO_ROOM)


def system(number, *names):
    """Return what the system raises."""
    return OSError(number, os.strerror(number), *names)


def in_rust(number):
    """Return what a library in Rust raises."""
    return SafetensorError(f"Error while serializing: {os.strerror(number)} (os error {number})")


def became(kind, error, hidden):
    """Return an error that another one was turned into, its origin shown or not."""
    try:
        try:
            raise error
        except Exception as origin:
            raise kind("the source cannot be read") from (None if hidden else origin)
    except kind as other:
        return other


def variants(number):
    """Return errors that all come of the same number."""
    plain = [system(number), in_rust(number), Exception(f"Disk (os error {number})")]
    turned = [became(kind, plain[0], hide) for kind in (DataError, ConfigError) for hide in (0, 1)]
    twice = became(RuntimeError, became(DataError, in_rust(number), True), False)
    return [*plain, *turned, twice]


@pytest.mark.parametrize("number", NUMBERS)
def test_every_way_of_saying_it_is_no_room(number, tmp_path):
    for error in variants(number):
        with pytest.raises(DiskFull) as full, writing(tmp_path / "rows.jsonl"):
            raise error
        said = f"no room to write {tmp_path / 'rows.jsonl'} ({os.strerror(number)}; "
        assert str(full.value).startswith(said)
        # what a person sees of it is the sentence alone
        assert "os error" not in "".join(traceback.format_exception_only(full.value))


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ESTALE, errno.EMFILE])
def test_other_faults_stay_what_they_are(number, tmp_path):
    for error in variants(number):
        with pytest.raises(type(error)) as same, writing(tmp_path / "rows.jsonl"):
            raise error
        assert same.value is error
    unread = UnreadableFile("it cannot be read")
    with pytest.raises(UnreadableFile), translate_disk_errors(tmp_path / "artifacts" / "a"):
        raise unread


@pytest.mark.parametrize(
    ("names", "named"),
    [
        (("/s/x.json.part",), "/s/x.json"),
        (("/s/x.json.part", None, "/s/x.json"), "/s/x.json"),
        (("/from/x", None, "/to/x"), "/to/x"),
        (("/s/p.png.12-34.part",), "/s/p.png"),
        (("/root/cache/blob",), "/root/cache/blob"),
        ((), "/s/p.png"),
    ],
)
def test_it_names_what_the_system_names(names, named):
    with pytest.raises(DiskFull) as full, writing(Path("/s/p.png")):
        raise system(errno.ENOSPC, *names)
    assert f"no room to write {named} (" in str(full.value)


def test_where_it_is_decides_how_room_is_made(tmp_path):
    folder = tmp_path / "artifacts" / "preprocess-0123456789ab"
    for name, wanted in ((folder / "rows.jsonl", "prune"), ("/elsewhere/blob", "make room there")):
        with pytest.raises(DiskFull) as full, translate_disk_errors(folder):
            raise became(DataError, system(errno.ENOSPC, str(name)), True)
        assert wanted in told(full.value)
        assert told(full.value).endswith("then run the same command again")


def test_a_table_that_cannot_grow_is_told_from_a_broken_disk(tmp_path, monkeypatch):
    table = tmp_path / "rows.sqlite"
    broken = sqlite3.OperationalError("disk I/O error")
    broken.sqlite_errorcode = sqlite3.SQLITE_IOERR_WRITE
    with pytest.raises(DataError, match="disk I/O error"), _faults_of_table(table, Path("r.jsonl")):
        raise broken

    def refuse(_handle):
        raise system(errno.EDQUOT)

    monkeypatch.setattr(os, "fsync", refuse)
    wanted = r"no room to write r.jsonl \(Disk quota"
    with (
        pytest.raises(DiskFull, match=wanted),
        writing(Path("r.jsonl")),
        _faults_of_table(table, Path("r.jsonl")),
    ):
        raise broken
