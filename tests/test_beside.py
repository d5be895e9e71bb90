"""A folder beside a target, by whoever is killed while it fills one."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from pipeline.store.beside import folder_beside

ROOT = Path(__file__).parent.parent
KILLED = """
import os, signal, sys
from pathlib import Path
from pipeline.store.beside import folder_beside
with folder_beside(Path(sys.argv[1]), ".kit-") as made:
    (made / "statistics").write_text("private", "utf-8")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_has_left_goes_and_what_another_is_at_stays(tmp_path):
    """Gigabytes, or what was made of private text, stayed under a hidden name for ever."""
    own = tmp_path / ".kit-of-somebody"
    own.mkdir()
    (own / "file").write_text("mine", "utf-8")
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.run(command, env=env, cwd=tmp_path).returncode == -signal.SIGKILL
    (left,) = tmp_path.glob(".kit-*/made/statistics")
    with folder_beside(tmp_path, ".kit-") as first:
        assert not left.exists() and not [*first.iterdir()]
        (first / "a").write_text("a", "utf-8")
        with folder_beside(tmp_path, ".kit-") as second:
            assert second != first and (first / "a").exists()
    assert [*tmp_path.iterdir()] == [own] and (own / "file").exists()
