"""What a run must not leave behind, and what must not grow while it goes on.

Memory is the private anonymous memory of a process (``Anonymous`` in smaps_rollup, proc(5)): PSS moves by megabytes
whenever another process that shares libraries with it comes or goes.
"""

import os
import re
import statistics
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from mxfsd import mountinfo, procs, rundir
from mxfsd.lab import disk, net
from mxfsd.lab.state import RUN_LINKS, Paths, lab_id

WARM_UP_S = 45.0
"""A process younger than this still fills its caches: attributes, names, open files."""
SPAN_S = 60.0
"""Growth is judged over at least this long after the warm-up."""
GROWTH_MAX_KIB = 12 << 10
"""Between the medians of the first and the last third of a process's samples."""
DESCRIPTORS_MORE = 12
"""Descriptors beside those of the lower mount that an idle process may have more than one of its kind had at first:
a home has connections to two peers, new and old ones while they change, and pipes of threads."""
LOWER_MAX = 512 + 256 + 256 + 16
"""Files of the lower mount that a process of the home may keep open: folders and files used last, operation records."""
KINDS = {"daemon": rundir.DAEMON, "fuse": rundir.FUSE, "heartbeat": rundir.HEARTBEAT}


@dataclass(slots=True)
class Watched:
    """One long-lived process and its samples of memory: (seconds, KiB)."""

    node: str
    kind: str
    process: rundir.Process
    since_s: float
    samples: list[tuple[float, int]] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.kind} of {self.node} (pid {self.process.pid})"


