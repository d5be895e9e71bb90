"""Serves the loopback control plane, or runs one command against it.

`python -m tests.loopback_modal [options]` serves until it is stopped; with `-- COMMAND` it runs the
command with the variables set that lead the client here, and exits with its status. A directory
given with --state keeps volumes, secrets and logs from one time to the next; after a deployment it
goes on serving until Ctrl-C.
"""

import argparse
import asyncio
import json
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from grpclib.server import Server

from tests.loopback_modal.containers import Containers
from tests.loopback_modal.namespace import MODES, usable
from tests.loopback_modal.plane import Plane
from tests.loopback_modal.records import Task
from tests.loopback_modal.service import Service
from tests.loopback_modal.web import gateway, listen, storage


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    top = argparse.ArgumentParser(prog="python -m tests.loopback_modal", description=__doc__)
    top.add_argument(
        "--state", type=Path, metavar="DIR", help="keep volumes, secrets and logs here"
    )
    top.add_argument(
        "--isolation", choices=["auto", *MODES], default="auto", help="view of the file system"
    )
    top.add_argument(
        "--max-tasks",
        type=int,
        default=4,
        metavar="N",
        help="most containers of one function at once",
    )
    top.add_argument(
        "--idle", type=float, default=3.0, metavar="S", help="seconds an idle container is kept"
    )
    top.add_argument(
        "--commits", type=float, default=5.0, metavar="S", help="seconds between background commits"
    )
    top.add_argument("--secrets", type=Path, metavar="FILE", help="JSON file: {name: {KEY: value}}")
    top.add_argument(
        "--env-file", type=Path, metavar="FILE", help="write the variables here once serving"
    )
    top.add_argument("command", nargs="*", metavar="-- COMMAND", help="what to run")
    return top


async def start(plane: Plane) -> tuple[str, Containers]:
    """Open every address; return the API's and what starts containers."""

    async def serve(task: Task, path: Path) -> str:
        task.server = Server([Service(plane, containers, task)])
        await task.server.start(path=str(path))
        return f"unix://{path}"

    async def start_web(function, method: str) -> str:
        return await listen(gateway(plane, function, method))

    containers = Containers(plane, serve)
    plane.start_web = start_web
    plane.http = await listen(storage(plane, containers))
    server = Server([Service(plane, containers)])
    await server.start("127.0.0.1", 0)
    plane.later(containers.watch())
    port = server._server.sockets[0].getsockname()[1]
    return f"http://127.0.0.1:{port}", containers


def variables(plane: Plane, url: str) -> dict[str, str]:
    """Return what leads the client here and keeps the developer's own account out."""
    return {
        "MODAL_SERVER_URL": url,
        "MODAL_TOKEN_ID": "ak-loopback",
        "MODAL_TOKEN_SECRET": "as-loopback",
        "MODAL_CONFIG_PATH": str(plane.folder / "no-profile.toml"),
        "MODAL_DISABLE_API_PROXY": "1",
        "LOOPBACK_HTTP": plane.http,
        "LOOPBACK_STATE": str(plane.folder),
        "LOOPBACK_ISOLATION": plane.isolation,
    }


async def _serve(args: argparse.Namespace, folder: Path) -> int:
    isolation = args.isolation
    if isolation == "auto":
        isolation = next(mode for mode in MODES if usable(mode, folder))
    plane = Plane(
        folder,
        isolation=isolation,
        idle_s=args.idle,
        max_tasks=args.max_tasks,
        commit_s=args.commits,
    )
    for name, content in (
        json.loads(args.secrets.read_text("utf-8")) if args.secrets else {}
    ).items():
        plane.add_secret(name, content)
    url, containers = await start(plane)
    shown = variables(plane, url)
    if args.env_file:
        part = args.env_file.with_name(f"{args.env_file.name}.part")
        part.write_text(
            "".join(f"export {name}={value}\n" for name, value in shown.items()), "utf-8"
        )
        part.replace(args.env_file)
    try:
        return await _work(plane, args.command, shown)
    finally:
        for task in [task for task in plane.tasks.values() if task.state != "done"]:
            await containers.kill(task)
        await asyncio.sleep(0.2)
        shutil.rmtree(plane.sockets, ignore_errors=True)


async def _work(plane: Plane, command: list[str], shown: dict[str, str]) -> int:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    if not command:
        print("\n".join(f"export {name}={value}" for name, value in shown.items()), flush=True)
        await stop.wait()
        return 0
    process = await asyncio.create_subprocess_exec(*command, env={**os.environ, **shown})
    code = await process.wait()
    if code == 0 and plane.deployed:
        plane.tell(f"serving {', '.join(plane.deployed)} until Ctrl-C")
        await stop.wait()
    return code


def main() -> int | str:
    """Serve with a directory that is kept, or one that goes away; return the exit code, or why it
    cannot be."""
    args = parser().parse_args()
    if sys.platform != "linux":
        return (
            "error: a rehearsal of Modal needs Linux, whose containers it builds; this is "
            f"{sys.platform}"
        )
    if args.state:
        args.state.mkdir(parents=True, exist_ok=True)
        return asyncio.run(_serve(args, args.state))
    with tempfile.TemporaryDirectory(prefix="loopback-") as folder:
        return asyncio.run(_serve(args, Path(folder)))


if __name__ == "__main__":
    sys.exit(main())
