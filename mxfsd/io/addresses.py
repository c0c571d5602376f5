"""This node's own IPv4 addresses, by interface."""

import fcntl
import socket
import struct
from typing import Final

from mxfs_proto.errors import MisuseError

MAX_ADDRESSES: Final = 4
"""A slot on the disk has room for so many."""
# ioctl requests of netdevice(7) and a flag, from <linux/sockios.h> and <linux/if.h>.
_SIOCGIFFLAGS: Final = 0x8913
_SIOCGIFADDR: Final = 0x8915
_IFF_UP: Final = 0x1


def own_interfaces(iface: str | None = None) -> list[tuple[str, str]]:
    """Return (interface, its address) of each interface that is up, or of *iface* only; loopback only if alone.

    Raises MisuseError where there is none.
    """
    found: list[tuple[str, str]] = []
    loopback: list[tuple[str, str]] = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _index, name in socket.if_nameindex():
            if iface is not None and name != iface:
                continue
            request = struct.pack("256s", name.encode()[:15])
            try:
                flags = int(struct.unpack_from("=H", fcntl.ioctl(sock.fileno(), _SIOCGIFFLAGS, request), 16)[0])
                if not flags & _IFF_UP:
                    continue
                address = socket.inet_ntoa(fcntl.ioctl(sock.fileno(), _SIOCGIFADDR, request)[20:24])
            except OSError:
                continue  # it has no IPv4 address, or has gone since
            (loopback if address.startswith("127.") else found).append((name, address))
    if not found and not loopback:
        raise MisuseError(
            f"iface={iface}: no such interface, or it is down or has no IPv4 address" if iface else "no IPv4 address"
        )
    return found or loopback


def own_addresses(iface: str | None = None) -> list[str]:
    """Return the addresses at which other nodes may reach this one, at most MAX_ADDRESSES. As own_interfaces."""
    return [address for _, address in own_interfaces(iface)][:MAX_ADDRESSES]
