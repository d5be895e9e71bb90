"""The API's calls about functions, calls of functions and the containers that run them.

It refuses what the service refuses and the client does not check: GPU names and counts, time
limits, disk.
"""

import asyncio
import time

from google.protobuf import json_format
from grpclib import GRPCError, Status
from modal_proto import api_pb2

from tests.loopback_modal.containers import Containers
from tests.loopback_modal.plane import Plane, Result
from tests.loopback_modal.records import Call, Function, Task, known, pause, read_token, wake

GPUS = {  # most of each per container
    "T4": 8,
    "L4": 8,
    "A10": 4,
    "A10G": 4,
    "L40S": 8,
    "A100": 8,
    "A100-40GB": 8,
    "A100-80GB": 8,
    "RTX-PRO-6000": 8,
    "H100": 8,
    "H100!": 8,
    "H200": 8,
    "B200": 8,
    "B200+": 8,
    "B300": 8,
    "ANY": 8,
}
DAY_S, MOST_DISK_MB = 86_400, 3_145_728
HOLD_S = 8.0  # a container's heartbeat is held so long, to bring it a cancellation at once


def check(function: api_pb2.Function, data: api_pb2.FunctionData) -> None:
    """Raise the API's INVALID_ARGUMENT for resources that Modal does not have."""
    problems = [
        f"no such GPU {gpu.gpu_type}:{gpu.count}"
        for gpu in (ranked.function.resources.gpu_config for ranked in data.ranked_functions)
        if gpu.count and gpu.count > GPUS.get(gpu.gpu_type, 0)
    ]
    if not 1 <= function.timeout_secs <= DAY_S:
        problems.append(
            f"timeout must be between 1 second and 24 hours, not {function.timeout_secs}"
        )
    if function.resources.ephemeral_disk_mb > MOST_DISK_MB:
        problems.append(f"ephemeral_disk is at most {MOST_DISK_MB} MiB")
    if function.scheduler_placement.nonpreemptible and function.resources.gpu_config.count:
        problems.append("nonpreemptible is not supported for GPU Functions")
    if problems:
        raise GRPCError(
            Status.INVALID_ARGUMENT, f"Function {function.function_name}: {'; '.join(problems)}"
        )


