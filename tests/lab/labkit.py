"""The cluster the lab tests run on: a real `mxfs lab`, or one native XFS mount standing in for every node.

The stand-in (environment MXFS_TEST_NATIVE=1) is one XFS on a loop device and ``n1``, ``n2``, ``n3`` as symbolic links
to it: a test that fails there expects something that XFS itself does not promise, so the test is wrong.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mxfsd import rundir
from mxfsd.lab.state import STOPPED, Paths, updating

NATIVE = os.environ.get("MXFS_TEST_NATIVE") == "1"
CHANNEL = os.environ.get("MXFS_TEST_CHANNEL", "")
"""Of the nodes to the kernel; empty: what they choose themselves."""
OPTIONS = os.environ.get("MXFS_TEST_OPTIONS", "")
"""More mount options for every node."""
COMMAND_TIMEOUT_S = 120.0


class LabError(Exception):
    """A lab command or a check of the volume failed; the text says which and what it printed."""


def run(
    argv: Sequence[str | Path], timeout_s: float = COMMAND_TIMEOUT_S, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run *argv* to its end with its output captured as text; the exit code is the caller's to judge."""
    return subprocess.run(
        [str(a) for a in argv], capture_output=True, text=True, errors="replace", timeout=timeout_s, cwd=cwd
    )


