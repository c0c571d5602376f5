"""The lab as the soak sees it: nodes with their load, done to by command, never touched on their mounts.

Nothing here opens a file of a mount: whatever may wait for a frozen mount runs in a process of its own, with a limit.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mxfs_proto.errors import MxfsError
from mxfsd import control, mountinfo, procs, rundir
from mxfsd.lab.lab import Lab
from mxfsd.lab.state import STOPPED, Paths, updating
from tests.soak.load import NOW, THREADS, Config
from tests.soak.oracle import Life, Table

REPOSITORY = Path(__file__).resolve().parents[2]
COMMAND_S = 120.0
CHECK_S = 180.0
END_S = 60.0
WATCH_S = 1.0
STATUS_S = 2.0
MARGIN_S = 1.5
"""How late this program may be when it ends a partition or reads a log line's time."""


class Broken(Exception):
    """The soak cannot go on; the text says why and is itself a violation."""


@dataclass(slots=True)
class Generation:
    """One life of the load on a node."""

    name: str
    node: str
    table: Table
    processes: list[subprocess.Popen[bytes]]
    logs: list[Path]
    read: dict[Path, int] = field(default_factory=dict)
    checked: int = 0

    def news(self) -> list[dict[str, Any]]:
        """What the load has noted since the last call."""
        found = []
        for log in self.logs:
            with suppress(FileNotFoundError), open(log, "rb") as stream:
                stream.seek(self.read.get(log, 0))
                data = stream.read()
                whole = data.rfind(b"\n") + 1
                self.read[log] = self.read.get(log, 0) + whole
                found += [json.loads(line) for line in data[:whole].splitlines()]
        return found

    def operations(self) -> int:
        """How many operations its threads have done."""
        return sum(self.table.count(thread) for thread in range(len(THREADS)))

    def stuck(self, now_ms: int, limit_ms: int) -> list[str]:
        """Threads whose operation has not been answered for so long."""
        since = {name: self.table.waiting_since(number) for number, name in enumerate(THREADS)}
        return [
            f"{self.name}: {name} has waited for {now_ms - began} ms"
            for name, began in since.items()
            if began and now_ms - began > limit_ms
        ]


