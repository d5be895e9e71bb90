"""Jobs of the command line in the tests' own process; that they end as well in processes of their
own is shown for every stage elsewhere."""

import pytest

from pipeline.errors import PipelineError
from pipeline.protocols import quiet
from pipeline.run.backend import Local
from pipeline.run.job import run_job


def in_this_process(local, stage, cfg, items):
    """Do jobs as Local does, in no processes of their own; return the errors of those that fail."""
    failed = {}
    for item in items:
        try:
            run_job(stage, cfg, local.store, item, progress=quiet)
        except PipelineError as error:
            failed[item] = error
    return failed


@pytest.fixture(scope="module", autouse=True)
def quick():
    """In a module that takes it: commands do their jobs here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Local, "run_jobs", in_this_process)
        yield
