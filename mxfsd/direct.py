"""The home's end of the connections over which FUSE layers of other nodes send their operations past their daemons.

A node has one connection to the home between the daemons, the main one, and at most one more, which its FUSE layer
makes with the token of that one's WELCOME. It carries operations and their replies alone, and ends with the main one:
whatever is said of a connection that is lost or made anew holds for both together.
"""

import secrets
from typing import Any

from mxfs_proto.errors import PeerError
from mxfs_proto.frames import FrameType, pack_json
from mxfsd.io.peers import PeerConnection


class DirectConnections:
    """Which connection belongs to which."""

    def __init__(self) -> None:
        self._tokens: dict[PeerConnection, int] = {}
        self._direct: dict[PeerConnection, PeerConnection] = {}
        self._main: dict[PeerConnection, PeerConnection] = {}

    def token(self, main: PeerConnection) -> int:
        """Return what the FUSE layer of the node at the other end has to show."""
        return self._tokens.setdefault(main, secrets.randbits(63) | 1)

    def join(self, conn: PeerConnection, fields: dict[str, Any], main: PeerConnection | None, epoch: int) -> None:
        """A FUSE layer asks for it; *main* is the node's present connection. Refused unless it belongs to that one."""
        fits = main is not None and not main.closed and main.identity == conn.identity
        if main is None or not fits or conn in self._main or fields.get("token") != self._tokens.get(main):
            conn.refuse("this node has another connection to the home, or none", retry=True)
            return
        before = self._direct.pop(main, None)
        if before is not None:
            del self._main[before]
            before.abort()
        self._direct[main], self._main[conn] = conn, main
        conn.send(FrameType.DIRECT, pack_json({}), epoch=epoch)

    def belongs_to(self, conn: PeerConnection) -> PeerConnection | None:
        """Return the main connection of a direct one; None where it is none."""
        return self._main.get(conn)

    def of(self, main: PeerConnection) -> PeerConnection:
        """Return where replies to that node go."""
        conn = self._direct.get(main)
        return main if conn is None or conn.closed else conn

    def lost(self, conn: PeerConnection) -> bool:
        """A connection ended by itself; True if it was a direct one. What was sent over it is asked for again."""
        main = self._main.pop(conn, None)
        if main is None:
            return False
        if self._direct.get(main) is conn:
            del self._direct[main]
        return True

    def end(self, main: PeerConnection) -> None:
        """A main connection is over: so is the one that belongs to it, behind what it still has to send."""
        self._tokens.pop(main, None)
        conn = self._direct.pop(main, None)
        if conn is not None:
            del self._main[conn]
            conn.close()


def check_operation(kind: FrameType) -> None:
    """Raise PeerError for what a direct connection does not carry."""
    if kind is not FrameType.OP_REQ:
        raise PeerError(f"unexpected {kind.name} on a connection for operations")
