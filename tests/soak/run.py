"""One soak: a lab, the load, event after event, and the verdict."""

import shutil
import signal
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mxfsd.core.timeouts import Timeouts
from tests.soak.cluster import MARGIN_S, Broken, Cluster, Generation
from tests.soak.events import Actions, Chooser, Event
from tests.soak.leaks import Processes, hidden_leftovers, left_behind
from tests.soak.oracle import Life
from tests.soak.watch import Logs, spurious

TIMEOUTS = "fast"
SIZE = "1G"
STUCK_MS = 30_000
IDLE_S = 3.0
KEEP_ENDED = 6
"""Generations that have ended are looked at again until so many later ones have."""


@dataclass(slots=True)
class Settings:
    """What the command line says. *only*: kinds of events, all where it is None."""

    folder: Path
    seconds: float
    seed: int
    fencing: str = "lease"
    only: list[str] | None = None
    keep: bool = False


@dataclass(slots=True)
class Tally:
    """What is counted for the summary."""

    events: list[Event] = field(default_factory=list)
    takeovers_ms: list[int] = field(default_factory=list)
    put_out: int = 0
    spurious: int = 0
    looked: int = 0
    excused_errors: int = 0


class Soak:
    """Runs it. ``violations`` is empty where all went well."""

    def __init__(self, settings: Settings, say: Callable[[str], None]) -> None:
        self.settings = settings
        self.say = say
        self.violations: list[str] = []
        self.tally = Tally()
        base_ms = time.monotonic_ns() // 1_000_000
        self._wall_s = time.time() - base_ms / 1000  # of the moment when CLOCK_MONOTONIC began
        self._base_s = base_ms / 1000
        settings.folder.mkdir(parents=True, exist_ok=True)
        oracle = settings.folder / "oracle"
        oracle.mkdir()
        self.cluster = Cluster(settings.folder / "lab", oracle, settings.seed, base_ms)
        self.logs = Logs(self.cluster.folder, self.cluster.names)
        self.processes = Processes(self.cluster.folder, self.cluster.run_dir)
        self.cluster.watch = self._watch
        self._excused: list[tuple[str, float, float]] = []
        self._pending: list[tuple[Generation, str]] = []
        self._told: set[int] = set()
        """Processes of the load whose end has been noted."""

    def violated(self, what: str) -> None:
        """Something is not as it must be."""
        self.violations.append(what)
        self.say(f"{self.cluster.now_s():8.1f} s  VIOLATION {what}")

    def run(self) -> None:
        """All of it, the end of the lab included."""
        cluster = self.cluster
        try:
            cluster.command(
                ("up", "--nodes", "3", "--size", SIZE, "--timeouts", TIMEOUTS, "--fencing", self.settings.fencing)
            )
            cluster.up.update(cluster.names)
            cluster.wait(cluster.look, 30, "the lab serves")
            self._prepare()
            self._work()
            self._finish()
        except Broken as broken:
            self.violated(str(broken))
            with suppress(Broken):
                self._collect()
        finally:
            self._down()

    def _prepare(self) -> None:
        root = self.cluster.folder / "n1"
        for name in ("g", "shared", "logs"):
            (root / name).mkdir()  # nothing is wrong yet: this mount answers
        self.processes.note_idle(self.cluster.names)
        for node in self.cluster.names:
            self.cluster.begin(node)

    def _work(self) -> None:
        cluster, settings = self.cluster, self.settings
        chooser = Chooser(settings.seed, settings.only)
        actions = Actions(cluster, chooser.rng, Timeouts.named(TIMEOUTS))
        end_s = cluster.now_s() + settings.seconds
        while cluster.now_s() < end_s and not self.violations:
            self._rest(chooser.pause_s())
            kind = chooser.next()
            began_s = time.time()
            event: Event | None = None
            try:
                event = actions.run(kind)
            except Broken as broken:
                raise Broken(f"during {kind}: {broken}") from broken
            finally:
                self._excuse(event, began_s)
            self._collect()
            self._after(event)

    def _rest(self, seconds: float) -> None:
        """All goes well for a while."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(0.25)
            self._collect()

    def _excuse(self, event: Event | None, began_s: float) -> None:
        nodes = event.touched if event is not None else set(self.cluster.names)
        for node in nodes:
            self._excused.append((node, began_s - MARGIN_S, time.time() + MARGIN_S))

    def _after(self, event: Event) -> None:
        """Note what it took; look at what the generations that have ended left."""
        cluster = self.cluster
        self.tally.events.append(event)
        if event.failover and event.nodes != [cluster.home]:
            took = cluster.takeover_ms()
            self.tally.takeovers_ms.append(took)
            event.note += f" takeover {took} ms"
        self.say(event.line())
        self._settle_pending()
        clients = [node for node in cluster.names if node != cluster.home]
        node = clients[len(self.tally.events) % len(clients)]
        if cluster.ended:
            self._check(node, cluster.ended, settle=True)
        while len(cluster.ended) > KEEP_ENDED:
            self._remove(node, cluster.ended.pop(0))
        for name in cluster.names:
            self.processes.sample(name, cluster.now_s())

    def _check(self, node: str, generations: list[Generation], *, settle: bool) -> None:
        found = self.cluster.check(node, generations, settle=settle)
        self.tally.looked += int(found["looked"])
        for wrong in found["wrong"]:
            self.violated(f"{wrong} (looked at on {node})")

    def _remove(self, node: str, generation: Generation) -> None:
        """Its lines stay in the logs, and are looked at no more."""
        if self.violations:
            return
        generation.table.life = Life.REMOVED
        for wrong in self.cluster.check(node, [generation], settle=False, remove=True)["wrong"]:
            self.violated(f"{wrong} (removing {generation.name} on {node})")
        shutil.rmtree(self.cluster.oracle / generation.name)
        generation.table.close()

    # -- what the load and the logs say ----------------------------------------------------------------------------

    def _collect(self, *, stuck: bool = True, put_out: bool = True) -> None:
        """Judge what was noted. Errors of a load whose node may be gone wait until that is known."""
        cluster = self.cluster
        for generation in [*cluster.live.values(), *cluster.ended]:
            for note in generation.news():
                if note["kind"] in ("error", "wrong"):
                    self._pending.append((generation, describe(note)))
        for generation in cluster.live.values():
            for process in generation.processes:
                if process.poll() is not None and generation.table.life is Life.LIVE and process.pid not in self._told:
                    self._told.add(process.pid)
                    self._pending.append((generation, f"the load of {generation.name} ended: {process.returncode}"))
                    if process.returncode == -signal.SIGBUS:
                        self.say(cluster.probe(generation))
            if stuck and generation.table.life is Life.LIVE:
                for waits in generation.stuck(int(cluster.now_s() * 1000), STUCK_MS):
                    raise Broken(waits)
        self._settle_pending()
        if put_out:
            self._read_logs()

    def _read_logs(self) -> None:
        for put_out in self.logs.news():
            name = self.cluster.slots.get(put_out.slot, f"slot {put_out.slot}")
            self.tally.put_out += 1
            if spurious(put_out, name, self._excused):
                self.tally.spurious += 1
                self.violated(f"{name} was put out for nothing: {put_out.why} (log of {put_out.by}, {put_out.at:.3f})")
        for error in self.logs.errors:
            self.violated(f"an internal error: {error}")
        self.logs.errors.clear()

    def _watch(self) -> None:
        """While something is waited for: there is no need to wait when it is known already that all is not well."""
        before = len(self.violations)
        self._collect(stuck=False, put_out=False)
        if len(self.violations) > before:
            raise Broken("not waited for any longer")

    def _settle_pending(self) -> None:
        for generation, text in self._pending[:]:
            life = generation.table.life
            if life is Life.DYING:
                continue
            self._pending.remove((generation, text))
            if life is Life.LIVE or generation.table.data_kept or " sees " in text:
                self.violated(text)
            else:
                self.tally.excused_errors += 1

    # -- the end ---------------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        """The load ends in good order; every node shows all that was acknowledged; nothing has grown."""
        cluster = self.cluster
        for node in list(cluster.live):
            cluster.end(node, names_kept=True, data_kept=True, gently=True)
        self._collect()
        for node in cluster.names:
            self._check(node, cluster.ended, settle=False)
        time.sleep(IDLE_S)  # what was open a moment ago is closed, answers are confirmed
        for leak in self.processes.descriptor_leaks(cluster.names, cluster.home):
            self.violated(leak)
        for leak in self.processes.memory_leaks():
            self.violated(leak)

    def _down(self) -> None:
        cluster = self.cluster
        for node in list(cluster.live):
            with suppress(Broken):
                cluster.end(node, names_kept=False)
        kept = self.settings.folder / "logs"
        shutil.rmtree(kept, ignore_errors=True)
        for log in cluster.folder.glob(".lab/*/run/*/*.log"):
            target = kept / log.relative_to(cluster.folder / ".lab").parts[0]
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy(log, target)
        try:
            cluster.command(("down", *(("--force",) if self.violations else ())))
        except Broken as broken:
            self.violated(str(broken))
        for left in left_behind(cluster.folder, cluster.names):
            self.violated(left)
        if not self.violations:
            for left in hidden_leftovers(cluster.lab.paths.image):
                self.violated(left)
        if not self.violations and not self.settings.keep:
            shutil.rmtree(self.settings.folder)

    def summary(self) -> list[str]:
        """What is printed at the end."""
        tally, cluster = self.tally, self.cluster
        counts: dict[str, int] = {}
        for event in tally.events:
            counts[event.kind] = counts.get(event.kind, 0) + 1
        lines = [
            f"{len(tally.events)} events in {cluster.now_s():.0f} s: "
            + ", ".join(f"{kind} {count}" for kind, count in sorted(counts.items())),
            f"{cluster.operations} operations of the load, {tally.looked} things compared, "
            f"{tally.excused_errors} errors on nodes that had been killed or cut off for long",
        ]
        if tally.takeovers_ms:
            median, worst = statistics.median(tally.takeovers_ms), max(tally.takeovers_ms)
            lines.append(
                f"{len(tally.takeovers_ms)} takeovers, from declared dead to serving: "
                f"median {median:.0f} ms, worst {worst} ms"
            )
        served = [event.served_s for event in tally.events if event.served_s >= 0]
        if served:
            lines.append(f"serving again: median {statistics.median(served):.2f} s, worst {max(served):.2f} s")
        grown = self.processes.growth()
        if grown:
            watched, most = max(grown, key=lambda entry: entry[1])
            lines.append(
                f"memory of {len(grown)} processes after warm-up: {watched} grew most, by {most / 1024:.1f} MiB"
            )
        lines.append(f"put out: {tally.put_out}, spurious: {tally.spurious}")
        return lines


def describe(note: dict[str, Any]) -> str:
    """Return one line of what a load noted."""
    verb = "sees" if note["kind"] == "wrong" else "got"
    return (
        f"{note['generation']} {note['thread']} {verb} {note['text']} in {note['doing']!r} at {note['ms'] / 1000:.1f} s"
    )
