"""By which address and which interface processes of several nodes reach each other. Knows nothing of who they are."""

import contextlib
import fcntl
import ipaddress
import os
import socket
import struct
from collections.abc import Iterator, Mapping, Sequence

OUTSIDE = "192.0.2.1"  # reserved for documentation: the way to it is the way out of this network
_SIOCGIFADDR = 0x8915  # linux/sockios.h: the IPv4 address of an interface


def is_loopback(host: str) -> bool:
    """:return: whether an address means whoever uses it: localhost, 127.0.0.1, Debian's 127.0.1.1 for its own name."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def meeting_point(env: Mapping[str, str], names: Sequence[str], one_node: bool) -> str:
    """
    :param env: may set MASTER_ADDR, or GLOO_SOCKET_IFNAME, the interface to be reached by.
    :param names: the host names of all processes.
    :param one_node: whether all run on this one.
    :return: the host name or address by which all processes reach this one.
    :raises ValueError: where others cannot, since it is loopback's.
    """
    host = env.get("MASTER_ADDR", "")
    interface = env.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    if one_node:
        return host or "127.0.0.1"
    if is_loopback(host):
        raise ValueError(f"MASTER_ADDR={host} leads each node to itself: set it to rank 0's address, or leave it out")
    if host:
        return host
    addresses = interfaces()
    if interface:
        if interface not in addresses:
            raise ValueError(f"GLOO_SOCKET_IFNAME={interface} is no interface with an IPv4 address: set another")
        return addresses[interface]
    others = (address for address in addresses.values() if not is_loopback(address))
    found = address_towards([*names, OUTSIDE]) or next(others, "")
    if not found:
        raise ValueError("this node has no address but loopback's: set MASTER_ADDR to one by which others reach rank 0")
    return found


def interface_towards(hosts: Sequence[str]) -> str:
    """:return: the name of the interface that leads to the first of these hosts that one leads to; "" if none does."""
    address = address_towards(hosts)
    return next((name for name, own in interfaces().items() if own == address), "")


def address_towards(hosts: Sequence[str]) -> str:
    """
    :return: this node's address on the way to the first of these hosts to which a route leads, other than by loopback,
        as to 127.0.0.1 or to the name of this node where that stands for 127.0.1.1; "" if none does. Nothing is sent.
    """
    for host in hosts:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
            probe.connect((host, 9))
            address = probe.getsockname()[0]
            if not is_loopback(address):
                return address
    return ""


def interfaces() -> dict[str, str]:
    """:return: name -> IPv4 address of each network interface that has one."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode())
            try:
                found[name] = socket.inet_ntoa(fcntl.ioctl(probe, _SIOCGIFADDR, request)[20:24])
            except OSError:  # it has none
                continue
    return found


@contextlib.contextmanager
def gloo_interface(name: str) -> Iterator[None]:
    """In a with block, have gloo use an interface, if one is named and GLOO_SOCKET_IFNAME does not name another."""
    chosen = not name or os.environ.get("GLOO_SOCKET_IFNAME")
    if not chosen:
        os.environ["GLOO_SOCKET_IFNAME"] = name
    try:
        yield
    finally:
        if not chosen:
            del os.environ["GLOO_SOCKET_IFNAME"]
