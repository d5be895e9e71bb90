"""Which trials of a sweep failed, told in the end; a laptop that has no torch asks it too."""

from ...errors import TrialsFailed
from ...report.schema.experiments import ExperimentResults


def refuse_failed(results: ExperimentResults) -> None:
    """Raise TrialsFailed where trials have no model or no score. Those that a search ended are as
    they should be, and so are values of its space that describe no run: no other try mends them."""
    runs = [(each.name, run) for each in results.trials for run in each.runs]
    failed = {}
    for name, run in runs:
        is_chosen = run.state == "pruned" or not run.address
        why = "" if is_chosen else run.error or run.unmeasured
        if why:
            failed[f"{name} seed {run.seed}"] = why
    if failed:
        raise TrialsFailed(len(runs), failed)
