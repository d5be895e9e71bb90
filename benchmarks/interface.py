"""Requests made up from the interface's own description, at each of its addresses: none fails, and
none is answered in a way that is not described.

python -m benchmarks.interface --bundle DIR --calls 2000

Schemathesis makes them up, half as the description has them and half not. A fault is printed with
its request, and ends it with 1. Addresses that take a body have equal parts of the calls; the
others are asked as often as there is something new to ask.
"""

import argparse
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import schemathesis
import uvicorn
from hypothesis import HealthCheck, given, settings
from hypothesis import seed as seeded
from hypothesis.errors import Unsatisfiable
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi.checks import (
    allow_header_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from benchmarks.measuring import table
from pipeline.serve.app import create

# Not those that want every described request to be answered: lengths, pictures and models that are
# not there are refused, which no description of types can say.
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    allow_header_conformance,
]
MODES = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
PATIENCE_S = 60

Asked = Counter[tuple[str, int]]


def ask(address: str, calls: int, seed: int = 0) -> Asked:
    """Return how often each address answered with each status, over at least so many requests.
    Raises what schemathesis finds wrong."""
    found: Asked = Counter()
    schema: Any = schemathesis.openapi.from_url(f"{address}/openapi.json")
    operations = [each.ok() for each in schema.get_all_operations()]
    rounds = 0
    while found.total() < calls:
        with_body = [each for each in operations if each.body or not rounds]
        left = calls - found.total()
        each_calls = max(1, -(-left // (len(with_body) * len(MODES))))
        for operation in with_body:
            for mode in MODES:
                _ask(operation, mode, each_calls, seed + rounds, found)
        rounds += 1
    return found


def _ask(operation: Any, mode: GenerationMode, calls: int, seed: int, found: Asked) -> None:
    """Ask an address so often, or as often as there is something new to ask."""

    @seeded(seed)
    @settings(
        max_examples=calls, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def every(case: Case) -> None:
        answer = case.call_and_validate(checks=CHECKS, timeout=PATIENCE_S)
        found[operation.label, answer.status_code] += 1

    # An address without parameters has nothing that could be otherwise than described.
    with suppress(Unsatisfiable):
        every()


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a bundle in a thread; yields its address."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(create(folder), log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            while not server.started and thread.is_alive():
                time.sleep(0.01)
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def main(arguments: list[str] | None = None) -> int:
    """Ask a bundle, and print how often it answered how."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    with served(args.bundle) as address:
        try:
            found = ask(address, args.calls, args.seed)
        except FailureGroup as failures:
            for failure in failures.exceptions:
                print(failure)
            return 1
    rows = [[label, str(status), str(count)] for (label, status), count in sorted(found.items())]
    print(table(["address", "status", "answers"], rows))
    print(f"{found.total()} calls")
    return 0


if __name__ == "__main__":
    sys.exit(main())
