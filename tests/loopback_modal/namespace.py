"""Starts a command with a container's view of the file system. Run as a program: namespace.py
SPEC.json.

The spec has `work` (a private directory), `mode` (overlay, bind or plain), `mounts` ([[host path,
container path]]), `copies` ([[host path, container path, mode]]), `cwd`, `argv`, `env`. Linux only;
the process dies with its parent.
"""

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

MODES = ("overlay", "bind", "plain")  # best first
NEW_MOUNTS, NEW_USER = 0x20000, 0x10000000
BIND, RECURSIVE, PRIVATE = 4096, 16384, 1 << 18
SET_DEATH_SIGNAL = 1
_libc = ctypes.CDLL(None, use_errno=True)


def usable(mode: str, work: Path) -> bool:
    """Return whether this machine lets this user build that kind of view."""
    if mode == "plain":
        return True
    with tempfile.TemporaryDirectory(dir=work) as folder:
        (Path(folder) / "ns").mkdir()
        # Where containers have their code, which not every user of this machine may write to
        code = [__file__, "/root/probe", 0o644]
        spec = {
            "work": f"{folder}/ns",
            "mode": mode,
            "mounts": [],
            "copies": [code],
            "cwd": "/root",
            "argv": ["true"],
        }
        path = Path(folder) / "spec.json"
        path.write_text(json.dumps(spec | {"env": dict(os.environ)}), "utf-8")
        return (
            subprocess.run(
                [sys.executable, __file__, path], capture_output=True, check=False
            ).returncode
            == 0
        )


def enter(spec: dict) -> None:
    """Make this process see the file system that the spec describes."""
    unshare()
    work = Path(spec["work"])
    mount("tmpfs", work, "tmpfs")
    root = work / "root"
    root.mkdir()
    if spec["mode"] == "overlay":
        _overlay(root, work)
    else:
        wanted = [inside for _, inside, *_ in (*spec["copies"], *spec["mounts"])]
        _bind_all(root, Path("/"), frozenset(Path(path) for path in wanted))
    _place(root, spec)
    below(root, spec["cwd"]).mkdir(parents=True, exist_ok=True)
    os.chroot(root)


def dies_with_parent() -> None:
    """Have this process killed when the one that started it ends."""
    _libc.prctl(SET_DEATH_SIGNAL, signal.SIGKILL)


def unshare() -> None:
    """Take this process's mounts away from everyone else's, as root or in a user namespace of its
    own."""
    uid, gid = os.geteuid(), os.getegid()
    _check(_libc.unshare(NEW_MOUNTS if uid == 0 else NEW_MOUNTS | NEW_USER), "unshare")
    if uid:
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"0 {uid} 1"),
            ("gid_map", f"0 {gid} 1"),
        ):
            Path(f"/proc/self/{name}").write_text(text)
    mount("none", Path("/"), None, RECURSIVE | PRIVATE)


def mount(
    source: str | Path,
    target: Path,
    kind: str | None = None,
    flags: int = 0,
    data: str | None = None,
) -> None:
    """Mount; raises OSError that names both ends."""
    texts = [None if x is None else os.fsencode(x) for x in (source, target, kind, data)]
    done = _libc.mount(texts[0], texts[1], texts[2], ctypes.c_ulong(flags), texts[3])
    _check(done, f"mount {source} on {target}")


def below(root: Path, path: str | Path) -> Path:
    """Return where an absolute path is once root is /."""
    return root / str(path).lstrip("/")


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _overlay(root: Path, work: Path) -> None:
    """Lay a memory-backed directory over everything: writes outside volumes vanish with the
    container."""
    (work / "up").mkdir()
    (work / "scratch").mkdir()
    mount("overlay", root, "overlay", 0, f"lowerdir=/,upperdir={work}/up,workdir={work}/scratch")
    for name in ("proc", "sys", "dev"):
        mount(f"/{name}", root / name, None, BIND | RECURSIVE)


def _bind_all(root: Path, here: Path, wanted: frozenset[Path]) -> None:
    """Bind the host's directories into an empty root, but for the places that something else will
    take."""
    for path in here.iterdir() if here.is_dir() else ():
        target = below(root, path)
        if path in wanted:
            continue
        if path.is_symlink():
            target.symlink_to(path.readlink())
        elif path.is_dir():
            target.mkdir()
            if any(path in each.parents for each in wanted):
                _bind_all(root, path, wanted)
            else:
                mount(path, target, None, BIND | RECURSIVE)
        elif path.exists():
            target.touch()
            mount(path, target, None, BIND)


def _place(root: Path, spec: dict) -> None:
    """Copy the code in and bind volumes and sockets."""
    for source, inside, mode in spec["copies"]:
        target = below(root, inside)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        shutil.copyfile(source, target)
        target.chmod(mode or 0o644)
    for source, inside in spec["mounts"]:
        target = below(root, inside)
        target.mkdir(parents=True, exist_ok=True)
        mount(source, target, None, BIND | RECURSIVE)


def main() -> None:
    """Build the view, then become the command."""
    spec = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    dies_with_parent()
    if spec["mode"] != "plain":
        enter(spec)
    os.chdir(spec["cwd"])
    os.execvpe(spec["argv"][0], spec["argv"], spec["env"])  # noqa: S606


if __name__ == "__main__":
    main()
