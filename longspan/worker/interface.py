"""Which network interface has an address. Gloo is told an interface, not an address."""

import ipaddress
import socket
import struct
from collections.abc import Iterator

from longspan.errors import ConfigError

# From linux/netlink.h, linux/rtnetlink.h and linux/if_addr.h.
_HEADER = struct.Struct("=IHHII")
_ADDRESS = struct.Struct("=BBBBI")
_ATTRIBUTE = struct.Struct("=HH")
_NLMSG_DONE, _RTM_GETADDR, _NLM_F_REQUEST_DUMP, _IFA_ADDRESS, _IFA_LOCAL = 3, 22, 0x301, 1, 2


def interface_of(address: str) -> str:
    """The name of this host's network interface that has an IP address.

    Raises:
        ConfigError: no interface has it.
    """
    wanted = ipaddress.ip_address(address.partition("%")[0])
    if wanted.is_loopback:  # all of 127.0.0.0/8, of which the kernel lists one
        return "lo"
    found = {ipaddress.ip_address(each): name for name, each in _addresses()}
    if wanted not in found:
        raise ConfigError(f"no network interface of this host has the address {address}")
    return found[wanted]


def _addresses() -> Iterator[tuple[str, str]]:
    """Every address of this host with its interface's name, as the kernel lists them."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as netlink:
        size = _HEADER.size + _ADDRESS.size
        header = _HEADER.pack(size, _RTM_GETADDR, _NLM_F_REQUEST_DUMP, 0, 0)
        netlink.send(header + _ADDRESS.pack(socket.AF_UNSPEC, 0, 0, 0, 0))
        while True:
            data = netlink.recv(1 << 16)
            while data:
                length, kind, *_ = _HEADER.unpack_from(data)
                if kind == _NLMSG_DONE:
                    return
                yield from _addresses_in(data[:length])
                data = data[(length + 3) & ~3 :]


def _addresses_in(message: bytes) -> Iterator[tuple[str, str]]:
    family, _, _, _, index = _ADDRESS.unpack_from(message, _HEADER.size)
    at = _HEADER.size + _ADDRESS.size
    while at < len(message):
        length, kind = _ATTRIBUTE.unpack_from(message, at)
        # On a point-to-point link the local address is this host's, the other its peer's.
        if kind in (_IFA_ADDRESS, _IFA_LOCAL):
            value = message[at + _ATTRIBUTE.size : at + length]
            yield socket.if_indextoname(index), socket.inet_ntop(family, value)
        at += (length + 3) & ~3
