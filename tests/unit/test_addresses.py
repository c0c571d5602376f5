"""Our own addresses, on interfaces made for the test."""

import subprocess

import pytest
from netspaces import two_namespaces

from mxfs_proto.errors import MisuseError
from mxfsd.io.addresses import MAX_ADDRESSES, own_addresses, own_interfaces


def ip(command: str) -> None:
    subprocess.run(["ip", *command.split()], check=True, capture_output=True)


@pytest.mark.needs("netns")
def test_addresses_of_interfaces_that_are_up() -> None:
    with two_namespaces() as namespaces:
        namespaces.enter(1)  # vb is up there, with 10.77.0.2; lo is down
        assert own_interfaces() == [("vb", "10.77.0.2")]
        ip("link set lo up")
        assert own_addresses() == ["10.77.0.2"]  # nobody else reaches our loopback
        assert own_addresses("lo") == ["127.0.0.1"]
        for number in range(MAX_ADDRESSES + 1):
            ip(f"link add d{number} type veth peer name p{number}")
            ip(f"addr add 10.78.{number}.1/24 dev d{number}")
        assert own_addresses() == ["10.77.0.2"]  # the new ones are down
        with pytest.raises(MisuseError, match="iface=d0: no such interface, or it is down"):
            own_addresses("d0")
        for number in range(MAX_ADDRESSES + 1):
            ip(f"link set d{number} up")
        assert own_addresses("d4") == ["10.78.4.1"]
        assert len(own_addresses()) == MAX_ADDRESSES and own_addresses()[:2] == ["10.77.0.2", "10.78.0.1"]
        ip("link add bare type veth peer name peer")
        ip("link set bare up")
        for missing in ("bare", "none", "a-name-longer-than-any-interface"):
            with pytest.raises(MisuseError, match=f"iface={missing}"):
                own_addresses(missing)
        ip("link set vb down")
        for number in range(MAX_ADDRESSES + 1):
            ip(f"link del d{number}")
        assert own_addresses() == ["127.0.0.1"]  # alone on this machine
        ip("link set lo down")
        with pytest.raises(MisuseError, match="no IPv4 address"):
            own_addresses()
