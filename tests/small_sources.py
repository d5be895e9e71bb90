"""Runs that read files, and what may become of a file between two looks at it."""

import os
import re
import shutil
from pathlib import Path

from conftest import tiny_config
from small_tasks import picture, write_rows
from test_plan import pictures_config

LATER_NS = 5 * 10**9


def text_run(folder: Path, **sections) -> Path:
    """Write a run of texts, one of which is several files."""
    path = tiny_config(folder, **sections)
    (folder / "sea").mkdir()
    rows = (folder / "sea.jsonl").read_text().splitlines(keepends=True)
    for i in range(3):
        (folder / f"sea/{i}.jsonl").write_text("".join(rows[i::3]))
    path.write_text(path.read_text().replace("sea.jsonl", "sea/*.jsonl"))
    return path


def picture_run(folder: Path) -> Path:
    """Write a run of a task with rows that name pictures, and one of a folder of pictures."""
    folder.mkdir()
    return pictures_config(folder, "folder")


def edited(path: Path) -> None:
    """Change one word, and neither the size nor the time of a file."""
    before = path.stat()
    data = path.read_bytes()
    # of rows the text, of pictures the pixels' last bytes
    at = data.rindex(b" ") if path.suffix == ".jsonl" else len(data) - 20
    path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def added(path: Path) -> None:
    if path.suffix == ".png":
        picture(7).save(path.with_name("new.png"))
    else:
        write_rows(path.with_name("9.jsonl"), [{"text": "quite another tide"}])


def renamed(path: Path) -> None:
    path.rename(path.with_name(f"z-{path.name}"))


def touched(path: Path) -> None:
    when = path.stat().st_mtime_ns + LATER_NS
    os.utime(path, ns=(when, when))
    copy = path.with_name(f"{path.name}.copy")
    shutil.copy(path, copy)
    copy.replace(path)


def deleted(path: Path) -> None:
    path.unlink()


def hidden(path: Path) -> None:
    """Have what lies there be no file that can be read."""
    path.unlink()
    os.mkfifo(path)


def moved(path: Path) -> None:
    """Move all of it, and have the settings say so."""
    folder = next(each for each in path.parents if (each / "run.yaml").exists())
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    name = path.relative_to(folder).parts[0]
    (folder / name).rename(elsewhere / name)
    settings = folder / "run.yaml"
    given = re.sub(rf"(path|image_root): {name}\b", rf"\1: elsewhere/{name}", settings.read_text())
    settings.write_text(given.replace(f"- {name}/*", f"- elsewhere/{name}/*"))


def beside(path: Path) -> None:
    """Lay something beside that nothing names."""
    picture(8).save(path.with_name("unnamed.png"))
    path.with_name("notes.md").write_text("nothing of the run")
