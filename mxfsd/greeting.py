"""What two daemons say to each other first: HELLO of who connects, then WELCOME or REFUSE of the home.

Their formats' versions are compared before that: every frame's header has one (`mxfs_proto.frames`).
"""

from dataclasses import dataclass
from typing import Any

from mxfs_proto.errors import IoFailure, MxfsError, PeerError, Refusal
from mxfs_proto.frames import pack_json
from mxfs_proto.ops import Fid


@dataclass(frozen=True, slots=True)
class Welcome:
    """What the home says of itself; *home* is its slot, *root* the root directory of the volume."""

    epoch: int
    home: int
    root: Fid
    token: int
    """What the node's FUSE layer shows to have operations over a connection of its own (DIRECT)."""


def hello(name: str, slot: int, timeouts: str, fencing: str, continues: int = 0) -> bytes:
    """Return the payload of a HELLO; *timeouts* and *fencing* are the names of what the node runs with.

    *continues*: the incarnation that its FUSE layer, with its locks and sessions, belonged to; 0: it is new.
    """
    fields: dict[str, Any] = {"name": name, "slot": slot, "timeouts": timeouts, "fencing": fencing}
    if continues:
        fields["continues"] = continues
    return pack_json(fields)


def continued(fields: dict[str, Any]) -> int:
    """Return the incarnation that the node of these HELLO fields continues, 0 for none. Raises PeerError (EPROTO)."""
    found = fields.get("continues", 0)
    if not isinstance(found, int) or found < 0:
        raise PeerError(f"a HELLO that continues {found!r}")
    return found


def objection(fields: dict[str, Any], home: str, timeouts: str, fencing: str) -> str | None:
    """Return why the home (with that name and settings) cannot have the node of these HELLO fields, or None."""
    for option, ours in (("timeouts", timeouts), ("fencing", fencing)):
        theirs = fields.get(option)
        if theirs != ours:
            return f"node {fields.get('name')} has {option}={theirs}, home {home} has {option}={ours}: use the same"
    return None


def welcome(epoch: int, home: int, root: Fid, token: int) -> bytes:
    """Return the payload of a WELCOME."""
    return pack_json({"epoch": epoch, "home": home, "root": list(root), "token": token})


def read_welcome(fields: dict[str, Any]) -> Welcome:
    """Return what a WELCOME says. Raises PeerError (EPROTO)."""
    try:
        ino, generation = fields["root"]
        return Welcome(int(fields["epoch"]), int(fields["home"]), Fid(int(ino), int(generation)), int(fields["token"]))
    except (KeyError, TypeError, ValueError) as err:
        raise PeerError(f"a WELCOME that lacks something: {fields}") from err


def read_refusal(fields: dict[str, Any], peer_name: str) -> MxfsError:
    """Return the error that a REFUSE means: an IoFailure when it is worth another try, else a Refusal."""
    reason = " ".join(str(fields.get("reason", "no reason given")).split())
    if fields.get("retry"):
        return IoFailure(f"{peer_name}: {reason}")
    return Refusal(f"refused by {peer_name}: {reason}")
