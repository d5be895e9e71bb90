"""One model, three servers: what do many clients get of ours, of transformers' and of llama.cpp's?

python -m benchmarks.serve_peers BUNDLE --gguf MODEL.gguf --out benchmarks/serve_peers_epyc_DATE.md

BUNDLE is what `deploy` writes, a stock checkpoint as well, and the GGUF file what `export --format
gguf --dtype bf16` (as --dtype is here) makes of the same stack; that all say the same is looked at
first. All three answer /v1/completions over HTTP on one thread each; the same clients ask them in
turns, one text after another, and read it as a stream, and whoever is not asked is stopped. Claims
are ratios within a round. A peer whose package is absent is left out. The exit status is 1 where a
request failed.
"""

import argparse
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.measuring import ROOT, finish, hardware, percentiles, progress, table

CLIENTS = (1, 4, 16)
NEW_TOKENS = (16, 32, 64)
PROMPT_CHARACTERS = (20, 100, 400)
SECONDS = 15.0
PATIENCE_S = 300.0
ENDING_S = 30.0
LIKENED = 8  # texts that all are asked for before anything is timed
LIKENED_TOKENS = 12  # of each: rounding decides between likely tokens sooner or later
# What products run in, as each server has it
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
# llama.cpp's server as a process of its own; slots as many as there are clients
LLAMA = """
import sys, time
import xllamacpp
given = xllamacpp.CommonParams()
given.model.path = sys.argv[1]
given.port = int(sys.argv[2])
given.n_parallel = int(sys.argv[3])
given.n_ctx = 512 * given.n_parallel
given.cpuparams.n_threads = given.cpuparams_batch.n_threads = int(sys.argv[4])
given.fit_params = False
# no prompt comes twice, and neither of the others keeps what it has read
given.cache_prompt = False
given.cache_ram_mib = 0
given.verbosity = -1
server = xllamacpp.Server(given)
while True:
    time.sleep(3600)
"""


@dataclass
class Turn:
    """What so many clients had of one server for some seconds."""

    seconds: float = 0.0
    tokens: int = 0
    first_s: list[float] = field(default_factory=list)
    failed: int = 0

    @property
    def rate(self) -> float:
        """Tokens a second, over all clients."""
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Peer:
    """A server that runs: its name, address, the model's name there, and its process."""

    name: str
    address: str
    model: str
    process: subprocess.Popen

    @property
    def resident_mb(self) -> float:
        """Memory of the process that is resident, in MB."""
        return psutil.Process(self.process.pid).memory_info().rss / 1e6

    @contextmanager
    def alone(self, peers: "Sequence[Peer]") -> Iterator[None]:
        """Have the others stand still: a server that waits may look for work all the time."""
        others = [psutil.Process(each.process.pid) for each in peers if each is not self]
        for other in others:
            other.suspend()
        try:
            yield
        finally:
            for other in others:
                other.resume()


def texts(draw: random.Random) -> Iterator[str]:
    """Yield beginnings of texts, cut from this project's own pages."""
    pages = [path.read_text("utf-8") for path in sorted((ROOT / "docs").glob("*.md"))]
    while True:
        page = draw.choice(pages)
        length = draw.choice(PROMPT_CHARACTERS)
        start = draw.randrange(max(1, len(page) - length))
        yield page[start : start + length]


