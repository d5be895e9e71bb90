"""One section in this fresh process: `python -m benchmarks.gpu_parts PLACE JSON` prints its rows,
each a line of JSON as soon as it is there."""

import json
import sys
from importlib import import_module

from benchmarks.gpu_parts import Setup


def main(place: str, text: str) -> None:
    """Run a function of a section and print what it yields."""
    setup = Setup(**json.loads(text))
    setup.folder.mkdir(parents=True, exist_ok=True)
    module, _, name = place.partition(".")
    function = getattr(import_module(f"benchmarks.gpu_parts.{module}"), name)
    for row in function(setup):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
