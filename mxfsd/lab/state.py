"""The lab's record of itself, DIR/.lab/lab.json: what exists, so that each command finds what an earlier one made."""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from mxfs_proto.errors import MisuseError

VERSION = 1
MARK_ENV = "MXFS_LAB_NODE"
RUN_LINKS = "/run/mxfs-lab"

UP, STOPPED, DEAD = "up", "stopped", "dead"


@dataclass(slots=True)
class Node:
    """One node. *state* is up, stopped (left in good order) or dead (killed); *token* marks its daemon's processes."""

    number: int
    state: str = STOPPED
    partitioned: bool = False
    loop: str = ""
    pid: int = 0
    token: str = ""

    @property
    def name(self) -> str:
        """``n1`` and so on."""
        return f"n{self.number}"


@dataclass(slots=True)
class State:
    """Everything that lab.json holds."""

    id: str
    timeouts: str
    options: str = ""
    volume: str = ""
    nodes: list[Node] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Paths:
    """Where things are below the lab's folder (absolute, without symbolic links)."""

    root: Path

    @property
    def image(self) -> Path:
        """The shared disk."""
        return self.root / "disk.img"

    @property
    def private(self) -> Path:
        """The lab's own folder."""
        return self.root / ".lab"

    @property
    def record(self) -> Path:
        """lab.json."""
        return self.private / "lab.json"

    def mountpoint(self, name: str) -> Path:
        """Where the volume is mounted for a node."""
        return self.root / name

    def run_root(self, name: str) -> Path:
        """A node's own stand-in for /run/mxfs."""
        return self.private / name / "run"

    def run_link(self, name: str) -> Path:
        """A short name for run_root: the sockets in it must fit a socket address (108 bytes, unix(7))."""
        return Path(RUN_LINKS) / f"{lab_id(self.root)}-{name}"

    def mark(self, name: str) -> str:
        """The environment entry that all processes of a node carry."""
        return f"{MARK_ENV}={self.root}:{name}"


def lab_id(root: Path) -> str:
    """Return eight hex digits that tell this lab's namespaces from another's."""
    return hashlib.sha256(os.fsencode(root)).hexdigest()[:8]


def load(paths: Paths) -> State:
    """Read lab.json. Raises MisuseError if there is no lab in the folder, or one of another version."""
    try:
        fields = json.loads(paths.record.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MisuseError(f"{paths.root}: no lab is here; start one with mxfs lab up {paths.root}") from None
    except ValueError:
        raise MisuseError(f"{paths.record} is damaged; remove the lab with mxfs lab down {paths.root}") from None
    if fields.pop("version", None) != VERSION:
        raise MisuseError(f"{paths.record} is of another version of mxfs lab")
    nodes = [Node(**node) for node in fields.pop("nodes")]
    return State(**fields, nodes=nodes)


def save(paths: Paths, state: State) -> None:
    """Write lab.json whole or not at all."""
    part = paths.record.with_suffix(".new")
    part.write_text(json.dumps({"version": VERSION, **asdict(state)}, indent=1), encoding="utf-8")
    os.replace(part, paths.record)


@contextmanager
def updating(paths: Paths) -> Iterator[State]:
    """Load the state, let the caller change it, save it; commands that run at once do so one after the other."""
    if not paths.private.exists():
        load(paths)  # raises: no lab is here
    fd = os.open(paths.private, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        state = load(paths)
        yield state
        save(paths, state)
    finally:
        os.close(fd)
