"""Candidates in a table on disk: duplicates found, pictures joined into groups, every group given
one split.

Invariant: memory does not grow with the rows (a few bytes per group aside), and what is kept
depends on the rows, never on their order: ties and turns go by a number keyed with the seed.
"""

import hashlib
import json
import sqlite3
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from operator import itemgetter
from pathlib import Path

from ...config.routing_set import RoutingSetConfig
from ...errors import DataError
from .. import union_find
from .prompts import keyed
from .rows import SPLITS, Candidate, normalized

HELD = SPLITS.index("test_held")
TEST = SPLITS.index("test")
_CACHE_KIB = 65_536
_SCHEMA = """
CREATE TABLE text (n INTEGER PRIMARY KEY, id TEXT, grp TEXT, prompt TEXT, images TEXT, origin TEXT);
CREATE TABLE rows (n INTEGER PRIMARY KEY, unit INT, expert INT, stated INT, grp BLOB, pics BLOB, one BLOB, same BLOB,
                   said BLOB, turn INT, split INT, alone INT);
CREATE TABLE links (grp BLOB, pic BLOB);
CREATE TABLE picked (n INT, copy INT, unit INT, split INT, turn INT, neutral INT, prompt TEXT, said BLOB,
                     one BLOB UNIQUE);
"""


