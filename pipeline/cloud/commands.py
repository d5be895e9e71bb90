"""What is typed behind `modal run modal_app.py::`: the laptop's side of every command. Modal reads
the flags from the signatures here.

Invariant: nothing is started before what was typed is checked, planned and within its limit.
"""

import shlex
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from .. import report
from ..config.run import RunConfig
from ..credentials import masked
from ..errors import PipelineError
from ..families.load import load, parse
from ..report.narrow import output
from ..run.advice import sentence
from ..run.experiments.failures import refuse_failed
from ..run.experiments.reading import read_experiments
from ..run.stages import ROWS, RUN, STAGES, about, has_several_jobs
from ..store.room import writing
from .client import settled, show_report, show_results
from .command import named
from .containers import UNNAMED, JobResult, ModalEdge
from .endpoint import WAYS, entered
from .experiments import FarSweep, planned_sweep
from .far import Far, FarCall, FarError, FarStore
from .given import DEFAULT, EXPERIMENTS, Given, overrides, shipped
from .ledger import show_costs
from .next_step import Typed, after_stages, deploying
from .plan_table import show_cuda
from .planning import Wish, planned_run, plans_here
from .prices import Prices
from .running_costs import storage_told, tending_told
from .tending import Tended
from .watching import Following, follow_all, watch

CONFIG = "MOLEFORGE_CONFIG"  # names the configuration of a plain `modal deploy`
TELL_EVERY_S = 60.0  # how far all of a run is, to who waits for it
ON_FROM_THERE = "the same command goes on from there"


def named_as(function: Callable, name: str, text: str) -> Callable:
    """Return a function under that name, with that text: Modal takes the name of a command and of
    what a container does from it."""
    function.__name__ = name
    function.__qualname__ = name
    function.__doc__ = text
    return function


