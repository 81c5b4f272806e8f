"""SIGKILL while outcomes of second tries are put in place and while the report is written: what a
job does once everything is answered, so that no Ray is needed to come as far.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.io.output.columns import layout_schema
from pipeline.io.output.commits import OutputLog
from pipeline.io.output.layout import OutputLayout
from pipeline.io.output.lease import Claim, Lease
from pipeline.io.output.storage import OutputFolder
from pipeline.io.output.writer import OutputWriter
from pipeline.io.rowset import RowSet
from pipeline.run.check import Job, check_job
from pipeline.run.run import run_job
from pipeline.run.verify import verify
from pipeline.settings.base import load_settings
from pipeline.settings.job import JobSettings
from pipeline.synthetic.random_checkpoint import RandomShape, write_random_checkpoint
from tests.io.shards import write_shard
from tests.jobs.support import ROOT, sets

pytestmark = pytest.mark.slow

IDS = ["a", "b", "c", "d"]

#: Runs the job over a copy of an output, killed when it syncs for the n-th time within the function
#: `sys.argv[2]` of the module `sys.argv[1]`; n counts up until the job lives to the end. Prints
#: how each ended. One process that forks: the imports take longest.
KILLED = """
import importlib, os, shutil, signal, sys
from dataclasses import replace
import pipeline.report.page
from pipeline.run.check import check_job
from pipeline.run.run import run_job
from pipeline.settings.base import load_settings
from pipeline.settings.job import JobSettings

module, name, template, *assignments = sys.argv[1:]
module = importlib.import_module(module)
call, sync = getattr(module, name), os.fsync


def deadly(*arguments, **named):
    left = [number]

    def fsync(handle):
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        sync(handle)

    os.fsync = fsync
    try:
        return call(*arguments, **named)
    finally:
        os.fsync = sync


setattr(module, name, deadly)
given = [*assignments, f"output.path={template}"]
job = check_job("vqa", load_settings(JobSettings, None, given))
status = number = -1
while status:
    number += 1
    output = f"{template}-{number}"
    shutil.copytree(template, output)
    child = os.fork()
    if child == 0:
        try:
            path = job.settings.output.model_copy(update={"path": output})
            run_job(replace(job, settings=job.settings.model_copy(update={"output": path})))
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    print(os.waitstatus_to_exitcode(status), flush=True)
    if os.waitstatus_to_exitcode(status) > 0:
        break
"""


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """A job; it must not come as far as Ray."""
    monkeypatch.setattr(
        "pipeline.run.cluster.connect", lambda address: pytest.fail("the job went on to Ray")
    )
    base, adapter = write_random_checkpoint(tmp_path / "model", RandomShape(), seed=1)
    write_shard(tmp_path / "in/0.parquet", {"id": IDS, "prompt": ["?"] * len(IDS)})
    settings = {
        "model.base": base,
        "model.adapter": adapter,
        "input.path": tmp_path / "in",
        "output.path": tmp_path / "out",
    }
    return check_job("vqa", load_settings(JobSettings, None, sets(settings)[1::2]))


def into(folder: OutputFolder, job: Job) -> Job:
    """The same job with another output."""
    output = job.settings.output.model_copy(update={"path": folder.url})
    return replace(job, settings=job.settings.model_copy(update={"output": output}))


def write_finished(job: Job, *, outcomes: bool) -> None:
    """An output in which all rows are answered, two of them with an error; its second try lies
    aside.
    """
    folder = OutputFolder(job.settings.output.path)
    folder.make()
    lease = Lease(Claim(folder, "before"))
    fence = lease.take()
    job.manifest.save(folder)
    folder.write(OutputLayout.CONFIG, b"{}")
    schema = layout_schema(job.settings.output, job.plan.extras_schema, job.plan.names)
    (shard,) = (shard.file.url for shard in job.plan.shards)
    lost = {shard: RowSet.range(1, 3)}

    def rows(ids: list[str], error: str | None) -> pa.Table:
        status = "ok" if error is None else "error"
        answers = [{"id": id_, "status": status, "error": error, "flags": []} for id_ in ids]
        return pa.Table.from_pylist(answers, schema)

    writer = OutputWriter(folder, fence)
    writer.accept()
    answers = pa.concat_tables(
        [rows(IDS[:1], None), rows(IDS[1:3], "image_fetch: no"), rows(IDS[3:], None)]
    )
    writer.commit(answers, {shard: RowSet.range(0, 4)}, None, lost)
    if outcomes:
        aside = OutputWriter(folder, fence, OutputLayout.RETRIES)
        aside.commit(rows(IDS[1:3], None), lost, None)
    lease.release()


def kill_everywhere(module: str, function: str, job: Job) -> list[OutputFolder]:
    """The outputs of runs that were killed within a function, each a step later than the one
    before.
    """
    template = job.settings.output.path
    settings = {
        "model.base": job.settings.model.base,
        "model.adapter": job.settings.model.adapter,
        "input.path": job.settings.input.path,
    }
    given = sets(settings)[1::2]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, module, function, template, *given],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    codes = [int(line) for line in done.stdout.split("\n") if line.lstrip("-").isdecimal()]
    assert codes == [-signal.SIGKILL] * (len(codes) - 1) + [0], done.stderr
    return [OutputFolder(f"{template}-{number}") for number in range(len(codes) - 1)]


def ids(folder: OutputFolder) -> list[str]:
    """Ids in the files that count, as they stand."""
    files = OutputLog(folder).names()
    return [
        id_ for file in files for id_ in pq.read_table(f"{folder.url}/{file}")["id"].to_pylist()
    ]


def test_killed_while_outcomes_are_put_in_place_the_next_run_finishes_that(
    job: Job,
) -> None:
    write_finished(job, outcomes=True)
    OutputFolder(job.settings.output.path).write(OutputLayout.REPORT, b"there is one")
    killed = kill_everywhere("pipeline.run.run", "merge_retries", job)
    assert len(killed) > 5
    for folder in killed:
        assert ids(folder) == IDS
        assert run_job(into(folder, job)).written.errors == {}
        assert ids(folder) == IDS
        assert verify(folder).problems == ()
        assert OutputLog(folder, at=OutputLayout.RETRIES).names() == []
        assert not list(Path(folder.url).rglob(f"*{OutputLayout.PARTIAL}"))


def test_killed_while_the_report_is_written_the_next_run_writes_it(
    job: Job,
) -> None:
    write_finished(job, outcomes=False)
    killed = kill_everywhere("pipeline.report.page", "write_report", job)
    # Before the page has its name, and before that would outlast a power cut.
    assert [folder.exists(OutputLayout.REPORT) for folder in killed] == [False, True]
    for folder in killed:
        assert ids(folder) == IDS
        assert run_job(into(folder, job)).written.rows == len(IDS)
        assert folder.read(OutputLayout.REPORT).rstrip().endswith(b"</html>")
        assert verify(folder).problems == ()
        assert not list(Path(folder.url).rglob(f"*{OutputLayout.PARTIAL}"))