def turn(peer: Peer, clients: int, seconds: float, seed: int) -> Turn:
    """Let so many clients ask a server for so long; every server is asked the same, and nothing
    twice."""
    found = Turn()
    lock = threading.Lock()
    until = time.monotonic() + seconds

    def client(number: int) -> None:
        draw = random.Random(f"{seed}, {clients}, {number}")
        prompts = texts(draw)
        # a connection for each request: llama.cpp's server ends one that is kept while the next
        # request comes
        unkept = httpx.Limits(max_keepalive_connections=0)
        with httpx.Client(base_url=peer.address, timeout=PATIENCE_S, limits=unkept) as http:
            while time.monotonic() < until:
                body = {
                    "model": peer.model,
                    "prompt": next(prompts),
                    "max_tokens": draw.choice(NEW_TOKENS),
                    "temperature": 0,
                    "stream": True,
                    "stream_options": {"include_usage": True},
                }
                asked = time.monotonic()
                try:
                    first, tokens = _streamed(http, body)
                except (httpx.HTTPError, ValueError) as error:
                    # a client whose request fails asks again, as the others go on asking too
                    progress(f"a request to {peer.name} failed: {error}")
                    first, tokens = None, 0
                with lock:
                    found.tokens += tokens
                    found.failed += first is None
                    if first is not None:
                        found.first_s.append(first - asked)

    started = time.monotonic()
    threads = [threading.Thread(target=client, args=(at,)) for at in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found.seconds = time.monotonic() - started
    if not found.tokens:
        raise SystemExit(f"{peer.name} gave {clients} clients no token in {found.seconds:.0f} s")
    return found


def likened(peers: Sequence[Peer]) -> dict[str, str]:
    """Return of how many texts each server goes on as the first one does, greedily."""
    prompts = texts(random.Random(-1))
    asked = [next(prompts) for _ in range(LIKENED)]
    said = {}
    for peer in peers:
        progress(f"asking {peer.name} for {LIKENED} texts")
        said[peer.name] = [_whole(peer, prompt) for prompt in asked]
    ours = said[peers[0].name]
    out = {}
    for name, theirs in said.items():
        alike = sum(own == other for own, other in zip(ours, theirs, strict=True))
        out[name] = f"{alike} of {LIKENED}"
    return out


def _whole(peer: Peer, prompt: str) -> str:
    body = {
        "model": peer.model,
        "prompt": prompt,
        "max_tokens": LIKENED_TOKENS,
        "temperature": 0,
    }
    answer = httpx.post(peer.address + "/v1/completions", json=body, timeout=PATIENCE_S)
    answer.raise_for_status()
    return str(answer.json()["choices"][0]["text"])


def _streamed(http: httpx.Client, body: dict[str, Any]) -> tuple[float | None, int]:
    """Return when the first piece of a text came, and how many tokens there were. Raises
    httpx.HTTPError, ValueError for a text that ended with an error."""
    first, pieces, told = None, 0, None
    with http.stream("POST", "/v1/completions", json=body) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            if not line.startswith("data:") or line.endswith("[DONE]"):
                continue
            event = json.loads(line.removeprefix("data:"))
            if event.get("error"):
                raise ValueError(str(event["error"]))
            if event.get("usage"):
                told = event["usage"].get("completion_tokens")
            if event.get("choices"):
                first = first or time.monotonic()
                pieces += 1
    return first, told or pieces


def free_port() -> int:
    """Return a port that nothing listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextmanager
def running(
    name: str, command: Callable[[int], Sequence[str]], model: str, threads: int
) -> Iterator[Peer]:
    """Start a server, and give it once it has answered a request."""
    port = free_port()
    env = os.environ | dict.fromkeys(THREADS, str(threads)) | {"CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        command(port), cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    peer = Peer(name, f"http://127.0.0.1:{port}", model, process)
    try:
        _wait(peer)
        yield peer
    finally:
        process.terminate()
        try:
            process.wait(ENDING_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(peer: Peer) -> None:
    body = {"model": peer.model, "prompt": "The", "max_tokens": 4, "temperature": 0}
    until = time.monotonic() + PATIENCE_S
    last = ""
    while time.monotonic() < until:
        if peer.process.poll() is not None:
            raise SystemExit(f"{peer.name} ended with {peer.process.returncode}")
        try:
            answer = httpx.post(peer.address + "/v1/completions", json=body, timeout=PATIENCE_S)
        except httpx.TransportError as error:
            last = str(error)
        else:
            if answer.status_code == 200:
                return
            last = answer.text[:300]
        time.sleep(0.5)
    raise SystemExit(f"{peer.name} does not answer: {last}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit status: 1 where a request got no text."""
    args = _arguments(argv)
    most = max(args.clients)
    turns: dict[tuple[str, int], list[Turn]] = {}
    with ExitStack() as servers:
        peers = []
        for name, command, model in _commands(args, most):
            progress(f"starting {name}")
            peers.append(servers.enter_context(running(name, command, model, args.threads)))
        alike = likened(peers)
        for at in range(args.rounds):
            # nobody is always the first one
            first = at % len(peers)
            for clients in args.clients:
                for peer in (*peers[first:], *peers[:first]):
                    progress(f"round {at + 1} of {args.rounds}: {clients} clients, {peer.name}")
                    with peer.alone(peers):
                        found = turn(peer, clients, args.seconds, at)
                    turns.setdefault((peer.name, clients), []).append(found)
        memory = {peer.name: peer.resident_mb for peer in peers}
    finish(
        args,
        "serve_peers",
        "Serving one model beside transformers and llama.cpp",
        _shown(args, turns, memory, alike),
        f"{NOTES} Products of ours and of transformers' run in {args.dtype}"
        f"{f'; llama.cpp reads {args.gguf.name}' if args.gguf else ''}.",
        hardware(args.threads, ("torch", "transformers", "xllamacpp", "fastapi")),
    )
    return int(any(each.failed for of_one in turns.values() for each in of_one))


def _commands(
    args: argparse.Namespace, most: int
) -> Iterator[tuple[str, Callable[[int], list[str]], str]]:
    folder = str(args.bundle.resolve())
    python = sys.executable

    def ours(port: int) -> list[str]:
        words = ["serve", "--bundle", folder, "--port", str(port), "--dtype", args.dtype]
        return [python, "-m", "pipeline", *words]

    def theirs(port: int) -> list[str]:
        words = ["serve", folder, "--port", str(port), "--host", "127.0.0.1", "--device", "cpu"]
        # it takes most of the machine's memory for its cache otherwise
        words += ["--continuous-batching", "--cb-max-memory-percent", "0.1"]
        words += ["--dtype", DTYPES[args.dtype]]
        return [str(Path(python).parent / "transformers"), *words]

    def llama(port: int) -> list[str]:
        words = [str(args.gguf.resolve()), str(port), str(most), str(args.threads)]
        return [python, "-c", LLAMA, *words]

    model = json.loads((args.bundle / "experts.json").read_text("utf-8"))["run"]
    yield OURS, ours, model
    if args.transformers:
        yield "transformers serve", theirs, folder
    if args.gguf and find_spec("xllamacpp"):
        yield "llama.cpp", llama, "any"


OURS = "MoleForge"


def _shown(
    args: argparse.Namespace,
    turns: dict[tuple[str, int], list[Turn]],
    memory: dict[str, float],
    alike: dict[str, str],
) -> str:
    lines = []
    for name in memory:
        alone = turns[name, args.clients[0]]
        for clients in args.clients:
            found = turns[name, clients]
            ours = turns[OURS, clients]
            beside = [each.rate / own.rate for each, own in zip(found, ours, strict=True)]
            more = [each.rate / one.rate for each, one in zip(found, alone, strict=True)]
            first = [second for each in found for second in each.first_s]
            lines.append(
                [
                    name,
                    f"{clients}",
                    f"{statistics.median(each.rate for each in found):.1f}",
                    f"{statistics.median(more):.2f}",
                    f"{statistics.median(beside):.2f}",
                    percentiles(first, 1e3),
                    f"{sum(each.failed for each in found)}",
                    f"{memory[name]:,.0f}",
                    alike[name],
                ]
            )
    heads = [
        "server",
        "clients",
        "tokens/s",
        "times its one client's",
        "times ours",
        "first token, p50 / p95 ms",
        "failed",
        "resident MB",
        "texts as ours",
    ]
    return table(heads, lines)


NOTES = (
    "All servers hold the model at once; one is asked at a time, the others are stopped meanwhile. "
    "Texts are greedy, and no prompt comes twice. Rates are medians over rounds, of all clients "
    "together, by the clock on the wall; ratios are medians of the rounds' own. A stream's tokens "
    f"are those that its usage tells, else its pieces. Texts as ours: of {LIKENED} greedy ones of "
    f"{LIKENED_TOKENS} tokens, asked for before, those that are equal to the last letter. "
    "transformers' server has a tenth of the machine's memory for its cache from the start."
)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--gguf", type=Path, help="the same stack for llama.cpp; none: left out")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="fp32", help="of products, ours and transformers'"
    )
    parser.add_argument(
        "--transformers",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="ask transformers' server too (default: yes)",
    )
    parser.add_argument("--clients", type=int, nargs="+", default=list(CLIENTS))
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of a turn (default: 15)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of each server (default: 1)")
    parser.add_argument("--out", type=Path)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
