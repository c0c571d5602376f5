"""The FUSE layer's own connection to a home on another node: operations and replies pass by the daemon.

The daemon says where the home is and lends the key of this node (RESUME). Where the home cannot be reached so, in
time, operations go through the daemon as before.
"""

import asyncio
import ssl
from collections.abc import Callable
from typing import Any

from mxfs_proto.errors import MxfsError, PeerError
from mxfs_proto.frames import Frame, FrameType, pack_json
from mxfsd.io.identity import PeerIdentity, make_context
from mxfsd.io.peers import PeerConnection, connect_peer

CONNECT_S = 1.0


async def connect_home(
    fields: dict[str, Any],
    on_frame: Callable[[PeerConnection, Frame], None],
    on_lost: Callable[[PeerConnection, MxfsError | None], None],
) -> PeerConnection:
    """Connect to the home that *fields* (``direct`` of a RESUME) name, and join. Raises MxfsError, OSError."""
    joined: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def frame(conn: PeerConnection, came: Frame) -> None:
        if joined.done():
            on_frame(conn, came)
        elif came.type is FrameType.DIRECT:
            joined.set_result(None)
        else:
            joined.set_exception(PeerError(f"{conn.peer_name} answered with {came.type.name}"))

    def lost(conn: PeerConnection, error: MxfsError | None) -> None:
        if not joined.done():
            joined.set_exception(error or PeerError(f"{conn.peer_name} closed the connection"))
        else:
            on_lost(conn, error)

    def check(who: PeerIdentity) -> str | None:
        fits = (who.slot, who.incarnation) == (int(fields["slot"]), int(fields["incarnation"]))
        return None if fits else "it is not the home"

    pem, authority = str(fields["pem"]).encode(), bytes.fromhex(fields["authority"])
    async with asyncio.timeout(CONNECT_S):
        context = make_context(ssl.PROTOCOL_TLS_CLIENT, pem, authority)
        host, port = str(fields["host"]), int(fields["port"])
        conn = await connect_peer(host, port, context, frame, lost, check=check, timeout_s=CONNECT_S)
        try:
            conn.send(FrameType.DIRECT, pack_json({"token": int(fields["token"])}))
            await joined
        except BaseException:
            conn.abort()
            raise
    return conn
