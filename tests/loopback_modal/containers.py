"""Containers as processes: started with the real entrypoint, limited in time, preempted, scaled
down.

A container that is asked to end gets a kill switch and runs its exit hooks; a preempted one gets
SIGINT, a grace period, SIGKILL; what it leaves uncommitted is lost, but for the commits that Modal
makes in the background.
"""

import asyncio
import json
import os
import shlex
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from pathlib import Path

from grpclib import GRPCError, Status
from modal_proto import api_pb2

from tests.loopback_modal.bytecode import Copies, cached, with_bytecode
from tests.loopback_modal.nursery import Nursery, of_imports
from tests.loopback_modal.plane import Plane, Result
from tests.loopback_modal.records import App, Function, Task, wake
from tests.loopback_modal.volumes import View, open_below

WATCH_S = 0.2
STOP_S = 3.0  # for containers of a stopped app to end by themselves
PASSED_ON = (
    "CUDA_VISIBLE_DEVICES",
    "LD_LIBRARY_PATH",
    "MODAL_LOGLEVEL",
    "OMP_NUM_THREADS",
    "HF_HUB_OFFLINE",
)


class Containers:
    """Starts and ends the containers of a control plane; `serve` opens a container's own API
    socket."""

    def __init__(self, plane: Plane, serve: Callable[[Task, Path], Awaitable[str]]) -> None:
        self.plane, self.serve = plane, serve
        plane.launch = self.launch
        self._nurseries: dict[frozenset, asyncio.Future[Nursery]] = {}
        self._copies: dict[tuple[str, ...], asyncio.Future[Copies]] = {}  # by their mounts' ids

    async def launch(self, task: Task) -> None:
        """Run a container from start to end."""
        folder = self.plane.made("tasks", task.id)
        path = folder / "spec.json"
        spec = await self._spec(task, folder)
        path.write_text(json.dumps(spec), "utf-8")
        nursery = await self._nursery(of_imports(spec["env"]))
        task.process = await nursery.launch(path)
        pumps = [
            asyncio.ensure_future(
                self._pump(task, task.process.stdout, api_pb2.FILE_DESCRIPTOR_STDOUT)
            ),
            asyncio.ensure_future(
                self._pump(task, task.process.stderr, api_pb2.FILE_DESCRIPTOR_STDERR)
            ),
        ]
        commits = asyncio.ensure_future(self._commits(task))
        code = await task.process.wait()
        commits.cancel()
        await asyncio.gather(*pumps)
        started, task.state = task.state == "active", "done"
        task.server.close()
        await self.plane.take_back(task, code, started)

    async def _nursery(self, variables: dict[str, str]) -> Nursery:
        """Return what starts containers of these variables; the first one waits for it."""
        key = frozenset(variables.items())
        if key not in self._nurseries:
            self._nurseries[key] = asyncio.ensure_future(Nursery.start(variables))
        return await self._nurseries[key]

    async def _spec(self, task: Task, folder: Path) -> dict:
        """Return what namespace.py has to build for this container."""
        definition = task.function.definition
        socket = self.plane.sockets / task.id[-6:]
        socket.mkdir(exist_ok=True)
        (socket / "arguments").write_bytes(self._arguments(task))
        url = await self.serve(task, socket / "api")
        variables, cwd = self._variables(task, socket, url)
        spec = {
            "work": str(self.plane.made("tasks", task.id, "ns")),
            "mode": self.plane.isolation,
            "copies": await self._code(tuple(definition.mount_ids)),
            "mounts": [[str(socket), str(socket)], *await self._views(task, folder)],
            "cwd": cwd,
            "env": variables,
            "argv": [sys.executable, "-m", "modal._container_entrypoint"],
        }
        return self._plain(spec, folder) if self.plane.isolation == "plain" else spec

    async def _code(self, mounts: tuple[str, ...]) -> Copies:
        """Return the files of code mounts, and their bytecode; the first container waits for it."""
        if mounts not in self._copies:
            copies = [
                [str(self.plane.blobs / file.sha256_hex), file.filename, file.mode]
                for mount in mounts
                for file in self.plane.mounts[mount]
            ]
            making = asyncio.to_thread(with_bytecode, copies, cached())
            self._copies[mounts] = asyncio.ensure_future(making)
        return await self._copies[mounts]

    def _arguments(self, task: Task) -> bytes:
        function = task.function
        message = api_pb2.ContainerArguments(
            task_id=task.id,
            function_id=function.id,
            app_id=function.app.id,
            function_def=function.definition,
            environment_name="main",
            app_layout=layout(self.plane, function.app),
        )
        return message.SerializeToString()

    def _variables(self, task: Task, socket: Path, url: str) -> tuple[dict[str, str], str]:
        """Return environment and working directory: the image's, the secrets', then Modal's own."""
        definition = task.function.definition
        variables, cwd = _image_settings(self.plane, definition.image_id)
        for secret in definition.secret_ids:
            variables |= self.plane.secrets[secret]
        passed = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        return passed | variables | {
            "PATH": path,
            "HOME": "/root",
            "LANG": "C.UTF-8",
            "PYTHONPATH": "/root",
            "PYTHONUNBUFFERED": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "MODAL_SERVER_URL": url,
            "MODAL_IS_REMOTE": "1",
            "MODAL_TASK_ID": task.id,
            "MODAL_ENVIRONMENT": "main",
            "MODAL_IMAGE_ID": definition.image_id,
            "MODAL_REGION": "loopback",
            "MODAL_CLOUD_PROVIDER": "CLOUD_PROVIDER_LOCAL",
            "MODAL_CONTAINER_ARGUMENTS_PATH": str(socket / "arguments"),
        }, cwd

    async def _views(self, task: Task, folder: Path) -> list[list[str]]:
        """Give the container its own copy of each volume; return what to mount where."""
        mounts = []
        for number, mount in enumerate(task.function.definition.volume_mounts):
            volume = self.plane.volumes[mount.volume_id]
            view = await asyncio.to_thread(
                View, volume, folder / f"volume{number}", mount.read_only
            )
            task.views[volume.id] = view
            mounts.append([str(view.path), mount.mount_path])
        return mounts

    @staticmethod
    def _plain(spec: dict, folder: Path) -> dict:
        """Do without privileges: code in a directory of its own; a variable that names a mount's
        place names the view.

        An app that takes its mount's place from a variable runs so; one that has it as a constant
        does not.
        """
        root = folder / "root"
        for source, inside, _ in spec["copies"]:
            target = root / inside.lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(Path(source).read_bytes())
        variables = spec["env"] | {"PYTHONPATH": str(root / "root")}
        for source, inside in spec["mounts"][1:]:
            moved = {
                k: source + v[len(inside) :]
                for k, v in variables.items()
                if f"{v}/".startswith(f"{inside}/")
            }
            variables |= moved
        cwd = root / spec["cwd"].lstrip("/")
        cwd.mkdir(parents=True, exist_ok=True)
        return spec | {"cwd": str(cwd), "env": variables}

    async def _pump(self, task: Task, stream: asyncio.StreamReader, descriptor: int) -> None:
        while chunk := await stream.read(1 << 16):
            await self.plane.log(task, chunk.decode("utf-8", "replace"), descriptor)

    async def _commits(self, task: Task) -> None:
        while True:
            await asyncio.sleep(self.plane.commit_s)
            for view in task.views.values():
                await asyncio.to_thread(view.commit)

    # -- ending

    def refuse_open_files(self, task: Task, volume_id: str) -> None:
        """Raise the API's FAILED_PRECONDITION when the container has a file of the volume open."""
        held = open_below(task.views[volume_id].path, _descendants(task.process.pid))
        if held:
            text = f"there are open files preventing the operation: {', '.join(held[:3])}"
            raise GRPCError(Status.FAILED_PRECONDITION, text)

    async def kill(self, task: Task, grace_s: float = 0.0) -> None:
        """Preempt: SIGINT and a grace period, if any, then SIGKILL; inputs run again elsewhere."""
        task.draining = True
        if not task.alive:
            return
        task.killed = True
        try:
            if grace_s:
                os.killpg(task.process.pid, signal.SIGINT)
                await asyncio.wait_for(task.process.wait(), grace_s)
                return
        except TimeoutError:
            pass
        except ProcessLookupError:
            return
        if task.alive:
            os.killpg(task.process.pid, signal.SIGKILL)

    async def drain(self, task: Task) -> None:
        """Ask a container to end once it is idle."""
        task.draining = True
        await wake(task.function.changed)

    async def stop(self, app: App) -> None:
        """Stop an app: idle containers end by themselves, others are interrupted."""
        if app.done:
            return
        app.state = api_pb2.APP_STATE_STOPPED
        for function in app.functions.values():
            function.queue.clear()
        for task in app.tasks:
            await self.drain(task)
        await _until(lambda: not app.tasks, STOP_S)
        for task in app.tasks:
            await self.kill(task, grace_s=1.0)
        await _until(lambda: not app.tasks, STOP_S)
        app.done = True
        await wake(app.changed)

    async def watch(self) -> None:
        """Enforce time limits and scale down, for as long as the server runs."""
        while True:
            await asyncio.sleep(WATCH_S)
            for task in [
                task for app in self.plane.apps.values() for task in app.tasks if task.process
            ]:
                await self._limit(task)
                idle = task.state == "active" and not task.inputs and not task.draining
                window = task.function.definition.autoscaler_settings.scaledown_window or 60
                if idle and time.time() - task.last_active > min(window, self.plane.idle_s):
                    await self.drain(task)

    async def _limit(self, task: Task) -> None:
        limit_s = task.function.definition.timeout_secs
        for each in list(task.inputs.values()):
            if each.state == "running" and limit_s and time.time() - each.started > limit_s:
                task.inputs.pop(each.id)
                why = f"Task's current input {each.id} hit its timeout of {limit_s}s"
                await self.plane.fail(each, Result.GENERIC_STATUS_TIMEOUT, why)
                self.plane.later(self.kill(task))


