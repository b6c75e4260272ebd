"""Several nodes on one machine: raylets of their own, joined by Ray's cluster_utils, and the command as a user runs it.

A node that is killed costs the tasks that ran on it; a node without the package ends the job with one sentence.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bitloft.integrations.ray import library
from bitloft.quantize import quantize
from tests.helpers import tiny_llama
from tests.test_fanout import contents
from tests.test_ray import HIDDEN

pytest.importorskip("ray", reason="needs Ray (pip install 'bitloft[ray]')")

pytestmark = pytest.mark.slow  # a cluster takes half a minute
STORE = 100 << 20


@pytest.fixture
def nodes() -> Iterator[Any]:
    """A head that computes nothing; tests add nodes."""
    library()
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "object_store_memory": STORE, "include_dashboard": False},
    )
    yield cluster
    cluster.shutdown()


def command(model: Path, out: Path, address: str) -> list[str]:
    return [sys.executable, "-m", "bitloft.cli", "quantize", str(model), "--out", str(out), "--format", "lm2:64",
            "--rank", "4", "--engine", "ray", "--address", address, "--jobs", "2"]  # fmt: skip


def steps(out: Path) -> list[str]:
    """Finished steps of an unfinished run, in the order in which they were written down."""
    journal = out.with_name(f"{out.name}.work") / "journal.jsonl"
    try:
        return journal.read_text(encoding="utf-8").splitlines()[1:]
    except OSError:
        return []


def test_a_killed_node_costs_only_its_tasks(nodes: Any, tmp_path: Path) -> None:
    model, out = tiny_llama(tmp_path / "model", layers=12), tmp_path / "there" / "base"
    stays, dies = (nodes.add_node(num_cpus=1, object_store_memory=STORE) for _ in range(2))
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(command(model, out, nodes.address), env=env, stderr=subprocess.PIPE, text=True)
    try:
        while run.poll() is None and len(steps(out)) < 6:
            time.sleep(0.02)
        before = steps(out)
        assert run.poll() is None, run.stderr and run.stderr.read()
        nodes.remove_node(dies, allow_graceful=False)
        said = run.communicate(timeout=300)[1]
    finally:
        run.kill()
    assert run.returncode == 0, said
    assert 6 <= len(before) < 84  # it died in the middle
    assert len([node for node in nodes.list_all_nodes() if node is stays]) == 1
    quantize(model, tmp_path / "here" / "base", format="lm2:64", rank=4)
    assert contents(tmp_path / "here" / "base") == contents(out)


def test_a_node_without_the_package_is_one_sentence_and_the_run_can_be_resumed(nodes: Any, tmp_path: Path) -> None:
    model, out = tiny_llama(tmp_path / "model"), tmp_path / "there" / "base"
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "sitecustomize.py").write_text(HIDDEN, encoding="utf-8")
    nodes.add_node(num_cpus=1, object_store_memory=STORE)
    nodes.add_node(num_cpus=1, object_store_memory=STORE, env_vars={"PYTHONPATH": str(bare)})
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command(model, out, nodes.address), env=env, capture_output=True, text=True, timeout=300)
    said = " ".join(done.stderr.split())
    assert done.returncode == 2, said
    assert "a node of the Ray cluster lacks bitloft; install bitloft" in said
    assert "Traceback" not in done.stderr
    quantize(model, out, format="lm2:64", rank=4, resume=True)
    quantize(model, tmp_path / "here" / "base", format="lm2:64", rank=4)
    assert contents(tmp_path / "here" / "base") == contents(out)