class Functions:
    """Handlers; `task` is the container that calls, or None for the client."""

    plane: Plane
    containers: Containers

    def _function(self, id: str, app_id: str) -> Function:
        if id not in self.plane.functions:
            app = self.plane.apps[app_id]
            function = Function(self.plane.new_id("fu"), app)
            self.plane.functions[function.id] = app.functions[function.id] = function
            return function
        return self.plane.functions[id]

    async def FunctionPrecreate(self, request, task):
        """Give a function its id."""
        function = self._function(request.existing_function_id, request.app_id)
        function.announced = request
        return api_pb2.FunctionPrecreateResponse(
            function_id=function.id, handle_metadata=function.handle
        )

    async def FunctionCreate(self, request, task):
        """Take a function's definition and record it in functions/<name>.json; of several GPUs the
        first is used."""
        function, data = (
            self._function(request.existing_function_id, request.app_id),
            api_pb2.FunctionData(),
        )
        if request.HasField("function_data"):
            data.CopyFrom(request.function_data)
            function.definition.CopyFrom(data.ranked_functions[0].function)
        else:
            function.definition.CopyFrom(request.function)
            data.function_name, data.module_name = (
                request.function.function_name,
                request.function.module_name,
            )
            data.ranked_functions.add(rank=0).function.CopyFrom(request.function)
        definition = function.definition
        check(definition, data)
        text = json_format.MessageToJson(data, preserving_proto_field_name=True)
        (self.plane.made("functions") / f"{definition.function_name}.json").write_text(
            text, "utf-8"
        )
        await self._open_web(function)
        return known(
            api_pb2.FunctionCreateResponse,
            function_id=function.id,
            function=definition,
            function_data=data,
            handle_metadata=function.handle,
        )

    async def _open_web(self, function: Function) -> None:
        definition = function.definition
        if definition.webhook_config.type:
            function.web_url = function.web_url or await self.plane.start_web(function, "")
            definition.web_url = function.web_url
        for name, method in definition.method_definitions.items():
            if method.webhook_config.type:
                method.web_url = await self.plane.start_web(function, name)

    async def ClassCreate(self, request, task):
        """Give a class its id."""
        id = request.existing_class_id or self.plane.new_id("cs")
        return api_pb2.ClassCreateResponse(
            class_id=id, handle_metadata=api_pb2.ClassHandleMetadata()
        )

    # -- who calls

    async def FunctionMap(self, request, task):
        """Start a call, with its first inputs when they come along."""
        function = self.plane.functions[request.function_id]
        call = self.plane.add_call(
            function, request.function_call_type, request.function_call_invocation_type
        )
        given = (
            await self.plane.add_inputs(call, request.pipelined_inputs)
            if request.pipelined_inputs
            else []
        )
        return api_pb2.FunctionMapResponse(
            function_call_id=call.id,
            pipelined_inputs=given,
            function_call_jwt=call.id,
            max_inputs_outstanding=1000,
            retry_policy=function.definition.retry_policy,
            sync_client_retries_enabled=True,
        )

    async def FunctionPutInputs(self, request, task):
        """Add inputs to a call."""
        given = await self.plane.add_inputs(
            self.plane.called(request.function_call_id), request.inputs
        )
        return api_pb2.FunctionPutInputsResponse(inputs=given)

    async def FunctionRetryInputs(self, request, task):
        """Run inputs again that the client saw fail."""
        tokens = []
        for item in request.inputs:
            each = self.plane.inputs[read_token(item.input_jwt)["input_id"]]
            if each.call.kind == api_pb2.FUNCTION_CALL_TYPE_UNARY:
                each.call.outputs = [
                    output for output in each.call.outputs if output.idx != each.index
                ]
            each.retry_count, each.message = item.retry_count or each.retry_count + 1, item.input
            await self.plane.requeue(each)
            tokens.append(each.token())
        return api_pb2.FunctionRetryInputsResponse(input_jwts=tokens)

    async def FunctionGetOutputs(self, request, task):
        """Wait for outputs of a call."""
        call = self.plane.called(request.function_call_id)
        at, until = (
            int((request.last_entry_id or "0-0").split("-")[0]),
            time.monotonic() + request.timeout,
        )
        while True:
            outputs = _asked_for(call, request, at)
            if outputs or time.monotonic() >= until:
                return api_pb2.FunctionGetOutputsResponse(
                    outputs=outputs,
                    idxs=[output.idx for output in outputs],
                    num_unfinished_inputs=call.unfinished,
                    last_entry_id=f"{len(call.outputs)}-0",
                )
            await pause(call.changed, min(1.0, max(0.01, until - time.monotonic())))

    async def FunctionCallCancel(self, request, task):
        """Cancel what of a call has not finished."""
        for each in self.plane.called(request.function_call_id).inputs.values():
            if each.state == "running":
                each.task.cancelled.append(each.id)
                each.task.cancel.set()
                if request.terminate_containers:
                    await self.containers.kill(each.task, grace_s=2.0)
            elif each.state == "queued":
                await self.plane.fail(each, Result.GENERIC_STATUS_TERMINATED, "cancelled")

    # -- what runs

    async def ContainerHello(self, request, task):
        """Greet."""

    async def ContainerHeartbeat(self, request, task):
        """Hold a container's heartbeat for a while; the answer has inputs that were cancelled."""
        if not task.cancelled:
            await _or_after(task, HOLD_S)
        answer = api_pb2.ContainerHeartbeatResponse()
        if task.cancelled:
            answer.cancel_input_event.input_ids.extend(task.cancelled)
            task.cancelled.clear()
            task.cancel.clear()
        return answer

    async def FunctionGetInputs(self, request, task):
        """Give a container its next input."""
        return await self.plane.give_input(task)

    async def FunctionPutOutputs(self, request, task):
        """Take a container's outputs."""
        await self.plane.take_outputs(task, request.outputs)

    async def TaskResult(self, request, task):
        """Fail what waits for a container that could not even import the user's code."""
        await self.plane.fail_queue(task.function, "", request.result)
        task.killed = True

    # -- bodies of web requests

    async def FunctionCallGetDataIn(self, request, task):
        """Stream a request's body to a container; the stream stays open."""
        call, last = self.plane.called(request.function_call_id), request.last_index
        while True:
            for chunk in [chunk for chunk in call.data_in if chunk.index > last]:
                last = chunk.index
                yield chunk
            await pause(call.changed, 1.0)

    async def FunctionCallPutDataOut(self, request, task):
        """Take a part of a response."""
        call = self.plane.called(request.function_call_id)
        call.data_out.extend(request.data_chunks)
        await wake(call.changed)


def _asked_for(call: Call, request, at: int) -> list[api_pb2.FunctionGetOutputsItem]:
    if request.HasField("start_idx") and request.HasField("end_idx"):
        return [
            output for output in call.outputs if request.start_idx <= output.idx <= request.end_idx
        ]
    return call.outputs[at:]


async def _or_after(task: Task, seconds: float) -> None:
    try:
        await asyncio.wait_for(task.cancel.wait(), seconds)
    except TimeoutError:
        return
