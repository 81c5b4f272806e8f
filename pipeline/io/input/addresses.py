"""Which internet addresses rows may make this program connect to: public ones, asked of the name
and of the socket.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from typing import Any

from aiohttp.abc import AbstractResolver, ResolveResult

from pipeline.errors import RowError

_IPv4, _IPv6 = ipaddress.IPv4Network, ipaddress.IPv6Network
#: Public by number, and yet what only a cloud's own machines reach, or what leads into other
#: networks.
_SPECIAL_V4 = (
    _IPv4("168.63.129.16/32"),  # Azure's host
    _IPv4("192.0.0.0/24"),  # IETF protocols; Oracle's metadata is 192.0.0.192
    _IPv4("192.88.99.0/24"),  # relays of 6to4
    _IPv4("161.26.0.0/16"),  # IBM Cloud's own services
    _IPv4("166.8.0.0/14"),
)
#: The only IPv6 addresses that are given to the public internet at all.
_GLOBAL_V6 = _IPv6("2000::/3")
_SPECIAL_V6 = (
    _IPv6("2001::/23"),  # IETF protocols: Teredo, ORCHID, benchmarks
    _IPv6("2001:db8::/32"),  # documentation
    _IPv6("3fff::/20"),
    _IPv6("2002::/16"),  # 6to4: an IPv4 address of anybody's choice
)
#: The last 32 bits of these are an IPv4 address that is connected to.
_MAPPED = (_IPv6("::ffff:0:0/96"), _IPv6("64:ff9b::/96"))
#: ISATAP: these 32 bits before an IPv4 address, below any prefix.
_ISATAP = frozenset({0x00005EFE, 0x02005EFE})


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public internet, as must any IPv4 address that is
    wrapped in it.

    Of IPv6 only what is known to be public counts, whatever else there may be: a list of what is
    not has holes.
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv4Address):
        return (
            ip.is_global
            and not ip.is_multicast
            and not any(ip in special for special in _SPECIAL_V4)
        )
    last = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    if any(ip in prefix for prefix in _MAPPED):
        return is_public(str(last))
    if int(ip) >> 32 & 0xFFFFFFFF in _ISATAP and not is_public(str(last)):
        return False
    return ip in _GLOBAL_V6 and ip.is_global and not any(ip in special for special in _SPECIAL_V6)


def as_address(host: str) -> str | None:
    """The address that a host is in itself, in any form that connecting would take (2130706433,
    0x7f.1); None of a name.
    """
    host = host.rstrip(".")
    try:
        return str(ipaddress.ip_address(host.partition("%")[0]))
    except ValueError:
        pass
    try:
        return socket.inet_ntoa(socket.inet_aton(host))
    except (OSError, ValueError):
        return None


def not_public(host: str) -> RowError:
    """What a row hears that names a host which is not public."""
    return RowError(
        "image_forbidden",
        f"{host} is no public address; name it in fetch.allow_hosts if rows may point there",
    )


class PublicResolver(AbstractResolver):
    """Resolves names for aiohttp, which connects to what this returns and to nothing else."""

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Addresses of a host.

        Raises:
            RowError: `image_forbidden`, one of them is not public.
            OSError: the name cannot be resolved.
        """
        loop = asyncio.get_running_loop()
        resolved = await loop.getaddrinfo(host, port, family=family, type=socket.SOCK_STREAM)
        results = []
        for own_family, _, protocol, _, address in resolved:
            if not is_public(str(address[0])):
                raise not_public(host)
            results.append(
                ResolveResult(
                    hostname=host,
                    host=str(address[0]),
                    port=port,
                    family=own_family,
                    proto=protocol,
                    flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
                )
            )
        return results

    async def close(self) -> None:
        """Nothing is held."""


def public_socket(peer: tuple[Any, ...]) -> socket.socket:
    """Make the socket of a connection, for aiohttp; the last door, whichever way an address came
    here.

    Args:
        peer: family, type, protocol, name and address, as `getaddrinfo` gives them.

    Raises:
        RowError: `image_forbidden`, the address is not public, or none that is written as addresses
            are.
    """
    family, kind, protocol, _, address = peer
    host = str(address[0])
    try:
        public = is_public(host)
    except ValueError:
        public = False
    if not public:
        raise not_public(host)
    return socket.socket(family, kind, protocol)