class Commands:
    """The commands of an app: `cfg` is the run that the one which was typed is about, `environ` are
    the variables where that was, `cuda` is what the locked torch brings, "" where nobody says."""

    def __init__(
        self,
        far: Far,
        cfg: RunConfig,
        prices: Path,
        argv: list[str],
        environ: Mapping[str, str],
        cuda: str = "",
    ) -> None:
        self.far = far
        self.cfg = cfg
        self.edge = ModalEdge(Path(far.mount), cfg.modal.volume or UNNAMED)
        self.environ = environ
        self._prices = prices
        self._argv = argv
        self._cuda = cuda

    @property
    def typed(self) -> Typed:
        """What was typed."""
        return Typed(tuple(self._argv))

    def entrypoints(self) -> dict[str, Callable]:
        """Return the commands by name."""
        found = {stage: self.of_stage(stage) for stage in STAGES}
        for command in (
            *(self.run_all, self.test, self.experiments, self.runs, self.status, self.watch),
            *(self.history, self.versions, self.rollback, self.prune, self.rm),
        ):
            found[command.__name__] = command
        return found

    def of_stage(self, stage: str) -> Callable:
        """Return the command of a stage; only one that may have several jobs has the flag that says
        how they share containers."""
        before: dict[str, None] = {}
        for row in ROWS[stage].values():
            before |= dict.fromkeys(row.after)
        stages = (*before, stage)

        def several(
            config: str = DEFAULT,
            override: str = "",
            input: str = "",
            checkpoint: str = "",
            bucket: str = "",
            sequential: bool = False,
            frozen: bool = False,
            output_dir: str = "",
        ):
            given = Given(config, override, input, checkpoint, bucket)
            self.do(stages, given, sequential, frozen, output_dir=output_dir)

        def single(
            config: str = DEFAULT,
            override: str = "",
            input: str = "",
            checkpoint: str = "",
            bucket: str = "",
            frozen: bool = False,
            output_dir: str = "",
        ):
            given = Given(config, override, input, checkpoint, bucket)
            self.do(stages, given, frozen=frozen, output_dir=output_dir)

        text = f"Do {stage} on Modal: {about(stage)}."
        if before:
            text += f" Does {', '.join(before)} first where it is missing."
        return named_as(several if has_several_jobs(stage) else single, stage, text)

    def run_all(
        self,
        config: str = DEFAULT,
        override: str = "",
        input: str = "",
        checkpoint: str = "",
        bucket: str = "",
        sequential: bool = False,
        frozen: bool = False,
        deploy: bool = False,
    ):
        """Do every stage of a run on Modal; what is on the volume is not done again. With --deploy
        the bundle too, and deploy an endpoint for it."""
        given = Given(config, override, input, checkpoint, bucket)
        self.do((), given, sequential, frozen, deploy)

    def test(
        self,
        config: str = DEFAULT,
        override: str = "",
        input: str = "",
        checkpoint: str = "",
        bucket: str = "",
        output_dir: str = "",
    ):
        """Report on a few rows of what is held out, with the dense baselines that are there:
        whether the stack works at all. A report of its own, which decides nothing."""
        changes = " ".join(["modal.missing_baselines=skip", override]).strip()
        given = Given(config, changes, input, checkpoint, bucket, smoke=True)
        full = replace(given, override=override, smoke=False)
        self.do(("evaluate",), given, output_dir=output_dir, follows=("evaluate", full))

    def do(
        self,
        stages: tuple[str, ...],
        given: Given,
        sequential: bool = False,
        frozen: bool = False,
        deploy: bool = False,
        output_dir: str = "",
        follows: tuple[str, Given] | None = None,
    ) -> None:
        """Plan, check the limit, hand over to `orchestrate`, wait, show; exit with 1 when a job
        failed. No stages: all of a run, with `deploy` its bundle too, which is then deployed.
        `follows`: the command that comes next, where that is not the next stage."""
        console = output()
        with self._told():
            prices = Prices.load(self._prices)
            cfg = named(load(given.path, given.changes()), self.environ)
            if deploy and not entered(cfg.modal):
                sys.exit(f"error: nobody said how the endpoint is entered: {WAYS}")
            cfg = settled(cfg, prices, console.print)
            whole = [name for name in RUN if name in cfg.stages]
            wanted = stages or (*whole, *(["deploy"] if deploy else []))
            show_cuda(cfg, wanted, prices, self._cuda, console)
            wish = self._planned(Wish(cfg, wanted, sequential, frozen), prices, console)
            again = self.typed.again(given)
        raw = wish.cfg.model_dump(mode="json")
        run = uuid.uuid4().hex
        handed = (raw, list(wish.stages), sequential, again, frozen, run, wish.expected)
        results: list[JobResult] = self._ended("orchestrate", again, *handed, name=cfg.name)
        show_results(results, console)
        with self._told():
            show_report(results, self.far.read, console)
            show_costs(run, self.far.names, self.far.read, prices, console)
        if any(result.error for result in results):
            sys.exit(1)
        if output_dir:
            self._copy(results, wanted[-1], Path(output_dir))
        if deploy:
            # Another configuration is about another endpoint; what this run says is in the note
            environ = {name: self.environ[name] for name in self.environ if name != CONFIG}
            self._deploy(environ)
        with self._told():
            name, following = follows or ("", given)
            if name:
                self._next(self.typed.command(name, *following.words()))
                return
            self._next(after_stages(self.typed, wish.cfg, wish.stages, following, self.environ))

    def _planned(self, wish: Wish, prices: Prices, console: Console) -> Wish:
        """Show the plan of a command; return what it comes to. Raises PipelineError."""
        if plans_here():
            with tempfile.TemporaryDirectory() as folder:
                far = FarStore(self.far.names, self.far.read, self.far.mount, Path(folder))
                return planned_run(wish, prices, far, console)
        self._tell_of_no_torch(console)
        raw = wish.cfg.model_dump(mode="json")
        given = (raw, wish.stages, wish.sequential, wish.frozen, prices)
        answer = self.far.begin("plan", *given).get()
        self._show(answer.printed, answer.wrong)
        cfg = parse(answer.raw)
        return Wish(cfg, answer.stages, wish.sequential, wish.frozen, answer.expected)

    def _tell_of_no_torch(self, console: Console) -> None:
        console.print("there is no torch here, so a container makes the plan", highlight=False)

    def _copy(self, results: list[JobResult], stage: str, folder: Path) -> None:
        """Copy what a stage came to; exit with 1 when that fails."""
        with self._told():
            for result in results:
                if result.stage == stage:
                    self.far.copy(f"artifacts/{result.address}", folder)
                    sys.stdout.write(f"copied: {folder / result.address}\n")

    def experiments(
        self,
        config: str = EXPERIMENTS,
        override: str = "",
        frozen: bool = False,
        text_only: bool = False,
        output_dir: str = "",
    ):
        """Do the trials of an experiments file on Modal, all jobs of a stage side by side; what is
        on the volume is not done again. With --text-only nothing is trained, and durations in
        epochs can be priced afterwards."""
        console = output()
        with self._told():
            prices = Prices.load(self._prices)
            read = read_experiments(Path(shipped(config)), overrides(override))
            wish = FarSweep.of(read, text_only)
            show_cuda(self.cfg, self.cfg.stages, prices, self._cuda, console)
            if plans_here():
                with tempfile.TemporaryDirectory() as folder:
                    names, mount = self.far.names, self.far.mount
                    far = FarStore.asked_once(names, self.far.read, mount, Path(folder))
                    sweep, costs = planned_sweep(wish, self.cfg, prices, far, console)
            else:
                self._tell_of_no_torch(console)
                raw = self.cfg.model_dump(mode="json")
                answer = self.far.begin("plan_sweep", wish, raw, prices).get()
                self._show(answer.printed, answer.wrong)
                sweep, costs = answer.sweep, answer.expected
        again = self.typed.again(Given(config, override))
        run = uuid.uuid4().hex
        results, wrong = self._ended("conduct", again, sweep, again, frozen, run, costs)
        with self._told():
            show_costs(run, self.far.names, self.far.read, prices, console)
        self._show("", wrong)
        found = report.ExperimentResults.model_validate_json(results)
        report.show_experiments(found, console)
        place = f"experiments/{read.name}"
        volume = self.cfg.modal.volume
        if not output_dir:
            self._next(f"modal volume get {volume} {place} .")
        else:
            with self._told():
                self.far.copy(place, Path(output_dir))
            self._next(_browser(Path(output_dir) / read.name / "report.html"))
        # Without training no trial has a model
        if not text_only:
            with self._told(again):
                refuse_failed(found)

    # Of a configuration the following want the names of app and volume, which are read before.

    def runs(self, config: str = DEFAULT):
        """List the runs that the volume knows: name, date, size, configuration, report, cost; and
        what the volume itself costs."""
        tended = self._tend("runs", [], tells_next=False)
        with self._told():
            prices = Prices.load(self._prices)
            stored = storage_told(self.far.stored_bytes(), prices)
            sys.stdout.write(f"the volume holds {stored}\n")
        self._next(self.typed.command(*tended.next))

    def status(self, config: str = DEFAULT):
        """Say in a line how far each run is that goes on, also one whose terminal is closed, and
        how long the rest will take."""
        with self._told(), tempfile.TemporaryDirectory() as folder:
            far = self.far
            going = follow_all(Path(folder), far.names, far.read, output(), far.is_alive)
            self._next(self.typed.command(*(["watch"] if going else ["runs"])))

    def watch(self, run: str = "", once: bool = False, config: str = DEFAULT):
        """Follow a run, the one in progress where none is named: how far each job was when it last
        published, how long the rest will take, its curves. --once looks once."""
        with self._told(), tempfile.TemporaryDirectory() as folder:
            far = self.far
            place = Path(folder)
            last, root = watch(
                run, once, place, far.names, far.read, output(), is_alive=far.is_alive
            )
            if last.in_progress and not last.is_over:
                self._next(self.typed.command("watch", "--run", last.run))
            elif last.done == len(last.positions):
                self._next(self.typed.command("history", "--run", last.run))
            else:
                given = Given(root.file or DEFAULT, shlex.join(root.overrides))
                again = "experiments" if root.experiments else "run_all"
                self._next(self.typed.command(again, *given.words()))

    def history(
        self, run: str = "", last: int = 8, output_dir: str = "history", config: str = DEFAULT
    ):
        """List the runs of the volume, and write to a folder here a page with their curves,
        pictures of them, and the rows of all their trainings."""
        folder = Path(output_dir)
        names = list(overrides(run))
        tended = self._tend("history", names, {"last": last}, tells_next=False)
        with self._told():
            folder.mkdir(parents=True, exist_ok=True)
            for name, content in tended.files.items():
                with writing(folder / name):
                    (folder / name).write_bytes(content)
        self._next(_browser(folder / "history.html"))

    def versions(self, config: str = DEFAULT):
        """List the bundles that may be served, and which one is."""
        self._tend("versions", [])

    def rollback(self, to: str = "", config: str = DEFAULT):
        """Serve a former bundle again: the one before, or --to. An endpoint that is deployed is
        deployed anew, as its containers serve the bundle that it was deployed with."""
        self._tend("rollback", [to] if to else [], tells_next=False)
        with self._told():
            if not self.far.is_deployed():
                sys.stdout.write("no endpoint is deployed\n")
                self._next(deploying(self.cfg.modal, self.environ))
                return
        self._deploy(self.environ)

    def prune(
        self,
        yes: bool = False,
        orphans: bool = False,
        damaged: bool = False,
        config: str = DEFAULT,
    ):
        """List what was left half done on the volume and what no run reaches; --yes removes it."""
        self._tend("prune", [], {"yes": yes, "orphans": orphans, "damaged": damaged})

    def rm(self, run: str, yes: bool = False, config: str = DEFAULT):
        """List what the volume has of a run, or of several in one text, and of no other; --yes
        removes it."""
        self._tend("rm", list(overrides(run)), {"yes": yes})

    def _tend(
        self,
        command: str,
        names: list[str],
        flags: Mapping[str, int] | None = None,
        tells_next: bool = True,
    ) -> Tended:
        """Have a container look at the volume, or remove from it; exit with 1 when something is
        wrong."""
        try:
            tended: Tended = self.far.begin("tend", command, names, dict(flags or {})).get()
        except FarError as error:
            sys.exit(f"error: {error}; {ON_FROM_THERE}")
        self._show(tended.printed, tended.wrong)
        with self._told():
            prices = Prices.load(self._prices)
            sys.stdout.write(f"{tending_told(tended.seconds, self.cfg.modal, prices)}\n")
        if not tells_next:
            return tended
        if tended.serves:
            self._next(deploying(self.cfg.modal, self.environ))
        else:
            self._next(self.typed.command(*tended.next))
        return tended

    def _deploy(self, environ: Mapping[str, str]) -> NoReturn:
        """Deploy what the volume says, with those variables, and end."""
        code = self.far.deploy(environ)
        if code == 0:
            self._next(self.typed.command("versions"))
        sys.exit(code)

    def _ended(self, function: str, again: str, *given: Any, name: str = "") -> Any:
        """Return what the container that hands out jobs comes to, however long that takes, and tell
        now and then how far the run is; end with what does the rest when it is lost."""
        try:
            call = self.far.begin(function, *given)
            with tempfile.TemporaryDirectory() as folder:
                far = self.far
                following = Following(name, Path(folder), far.names, far.read, far.is_alive)
                return _waited(call, following if name else None)
        except FarError as error:
            # All attempts are over, or the line is down
            sys.exit(f"error: {error}; what is finished is kept, the rest is done by: {again}")

    def _show(self, printed: str, wrong: str) -> None:
        """Print what a container has to say; exit with 1 when something is wrong."""
        sys.stdout.write(printed)
        if wrong:
            sys.exit(f"error: {wrong}")

    def _next(self, command: str) -> None:
        text = f"next: {masked(command)}"
        output().print(text, highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def _told(self, again: str = "") -> Iterator[None]:
        """Exit with 1 and a sentence where something is wrong; `again` is what was typed."""
        try:
            yield
        except PipelineError as error:
            sys.exit(f"error: {sentence(error, self.edge, again)}")


def _waited(call: FarCall, following: Following | None) -> Any:
    """Return what a call comes to; say meanwhile how far the run is, where that has changed."""
    if following is None:
        return call.get()
    while True:
        try:
            return call.get(timeout=TELL_EVERY_S)
        except TimeoutError:
            # Whoever cannot be told is told later
            with suppress(PipelineError):
                following.tell(output())


def _browser(page: Path) -> str:
    return f"python3 -m webbrowser {page.resolve().as_uri()}"
