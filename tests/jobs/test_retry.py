"""Error rows that may succeed are tried again where one asks for it, and only they."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.synthetic.random_checkpoint import RandomShape, write_random_checkpoint
from tests.conftest import RayCluster
from tests.io.input.web import Web
from tests.io.shards import picture, write_shard
from tests.jobs.support import check_and_run, results


@pytest.mark.slow
def test_what_the_network_denied_is_answered_by_a_second_run_in_the_same_place(
    tmp_path: Path, ray_cluster: RayCluster
) -> None:
    base, adapter = write_random_checkpoint(tmp_path / "model", RandomShape(), seed=1)
    with Web() as web:
        web.files = {
            "a.png": picture(seed=1),
            "b.png": picture(seed=2),
            "broken.png": picture()[:400],
        }
        (tmp_path / "here").mkdir()
        (tmp_path / "here/c.png").write_bytes(picture(seed=3))
        names = [
            web.url("a.png"),
            web.url("b.png"),
            web.url("broken.png"),
            "c.png",
            "http://10.0.0.1/d.png",
            "none.png",
        ]
        write_shard(tmp_path / "in/0.parquet", {"image": names})
        job = {
            "model.base": base,
            "model.adapter": adapter,
            "model.dtype": "float32",
            "input.path": tmp_path / "in",
            "input.prompt": "What is it?",
            "input.image_root": tmp_path / "here",
            "fetch.allow_hosts": "[127.0.0.1]",
            "fetch.tries": 1,
            "output.path": tmp_path / "out",
            "generation.max_new_tokens": 3,
        }

        def codes() -> list[str]:
            rows = results(tmp_path / "out")
            assert [rows[f"0.parquet#{n}"]["image"] for n in range(6)] == names
            return [(rows[f"0.parquet#{n}"]["error"] or "ok").split(":")[0] for n in range(6)]

        web.down = True
        check_and_run("caption", job)
        lasting = ["ok", "image_forbidden", "image_missing"]
        assert codes() == ["image_fetch"] * 3 + lasting
        web.down = False
        asked = web.asked.total()
        check_and_run("caption", job)  # without being asked to, a finished job does nothing
        assert (codes()[0], web.asked.total()) == ("image_fetch", asked)
        summary = check_and_run("caption", {**job, "output.retry_errors": "true"})
        assert codes() == ["ok", "ok", "image_decode", *lasting]
        assert web.asked.total() == asked + 3
        assert summary.written.rows == 6
        assert summary.written.errors == {
            "image_decode": 1,
            "image_forbidden": 1,
            "image_missing": 1,
        }
        assert list((tmp_path / "out/_run/retries").glob("*.parquet")) == []
        (file,) = (tmp_path / "out").glob("*.parquet")
        assert pq.read_metadata(file).num_rows == 6
        web.shutdown()
