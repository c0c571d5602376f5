"""``python -m bench.recovery``: how long a volume pauses when its home dies, and whether anything is lost.

A lab of three nodes. Every node holds a share of the files open or cached and writes without end (`survivor.py`).
Again and again the home is killed, the others go on, and the node comes back. ``--kind kill``: XFS down without log
flush and all processes gone, as when power fails; ``daemon``: its daemon alone, which its slot says. For each death:

declared   from "the home is dead" to serving again, as the next home measured it
pause      from the death to another home that serves

At the end every change that was acknowledged on a node that lived on is there, every fsynced content is right, no
program saw an error, and xfs_repair -n (``mxfs lab down``) has nothing to say.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.columns import BenchError, lab_command
from bench.survivor import content
from mxfsd.lab.lab import Lab

NODES = 3
SURVIVOR = Path(__file__).with_name("survivor.py")
TARGETS = {"declared_median_s": 1.0, "declared_worst_s": 3.0}
PAUSE_S = {("kill", "default"): 17.0, ("kill", "fast"): 6.0, ("daemon", "default"): 2.0, ("daemon", "fast"): 2.0}


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.recovery", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, metavar="N", help="deaths of the home (default 50)")
    parser.add_argument("--kind", choices=("kill", "daemon"), default="kill")
    parser.add_argument("--timeouts", choices=("fast", "default"), default="fast")
    parser.add_argument("--fencing", choices=("lease", "pr"), default="lease")
    parser.add_argument("--files", type=int, default=10_000, metavar="N", help="open or cached (default 10,000)")
    parser.add_argument("--out", type=Path, help="folder for recovery.json")
    parser.add_argument("--strict", action="store_true", help="exit with 1 when a target is missed")
    return parser.parse_args(argv)


def wait_for(condition: Callable[[], bool], limit_s: float, what: str) -> None:
    """Poll; BenchError when it takes too long."""
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            raise BenchError(f"{what}: not within {limit_s:g} s")
        time.sleep(0.02)


class Survivor:
    """One program on one node, and the log of what it was answered."""

    def __init__(self, lab: Path, number: int, files: int, log: Path) -> None:
        self.number = number
        self.log = log
        words = ["lab", "exec", str(lab), f"n{number}", "--", sys.executable, "-I", str(SURVIVOR)]
        words += [str(lab / f"n{number}"), str(number), str(NODES), str(files), str(log)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mxfsd.cli.mxfs", *words], stdin=subprocess.DEVNULL, start_new_session=True
        )

    def lines(self) -> list[list[str]]:
        """What was logged, complete lines only, each split in at most four."""
        if not self.log.exists():
            return []
        text = self.log.read_text()
        return [line.split(" ", 3) for line in text[: text.rfind("\n") + 1].splitlines()]

    def ready(self) -> bool:
        """Whether it holds its files."""
        return any(line[2:3] == ["ready"] for line in self.lines())

    def failed(self) -> str:
        """The error that it saw, or ''."""
        if not self.lines() and self.process.poll() is not None:
            return f"it ended with status {self.process.returncode}"
        return next((" ".join(line) for line in self.lines() if line[0] == "ERROR"), "")

    def answered_after(self, moment: float) -> float | None:
        """When the first operation that began after *moment*, or was under way then, was answered."""
        for line in self.lines():
            if line[0] != "ERROR" and line[2] not in ("read", "ready") and float(line[0]) > moment:
                return float(line[0])
        return None

    def end(self) -> None:
        """End the program; what it is doing just now is not waited for."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()


