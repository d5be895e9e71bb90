"""The run's tokenizer, and with it the partition where it is fitted: on a sample of training text.

Invariant: memory holds samples and keys, never the corpus.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ...config.text_data import TextRunConfig
from ...errors import DataError
from ...protocols import Progress
from ...store.reading import reading
from ...store.room import writing
from ..sources import FoundRow, SourceFile
from ..sources.columns import listed
from ..sources.text import sources
from . import partition
from . import tokenizer as tokenizers
from .documents import Document, documents, documents_of, drop_stats
from .encode import all_cores, changed, grouped
from .held_out import HeldOut
from .partition import Domains
from .splits import Sample, SmallDomains, Splits
from .survey import Print, Survey
from .tokenizer import Tokenizer

FIT_BYTES = 64 << 20  # text that clusters and difficulty are fitted on, at most
ASSIGNED = "assigned.bin"  # number of the domain of each piece of all documents, in order
_SPLITS = "splits.safetensors"
_NUMBER = np.dtype("<u2")
_SPARE = 1.2  # sampled over what is wanted, because chance may hold out more than its share
_PROGRESS_EVERY = 2000  # documents
# Of a domain without a document, to tell why
_TRIED_FILES = 3
_TRIED_ROWS = 20
Texts = dict[str, list[str]]  # by domain


def fit(cfg: TextRunConfig, survey: Survey, folder: Path, progress: Progress) -> dict[str, Any]:
    """Leave the tokenizer, and the partition where documents have no labels, in folder, which is
    empty; return metrics. Raises DataError."""
    metrics: dict[str, Any] = {}
    texts: Texts = {}
    if cfg.partition.by != "labels":
        texts, metrics["documents"] = _fit_partition(cfg, survey, folder, progress)
    elif cfg.tokenizer.pretrained is None:
        texts = _texts_of_labels(cfg, survey, progress)
    what = "training" if cfg.tokenizer.pretrained is None else "loading"
    progress(f"{what} the tokenizer", None)
    with all_cores(cfg.runtime.threads):
        tokenizer = _tokenizer(cfg, texts)
    tokenizer.save(folder)
    return metrics | {"vocab_size": tokenizer.vocab_size}


def _tokenizer(cfg: TextRunConfig, texts: Texts) -> Tokenizer:
    if cfg.tokenizer.pretrained:
        return tokenizers.pretrained(cfg.tokenizer.pretrained, cfg.tokenizer.revision)
    every = [text for each in texts.values() for text in each]
    return tokenizers.train(cfg.tokenizer.vocab_size, every)


def _texts_of_labels(cfg: TextRunConfig, survey: Survey, progress: Progress) -> Texts:
    """Return the same number of bytes of training text of each domain of the trunk."""
    wanted = cfg.tokenizer_domains
    held_out = HeldOut(survey)
    splits = {domain: held_out.splits(domain) for domain in wanted}
    # Held-out documents are sampled too where ranks decide, and left out afterwards
    train_share = 1 - cfg.data.valid_share - cfg.data.test_share
    share_bytes = cfg.tokenizer.sample_megabytes * 1e6 / len(wanted)
    budget = _SPARE * share_bytes / train_share
    samples = {domain: Sample(budget, cfg.data.seed) for domain in wanted}
    found = documents(cfg, drop_stats(), survey.part(*wanted))
    for document in _told(_unchanged(cfg, survey, found, wanted), progress):
        samples[document.label].add(document)
    texts: Texts = {}
    for domain, sample in samples.items():
        # A held-out document must not even decide how text is cut into tokens
        train = [each for each in sample.documents() if splits[domain].of(each) == "train"]
        texts[domain] = _some(train, share_bytes)
    return texts


def _some(found: Iterable[Document], most_bytes: float) -> list[str]:
    texts = []
    taken = 0
    for document in found:
        if taken < most_bytes:
            taken += document.bytes
            texts.append(document.text)
    return texts


def _fit_partition(
    cfg: TextRunConfig, survey: Survey, folder: Path, progress: Progress
) -> tuple[Texts, dict[str, int]]:
    """Fit the domains on training documents and say of every document which it is of; return
    training text for the tokenizer, and how many documents each domain has."""
    splits = Splits(cfg.data)
    sample = Sample(max(FIT_BYTES, 2e6 * cfg.tokenizer.sample_megabytes), cfg.data.seed)
    stats = drop_stats()
    for document in _told(_all(cfg, survey), progress):
        splits.remember(document)
        if document.split in (None, "train"):
            sample.add(document)
    if not survey.count(None):
        for _ in documents(cfg, stats):
            pass
        raise no_documents(cfg, stats.seen, stats.explain())
    names = cfg.partition.names
    progress(f"fitting {len(names)} domains by {cfg.partition.by}", None)
    found = sample.documents()
    # By threshold: which domains are small is known only once there are domains
    domains = partition.fit(cfg, [each for each in found if splits.of(each) == "train"])
    # A sample that left something out is larger than any small domain
    if cfg.data.split_field is None and sample.whole:
        small = SmallDomains(cfg.data)
        for document, name in zip(found, domains.assign(found), strict=True):
            small.add(name, document.key)
        small.decide(splits, names)
    domains.save(folder)
    splits.save(folder / _SPLITS)
    share_bytes = cfg.tokenizer.sample_megabytes * 1e6 / len(names)
    by_domain: dict[str, list[Document]] = defaultdict(list)
    train = [document for document in found if splits.of(document) == "train"]
    for document, name in zip(train, domains.assign(train), strict=True):
        by_domain[name].append(document)
    texts = {name: _some(by_domain[name], share_bytes) for name in names}
    return texts, _assign(cfg, survey, domains, folder, progress)


def _assign(
    cfg: TextRunConfig, survey: Survey, domains: Domains, folder: Path, progress: Progress
) -> dict[str, int]:
    """Write down the domain of every piece, so that a domain's job need not find it again; return
    how many documents each has."""
    counts: Counter[str] = Counter()
    numbers = {name: number for number, name in enumerate(domains.names)}
    path = folder / ASSIGNED
    with writing(path), open(path, "wb") as file:
        for group in grouped(_told(_all(cfg, survey), progress)):
            names = domains.assign(group)
            counts.update(names)
            found = np.array([numbers[name] for name in names], _NUMBER)
            file.write(found.tobytes())
    return {name: counts[name] for name in domains.names}


def assigned(folder: Path, found: Iterable[Document], number: int) -> Iterator[Document]:
    """Yield those of all documents, in order, that are of one domain of a fitted partition."""
    path = folder / ASSIGNED
    with reading(path):
        numbers = np.memmap(path, _NUMBER, mode="r")
    for at, document in enumerate(found):
        # Of other documents than it was made of, which whoever reads them tells when all are read
        if at < len(numbers) and numbers[at] == number:
            yield document


def fitted_splits(cfg: TextRunConfig, folder: Path) -> Splits:
    """Return the splits of a fitted partition. Raises DamagedArtifact or UnreadableFile."""
    return Splits(cfg.data).load(folder / _SPLITS)


def _all(cfg: TextRunConfig, survey: Survey) -> Iterator[Document]:
    return _unchanged(cfg, survey, documents(cfg, drop_stats()), (None,))


def _unchanged(
    cfg: TextRunConfig,
    survey: Survey,
    found: Iterable[Document],
    domains: Iterable[str | None],
) -> Iterator[Document]:
    """Yield documents as they are. Raises DataError at the end when they are not those that were
    surveyed."""
    prints = {domain: Print() for domain in domains}
    for document in found:
        prints[None if None in prints else document.label].add(document)
        yield document
    for domain, printed in prints.items():
        if printed.text != survey.print_of(domain):
            raise changed(cfg, domain)


def _told(found: Iterable[Document], progress: Progress) -> Iterator[Document]:
    size = 0
    for number, document in enumerate(found):
        size += document.bytes
        if number % _PROGRESS_EVERY == 0:
            progress(f"reading: {number} documents, {size / 1e6:.1f} MB", None)
        yield document


def no_documents(cfg: TextRunConfig, seen: int, why: str) -> DataError:
    """Return the error for sources without a document."""
    fields = "data.text_field"
    if cfg.partition.by == "labels":
        fields += ", data.label_field"
    return DataError(
        f"no usable document in data.{cfg.data.source}, {seen} seen: {why}; check the paths, "
        f"{fields} and data.min_document_bytes"
    )


def nothing_labelled(cfg: TextRunConfig, survey: Survey, domain: str) -> DataError | None:
    """Return the error for a domain whose label no document has, while others have labels; None
    where labels do not tell why it has none."""
    labels = survey.labels
    is_named = any(file.label == domain for file in survey.files)
    if is_named or not (labels or survey.others):
        return None
    labels += [label for label, _ in survey.others.most_common(20)]
    return DataError(
        f"partition.domains names {domain}, and no document has that label; "
        f"data.label_field ({cfg.data.label_field}) holds {listed(labels)}. Correct "
        "partition.domains, or say under partition.labels which labels a domain has"
    )


def nothing_found(cfg: TextRunConfig, survey: Survey, domain: str) -> DataError | None:
    """Return why a job of a domain will have no document, as far as a survey and the first rows of
    files here tell; None where it has some, or what is far away may hold them."""
    own = [file for file in survey.files if survey.is_of(file, domain)]
    if survey.count(domain) or any(file.unread and file.may_hold(domain) for file in survey.files):
        return None
    error = nothing_labelled(cfg, survey, domain)
    if error or any(not each.seen for each in own):
        return error
    stats = drop_stats()
    wanted = {file.place for file in own[:_TRIED_FILES]}
    for source, (label, files) in enumerate(sources(cfg)):
        for number, file in enumerate(files):
            if (source, number) not in wanted or file.is_remote:
                continue
            first = replace(file, rows=partial(_first_rows, file))
            for _ in documents_of(cfg, stats, Counter(), first, label):
                pass
    return no_documents(cfg, stats.seen, stats.explain()) if stats.seen else None


def _first_rows(file: SourceFile) -> Iterator[FoundRow]:
    return islice(file.rows(), _TRIED_ROWS)