def must(
    argv: Sequence[str | Path], timeout_s: float = COMMAND_TIMEOUT_S, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run *argv* as `run` does; raise LabError with its output unless it exits with 0."""
    done = run(argv, timeout_s, cwd)
    if done.returncode != 0:
        words = " ".join(str(a) for a in argv)
        raise LabError(f"{words}: exit {done.returncode}\nstdout: {done.stdout}\nstderr: {done.stderr}")
    return done


def mxfs_command(name: str) -> Path:
    """Return the path of one of the project's commands, beside the interpreter that runs the tests."""
    return Path(sys.executable).parent / name


def scratch_dir(prefix: str) -> Path:
    """Make a new folder that any uid may traverse (pytest's tmp_path is closed to others)."""
    made = Path(tempfile.mkdtemp(prefix=prefix, dir=os.environ.get("MXFS_TEST_TMP", "/var/tmp")))
    made.chmod(0o755)
    return made


def missing_capability() -> str | None:
    """Say why this machine cannot run lab tests, or return None."""
    if os.geteuid() != 0:
        return "needs root"
    if not NATIVE and not os.path.exists("/dev/fuse"):
        return "needs /dev/fuse"
    if not os.path.exists("/dev/loop-control"):
        return "needs loop devices"
    missing = [tool for tool in ("mkfs.xfs", "xfs_repair", "losetup") if shutil.which(tool) is None]
    return f"needs {', '.join(missing)}" if missing else None


class NativeXfs:
    """One XFS on a loop device over a sparse image: the reference for errno, and the stand-in for nodes."""

    def __init__(self, folder: Path, size: str = "2G") -> None:
        self.folder = folder
        self.image = folder / "native.img"
        self.root = folder / "native"
        self.root.mkdir()
        must(["truncate", "-s", size, self.image])
        self.loop = must(["losetup", "--find", "--show", self.image]).stdout.strip()
        try:
            must(["mkfs.xfs", "-q", self.loop])
            must(["mount", "-t", "xfs", self.loop, self.root])
        except LabError:
            run(["losetup", "-d", self.loop])
            raise
        self.root.chmod(0o755)

    def close(self) -> None:
        """Unmount, check with xfs_repair -n (LabError when it complains), free the loop device."""
        try:
            must(["umount", self.root])
            must(["xfs_repair", "-n", self.loop])
        finally:
            run(["losetup", "-d", self.loop])


class Lab:
    """A running cluster: ``nodes`` maps a node's name to the folder where the volume is mounted for it."""

    command = (sys.executable, "-m", "mxfsd.cli.mxfs")

    def __init__(
        self, folder: Path, count: int, size: str, timeouts: str, fencing: str = "lease", options: str = ""
    ) -> None:
        self.folder = folder
        self.nodes: dict[str, Path] = {f"n{i}": folder / f"n{i}" for i in range(1, count + 1)}
        self._native: NativeXfs | None = None
        if NATIVE:
            self._native = NativeXfs(folder, size)
            for path in self.nodes.values():
                path.symlink_to(self._native.root)
        else:
            command = ["lab", "up", str(folder), "--nodes", str(count), "--size", size, "--timeouts", timeouts]
            words = [options or (f"channel={CHANNEL},localflocks" if CHANNEL else ""), OPTIONS]
            options = ",".join(word for word in words if word)
            self._mxfs([*command, "--fencing", fencing, *(["-o", options] if options else [])])

    @property
    def native(self) -> bool:
        """Whether the nodes are one native XFS, where no lab command exists."""
        return self._native is not None

    @property
    def names(self) -> list[str]:
        """The nodes' names in order."""
        return list(self.nodes)

    def __getitem__(self, name: str) -> Path:
        return self.nodes[name]

    def _mxfs(self, argv: Sequence[str], timeout_s: float = COMMAND_TIMEOUT_S) -> str:
        return must([*self.command, *argv], timeout_s).stdout

    def status(self) -> dict[str, Any]:
        """Return `mxfs lab status --json` (keys home, epoch, nodes)."""
        reply: dict[str, Any] = json.loads(self._mxfs(["lab", "status", str(self.folder), "--json"]))
        return reply

    def home(self) -> str:
        """Return the home's name; the first node's when native."""
        return "n1" if self.native else str(self.status()["home"])

    def others(self) -> list[str]:
        """Return the names of the nodes that are not home."""
        home = self.home()
        return [name for name in self.names if name != home]

    def move_home(self, name: str) -> None:
        """Move the home to node *name*; returns when it has happened."""
        self._mxfs(["lab", "move-home", str(self.folder), name])

    def crash(self, name: str, process: str) -> None:
        """SIGKILL one process of a node: daemon, fuse or heartbeat."""
        self._mxfs(["lab", "crash", str(self.folder), name, "--process", process])

    def kill(self, name: str) -> None:
        """Crash a node; returns when nothing of it runs any more."""
        self._mxfs(["lab", "kill", str(self.folder), name])

    def stop(self, name: str) -> None:
        """Unmount the volume on a node; returns when its daemon has ended."""
        self._mxfs(["lab", "stop", str(self.folder), name])

    def start(self, name: str, options: str = "") -> None:
        """Mount the volume on a node that is stopped or dead; *options* are more mount options."""
        self._mxfs(["lab", "start", str(self.folder), name, *(["-o", options] if options else [])])

    def ended(self, name: str) -> None:
        """Note that a node's mount has ended by itself: it may be started again."""
        with updating(Paths(self.folder)) as state:
            next(node for node in state.nodes if node.name == name).state = STOPPED

    def at(self, where: str) -> str:
        """Return the name of the ``home``, or of another ``node``."""
        return self.home() if where == "home" else self.others()[0]

    def fuse_pid(self, name: str) -> int:
        """Return the pid of a node's FUSE process."""
        (path,) = self.folder.glob(f".lab/{name}/run/*/{rundir.FUSE}")
        found = rundir.recall(path.parent, rundir.FUSE)
        assert found is not None
        return found.pid

    def execute(self, name: str, *argv: str) -> str:
        """Run a command in the node's network and folder and return what it printed."""
        if self.native:
            return must(argv, cwd=self.nodes[name]).stdout
        return self._mxfs(["lab", "exec", str(self.folder), name, "--", *argv])

    def down(self) -> None:
        """Take the cluster down; LabError when that, or xfs_repair -n on the volume, complains."""
        if self._native is not None:
            self._native.close()
        else:
            self._mxfs(["lab", "down", str(self.folder)])

    def logs(self, lines: int = 40) -> str:
        """Return the last lines of every node's log, for a failing test's report."""
        return node_logs(self.folder, lines)


def node_logs(folder: Path, lines: int = 40) -> str:
    """Return the last lines of every log of the lab in *folder*."""
    parts = []
    for log in sorted(folder.glob(".lab/*/**/*.log")):
        with contextlib.suppress(OSError):
            tail = log.read_text(errors="replace").splitlines()[-lines:]
            parts.append(f"--- {log}\n" + "\n".join(tail))
    return "\n".join(parts)


def kernel_wait(thread: threading.Thread) -> str:
    """Where in the kernel a thread of this process waits."""
    return Path(f"/proc/self/task/{thread.native_id}/wchan").read_text() if thread.native_id else "not started"


def errno_of(call: Callable[[], object]) -> int:
    """Call it; return the errno that it fails with, 0 where it does not."""
    try:
        call()
    except OSError as exc:
        return exc.errno or 0
    return 0


@contextlib.contextmanager
def running_lab(
    count: int = 3,
    size: str = "2G",
    timeouts: str = "fast",
    fencing: str = "lease",
    folder: Path | None = None,
    options: str = "",
) -> Iterator[Lab]:
    """Yield a lab in a folder of its own; taking it down is part of the test, so its failure is one.

    *options*: mount options of every node, instead of the channel that is tested.
    *folder*: in this one, which has a disk.img perhaps, and is the caller's to remove.
    """
    kept = folder is not None
    folder = folder or scratch_dir("mxfs-lab-")
    try:
        lab = Lab(folder, count, size, timeouts, fencing, options)
    except (LabError, subprocess.TimeoutExpired):
        if not NATIVE:
            run([sys.executable, "-m", "mxfsd.cli.mxfs", "lab", "down", folder])
        shutil.rmtree(folder, ignore_errors=True)
        raise
    try:
        yield lab
    finally:
        try:
            lab.down()
        except (LabError, subprocess.TimeoutExpired) as broken:
            raise LabError(f"{broken}\n{lab.logs()}") from broken
    # Kept when anything failed above: the image and the logs are the evidence.
    if not kept:
        shutil.rmtree(folder, ignore_errors=True)
