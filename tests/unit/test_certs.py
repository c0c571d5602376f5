"""Keys and certificates: derivation, identities, and which handshakes succeed."""

import os
import ssl
from datetime import UTC, datetime
from uuid import UUID

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from mxfs_proto.errors import MisuseError, PeerError
from mxfsd.io.certs import VolumeKeys, make_contexts
from mxfsd.io.identity import PeerIdentity, identity_of

VOLUME = UUID("11111111-2222-3333-4444-555555555555")
KEY = bytes(range(32))
ONE = PeerIdentity(VOLUME, UUID(int=1), 1, 7)
TWO = PeerIdentity(VOLUME, UUID(int=2), 2, 1)


def handshake(server: ssl.SSLContext, client: ssl.SSLContext) -> tuple[ssl.SSLObject, ssl.SSLObject]:
    """Do a handshake in memory. Raises ssl.SSLError of whichever side refuses first."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    s = server.wrap_bio(to_server, to_client, server_side=True)
    c = client.wrap_bio(to_client, to_server)
    waiting = [c, s]
    while waiting:
        for side in list(waiting):
            try:
                side.do_handshake()
                waiting.remove(side)
            except ssl.SSLWantReadError:
                pass
    return s, c


def test_derived_keys_are_pinned() -> None:
    """A change of these would shut nodes of this version out of existing volumes."""
    keys = VolumeKeys.derive(KEY, VOLUME)
    assert keys.discovery.hex() == "32faa84e1f813039227b44dda1d10f17d690eeff826449e31adcb7f79d41ebb1"
    assert (
        keys.authority.public_key().public_bytes_raw().hex()
        == "22953715de4cf059309ec90fd8dc64f87e154257e268dbdb6dfbc197bd313a2d"
    )
    other = VolumeKeys.derive(KEY, UUID(int=9))
    assert other.discovery != keys.discovery
    assert KEY.hex() not in repr(keys) and "discovery" not in repr(keys)


def test_a_cluster_key_of_the_wrong_size() -> None:
    with pytest.raises(MisuseError):
        VolumeKeys.derive(b"short", VOLUME)


def test_two_nodes_know_each_other() -> None:
    one = make_contexts(VolumeKeys.derive(KEY, VOLUME), ONE)
    two = make_contexts(VolumeKeys.derive(KEY, VOLUME), TWO)
    s, c = handshake(one.server, two.client)
    assert identity_of(s) == TWO
    assert identity_of(c) == ONE
    assert s.version() == "TLSv1.3"


def test_no_file_is_left_behind() -> None:
    def memory_files() -> list[str]:
        found = []
        for fd in os.listdir("/proc/self/fd"):
            try:
                found.append(os.readlink(f"/proc/self/fd/{fd}"))
            except FileNotFoundError:  # listdir's own
                pass
        return [name for name in found if "mxfs" in name]

    before = memory_files()
    make_contexts(VolumeKeys.derive(KEY, VOLUME), ONE)
    assert memory_files() == before


@pytest.mark.parametrize("key_volume", [(bytes(32), VOLUME), (KEY, UUID(int=9))])
def test_nodes_of_another_key_or_volume_are_refused(key_volume: tuple[bytes, UUID]) -> None:
    key, volume = key_volume
    one = make_contexts(VolumeKeys.derive(KEY, VOLUME), ONE)
    foreign = make_contexts(VolumeKeys.derive(key, volume), PeerIdentity(volume, UUID(int=2), 2, 1))
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(one.server, foreign.client)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(foreign.server, one.client)


def test_a_client_without_a_certificate_and_an_old_protocol_are_refused() -> None:
    one = make_contexts(VolumeKeys.derive(KEY, VOLUME), ONE)
    anonymous = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    anonymous.check_hostname = False
    anonymous.verify_mode = ssl.CERT_NONE
    with pytest.raises(ssl.SSLError, match="(?i)certificate"):
        handshake(one.server, anonymous)
    anonymous.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError, match="(?i)protocol"):
        handshake(one.server, anonymous)


def test_a_node_cannot_certify_others() -> None:
    """The leaf may sign nothing: basic constraints and key usage say so."""
    keys = VolumeKeys.derive(KEY, VOLUME)
    leaf = keys.certify(ONE, Ed25519PrivateKey.generate())
    assert leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False
    assert leaf.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign is False
    assert leaf.not_valid_before_utc < datetime(2001, 1, 1, tzinfo=UTC)  # a wrong clock does not shut a node out
    assert keys.authority_certificate() == VolumeKeys.derive(KEY, VOLUME).authority_certificate()
    with pytest.raises(MisuseError):
        keys.certify(PeerIdentity(UUID(int=9), UUID(int=1), 1, 1), Ed25519PrivateKey.generate())


@given(st.uuids(), st.uuids(), st.integers(1, 64), st.integers(0, 2**64 - 1))
def test_identities_round_trip(volume: UUID, node: UUID, slot: int, incarnation: int) -> None:
    identity = PeerIdentity(volume, node, slot, incarnation)
    assert PeerIdentity.parse(identity.uri) == identity


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "mxfs://x/y/1/1",
        "mxfs://[/y/1/1",
        f"https://{VOLUME}/{VOLUME}/1/1",
        f"mxfs://{VOLUME}/{VOLUME}/65/1",
        f"mxfs://{VOLUME}/{VOLUME}/0/1",
        f"mxfs://{VOLUME}/{VOLUME}/1",
        f"mxfs://{VOLUME}/{VOLUME}/01/1",
        f"mxfs://{VOLUME}/{VOLUME}/1/{2**64}",
        f"mxfs://{VOLUME}/{VOLUME}/1/1/",
        f"mxfs://{VOLUME}/{VOLUME}/1/1#x",
    ],
)
def test_other_names_are_no_identity(uri: str) -> None:
    with pytest.raises(PeerError):
        PeerIdentity.parse(uri)
