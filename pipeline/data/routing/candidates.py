"""Candidates in a table on disk: duplicates found, pictures joined into groups, every group given
one split.

Invariant: memory does not grow with the rows (a few bytes per group aside), and what is kept
depends on the rows, never on their order: rows are sorted by a number keyed with the seed.
"""

import hashlib
import json
import sqlite3
from array import array
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

from ...config.routing_set import RoutingSetConfig
from .. import union_find
from ..drop_stats import EXAMPLES, DropStats
from ..tasks.groups import normalized
from . import checks
from .prompts import keyed_number
from .rows import SPLITS, Candidate
from .split_balance import SplitBalancer

HELD = SPLITS.index("test_held")
TEST = SPLITS.index("test")
_CACHE_KIB = 65_536

# A table that is thrown away afterwards: nothing is written twice for the case of a crash.
_PRAGMAS = (
    "journal_mode=OFF",
    "synchronous=OFF",
    f"cache_size=-{_CACHE_KIB}",
    "temp_store=FILE",
)

# Texts lie apart from rows, which are sorted and joined several times and stay small by it. Hashes
# are of 16 bytes: 1 M rows collide with odds of 1 in 10^27.
_SCHEMA = """
CREATE TABLE text (
    n INTEGER PRIMARY KEY,
    id TEXT,
    group_name TEXT,
    prompt TEXT,
    images TEXT,        -- a JSON list of absolute paths
    origin TEXT         -- JSON
);
CREATE TABLE rows (
    n INTEGER PRIMARY KEY,
    source_index INT,
    expert INT,
    stated INT,         -- split that the source states, or NULL
    group_hash BLOB,
    images_hash BLOB,   -- of all pictures together; empty where there is none
    request_hash BLOB,  -- of pictures and prompt: what is asked, whoever it belongs to
    dedupe_key BLOB,    -- what rows of one expert that count as the same have in common
    prompt_hash BLOB,
    sort_key INT,
    split INT,
    decisive INT        -- whether only one expert has these pictures
);
CREATE TABLE links (group_hash BLOB, image_hash BLOB);
CREATE TABLE picked (
    n INT,
    copy INT,
    source_index INT,
    split INT,
    sort_key INT,
    neutral INT,
    prompt TEXT,
    prompt_hash BLOB,
    once_key BLOB UNIQUE  -- NULL may stand in any number of rows
);
"""


class PickedRow(NamedTuple):
    """A row of `picked`: which candidate is taken, and with which prompt."""

    n: int
    copy: int
    source_index: int
    split: int
    sort_key: int
    neutral: bool
    prompt: str
    prompt_hash: bytes
    once_key: bytes | None


