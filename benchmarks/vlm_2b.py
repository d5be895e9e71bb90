"""Measure the memory of one training step and of one stacked answer at the sizes of Qwen3-VL-2B,
beside the plan's.

python -m benchmarks.vlm_2b --work FOLDER

Writes a Qwen3-VL-2B of random weights (bf16, 4.3 GB) to the work folder as the Hub lays one out,
prepares one picture by the pipeline's own preprocess, and measures in fresh processes: a step of an
expert with and without checkpointing, a stacked answer (router, then the expert), and several
processes at once that hold the same base. The model is removed at the end unless --keep is given.
Nothing here says how good such a model is: its weights are noise.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.measuring import MB, ROOT, finish, hardware, progress, table, write_files
from benchmarks.watching import Pages
from pipeline.protocols import quiet
from pipeline.train.memory_meter import Peak

PACKAGES = ("torch", "transformers", "peft", "safetensors")
EXPERT, NAMES, PICTURE_PX = "read", ("read", "other"), 256
STEPS = 2  # in the first one half of an adapter has no gradient, as the other half is zero
SIZES = {  # of the published configuration, as far as it is not what the tiny one has too
    "real": {
        "text_config": {
            "vocab_size": 151_936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "initializer_range": 0.02,
        },
        "vision_config": {
            "depth": 24,
            "hidden_size": 1024,
            "num_heads": 16,
            "intermediate_size": 4096,
            "out_hidden_size": 2048,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [5, 11, 17],
            "initializer_range": 0.02,
        },
        "mrope_section": [24, 20, 20],
    },
    "toy": {
        "text_config": {"hidden_size": 64, "num_hidden_layers": 3, "head_dim": 32},
        "vision_config": {"depth": 3, "out_hidden_size": 64, "deepstack_visual_indexes": [0, 1]},
        "mrope_section": [6, 5, 5],
    },
}
TASKS = ("steps, no checkpointing", "steps, checkpointing", "stacked answer")


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark, or one of its processes; the exit status is 1 when processes do not share
    the base."""
    args = _arguments(argv)
    if args.task:
        print(json.dumps(_measured(args.task, args.work, args)))
        return 0
    with _folder(args) as work:
        made, found = _made(work, args), {}
        for task in TASKS:
            found[task] = _result(task, _started(task, work, args))
            progress(
                f"{task}: " + ", ".join(f"{key} {value:,.0f}" for key, value in found[task].items())
            )
        progress(f"{args.together} processes at once")
        held = _together(work, args)
        finish(
            args,
            "vlm_2b",
            "The sizes of Qwen3-VL-2B in memory",
            _report(found, held, made),
            "",
            _ending(args),
        )
    return int(sum(each["pss_mb"] for each in held) > sum(each["rss_mb"] for each in held) * 0.75)


def settings(work: Path, checkpointing: bool = False) -> dict:
    """Return the run that the pipeline's own stages and plan are asked about."""
    from pipeline.families.lora_vlm.config import TARGETS

    data = {"source": "jsonl", "path": str(work / "data" / "rows.jsonl")}
    fit = {
        "steps": STEPS,
        "batch_sequences": 1,
        "r": 16,
        "alpha": 32,
        "dropout": 0.0,
        "targets": TARGETS,
        "max_tokens": 512,
        "checkpointing": checkpointing,
        "eval_tokens": 1,
    }
    area = {"min_pixels": PICTURE_PX**2, "max_pixels": PICTURE_PX**2}
    return {
        "name": "vlm-2b",
        "family": "lora_vlm",
        "dtype": "bf16",
        "runtime": {"threads": 1},
        "loras": {
            "base": {"model": str(work / "model"), "dtype": "bfloat16", "image": area},
            "defaults": fit,
            "experts": [
                {"name": name, "label": name[0].upper(), "dataset": data} for name in NAMES
            ],
            "router": {"instruction": "Answer with one letter."},
        },
        "dataset": {
            "ambiguous_share": 0.0,
            "sources": [{"expert": n, "from": "loras"} for n in NAMES],
        },
    }


