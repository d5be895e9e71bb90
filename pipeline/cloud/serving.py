"""What a container of the endpoint does before it answers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config.serving import ServeConfig
from ..errors import PipelineError
from ..run.advice import sentence
from .containers import ModalEdge, draw_anew
from .endpoint import KEY, served
from .wiring import Wiring


def application(root: Path, wiring: Wiring, edge: ModalEdge, environ: Mapping[str, str]) -> Any:
    """Open the bundle that a deployment serves and return what answers. Raises PipelineError whose
    text has the command that mends it: the log of the container is all that anybody sees."""
    # Only here, as nothing else of this folder has a use for it
    from ..serve import app as serving

    if wiring.snapshots:
        # Every container would draw the same numbers as the others
        draw_anew()
    key = environ.get(KEY)
    try:
        folder = served(root, key, wiring.entered, wiring.bundle)
        wanted = ServeConfig.model_validate_json(wiring.serve)
        return serving.create(folder, wanted=wanted, access=serving.behind_a_proxy(key))
    except PipelineError as error:
        raise PipelineError(sentence(error, edge)) from None
