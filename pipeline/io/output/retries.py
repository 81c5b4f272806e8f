"""Second tries: error rows whose error may have passed are answered again, and the outcomes take
their places.

A row must stand in the output once at every moment. So outcomes are first committed aside, in
`_run/retries/`, and then each file that holds one of their rows is replaced, in one move, by a file
of the same rows with the outcomes in place. A crash in between leaves outcomes to be put in place
by the next run; putting them there twice changes nothing.
"""

from __future__ import annotations

import pyarrow as pa

from pipeline.io.output.commits import OutputLog, done_rows, read_result, retry_rows
from pipeline.io.output.layout import OutputLayout
from pipeline.io.output.lease import Claim, Fence
from pipeline.io.output.storage import OutputFolder
from pipeline.io.output.writer import OutputWriter
from pipeline.io.rowset import difference, intersection
from pipeline.quality.accuracy import Truth


def merge_retries(claim: Claim, truth: Truth | None) -> int:
    """Put the outcomes of second tries in the place of the errors they replace; how many there
    were.

    Args:
        claim: the output, and the name of the run that holds it.
        truth: what to compare answers with, or None.

    Raises:
        LeaseLostError: the run holds the output no more.
    """
    folder = claim.folder
    # Outcomes that cannot be read are tried again: their rows still have their errors.
    outcomes = OutputLog(folder, at=OutputLayout.RETRIES).commits(mend=True)
    if not outcomes:
        return 0
    writer = OutputWriter(folder, Fence.begin(claim))
    writer.accept()
    answered = done_rows(outcomes)
    passed = difference(answered, retry_rows(outcomes))
    files = [f"{OutputLayout.RETRIES}{one.file}" for one in outcomes]
    table = pa.concat_tables([_read(folder, file) for file in files])
    place = {id_: number for number, id_ in enumerate(table["id"].to_pylist())}
    for commit in OutputLog(folder).commits(mend=True):
        if not intersection(commit.retry, answered):
            continue
        before = _read(folder, commit.file)
        merged = pa.concat_tables([before, table])
        chosen = [
            len(before) + place[i] if i in place else n
            for n, i in enumerate(before["id"].to_pylist())
        ]
        writer.replace(commit, merged.take(chosen), truth, difference(commit.retry, passed))
    writer.index()
    for file in files:
        folder.remove(file)
    return len(table)


def _read(folder: OutputFolder, name: str) -> pa.Table:
    return read_result(folder, name).replace_schema_metadata(None)
