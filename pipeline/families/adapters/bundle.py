"""A stack of adapters as a folder: adapters as PEFT keeps them, the base or its pin, and the same
stack opened from it.

Invariant: what is opened from a bundle is what was measured: the same adapters on the same pinned
base, with the same calibration, policy and limits. A base from the Hub is not copied; a built one
or a folder is.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, TypeVar, get_args

from ...config.base import COMMIT
from ...errors import DamagedArtifact
from ...protocols import Progress
from ...store.artifacts import sha256
from ...store.bundle import ABOUT, EARLIER_FORMAT, BundleFile, about, listed, write
from ...store.foreign import ForeignFile, check_model_files
from .. import Parts
from ..report_files import report_files
from .base import BUILT, PIN, LoadedBase, ModelKind, ModelRef, locate
from .config import AdapterRunConfig
from .inference import GenerationLimits
from .peft_io import ABOUT as ADAPTER
from .peft_io import SETTINGS, TENSORS
from .router import CALIBRATION, Calibration
from .sections import AdapterBaseConfig
from .stack import ROUTER, AdapterStack, ExpertInfo, Policy, build_stack, limits_of, policy_of

# folders of the bundle
ADAPTERS = "adapters"
PROCESSOR = "processor"
PROCESSOR_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
# All that a bundle holds. A library reads some other names too, wherever it finds them.
FILES = re.compile(
    r"experts\.json|made\.json|README\.md|report\.(json|html)|pin\.json"
    r"|base/[^/]+\.(json|safetensors|jinja|txt)"
    r"|processor/[^/]+\.(json|jinja|txt)"
    r"|adapters/[^/]+/(adapter\.json|calibration\.json)"
    r"|adapters/[^/]+/adapter/(adapter_config\.json|adapter_model\.safetensors)"
)
# of a repository on the Hub; a path would be opened where it lies
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

T = TypeVar("T")


def bundle(
    cfg: AdapterRunConfig,
    parts: Parts,
    folder: Path,
    progress: Progress,
    *,
    kind: ModelKind,
    opening: Mapping[str, Any],
    media_name: str,
) -> dict:
    """Write the stack to a folder with its report and model card; return metrics.

    `kind` is the base's, `opening` the settings that it is opened with, as JSON; `media_name` is
    how the family calls what requests come with. Raises MissingArtifact, DamagedArtifact, or
    DataError when the base cannot be found.
    """
    of_base = parts.folder("train_shared")
    pin = ModelRef.read(of_base)
    # where its files go along, the bundle's own copy is the base
    inside = replace(pin, source="built", model=BUILT) if pin.files else pin
    described = _described(cfg, parts)
    described["architecture"] = kind.model_class.__name__
    described["base"] = {
        "model": inside.model,
        "revision": inside.revision,
        "digest": inside.digest,
        **opening,
        "address": parts.manifest("train_shared").address,
    }
    # clients read these from /v1/models, in the family's words
    limits = asdict(limits_of(cfg))
    described["limits"] = {f"{media_name}s": limits.pop("media"), **limits}
    texts: dict[str, str | dict] = {
        ABOUT: described,
        PIN: inside.values(),
        **report_files(cfg, parts, described),
    }
    where = locate(pin, of_base, kind)
    files = [
        *adapter_files(cfg, parts),
        *base_files(pin, where),
    ]
    return write(folder, files, texts, progress) | {"experts": len(cfg.experts)}


def base_in(folder: Path) -> dict[str, Any]:
    """Return what a bundle says of its base, the settings that it is opened with among it, once
    all its files are such that nothing in them runs.

    Raises MissingArtifact when the folder is no bundle, DamagedArtifact, NewerStore.
    """
    base = about(folder).get("base")
    if not isinstance(base, dict):
        raise damaged(folder, "it names no base")
    try:
        _check(folder, base)
    except (ForeignFile, OSError) as error:
        raise damaged(folder, error) from None
    return base


def _check(folder: Path, base: Mapping[str, Any]) -> None:
    """Raise ForeignFile for what a bundle must not hold, or a base that is neither in it nor on the
    Hub."""
    names = listed(folder)
    for name in sorted(names):
        if not FILES.fullmatch(name):
            raise ForeignFile(f"{name} is no file of such a bundle")
    models = (f"{BUILT}/", f"{PROCESSOR}/")
    check_model_files(folder, [name for name in names if name.startswith(models)])
    # the library would fetch a kernel of another name, and run it
    for key in ("dtype", "attn"):
        known = get_args(AdapterBaseConfig.model_fields[key].annotation)
        if base.get(key) not in known:
            raise ForeignFile(f"{key} of the base is {base.get(key)!r}, not of {', '.join(known)}")
    pin = ModelRef.read(folder)
    if pin.source == "hub" and not pin.files:
        named = HUB_NAME.fullmatch(str(pin.model))
        inside = bool(named and COMMIT.fullmatch(str(pin.revision)))
    else:
        own = {f"{BUILT}/{name}" for name in pin.files}
        built = (pin.source, pin.model) == ("built", BUILT)
        inside = built and bool(own) and own <= names.keys()
    if not inside:
        raise ForeignFile(f"{PIN} names a base outside the bundle ({pin.source} {pin.model!r})")


def damaged(folder: Path, why: object) -> DamagedArtifact:
    """Return the error for a bundle whose description is not that of its stack."""
    return DamagedArtifact(f"{folder} does not hold the stack that its {ABOUT} describes: {why}")


def reassemble(folder: Path, base: LoadedBase) -> AdapterStack:
    """Build the finished stack, as `assemble` does, from a bundle alone and its base, opened.

    Raises MissingArtifact when the folder is no bundle, DamagedArtifact, NewerStore, MismatchError.
    """
    described = about(folder)
    names = listed(folder)
    experts = []
    try:
        for entry in described["experts"]:
            expert = _typed(ExpertInfo, entry)
            if f"{ADAPTERS}/{expert.name}/{ADAPTER}" not in names:
                raise ForeignFile(f"the expert {expert.name!r} has no folder in it")
            experts.append(expert)
        policy = _typed(Policy, described["policy"])
        kept = dict(described["limits"])
        kept["media"] = kept.pop(f"{base.chat.media.name}s")
        limits = _typed(GenerationLimits, kept)
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(folder, error) from None
    folders = {expert.name: folder / ADAPTERS / expert.name for expert in experts}
    folders[ROUTER] = folder / ADAPTERS / ROUTER
    calibration = Calibration.read(folders[ROUTER])
    return build_stack(base, folders, experts, calibration, policy, limits)


def _typed(kind: type[T], values: Mapping[str, Any]) -> T:
    """Return a dataclass of text and numbers from what a file says; the file may say more. Raises
    KeyError, TypeError."""
    own = {}
    for each in fields(kind):  # type: ignore[arg-type]  # a dataclass, for which there is no type
        value = values[each.name]
        wanted = (int, float) if each.type is float else (each.type,)
        if type(value) not in wanted:
            raise TypeError(f"{each.name} is {value!r}")
        own[each.name] = value
    return kind(**own)


def _described(cfg: AdapterRunConfig, parts: Parts) -> dict[str, Any]:
    """Return experts.json, but for what its base and the family's media say."""
    experts = []
    for name in cfg.experts:
        known = asdict(ExpertInfo.of(cfg.loras.entry(name)))
        known["address"] = parts.manifest("train_experts", name).address
        known["folder"] = f"{ADAPTERS}/{name}"
        experts.append(known)
    router = {
        "address": parts.manifest("train_router").address,
        "folder": f"{ADAPTERS}/{ROUTER}",
    }
    return {
        "format": EARLIER_FORMAT,
        "family": cfg.family,
        "run": cfg.name,
        "serves": "chat",
        "experts": experts,
        "router": router,
        "policy": asdict(policy_of(cfg)),
        "routing": {"address": parts.manifest("routing").address},
        "report": {"address": parts.manifest("evaluate").address},
    }


def adapter_files(cfg: AdapterRunConfig, parts: Parts) -> Iterator[BundleFile]:
    """Yield every adapter's files, the router's last."""
    jobs: list[tuple[str, str, str | None]] = [(n, "train_experts", n) for n in cfg.experts]
    jobs.append((ROUTER, "train_router", None))
    for name, stage, item in jobs:
        folder = parts.folder(stage, item)
        known = parts.manifest(stage, item).files
        files = [TENSORS, SETTINGS, ADAPTER]
        if name == ROUTER:
            files.append(CALIBRATION)
        for file in files:
            yield BundleFile(f"{ADAPTERS}/{name}/{file}", folder / file, known[file]["sha256"])


def base_files(pin: ModelRef, where: Path) -> Iterator[BundleFile]:
    """Yield the base's own files where they go along, else those that make its requests, to look
    at."""
    for name, digest in pin.files.items():
        yield BundleFile(f"{BUILT}/{name}", where / name, digest)
    if pin.files:
        return
    # which of them there are depends on the base's kind and age
    for name in PROCESSOR_FILES:
        if (where / name).is_file():
            yield BundleFile(f"{PROCESSOR}/{name}", where / name, sha256(where / name))
