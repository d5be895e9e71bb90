"""Containers without their imports: a process that has imported what every container imports starts
each as a copy of itself.

Of a container's five seconds of processor time four go into libraries of others; the app's own code
and Modal's are imported in the container, in its file system. Run as a program, with a socket's
number: on it come a spec's path (see namespace.py) and two pipes, and go pids and exit codes.
"""

import asyncio
import atexit
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import threading
from pathlib import Path

from tests.loopback_modal.namespace import dies_with_parent, enter

# What they read of the environment while they are imported, they must find there as a container has
# it: a nursery is for containers of one such environment.
READ_AT_IMPORT = ("CUDA_", "HF_", "LANG", "LD_", "OMP_", "TOKENIZERS_", "TRANSFORMERS_")
# None of what is here starts a thread, which a copy would not have, or is of Modal.
LIBRARIES = (
    *("google.protobuf.message", "grpclib.client", "pydantic", "rich.console", "jinja2"),
    *("scipy.stats", "torch", "torch.utils.flop_counter", "bitsandbytes", "peft", "rapidfuzz"),
    "transformers.models.qwen3.modeling_qwen3",
    "transformers.models.qwen3_vl.modeling_qwen3_vl",
)
MESSAGE_BYTES = 4096
FIRST_FREE = 3  # the descriptor after standard error


class Container:
    """A started one, as asyncio's own Process has it."""

    def __init__(
        self, pid: int, stdout: asyncio.StreamReader, stderr: asyncio.StreamReader
    ) -> None:
        self.pid = pid
        self.stdout = stdout
        self.stderr = stderr
        self.returncode: int | None = None
        self._ended = asyncio.Event()

    def end(self, code: int) -> None:
        """Take note of how it ended."""
        self.returncode = code
        self._ended.set()

    async def wait(self) -> int | None:
        """Wait for its end; return the exit code, negative for a signal's number."""
        await self._ended.wait()
        return self.returncode


class Nursery:
    """The process as its server sees it; `start` makes one."""

    def __init__(self, process: asyncio.subprocess.Process, own: socket.socket) -> None:
        self._process = process
        self._own = own
        self._one_at_a_time = asyncio.Lock()
        self._started: asyncio.Queue[int | None] = asyncio.Queue()
        self._containers: dict[int, Container] = {}
        self._listener = asyncio.ensure_future(self._listen())

    @classmethod
    async def start(cls, variables: dict[str, str]) -> "Nursery":
        """Start one for containers of these variables."""
        own, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        own.setblocking(False)
        root = Path(__file__).parents[2]
        with other:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-m", "tests.loopback_modal.nursery", str(other.fileno())),
                cwd=root,
                env=dict(os.environ) | variables | {"PYTHONPATH": str(root)},
                pass_fds=[other.fileno()],
                stdin=asyncio.subprocess.DEVNULL,
            )
        return cls(process, own)

    async def launch(self, spec: Path) -> Container:
        """Start a container that a file describes."""
        out, out_end = os.pipe()
        err, err_end = os.pipe()
        try:
            # whose pid comes next is whose was asked for last
            async with self._one_at_a_time:
                socket.send_fds(self._own, [os.fsencode(spec)], [out_end, err_end])
                pid = await self._started.get()
            if pid is None:
                raise RuntimeError("what starts containers has ended")
        finally:
            os.close(out_end)
            os.close(err_end)
        container = Container(pid, await _reader(out), await _reader(err))
        self._containers[pid] = container
        return container

    async def _listen(self) -> None:
        loop = asyncio.get_running_loop()
        while message := await loop.sock_recv(self._own, MESSAGE_BYTES):
            told = json.loads(message)
            if "started" in told:
                self._started.put_nowait(told["started"])
                continue
            while told["ended"] not in self._containers:
                # it ended before `launch` had its pipes open
                await asyncio.sleep(0.01)
            self._containers.pop(told["ended"]).end(told["code"])
        # its containers end with it
        for container in self._containers.values():
            container.end(-signal.SIGKILL)
        self._started.put_nowait(None)


def of_imports(variables: dict[str, str]) -> dict[str, str]:
    """Return those of a container's variables that libraries read while they are imported."""
    return {name: value for name, value in variables.items() if name.startswith(READ_AT_IMPORT)}


async def _reader(descriptor: int) -> asyncio.StreamReader:
    """Return the end of a pipe to read from."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(descriptor, "rb")
    )
    return reader


def _serve(asked: socket.socket) -> dict | None:
    """Start containers until nobody asks any more; in each of them, return its spec."""
    living: dict[int, int] = {}  # by the descriptor that tells its end
    waiting = select.poll()
    waiting.register(asked, select.POLLIN)
    while True:
        for descriptor, _ in waiting.poll():
            if descriptor in living:
                pid = living.pop(descriptor)
                waiting.unregister(descriptor)
                os.close(descriptor)
                _, status = os.waitpid(pid, 0)
                _tell(asked, ended=pid, code=os.waitstatus_to_exitcode(status))
                continue
            path, pipes, _, _ = socket.recv_fds(asked, MESSAGE_BYTES, 2)
            if not path:
                return None
            ready, ready_end = os.pipe()
            pid = os.fork()
            if not pid:
                os.setsid()
                os.write(ready_end, b".")
                for number, pipe in enumerate(pipes, 1):
                    os.dup2(pipe, number)
                asked.detach()
                os.closerange(FIRST_FREE, os.sysconf("SC_OPEN_MAX"))
                return json.loads(Path(os.fsdecode(path)).read_text("utf-8"))
            # Who is told the pid may signal its group at once
            os.read(ready, 1)
            for each in (ready, ready_end, *pipes):
                os.close(each)
            end = os.pidfd_open(pid)
            living[end] = pid
            waiting.register(end, select.POLLIN)
            _tell(asked, started=pid)


def _tell(asked: socket.socket, **what: int) -> None:
    asked.send(json.dumps(what).encode())


def _become(spec: dict) -> None:
    """Run a container in this process, as a fresh Python would that had its environment."""
    dies_with_parent()
    if spec["mode"] != "plain":
        enter(spec)
    os.chdir(spec["cwd"])
    os.environ.clear()
    os.environ.update(spec["env"])
    sys.dont_write_bytecode = True
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(write_through=True)
    own = sys.modules.pop("tests")
    for name in [name for name in sys.modules if name.startswith("tests.")]:
        del sys.modules[name]
    # its folder may be one that the container does not see
    root = str(Path(own.__path__[0]).parent)
    libraries = [path for path in sys.path if path not in ("", root)]
    sys.path[:] = [spec["cwd"], *spec["env"]["PYTHONPATH"].split(":"), *libraries]
    (_python, _m, module), sys.argv = spec["argv"], spec["argv"][2:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _end() -> None:
    """End as Python does, but for taking down one module after another, of which each container
    would have a copy first."""
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(0)


def main() -> None:
    """Import, then start containers for as long as somebody holds the other end."""
    dies_with_parent()
    # A terminal sends it to all; the server ends its containers itself
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Nothing of it is garbage
    gc.disable()
    for name in LIBRARIES:
        importlib.import_module(name)
    # A container that collects would look through all of it, and so have a copy of its own
    gc.freeze()
    gc.enable()
    # Volumes are folders of this machine, which goes on when a container is killed
    os.fsync = lambda _handle: None
    spec = _serve(socket.socket(fileno=int(sys.argv[1])))
    if spec is not None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _become(spec)
        _end()


if __name__ == "__main__":
    main()
