"""The files of a row, within what a row may ask for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Generic, Literal, TypeVar

from pipeline.errors import RowError

Made = TypeVar("Made")


class RowFiles(ABC, Generic[Made]):
    """Makes something of the files of one row, of each once, and counts them.

    Args:
        most: files that a row may have.
        most_bytes: bytes that they may have together.
    """

    def __init__(self, most: int, most_bytes: int) -> None:
        self._most, self._most_bytes = most, most_bytes
        # By the bytes themselves: equal references are fetched once.
        self._known: dict[int, tuple[bytes, Made]] = {}
        self._files = self._bytes = 0

    @abstractmethod
    def made(self, data: bytes, field: str) -> Made:
        """What becomes of a file's bytes, which came from a field."""

    @abstractmethod
    def excess(self, what: Literal["files", "bytes"], count: int, most: int) -> RowError:
        """The error of a row that has so many."""

    def file(self, data: bytes, field: str) -> Made:
        """What is made of bytes that came from a field.

        Raises:
            RowError: they are too many, as `excess` says it, or whatever `made` raises.
        """
        self._files += 1
        self.check_number(self._files)
        known = self._known.get(id(data))
        if known is None:
            self._bytes += len(data)
            if self._bytes > self._most_bytes:
                raise self.excess("bytes", self._bytes, self._most_bytes)
            known = self._known[id(data)] = data, self.made(data, field)
        return known[1]

    def check_number(self, files: int) -> None:
        """Whether a row may have so many.

        Raises:
            RowError: it may not, as `excess` says it.
        """
        if files > self._most:
            raise self.excess("files", files, self._most)
