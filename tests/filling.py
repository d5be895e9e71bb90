"""Commands on a disk that fills up at one writer after another; run by test_full_disk.py in a
process that has full_disk.c under it.

Each is done once with room, which tells who writes what. Then, from where it stopped each time, the
same is tried with the disk full from the first call of each of these writers on, and at last with
room: what it leaves must be what the first time left.
"""

import ctypes
import errno
import importlib.util
import io
import itertools
import json
import re
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import lora_small
import torch
from conftest import quick_status, tiny_config
from fakes import contents
from rich.console import Console
from test_ocr_crops import page

from pipeline.errors import DiskFull, PipelineError
from pipeline.families.load import load
from pipeline.protocols import quiet
from pipeline.run import stages
from pipeline.run.advice import CommandLine, sentence
from pipeline.run.job import run_job
from pipeline.store.artifacts import Store, inventory
from pipeline.store.upload import upload
from pipeline.train import loop, memory_meter

ROOT = Path(__file__).parent.parent
REASONS = itertools.cycle((errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
QUICK = {"steps": 2, "warmup_steps": 1, "eval_every_steps": 1, "eval_tokens": 96}
ALIKE = (
    (r"\.tmp\w{6}$", ".tmp??????"),  # a part file of safetensors
    (r"\.routing-\w+", ".routing-*"),
    (r"[0-9a-f]{16,}", "*"),  # pictures
    (r"\d+-\d+\.part", "*.part"),
    (r"/(train|valid|test)/\w+\.", "/*/*."),
    (r"/adapters/[^/ ]+", "/adapters/*"),
    (r"expert-\d+-\w+", "expert-*"),
    (r"/\d{6}-\d+\.png", "/*.png"),
    (r"/[ab]/", "/?/"),
    (r"/[a-z_]+(-[a-z]+)?-[0-9a-f]{12}\b", "/*-????????????"),  # addresses
    (r"\d+", "*"),
)


class Disk:
    """The disk below one folder, as the library under this process makes it."""

    def __init__(self):
        self._call = ctypes.CDLL(None).full_disk
        self._call.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p]

    def fill(self, folder, pattern="", log=""):
        """Let the disk fill up at the first call of a pattern."""
        values = (str(folder), pattern, str(log))
        named, wanted, told = (value.encode() for value in values)
        self._call(named, wanted, next(REASONS) if pattern else 0, told)

    def empty(self):
        """Make room; return whether it had filled up."""
        return bool(self._call(b"", b"", 0, b""))


DISK = Disk()
TOLD: list[dict] = []  # what is looked at by the tests: a line for each time it filled up
SEEN: set[tuple[str, str]] = set()


def writers(log, name):
    """Return who wrote, in order, each once for a command of that name."""
    found = []
    for line in log.read_text().splitlines():
        for what, pattern in ALIKE:
            line = re.sub(what, pattern, line)
        call, _, path = line.partition(" ")
        # what comes after a file is written is the same for all files of a kind
        kind = line if call in ("open", "write") else f"{call} {Path(path).suffix}"
        if (name, kind) not in SEEN:
            SEEN.add((name, kind))
            found.append(line)
    return found


def tried(name, act, whole, here, left=contents):
    """Do `act(folder)` with room in `whole`, then with a disk that fills up in `here`."""
    log = whole.with_suffix(".log")
    DISK.fill(whole, log=log)
    act(whole)
    DISK.empty()
    before = here.with_name(f"{here.name} before")
    shutil.rmtree(before, ignore_errors=True)
    if here.exists():
        shutil.copytree(here, before)
    for pattern in writers(log, name.split(":")[0]):
        said, trace = "", ""
        DISK.fill(here, pattern)
        try:
            act(here)
        except DiskFull as full:
            said = sentence(full, CommandLine())
        except Exception as error:
            said, trace = str(error), type(error).__name__
        filled = DISK.empty()
        if not filled:
            # an earlier attempt had done that, and this one all that is left: begin again
            shutil.rmtree(here)
            if before.exists():
                shutil.copytree(before, here)
        torn = []
        store = Store(here)
        for address in store.addresses():
            folder = store.folder(address)
            if store.has(address) and inventory(folder) != store.manifest(address).files:
                torn.append(address)
        TOLD.append(
            {
                "command": name,
                "at": pattern,
                "filled": filled,
                "said": said,
                "trace": trace,
                "torn": torn,
                "kept": _kept(whole, here),
                "folder": str(here),
            }
        )
    act(here)
    same = left(here) == left(whole)
    TOLD.append({"command": name, "at": "", "same": same, "parts": _parts(here)})


def _kept(whole, here):
    """Whether every artifact that is there is the one that was made with room."""
    wanted = contents(whole)
    store = Store(here)
    for name, digest in contents(here).items():
        address = name.split("/")[0]
        if store.has(address) and wanted.get(name) != digest:
            return False
    return True


def _parts(folder):
    """Return what unfinished writing has left."""
    names = ("*.part", ".tmp*", ".routing-*")
    return [path.name for name in names for path in folder.rglob(name)]


def files(folder):
    """Return every file of a folder."""
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run(family, path, root):
    """Fill the disk in every stage of a run, and in the upload of its bundle."""
    cfg = load(path)
    nowhere = Console(file=io.StringIO())
    for stage in [*stages.RUN, "deploy"]:
        for _, item, _ in stages.jobs(cfg, stage):

            def act(folder, stage=stage, item=item):
                store = Store(folder).open()
                run_job(stage, cfg, store, item, progress=quiet, console=nowhere)

            name = f"{family}:{stage} {item or ''}".strip()
            tried(name, act, root / "whole", root / "here")
    made = Store(root / "whole").folder(stages.address(cfg, "deploy"))

    def send(folder):
        upload(made, str(folder), quiet)

    tried(f"{family} upload", send, root / "sent", root / "here sent", files)


def text(root):
    """Do what can be done to text."""
    fits = {"trunk": QUICK, "expert": QUICK | {"statistics_tokens": 64}, "router": QUICK}
    each_step = {"save_every_s": 1e-9, "log_every_steps": 1}
    path = tiny_config(root / "text", **fits, dense={"baselines": ["total"]}, runtime=each_step)
    run("ffn_moe", path, root)


def pictures(root):
    """Do what can be done to rows with pictures."""
    each_step = {"threads": 1, "save_every_s": 1e-9, "log_every_steps": 1}
    defaults = lora_small.SETTINGS["loras"]["defaults"]
    loras = lora_small.SETTINGS["loras"] | {"defaults": defaults | QUICK}
    path = root / "vlm.yaml"
    path.write_text(json.dumps(lora_small.SETTINGS | {"loras": loras, "runtime": each_step}))
    run("lora_vlm", path, root)
    generator = program("routing-generator/generate.py")

    def routing(folder):
        command(
            generator,
            *("--config", path, "--output", folder / "routing.jsonl"),
            *("--contact-sheet", folder / "sheet.jpg", "--store", root / "nothing"),
        )

    tried("routing generator", routing, root / "routed", root / "here routed", files)
    crops = program("scripts/generate_ocr_crops.py")
    (root / "pages").mkdir()
    lines = []
    for number in range(2):
        image, boxes = page(number)
        image.save(root / "pages" / f"{number}.png")
        lines.append(json.dumps({"image": f"{number}.png", "boxes": boxes}) + "\n")
    (root / "pages" / "rows.jsonl").write_text("".join(lines))

    def cut(folder):
        if not (folder / "crops").exists():
            command(crops, root / "pages" / "rows.jsonl", folder / "crops")

    for name in ("cut", "here cut"):
        (root / name).mkdir()
    tried("crops", cut, root / "cut", root / "here cut", files)


def program(name):
    """Return a program of the project as a module."""
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / name)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def command(module, *arguments):
    """Run a program; raises DiskFull with what it said, as a person would take it."""
    said = io.StringIO()
    with redirect_stderr(said), redirect_stdout(io.StringIO()):
        status = module.main([str(each) for each in arguments])
    if status:
        raise (DiskFull if "no room" in said.getvalue() else PipelineError)(said.getvalue())


if __name__ == "__main__":
    torch.set_num_threads(1)
    loop.product_flops_per_s = lambda _bf16: 1e9
    memory_meter._status = quick_status
    for kind in (text, pictures):
        folder = Path(sys.argv[1]) / kind.__name__
        folder.mkdir()
        kind(folder)
        (folder / "told.json").write_text(json.dumps(TOLD))
        TOLD.clear()
