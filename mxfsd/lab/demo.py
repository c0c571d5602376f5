"""The demonstration: three nodes on this machine share one volume; one line a step, exit code 0 if all went well.

Run by ``make demo`` (``python -m mxfsd.lab.demo [DIR]``); without DIR in a folder that is removed afterwards.
"""

import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from mxfs_proto.errors import MxfsError
from mxfsd import mountinfo
from mxfsd.lab.lab import Lab

NODES = ("n1", "n2", "n3")
APPENDS = 300
CREATES = 100
WAIT_S = 60.0

APPEND = """
import os, sys
name, count = sys.argv[1], int(sys.argv[2])
fd = os.open("log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
for number in range(count):
    line = f"{name} {number:05d} {'.' * 40}\\n".encode()
    assert os.write(fd, line) == len(line)
os.close(fd)
"""
CREATE = """
import os, sys
name, count = sys.argv[1], int(sys.argv[2])
for number in range(count):
    with open(f"many/{name}-{number}", "x") as file:
        file.write(name)
"""
LOAD = """
import os, sys, time
name = sys.argv[1]
os.makedirs(f"load/{name}")
done = 0
while not os.path.exists("load/stop"):
    path = f"load/{name}/{done}"
    with open(path + ".new", "w") as file:
        file.write(f"{name} {done}")
    os.rename(path + ".new", path)
    with open(path) as file:
        assert file.read() == f"{name} {done}"
    done += 1
print(done, flush=True)
"""


class DemoFailed(Exception):
    """A step did not do what it should; the text says which and how."""


