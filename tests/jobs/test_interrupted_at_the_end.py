"""SIGTERM and Ctrl-C at every sync of a run that has everything answered: while it takes the lock,
puts outcomes of second tries in place, sums up, writes its report and gives the lock back.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.io.output.commits import OutputLog
from pipeline.io.output.layout import OutputLayout
from pipeline.io.output.storage import OutputFolder
from pipeline.run.cli import LAST_WORDS
from pipeline.run.verify import verify
from tests.jobs.support import ROOT, TIMEOUT, sets
from tests.jobs.test_killed_at_the_end import IDS, ids, write_finished
from tests.jobs.test_killed_at_the_end import job as job  # its fixture

pytestmark = pytest.mark.slow

#: Runs the job over a copy of an output, which is sent the signal `sys.argv[1]` at its n-th sync; n
#: counts up until the job lives to its end. Then the same job again, undisturbed. Prints what
#: became of both. One process that forks: the imports take longest, and then the checks.
INTERRUPTED = """
import json, os, shutil, sys, threading
from dataclasses import replace
from pathlib import Path
import pipeline.report.page
from pipeline.io.output.lease import read_lock
from pipeline.io.output.storage import OutputFolder
from pipeline.run.check import check_job
from pipeline.run.cli import in_one_line
from pipeline.run.run import run_job
from pipeline.settings.base import load_settings
from pipeline.settings.job import JobSettings

number, template, *assignments = sys.argv[1:]
given = [*assignments, f"output.path={template}"]
job = check_job("vqa", load_settings(JobSettings, None, given))
sync = os.fsync


def ended(output, at=None):
    log = Path(f"{output}.log")
    child = os.fork()
    if child == 0:
        left = [at]

        def fsync(handle):
            if threading.current_thread() is threading.main_thread() and left[0] is not None:
                if left[0] == 0:
                    os.kill(os.getpid(), int(number))
                left[0] -= 1
            sync(handle)

        os.fsync = fsync
        try:
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            path = job.settings.output.model_copy(update={"path": output})
            here = replace(job, settings=job.settings.model_copy(update={"output": path}))
            os._exit(in_one_line(lambda: run_job(here)))
        finally:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), log.read_text()


def once(at):
    output = f"{template}-{at}"
    shutil.copytree(template, output)
    code, err = ended(output, at)
    lock = read_lock(OutputFolder(output))
    beat = json.loads(Path(f"{output}/_run/lease/{lock.run}.beat").read_text())
    again = ended(output) if code else (0, "")
    facts = {"code": code, "err": err, "released": beat["released"], "again": again}
    print(json.dumps(facts), flush=True)
    return code


at = 0
while once(at) == 128 + int(number):
    at += 1
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda one: one.name)
@pytest.mark.parametrize("outcomes", [True, False], ids=["outcomes", "report"])
@pytest.mark.timeout(3 * TIMEOUT)
def test_a_signal_at_any_sync_of_the_end_is_one_line_and_the_lock_is_given_back(
    outcomes: bool, number: signal.Signals, job: Any, tmp_path: Path
) -> None:
    write_finished(job, outcomes=outcomes)
    template = job.settings.output.path
    if outcomes:
        OutputFolder(template).write(OutputLayout.REPORT, b"there is one")
    given = {
        "model.base": job.settings.model.base,
        "model.adapter": job.settings.model.adapter,
        "input.path": job.settings.input.path,
    }
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(int(number)), template, *sets(given)[1::2]],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=2 * TIMEOUT,
        check=False,
        # A shell that starts this test in the background has it ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    runs = [json.loads(line) for line in done.stdout.split("\n") if line.startswith('{"code')]
    assert (len(runs) > 20, runs[-1]["code"]) == (True, 0), runs[-1]
    for at, run in enumerate(runs[:-1]):
        assert (run["code"], run["err"]) == (128 + number, f"{LAST_WORDS[number]}\n"), at
        assert run["released"], at
        assert run["again"][0] == 0, (at, run["again"])
        assert "locked" not in run["again"][1], at
        folder = OutputFolder(f"{template}-{at}")
        assert ids(folder) == IDS, at
        assert verify(folder).problems == (), at
        assert OutputLog(folder, at=OutputLayout.RETRIES).names() == [], at
        assert not list(Path(folder.url).rglob(f"*{OutputLayout.PARTIAL}")), at
