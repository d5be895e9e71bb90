"""Experts that were trained elsewhere, as a look finds them where the settings say."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from ...protocols import Eye, Seen
from ...store.expert_package import ABOUT, package_print
from ...store.looking import GONE, UNREACHABLE
from ...store.saved_adapter import SETTINGS, TENSORS
from .file_kinds import seen_at


def seen(setting: str, source: str, eye: Eye) -> Iterator[Seen]:
    """Yield what tells that an expert is the same as before: the description of a package, which
    has the sums of all its files; of an adapter as PEFT saves it both of its files."""
    print_ = package_print(source)
    if print_:
        yield Seen(setting, ABOUT, print_)
        return
    found = list(_saved(setting, source, eye))
    there = [each for each in found if each.sum not in (GONE, UNREACHABLE)]
    if there:
        yield from found
    else:
        yield Seen(setting, ABOUT, UNREACHABLE if "://" in source else GONE)


def _saved(setting: str, source: str, eye: Eye) -> Iterator[Seen]:
    for name in (SETTINGS, TENSORS):
        if "://" not in source:
            yield eye.file(setting, Path(source) / name, name)
        else:
            # A server is asked once in a look
            yield eye.once(f"{source}/{name}", partial(_remote, setting, source, name))


def _remote(setting: str, source: str, name: str) -> Seen:
    # Imported where a URL is, as it takes a while
    from fsspec.core import url_to_fs

    try:
        fs, root = url_to_fs(source, skip_instance_cache=True, use_listings_cache=False)
    except Exception:  # a look raises nothing: whoever opens it is told
        return Seen(setting, name, UNREACHABLE)
    return seen_at(setting, fs, f"{root.rstrip('/')}/{name}", name)
