"""Every file and folder gets the mode that the umask gives, whichever library writes it: whole runs
of both families, with another umask for each job, looked at after every checkpoint."""

import io
import os
import stat
from itertools import cycle

import pytest
from conftest import tiny_config
from lora_small import config
from rich.console import Console

from pipeline.families.load import load
from pipeline.protocols import quiet
from pipeline.run import stages
from pipeline.run.job import run_job
from pipeline.store.artifacts import Store

MASKS = (0o077, 0o027, 0o002)


class Watched:
    """Looks at what is new below some folders, again and again."""

    def __init__(self, *roots):
        self.roots, self.mask, self.seen, self.looked = roots, 0, set(), 0

    def look(self):
        self.looked += 1
        for root in self.roots:
            for path in [root, *root.rglob("*")]:
                status = path.lstat()
                # a link to a file that was there before keeps its mode
                if (status.st_ino, stat.S_IFMT(status.st_mode)) in self.seen:
                    continue
                self.seen.add((status.st_ino, stat.S_IFMT(status.st_mode)))
                most = 0o777 if path.is_dir() else 0o666
                wanted = most & ~self.mask
                assert oct(stat.S_IMODE(status.st_mode)) == oct(wanted), path


def small(family, folder):
    """Return a small run of a family, with an upload to a folder."""
    if family == "ffn_moe":
        path = tiny_config(
            folder,
            trunk={"steps": 4},
            expert={"steps": 3},
            router={"steps": 2},
            dense={"baselines": []},
            dtype="bf16",
            deploy={"upload": str(folder / "upload")},
        )
        return load(path)
    return config(
        loras__defaults__steps=2,
        loras__router__steps=2,
        deploy__upload=str(folder / "upload"),
        # rows in processes of their own
        runtime__threads=2,
        runtime__save_every_s=1e-9,
    )


@pytest.mark.parametrize("family", ["ffn_moe", "lora_vlm"])
def test_every_file_of_a_run_has_the_mode_of_the_umask(family, tmp_path):
    cfg = small(family, tmp_path / "given")
    upload = tmp_path / "given" / "upload"
    watched = Watched(tmp_path / "store")
    jobs = [job for stage in (*stages.RUN, "deploy") for job in stages.jobs(cfg, stage)]
    before = os.umask(0o022)
    try:
        for mask, (stage, item, _) in zip(cycle(MASKS), jobs, strict=False):
            watched.mask = mask
            os.umask(mask)
            store = Store(tmp_path / "store", publish=watched.look).open()
            if stage == "deploy":
                watched.roots = (tmp_path / "store", upload)
                upload.mkdir(parents=True)
            nowhere = Console(file=io.StringIO())
            run_job(stage, cfg, store, item, progress=quiet, console=nowhere)
            watched.look()
    finally:
        os.umask(before)
    assert watched.looked > 2 * len(jobs), "checkpoints were looked at too"
    assert (upload / "latest.json").exists() and (tmp_path / "store" / "resume").exists()