class Demo:
    """The steps, over one lab."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lab = Lab(folder)
        self._begun = time.monotonic()
        self._step = 0

    def run(self) -> None:
        """Run all steps; DemoFailed, MxfsError or OSError tells what went wrong. The lab is taken down either way."""
        try:
            self._do("three nodes up, each with its own network, loop device and daemon", self._up)
            self._do("a file written on n1 is read on n2 and n3 at once", self._share)
            self._do(f"{CREATES} files each, created by three nodes in one directory at the same time", self._create)
            self._do(f"{APPENDS} lines each, appended to one file by three nodes: all whole", self._append)
            self._do("the home moves to n2, n3 and n1 under load: no application sees an error", self._move)
            self._do("n3 leaves and comes back, and sees what happened meanwhile", self._leave)
        except BaseException:
            self._give_up()
            raise
        self._do("all nodes unmounted, xfs_repair -n finds nothing to repair", self._down)

    def _do(self, text: str, step: Callable[[], str]) -> None:
        self._step += 1
        begun = time.monotonic()
        detail = step()
        took_s = time.monotonic() - begun
        print(f"{self._step}. {text}{': ' + detail if detail else ''} ({took_s:.1f} s)", flush=True)

    def total_s(self) -> float:
        """Return the seconds since the start."""
        return time.monotonic() - self._begun

    # -- steps -----------------------------------------------------------------------------------------------------

    def _up(self) -> str:
        self._lab.up(len(NODES), 2 << 30)
        status = self._lab.status()
        return f"home {status['home']}, epoch {status['epoch']}"

    def _share(self) -> str:
        text = "one volume, many nodes\n"
        self._at("n1", "greeting").write_text(text)
        for name in ("n2", "n3"):
            if self._at(name, "greeting").read_text() != text:
                raise DemoFailed(f"{name} read something else")
        self._at("n3", "greeting").rename(self._at("n3", "renamed"))
        if self._at("n1", "greeting").exists() or not self._at("n1", "renamed").exists():
            raise DemoFailed("n1 does not see that n3 renamed the file")
        return "and a rename on n3 is seen on n1"

    def _create(self) -> str:
        self._at("n1", "many").mkdir()
        self._everywhere(CREATE, str(CREATES))
        counts = {name: len(list(self._at(name, "many").iterdir())) for name in NODES}
        if set(counts.values()) != {CREATES * len(NODES)}:
            raise DemoFailed(f"files seen: {counts}")
        return f"every node lists {CREATES * len(NODES)}"

    def _append(self) -> str:
        self._everywhere(APPEND, str(APPENDS))
        for name in NODES:
            lines = self._at(name, "log").read_text().splitlines()
            wanted = {f"{node} {number:05d} {'.' * 40}" for node in NODES for number in range(APPENDS)}
            if len(lines) != len(wanted) or set(lines) != wanted:
                raise DemoFailed(f"{name} sees {len(lines)} lines, {len(wanted - set(lines))} are missing or torn")
        return f"{APPENDS * len(NODES)} lines on every node"

    def _move(self) -> str:
        self._at("n1", "load").mkdir()
        workers = {name: self._start(name, LOAD) for name in NODES}
        slowest_s = 0.0
        try:
            for name in ("n2", "n3", "n1"):
                time.sleep(1.0)  # the load runs on between two moves
                begun = time.monotonic()
                self._lab.move_home(name)
                slowest_s = max(slowest_s, time.monotonic() - begun)
            time.sleep(0.5)
            self._at("n1", "load/stop").touch()
            done = {name: int(self._finish(name, worker)) for name, worker in workers.items()}
        except BaseException:
            # The reason is what went wrong first, not that the work then waits for a volume that does not answer.
            for worker in workers.values():
                worker.kill()
            raise
        for name, count in done.items():
            for reader in NODES:
                if len(list(self._at(reader, f"load/{name}").iterdir())) != count:
                    raise DemoFailed(f"{reader} does not see all {count} files of {name}")
        return f"{sum(done.values())} files written meanwhile, none lost, slowest move {slowest_s:.1f} s"

    def _leave(self) -> str:
        self._lab.stop("n3")
        self._at("n2", "meanwhile").write_text("news")
        begun = time.monotonic()
        self._lab.start("n3")
        took_s = time.monotonic() - begun
        if self._at("n3", "meanwhile").read_text() != "news":
            raise DemoFailed("n3 does not see what n2 wrote")
        return f"mounted again in {took_s:.1f} s"

    def _down(self) -> str:
        self._lab.down(purge=True)
        return ""

    def _give_up(self) -> None:
        try:
            self._lab.down(force=True)
        except (MxfsError, OSError) as error:
            print(f"cleaning up: {error}", file=sys.stderr)

    # -- helpers ---------------------------------------------------------------------------------------------------

    def _at(self, node: str, path: str) -> Path:
        return self._folder / node / path

    def _start(self, node: str, code: str, *words: str) -> subprocess.Popen[str]:
        argv = [sys.executable, "-m", "mxfsd.cli.mxfs", "lab", "exec", str(self._folder), node, "--"]
        argv += [sys.executable, "-c", code, node, *words]
        return subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def _finish(self, node: str, worker: subprocess.Popen[str]) -> str:
        try:
            output, complaint = worker.communicate(timeout=WAIT_S)
        except subprocess.TimeoutExpired:
            worker.kill()
            raise DemoFailed(f"the work on {node} did not end within {WAIT_S:g} s") from None
        if worker.returncode != 0:
            lines = complaint.strip().splitlines()
            raise DemoFailed(f"the work on {node} failed: {lines[-1] if lines else f'exit {worker.returncode}'}")
        return output

    def _everywhere(self, code: str, *words: str) -> None:
        workers = {name: self._start(name, code, *words) for name in NODES}
        for name, worker in workers.items():
            self._finish(name, worker)


def main() -> int:
    """Run the demonstration; return 0, or 1 with a one-line reason on standard error."""
    given = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    folder = given if given is not None else Path(tempfile.mkdtemp(prefix="mxfs-demo-", dir="/var/tmp"))
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        demo = Demo(folder)
        demo.run()
        print(f"done in {demo.total_s():.0f} s; try it yourself: .venv/bin/mxfs lab up DIR")
        return 0
    except (DemoFailed, MxfsError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("demo: interrupted", file=sys.stderr)
    finally:
        # Never through a mount that could not be taken down.
        if given is None and not any(mount.mountpoint.startswith(f"{folder}/") for mount in mountinfo.read()):
            shutil.rmtree(folder, ignore_errors=True)
    return 1


if __name__ == "__main__":
    sys.exit(main())
