"""Small sources of task rows for the tests of preprocess: pictures like no other, rows about them,
what came out."""

import json
from zlib import crc32

import numpy as np
from PIL import Image

from pipeline.config.task_data import ImageLimitsConfig
from pipeline.data.tasks import prepare
from pipeline.data.tasks.rows import read_rows
from pipeline.families.adapters.sections import AdapterExpertConfig

LIMITS = ImageLimitsConfig(min_pixels=1024, max_pixels=4096)
SPLITS = ("train", "valid", "test")


def picture(seed, size=(40, 40)):
    """Return a picture like no other."""
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    )


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Source:
    """A folder of images, and rows about them."""

    def __init__(self, folder):
        (folder / "images").mkdir(parents=True)
        self.folder = folder

    def __call__(self, rows, name="rows.jsonl"):
        """Write rows and the pictures below images/ that they name; return the path."""
        for row in rows:
            image = row.get("image")
            path = self.folder / image if isinstance(image, str) else None
            if path and image.startswith("images/") and not path.exists():
                picture(crc32(image.encode())).save(path)
        return write_rows(self.folder / name, rows)


def simple(count=12, **more):
    """Return rows with a picture each, all splits among them."""
    return [
        {
            "id": f"r{i}",
            "image": f"images/{i}.png",
            "prompt": f"what is {i}?",
            "answer": f"it is {i}",
            "split": SPLITS[min(2, i * 3 // count)],
        }
        | more
        for i in range(count)
    ]


def entry(data=None, prompt="{prompt}", answer="{answer}", **given):
    return AdapterExpertConfig(
        name="look", label="A", dataset=data or given, prompt=prompt, answer=answer
    )


def prepared(tmp_path, task, out="out", **options):
    """Return (metrics, every row by its id, the report of what was dropped)."""
    folder = tmp_path / out
    metrics = prepare.prepare(
        task, options.pop("image", LIMITS), options.pop("seed", 0), folder, **options
    )
    rows = {row.id: row for row in read_rows(folder)}
    return metrics, rows, json.loads((folder / "dropped.json").read_text())


def jsonl(path, **more):
    return {"source": "jsonl", "path": str(path)} | more
