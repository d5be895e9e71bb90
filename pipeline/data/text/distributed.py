"""Preprocess in parts that different machines make: a survey, the parts side by side, a merge to
the bytes of one run.

Invariant: a part is a run of whole batches, so every document meets the same numbers as in one run;
a folder counts only with its manifest, written last, and files that still are what it says;
anything else is made again.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice, pairwise
from pathlib import Path

from ...config.text_data import TextRunConfig
from ...errors import DataError, MissingArtifact
from ...protocols import Progress
from ...store.artifacts import flush, inventory, write_text
from ..drop_stats import DropStats
from . import partition, tokenizer
from .documents import HARMLESS, Cursor, Document, Stream, drop_stats
from .encode import DocRange, Encoder, finalize
from .scan import first_pass
from .shards import Shards
from .splits import Splits

_SURVEY = "scan"
_SPLITS = "splits.safetensors"  # of the survey; all its other files belong to the artifact too
_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Plan:
    """What a survey leaves for the parts."""

    jobs: int  # asked for; there are fewer parts when there are fewer batches
    pieces: list[DocRange]
    stats: DropStats
    seconds: dict[str, float]
    digest: str  # of the manifest; a part of another survey does not count

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of all documents."""
        return sum(piece.bytes for piece in self.pieces)


def scan(cfg: TextRunConfig, parts: Path, jobs: int, progress: Progress) -> int:
    """Do the first pass, unless it is done, and divide the second among jobs; return how many it
    takes.

    Parts of an earlier survey are removed. Raises DataError.
    """
    plan = planned(parts)
    if plan is None or plan.jobs != jobs:
        shutil.rmtree(parts, ignore_errors=True)
        folder = parts / _SURVEY
        folder.mkdir(parents=True)
        found = first_pass(cfg, folder, progress)
        found.splits.save(folder / _SPLITS)
        pieces = [asdict(piece) for piece in _divided(found.batches, jobs)]
        _seal(
            folder,
            {
                "jobs": jobs,
                "pieces": pieces,
                "seconds": found.seconds,
                "drop_stats": found.stats.as_json(),
            },
        )
        plan = _plan(folder)
    return len(plan.pieces)


def encode(cfg: TextRunConfig, parts: Path, number: int, progress: Progress) -> None:
    """Make one part, unless it is there. Raises MissingArtifact without a survey, DataError for a
    changed source."""
    plan = planned(parts)
    if plan is None:
        raise MissingArtifact(
            f"{parts} has no survey to make part {number} of; run preprocess again"
        )
    if _part(parts, number, plan) is None:
        _make(cfg, parts, number, plan, progress)


def merge(cfg: TextRunConfig, parts: Path, plan: Plan, folder: Path, progress: Progress) -> dict:
    """Put the parts together in folder, which is empty; make what is missing or torn. Returns
    metrics."""
    total, slowest_s = len(plan.pieces), 0.0
    for path in (parts / _SURVEY).iterdir():
        if path.name not in (_SPLITS, _MANIFEST):
            shutil.copyfile(path, folder / path.name)
    writer, start = _encoder(cfg, parts).writer(folder), time.perf_counter()
    for number in range(total):
        progress(f"merging: part {number + 1} of {total}", number / total)
        part = _part(parts, number, plan)
        if part is None:
            progress(f"part {number + 1} of {total} is missing or torn: making it", None)
            part = _make(cfg, parts, number, plan, progress)
        with Shards(parts / str(number)) as shards:
            writer.append(shards)
        plan.stats.merge(DropStats.from_json(part["drop_stats"], HARMLESS))
        slowest_s = max(slowest_s, part["seconds"])
    seconds = plan.seconds | {"write": slowest_s, "merge": time.perf_counter() - start}
    return finalize(cfg, folder, writer, plan.stats, plan.bytes, seconds)


def planned(parts: Path) -> Plan | None:
    """Return what a survey has left in parts; None where there is none, or a torn one."""
    return _plan(parts / _SURVEY)


def _plan(folder: Path) -> Plan | None:
    about = _sealed(folder)
    if about is None:
        return None
    pieces = [DocRange(**raw | {"start": _mark(raw["start"])}) for raw in about["pieces"]]
    return Plan(
        about["jobs"],
        pieces,
        DropStats.from_json(about["drop_stats"], HARMLESS),
        about["seconds"],
        about["digest"],
    )


def _mark(raw: dict) -> Cursor:
    return Cursor(**raw | {"read": tuple(tuple(entry) for entry in raw["read"])})


def _divided(batches: list[DocRange], jobs: int) -> list[DocRange]:
    """Return runs of batches, nearly equal in number, as pieces."""
    count = min(jobs, len(batches))
    cuts = [number * len(batches) // count for number in range(count + 1)]
    return [_joined(batches[first:end]) for first, end in pairwise(cuts)]


def _joined(batches: list[DocRange]) -> DocRange:
    documents, size = (
        sum(batch.documents for batch in batches),
        sum(batch.bytes for batch in batches),
    )
    return DocRange(batches[0].start, documents, size, sum(batch.keys for batch in batches) % 2**64)


def _encoder(cfg: TextRunConfig, parts: Path) -> Encoder:
    folder = parts / _SURVEY
    splits = Splits(cfg.data).load(folder / _SPLITS)
    return Encoder(cfg, partition.load(folder), splits, tokenizer.load(folder))


def _part(parts: Path, number: int, plan: Plan) -> dict | None:
    """Return the manifest of a whole part of this survey, None where there is no such part."""
    about = _sealed(parts / str(number))
    return about if about and about["scan"] == plan.digest else None


def _make(cfg: TextRunConfig, parts: Path, number: int, plan: Plan, progress: Progress) -> dict:
    folder, piece, start = parts / str(number), plan.pieces[number], time.perf_counter()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    encoder, seen = _encoder(cfg, parts), DocRange(piece.start)
    writer = encoder.writer(folder)
    leaks = encoder.write(_read(cfg, piece, seen), writer, piece.bytes, progress)
    if seen != piece:
        raise DataError(
            f"data.{cfg.data.source} has changed since it was surveyed: part {number + 1} of {len(plan.pieces)} had "
            f"{piece.documents} documents of {piece.bytes} bytes, and now {seen.documents} of {seen.bytes} were read "
            f"in their place. Remove {parts} and run preprocess again, with nothing writing to the source"
        )
    writer.finish()
    spent_s = time.perf_counter() - start
    return _seal(folder, {"scan": plan.digest, "seconds": spent_s, "drop_stats": leaks.as_json()})


def _read(cfg: TextRunConfig, piece: DocRange, seen: DocRange) -> Iterator[Document]:
    for document in islice(Stream(cfg, drop_stats(), piece.start), piece.documents):
        seen.see(document)
        yield document


def _seal(folder: Path, about: dict) -> dict:
    """Flush every file of a folder, then write its manifest; return that."""
    files = inventory(folder)
    for name in files:
        flush(folder / name)
    write_text(folder / _MANIFEST, json.dumps(about | {"files": files}))
    return about


def _sealed(folder: Path) -> dict | None:
    """Return a folder's manifest with its digest, None unless every file is there as it says and no
    other."""
    try:
        text = (folder / _MANIFEST).read_text("utf-8")
        about = json.loads(text)
        whole = about["files"] == inventory(folder)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return about | {"digest": hashlib.sha256(text.encode()).hexdigest()} if whole else None
