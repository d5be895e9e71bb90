"""Speed and memory of rank 64 on the real model: beside a full expert, and as a mixture beside the
dense model. In alternating rounds, so that a busy minute slows both.

B sequences, T tokens, L layers, E experts, D model width.
"""

import statistics
from collections.abc import Callable

import torch

from benchmarks.experts_forward import DENSE, SCALE, Case, measured
from benchmarks.measuring import RANK, progress, ratios, spread, table
from benchmarks.runner import Runner
from pipeline.families.ffn_moe.config import FfnMoeConfig
from pipeline.families.ffn_moe.parts import mixture_of, stored_trunk, token_loss
from pipeline.hardware import device, uses_bf16
from pipeline.model.low_rank import LowRankExpert

EXPERTS = 8
TOP_K = 2
PASS = (4, 256)  # sequences, tokens
STEPS = 8
MOST_PEAK_MB = 900
LEAST_SPEED = 1.3  # times a full expert's tokens a second
MOST_TIME = 1.15  # times the dense model's forward pass
FULL = "full"
LOW_RANK = f"rank {RANK}"
FORMS = {FULL: ("expert.form=full",), LOW_RANK: ("expert.form=low_rank", f"expert.rank={RANK}")}


def sections(runner: Runner, domain: str, rounds: int) -> tuple[str, bool]:
    """Return both tables with their verdicts, and whether every aim was reached."""
    trained, kept = _training(runner, domain, rounds)
    cfg = runner.config()
    passed, near = _forward(runner, cfg, rounds)
    return f"{trained}\n{passed}", kept and near


def _training(runner: Runner, domain: str, rounds: int) -> tuple[str, bool]:
    found = []
    for number in range(rounds):
        one = {}
        forms = list(FORMS)
        for form in forms if number % 2 else reversed(forms):
            one[form] = _trained(runner, domain, form, number)
            progress(
                f"round {number + 1} of {rounds}, {form}: {one[form]['tokens_per_s']:,.0f} "
                f"tokens/s, peak {one[form]['peak_mb']:,.0f} MB"
            )
        found.append(one)
    rows = []
    for form in FORMS:
        rates = [one[form]["tokens_per_s"] for one in found]
        peaks = [one[form]["peak_mb"] for one in found]
        rows.append([form, spread(rates), spread(peaks)])
    times = ratios(
        found, lambda one: one[LOW_RANK]["tokens_per_s"], lambda one: one[FULL]["tokens_per_s"]
    )
    peak_mb = max(one[LOW_RANK]["peak_mb"] for one in found)
    fast = statistics.median(times) >= LEAST_SPEED
    small = peak_mb <= MOST_PEAK_MB
    text = "\n".join(
        [
            "## Training an expert\n",
            f"{rounds} rounds of {PASS[0]} x {PASS[1]} tokens a step, each in a process of its "
            "own; peaks are above the level after imports, mapped files and statistics counted.\n",
            table(["expert", "tokens/s", "peak MB"], rows),
            f"- {LOW_RANK} trains {spread(times, 2)} times as fast as {FULL}; at least "
            f"{LEAST_SPEED}: {_word(fast)}",
            f"- its peak is {peak_mb:,.0f} MB; at most {MOST_PEAK_MB}: {_word(small)}\n",
        ]
    )
    return text, fast and small


def _trained(runner: Runner, domain: str, form: str, number: int) -> dict[str, float]:
    """Return the metrics of a short training that is not in the store yet."""
    sequences, tokens = PASS
    given = (
        *FORMS[form],
        f'expert.domains=["{domain}"]',
        "router.top_k=1",
        f"trunk.context_tokens={tokens}",
        f"expert.batch_sequences={sequences}",
        f"expert.micro_batch_sequences={sequences}",
        "expert.tokens=null",
        "expert.lr=1e-4",
        f"expert.statistics_tokens={sequences * tokens}",
        f"expert.eval_tokens={sequences * tokens}",
        # another training each round, or there would be nothing to do
        f"expert.steps={STEPS + number}",
    )
    runner.make("train_experts", *given)
    return runner.parts(runner.config(*given)).manifest("train_experts", domain).metrics


def _forward(runner: Runner, cfg: FfnMoeConfig, rounds: int) -> tuple[str, bool]:
    trunk, dummy = stored_trunk(cfg, runner.parts(cfg))
    shape = trunk.config
    torch.manual_seed(0)
    experts = [LowRankExpert(dummy, RANK, SCALE).to(device()) for _ in range(EXPERTS)]
    # Gates at random share the tokens about evenly
    weight_LED = torch.randn(shape.num_hidden_layers, EXPERTS, shape.hidden_size)
    mixture = mixture_of(experts, weight_LED.to(device()), TOP_K).requires_grad_(False).eval()
    ids_BT = torch.randint(shape.vocab_size, (PASS[0], PASS[1] + 1), device=device())
    bf16 = uses_bf16(cfg.dtype)
    mixed = f"top-{TOP_K} of {EXPERTS} of {LOW_RANK}"
    ways: dict[str, Callable[[], torch.Tensor]] = {
        DENSE: lambda: token_loss(trunk, dummy, ids_BT, bf16),
        mixed: lambda: token_loss(trunk, mixture, ids_BT, bf16),
    }
    case = Case(
        shape.hidden_size,
        shape.intermediate_size,
        tokens=PASS[0] * PASS[1],
        experts=EXPERTS,
        top_k=TOP_K,
        device=device(),
        dtype="bf16" if bf16 else "fp32",
    )
    found = measured(case, ways, rounds)
    times = ratios(found, lambda one: one[mixed], lambda one: one[DENSE])
    near = statistics.median(times) <= MOST_TIME
    rows = []
    for name in ways:
        seconds = [one[name] * 1e3 for one in found]
        shares = [one[name] / one[DENSE] for one in found]
        rows.append([name, spread(seconds), spread(shares, 2)])
    text = "\n".join(
        [
            "## Forward pass of the whole model, loss included\n",
            f"{PASS[0]} x {PASS[1]} tokens, {rounds} rounds.\n",
            table(["model", "ms", "times dense"], rows),
            f"- {mixed} takes {spread(times, 2)} times the dense model's time; at most "
            f"{MOST_TIME}: {_word(near)}\n",
        ]
    )
    return text, near


def _word(reached: bool) -> str:
    return "reached" if reached else "missed"
