"""Keys and certificates of a volume, all from the cluster key in its lockspace.

Whoever can read the lockspace can derive the certificate authority: the disk is the root of trust. Each node makes
a key of its own when it starts and certifies it; the certificate names the volume, the node's uuid, its slot and
its incarnation in one URI, `mxfs://<volume uuid>/<node uuid>/<slot>/<incarnation>`. Validity dates are fixed and
wide, so that a node with a wrong clock can join: what makes a certificate stale is its incarnation.
"""

import ssl
from dataclasses import dataclass, field
from datetime import UTC, datetime
from uuid import UUID

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from mxfs_proto.errors import MisuseError
from mxfsd.io.identity import PeerIdentity, make_context

KEY_BYTES = 32
_BEGIN = datetime(2000, 1, 1, tzinfo=UTC)
_END = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)  # RFC 5280, 4.1.2.5: no well-defined end


@dataclass(frozen=True, slots=True, repr=False)
class VolumeKeys:
    """The keys of a volume: 32 bytes that seal discovery datagrams, and the certificate authority."""

    volume: UUID
    discovery: bytes
    authority: Ed25519PrivateKey

    @classmethod
    def derive(cls, cluster_key: bytes, volume: UUID) -> "VolumeKeys":
        """Derive the keys (HKDF-SHA256, RFC 5869, the volume's uuid as salt). Raises MisuseError."""
        if len(cluster_key) != KEY_BYTES:
            raise MisuseError(f"a cluster key has {KEY_BYTES} bytes, not {len(cluster_key)}")

        def key(purpose: bytes) -> bytes:
            return HKDF(hashes.SHA256(), KEY_BYTES, salt=volume.bytes, info=b"mxfs v1 " + purpose).derive(cluster_key)

        return cls(volume, key(b"discovery"), Ed25519PrivateKey.from_private_bytes(key(b"certificate authority")))

    def authority_certificate(self) -> x509.Certificate:
        """Return the authority's certificate: the same bytes on every node (Ed25519 signatures do not vary)."""
        public = self.authority.public_key()
        name = _name(f"MXFS volume {self.volume}")
        return (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(public)
            .serial_number(1)
            .not_valid_before(_BEGIN)
            .not_valid_after(_END)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(authority=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .sign(self.authority, None)
        )

    def certify(self, identity: PeerIdentity, key: Ed25519PrivateKey) -> x509.Certificate:
        """Return a certificate of *identity* for *key*. Raises MisuseError for another volume's node."""
        if identity.volume != self.volume:
            raise MisuseError(f"a node of volume {identity.volume} in volume {self.volume}")
        public = key.public_key()
        issuer = self.authority.public_key()
        return (
            x509.CertificateBuilder()
            .subject_name(_name(f"MXFS node {identity.slot}"))
            .issuer_name(_name(f"MXFS volume {self.volume}"))
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(_BEGIN)
            .not_valid_after(_END)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(authority=False), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]),
                critical=False,
            )
            .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(identity.uri)]), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer), critical=False)
            .sign(self.authority, None)
        )


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


@dataclass(frozen=True, slots=True)
class NodeContexts:
    """TLS contexts of one node in one incarnation, for the connections it accepts and those it makes."""

    identity: PeerIdentity
    server: ssl.SSLContext
    client: ssl.SSLContext
    pem: bytes = field(repr=False)
    """Our key and certificate, with which our FUSE layer speaks to the home too."""
    authority: bytes = field(repr=False)
    """The volume's certificate (DER)."""


def make_contexts(keys: VolumeKeys, identity: PeerIdentity) -> NodeContexts:
    """Make a key, certify it, and return contexts that speak TLS 1.3 only and verify the other side.

    Raises MisuseError, OSError (no memory file).
    """
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ) + keys.certify(identity, key).public_bytes(serialization.Encoding.PEM)
    authority = keys.authority_certificate().public_bytes(serialization.Encoding.DER)
    server = make_context(ssl.PROTOCOL_TLS_SERVER, pem, authority)
    # A session ticket would let a peer of an earlier incarnation come back without showing its certificate.
    server.num_tickets = 0
    client = make_context(ssl.PROTOCOL_TLS_CLIENT, pem, authority)
    return NodeContexts(identity, server, client, pem, authority)
