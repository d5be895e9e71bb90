"""Documents made into tokens in plain folders, as the stages do it: the tokenizer, then each domain
by itself."""

from pathlib import Path

from pipeline.data.text.prepare import make_tokenizer, prepare
from pipeline.data.text.shards import Shards
from pipeline.data.text.survey import Survey, survey
from pipeline.protocols import quiet
from pipeline.store.looking import FileSums, Looking


def surveyed(cfg, folder: Path | None = None) -> Survey:
    """Return what documents there are; in a folder, what was found is kept there."""
    return survey(cfg, Looking(FileSums(), folder=folder, fetches=True))


def prepared(cfg, folder: Path, progress=quiet) -> dict:
    """Make a tokenizer and the shards of every domain below folder; return their metrics as one."""
    found = surveyed(cfg, folder / "sources")
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir(parents=True)
    make_tokenizer(cfg, found, tokenizer, progress)
    metrics = []
    for domain in cfg.partition.names:
        of_domain = folder / f"preprocess-{domain}"
        of_domain.mkdir()
        metrics.append(prepare(cfg, found, domain, tokenizer, of_domain, progress))
    return merged(metrics)


def merged(parts: list[dict]) -> dict:
    """Return nested counts of several domains as one: groups side by side, numbers added up."""
    out = {}
    for part in parts:
        for name, value in part.items():
            if isinstance(value, dict):
                value = merged([out.get(name, {}), value])
            elif name in out and name not in ("vocab_size", "front"):
                value = out[name] + value
            out[name] = value
    return out


def opened(folder: Path) -> Shards:
    """Open the shards of every domain below folder."""
    return Shards(*sorted(folder.glob("preprocess-*")))
