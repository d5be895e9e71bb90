"""The control plane: what exists, who is calling what, and which inputs run where.

Synchronous calls are retried by the client, asynchronous ones here; an input whose container was
preempted or crashed is queued again with the same arguments, as Modal does.
"""

import asyncio
import collections
import json
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from grpclib import GRPCError, Status
from modal_proto import api_pb2

from tests.loopback_modal.records import App, Call, Function, Input, Task, pause, wake
from tests.loopback_modal.volumes import Volume

Result = api_pb2.GenericResult
CRASHES = 3  # of one input before it is given up
POLL_S = 20.0  # how long a container's request for inputs is held


class Plane:
    """State of the server. `launch` starts a container, `start_web` opens a web address."""

    launch: Callable[[Task], Awaitable[None]]
    start_web: Callable[[Function, str], Awaitable[str]]

    def __init__(
        self,
        folder: Path,
        *,
        isolation: str,
        idle_s: float = 3.0,
        max_tasks: int = 4,
        commit_s: float = 5.0,
    ) -> None:
        self.folder, self.isolation, self.idle_s, self.max_tasks = (
            folder.resolve(),
            isolation,
            idle_s,
            max_tasks,
        )
        self.commit_s = commit_s  # between background commits
        self.apps: dict[str, App] = {}
        self.deployed: dict[str, App] = {}
        self.functions: dict[str, Function] = {}
        self.calls: dict[str, Call] = {}
        self.inputs: dict[str, Input] = {}
        self.tasks: dict[str, Task] = {}
        self.volumes: dict[str, Volume] = {}
        self.dicts: dict[str, dict[bytes, bytes]] = {}  # entries by name
        self.secrets: dict[str, dict[str, str]] = {}  # id -> variables
        self.secret_ids: dict[str, str] = {}  # name -> id
        self.mounts: dict[str, list[api_pb2.MountFile]] = {}
        self.images: dict[str, api_pb2.Image] = {}
        self.http = ""  # where blobs, blocks and files are fetched and sent
        self.sockets = Path(
            tempfile.mkdtemp(prefix="loopback-")
        )  # short: a socket's path has at most 107 bytes
        self.blobs = self.made("blobs")
        self._count: collections.Counter = collections.Counter()
        self._background: set[asyncio.Task] = set()
        self._rpc_log = open(self.folder / "rpc.jsonl", "a", buffering=1, encoding="utf-8")  # noqa: SIM115
        self._remember()

    def made(self, *parts: str) -> Path:
        """Return a directory of the server's, created if need be."""
        path = self.folder.joinpath(*parts)
        path.mkdir(parents=True, exist_ok=True)
        return path

    def new_id(self, prefix: str) -> str:
        """Return an id in Modal's form, a prefix and 22 alphanumerics, by which the client tells
        ids from names."""
        self._count[prefix] += 1
        return f"{prefix}-{self._count[prefix]:022d}"

    def later(self, work: Awaitable) -> None:
        """Do something without waiting for it, kept from being collected meanwhile."""
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def note_rpc(self, name: str, task: Task | None, handled: bool) -> None:
        """Record a call of the API, for tests and for finding out what a new client wants."""
        row = {
            "time": round(time.time(), 3),
            "rpc": name,
            "by": task.id if task else "client",
            "handled": handled,
        }
        self._rpc_log.write(json.dumps(row) + "\n")

    def _remember(self) -> None:
        """Find volumes and secrets that an earlier server on the same directory left."""
        for path in sorted(self.made("volumes").iterdir()):
            self.add_volume(path.name, api_pb2.VOLUME_FS_VERSION_V2 if path.suffix == ".v2" else 1)
        kept = self.folder / "secrets.json"
        for name, variables in (
            json.loads(kept.read_text("utf-8")) if kept.exists() else {}
        ).items():
            self.add_secret(name, variables)

    # -- volumes and secrets

    def volume_named(self, name: str) -> Volume | None:
        """Find a volume; None when there is none."""
        return next((volume for volume in self.volumes.values() if volume.name == name), None)

    def add_volume(self, name: str, version: int) -> Volume:
        """Create a volume; its directory's name is the volume's, and its version when that is 2."""
        name = name.removesuffix(".v2")
        version = version or api_pb2.VOLUME_FS_VERSION_V1
        mark = ".v2" if version == api_pb2.VOLUME_FS_VERSION_V2 else ""
        volume = Volume(self.new_id("vo"), name, self.made("volumes", name + mark), version)
        self.volumes[volume.id] = volume
        return volume

    def add_secret(self, name: str, variables: dict[str, str]) -> str:
        """Create or replace a secret and return its id; an empty name is a function's own
        variables."""
        id = self.new_id("st")
        self.secrets[id] = dict(variables)
        if name:
            self.secret_ids[name] = id
            named = {each: self.secrets[i] for each, i in self.secret_ids.items()}
            (self.folder / "secrets.json").write_text(json.dumps(named), "utf-8")
        return id

    # -- apps

    def add_app(self, description: str, state: int) -> App:
        """Start an app."""
        app = App(self.new_id("ap"), description, state)
        self.apps[app.id] = app
        return app

    async def log(self, task: Task, text: str, descriptor: int) -> None:
        """Keep what a container printed and pass it to whoever follows."""
        app = task.function.app
        line = api_pb2.TaskLogs(data=text, file_descriptor=descriptor, timestamp=time.time())
        ids = {
            "task_id": task.id,
            "function_id": task.function.id,
            "entry_id": f"{len(app.logs) + 1}-0",
        }
        app.logs.append(api_pb2.TaskLogsBatch(items=[line], **ids))
        await wake(app.changed)

    # -- calls

    def add_call(self, function: Function, kind: int, invocation: int) -> Call:
        """Start a call."""
        call = Call(self.new_id("fc"), function, kind, invocation)
        self.calls[call.id] = call
        return call

    async def add_inputs(self, call: Call, items) -> list[api_pb2.FunctionPutInputsResponseItem]:
        """Queue inputs of a call; return what the client is told about each."""
        out = []
        for item in items:
            each = Input(self.new_id("in"), call, item.idx, item.input)
            call.inputs[item.idx] = self.inputs[each.id] = each
            call.function.queue.append(each)
            out.append(
                api_pb2.FunctionPutInputsResponseItem(
                    idx=item.idx, input_id=each.id, input_jwt=each.token()
                )
            )
        await self.schedule(call.function)
        return out

    async def requeue(self, each: Input, front: bool = False) -> None:
        """Put an input back, at the front when it was taken from a container."""
        each.state, each.task = "queued", None
        queue = each.call.function.queue
        (queue.appendleft if front else queue.append)(each)
        await self.schedule(each.call.function)

    async def finish(
        self, each: Input, result: Result, item=None, task: Task | None = None
    ) -> None:
        """Record an input's output, or retry it when that is ours to do; `item` is what the
        container sent."""
        if each.state == "done":
            return
        if self._retried_here(each, result):
            each.retry_count += 1
            each.state, each.task = "queued", None
            policy = each.call.function.definition.retry_policy
            growth = (policy.backoff_coefficient or 1) ** (each.retry_count - 1)
            self.later(
                self._requeue_after(
                    each, min(policy.initial_delay_ms * growth, policy.max_delay_ms) / 1000
                )
            )
            return
        each.state, each.task = "done", None
        each.call.outputs.append(
            api_pb2.FunctionGetOutputsItem(
                result=result,
                idx=each.index,
                input_id=each.id,
                retry_count=each.retry_count,
                data_format=item.data_format if item else 0,
                task_id=task.id if task else "",
                input_started_at=item.input_started_at if item else 0.0,
                output_created_at=(item and item.output_created_at) or time.time(),
            )
        )
        await wake(each.call.changed)

    @staticmethod
    def _retried_here(each: Input, result: Result) -> bool:
        over = result.status in (Result.GENERIC_STATUS_SUCCESS, Result.GENERIC_STATUS_TERMINATED)
        ours = each.call.invocation == api_pb2.FUNCTION_CALL_INVOCATION_TYPE_ASYNC
        return (
            ours
            and not over
            and each.retry_count < each.call.function.definition.retry_policy.retries
        )

    async def _requeue_after(self, each: Input, seconds: float) -> None:
        await asyncio.sleep(seconds)
        await self.requeue(each)

    async def fail(self, each: Input, status: int, why: str) -> None:
        """Record that an input failed by no doing of the user's code."""
        await self.finish(each, Result(status=status, exception=why))

    # -- scheduling

    async def schedule(self, function: Function) -> None:
        """Start as many containers as the queue asks for and the limits allow."""
        if function.app.state == api_pb2.APP_STATE_STOPPED:
            return
        await wake(function.changed)
        live = [task for task in function.tasks.values() if not task.draining]
        each = max(1, function.definition.max_concurrent_inputs)
        single = function.definition.single_use_containers
        room = sum(max(0, each - len(task.inputs)) for task in live if not (single and task.used))
        limit = min(
            function.definition.autoscaler_settings.max_containers or self.max_tasks, self.max_tasks
        )
        for _ in range(limit - len(live)):
            if len(function.queue) <= room:
                return
            task = Task(self.new_id("ta"), function)
            function.tasks[task.id] = self.tasks[task.id] = task
            room += each
            self.later(self.launch(task))

    async def give_input(self, task: Task) -> api_pb2.FunctionGetInputsResponse:
        """Return the next input for a container, a kill switch when it is to end, nothing after a
        while."""
        function, until = task.function, time.monotonic() + POLL_S
        if task.state == "starting":
            task.state, task.last_active = "active", time.time()
        while time.monotonic() < until:
            if task.draining:
                return api_pb2.FunctionGetInputsResponse(
                    inputs=[api_pb2.FunctionGetInputsItem(kill_switch=True)]
                )
            while function.queue:
                each = function.queue.popleft()
                if each.state == "queued":
                    return api_pb2.FunctionGetInputsResponse(inputs=[self._given(each, task)])
            await pause(function.changed, 1.0)
        return api_pb2.FunctionGetInputsResponse()

    def _given(self, each: Input, task: Task) -> api_pb2.FunctionGetInputsItem:
        task.used, task.last_active = True, time.time()
        each.state, each.task, each.started = "running", task, time.time()
        task.inputs[each.id] = each
        return api_pb2.FunctionGetInputsItem(
            input_id=each.id,
            input=each.message,
            function_call_id=each.call.id,
            retry_count=each.retry_count,
            function_call_invocation_type=each.call.invocation,
            function_map_idx=each.index,
        )

    async def take_outputs(self, task: Task, items) -> None:
        """Record what a container has finished, but for inputs that have meanwhile been given to
        another."""
        for item in items:
            each = self.inputs.get(item.input_id)
            task.inputs.pop(item.input_id, None)
            task.last_active = time.time()
            if each is not None and each.task is task:
                await self.finish(each, item.result, item, task)
        await self.schedule(task.function)

    async def take_back(self, task: Task, code: int, started: bool) -> None:
        """Deal with the inputs of a container that has ended."""
        task.function.tasks.pop(task.id, None)
        for each in list(task.inputs.values()):
            if each.state != "running" or each.task is not task:
                continue
            each.crashes += not task.killed
            if each.crashes > CRASHES:
                why = f"container {task.id} ended with status {code} while it ran the input"
                await self.fail(each, Result.GENERIC_STATUS_FAILURE, why)
            else:
                await self.requeue(each, front=True)
        if code and not task.killed and not started:
            await self.fail_queue(
                task.function, f"container {task.id} did not start (status {code})"
            )
        await self.schedule(task.function)
        await wake(task.function.app.changed)

    async def fail_queue(self, function: Function, why: str, result: Result | None = None) -> None:
        """Fail everything that waits for a function whose containers cannot start."""
        result = result or Result(status=Result.GENERIC_STATUS_INIT_FAILURE, exception=why)
        while function.queue:
            await self.finish(function.queue.popleft(), result)

    def called(self, id: str) -> Call:
        """Return a call by its id; raises the API's NOT_FOUND."""
        if id not in self.calls:
            raise GRPCError(Status.NOT_FOUND, f"no function call {id}")
        return self.calls[id]

    def tell(self, text: str) -> None:
        """Write a line of the server's own on its standard error."""
        sys.stderr.write(f"loopback: {text}\n")