def write_model(folder: Path, sizes: dict, seed: int = 0) -> int:
    """Write a random Qwen3-VL of other sizes than a tiny one, with the tiny one's tokenizer; return
    its parameters."""
    import torch
    from safetensors.torch import save_file
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    from pipeline.data.sources import synthetic
    from pipeline.families.lora_vlm import base
    from pipeline.families.lora_vlm.config import VlmBaseConfig, VlmBuildConfig

    base.build(
        VlmBaseConfig(dtype="bfloat16", build=VlmBuildConfig()),
        folder,
        [*synthetic.corpus(), "A B C D"],
    )
    raw = json.loads((folder / "config.json").read_text("utf-8"))
    for part in ("text_config", "vision_config"):
        raw[part] |= sizes[part]
    raw["text_config"]["rope_parameters"]["mrope_section"] = sizes["mrope_section"]
    (folder / "config.json").write_text(json.dumps(raw, indent=1), "utf-8")
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(Qwen3VLConfig.from_pretrained(folder))
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for name, shape in ((n, p.shape) for n, p in model.named_parameters()):  # tied ones come once
        made = torch.empty(shape, dtype=torch.bfloat16)
        is_norm = float(name.endswith("weight"))  # of vectors, those that are no bias
        tensors[name] = (
            made.normal_(0.0, 0.02, generator=generator) if made.dim() > 1 else made.fill_(is_norm)
        )
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return sum(tensor.numel() for tensor in tensors.values())


def _made(work: Path, args: argparse.Namespace) -> dict:
    """Write model, picture and adapters, unless they are there; return what the tables need to know
    of them."""
    note = work / "made.json"
    if not note.exists():
        progress("writing the model")
        start = time.perf_counter()
        parameters = write_model(work / "model", SIZES[args.size])
        progress(
            f"{parameters:,} parameters in {time.perf_counter() - start:.0f} s; preparing data, "
            "base and adapters"
        )
        _write_rows(work / "data")
        _result("prepare", _started("prepare", work, args))
        file_bytes = (work / "model" / "model.safetensors").stat().st_size
        note.write_text(json.dumps({"parameters": parameters, "file_bytes": file_bytes}), "utf-8")
    return json.loads(note.read_text("utf-8"))


def _write_rows(folder: Path) -> None:
    """Write one picture per split, and rows that ask about it."""
    import random

    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "rows.jsonl", "w", encoding="utf-8") as file:
        for number, split in enumerate(("train", "valid", "test")):
            noise = random.Random(number).randbytes(3 * PICTURE_PX**2)
            Image.frombytes("RGB", (PICTURE_PX, PICTURE_PX), noise).save(folder / f"{split}.png")
            row = {
                "id": split,
                "image": f"{split}.png",
                "prompt": "Read.",
                "answer": "red",
                "split": split,
            }
            file.write(json.dumps(row) + "\n")