def anonymous_kib(pid: int) -> int:
    """Return the private memory of a process in KiB, 0 where it is gone."""
    with suppress(OSError):
        found = re.search(r"^Anonymous:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
        return int(found[1]) if found else 0
    return 0


def descriptors(pid: int, lab: Path) -> tuple[list[str], list[str]]:
    """Return what the descriptors of a process are, without touching the files; nothing where it is gone.

    The second list is those of the lower mount: it is in no namespace, so their paths begin at its own root.
    """
    own: list[str] = []
    lower: list[str] = []
    with suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/fd"):
            with suppress(OSError):
                path = os.readlink(f"/proc/{pid}/fd/{name}")
                elsewhere = path.startswith(("/dev/", "/run/", "/proc/", "/sys/", "/memfd:", f"{lab}/"))
                elsewhere = elsewhere or re.fullmatch(r"/\d+/abort", path) is not None  # fusectl, mounted nowhere
                ours = not path.startswith("/") or elsewhere
                (own if ours else lower).append(path if ours or not _is_folder(pid, name) else f"{path}/")
    return own, lower


def _is_folder(pid: int, name: str) -> bool:
    """Whether a descriptor was opened with O_DIRECTORY (proc(5), fdinfo)."""
    text = Path(f"/proc/{pid}/fdinfo/{name}").read_text()
    found = re.search(r"^flags:\s+([0-7]+)", text, re.MULTILINE)
    return found is not None and bool(int(found[1], 8) & os.O_DIRECTORY)


class Processes:
    """The daemons, FUSE layers and heartbeat processes of a lab's nodes, sampled now and then."""

    def __init__(self, lab: Path, run_dir_of: Callable[[str], Path]) -> None:
        self._lab = lab
        self._run_dir_of = run_dir_of
        self.watched: dict[tuple[int, int], Watched] = {}
        self._idle: dict[str, int] = {}

    def of(self, node: str) -> dict[str, rundir.Process]:
        """The processes of a node that live."""
        found = {kind: rundir.recall(self._run_dir_of(node), name) for kind, name in KINDS.items()}
        return {kind: process for kind, process in found.items() if process is not None and process.alive}

    def sample(self, node: str, now_s: float) -> None:
        """Note the memory of a node's processes."""
        for kind, process in self.of(node).items():
            watched = self.watched.setdefault((process.pid, process.start), Watched(node, kind, process, now_s))
            watched.samples.append((now_s, anonymous_kib(process.pid)))

    def note_idle(self, nodes: list[str]) -> None:
        """Before the load begins: how many descriptors a process of each kind has."""
        for node in nodes:
            for kind, process in self.of(node).items():
                own, _lower = descriptors(process.pid, self._lab)
                self._idle[kind] = max(self._idle.get(kind, 0), len(own))

    def descriptor_leaks(self, nodes: list[str], home: str) -> list[str]:
        """After the load has ended: which processes have kept descriptors."""
        found = []
        for node in nodes:
            for kind, process in self.of(node).items():
                own, lower = descriptors(process.pid, self._lab)
                if len(own) > self._idle[kind] + DESCRIPTORS_MORE:
                    kinds = [re.sub(r"\d+", "N", what) for what in own]
                    most = sorted(((kinds.count(what), what) for what in set(kinds)), reverse=True)[:5]
                    shown = ", ".join(f"{count} of {what}" for count, what in most)
                    found.append(f"{kind} of {node} has {len(own)} descriptors, {self._idle[kind]} at first: {shown}")
                most_lower = LOWER_MAX if node == home else 0
                if len(lower) > most_lower:
                    found.append(f"{kind} of {node} has {len(lower)} files of the lower mount open: {lower[:5]}")
                # Folders that another node removed stay among those used last; a file would keep its data.
                unlinked = [path for path in lower if path.endswith(" (deleted)")]
                if unlinked:
                    found.append(f"{kind} of {node} keeps unlinked files of the lower mount open: {unlinked[:5]}")
        return found

    def growth(self) -> list[tuple[Watched, float]]:
        """KiB by which each process that lived long enough has grown after its warm-up."""
        grown = []
        for watched in self.watched.values():
            warm = [(at, kib) for at, kib in watched.samples if at - watched.since_s >= WARM_UP_S and kib]
            if len(warm) >= 6 and warm[-1][0] - warm[0][0] >= SPAN_S:
                third = len(warm) // 3
                early, late = (statistics.median(kib for _, kib in part) for part in (warm[:third], warm[-third:]))
                grown.append((watched, late - early))
        return grown

    def memory_leaks(self) -> list[str]:
        """Which of them have grown too much."""
        found = []
        for watched, grown in self.growth():
            if grown > GROWTH_MAX_KIB:
                few = watched.samples[:: max(1, len(watched.samples) // 12)]
                found.append(f"{watched} has grown by {grown / 1024:.1f} MiB after its warm-up: {few}")
        return found


def left_behind(folder: Path, nodes: list[str]) -> list[str]:
    """After ``mxfs lab down``: processes, mounts, loop devices, namespaces and links that are still there."""
    paths = Paths(folder)
    found = []
    for node in nodes:
        pids = procs.marked(paths.mark(node))
        if pids:
            found.append(f"processes of {node} are left: {procs.describe(pids)}")
        if paths.run_link(node).is_symlink():
            found.append(f"{paths.run_link(node)} is left in {RUN_LINKS}")
    below = f"{folder}/"
    found += [
        f"{mount.mountpoint} is still mounted" for mount in mountinfo.read() if mount.mountpoint.startswith(below)
    ]
    found += [f"{loop} is left" for loop in disk.loops_of(paths.image)]
    found += [f"network namespace {name} is left" for name in net.existing(lab_id(folder))]
    return found


def hidden_leftovers(image: Path) -> list[str]:
    """Look into the volume's hidden folder, the lab being down: files without a name that nobody can have open."""
    loop = disk.attach(image, read_only=True)
    folder = tempfile.mkdtemp(prefix="soak-look-")
    try:
        subprocess.run(
            ["mount", "-i", "-t", "xfs", "-o", "ro,norecovery", loop, folder], check=True, capture_output=True
        )
        try:
            names = os.listdir(f"{folder}/.mxfs/orphans")
        finally:
            subprocess.run(["umount", "-i", folder], check=True, capture_output=True)
    finally:
        os.rmdir(folder)
        disk.detach(loop, image)
    return [f"unlinked files are left on the volume: {sorted(names)}"] if names else []
