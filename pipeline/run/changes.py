"""What has changed of what a job reads, as people are told."""

from collections.abc import Iterator

from ..protocols import Looked, Seen
from ..store.looking import ODD

_SHOWN = 3  # files that are named
File = tuple[str, str]  # setting and name


def changes(was: Looked | None, now: Looked | None) -> str:
    """Return what has changed between two looks, as a clause to go on with since when."""
    if was is None or now is None or not was.seen:
        return "what it reads has changed"
    before = _by_file(was)
    after = _by_file(now)
    told = list(_told(before, after))
    if not told and list(before) != list(after):
        return f"{now.seen[0].setting}: the order in which files are read has changed"
    if not told:
        # Text is known by its documents, of which an earlier domain may have some too
        return f"{now.seen[0].setting}: which documents of the same files count has changed"
    setting, _ = next(iter(_differing(before, after)))
    more = f" and {len(told) - _SHOWN} more changes" if len(told) > _SHOWN else ""
    return f"{setting}: {', '.join(told[:_SHOWN])}{more}"


def _by_file(looked: Looked) -> dict[File, Seen]:
    return {(each.setting, each.name): each for each in looked.seen}


def _differing(before: dict[File, Seen], after: dict[File, Seen]) -> Iterator[File]:
    for file in before | after:
        was = before.get(file)
        now = after.get(file)
        if was is None or now is None or was.sum != now.sum:
            yield file


def _told(before: dict[File, Seen], after: dict[File, Seen]) -> Iterator[str]:
    moved = _moved(before, after)
    for file in _differing(before, after):
        name = file[1]
        was = before.get(file)
        now = after.get(file)
        if now is not None and now.sum in ODD:
            yield f"{name} {ODD[now.sum]}"
        elif was is not None and now is not None:
            # Of a package the sums are versions, which say more
            versions = f" from {was.sum} to {now.sum}" if not (was.bytes or now.bytes) else ""
            yield f"{name} changed{versions}"
        elif was is not None:
            yield f"{name} is now {moved[file]}" if file in moved else f"{name} is gone"
        elif file[1] not in moved.values():
            yield f"{name} was added"


def _moved(before: dict[File, Seen], after: dict[File, Seen]) -> dict[File, str]:
    """Return the new name of each file that has one: gone here, and there with the same content."""
    new = {each.sum: file[1] for file, each in after.items() if file not in before}
    found = {}
    for file, each in before.items():
        if file not in after and each.sum in new:
            found[file] = new.pop(each.sum)
    return found
