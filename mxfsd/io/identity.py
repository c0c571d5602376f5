"""Who a node's certificate says it is, and TLS contexts from a key and certificates at hand.

Apart from `mxfsd.io.certs`, which makes them: the FUSE layer speaks TLS too, and does without what makes keys.
"""

import os
import ssl
from dataclasses import dataclass
from urllib.parse import urlsplit
from uuid import UUID

from mxfs_proto.errors import MisuseError, PeerError
from mxfs_proto.ondisk import SLOT_COUNT


@dataclass(frozen=True, slots=True)
class PeerIdentity:
    """Who a certificate says its owner is."""

    volume: UUID
    node_uuid: UUID
    slot: int
    incarnation: int

    def __post_init__(self) -> None:
        if not 1 <= self.slot <= SLOT_COUNT or not 0 <= self.incarnation < 2**64:
            raise MisuseError(f"no such node: slot {self.slot}, incarnation {self.incarnation}")

    @property
    def uri(self) -> str:
        """The identity as the certificate carries it."""
        return f"mxfs://{self.volume}/{self.node_uuid}/{self.slot}/{self.incarnation}"

    @classmethod
    def parse(cls, uri: str) -> "PeerIdentity":
        """Return the identity that *uri* names. Raises PeerError (EPROTO) unless it is exactly our form."""
        try:
            parts = urlsplit(uri)
            fields = parts.path.split("/")
            if len(fields) != 4:
                raise ValueError("three fields are expected in its path")
            found = cls(UUID(parts.netloc), UUID(fields[1]), int(fields[2]), int(fields[3]))
        except (ValueError, MisuseError) as err:
            raise PeerError(f"a certificate for {uri!r}: {err}") from err
        if found.uri != uri:
            raise PeerError(f"a certificate for {uri!r}, which is not written as {found.uri!r}")
        return found


def make_context(protocol: int, pem: bytes, authority: bytes) -> ssl.SSLContext:
    """Return a context that speaks TLS 1.3 only and verifies the other side.

    *pem*: key and certificate; *authority*: the volume's, DER. Raises OSError (no memory file; ssl.SSLError is one).
    """
    context = ssl.SSLContext(protocol)
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # the identity is in the certificate's URI: `identity_of`
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VerifyFlags.VERIFY_X509_STRICT
    context.load_verify_locations(cadata=authority)
    # load_cert_chain takes a path only. A memory file has one in /proc and leaves nothing behind.
    fd = os.memfd_create("mxfs-node-key", os.MFD_CLOEXEC)
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(pem)
        context.load_cert_chain(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)
    return context


def identity_of(connection: ssl.SSLObject | ssl.SSLSocket) -> PeerIdentity:
    """Return whom the verified certificate of the other side names. Raises PeerError (EPROTO)."""
    certificate = connection.getpeercert()
    if not certificate:
        raise PeerError("the peer has shown no certificate")
    names = certificate.get("subjectAltName", ())
    if len(names) != 1 or names[0][0] != "URI":
        raise PeerError(f"the peer's certificate names {names}, not one MXFS node")
    return PeerIdentity.parse(str(names[0][1]))