class Cluster:
    """Three nodes. *say* prints one line."""

    def __init__(self, folder: Path, oracle: Path, seed: int, base_ms: int, nodes: int = 3) -> None:
        self.folder = folder
        self.oracle = oracle
        self.lab = Lab(folder)
        self.names = [f"n{number}" for number in range(1, nodes + 1)]
        self.up: set[str] = set()
        self.slots: dict[int, str] = {}
        self.home = ""
        self.live: dict[str, Generation] = {}
        self.ended: list[Generation] = []
        self.operations = 0
        self.watch: Callable[[], None] = lambda: None
        """Called now and then while something is waited for; may raise Broken."""
        self._seed = seed
        self._base_ms = base_ms
        self._lives = dict.fromkeys(self.names, 0)

    def now_s(self) -> float:
        """Seconds since the soak began."""
        return (time.monotonic_ns() // 1_000_000 - self._base_ms) / 1000

    # -- commands --------------------------------------------------------------------------------------------------

    def _spawn(self, words: Sequence[str]) -> subprocess.Popen[str]:
        argv = [sys.executable, "-m", "mxfsd.cli.mxfs", "lab", words[0], str(self.folder), *words[1:]]
        return subprocess.Popen(
            argv, cwd=REPOSITORY, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def command(self, *commands: Sequence[str]) -> None:
        """Run ``mxfs lab`` commands, at once where there are several. Raises Broken when one fails or hangs."""
        failed = []
        running = [(words, self._spawn(words)) for words in commands]
        for words, process in running:
            try:
                said, _ = process.communicate(timeout=COMMAND_S)
                if process.returncode != 0:
                    failed.append(f"mxfs lab {' '.join(words)}: {said.strip()}")
            except subprocess.TimeoutExpired:
                process.kill()
                failed.append(f"mxfs lab {' '.join(words)} did not end within {COMMAND_S:g} s")
        if failed:
            raise Broken("; ".join(failed))

    def run_dir(self, node: str) -> Path:
        """A node's run directory."""
        return self.lab.run_dir(node)

    def view(self, node: str) -> dict[str, Any]:
        """What the daemon of a node says of itself; empty where it does not answer."""
        with suppress(MxfsError, OSError):
            return control.request(self.run_dir(node) / control.SOCKET_NAME, "status", STATUS_S)
        return {}

    def look(self) -> bool:
        """Ask the daemons that are up; whether all serve, under one home and epoch."""
        views = {node: self.view(node) for node in sorted(self.up)}
        for node, view in views.items():
            if view.get("slot"):
                self.slots[int(view["slot"])] = node
        if not views or any(view.get("state") != "serving" for view in views.values()):
            return False
        if len({(view["home"], view["epoch"]) for view in views.values()}) != 1:
            return False
        self.home = str(next(iter(views.values()))["home"])
        return self.home in views

    def takeover_ms(self) -> int:
        """How long the home says its last takeover lasted, from "declared dead" to serving."""
        return int(self.view(self.home).get("takeover_ms", 0))

    # -- load ------------------------------------------------------------------------------------------------------

    def begin(self, node: str) -> None:
        """Start the load on a node: a new generation."""
        self._lives[node] += 1
        name = f"{node}g{self._lives[node]}"
        folder = self.oracle / name
        folder.mkdir()
        table = Table(folder / "table")
        processes = []
        for mapped in (False, True):
            config = Config(
                str(self.folder / node), str(self.oracle), name, int(node[1:]), self._seed, self._base_ms, mapped
            )
            with open(folder / "stderr", "ab") as stderr:
                processes.append(self._on_node(node, config.argv(), stderr=stderr))
        logs = [folder / "load.log", folder / "mapped.log"]
        self.live[node] = Generation(name, node, table, processes, logs)

    def _on_node(self, node: str, argv: list[str], **more: Any) -> subprocess.Popen[bytes]:
        mark = Paths(self.folder.resolve()).mark(node)
        environment = {**os.environ, **dict([mark.split("=", 1)])}
        return subprocess.Popen(argv, cwd=REPOSITORY, env=environment, stdin=subprocess.DEVNULL, **more)

    def dying(self, *nodes: str) -> None:
        """From now on it is open whether these nodes' load survives."""
        for node in nodes:
            if node in self.live:
                self.live[node].table.life = Life.DYING

    def survived(self, *nodes: str) -> None:
        """These nodes' load goes on after all."""
        for node in nodes:
            if node in self.live:
                self.live[node].table.life = Life.LIVE

    def end(self, node: str, *, names_kept: bool, data_kept: bool = False, gently: bool = False) -> Generation | None:
        """End the load on a node, with SIGTERM or SIGKILL; say what must have stayed. Raises Broken if it does not."""
        generation = self.live.pop(node, None)
        if generation is None:
            return None
        for process in generation.processes:
            process.terminate() if gently else process.kill()
        for process in generation.processes:
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                for other in generation.processes:
                    other.kill()
                waiting = "; ".join(generation.stuck(int(self.now_s() * 1000), 1000))
                raise Broken(f"the load of {node} does not end: {waiting}") from None
        generation.table.end(names_kept=names_kept, data_kept=data_kept)
        self.operations += generation.operations()
        self.ended.append(generation)
        return generation

    def check(self, node: str, generations: list[Generation], *, settle: bool, remove: bool = False) -> dict[str, Any]:
        """Compare what generations left on the volume with the oracle, as *node* sees it. Raises Broken."""
        config = {
            "mount": str(self.folder / node),
            "oracle": str(self.oracle),
            "generations": [generation.name for generation in generations],
            "settle": settle,
            "remove": remove,
        }
        argv = [sys.executable, "-m", "tests.soak.check", json.dumps(config)]
        process = self._on_node(node, argv, stdout=subprocess.PIPE)
        try:
            said, _ = process.communicate(timeout=CHECK_S)
        except subprocess.TimeoutExpired:
            process.kill()
            raise Broken(f"the check on {node} did not end within {CHECK_S:g} s") from None
        if process.returncode != 0:
            raise Broken(f"the check on {node} ended with {process.returncode}")
        found: dict[str, Any] = json.loads(said)
        return found

    def probe(self, generation: Generation) -> str:
        """What is to be seen of the file whose map ended a load with SIGBUS, in other ways."""
        path, block = (self.oracle / generation.name / NOW).read_text().split("\n")[:2]
        process = self._on_node(
            generation.node,
            [sys.executable, "-m", "tests.soak.probe", path, block],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        try:
            said, _ = process.communicate(timeout=COMMAND_S)
        except subprocess.TimeoutExpired:
            process.kill()
            return f"{path}: no answer"
        return said.decode().rstrip()

    # -- a mount that has ended by itself --------------------------------------------------------------------------

    def mount_is_dead(self, node: str) -> bool:
        """Whether the node's mount answers nothing but errors any more, or is gone."""
        daemon = rundir.recall(self.run_dir(node), rundir.DAEMON)
        gone = mountinfo.at(str(self.lab.paths.mountpoint(node))) is None
        return gone or (self.run_dir(node) / rundir.DEAD).exists() or (daemon is None)

    def mount_has_ended(self, node: str) -> None:
        """Wait for the last of the daemon, and note that the node may be started again."""
        run_dir = self.run_dir(node)

        def over() -> bool:
            daemon = rundir.recall(run_dir, rundir.DAEMON)
            return daemon is None or not daemon.alive

        if not procs.wait_until(over, END_S):
            raise Broken(f"the daemon of {node} does not end although its mount has")
        with updating(Paths(self.folder.resolve())) as state:
            next(entry for entry in state.nodes if entry.name == node).state = STOPPED
        self.up.discard(node)

    def wait(self, condition: Callable[[], bool], limit_s: float, what: str) -> None:
        """Wait until *condition*. Raises Broken with what every daemon says."""
        end = time.monotonic() + limit_s
        while time.monotonic() < end:
            if procs.wait_until(condition, WATCH_S, 0.05):
                return
            self.watch()
        views = {
            node: {key: view.get(key) for key in ("state", "role", "home", "epoch", "slot")}
            for node in self.names
            for view in (self.view(node),)
        }
        raise Broken(f"{what}: not within {limit_s:g} s: {views}, up: {sorted(self.up)}")
