"""What each command has to leave as it was, what is aimed at, and the page that says both."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.domain_parts.scores import ByDomainScores, signed
from benchmarks.domain_parts.state import Made, State, others
from benchmarks.measuring import table

# Bits per byte that a domain may lose when another one comes, or move by when another is corrected
MOST_MOVED = 0.002
# Of the dense model's bits per byte on the domain that it alone was trained on
MOST_BEHIND = 0.05
ROUTER = "train_router"


@dataclass(frozen=True)
class Check:
    """Something that has to hold, and what was found."""

    what: str
    holds: bool
    found: str


class Page:
    """The sections so far, and what was checked in them."""

    BASE = "base"

    def __init__(self, domains: tuple[str, ...], guest: str, corrected: str):
        self.domains = domains
        self.guest = guest
        self.corrected = corrected
        self.without = f"stack of {len(domains)}"
        self.with_guest = f"stack of {len(domains) + 1}"
        self.expert = f"expert of {guest} alone"
        self.dense = f"dense on {guest}"
        self.former = f"before, on masked {corrected}"
        self.latter = f"{corrected} replaced"
        self.checks: list[Check] = []
        self.sections: list[str] = []

    @property
    def reached(self) -> bool:
        """Whether everything holds."""
        return all(check.holds for check in self.checks)

    def _check(self, what: str, holds: bool, found: str) -> None:
        self.checks.append(Check(what, bool(holds), found))

    def add_guest(
        self,
        before: State,
        after: State,
        dense: State,
        scores: ByDomainScores,
        seconds: float,
    ) -> None:
        """Take in what `add` has made, and what it scores."""
        old, new = before.made(), after.made()
        self._only(f"add {self.guest}", old, new, self.guest)
        self._same("add", old, new, self._experts(), "experts of the others")
        self._same("add", old, new, ["train_shared"], "trunk")
        tokens = [f"preprocess {name}" for name in self.domains]
        self._same("add", old, new, ["tokenizer", *tokens], "tokenizer and tokens of the others")
        lost = {}
        for name in self.domains:
            lost[name] = scores.difference(self.with_guest, self.without, name)
        worst = max(lost, key=lambda name: lost[name][0])
        self._check(
            f"aim: no other domain loses more than {MOST_MOVED} bits per byte",
            lost[worst][0] <= MOST_MOVED,
            f"most: {worst} {signed(*lost[worst])}",
        )
        own = scores.bits(self.with_guest, self.guest)
        rival = scores.bits(self.dense, self.guest)
        self._check(
            f"aim: {self.guest} within {MOST_BEHIND:.0%} of a dense model fine-tuned on it",
            own <= (1 + MOST_BEHIND) * rival,
            f"{own:.4f} against {rival:.4f}: {own / rival - 1:+.1%}",
        )
        rows = [self.BASE, self.without, self.with_guest, self.expert, self.dense]
        pairs = [(self.with_guest, self.without), (self.dense, self.BASE)]
        dense_job = dense.manifest("train_dense total")
        expert_job = after.manifest(f"train_experts {self.guest}")
        self.sections.append(
            f"## `add {self.guest}`\n\n{scores.table(rows, pairs)}\n"
            f"The dense model is the base trained on {self.guest} alone, all weights, at a rate of "
            f"{dense.cfg.dense.lr or dense.cfg.expert.lr}, {dense_job.metrics['tokens']:,} tokens "
            f"(the expert had {expert_job.metrics['tokens']:,}) in "
            f"{dense_job.made['seconds']:.0f} s.\n\n{_costs(after, others(old, new))}\n"
            f"The command took {seconds:.0f} s (less than its jobs where some were in the store "
            f"already); all {len(new)} jobs of the run of {len(self.domains) + 1} have taken "
            f"{_seconds(after, new):.0f} s.\n"
        )

    def remove_guest(self, before: State, after: State, logits: tuple[int, int]) -> None:
        """Take in what `remove` has left."""
        old, new = before.made(), after.made()
        self._same("remove", old, new, [ROUTER], "router")
        self._same("remove", old, new, list(old), "all artifacts of the run")
        count, different = logits
        self._check(
            "after `remove`: the stack's logits are bit for bit those before `add`",
            different == 0,
            f"{count:,} logits, {different:,} of them others",
        )
        self.sections.append(
            f"## `remove {self.guest}`\n\nEvery artifact has the address and the bytes, its "
            f"manifest's too, that it had before `add`: {'yes' if old == new else 'no'}.\n"
        )

    def replace(self, before: State, after: State, scores: ByDomainScores) -> None:
        """Take in what `replace` has made, and what it scores."""
        old, new = before.made(), after.made()
        self._only(f"replace {self.corrected}", old, new, self.corrected)
        rest = [job for job in self._experts() if job != f"train_experts {self.corrected}"]
        self._same("replace", old, new, [*rest, "train_shared"], "trunk and experts of the others")
        moved = {}
        for name in self.domains:
            moved[name] = scores.difference(self.latter, self.former, name)
        own = moved.pop(self.corrected)
        worst = max(moved, key=lambda name: abs(moved[name][0]))
        self._check(
            f"aim: no other column moves by more than {MOST_MOVED} bits per byte",
            abs(moved[worst][0]) <= MOST_MOVED,
            f"most: {worst} {signed(*moved[worst])}",
        )
        self._check(
            f"aim: the column of {self.corrected} gets better on the corrected text",
            own[0] < -MOST_MOVED,
            signed(*own),
        )
        rows = [self.BASE, self.former, self.latter]
        jobs = []
        for job in new:
            state = "another one" if job in others(old, new) else "the same bytes"
            jobs.append([job, state])
        self.sections.append(
            f"## `replace {self.corrected}` by its text with every number masked\n\n"
            f"{scores.table(rows, [(self.latter, self.former)])}\n"
            f"The held-out text of {self.corrected} is masked as well, in all rows.\n\n"
            f"{table(['artifact', 'after'], jobs)}\n{_costs(after, others(old, new))}"
        )

    def _experts(self) -> list[str]:
        return [f"train_experts {name}" for name in self.domains]

    def _only(self, command: str, old: dict[str, Made], new: dict[str, Made], name: str) -> None:
        """Check that a command about a domain makes its four jobs and no others."""
        wanted = [f"preprocess {name}", f"train_experts {name}", ROUTER, "evaluate"]
        made = others(old, new)
        self._check(
            f"`{command}` makes its tokens, its expert, the router and the report alone",
            sorted(made) == sorted(wanted),
            ", ".join(made) or "nothing",
        )

    def _same(
        self, command: str, old: dict[str, Made], new: dict[str, Made], jobs: list[str], what: str
    ) -> None:
        """Check that jobs have the addresses and bytes they had."""
        same = [job for job in jobs if job in old and old[job] == new.get(job)]
        told = f"{len(same)} of {len(jobs)}"
        if len(jobs) == 1 and same:
            told += f": {old[jobs[0]].address}, {old[jobs[0]].digest[:12]}"
        self._check(
            f"after `{command}` as before, address and bytes: {what}",
            len(same) == len(jobs),
            told,
        )

    def text(self) -> str:
        """Return all sections."""
        rows = []
        for check in self.checks:
            rows.append([check.what, "yes" if check.holds else "**no**", check.found])
        head = table(["what has to hold", "holds", "found"], rows)
        return "\n".join([f"## Aims and checks\n\n{head}", *self.sections])


def _seconds(state: State, jobs: Iterable[str]) -> float:
    return sum(state.manifest(job).made["seconds"] for job in jobs)


def _costs(state: State, jobs: Sequence[str]) -> str:
    """Return the table of what jobs took, as their manifests have it."""
    rows = []
    all_tokens = 0
    for job in jobs:
        manifest = state.manifest(job)
        tokens = manifest.metrics.get("tokens")
        # preprocess has them by split and domain, and trains on none
        trained = tokens if isinstance(tokens, int) else 0
        rows.append([job, f"{manifest.made['seconds']:.0f}", f"{trained:,}"])
        all_tokens += trained
    rows.append(["together", f"{_seconds(state, jobs):.0f}", f"{all_tokens:,}"])
    return table(["made", "seconds", "training tokens"], rows)
