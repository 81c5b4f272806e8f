"""What lies where in an output: the name of every file, relative to the output's folder.

Results lie in the folder itself, so that any reader of Parquet folders reads it as it is.
Everything else lies in `_run/`: such readers pass over names that begin with `_`.
"""

from __future__ import annotations

import re

#: A result's name; those of versions before names held epochs count as of epoch 0.
_RESULT = re.compile(
    r"(?:^|/)part-(?:(\d{8})-[^/]+|\d{8}T\d{6}-[0-9a-f]{6}-[0-9a-f]{4})-\d{5}\.parquet$", re.ASCII
)
#: Whole names: of a file that something else puts there (`._00000007.json`) there is no epoch.
_NUMBERED = re.compile(r"(?:^|/)(\d{8})\.json$", re.ASCII)


class OutputLayout:
    """Names of files and folders; folders end without a slash unless their names say so."""

    RUN = "_run"
    MANIFEST = f"{RUN}/manifest.json"
    CONFIG = f"{RUN}/config.yaml"
    SUMMARY = f"{RUN}/summary.json"
    REPORT = f"{RUN}/report.html"
    EVENTS = f"{RUN}/events.jsonl"
    TIMELINE = f"{RUN}/timeline.jsonl"
    #: Who holds the output (`lease`), and which files count (`commits`): what outlives `clear`.
    LEASE = f"{RUN}/lease"
    ACCEPTED = f"{RUN}/accepted"
    #: What the footers of many results say, again.
    INDEX = f"{RUN}/index"
    #: Where outcomes of second tries lie until they are in place (`retries`): a prefix of results'
    #: names, hence the slash.
    RETRIES = f"{RUN}/retries/"
    #: Rows that are kept with their pictures (`pipeline.actors.kept`).
    KEPT = f"{RUN}/samples"
    #: Where damaged results are moved.
    DAMAGED = f"{RUN}/damaged"
    #: Written to find out whether the storage can be written to.
    PROBE = f"{RUN}/probe"
    #: How local files end that are not yet whole.
    PARTIAL = ".partial"
    #: A day's output in the folder of a nightly job's; and the file in it that says that all of it
    #: is answered.
    PARTITION = "date="
    SUCCESS = "_SUCCESS"

    @staticmethod
    def result(writer: str, number: int) -> str:
        """A writer's next result; `writer` is `Fence.name`, which nobody else has."""
        return f"part-{writer}-{number:05d}.parquet"

    @staticmethod
    def epoch_of(result: str) -> int | None:
        """The epoch in a result's name; None of a file that no run of this program called so."""
        match = _RESULT.search(result)
        return None if match is None else int(match[1] or 0)

    @classmethod
    def epoch(cls, number: int) -> str:
        """The file that says whose an epoch is."""
        return f"{cls.LEASE}/{number:08d}.json"

    @classmethod
    def accepted(cls, epoch: int) -> str:
        """The list of files that count when an epoch begins."""
        return f"{cls.ACCEPTED}/{epoch:08d}.json"

    @staticmethod
    def number_of(name: str) -> int | None:
        """The epoch in a name of `epoch` or `accepted`; None in any other name."""
        match = _NUMBERED.search(name)
        return None if match is None else int(match[1])

    @classmethod
    def beat(cls, run: str) -> str:
        """The file by which a run says that it lives."""
        return f"{cls.LEASE}/{run}.beat"

    @staticmethod
    def is_beat(name: str) -> bool:
        """Whether a file of the folder `LEASE` is some run's `beat`."""
        return name.endswith(".beat")

    @classmethod
    def index(cls, writer: str, number: int) -> str:
        """A writer's next object of the index."""
        return f"{cls.INDEX}/{writer}-{number:05d}.json"

    @classmethod
    def kept(cls, writer: str, number: int) -> str:
        """A writer's next file of rows that are kept with their pictures.

        Not Parquet: there are readers that look for it in every folder.
        """
        return f"{cls.KEPT}/{writer}-{number:05d}.arrow"

    @classmethod
    def partial(cls, name: str, unique: str) -> str:
        """What a local file is called until it is whole."""
        return f"{cls.RUN}/{name.rsplit('/', 1)[-1]}.{unique}{cls.PARTIAL}"

    @classmethod
    def damaged(cls, name: str, unique: str) -> str:
        """Where a damaged file goes."""
        return f"{cls.DAMAGED}/{name.rsplit('/', 1)[-1]}-{unique}"

    @classmethod
    def probe(cls, unique: str) -> str:
        """A file that is written to find out what the storage can do."""
        return f"{cls.PROBE}-{unique}"
