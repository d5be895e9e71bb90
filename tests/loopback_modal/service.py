"""The gRPC service: every call of the API is logged, and refused by name when there is no handler
for it."""

from grpclib import GRPCError, Status
from grpclib.const import Cardinality, Handler
from modal_proto import api_grpc

from tests.loopback_modal.containers import Containers
from tests.loopback_modal.plane import Plane
from tests.loopback_modal.records import Task
from tests.loopback_modal.rpc_apps import Apps
from tests.loopback_modal.rpc_dicts import Dicts
from tests.loopback_modal.rpc_functions import Functions
from tests.loopback_modal.rpc_volumes import Volumes


class Api(Apps, Dicts, Functions, Volumes):
    """All handlers, each named like the call it answers."""

    def __init__(self, plane: Plane, containers: Containers) -> None:
        self.plane, self.containers = plane, containers


class Service:
    """What grpclib serves: the table of the installed package's service, with our handlers."""

    def __init__(self, plane: Plane, containers: Containers, task: Task | None = None) -> None:
        api = Api(plane, containers)
        self._table = {
            path: _handler(path.rpartition("/")[2], each, api, task)
            for path, each in _empty().__mapping__().items()
        }

    def __mapping__(self) -> dict[str, Handler]:
        return self._table


def _empty() -> api_grpc.ModalClientBase:
    """Return an instance of the package's abstract service, for the names and message types of its
    calls."""
    body = dict.fromkeys(api_grpc.ModalClientBase.__abstractmethods__, lambda self, stream: None)
    return type("Empty", (api_grpc.ModalClientBase,), body)()


def _handler(name: str, known: Handler, api: Api, task: Task | None) -> Handler:
    answer = getattr(api, name, None)

    async def method(stream) -> None:
        request = await stream.recv_message()
        api.plane.note_rpc(name, task, answer is not None)
        if answer is None:
            raise GRPCError(
                Status.UNIMPLEMENTED, f"{name} is not implemented by the loopback server"
            )
        try:
            if known.cardinality is Cardinality.UNARY_STREAM:
                async for reply in answer(request, task):
                    await stream.send_message(reply)
            else:
                await stream.send_message(await answer(request, task) or known.reply_type())
        except KeyError as missing:
            raise GRPCError(Status.NOT_FOUND, f"{name}: unknown id {missing}") from missing

    return Handler(method, known.cardinality, known.request_type, known.reply_type)