def _started(task: str, work: Path, args: argparse.Namespace) -> subprocess.Popen:
    """Start one of this program's own processes."""
    env = os.environ | {"OMP_NUM_THREADS": str(args.threads), "TOKENIZERS_PARALLELISM": "false"}
    command = [
        sys.executable,
        "-m",
        "benchmarks.vlm_2b",
        "--task",
        task,
        "--work",
        str(work),
        "--size",
        args.size,
    ]
    return subprocess.Popen(
        [*command, "--threads", str(args.threads), "--tokens", str(args.tokens)],
        cwd=ROOT,
        env=env,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def _together(work: Path, args: argparse.Namespace) -> list[dict]:
    """Return what each of several processes holds while all of them do. Raises SystemExit when one
    fails."""
    running, out = [_started("hold", work, args) for _ in range(args.together)], []
    ready = [
        process.stdout.readline() for process in running
    ]  # each has looked at all of its weights
    if all(ready):
        for process in running:
            process.stdin.write("now\n")
            process.stdin.flush()
        out = [json.loads(process.stdout.readline()) for process in running]
    for process in running:
        _result("hold", process)
    return out


def _result(task: str, process: subprocess.Popen) -> dict:
    """Let a process end and return what it measured; raises SystemExit when it failed."""
    out, err = process.communicate()
    if process.returncode:
        raise SystemExit(f"{task} failed (exit status {process.returncode}):\n{err[-3000:]}")
    return json.loads(out.splitlines()[-1])


def _measured(task: str, work: Path, args: argparse.Namespace) -> dict:
    """Do a task in this process and return what it took."""
    import torch

    from pipeline.families.load import parse
    from pipeline.families.lora_vlm import family  # noqa: F401 (imports are no part of what is measured)
    from pipeline.run.context import StoredParts
    from pipeline.run.job import run_job
    from pipeline.store.artifacts import Store

    torch.set_num_threads(args.threads)
    cfg, store = parse(settings(work, task == TASKS[1])), Store(work / "store").open()
    if task == "prepare":
        for stage, items in (("preprocess", cfg.tasks), ("train_shared", (None,))):
            for item in items:
                run_job(stage, cfg, store, item, progress=quiet)
        return {}
    parts, memory, start = StoredParts(cfg, store), Pages(), time.perf_counter()
    with memory.watched():
        if task in TASKS[:2]:
            out = _step(cfg, parts, work, memory.peak)
        else:
            stack = _stack(cfg, parts, args.tokens)
            out = _answer(stack, parts)
        out["seconds"] = time.perf_counter() - start
        if task == "hold":
            print("ready", flush=True)
            sys.stdin.readline()  # until the others hold it too
            print(json.dumps(out | memory.report()), flush=True)
            sys.stdin.readline()  # until the others have measured
        return out | memory.report()


def _step(cfg, parts, work: Path, peak: Peak) -> dict:
    """Train the expert as its job does, and keep its adapter for the answer; return the plan's
    peak."""
    from pipeline.families.lora_vlm import cost, family
    from pipeline.store.history import Recorder
    from pipeline.train.loop import TrainIO, fit
    from pipeline.train.memory_meter import lower_mmap_threshold

    lower_mmap_threshold()
    task = family.expert(cfg, parts, EXPERT)
    slots = Path(tempfile.mkdtemp(dir=work))
    recorder = Recorder(slots / "history", job=EXPERT, total_steps=STEPS, settings={})
    metrics = fit(
        task, TrainIO(slots, recorder, parts.store.publish, EXPERT, "loras", 1e9, 1, peak=peak)
    )
    recorder.close()
    write_files(task.export(metrics["kept_step"]), work / "adapter")
    planned = cost.cost(cfg, "train_experts", EXPERT, {}, True).peak_bytes
    exact = cost.sizes_of(cfg.loras.base).peak_bytes(
        cfg.loras.base, task.options, task.memory_plan, task.tokens_per_row
    )
    phases = {
        f"{name}_s": metrics.get(f"{name}_s") for name in ("forward", "backward", "optimizer")
    }
    return {
        "planned_mb": planned / MB,
        "predicted_mb": exact / MB,
        "tokens": task.tokens_per_row,
        **phases,
    }


def _stack(cfg, parts, tokens: int):
    """Return a stack whose experts and router are all the adapter that a step has left."""
    from pipeline.families.adapters.router import Calibration
    from pipeline.families.adapters.stack import ROUTER, ExpertInfo, Policy, build_stack, limits_of
    from pipeline.families.lora_vlm.base import open_base

    adapter = Path(parts.store.root).parent / "adapter"
    experts = [ExpertInfo(e.name, e.label, e.name, "", e.metric, tokens) for e in cfg.loras.experts]
    calibration = Calibration(1.0, cfg.loras.labels, cfg.loras.router.instruction)
    opened = open_base(parts.folder("train_shared"), cfg.loras.base)
    folders = dict.fromkeys((*cfg.experts, ROUTER), adapter)
    return build_stack(
        opened, folders, experts, calibration, Policy(0.0, 1, "base"), limits_of(cfg)
    )


def _answer(stack, parts) -> dict:
    """Let the stack answer one request about the picture: the router, then the expert."""
    from pipeline.data.tasks.prepare import TaskRows
    from pipeline.families.adapters.inference import Request

    rows = TaskRows(parts.folder("preprocess", EXPERT))
    request = Request("Read.", tuple(rows.pictures(rows.rows("test")[0])))
    said = stack.answer([request])[0]
    return {
        "tokens": said.prompt_tokens,
        "new_tokens": said.completion_tokens,
        "route_s": said.route_s,
        "generate_s": said.generate_s,
    }


def _report(found: dict[str, dict], held: list[dict], made: dict) -> str:
    head = [
        "process",
        "peak MB",
        "anonymous",
        "mapped files",
        "predicted",
        "peak over predicted",
        "planned",
        "s",
    ]
    rows = [
        [
            task,
            f"{x['peak_mb']:,.0f}",
            f"{x['anonymous_mb']:,.0f}",
            f"{x['mapped_mb']:,.0f}",
            *(
                [
                    f"{x['predicted_mb']:,.0f}",
                    f"{x['peak_mb'] / x['predicted_mb']:.2f}",
                    f"{x['planned_mb']:,.0f}",
                ]
                if "predicted_mb" in x
                else ["", "", ""]
            ),
            f"{x['seconds']:.0f}",
        ]
        for task, x in found.items()
    ]
    step, answer, kinds = found[TASKS[0]], found[TASKS[2]], ("rss_mb", "pss_mb", "private_mb")
    together = [[f"process {i}", *(f"{x[k]:,.0f}" for k in kinds)] for i, x in enumerate(held, 1)]
    together.append(["together", *(f"{sum(x[k] for x in held):,.0f}" for k in kinds)])
    return (
        f"{made['parameters']:,} random parameters, {made['file_bytes'] / 1e6:,.0f} MB of bfloat16 "
        "in one file; adapters of rank 16 on all projections of the language model; picture "
        f"{PICTURE_PX} x {PICTURE_PX} px.\n\n"
        f"{table(head, rows)}\nAll MB above the level after imports. A step has {step['tokens']} "
        f"tokens, batch 1; each of these processes does {STEPS} and validates; the answer reads "
        f"{answer['tokens']} and writes {answer['new_tokens']} (router {answer['route_s']:.0f} s, "
        f"expert {answer['generate_s']:.0f} s). Predicted: "
        "the plan's formula with the row's real length; planned: what `plan` says when no row is "
        "prepared yet.\n\n"
        f"{len(held)} processes at once, each after a forward pass through router and expert:\n\n"
        f"{table(['', 'resident MB', 'share (Pss)', 'private'], together)}"
    )


def _ending(args: argparse.Namespace) -> str:
    return (
        f"{hardware(args.threads, PACKAGES)}. Each row ran in a fresh process. Peak: VmHWM, "
        "cleared after imports; anonymous and mapped: RssAnon and RssFile, looked at every 20 ms, "
        "so that their peaks need not be at one "
        "moment. Share and private: smaps_rollup, imports included. Seconds are of a shared "
        "machine and say little."
    )


@contextmanager
def _folder(args: argparse.Namespace) -> Iterator[Path]:
    """Yield the folder to work in; what was written there goes again unless it is to be kept."""
    work = (args.work or Path(tempfile.mkdtemp())).resolve() / f"vlm_2b_{args.size}"
    work.mkdir(parents=True, exist_ok=True)
    try:
        yield work
    finally:
        if not args.keep:
            shutil.rmtree(work)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--work", type=Path, metavar="FOLDER", help="where 5 GB may be written (default: a new one)"
    )
    parser.add_argument(
        "--keep", action="store_true", help="leave the model there for the next time"
    )
    parser.add_argument("--size", choices=SIZES, default="real", help="toy: to try the program out")
    parser.add_argument(
        "--tokens", type=int, default=4, help="of the answer at most (default: %(default)s)"
    )
    parser.add_argument(
        "--together", type=int, default=3, help="processes at once (default: %(default)s)"
    )
    parser.add_argument(
        "--threads", type=int, default=1, help="of each process (default: %(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE.md", help="also write the dated result here"
    )
    parser.add_argument("--task", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
