"""The way to a Ray cluster: which one a job connects to, or the one that it starts for itself."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Iterator

from pipeline.errors import ConfigError
from pipeline.run.stopping import signals_kept

#: Seconds that a Ray cluster may take to accept a connection.
REACH_SECONDS = 5.0


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[None]:
    """A connection to Ray: the one there is, or another while this lasts.

    Args:
        address: of the cluster; None: what `RAY_ADDRESS` says, or a cluster for this job alone,
            which ends with it.

    Raises:
        ConfigError: nothing answers at the address.
    """
    import ray

    started_here = connect(address)
    try:
        yield
    finally:
        if started_here:
            ray.shutdown()


def connect(address: str | None) -> bool:
    """Connect to Ray, unless this process is connected already; True where a cluster was started
    for this job alone.
    """
    import ray

    if ray.is_initialized():
        return False
    # Ray would otherwise join whatever cluster it finds on this machine.
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    _check_reachable(address)
    _quieten_ray()
    try:
        with signals_kept():
            ray.init(address=address, logging_level=logging.WARNING)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConfigError(f"ray.address: cannot connect to {address!r} ({error})") from error
    return address == "local"


def _check_reachable(address: str) -> None:
    """Ray itself takes a minute and a half to give up on an address where nothing listens, and then
    ends the process.
    """
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if not colon or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_SECONDS).close()
    except OSError as error:
        raise ConfigError(
            f"ray.address: nothing answers at {address!r} ({error}); start the cluster, or leave "
            "ray.address and RAY_ADDRESS unset for a local one"
        ) from error


def _quieten_ray() -> None:
    """Keep away the warnings that Ray gives in every job about its own defaults."""
    for name in (
        "ray._private.authentication.authentication_token_setup",
        "ray.data._internal.progress",
    ):
        logging.getLogger(name).setLevel(logging.ERROR)
