"""What is compared on a real model, and in which order: forms of experts first, then what is tried
on the best of them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

# dense: a baseline; stack: experts and their router; expert: one expert, which reads everything
Kind = Literal["dense", "stack", "expert", "singles"]
TOTAL = "dense total"
PATH = "dense path"
ADAPTER = "adapter"
# Tokens of training that a pass over one held-out token costs
OF_A_PASS = 0.3
# and those of a search for a rate, of the training that it is for
OF_A_SEARCH = 1.1


@dataclass(frozen=True)
class Variant:
    """One row of the tables to come: what is trained for it, and what it is called."""

    name: str
    kind: Kind
    overrides: tuple[str, ...]
    taught: tuple[str, ...]
    form: str  # the rows that differ by the seed alone share it
    seed: int = 0
    made_of: str = ""  # the form of experts that a stack is made of

    @property
    def is_adapter(self) -> bool:
        """Whether one expert reads a whole text."""
        return f"expert.form={ADAPTER}" in self.overrides


@dataclass(frozen=True)
class Standing:
    """A variant that was scored, and the mean of all domains that it reached."""

    variant: Variant
    mean: float


Standings = Sequence[Standing]


# Gives None where nothing was scored that it could be made of
Maker = Callable[[Standings], Variant | None]


@dataclass(frozen=True)
class Step:
    """A variant that is known when its turn comes: some are made of the best before them."""

    key: str  # what --only names
    make: Maker
    trained: float  # tokens, in those of one expert
    passes: float = 1.0  # over all held-out text


def forms(last_third: str) -> dict[str, tuple[str, ...]]:
    """Return the forms of experts by name; `last_third` is a value of expert.layers."""
    # The router of adapters has a class of general text in any case
    base_reads = ("trunk.anchor=discard", "expert.statistics_path=own")
    adapter = (f"expert.form={ADAPTER}", *base_reads)
    low_rank = "expert.form=low_rank"
    third = f"expert.layers={last_third}"
    return {
        "full": ("expert.form=full",),
        "low rank 16": (low_rank, "expert.rank=16"),
        "low rank 64": (low_rank, "expert.rank=64"),
        "adapter 16": (*adapter, "expert.rank=16"),
        "adapter 64": (*adapter, "expert.rank=64"),
        "full, last third": ("expert.form=full", third),
        "low rank 64, last third": (low_rank, "expert.rank=64", third),
    }


# What is tried on the best form whose experts are chosen token by token
ON_TOKENS = {
    "top-2": ("router.top_k=2",),
    "no class of the base's": ("trunk.anchor=discard",),
}
# and on the best adapters, which are chosen by 16 where nothing says otherwise
PROMPTS = (64, 128)


@dataclass(frozen=True)
class Plan:
    """The steps of one benchmark."""

    domains: tuple[str, ...]
    taught: tuple[str, ...]
    seeds: int
    expert_tokens: int
    last_third: str
    general: str  # the domain of general text
    best: tuple[str, ...] = ()  # rows that other seeds are of, where earlier pages told them

    def steps(self) -> Iterator[Step]:
        """Yield the steps in their order.

        Raises ValueError for a name in `best` that none of them could have.
        """
        told = [self._named(name) for name in self.best]
        yield self._dense(TOTAL, 0, self.taught)
        yield self._dense(PATH, 0, self.taught)
        for name, overrides in forms(self.last_third).items():
            passes = 1.5 if ADAPTER in name else 1.2
            variant = Variant(name, "stack", overrides, self.taught, name, made_of=name)
            yield Step(name, _always(variant), OF_A_SEARCH * len(self.taught), passes)
        yield from self._on_the_best()
        for seed in range(1, self.seeds):
            yield self._dense(TOTAL, seed, self.taught)
            for place, word in enumerate(("best", "second")):
                trained = OF_A_SEARCH * len(self.taught)
                yield Step(f"{word} form, seed {seed}", self._again(place, seed, told), trained)
        every = len(self.domains)
        yield self._dense(TOTAL, 0, self.domains)
        # Those that were taught before are there
        yield Step("all domains taught", self._all_taught, float(every - len(self.taught)))

    def _dense(self, name: str, seed: int, taught: Sequence[str]) -> Step:
        item = name.removeprefix("dense ")
        shown = name
        if len(taught) > len(self.taught):
            shown += ", all domains taught"
        if seed:
            shown += f", seed {seed}"
        overrides = (f"seed={seed}", f"dense.baselines=[{item}]")
        form = name if len(taught) == len(self.taught) else shown
        variant = Variant(shown, "dense", overrides, tuple(taught), form, seed)
        trained = OF_A_SEARCH * (len(taught) if name == TOTAL else 1)
        return Step(shown, _always(variant), trained)

    def _on_the_best(self) -> Iterator[Step]:
        for what, overrides in ON_TOKENS.items():
            yield Step(f"best by token, {what}", self._changed(False, what, overrides), 0.0)
        router = (
            # one expert a token weighs 1 whatever its gate says, which then learns nothing
            "router.top_k=2",
            "router.steps=null",
            f"router.tokens={max(1, self.expert_tokens // 2)}",
            "router.lr=auto",
        )
        trained = self._changed(False, "top-2, trained gates", router)
        yield Step("best by token, top-2, trained gates", trained, 0.5 * OF_A_SEARCH)
        for prompt in PROMPTS:
            what = f"chosen by {prompt} tokens"
            overrides = (f"router.prompt_tokens={prompt}",)
            yield Step(f"best adapter, {what}", self._changed(True, what, overrides), 0.0, 0.2)
        yield Step("best single", self._singles, 0.0, float(len(self.taught)))
        yield Step("general text only", self._general, OF_A_SEARCH * len(self.taught))

    def _changed(self, adapter: bool, what: str, overrides: Sequence[str]) -> Maker:
        def make(standings: Standings) -> Variant | None:
            name = self._best_form(standings, adapter)
            if name is None:
                return None
            made = (*forms(self.last_third)[name], *overrides)
            shown = f"{name}, {what}"
            return Variant(shown, "stack", made, self.taught, shown, made_of=name)

        return make

    def _again(self, place: int, seed: int, told: Sequence[Variant]) -> Maker:
        def make(standings: Standings) -> Variant | None:
            found = told or self._recipes(standings)
            if place >= len(found):
                return None
            first = found[place]
            made = (*first.overrides, f"seed={seed}")
            return replace(first, name=f"{first.name}, seed {seed}", overrides=made, seed=seed)

        return make

    def _singles(self, standings: Standings) -> Variant | None:
        name = self._best_form(standings)
        if name is None:
            return None
        made = forms(self.last_third)[name]
        return Variant("best single", "singles", made, self.taught, "best single")

    def _general(self, standings: Standings) -> Variant | None:
        name = self._best_form(standings)
        if name is None:
            return None
        tokens = self.expert_tokens * len(self.taught)
        made = (*forms(self.last_third)[name], f"expert.tokens={tokens}")
        shown = f"{name} on {self.general} alone"
        return Variant(shown, "expert", made, (self.general,), shown)

    def _all_taught(self, standings: Standings) -> Variant | None:
        name = self._best_form(standings)
        if name is None:
            return None
        # no text is left that the base would be the one to read
        made = (*forms(self.last_third)[name], "trunk.anchor=discard")
        shown = f"{name}, all domains taught"
        return Variant(shown, "stack", made, self.domains, shown)

    def _best_form(self, standings: Standings, adapter: bool | None = None) -> str | None:
        """Return the form with the lowest mean as it is; of adapters alone, or of those without
        where it is told. None where none was scored."""
        known = []
        for each in standings:
            variant = each.variant
            wanted = adapter is None or adapter == variant.is_adapter
            if wanted and variant.name in forms(self.last_third):
                known.append(each)
        if not known:
            return None
        return min(known, key=lambda each: each.mean).variant.name

    def _named(self, name: str) -> Variant:
        known = forms(self.last_third)
        form, what = name, ""
        if name not in known:
            form, _, what = name.rpartition(", ")
        if form not in known or (what and what not in ON_TOKENS):
            every = ", ".join(known)
            raise ValueError(f"{name!r} is no form ({every}), nor one with {', '.join(ON_TOKENS)}")
        overrides = (*known[form], *ON_TOKENS.get(what, ()))
        return Variant(name, "stack", overrides, self.taught, name, made_of=form)

    def _recipes(self, standings: Standings) -> list[Variant]:
        """Return the best row of each form, routers and all, the best form first."""
        best: dict[str, Standing] = {}
        for each in sorted(standings, key=lambda each: each.mean):
            variant = each.variant
            if variant.made_of and not variant.seed:
                best.setdefault(variant.made_of, each)
        return [each.variant for each in best.values()]


def _always(variant: Variant) -> Maker:
    return lambda _standings: variant
