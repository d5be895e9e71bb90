"""What the control plane remembers: apps, functions, calls with their inputs, containers.

An input is queued, running or done, and in one container at a time; its retry count tells a stale
output from a current one.
"""

import asyncio
import base64
import collections
import json
import time
from dataclasses import dataclass, field
from typing import Any

from modal_proto import api_pb2

from tests.loopback_modal.nursery import Container


def known(message: type, **fields):
    """Return a message of the fields this version of the package has; they come and go between
    minor releases."""
    return message(
        **{
            name: value
            for name, value in fields.items()
            if name in message.DESCRIPTOR.fields_by_name
        }
    )


def token(fields: dict) -> str:
    """Return an unsigned JWT; the client decodes those of inputs and never verifies them."""
    head, body = (
        base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=")
        for part in ({"alg": "none"}, fields)
    )
    return f"{head.decode()}.{body.decode()}."


def read_token(text: str) -> dict:
    """Return the fields of a token."""
    part = text.split(".")[1]
    return json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))


@dataclass
class Input:
    """One set of arguments on its way through a function."""

    id: str
    call: "Call"
    index: int
    message: api_pb2.FunctionInput
    retry_count: int = 0
    state: str = "queued"
    task: "Task | None" = None
    started: float = 0.0  # seconds since the epoch, as is every time here
    crashes: int = 0

    def token(self) -> str:
        """Return what the client hands back to have this input retried."""
        return token({"idx": self.index, "input_id": self.id, "retry_count": self.retry_count})


@dataclass
class Call:
    """What one remote, map, spawn or HTTP request started; outputs stay in the order they came."""

    id: str
    function: "Function"
    kind: int
    invocation: int
    inputs: dict[int, Input] = field(default_factory=dict)
    outputs: list[api_pb2.FunctionGetOutputsItem] = field(default_factory=list)
    data_in: list[api_pb2.DataChunk] = field(default_factory=list)
    data_out: list[api_pb2.DataChunk] = field(default_factory=list)
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    @property
    def unfinished(self) -> int:
        """Inputs without an output."""
        return sum(each.state != "done" for each in self.inputs.values())


@dataclass
class Function:
    """A function, or all methods of a class, with its queue and its containers."""

    id: str
    app: "App"
    definition: api_pb2.Function = field(default_factory=api_pb2.Function)
    announced: api_pb2.FunctionPrecreateRequest | None = None
    web_url: str = ""
    queue: collections.deque[Input] = field(default_factory=collections.deque)
    tasks: "dict[str, Task]" = field(default_factory=dict)
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    @property
    def handle(self) -> api_pb2.FunctionHandleMetadata:
        """What the client needs to call it."""
        source = self.definition if self.definition.function_name else self.announced
        methods = {
            name: self._method(name, each) for name, each in source.method_definitions.items()
        }
        return self._metadata(source, web_url=self.web_url, method_handle_metadata=methods)

    def _method(self, name: str, source) -> api_pb2.FunctionHandleMetadata:
        return self._metadata(source, web_url=source.web_url, is_method=True, use_method_name=name)

    def _metadata(self, source, **fields) -> api_pb2.FunctionHandleMetadata:
        return known(
            api_pb2.FunctionHandleMetadata,
            function_name=source.function_name,
            function_type=source.function_type,
            function_schema=source.function_schema,
            supported_input_formats=source.supported_input_formats,
            supported_output_formats=source.supported_output_formats,
            definition_id=f"de-{self.id}",
            app_id=self.app.id,
            **fields,
        )


@dataclass
class App:
    """A run or a deployment, with what it printed."""

    id: str
    description: str
    state: int
    name: str = ""
    functions: dict[str, Function] = field(default_factory=dict)
    function_ids: dict[str, str] = field(default_factory=dict)
    class_ids: dict[str, str] = field(default_factory=dict)
    logs: list[api_pb2.TaskLogsBatch] = field(default_factory=list)
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    done: bool = False
    created: float = field(default_factory=time.time)

    @property
    def tasks(self) -> "list[Task]":
        """Its containers that have not ended."""
        return [task for function in self.functions.values() for task in function.tasks.values()]


@dataclass
class Task:
    """A container: a process with a view of each volume; state is starting, active or done."""

    id: str
    function: Function
    state: str = "starting"
    process: Container | None = None
    server: Any = None  # its own gRPC server: who calls is known by the socket it calls on
    inputs: dict[str, Input] = field(default_factory=dict)
    views: dict = field(default_factory=dict)  # volume id -> volumes.View
    last_active: float = field(default_factory=time.time)
    draining: bool = False
    killed: bool = False
    used: bool = False
    cancelled: list[str] = field(default_factory=list)
    cancel: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def alive(self) -> bool:
        """Whether there is a process to signal."""
        return self.process is not None and self.process.returncode is None


async def wake(changed: asyncio.Condition) -> None:
    """Let everyone who waits look again."""
    async with changed:
        changed.notify_all()


async def pause(changed: asyncio.Condition, seconds: float) -> None:
    """Wait until something has changed, or so many seconds."""
    async with changed:
        try:
            await asyncio.wait_for(changed.wait(), seconds)
        except TimeoutError:
            return
