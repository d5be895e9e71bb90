"""What a run is at one moment: the addresses and bytes of all it has, and its stack's logits.

B sequences, T tokens, D model width, V vocabulary.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pipeline.families.ffn_moe.config import FfnMoeConfig
from pipeline.families.ffn_moe.parts import shards_of
from pipeline.families.ffn_moe.stack import FfnStack, assemble
from pipeline.families.load import load
from pipeline.hardware import device, uses_bf16
from pipeline.run.context import StoredParts
from pipeline.run.identity import begin
from pipeline.run.stages import RUN, label
from pipeline.store.artifacts import Manifest, Store


@dataclass(frozen=True)
class Made:
    """An artifact: where it is, and the sha256 over all of its files, the manifest's time too."""

    address: str
    digest: str


class State:
    """A run as its file describes it now, over what is in the store."""

    def __init__(self, file: Path, store: Store, overrides: Sequence[str] = ()):
        cfg, _ = begin(load(file, tuple(overrides)), store)
        self.parts = StoredParts(cfg, store)
        if not isinstance(self.parts.cfg, FfnMoeConfig):
            raise SystemExit(f"{file}: this benchmark is of runs of ffn_moe")
        self.cfg = self.parts.cfg
        self.store = store

    def made(self) -> dict[str, Made]:
        """Return what every job of the run has made, by the job's name; each file is read."""
        found = {}
        for stage in RUN:
            for _, item, address in self.parts.addresses.jobs(stage):
                digest = _digest(self.store.folder(address))
                found[label(stage, item)] = Made(address, digest)
        return found

    def manifest(self, job: str) -> Manifest:
        """Return the manifest of a job by its name."""
        stage, _, item = job.partition(" ")
        return self.parts.manifest(stage, item or None)

    def stack(self) -> FfnStack:
        """Return the finished stack."""
        return assemble(self.cfg, self.parts)

    def logits(self) -> dict[str, Tensor]:
        """Return logits_TV of the stack on the first held-out tokens of each domain."""
        stack = self.stack()
        shards = shards_of(self.parts, self.cfg.partition.names)
        bf16 = uses_bf16(self.cfg.dtype)
        found = {}
        for domain in shards.domains:
            stream = shards.stream("test", domain)[: self.cfg.trunk.context_tokens]
            ids_BT = torch.from_numpy(stream.astype("int64"))[None].to(device())
            autocast = torch.autocast(ids_BT.device.type, torch.bfloat16, enabled=bf16)
            with torch.no_grad(), autocast:
                h_BTD = stack.trunk.hidden(ids_BT, stack.mixture)
            found[domain] = h_BTD[0].float() @ stack.trunk.head.detach().float().T
        return found


def _digest(folder: Path) -> str:
    whole = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                own = hashlib.file_digest(file, "sha256").hexdigest()
            whole.update(f"{path.relative_to(folder)} {own}\n".encode())
    return whole.hexdigest()


def others(before: dict[str, Made], after: dict[str, Made]) -> list[str]:
    """Return the jobs whose artifact is new or another one, in the run's order."""
    return [job for job, made in after.items() if before.get(job) != made]