class Run:
    """All deaths of one run."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.folder = Path(tempfile.mkdtemp(prefix="mxfs-recovery-", dir="/var/tmp"))
        self.lab = self.folder / "lab"
        self.survivors: dict[int, Survivor] = {}
        self.logs: list[tuple[Path, bool]] = []
        self.deaths: list[dict[str, float]] = []
        self.errors: list[str] = []

    def status(self) -> dict[str, Any]:
        """The lab's status."""
        return Lab(self.lab).status()

    def start(self) -> None:
        """Make the lab and the files; start a program on every node."""
        options = self.options
        up = ["--nodes", str(NODES), "--timeouts", options.timeouts, "--fencing", options.fencing]
        lab_command("up", self.lab, *up)
        files = self.lab / "n1" / "files"
        files.mkdir()
        for number in range(options.files):
            with open(files / f"f{number:06d}", "wb", buffering=0) as file:
                file.write(content(number))
                os.fsync(file.fileno())
        for number in range(1, NODES + 1):
            self.begin(number)
        self.all_ready()

    def begin(self, number: int) -> None:
        """Start the program of a node."""
        log = self.folder / f"n{number}-{len(self.logs)}.log"
        self.survivors[number] = Survivor(self.lab, number, self.options.files, log)

    def all_ready(self) -> None:
        """Wait until every program holds its files."""
        for survivor in self.survivors.values():
            wait_for(lambda one=survivor: one.ready() or bool(one.failed()), 300, f"n{survivor.number} holds its files")  # type: ignore[misc]
            if survivor.failed():
                raise BenchError(f"n{survivor.number}: {survivor.failed()}")

    def death(self) -> dict[str, float]:
        """Kill the home; return the figures once the others go on."""
        home = int(self.status()["home"][1:])
        epoch = self.status()["epoch"]
        died = self.survivors[home]
        began = time.monotonic()
        if self.options.kind == "kill":
            Lab(self.lab).kill(f"n{home}")
            self.survivors.pop(home)
            self.retire(died, dead=True)
        else:
            Lab(self.lab).crash_process(f"n{home}", "daemon")
        others = [one for number, one in self.survivors.items() if number != home]

        def gone_on() -> bool:
            self.errors += [f"n{one.number}: {one.failed()}" for one in others if one.failed()]
            return bool(self.errors) or all(one.answered_after(began) is not None for one in others)

        # What was under way when the home died is answered at once where its reply was out already.
        wait_for(lambda: self.serving(epoch) or bool(self.errors), 60, "another node is the home")
        served = time.monotonic()
        wait_for(gone_on, 60, "the others go on")
        took = next(n["daemon"]["takeover_ms"] for n in self.status()["nodes"] if n["home"] and n["daemon"])
        return {"declared_s": took / 1000, "pause_s": served - began, "home": home}

    def serving(self, epoch: int) -> bool:
        """Whether a later home serves."""
        views = [node["daemon"] for node in self.status()["nodes"] if node["daemon"] is not None]
        return any(v["epoch"] > epoch and v["role"] == "home" and v["state"] == "serving" for v in views)

    def retire(self, survivor: Survivor, *, dead: bool) -> None:
        """The program has ended, with its node or without it."""
        survivor.end()
        self.logs.append((survivor.log, dead))
        if survivor.failed() and not dead:
            self.errors.append(f"n{survivor.number}: {survivor.failed()}")

    def back(self, home: int) -> None:
        """The dead node comes back, and its program with it."""
        if self.options.kind == "kill":
            lab_command("start", self.lab, f"n{home}")
            self.begin(home)
            self.all_ready()
        else:
            wait_for(lambda: all(n["state"] == "up" for n in self.status()["nodes"]), 60, "the daemon is back")
            time.sleep(1)  # it goes on to write: its own errors count too

    def check(self) -> int:
        """Compare the volume with what was acknowledged; return how many changes were looked at."""
        for survivor in list(self.survivors.values()):
            self.retire(survivor, dead=False)
        home = self.status()["home"]
        looked = 0
        for log, dead in self.logs:
            looked += self.check_log(log, self.lab / home, dead)
        for number in range(self.options.files):
            found = (self.lab / home / "files" / f"f{number:06d}").read_bytes()
            if found != content(number):
                self.errors.append(f"file {number} reads {found!r}")
        return looked

    def check_log(self, log: Path, root: Path, dead: bool) -> int:
        """One program's log against the volume.

        Of a node that died only what it fsynced must be there; what it renamed since its last fsync, under either name.
        """
        lines = [line.split(" ", 3) for line in log.read_text().splitlines() if line.count(" ") >= 3]
        names: dict[str, bool] = {}
        moved: dict[str, str] = {}  # new name → old name, since the last fsync
        last = ""
        for _, _, what, name in lines:
            if what in ("create", "mkdir", "fsync"):
                names[name] = names.get(name, False) or what == "fsync"
                if what == "fsync":
                    moved.clear()
            elif what == "rename":
                old, _, new = name.partition(" ")
                names[new] = names.pop(old, False)
                moved[new] = old
            elif what == "unlink":
                names.pop(name, None)
            last = name.split(" ")[0] if what != "read" else last
        # The operation under way at the end may have happened or not.
        turn = "".join(c for c in last.rpartition("/")[2] if c.isdigit())
        doubtful = {n for n in names if "".join(c for c in n.rpartition("/")[2] if c.isdigit()) == turn}
        for name, synced in names.items():
            if name in doubtful or (dead and not synced):
                continue
            path = root / name
            if dead and name in moved and not os.path.lexists(path):
                path = root / moved[name]
            if not os.path.lexists(path):
                self.errors.append(f"{name} is lost ({log.name})")
            elif synced and path.is_file():
                number = int("".join(c for c in path.name if c.isdigit()))
                if json.loads(path.read_bytes() or b"null") != [int(name[1]), number]:
                    self.errors.append(f"{name} has lost its content ({log.name})")
        return len(lines)

    def close(self, *, keep: bool) -> None:
        """End everything; xfs_repair -n must have nothing to say."""
        for survivor in self.survivors.values():
            survivor.end()
        if keep:
            for log in (self.lab / ".lab").glob("n*/run/*/daemon.log"):
                shutil.copy(log, self.folder / f"daemon-{log.relative_to(self.lab / '.lab').parts[0]}.log")
        try:
            lab_command("down", self.lab, *(["--force"] if keep else []))
        finally:
            if not keep:
                shutil.rmtree(self.folder, ignore_errors=True)


