"""What every test starts from: one thread, no network, no account, a store of its own.

The variables are set before any test module is imported, because libraries read them once, at import.
"""

import os
import sys

for name in [name for name in os.environ if name.startswith(("WANDB_", "MODAL_", "HF_TOKEN"))]:
    del os.environ[name]  # the tests' own account, or none, never the developer's
os.environ |= {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}

import pytest  # noqa: E402 (after the variables)


@pytest.fixture(autouse=True)
def _one_thread():
    """Keep torch on one thread, in tests that have imported it."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture
def store_path(tmp_path):
    """Path of a store that does not exist yet."""
    return tmp_path / "store"
