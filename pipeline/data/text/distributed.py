"""Preprocess on several machines: a scan, jobs that encode ranges of documents side by side, and a
merge to the bytes of one run.

Invariant: a job's range is a run of whole batches, so every document meets the same numbers as in
one run; a folder counts only with its manifest, written last, where that was written, and with
files that still are what it says; anything else is made again.
"""

import hashlib
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice, pairwise
from pathlib import Path

from ...config.text_data import TextRunConfig
from ...errors import DataError, MissingArtifact
from ...protocols import Progress
from ...store.artifacts import flush, inventory, sha256, write_text
from ...store.reading import check_folder, reading, sealed, unsealed
from ...store.room import writing
from ..drop_stats import DropStats
from . import partition, tokenizer
from .documents import HARMLESS, Cursor, Document, Stream, drop_stats
from .encode import DocRange, Encoder, finalize
from .scan import first_pass
from .shards import Shards
from .splits import Splits

_SCAN = "scan"  # folder of what every job reads; job n has the folder n beside it
_SPLITS = "splits.safetensors"  # of the scan; all its other files belong to the artifact too
_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Plan:
    """What a scan leaves for the jobs."""

    jobs: int  # asked for; there are fewer ranges when there are fewer batches
    ranges: list[DocRange]  # one a job
    stats: DropStats
    seconds: dict[str, float]  # by phase
    digest: str  # of the manifest; what was made after another scan does not count

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of all documents."""
        return sum(each.bytes for each in self.ranges)


def scan(cfg: TextRunConfig, jobs_folder: Path, jobs: int, progress: Progress) -> int:
    """Do the first pass, unless it is done, and divide the second among at most `jobs`; return how
    many it takes.

    What jobs made after an earlier scan is removed. Raises DataError.
    """
    check_folder(jobs_folder)
    plan = planned(jobs_folder)
    if plan is not None and plan.jobs == jobs:
        return len(plan.ranges)
    shutil.rmtree(jobs_folder, ignore_errors=True)
    folder = jobs_folder / _SCAN
    folder.mkdir(parents=True)
    found = first_pass(cfg, folder, progress)
    found.splits.save(folder / _SPLITS)
    ranges = _divided(found.batches, jobs)
    about = {
        "jobs": jobs,
        "ranges": [asdict(each) for each in ranges],
        "seconds": found.seconds,
        "drop_stats": found.stats.as_json(),
    }
    _write_manifest(folder, about)
    return len(ranges)


def encode(cfg: TextRunConfig, jobs_folder: Path, number: int, progress: Progress) -> None:
    """Do one job, unless it is done.

    Raises MissingArtifact without a scan, DataError for a source that has changed since.
    """
    plan = planned(jobs_folder)
    if plan is None:
        raise MissingArtifact(
            f"{jobs_folder} has no scan that job {number} could go by", stages=("preprocess",)
        )
    if _finished(jobs_folder, number, plan) is None:
        _encode_range(cfg, jobs_folder, number, plan, progress)


def merge(
    cfg: TextRunConfig, jobs_folder: Path, plan: Plan, folder: Path, progress: Progress
) -> dict:
    """Put what the jobs made together in folder, which is empty; make what is missing or torn.
    Returns metrics."""
    total = len(plan.ranges)
    for path in (jobs_folder / _SCAN).iterdir():
        if path.name not in (_SPLITS, _MANIFEST):
            with writing(folder / path.name):
                shutil.copyfile(path, folder / path.name)
    writer = _encoder(cfg, jobs_folder).writer(folder)
    start = time.perf_counter()
    slowest_s = 0.0
    # In the order of the ranges: shards and dropped.json then are those of one run
    for number in range(total):
        progress(f"merging: job {number + 1} of {total}", number / total)
        about = _finished(jobs_folder, number, plan)
        if about is None:
            progress(f"job {number + 1} of {total} is missing or torn: doing it", None)
            about = _encode_range(cfg, jobs_folder, number, plan, progress)
        with Shards(jobs_folder / str(number)) as shards:
            writer.append(shards)
        plan.stats.merge(DropStats.from_json(about["drop_stats"], HARMLESS))
        slowest_s = max(slowest_s, about["seconds"])
    # Jobs ran side by side: the slowest is the time that was waited
    seconds = plan.seconds | {"write": slowest_s, "merge": time.perf_counter() - start}
    return finalize(cfg, folder, writer, plan.stats, plan.bytes, seconds)


def planned(jobs_folder: Path) -> Plan | None:
    """Return what a scan has left in jobs_folder; None where there is none, or a torn one."""
    about = _read_manifest(jobs_folder / _SCAN)
    if about is None:
        return None
    return Plan(
        jobs=about["jobs"],
        ranges=[_doc_range(raw) for raw in about["ranges"]],
        stats=DropStats.from_json(about["drop_stats"], HARMLESS),
        seconds=about["seconds"],
        digest=about["digest"],
    )


def _doc_range(raw: dict) -> DocRange:
    # JSON has no tuples, and ranges are compared: a list in one's place would never be equal
    read_before = tuple(tuple(entry) for entry in raw["start"]["read_before"])
    start = Cursor(**raw["start"] | {"read_before": read_before})
    return DocRange(**raw | {"start": start})


def _divided(batches: list[DocRange], jobs: int) -> list[DocRange]:
    """Return ranges of batches, nearly equal in number."""
    count = min(jobs, len(batches))
    cuts = [number * len(batches) // count for number in range(count + 1)]
    return [DocRange.joined(batches[first:end]) for first, end in pairwise(cuts)]


def _encoder(cfg: TextRunConfig, jobs_folder: Path) -> Encoder:
    folder = jobs_folder / _SCAN
    splits = Splits(cfg.data).load(folder / _SPLITS)
    return Encoder(cfg, partition.load(folder), splits, tokenizer.load(folder))


def _finished(jobs_folder: Path, number: int, plan: Plan) -> dict | None:
    """Return the manifest of a job that was done after this scan and is whole, None without one."""
    about = _read_manifest(jobs_folder / str(number))
    if about is None or about["scan"] != plan.digest:
        return None
    return about


def _encode_range(
    cfg: TextRunConfig, jobs_folder: Path, number: int, plan: Plan, progress: Progress
) -> dict:
    """Encode the documents of one job into its folder; return its manifest."""
    start = time.perf_counter()
    folder = jobs_folder / str(number)
    check_folder(folder)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    wanted = plan.ranges[number]
    found = DocRange(wanted.start)
    encoder = _encoder(cfg, jobs_folder)
    writer = encoder.writer(folder)
    leaks = encoder.write(_read(cfg, wanted, found), writer, wanted.bytes, progress)
    if found != wanted:
        raise DataError(
            f"data.{cfg.data.source} has changed since it was scanned: job {number + 1} of "
            f"{len(plan.ranges)} had {wanted.documents} documents of {wanted.bytes} bytes, and now "
            f"{found.documents} of {found.bytes} were read in their place. Remove {jobs_folder} "
            "and run preprocess again, with nothing writing to the source"
        )
    writer.finish()
    spent_s = time.perf_counter() - start
    about = {"scan": plan.digest, "seconds": spent_s, "drop_stats": leaks.as_json()}
    _write_manifest(folder, about)
    return about


def _read(cfg: TextRunConfig, wanted: DocRange, found: DocRange) -> Iterator[Document]:
    """Return the documents of a range, counted in `found`."""
    # What the rows drop on the way was counted by the scan, so these counts are thrown away
    stream = Stream(cfg, drop_stats(), wanted.start)
    return found.counting(islice(stream, wanted.documents))


def _write_manifest(folder: Path, about: dict) -> None:
    """Flush every file of a folder, then write the manifest that makes it count."""
    files = inventory(folder)
    for name in files:
        flush(folder / name)
    write_text(folder / _MANIFEST, sealed(about | {"files": files, "place": _place(folder)}))


def _place(folder: Path) -> str:
    """Return which folder of which artifact this is: whole as it may be, what another job made is
    of other documents, and what was made for another address is of other settings."""
    return f"{folder.parent.name}/{folder.name}"


def _holds(folder: Path, files: dict[str, dict]) -> bool:
    """Whether a folder has these files, as an inventory describes them, and no other."""
    # By opening each: listing a folder leaves out silently what may not be seen
    for name, entry in files.items():
        if sha256(folder / name) != entry["sha256"]:
            return False
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in files and name != _MANIFEST:
            return False
    return True


def _read_manifest(folder: Path) -> dict | None:
    """Return a folder's manifest with its digest, None unless every file is there as it says and no
    other. Raises UnreadableFile."""
    try:
        # What cannot be read may be whole, and must not be done again for that
        with reading(folder):
            text = (folder / _MANIFEST).read_bytes()
            about = unsealed(text)
            whole = about["place"] == _place(folder) and _holds(folder, about["files"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        # Absent, torn, or JSON of something else: all the same to who asks
        return None
    if not whole:
        return None
    return about | {"digest": hashlib.sha256(text).hexdigest()}
