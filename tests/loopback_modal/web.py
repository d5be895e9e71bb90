"""HTTP beside the API: blobs, blocks and files of volumes, a gateway to web functions, preemption
on demand."""

import hashlib

from aiohttp import web
from modal._serialization import deserialize_data_format, serialize_data_format
from modal_proto import api_pb2

from tests.loopback_modal.containers import Containers, busy
from tests.loopback_modal.plane import Plane
from tests.loopback_modal.records import Call, Function, pause

# a request's scope travels pickled as an ordinary argument, bodies and responses as ASGI messages
ASGI, PICKLE = api_pb2.DATA_FORMAT_ASGI, api_pb2.DATA_FORMAT_PICKLE
LARGEST_BYTES = 1 << 34
DROPPED = (b"content-length", b"transfer-encoding")  # our own server sets them


async def listen(app: web.Application) -> str:
    """Serve on a free port of this machine; return the address."""
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    return f"http://127.0.0.1:{runner.addresses[0][1]}"


def storage(plane: Plane, containers: Containers) -> web.Application:
    """Return the application behind the addresses that the API hands out, and POST
    /preempt?function=F&grace=S."""

    async def put(request: web.Request) -> web.Response:
        data = await request.read()
        (plane.blobs / request.match_info["id"]).write_bytes(data)
        return web.Response(headers={"ETag": hashlib.md5(data, usedforsecurity=False).hexdigest()})

    async def get(request: web.Request) -> web.FileResponse:
        return web.FileResponse(plane.blobs / request.match_info["id"])

    async def put_block(request: web.Request) -> web.Response:
        (plane.blobs / f"block-{request.match_info['sha']}").write_bytes(await request.read())
        return web.Response(body=b"stored")

    async def file(request: web.Request) -> web.Response:
        match = request.match_info
        with (plane.volumes[match["volume"]].path / match["path"]).open("rb") as source:
            source.seek(int(match["start"]))
            return web.Response(body=source.read(int(match["count"])))

    async def preempt(request: web.Request) -> web.Response:
        task = busy(plane, request.query["function"])
        if task:
            plane.later(containers.kill(task, float(request.query.get("grace", 0))))
        return web.json_response(
            {"preempted": task.id if task else None}, status=200 if task else 404
        )

    app = web.Application(client_max_size=LARGEST_BYTES)
    app.add_routes(
        [
            web.put("/blob/{id}", put),
            web.get("/blob/{id}", get),
            web.put("/block/{sha}", put_block),
            web.get("/file/{volume}/{start}/{count}/{path:.+}", file),
            web.post("/preempt", preempt),
        ]
    )
    return app


def gateway(plane: Plane, function: Function, method: str) -> web.Application:
    """Return an application that makes each HTTP request one input of a web function."""

    async def handle(request: web.Request) -> web.StreamResponse:
        call = await _call(plane, function, method, request)
        return await _answer(call, request)

    app = web.Application(client_max_size=LARGEST_BYTES)
    app.router.add_route("*", "/{path:.*}", handle)
    return app


async def _call(plane: Plane, function: Function, method: str, request: web.Request) -> Call:
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": request.method,
        "scheme": "http",
        "path": request.path,
        "query_string": request.query_string.encode(),
        "client": ("127.0.0.1", 0),
        "headers": [(name.lower(), value) for name, value in request.raw_headers],
    }
    sync, unary = api_pb2.FUNCTION_CALL_INVOCATION_TYPE_SYNC, api_pb2.FUNCTION_CALL_TYPE_UNARY
    call = plane.add_call(function, unary, sync)
    body = {"type": "http.request", "body": await request.read(), "more_body": False}
    call.data_in.append(
        api_pb2.DataChunk(data_format=ASGI, index=1, data=serialize_data_format(body, ASGI))
    )
    args = serialize_data_format(((scope,), {}), PICKLE)
    message = api_pb2.FunctionInput(args=args, data_format=PICKLE, method_name=method)
    await plane.add_inputs(call, [api_pb2.FunctionPutInputsItem(idx=0, input=message)])
    return call


async def _answer(call: Call, request: web.Request) -> web.StreamResponse:
    """Pass the function's response on, message by message."""
    response, seen = None, 0
    while True:
        for chunk in call.data_out[seen:]:
            seen += 1
            message = deserialize_data_format(chunk.data, chunk.data_format, None)
            if message["type"] == "http.response.start":
                response = _started(message)
                await response.prepare(request)
            elif message["type"] == "http.response.body":
                await response.write(message.get("body") or b"")
                if not message.get("more_body"):
                    await response.write_eof()
                    return response
        if call.outputs and seen >= len(call.data_out):
            return web.Response(status=500, text=call.outputs[-1].result.exception or "no response")
        await pause(call.changed, 1.0)


def _started(message: dict) -> web.StreamResponse:
    response = web.StreamResponse(status=message["status"])
    for name, value in message["headers"]:
        if name.lower() not in DROPPED:
            response.headers.add(name.decode("latin-1"), value.decode("latin-1"))
    return response
