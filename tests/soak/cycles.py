"""``python -m tests.soak.cycles -n 1000``: mounts and unmounts, again and again, and looks for what stays behind.

A sixteenth of the cycles on a node that is alone (each makes it the home and unmounts XFS again), the others on three
nodes at once (most of a mount is waiting) while the first one stays the home, whose processes must neither grow nor
keep descriptors.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from mxfsd import mountinfo, procs, rundir
from mxfsd.lab import disk, net
from mxfsd.lab.lab import Lab
from mxfsd.lab.state import RUN_LINKS, lab_id
from tests.soak.cluster import REPOSITORY
from tests.soak.leaks import KINDS, anonymous_kib, descriptors, hidden_leftovers, left_behind

WARM_UP = 10
"""Cycles before the first look: modules are imported, caches and the operation records of the volume are made."""
CYCLE_S = 30.0
MEMORY_KIB = 4 << 10
"""A process of the home may grow by so much: Python keeps arenas of 1 MiB that one object is left in."""
DESCRIPTORS = 2
"""A connection of a node that has just left may still be closing."""


def work(folder: Path, node: str, first: int, count: int) -> None:
    """Mount and unmount on one node *count* times; what each cycle writes, the next one reads. Raises MxfsError."""
    lab = Lab(folder)
    path = lab.paths.mountpoint(node) / f"written-on-{node}"
    own = 0
    for number in range(first, first + count):
        lab.start(node)
        if number and path.read_text() != f"{number - 1}\n":
            raise SystemExit(f"{node}, cycle {number}: {path.read_text()!r} was read")
        path.write_text(f"{number}\n")
        lab.stop(node)
        have = len(os.listdir("/proc/self/fd"))
        if number == first + 1:
            own = have
        if own and have > own:
            raise SystemExit(f"{node}, cycle {number}: mounting and unmounting left {have - own} descriptors open")


class Look:
    """What there is at a moment, between two cycles: the nodes that cycle are not mounted."""

    def __init__(self, lab: Lab, names: list[str], stays: str) -> None:
        paths = lab.paths
        self.counts: Counter[str] = Counter()
        for name in names:
            self.counts[f"processes of {name}"] = len(procs.marked(paths.mark(name)))
            files = sorted(str(path.relative_to(paths.private)) for path in paths.run_root(name).rglob("*"))
            self.counts[f"files in run directories of {name}"] = len(files)
        self.counts["mounts"] = sum(mount.mountpoint.startswith(f"{paths.root}/") for mount in mountinfo.read())
        self.counts["loop devices"] = len(disk.loops_of(paths.image))
        self.counts["network namespaces"] = len(net.existing(lab_id(paths.root)))
        self.counts[f"links in {RUN_LINKS}"] = len(list(Path(RUN_LINKS).glob(f"{lab_id(paths.root)}-*")))
        self.memory: dict[str, int] = {}
        self.descriptors: dict[str, list[str]] = {}
        for kind, file in KINDS.items() if stays else ():
            process = rundir.recall(lab.run_dir(stays), file)
            if process is not None:
                self.memory[kind] = anonymous_kib(process.pid)
                own, _lower = descriptors(process.pid, paths.root)
                self.descriptors[kind] = own

    def leaks(self, before: "Look") -> list[str]:
        """What is more than *before*."""
        found = [
            f"{what}: {self.counts[what]}, before {before.counts[what]}"
            for what in self.counts
            if self.counts[what] > before.counts[what]
        ]
        for kind, kib in self.memory.items():
            if kib > before.memory[kind] + MEMORY_KIB:
                found.append(f"memory of the home's {kind}: {kib} KiB, before {before.memory[kind]} KiB")
            more = Counter(self.descriptors[kind]) - Counter(before.descriptors[kind])
            grown = len(self.descriptors[kind]) - len(before.descriptors[kind])
            if grown > DESCRIPTORS:
                found.append(f"the home's {kind} has {grown} descriptors more: {list(more)[:5]}")
        return found


def cycle(folder: Path, nodes: list[str], first: int, count: int) -> list[str]:
    """Run ``work`` on the nodes at once, in processes that may be killed; return what went wrong."""
    running = []
    for node in nodes:
        words = json.dumps([str(folder), node, first, count])
        argv = [sys.executable, "-m", "tests.soak.cycles", "--work", words]
        running.append(
            subprocess.Popen(argv, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    wrong = []
    for node, process in zip(nodes, running, strict=True):
        try:
            said, _ = process.communicate(timeout=CYCLE_S * max(count, 2))
            if process.returncode != 0:
                wrong.append(f"{node}: {said.strip()}")
        except subprocess.TimeoutExpired:
            process.kill()
            wrong.append(f"{node}: {count} cycles are not done after {CYCLE_S * max(count, 2):g} s")
    return wrong


def phase(lab: Lab, all_nodes: list[str], nodes: list[str], first: int, count: int, stays: str) -> list[str]:
    """Warm up, look, do *count* cycles in all on *nodes*, look again; return what leaked or failed."""
    root = lab.paths.root
    each = -(-count // len(nodes))
    warm_up = min(WARM_UP, each // 2)
    wrong = cycle(root, nodes, first, warm_up)
    before = Look(lab, all_nodes, stays)
    begun = time.monotonic()
    wrong = wrong or cycle(root, nodes, first + warm_up, each - warm_up)
    seconds = time.monotonic() - begun
    after = Look(lab, all_nodes, stays)
    done = (each - warm_up) * len(nodes)
    where = f"while {stays} stays" if stays else "alone"
    print(f"{done} cycles on {' and '.join(nodes)} {where}: {seconds:.1f} s, {done / max(seconds, 0.001):.2f} a second")
    for kind, kib in after.memory.items():
        grown = kib - before.memory[kind]
        print(f"  the home's {kind}: {kib} KiB, {grown:+d} KiB; {len(after.descriptors[kind])} descriptors")
    return wrong or after.leaks(before)


def run(count: int) -> list[str]:
    """Do *count* cycles in a lab of four nodes; return what is wrong."""
    top = Path(tempfile.mkdtemp(prefix="mxfs-cycles-", dir="/var/tmp"))
    lab = Lab(top / "lab")
    names = ["n1", "n2", "n3", "n4"]
    lab.up(len(names), 1 << 30)
    wrong: list[str] = []
    try:
        for name in reversed(names):
            lab.stop(name)
        alone = count // 16
        wrong += phase(lab, names, ["n1"], 0, alone, "")
        if not wrong:
            lab.start("n1")
            wrong += phase(lab, names, names[1:], 0, count - alone, "n1")
    finally:
        try:
            lab.down(force=bool(wrong))
        except Exception as failed:  # noqa: BLE001 - whatever it is, it is one more thing that is wrong
            wrong.append(f"lab down: {failed}")
        wrong += left_behind(lab.paths.root, names)
    if not wrong:
        wrong += hidden_leftovers(lab.paths.image)
    if not wrong:
        shutil.rmtree(top)
    return wrong


def main() -> int:
    """Run the cycles; 0 where nothing was left behind."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak.cycles", description=__doc__)
    parser.add_argument("-n", type=int, default=1000, metavar="N", help="cycles in all (default 1000)")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        folder, node, first, count = json.loads(arguments.work)
        work(Path(folder), node, first, count)
        return 0
    if arguments.n < 8 * WARM_UP:
        parser.error(f"-n: at least {8 * WARM_UP}")
    wrong = run(arguments.n)
    for line in wrong:
        print(f"VIOLATION {line}")
    print(f"{arguments.n} cycles, {len(wrong)} violations")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
