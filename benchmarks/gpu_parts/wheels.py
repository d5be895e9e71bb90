"""What a fresh machine with PyTorch and transformers lacks, and how it is brought there.

Everything else that the pipeline names in requirements.txt is imported only where it is used.
"""

import re

from benchmarks.measuring import ROOT

# With what the pinned ones need, less what such a machine has
NEEDED = (
    "pydantic",
    "pydantic-core",
    "annotated-types",
    "typing-inspection",
    "ruamel.yaml",
    "rapidfuzz",
    "ImageHash",
    "PyWavelets",
    # There in other versions, perhaps: these are the ones that everything is tested with
    "transformers",
    "tokenizers",
    "huggingface_hub",
    "peft",
)
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def pinned() -> list[str]:
    """Return the packages, each with the version of requirements.txt where that has one."""
    text = (ROOT / "requirements.txt").read_text("utf-8")
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", text, re.MULTILINE))
    return [f"{name}=={pins[name]}" if name in pins else name for name in NEEDED]


def how_to_bring(folder: str) -> str:
    """Return the commands: the first where there is a registry, the second on the machine."""
    platforms = " ".join(f"--platform {name}" for name in PLATFORMS)
    return (
        "# Where a registry can be reached; PYTHON is the other machine's version, as 3.12. For\n"
        "# pydantic-core name the version that pydantic asks for, if pip takes another.\n"
        f"python -m pip download --no-deps --only-binary=:all: --python-version PYTHON {platforms} "
        f"-d {folder} {' '.join(pinned())}\n"
        "# On the machine with the GPU, in this repository:\n"
        "python -m pip install --no-index --no-deps --target site "
        f"{folder}/*.whl\n"
        "PYTHONPATH=site python -m benchmarks.gpu --out .\n"
    )
