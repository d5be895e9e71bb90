"""`watch` of experiments: the runs of all their trials as one, each job once."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from ...store import in_use
from ...store.artifacts import Store
from ...store.roots import Root, readable_roots
from ..experiments.trials import trial_label
from ..stages import STAGES
from .positions import DONE, Look, Position, jobs_of, position_of, with_times


def trials_of(store: Store, name: str | None) -> list[Root]:
    """Return the runs of the trials that somebody means: of experiments of a name, else of those
    that the run in progress is of; none where it is no such name or run. Raises UnreadableFile,
    DamagedArtifact."""
    used = in_use.addresses(store)
    roots = readable_roots(store)
    going = [root for root in roots if set(root.addresses) <= used]
    if name is None and going:
        name = going[0].experiments
    of_name = [root for root in roots if name and root.experiments == name]
    # What a file said before it was changed is not gone on with
    return [root for root in of_name if root in going] or of_name


def looks_at(
    store: Store, trials: Sequence[Root], usual: Mapping[str, float], clock: Callable[[], float]
) -> Callable[[], Look]:
    """Return what looks at trials: how far each job is, once, whichever they share."""
    name = trials[0].experiments
    jobs = {root.id: jobs_of(root, store) for root in trials}
    # Of what is done nothing changes, and its history is long
    done: dict[str, Position] = {}

    def looked() -> Look:
        used = in_use.addresses(store)
        now_s = clock()
        found: dict[str, Position] = {}
        for root in trials:
            going = set(root.addresses) <= used
            own = []
            for job in jobs[root.id]:
                position = done.get(job[2]) or found.get(job[2])
                if position is None:
                    position = position_of(store, job, going, now_s)
                    seed = root.settings.get("seed", 0)
                    position = replace(position, of=trial_label(name, root.name, seed))
                own.append(position)
            # By its siblings of the same trial: another's models may be a hundred times as large
            for each in with_times(own, usual):
                found[each.address] = each
                if each.state == DONE:
                    done[each.address] = each
        ordered = sorted(found.values(), key=lambda each: STAGES.index(each.stage))
        return Look(name, tuple(ordered), any(set(root.addresses) <= used for root in trials))

    return looked
