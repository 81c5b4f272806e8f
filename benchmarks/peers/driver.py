"""Starts peers in their environments and asks them, each a process that keeps its model."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT
from benchmarks.peers.protocol import Answered, Order, Ready, of_line, to_line

#: Where `make peers` puts their environments.
ENVIRONMENTS = ROOT / ".peers"


class PeerError(Exception):
    """A peer is not to be had; one line says why."""


@dataclass(frozen=True)
class Peer:
    """An engine of others, and how it is set.

    Attributes:
        label: what it is called in tables.
        environment: folder of its environment, in `ENVIRONMENTS`.
        module: its worker.
        settings: what its worker takes.
        variables: environment variables of its process.
        equal_precision: whether all that it computes and keeps is float32, as ours.
    """

    label: str
    environment: str
    module: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=dict)
    equal_precision: bool = True


class Worker:
    """A peer's process with its model loaded.

    Args:
        peer: which peer.
        folder: of work, see `benchmarks.peers.protocol`.
        environments: where the peers' environments are.

    Attributes:
        version: name and version of what answers.

    Raises:
        PeerError: the peer is not installed, or does not start.
    """

    def __init__(self, peer: Peer, folder: Path, environments: Path) -> None:
        python = environments / peer.environment / "bin" / "python"
        if not python.exists():
            raise PeerError("it is not installed (make peers)")
        self._log = folder / f"{peer.label}.log"
        # The site's sitecustomize.py is found before all else, in every process that it starts.
        path = os.pathsep.join([str(ROOT / "benchmarks" / "peers" / "site"), str(ROOT)])
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [str(python), "-m", peer.module, str(folder), json.dumps(dict(peer.settings))],
                cwd=ROOT,
                env={**os.environ, **peer.variables, "PYTHONPATH": path},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self.version = of_line(Ready, self._read()).version

    def answer(self, workload: str, first: int | None = None) -> Answered:
        """Answer a workload, or the first of its questions.

        Raises:
            PeerError: the process ended.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(to_line(Order(workload, first)))
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None
        return of_line(Answered, self._read())

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # one that has ended may not have read its last order
            self._process.stdin.close()
        self._process.wait()

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._ended()
        return line

    def _ended(self) -> PeerError:
        code = self._process.wait()
        lines = self._log.read_text(errors="replace").strip().splitlines()
        last = lines[-1] if lines else "without a word"
        return PeerError(f"its process ended with status {code}: {last}")


def start(
    peers: Sequence[Peer], folder: Path, stack: ExitStack, environments: Path
) -> tuple[dict[str, Worker], list[str]]:
    """Start the peers that are to be had.

    Returns:
        Their workers by label, which `stack` closes, and a word on each of the others.
    """
    workers, words = {}, []
    for peer in peers:
        try:
            workers[peer.label] = worker = Worker(peer, folder, environments)
        except PeerError as error:
            words.append(f"{peer.label} took no part: {error}")
        else:
            stack.callback(worker.close)
    return workers, words
