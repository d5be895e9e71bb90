"""Rows of a routing set that contradict each other: the same id, or a picture in two splits.

A few are dropped and counted, more than max_bad_share of an expert's rows are an error.
"""

import json
import sqlite3
from typing import Protocol

from ...errors import DataError
from ..drop_stats import shortened
from .rows import SPLITS

_SHOWN = 120  # characters of an id, in a message


class RowTable(Protocol):
    """The table of candidates, as far as these checks ask it."""

    sql: sqlite3.Connection
    experts: tuple[str, ...]
    max_bad_share: float

    def delete(self, reason: str, which: str, values: tuple = ()) -> None:
        """Delete the rows for which a condition holds, and count them."""


def drop_equal_ids(table: RowTable) -> None:
    """Drop rows with the id of another one. Raises DataError where they are too many."""
    found = table.sql.execute("""
        SELECT r.expert, COUNT(*) - COUNT(DISTINCT t.id)
        FROM rows r JOIN text t USING (n)
        GROUP BY r.expert HAVING COUNT(*) > COUNT(DISTINCT t.id)
        ORDER BY r.expert
    """).fetchall()
    for expert, count in found:
        name, times = table.sql.execute(
            """
            SELECT t.id, COUNT(*) FROM rows r JOIN text t USING (n)
            WHERE r.expert = ? GROUP BY t.id HAVING COUNT(*) > 1 ORDER BY t.id LIMIT 1
            """,
            (expert,),
        ).fetchone()
        _check_share(
            table,
            expert,
            count,
            f"duplicate id {shortened(name, _SHOWN)!r}: {times} rows of expert "
            f"{table.experts[expert]} have it; give every row its own (or set fields.id of the "
            "source to '', and rows are called by their line)",
        )
    if found:
        # By what they ask and not by where they stood: the order of rows decides nothing.
        table.delete(
            "id of another row",
            """n IN (
                SELECT n FROM (
                    SELECT n, ROW_NUMBER() OVER (
                        PARTITION BY expert, id ORDER BY request_hash, stated, group_hash
                    ) AS place
                    FROM rows JOIN text USING (n)
                )
                WHERE place > 1
            )""",
        )


def _check_share(table: RowTable, expert: int, count: int, told: str) -> None:
    """Raise DataError when so many of an expert's rows are more than max_bad_share allows."""
    total = table.sql.execute("SELECT COUNT(*) FROM rows WHERE expert = ?", (expert,)).fetchone()[0]
    if count > table.max_bad_share * total:
        raise DataError(
            f"{told}. {count} of {total} such rows are more than dataset.max_bad_share "
            f"({table.max_bad_share:g}) allows"
        )


def check_stated_splits(table: RowTable) -> None:
    """Raise DataError where too many of an expert's rows state another split for a picture than
    the strictest of its rows."""
    found = table.sql.execute("""
        SELECT expert, COUNT(*), MIN(group_hash)
        FROM (
            SELECT expert, group_hash, stated,
                   MAX(stated) OVER (PARTITION BY group_hash, expert) AS latest
            FROM rows WHERE images_hash != x''
        )
        WHERE stated < latest
        GROUP BY expert ORDER BY expert
    """).fetchall()
    for expert, count, group_hash in found:
        first, last = table.sql.execute(
            """
            SELECT MIN(stated), MAX(stated) FROM rows
            WHERE group_hash = ? AND expert = ? AND images_hash != x''
            """,
            (group_hash, expert),
        ).fetchone()
        one, images, group = _example(table, group_hash, expert, first)
        other, _, _ = _example(table, group_hash, expert, last)
        _check_share(
            table,
            expert,
            count,
            f"a picture in two splits: of expert {table.experts[expert]}, row {one!r} is in "
            f"{SPLITS[first]} and row {other!r} in {SPLITS[last]}, and both belong to group "
            f"{group} ({json.loads(images)[0]}). Move all rows of a picture to one split, or "
            "set fields.split of the source to '' and the generator splits",
        )


def _example(table: RowTable, group_hash: bytes, expert: int, stated: int) -> tuple[str, str, str]:
    """Return id, images and group of a row with pictures."""
    return table.sql.execute(
        """
        SELECT t.id, t.images, t.group_name
        FROM rows r JOIN text t USING (n)
        WHERE r.group_hash = ? AND expert = ? AND stated = ? AND images_hash != x''
        ORDER BY t.id LIMIT 1
        """,
        (group_hash, expert, stated),
    ).fetchone()