class CandidateTable:
    """The rows of one generation; unit numbers are those of the feeds, expert numbers those of
    experts."""

    def __init__(self, file: Path, settings: RoutingSetConfig):
        self.experts, self.seed = settings.experts, settings.seed
        self._apart = settings.split_by == "id"
        self._compared, self._limits = settings.dedupe, settings.limits
        self.dropped: Counter = Counter()
        self._number = {name: i for i, name in enumerate(self.experts)}
        self.sql = sqlite3.connect(file, isolation_level=None)
        for pragma in (
            "journal_mode=OFF",
            "synchronous=OFF",
            f"cache_size=-{_CACHE_KIB}",
            "temp_store=FILE",
        ):
            self.sql.execute(f"PRAGMA {pragma}")
        self.sql.executescript(_SCHEMA)
        self.sql.execute("BEGIN")

    def __enter__(self) -> "CandidateTable":
        return self

    def __exit__(self, *_) -> None:
        self.sql.close()

    def add(self, unit: int, candidates: Iterable[Candidate]) -> int:
        """Store candidates of one source; returns how many."""
        before = n = self.sql.execute("SELECT MAX(n) FROM rows").fetchone()[0] or 0
        for n, row in enumerate(self._fitting(candidates), before + 1):
            group = f"{row.expert}/{row.id}" if self._apart else row.group
            grp, pics = blob(group), blob(*sorted(row.pictures)) if row.pictures else b""
            stated = None if row.split is None else SPLITS.index(row.split)
            one, same = self.request(pics, row.prompt), self._alike(n, pics, row.prompt)
            said, turn = blob(normalized(row.prompt)), self.turn(row.expert, row.id)
            values = n, unit, self._number[row.expert], stated, grp, pics, one, same, said, turn
            told = (json.dumps(each, ensure_ascii=False) for each in (row.images, row.origin))
            self.sql.execute("INSERT INTO rows VALUES (?,?,?,?,?,?,?,?,?,?,NULL,0)", values)
            self.sql.execute(
                "INSERT INTO text VALUES (?,?,?,?,?,?)", (n, row.id, group, row.prompt, *told)
            )
            if row.pictures and not self._apart:
                self.sql.executemany(
                    "INSERT INTO links VALUES (?,?)", [(grp, blob(pic)) for pic in row.pictures]
                )
        return n - before

    def _fitting(self, candidates: Iterable[Candidate]) -> Iterator[Candidate]:
        for row in candidates:
            if len(row.pictures) > self._limits.max_images:
                self._drop(f"over {self._limits.max_images} pictures", 1)
            elif len(row.prompt) > self._limits.max_prompt_chars:
                self._drop(f"prompt over {self._limits.max_prompt_chars} characters", 1)
            else:
                yield row

    def request(self, pics: bytes, prompt: str) -> bytes:
        """Return what a request is, whoever it belongs to: its pictures and its wording."""
        return blob(pics.hex(), prompt if self._compared.prompt == "exact" else normalized(prompt))

    def _alike(self, n: int, pics: bytes, prompt: str) -> bytes:
        """Return what rows of one expert that count as the same have in common; nothing compared:
        the row itself."""
        if self._alone(pics):
            return blob("row", str(n))
        if self._compared.prompt == "off":
            return blob("pictures", pics.hex())
        return self.request(b"" if self._compared.image == "off" else pics, prompt)

    def once(self, n: int, pics: bytes, text: str) -> bytes:
        """Return what may be taken once: a request, or the wording of a row that is never like
        another."""
        return blob("row", str(n), text) if self._alone(pics) else self.request(pics, text)

    def _alone(self, pics: bytes) -> bool:
        """Tell whether nothing of a row is compared."""
        return self._compared.prompt == "off" and (self._compared.image == "off" or not pics)

    def turn(self, expert: str, name: str, copy: int = 0) -> int:
        """Return a row's place among the others, the same whatever their order."""
        return keyed(self.seed, expert, f"{name}\0{copy}" if copy else name)

    def settle(self, shares: Mapping[str, float], held_share: float) -> None:
        """Check ids, join groups, drop duplicates, give every group its split.

        shares are those of train, valid and test for groups whose source states none; held_share is
        test_held's part of the test groups. Raises DataError.
        """
        self._check_ids()
        self._join()
        self._check_stated()
        self._drop_duplicates()
        self._give_splits(_Turns(shares), _Turns({"test": 1 - held_share, "test_held": held_share}))
        self._drop_elsewhere()
        self._mark_alone()
        self.sql.execute("CREATE INDEX pool ON rows (unit, split, turn)")

    def available(self) -> dict[tuple[int, int], int]:
        """Return how many rows each (unit, split) has."""
        query = "SELECT unit, split, COUNT(*) FROM rows GROUP BY unit, split"
        return {(unit, split): n for unit, split, n in self.sql.execute(query)}

    def pick(self, values: tuple) -> bool:
        """Take a row as columns of `picked`; returns False when its request is taken already."""
        return (
            self.sql.execute(
                "INSERT OR IGNORE INTO picked VALUES (?,?,?,?,?,?,?,?,?)", values
            ).rowcount
            > 0
        )

    def picked(self) -> Iterator[tuple]:
        """Yield (id, copy, images, prompt, unit, origin, split, neutral, group) in file order."""
        return self.sql.execute(
            "SELECT t.id, p.copy, t.images, p.prompt, p.unit, t.origin, p.split, p.neutral, g.name FROM picked p "
            "JOIN rows r USING (n) JOIN text t USING (n) JOIN given g USING (grp) "
            "ORDER BY p.split, p.turn, p.unit, t.id, p.copy"
        )

    def leaks(self) -> Iterator[tuple]:
        """Yield (prompt, split, id) of rows outside test_held whose wording test_held has."""
        return self.sql.execute(
            "SELECT p.prompt, p.split, t.id FROM picked p JOIN text t USING (n) "
            "WHERE p.split < :held AND p.said IN (SELECT said FROM picked WHERE split = :held) "
            "ORDER BY p.split, t.id",
            {"held": HELD},
        )

    def groups(self) -> tuple[int, int]:
        """Return the number of groups that were taken from, and the rows taken of the largest."""
        query = "SELECT COUNT(*), MAX(c) FROM (SELECT COUNT(*) AS c FROM picked JOIN rows USING (n) GROUP BY grp)"
        return self.sql.execute(query).fetchone()

    def drop_trained_wordings(self, experts: Iterable[int], texts: Iterable[str]) -> None:
        """Take from test_held the rows of these experts whose own prompt is seen elsewhere, or is
        one of texts."""
        self.sql.execute("CREATE TEMP TABLE trained (said BLOB PRIMARY KEY) WITHOUT ROWID")
        self.sql.execute(
            "INSERT OR IGNORE INTO trained SELECT said FROM rows WHERE split != ?", (HELD,)
        )
        blobs = [(blob(normalized(text)),) for text in texts]
        self.sql.executemany("INSERT OR IGNORE INTO trained VALUES (?)", blobs)
        for expert in experts:
            found = self.sql.execute(
                "DELETE FROM rows WHERE split = ? AND expert = ? AND said IN (SELECT said FROM trained)",
                (HELD, expert),
            )
            self._drop("wording that is trained with, so not for test_held", found.rowcount)

    def _drop(self, reason: str, count: int) -> None:
        if count:
            self.dropped[reason] += count

    def _check_ids(self) -> None:
        query = (
            "SELECT r.expert, t.id, COUNT(*) FROM rows r JOIN text t USING (n) GROUP BY r.expert, t.id "
            "HAVING COUNT(*) > 1 ORDER BY r.expert, t.id LIMIT 1"
        )
        for expert, name, count in self.sql.execute(query):
            raise DataError(
                f"duplicate id {name!r}: {count} rows of expert {self.experts[expert]} have it; give every row its own "
                "(or set fields.id of the source to '', and rows are called by their line)"
            )

    def _join(self) -> None:
        """Give rows that share a picture, near or far, one group."""
        self.sql.execute("CREATE TABLE nodes (i INTEGER PRIMARY KEY, key BLOB UNIQUE)")
        self.sql.execute(
            "INSERT INTO nodes (key) SELECT DISTINCT grp FROM links ORDER BY grp"
        )  # groups come first,
        self.sql.execute(
            "INSERT OR IGNORE INTO nodes (key) SELECT DISTINCT pic FROM links"
        )  # so a root is a group
        parent = array(
            "l", range(1 + (self.sql.execute("SELECT MAX(i) FROM nodes").fetchone()[0] or 0))
        )
        pairs = "SELECT DISTINCT a.i, b.i FROM links JOIN nodes a ON a.key = grp JOIN nodes b ON b.key = pic"
        for pair in self.sql.execute(pairs):
            union_find.unite(parent, *pair)
        self.sql.execute("CREATE TABLE moved (i INTEGER PRIMARY KEY, home INT)")
        homes = (
            (i, home) for i in range(1, len(parent)) if (home := union_find.root(parent, i)) != i
        )
        self.sql.executemany("INSERT INTO moved VALUES (?,?)", homes)
        self.sql.execute(
            "UPDATE rows SET grp = home.key FROM nodes own, moved, nodes home "
            "WHERE own.key = rows.grp AND moved.i = own.i AND home.i = moved.home"
        )
        self.sql.execute("CREATE INDEX by_group ON rows (grp, expert)")

    def _check_stated(self) -> None:
        """Raise DataError where one expert's rows state two splits for a group with pictures."""
        query = (
            "SELECT grp, expert, MIN(stated), MAX(stated) FROM rows WHERE pics != x'' GROUP BY grp, expert "
            "HAVING MIN(stated) < MAX(stated) LIMIT 1"
        )
        for grp, expert, *both in self.sql.execute(query):
            (one, images, group), (other, *_) = (
                self._example(grp, expert, stated) for stated in both
            )
            raise DataError(
                f"a picture in two splits: of expert {self.experts[expert]}, row {one!r} is in {SPLITS[both[0]]} and "
                f"row {other!r} in {SPLITS[both[1]]}, and both belong to group {group} ({json.loads(images)[0]}). Move "
                "all rows of a picture to one split, or set fields.split of the source to '' and the generator splits"
            )

    def _example(self, grp: bytes, expert: int, stated: int) -> tuple[str, str, str]:
        """Return id, images and group of a row with pictures."""
        query = (
            "SELECT t.id, t.images, t.grp FROM rows r JOIN text t USING (n) "
            "WHERE r.grp = ? AND expert = ? AND stated = ? AND pics != x'' ORDER BY t.id LIMIT 1"
        )
        return self.sql.execute(query, (grp, expert, stated)).fetchone()

    def _drop_duplicates(self) -> None:
        """Drop a request that two experts have; keep one of an expert's rows that count as the
        same."""
        found = self.sql.execute(
            "DELETE FROM rows WHERE one IN (SELECT one FROM rows GROUP BY one HAVING MIN(expert) < MAX(expert))"
        )
        self._drop("same request in two experts", found.rowcount)
        found = self.sql.execute(
            "DELETE FROM rows WHERE n IN (SELECT n FROM (SELECT n, "
            "ROW_NUMBER() OVER (PARTITION BY expert, same ORDER BY stated DESC, turn) AS place FROM rows) "
            "WHERE place > 1)"
        )
        self._drop("same request twice", found.rowcount)

    def _give_splits(self, drawn: "_Turns", tests: "_Turns") -> None:
        self.sql.create_function(
            "turn", 1, lambda name: keyed(self.seed, "group", name), deterministic=True
        )
        self.sql.execute(
            "CREATE TABLE groups AS SELECT r.grp, MIN(t.grp) AS name, MAX(stated) AS stated, turn(MIN(t.grp)) AS turn "
            "FROM rows r JOIN text t USING (n) GROUP BY r.grp"
        )
        self.sql.execute(
            "CREATE TABLE given (grp BLOB PRIMARY KEY, name TEXT, split INT) WITHOUT ROWID"
        )
        found = self.sql.execute(
            "SELECT g.grp, g.name, g.stated, r.expert, COUNT(*) FROM groups g JOIN rows r USING (grp) "
            "GROUP BY g.turn, g.grp, r.expert"
        )
        for (grp, name, stated), rows in groupby(found, itemgetter(0, 1, 2)):
            sizes = {row[3]: row[4] for row in rows}
            split = SPLITS.index(drawn.take(sizes)) if stated is None else stated
            split = SPLITS.index(tests.take(sizes)) if split == TEST else split
            self.sql.execute("INSERT INTO given VALUES (?,?,?)", (grp, name, split))
        self.sql.execute(
            "UPDATE rows SET split = (SELECT split FROM given WHERE given.grp = rows.grp)"
        )

    def _drop_elsewhere(self) -> None:
        """Drop rows an expert states for one split while another expert holds the picture out for a
        later one."""
        found = self.sql.execute(
            "DELETE FROM rows WHERE stated != split AND NOT (stated = ? AND split = ?)",
            (TEST, HELD),
        )
        self._drop("picture that another source holds out", found.rowcount)

    def _mark_alone(self) -> None:
        """Mark rows whose pictures only one expert has: the picture alone can decide."""
        self.sql.execute(
            "CREATE TABLE common AS SELECT pics FROM rows GROUP BY pics HAVING MIN(expert) < MAX(expert)"
        )
        self.sql.execute(
            "UPDATE rows SET alone = (pics != x'' AND pics NOT IN (SELECT pics FROM common))"
        )


class _Turns:
    """Shares of groups of rows by turns: after every group, each expert's rows are as near to the
    shares as may be."""

    def __init__(self, shares: Mapping[str, float]):
        whole = sum(shares.values())
        self.shares = {name: share / whole for name, share in shares.items()}
        self.have: defaultdict[int, Counter] = defaultdict(Counter)  # expert -> split -> rows

    def take(self, sizes: Mapping[int, int]) -> str:
        """Return the split for the next group, of sizes[expert] rows each."""
        lack: Counter = Counter()
        for expert, size in sizes.items():
            have = self.have[expert]
            total = have.total() + size
            for name, share in self.shares.items():
                lack[name] += share * total - have[name]
        chosen = max(self.shares, key=lambda name: lack[name])
        for expert, size in sizes.items():
            self.have[expert][chosen] += size
        return chosen


def blob(*texts: str) -> bytes:
    """Return 16 bytes that stand for texts."""
    return hashlib.blake2b("\0".join(texts).encode(), digest_size=16).digest()
