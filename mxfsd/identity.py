"""Who this node is: a uuid that stays the same over restarts, and the highest incarnation it ever had."""

import json
import os
import socket
import uuid
from pathlib import Path

from mxfsd.options import DEFAULT_RUN_ROOT, MountOptions

_STATE_ROOT = "/var/lib/mxfs"


class Identity:
    """The state file of one node for one volume."""

    def __init__(self, path: Path, node: uuid.UUID, last_incarnation: int) -> None:
        self._path = path
        self.node = node
        self.last_incarnation = last_incarnation
        self.name = socket.gethostname()[:64] or "node"

    def save(self, incarnation: int) -> None:
        """Remember the incarnation, durably: (node, incarnation) must never come twice."""
        self.last_incarnation = max(self.last_incarnation, incarnation)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        part = self._path.with_suffix(".new")
        with open(part, "w", encoding="ascii") as file:
            json.dump({"node": str(self.node), "incarnation": self.last_incarnation}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, self._path)


def load_identity(run_dir: Path, options: MountOptions, volume: uuid.UUID) -> Identity:
    """Return this node's identity; a new one where there is no state file, or it is unreadable.

    Nodes with a run root of their own (the lab) keep it there; a host keeps it where it outlives a reboot.
    """
    folder = Path(_STATE_ROOT) if options.run_root == DEFAULT_RUN_ROOT else run_dir
    path = folder / f"node-{volume}.json"
    try:
        saved = json.loads(path.read_text("ascii"))
        return Identity(path, uuid.UUID(saved["node"]), int(saved["incarnation"]))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return Identity(path, uuid.uuid4(), 0)
