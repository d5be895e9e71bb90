"""Files at an S3 store: in one request or in parts, compared by the sums that the store tells.

Invariant: what a killed upload has sent of a file is gone on with or thrown away, so that nobody
pays for parts of files that there will never be; whoever finds its parts thrown away sends again.
"""

import contextlib
import hashlib
import mimetypes
from base64 import b64encode
from collections.abc import Collection
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..errors import StoreError
from .sending import Outgoing, Sending, side_by_side

if TYPE_CHECKING:
    from s3fs import S3FileSystem

# So many parts are in memory at once, each more than once while its request is made: a file of
# 420 MB made a process 173 MB larger.
THREADS = 4
PART_BYTES = 16 << 20
MOST_PARTS = 10_000  # S3's own limit
# Somebody who is at work sends a part in less; who sent none for so long was killed.
IDLE_S = 3600.0
ATTEMPTS = 3
SHA256 = "SHA256"

Answer = dict[str, Any]


class ToldSums:
    """What a store says of a file: its sha256 and ETag, of one in parts over those of its parts."""

    def __init__(self, file: Outgoing) -> None:
        self.file = file
        # A file of 160 GB has parts of 16 MiB still
        self.part_bytes = max(PART_BYTES, -(-file.bytes // MOST_PARTS))
        self.parts = -(-file.bytes // self.part_bytes)
        self._of_parts: dict[int, tuple[bytes, bytes]] = {}

    @property
    def is_large(self) -> bool:
        """Whether the file is sent in parts."""
        return self.parts > 1

    def read(self, number: int) -> bytes:
        """Return the bytes of a part, the first one is 1, and remember their sums."""
        with self.file.path.open("rb") as file:
            file.seek((number - 1) * self.part_bytes)
            data = file.read(self.part_bytes)
        md5 = hashlib.md5(data, usedforsecurity=False).digest()
        self._of_parts[number] = (hashlib.sha256(data).digest(), md5)
        return data

    def part(self, number: int) -> tuple[bytes, bytes]:
        """Return sha256 and MD5 of a part."""
        if number not in self._of_parts:
            self.read(number)
        return self._of_parts[number]

    def _all(self, which: int) -> bytes:
        found = [self.part(number)[which] for number in range(1, self.parts + 1)]
        return b"".join(found)

    @property
    def sha256(self) -> str:
        """Of the whole file, as the store writes it."""
        return as_told(bytes.fromhex(self.file.sha256))

    def is_told(self, told: str) -> bool:
        """Whether that is what the store says of the file, sent whole or in these parts."""
        if told == self.sha256:
            return True
        # Not every store writes how many parts there are behind it
        return self.is_large and told.partition("-")[0] == self._sha256_of_parts

    @cached_property
    def _sha256_of_parts(self) -> str:
        return as_told(hashlib.sha256(self._all(0)).digest())

    @cached_property
    def etag(self) -> str:
        """As most stores make it of bytes that they do not encrypt."""
        if not self.is_large:
            content = self.file.path.read_bytes()
            return hashlib.md5(content, usedforsecurity=False).hexdigest()
        digest = hashlib.md5(self._all(1), usedforsecurity=False).hexdigest()
        return f"{digest}-{self.parts}"


class S3Files:
    """The place of a bundle's files below a prefix of a bucket."""

    threads = THREADS

    def __init__(self, fs: "S3FileSystem", root: str, setting: str) -> None:
        self._fs = fs
        self._setting = setting
        self._bucket, self._prefix, _ = fs.split_path(root)
        self._begun: list[Answer] = []  # uploads in parts that somebody has not ended

    def _call(self, method: str, **values: Any) -> Answer:
        return self._fs.call_s3(method, Bucket=self._bucket, **values)

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}" if self._prefix else name

    def is_large(self, file: Outgoing) -> bool:
        """Whether a file is sent in parts, several at once."""
        return ToldSums(file).is_large

    def begin(self, names: Collection[str]) -> str:
        """Look for uploads that were begun; return what is wrong where they cannot be listed, which
        keeps nobody from sending."""
        try:
            self._begun = self.end_idle({self._key(name) for name in names})
        except OSError as error:
            self._begun = []
            return (
                f"uploads that were begun cannot be listed ({error}): none is gone on with, and "
                "their parts cost until a rule of the bucket removes them"
            )
        return ""

    def end_idle(self, wanted: Collection[str] = ()) -> list[Answer]:
        """Throw away what was begun below the prefix, is not wanted, and lies idle; return what is
        wanted. Raises OSError."""
        found = []
        for upload in self._uploads():
            if upload["Key"] in wanted:
                found.append(upload)
            elif self._is_idle(upload):
                self._end(upload)
        return found

    def _uploads(self) -> list[Answer]:
        found: list[Answer] = []
        more: Answer = {}
        while True:
            page = self._call("list_multipart_uploads", Prefix=self._key(""), **more)
            found += page.get("Uploads", [])
            if not page.get("IsTruncated"):
                return found
            more = {
                "KeyMarker": page["NextKeyMarker"],
                "UploadIdMarker": page["NextUploadIdMarker"],
            }

    def _parts(self, upload: Answer) -> tuple[list[Answer], datetime]:
        """Return what is there of an upload, and the store's own time."""
        found: list[Answer] = []
        more: Answer = {}
        while True:
            known = {"Key": upload["Key"], "UploadId": upload["UploadId"]}
            page = self._call("list_parts", **known, **more)
            found += page.get("Parts", [])
            if not page.get("IsTruncated"):
                break
            more = {"PartNumberMarker": page["NextPartNumberMarker"]}
        told = page["ResponseMetadata"]["HTTPHeaders"].get("date")
        return found, parsedate_to_datetime(told) if told else datetime.now(UTC)

    def _is_idle(self, upload: Answer) -> bool:
        try:
            parts, now = self._parts(upload)
        except FileNotFoundError:
            # Ended meanwhile
            return False
        latest = max([upload["Initiated"], *(part["LastModified"] for part in parts)])
        return (now - latest).total_seconds() > IDLE_S

    def _end(self, upload: Answer) -> None:
        # Whoever is at work on it may have ended it
        with contextlib.suppress(FileNotFoundError):
            known = {"Key": upload["Key"], "UploadId": upload["UploadId"]}
            self._call("abort_multipart_upload", **known)

    def send(self, file: Outgoing, sending: Sending) -> None:
        """Send a file unless it is there already. Raises StoreError when other bytes are there
        after that, OSError."""
        sums = ToldSums(file)
        if self._is_there(sums):
            sending.add(file.bytes, sent=False)
            return
        if sums.is_large:
            self._send_large(sums, sending)
        else:
            self._send_whole(sums)
            sending.add(file.bytes)
        if not self._is_there(sums):
            raise StoreError(
                f"{self._setting}: s3://{self._bucket}/{self._key(file.name)} holds other bytes "
                "than were sent: the copy is torn, or somebody else writes there. Run the same "
                "command again; it sends what is missing or different"
            )

    def _is_there(self, sums: ToldSums) -> bool:
        file = sums.file
        key = self._key(file.name)
        try:
            head = self._call("head_object", Key=key, ChecksumMode="ENABLED")
        except FileNotFoundError:
            return False
        if head["ContentLength"] != file.bytes:
            return False
        told = head.get("ChecksumSHA256")
        if told and sums.is_told(told):
            return True
        if head["ETag"].strip('"') == sums.etag:
            return True
        # Sent in other parts, or an ETag of what is encrypted, which says nothing: it is read back
        return self._read_back(key) == file.sha256

    def _read_back(self, key: str) -> str:
        digest = hashlib.sha256()
        with self._fs.open(f"{self._bucket}/{key}", "rb", block_size=PART_BYTES) as file:
            while block := file.read(PART_BYTES):
                digest.update(block)
        return digest.hexdigest()

    def _send_whole(self, sums: ToldSums) -> None:
        file = sums.file
        self._call(
            "put_object",
            Key=self._key(file.name),
            Body=file.path.read_bytes(),
            # What arrives otherwise is refused by the store itself
            ChecksumAlgorithm=SHA256,
            ChecksumSHA256=sums.sha256,
            **_kind(file.name),
        )

    def _send_large(self, sums: ToldSums, sending: Sending) -> None:
        for attempt in range(ATTEMPTS):
            upload = self._going_on(sums)
            try:
                self._send_parts(sums, upload, sending)
                return
            except FileNotFoundError:
                # Another has brought the same file there whole, or thrown away what is there of it
                self._begun = [each for each in self._begun if each != upload]
                if self._is_there(sums) or attempt == ATTEMPTS - 1:
                    return

    def _going_on(self, sums: ToldSums) -> Answer:
        """Return the upload of a file that was begun, or a new one."""
        key = self._key(sums.file.name)
        for upload in self._begun:
            # One that another program began without sums ends without them
            if upload["Key"] == key:
                return upload
        kind = _kind(sums.file.name)
        made = self._call("create_multipart_upload", Key=key, ChecksumAlgorithm=SHA256, **kind)
        return made | {"Key": key}

    def _send_parts(self, sums: ToldSums, upload: Answer, sending: Sending) -> None:
        known = {"Key": upload["Key"], "UploadId": upload["UploadId"]}
        has_sums = upload.get("ChecksumAlgorithm") == SHA256
        there = {part["PartNumber"]: part for part in self._parts(upload)[0]}
        done: dict[int, Answer] = {}

        def send(number: int) -> None:
            data = sums.read(number)
            sha256, md5 = sums.part(number)
            extra = {"ChecksumSHA256": as_told(sha256)} if has_sums else {}
            part = there.get(number)
            sent = part is None or not _is_same(part, data, sha256, md5)
            if part is None or sent:
                values = {**known, "PartNumber": number, "Body": data, **extra}
                if has_sums:
                    values["ChecksumAlgorithm"] = SHA256
                part = self._call("upload_part", **values)
            done[number] = {"PartNumber": number, "ETag": part["ETag"], **extra}
            sending.add(len(data), sent)

        side_by_side(send, range(1, sums.parts + 1), THREADS, sending.tell)
        parts = [done[number] for number in sorted(done)]
        self._call("complete_multipart_upload", **known, MultipartUpload={"Parts": parts})

    def tidy(self, names: Collection[str]) -> None:
        """Throw away what was begun of files that are there whole now."""
        wanted = {self._key(name) for name in names}
        # Who may not list may have begun none before that it knew of
        with contextlib.suppress(OSError):
            for upload in self._uploads():
                if upload["Key"] in wanted:
                    self._end(upload)


def _is_same(part: Answer, data: bytes, sha256: bytes, md5: bytes) -> bool:
    """Whether a part that is there is the one that would be sent."""
    if part["Size"] != len(data):
        return False
    told = part.get("ChecksumSHA256")
    if told:
        return told == as_told(sha256)
    return part["ETag"].strip('"') == md5.hex()


def as_told(digest: bytes) -> str:
    """Return a digest as S3 writes it."""
    return b64encode(digest).decode()


def _kind(name: str) -> Answer:
    """Return what a browser is told of a file."""
    kind = mimetypes.guess_type(name)[0]
    return {"ContentType": kind} if kind else {}