async def _until(true: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        await asyncio.sleep(0.05)


def _image_settings(plane: Plane, image_id: str) -> tuple[dict[str, str], str]:
    """Return the variables and the working directory that an image's recipe sets, base images
    first."""
    chain, variables, cwd = [], {}, "/root"
    while image_id:
        chain.append(plane.images[image_id])
        image_id = chain[-1].base_images[0].image_id if chain[-1].base_images else ""
    for line in (line.strip() for image in reversed(chain) for line in image.dockerfile_commands):
        if line.startswith("ENV "):
            variables |= dict(word.split("=", 1) for word in shlex.split(line[4:]) if "=" in word)
        elif line.startswith("WORKDIR "):
            cwd = shlex.split(line[8:])[0]
    return variables, cwd


def layout(plane: Plane, app: App) -> api_pb2.AppLayout:
    """Return the app as its containers are told about it: every function and everything a function
    depends on."""
    objects = [
        api_pb2.Object(object_id=f.id, function_handle_metadata=f.handle)
        for f in app.functions.values()
    ]
    wanted = {
        dep.object_id: None
        for f in app.functions.values()
        for dep in f.definition.object_dependencies
    }
    objects += [_described(plane, id) for id in wanted]
    for id in app.class_ids.values():
        objects.append(
            api_pb2.Object(object_id=id, class_handle_metadata=api_pb2.ClassHandleMetadata())
        )
    return api_pb2.AppLayout(
        objects=objects, function_ids=app.function_ids, class_ids=app.class_ids
    )


def _described(plane: Plane, id: str) -> api_pb2.Object:
    described = api_pb2.Object(object_id=id)
    if id in plane.volumes:
        described.volume_metadata.CopyFrom(volume_metadata(plane, id))
    elif id in plane.mounts:
        described.mount_handle_metadata.SetInParent()
    return described


def volume_metadata(plane: Plane, id: str) -> api_pb2.VolumeMetadata:
    """Return what the client is told about a volume."""
    volume = plane.volumes[id]
    made = api_pb2.CreationInfo(created_at=time.time(), created_by="loopback")
    return api_pb2.VolumeMetadata(version=volume.version, name=volume.name, creation_info=made)


def busy(plane: Plane, name: str) -> Task | None:
    """Return a container that runs an input of the function of that name."""
    active = (task for task in plane.tasks.values() if task.state == "active" and task.inputs)
    return next((task for task in active if _name(task.function) == name), None)


def _name(function: Function) -> str:
    return function.definition.function_name


def _descendants(pid: int) -> list[int]:
    """Return a process and everything it started."""
    children = defaultdict(list)
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended
            continue
        children[parent].append(int(path.parent.name))
    found, to_see = [], [pid]
    while to_see:
        found.append(to_see.pop())
        to_see += children[found[-1]]
    return found
