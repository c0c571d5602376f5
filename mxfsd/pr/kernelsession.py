"""The kernel's iSCSI session that a SCSI disk belongs to, and one more beside it: another I_T nexus to the same unit.

Sources: drivers/scsi/scsi_transport_iscsi.c (the attributes in sysfs), RFC 7143.
"""

import re
from pathlib import Path

from mxfs_proto.errors import MisuseError
from mxfsd.pr.errors import NotOffered
from mxfsd.pr.iscsi import SCHEME, Iscsi

_SESSION = re.compile(r"session\d+")
_NOTHING = ("", "(null)", "<NULL>")
"""How kernels write an attribute that is not set."""


def open_beside(disk: Path, timeout_ms: int) -> Iscsi | None:
    """Log in once more where the SCSI disk with this folder in sysfs comes from, under its name and with its secret.

    None: it is no iSCSI disk, the session has no portal now, or this host has no libiscsi. Raises PathFailure.
    """
    session = next((folder for folder in disk.parents if _SESSION.fullmatch(folder.name)), None)
    if session is None:
        return None
    told = session / "iscsi_session" / session.name
    target, initiator = _text(told / "targetname"), _text(told / "initiatorname")
    portal = _portal(session)
    address = re.fullmatch(r"\d+:\d+:\d+:(\d+)", disk.parent.parent.name)
    if not target or not initiator or not portal or address is None:
        return None
    user = _text(told / "username")
    try:
        return Iscsi(
            f"{SCHEME}{portal}/{target}/{address[1]}",
            initiator=initiator,
            credentials=(user, _text(told / "password")) if user else None,
            timeout_ms=timeout_ms,
        )
    except (MisuseError, NotOffered):
        return None


def _portal(session: Path) -> str:
    """Return ``HOST:PORT`` of the portal that the session is logged in to, or of the one that it was given."""
    for connection in sorted(session.glob("connection*/iscsi_connection/connection*")):
        for kind in ("", "persistent_"):
            host, port = _text(connection / f"{kind}address"), _text(connection / f"{kind}port")
            if host and port.isdecimal():
                return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return ""


def _text(path: Path) -> str:
    try:
        text = path.read_text().strip()
    except OSError:
        return ""  # an attribute that this kernel does not have, or that is not set
    return "" if text in _NOTHING else text
