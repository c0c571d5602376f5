"""The file systems that are measured, set up side by side on images in one folder."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

COMMAND_TIMEOUT_S = 180.0
EXAMPLE = "examples/passthroughfs.py"


class BenchError(Exception):
    """A file system could not be set up or measured; the text says what failed."""


@dataclass(frozen=True)
class Column:
    """One file system: the key of its figures, a heading, and its folder as seen by itself and by a second node."""

    key: str
    title: str
    root: Path
    peer: Path


@dataclass(frozen=True)
class Setup:
    """Everything that stands: the columns, and the lab's folder (None when there is no lab)."""

    columns: tuple[Column, ...]
    lab: Path | None


def command(argv: Sequence[str | Path], timeout_s: float = COMMAND_TIMEOUT_S) -> str:
    """Run a command; its standard output, or BenchError with what it said."""
    words = [str(word) for word in argv]
    done = subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=timeout_s)
    if done.returncode != 0:
        raise BenchError(f"{' '.join(words)}: exit {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def lab_command(*words: str | Path) -> str:
    """Run `mxfs lab …` of this checkout."""
    return command([sys.executable, "-m", "mxfsd.cli.mxfs", "lab", *words])


def passthroughfs(cache: Path) -> Path:
    """Return pyfuse3's own example from the sdist of the installed version, downloaded once into *cache*."""
    name = f"pyfuse3-{version('pyfuse3')}"
    script = cache / name / EXAMPLE
    if not script.exists():
        cache.mkdir(parents=True, exist_ok=True)
        wanted = name.replace("-", "==")
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-binary", "pyfuse3", "--no-deps"]
        command([*pip, "--dest", cache, wanted])
        shutil.unpack_archive(cache / f"{name}.tar.gz", cache, filter="data")
    return script


@contextlib.contextmanager
def native_xfs(folder: Path, size: str) -> Iterator[Path]:
    """A native XFS on a loop device with direct I/O, as the lab's devices have."""
    image, root = folder / "native.img", folder / "native"
    root.mkdir()
    command(["truncate", "-s", size, image])
    loop = command(["losetup", "--find", "--show", "--direct-io=on", image]).strip()
    try:
        command(["mkfs.xfs", "-q", loop])
        command(["mount", "-t", "xfs", loop, root])
        try:
            yield root
        finally:
            command(["umount", root])
    finally:
        command(["losetup", "-d", loop])


@contextlib.contextmanager
def passthrough_mount(script: Path, source: Path, mountpoint: Path) -> Iterator[Path]:
    """Run passthroughfs over *source* for the length of a with block."""
    source.mkdir()
    mountpoint.mkdir()
    with open(mountpoint.parent / "passthroughfs.log", "wb") as log:
        server = subprocess.Popen([sys.executable, str(script), str(source), str(mountpoint)], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 15
        while not os.path.ismount(mountpoint):
            if server.poll() is not None or time.monotonic() > deadline:
                raise BenchError(f"passthroughfs did not mount: see {mountpoint.parent}/passthroughfs.log")
            time.sleep(0.02)
        yield mountpoint
    finally:
        if os.path.ismount(mountpoint):
            command(["umount", mountpoint])
        try:
            server.wait(15)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


@contextlib.contextmanager
def lab(folder: Path, size: str, *more: str) -> Iterator[Path]:
    """A lab of two nodes whose home is n1; its end checks the volume with xfs_repair -n."""
    lab_command("up", folder, "--nodes", "2", "--size", size, *more)
    try:
        if json.loads(lab_command("status", folder, "--json"))["home"] != "n1":
            lab_command("move-home", folder, "n1")
        yield folder
    finally:
        lab_command("down", folder)


@contextlib.contextmanager
def everything(cache: Path, size: str, with_lab: bool) -> Iterator[Setup]:
    """Set all columns up. Without a lab (self-test) plain folders of the native XFS stand in for its nodes."""
    base = Path(tempfile.mkdtemp(prefix="mxfs-bench-", dir=os.environ.get("MXFS_BENCH_TMP", "/var/tmp")))
    base.chmod(0o755)
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, base, ignore_errors=True)
        script = passthroughfs(cache)
        native = stack.enter_context(native_xfs(base, size))
        through = stack.enter_context(passthrough_mount(script, native / "passthrough", base / "passthrough"))
        (native / "native").mkdir()
        columns = [
            Column("native", "native XFS", native / "native", native / "native"),
            Column("passthrough", "passthroughfs", through, through),
        ]
        cluster = None
        if with_lab:
            cluster = stack.enter_context(lab(base / "lab", size))
            home, other = cluster / "n1", cluster / "n2"
        else:
            home = other = native / "stand-in"
            home.mkdir()
        kind = "MXFS" if with_lab else "stand-in"
        columns += [
            Column("home", f"{kind} home", home, other),
            Column("node", f"{kind} node", other, home),
        ]
        if with_lab:
            # (One node's paths: its file locks are those of each node alone.)
            second = stack.enter_context(lab(base / "pyfuse3", size, "-o", "channel=pyfuse3,localflocks"))
            columns.append(Column("pyfuse3", "home, pyfuse3", second / "n1", second / "n1"))
            served = stack.enter_context(lab(base / "served", size, "-o", "passthrough"))
            columns.append(Column("kernel", "MXFS kernel", served / "n1", served / "n2"))
        yield Setup(tuple(columns), cluster)


def second_mount_s(cluster: Path) -> float:
    """Stop and start the second node; seconds that `mxfs lab start` took, its own start included."""
    lab_command("stop", cluster, "n2")
    begun = time.monotonic()
    lab_command("start", cluster, "n2")
    return time.monotonic() - begun


def _node_processes(cluster: Path, node: str) -> list[Path]:
    """The /proc folders of the node's processes, known by the lab's marker in their environment."""
    found = []
    marker = f"MXFS_LAB_NODE={cluster.resolve()}:{node}".encode()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if marker in (entry / "environ").read_bytes().split(b"\0"):
                found.append(entry)
        except OSError:
            continue  # gone meanwhile, or a kernel thread
    return found


def memory_mib(cluster: Path, node: str) -> dict[str, dict[str, float]]:
    """RSS and PSS, in MiB, of each process of a node, by what it runs."""
    out: dict[str, dict[str, float]] = {}
    for entry in _node_processes(cluster, node):
        words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
        label = next((word for word in words if word.startswith(("mxfsd", "mxfs_fuse"))), words[0])
        fields = dict(line.split(":", 1) for line in (entry / "smaps_rollup").read_text().splitlines()[1:])
        out[f"{label} ({entry.name})"] = {
            key: int(fields[name].split()[0]) / 1024 for key, name in (("rss", "Rss"), ("pss", "Pss"))
        }
    if not out:
        raise BenchError(f"no process of {node} found by its marker")
    return out
