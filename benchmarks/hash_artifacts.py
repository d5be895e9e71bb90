"""Measures what it costs to find a flipped bit in large shards: opening an artifact for the first
and for the second time on a machine, beside sha256sum and cp of the same files.

python -m benchmarks.hash_artifacts --out benchmarks/hash_artifacts_epyc_2026-11-26.md

Contenders take turns, each in a fresh process. Cold: the files' pages are dropped before each
(posix_fadvise), warm: they were read just before. Needs twice the gigabytes on disk, and for warm
numbers as much free memory.
"""

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from benchmarks.measuring import ROOT, finish, hardware, progress, ratios, spread, table
from pipeline.store import hashed
from pipeline.store.artifacts import SMALL_BYTES, Manifest, Store, inventory

ADDRESS = "preprocess-0123456789ab"
BLOCK_BYTES = 1 << 24
# In a process of its own, so that nothing is remembered but what is in the store
OPEN = """
import sys, time
from pathlib import Path
from pipeline.store.artifacts import Reader, Store
store = Store(Path(sys.argv[1]))
store.require(sys.argv[2])
with store.lock("store"):
    pass
start = time.perf_counter()
Reader(store).folder(sys.argv[2])
print(time.perf_counter() - start)
"""
WORDS = {
    "ours, first": "ours, first opening: every file hashed, and noted",
    "ours, second": "ours, second opening: what was noted is compared",
    "sha256sum": "sha256sum (coreutils)",
    "cp": "cp to the same disk, not flushed",
}
NOTES = """Ours is timed inside its process, after imports and a look at sizes; the others from
start to end of theirs. The second opening reads none of the files. Ratios are those of each round,
so that a slow minute of the machine counts for both.
"""


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark and return the exit status."""
    args = _arguments(argv)
    folder = nullcontext(str(args.work)) if args.work else tempfile.TemporaryDirectory()
    with folder as work:
        store = made(Path(work) / "store", int(args.gigabytes * 1e9), args.files)
        try:
            rounds = [measure(store, number) for number in range(1, args.rounds + 1)]
        finally:
            shutil.rmtree(store.root)
    size = f"{args.gigabytes:g} GB in {args.files} files, {args.rounds} rounds."
    text = f"{size}\n\n{_table(rounds, args.gigabytes)}"
    finish(args, "hash_artifacts", "Hashing large artifacts", text, NOTES, _conditions())
    return 0


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--gigabytes", type=float, default=4.0, help="of all files (default: 4)")
    made.add_argument("--files", type=int, default=4, help="shards (default: 4)")
    made.add_argument("--rounds", type=int, default=5, help="turns of each (default: 5)")
    made.add_argument("--work", type=Path, metavar="FOLDER", help="disk to measure on")
    made.add_argument("--out", type=Path, metavar="FILE.md", help="also write the result here")
    args = made.parse_args(argv)
    if args.gigabytes * 1e9 / args.files <= SMALL_BYTES:
        made.error(f"each file must have more than {SMALL_BYTES} bytes, or none is remembered")
    return args


def made(root: Path, size: int, files: int) -> Store:
    """Return a store with an artifact of random shards, old enough to be remembered."""
    store = Store(root).open()
    folder = store.begin(ADDRESS)
    draw = random.Random(0)
    for number in range(files):
        progress(f"writing shard {number + 1} of {files}")
        left = size // files
        with (folder / f"{number}.bin").open("wb") as file:
            while left:
                block = draw.randbytes(min(left, BLOCK_BYTES))
                file.write(block)
                left -= len(block)
    store.finish(Manifest(ADDRESS, "preprocess", None, {}, inventory(folder)))
    time.sleep(hashed.SETTLED_NS / 1e9)
    return store


def measure(store: Store, number: int) -> dict[tuple[str, str], float]:
    """Return the seconds of each contender, cold and warm, in one round."""
    paths = sorted(store.folder(ADDRESS).glob("*.bin"))
    contenders: dict[str, Callable[[], float]] = {
        "ours, first": lambda: _first(store),
        "ours, second": lambda: _opened(store),
        "sha256sum": lambda: _run(["sha256sum", *map(str, paths)]),
        "cp": lambda: _copied(paths, store.root / "copy"),
    }
    found = {}
    for pages, prepare in (("cold", _drop), ("warm", _read)):
        for name, contender in contenders.items():
            prepare(paths)
            found[name, pages] = contender()
            progress(f"round {number}: {name}, {pages}: {found[name, pages]:.3f} s")
    return found


def _first(store: Store) -> float:
    shutil.rmtree(store.root / hashed.FOLDER, ignore_errors=True)
    seconds = _opened(store)
    lists = list((store.root / hashed.FOLDER).glob("*.txt"))
    assert lists, "nothing was noted, so the second opening would be another first one"
    return seconds


def _opened(store: Store) -> float:
    command = [sys.executable, "-c", OPEN, str(store.root), ADDRESS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True)
    return float(done.stdout)


def _run(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def _copied(paths: list[Path], target: Path) -> float:
    target.mkdir()
    seconds = _run(["cp", *map(str, paths), str(target)])
    shutil.rmtree(target)
    return seconds


def _drop(paths: list[Path]) -> None:
    """Have the system forget the files' pages, which are on the disk already."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def _read(paths: list[Path]) -> None:
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.read(BLOCK_BYTES):
                pass


def _table(rounds: list[dict], gigabytes: float) -> str:
    rows = []
    for name, words in WORDS.items():
        for pages in ("cold", "warm"):
            seconds = [one[name, pages] for one in rounds]
            rates = [gigabytes / value for value in seconds]
            times = ratios(
                rounds,
                lambda one, key=(name, pages): one[key],
                lambda one, key=("sha256sum", pages): one[key],
            )
            # Nothing is read in the second opening, so a rate would mean nothing
            rate = "" if name == "ours, second" else spread(rates, 2)
            rows.append([words, pages, spread(seconds, 3), rate, spread(times, 3)])
    return table(["contender", "pages", "seconds", "GB/s", "times sha256sum"], rows)


def _conditions() -> str:
    done = subprocess.run(["sha256sum", "--version"], capture_output=True, check=True, text=True)
    coreutils = done.stdout.splitlines()[0]
    import ssl

    found = hardware(1, ("numpy",))
    return f"{found}, {ssl.OPENSSL_VERSION}, {coreutils}. GB are 10^9 bytes."


if __name__ == "__main__":
    sys.exit(main())