def summary(run: Run, looked: int) -> dict[str, Any]:
    """The figures of a run."""
    declared = sorted(death["declared_s"] for death in run.deaths)
    pauses = sorted(death["pause_s"] for death in run.deaths)
    options = run.options
    return {
        "kind": options.kind,
        "timeouts": options.timeouts,
        "fencing": options.fencing,
        "files": options.files,
        "deaths": len(run.deaths),
        "declared_median_s": statistics.median(declared),
        "declared_worst_s": declared[-1],
        "pause_median_s": statistics.median(pauses),
        "pause_worst_s": pauses[-1],
        "acknowledged": looked,
        "errors": run.errors,
    }


def missed(figures: dict[str, Any]) -> list[str]:
    """The targets that were missed."""
    limits = {"pause_worst_s": PAUSE_S[figures["kind"], figures["timeouts"]]}
    if figures["kind"] == "kill":
        limits |= TARGETS
    found = [f"{name} {figures[name]:.2f} > {limit:g}" for name, limit in limits.items() if figures[name] > limit]
    return found + figures["errors"]


def main(argv: list[str] | None = None) -> int:
    """Run it; 0, or 1 where something was lost or (--strict) a target missed."""
    options = arguments(argv)
    run = Run(options)
    good = False
    try:
        run.start()
        for number in range(options.kills):
            death = run.death()
            run.deaths.append(death)
            print(
                f"death {number + 1} of {options.kills}: home n{death['home']:.0f}, declared to serving "
                f"{death['declared_s']:.2f} s, pause {death['pause_s']:.2f} s",
                flush=True,
            )
            if run.errors:
                break
            run.back(int(death["home"]))
        looked = run.check()
        good = not run.errors
    except BenchError as error:
        print(f"bench.recovery: {error}", file=sys.stderr)
        return 1
    finally:
        run.close(keep=not good)
        if not good:
            print(f"logs and disk are kept in {run.folder}", file=sys.stderr)
    figures = summary(run, looked)
    for name, value in figures.items():
        print(f"{name:18} {value:.2f}" if isinstance(value, float) else f"{name:18} {value}")
    for line in missed(figures):
        print(f"MISSED {line}")
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "recovery.json").write_text(json.dumps(figures, indent=1) + "\n")
    return 1 if run.errors or (options.strict and missed(figures)) else 0


if __name__ == "__main__":
    sys.exit(main())
