"""Results of experiments, made up: trials with the figures that a test asks for."""

from pipeline.report.schema.experiments import (
    ModelSizes,
    TrialExperts,
    TrialLosses,
    TrialRun,
    TrialScore,
    TrialSummary,
    TrialTiming,
)


def summed(
    name,
    valid=None,
    train=None,
    speed=None,
    least=None,
    seeds=(0,),
    dense=False,
    gpu=None,
    tokens="",
    bits=None,
    size=None,
):
    """Return a trial's summary with these figures, the same with every seed."""
    runs = []
    score = None
    if bits is not None:
        score = TrialScore(
            bits_per_byte=bits,
            bits_per_byte_by_domain={},
            bytes=600,
            tokens=size and 600 // size,
            documents=1,
            text="t",
        )
    for seed in seeds:
        timing = TrialTiming(
            tokens=1,
            seconds=1.0,
            cpu_s={},
            tokens_per_s=speed or 1.0,
            tokens_per_cpu_s=None if gpu else speed,
            gpu=gpu,
            jobs=(),
        )
        use = None
        if least is not None:
            use = TrialExperts(least=least, where="e", entropy=1.0, max_entropy=1.1)
        losses = TrialLosses(valid=valid, train=train)
        sizes = ModelSizes(active=1, total=1 if dense else 2)
        runs.append(
            TrialRun(
                seed=seed,
                state="done",
                losses=losses,
                timing=timing,
                use=use,
                sizes=sizes,
                tokens=tokens,
                score=score,
            )
        )
    gap = None if valid is None or train is None else valid - train
    return TrialSummary(
        name=name,
        makes="joint moe",
        changes={},
        runs=tuple(runs),
        valid=valid,
        gap=gap,
        is_dense=dense,
        bits_per_byte=bits,
    )
