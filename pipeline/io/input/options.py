"""What reading an input is told, whoever tells it: the settings `input` and `fetch` are such
options.

Units and meanings stand with the settings (`pipeline.settings.job`), which this room does not know.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

from pipeline.io.input.listing import Form


class ColumnOptions(Protocol):
    """Names of the columns that are read for their meaning: `auto` is the column of the key's own
    name, if there is one; None is none.
    """

    @property
    def id(self) -> str | None:
        """Ids."""

    @property
    def image(self) -> str | None:
        """One image a row."""

    @property
    def images(self) -> str | None:
        """Lists of images."""

    @property
    def prompt(self) -> str | None:
        """What is asked."""

    @property
    def messages(self) -> str | None:
        """Chats."""


class InputOptions(Protocol):
    """What is read, what is asked of it, and the bounds of a row."""

    @property
    def path(self) -> str | list[str]:
        """A file, a folder, a glob or a list of them."""

    @property
    def format(self) -> Form | Literal["auto"]:
        """The files' form; `auto`: the first one that there is."""

    @property
    def columns(self) -> ColumnOptions:
        """What holds what."""

    @property
    def prompt(self) -> str | None:
        """What is asked of all rows; None: see `prompts` and the columns."""

    @property
    def prompts(self) -> Mapping[str, str]:
        """Several prompts by name, asked of each row."""

    @property
    def limit(self) -> int | None:
        """Rows to take at most, in the order of the files."""

    @property
    def image_root(self) -> str | None:
        """Folder below which rows may name images."""

    @property
    def max_row_bytes(self) -> int:
        """Most bytes of a row, pictures not counted."""

    @property
    def max_line_bytes(self) -> int:
        """Most bytes of a line, or of a sample's text."""

    @property
    def max_sample_bytes(self) -> int:
        """Most bytes of a sample's files."""

    @property
    def max_sample_files(self) -> int:
        """Most files of a sample."""

    @property
    def max_columns(self) -> int:
        """Most keys of a row without types, and of its shard's."""


class FetchOptions(Protocol):
    """What rows may name, and how patiently it is fetched."""

    @property
    def schemes(self) -> Sequence[str]:
        """Schemes of URLs that rows may name."""

    @property
    def buckets(self) -> Sequence[str]:
        """Buckets that rows may name besides those of the input."""

    @property
    def allow_hosts(self) -> Sequence[str]:
        """Hosts whose addresses may be private."""

    @property
    def user_agent(self) -> str:
        """What servers are told who asks."""

    @property
    def concurrency(self) -> int:
        """Fetches at once."""

    @property
    def timeout_seconds(self) -> float:
        """Longest time of one try."""

    @property
    def tries(self) -> int:
        """Tries of what may pass."""