class CandidateTable:
    """The rows of one generation; experts and splits are numbers, by their place in `experts` and
    SPLITS, and sources by their place in the settings."""

    def __init__(self, file: Path, settings: RoutingSetConfig):
        self.experts = settings.experts
        self.seed = settings.seed
        self.stats = DropStats()
        self.max_bad_share = settings.max_bad_share
        self._split_by_id = settings.split_by == "id"
        self._dedupe = settings.dedupe
        self._limits = settings.limits
        self._expert_index = {name: i for i, name in enumerate(self.experts)}
        # None: transactions are ours. All of it is one, as a row by itself would wait for the disk.
        self.sql = sqlite3.connect(file, isolation_level=None)
        for pragma in _PRAGMAS:
            self.sql.execute(f"PRAGMA {pragma}")
        self.sql.executescript(_SCHEMA)
        self.sql.execute("BEGIN")

    def __enter__(self) -> "CandidateTable":
        return self

    def __exit__(self, *_: object) -> None:
        self.sql.close()

    def add(self, source_index: int, candidates: Iterable[Candidate]) -> int:
        """Store candidates of one source; returns how many."""
        before = self.sql.execute("SELECT MAX(n) FROM rows").fetchone()[0] or 0
        n = before
        for row in candidates:
            if len(row.pictures) > self._limits.max_images:
                self.stats.drop(f"over {self._limits.max_images} pictures", row.id)
            elif len(row.prompt) > self._limits.max_prompt_chars:
                self.stats.drop(f"prompt over {self._limits.max_prompt_chars} characters", row.id)
            else:
                n += 1
                self._insert(n, source_index, row)
        return n - before

    def _insert(self, n: int, source_index: int, row: Candidate) -> None:
        # Split by id, every row is a group of its own, whatever its source says.
        group = f"{row.expert}/{row.id}" if self._split_by_id else row.group
        group_hash = hashed(group)
        images_hash = b""
        if row.pictures:
            # Sorted: the same pictures in another order are the same request.
            images_hash = hashed(*sorted(row.pictures))
        stated = None
        if row.split is not None:
            stated = SPLITS.index(row.split)
        self.sql.execute(
            "INSERT INTO rows VALUES (?,?,?,?,?,?,?,?,?,?,NULL,0)",
            (
                n,
                source_index,
                self._expert_index[row.expert],
                stated,
                group_hash,
                images_hash,
                self.request_hash(images_hash, row.prompt),
                self._dedupe_key(n, images_hash, row.prompt),
                hashed(normalized(row.prompt)),
                self.sort_key(row.expert, row.id),
            ),
        )
        images = json.dumps(row.images, ensure_ascii=False)
        origin = json.dumps(row.origin, ensure_ascii=False)
        self.sql.execute(
            "INSERT INTO text VALUES (?,?,?,?,?,?)",
            (n, row.id, group, row.prompt, images, origin),
        )
        if not self._split_by_id:
            links = [(group_hash, hashed(picture)) for picture in row.pictures]
            self.sql.executemany("INSERT INTO links VALUES (?,?)", links)

    def request_hash(self, images_hash: bytes, prompt: str) -> bytes:
        """Return what a request is, whoever it belongs to: its pictures and its wording."""
        if self._dedupe.prompt != "exact":
            prompt = normalized(prompt)
        return hashed(images_hash.hex(), prompt)

    def _dedupe_key(self, n: int, images_hash: bytes, prompt: str) -> bytes:
        """Return what rows of one expert that count as the same have in common; nothing compared:
        the row itself."""
        if self._is_never_compared(images_hash):
            return hashed("row", str(n))
        if self._dedupe.prompt == "off":
            return hashed("pictures", images_hash.hex())
        if self._dedupe.image == "off":
            images_hash = b""
        return self.request_hash(images_hash, prompt)

    def once_key(self, n: int, images_hash: bytes, text: str) -> bytes:
        """Return what may be taken once: a request, or the wording of a row that is never like
        another."""
        if self._is_never_compared(images_hash):
            return hashed("row", str(n), text)
        return self.request_hash(images_hash, text)

    def _is_never_compared(self, images_hash: bytes) -> bool:
        """Tell whether nothing of a row is compared."""
        if self._dedupe.prompt != "off":
            return False
        return self._dedupe.image == "off" or not images_hash

    def sort_key(self, expert: str, name: str, copy: int = 0) -> int:
        """Return a row's place among the others, the same whatever their order."""
        return keyed_number(self.seed, expert, f"{name}\0{copy}" if copy else name)

    def finalize(self, shares: Mapping[str, float], held_share: float) -> None:
        """Check ids, join groups, drop duplicates, give every group its split.

        shares are those of train, valid and test for groups whose source states none; held_share is
        test_held's part of the test groups. Raises DataError.
        """
        checks.drop_equal_ids(self)
        self._join_groups()
        checks.check_stated_splits(self)
        # Before splits are given, so that shares are of the rows that are left.
        self._drop_duplicates()
        held_shares = {"test": 1 - held_share, "test_held": held_share}
        self._give_splits(SplitBalancer(shares), SplitBalancer(held_shares))
        self._drop_elsewhere()
        self._mark_decisive()
        self.sql.execute("CREATE INDEX pool ON rows (source_index, split, sort_key)")

    def available(self) -> dict[tuple[int, int], int]:
        """Return how many rows each (source_index, split) has."""
        found = self.sql.execute(
            "SELECT source_index, split, COUNT(*) FROM rows GROUP BY source_index, split"
        )
        return {(source_index, split): count for source_index, split, count in found}

    def pick(self, row: PickedRow) -> bool:
        """Take a row; returns False when its request is taken already."""
        # The unique column decides: asking first would look everything up twice.
        found = self.sql.execute("INSERT OR IGNORE INTO picked VALUES (?,?,?,?,?,?,?,?,?)", row)
        return found.rowcount > 0

    def picked(self) -> Iterator[tuple]:
        """Yield (id, copy, images, prompt, source_index, origin, split, neutral, group) in file
        order."""
        return self.sql.execute("""
            SELECT t.id, p.copy, t.images, p.prompt, p.source_index, t.origin, p.split, p.neutral,
                   g.name
            FROM picked p JOIN rows r USING (n) JOIN text t USING (n)
                 JOIN group_splits g USING (group_hash)
            ORDER BY p.split, p.sort_key, p.source_index, t.id, p.copy
        """)

    def leaks(self) -> Iterator[tuple[str, int, str]]:
        """Yield (prompt, split, id) of rows outside test_held whose wording test_held has."""
        return self.sql.execute(
            """
            SELECT p.prompt, p.split, t.id
            FROM picked p JOIN text t USING (n)
            WHERE p.split < :held
                  AND p.prompt_hash IN (SELECT prompt_hash FROM picked WHERE split = :held)
            ORDER BY p.split, t.id
            """,
            {"held": HELD},
        )

    def groups(self) -> tuple[int, int]:
        """Return the number of groups that were taken from, and the rows taken of the largest."""
        count, largest = self.sql.execute("""
            SELECT COUNT(*), MAX(size)
            FROM (SELECT COUNT(*) AS size FROM picked JOIN rows USING (n) GROUP BY group_hash)
        """).fetchone()
        return count, largest or 0

    def drop_trained_wordings(self, experts: Iterable[int], texts: Iterable[str]) -> None:
        """Take from test_held the rows of these experts whose own prompt is seen elsewhere, or is
        one of texts."""
        self.sql.execute("CREATE TEMP TABLE trained (prompt_hash BLOB PRIMARY KEY) WITHOUT ROWID")
        self.sql.execute(
            "INSERT OR IGNORE INTO trained SELECT prompt_hash FROM rows WHERE split != ?", (HELD,)
        )
        hashes = [(hashed(normalized(text)),) for text in texts]
        self.sql.executemany("INSERT OR IGNORE INTO trained VALUES (?)", hashes)
        for expert in experts:
            self.delete(
                "wording that is trained with, so not for test_held",
                "split = ? AND expert = ? AND prompt_hash IN (SELECT prompt_hash FROM trained)",
                (HELD, expert),
            )

    def delete(self, reason: str, which: str, values: tuple = ()) -> None:
        """Delete the rows for which a condition holds; count them and remember some."""
        # The condition is ours, no part of it is from a row.
        statement = f"DELETE FROM rows WHERE {which} RETURNING n"  # noqa: S608
        found = self.sql.execute(statement, values)
        count = 0
        first = []
        for (n,) in found:
            count += 1
            if count <= EXAMPLES:
                first.append(n)
        names = []
        for n in first:
            names += self.sql.execute("SELECT id FROM text WHERE n = ?", (n,)).fetchone()
        self.stats.drop_some(reason, count, names)

    def _join_groups(self) -> None:
        """Give rows that share a picture, near or far, one group."""
        self.sql.execute("CREATE TABLE nodes (i INTEGER PRIMARY KEY, key BLOB UNIQUE)")
        # Groups get the smaller numbers, and the smallest number stands for a set: so what stands
        # for it is always a group and never a picture.
        self.sql.execute("""
            INSERT INTO nodes (key)
            SELECT DISTINCT group_hash FROM links ORDER BY group_hash
        """)
        self.sql.execute("INSERT OR IGNORE INTO nodes (key) SELECT DISTINCT image_hash FROM links")
        count = self.sql.execute("SELECT MAX(i) FROM nodes").fetchone()[0] or 0

        # Numbers in an array and not a dict of hashes: 8 bytes a node. Number 0 is nobody's.
        parents = array("l", range(1 + count))
        pairs = self.sql.execute("""
            SELECT DISTINCT a.i, b.i
            FROM links JOIN nodes a ON a.key = group_hash JOIN nodes b ON b.key = image_hash
        """)
        for group, image in pairs:
            union_find.unite(parents, group, image)

        self.sql.execute("CREATE TABLE moved (i INTEGER PRIMARY KEY, home INT)")
        self.sql.executemany("INSERT INTO moved VALUES (?,?)", _moved(parents))
        self.sql.execute("""
            UPDATE rows SET group_hash = home.key
            FROM nodes own, moved, nodes home
            WHERE own.key = rows.group_hash AND moved.i = own.i AND home.i = moved.home
        """)
        self.sql.execute("CREATE INDEX by_group ON rows (group_hash, expert)")

    def _drop_duplicates(self) -> None:
        """Drop a request that two experts have; keep one of an expert's rows that count as the
        same."""
        # Of both: it would teach the router two answers to one question.
        self.delete(
            "same request in two experts",
            """request_hash IN (
                SELECT request_hash FROM rows
                GROUP BY request_hash HAVING MIN(expert) < MAX(expert)
            )""",
        )
        # The latest split keeps its row: a test that shrinks by training rows says less.
        self.delete(
            "same request twice",
            """n IN (
                SELECT n FROM (
                    SELECT n, ROW_NUMBER() OVER (
                        PARTITION BY expert, dedupe_key ORDER BY stated DESC, sort_key
                    ) AS place
                    FROM rows
                )
                WHERE place > 1
            )""",
        )

    def _give_splits(self, free: SplitBalancer, tests: SplitBalancer) -> None:
        """Give every group the split that its source states, or else one by `free`'s shares, and
        groups of test one by those of `tests`."""

        def group_key(name: str) -> int:
            return keyed_number(self.seed, "group", name)

        self.sql.create_function("group_key", 1, group_key, deterministic=True)
        self.sql.execute("""
            CREATE TABLE groups AS
            SELECT r.group_hash, MIN(t.group_name) AS name, MAX(stated) AS stated,
                   group_key(MIN(t.group_name)) AS sort_key
            FROM rows r JOIN text t USING (n)
            GROUP BY r.group_hash
        """)
        self.sql.execute("""
            CREATE TABLE group_splits (group_hash BLOB PRIMARY KEY, name TEXT, split INT)
            WITHOUT ROWID
        """)
        counts = self.sql.execute("""
            SELECT g.group_hash, g.name, g.stated, r.expert, COUNT(*)
            FROM groups g JOIN rows r USING (group_hash)
            GROUP BY g.sort_key, g.group_hash, r.expert
        """)
        for (group_hash, name, stated), rows in groupby(counts, itemgetter(0, 1, 2)):
            sizes = {expert: size for *_, expert, size in rows}
            split = stated
            if split is None:
                split = SPLITS.index(free.next_split(sizes))
            if split == TEST:
                split = SPLITS.index(tests.next_split(sizes))
            values = (group_hash, name, split)
            self.sql.execute("INSERT INTO group_splits VALUES (?,?,?)", values)
        self.sql.execute("""
            UPDATE rows SET split =
                (SELECT split FROM group_splits g WHERE g.group_hash = rows.group_hash)
        """)

    def _drop_elsewhere(self) -> None:
        """Drop rows an expert states for one split while another expert holds the picture out for a
        later one."""
        self.delete(
            "picture that another source holds out",
            "stated != split AND NOT (stated = ? AND split = ?)",
            (TEST, HELD),
        )

    def _mark_decisive(self) -> None:
        """Mark rows whose pictures only one expert has: the picture alone can decide."""
        self.sql.execute("""
            CREATE TABLE common AS
            SELECT images_hash FROM rows GROUP BY images_hash HAVING MIN(expert) < MAX(expert)
        """)
        self.sql.execute("""
            UPDATE rows SET decisive =
                (images_hash != x'' AND images_hash NOT IN (SELECT images_hash FROM common))
        """)


def _moved(parents: "array[int]") -> Iterator[tuple[int, int]]:
    """Yield the nodes that another one stands for, and that one."""
    for i in range(1, len(parents)):
        home = union_find.root(parents, i)
        if home != i:
            yield i, home


def hashed(*texts: str) -> bytes:
    """Return 16 bytes that stand for texts."""
    return hashlib.blake2b("\0".join(texts).encode(), digest_size=16).digest()
