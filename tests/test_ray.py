"""integrations/ray.py: every item once, a killed worker costs its item, and one sentence for whatever goes wrong."""

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bitloft.errors import BitloftError, DataError, OptionError
from bitloft.integrations import ray as module
from bitloft.integrations.ray import Cluster, connected, library, spread, versions

pytest.importorskip("ray", reason="needs Ray (pip install 'bitloft[ray]')")


def prepared(place: str) -> Path:
    """Leaves a file for each process that it ran in."""
    (Path(place) / f"prepared-{os.getpid()}").touch()
    return Path(place)


def worked(place: Path, item: str) -> tuple[str, int]:
    """Doubles a word; ``die`` kills its process the first time, ``always`` every time, ``bad`` raises."""
    with (place / item).open("a") as stream:
        stream.write(f"{os.getpid()}\n")
    tries = len((place / item).read_text().splitlines())
    if item == "always" or (item == "die" and tries == 1):
        os.kill(os.getpid(), signal.SIGKILL)
    if item == "bad":
        raise DataError("row 3 is no row.")
    if item == "bug":
        raise KeyError(item)
    return item * 2, os.getpid()


def test_every_item_comes_back_once_from_prepared_processes(ray_cluster: None, tmp_path: Path) -> None:
    items = [f"i{n}" for n in range(12)]
    found = dict(spread(Cluster(workers=2), prepared, (str(tmp_path),), worked, items))
    assert {item: double for item, (double, _) in found.items()} == {item: item * 2 for item in items}
    processes = {pid for _, pid in found.values()}
    assert len(list(tmp_path.glob("prepared-*"))) == len(processes)
    assert os.getpid() not in processes
    assert all(len((tmp_path / item).read_text().splitlines()) == 1 for item in items)
    assert list(spread(Cluster(), prepared, (str(tmp_path),), worked, [])) == []


def alone(place: Path, item: str) -> tuple[float, float]:
    """When an item began and ended."""
    began = time.time()
    time.sleep(0.3)
    return began, time.time()


def test_no_more_tasks_run_than_workers_are_asked_for(ray_cluster: None, tmp_path: Path) -> None:
    """One worker on a cluster of two processors: no two items overlap."""
    spans = sorted(span for _, span in spread(Cluster(workers=1), prepared, (str(tmp_path),), alone, ["a", "b", "c"]))
    assert all(first[1] <= second[0] for first, second in itertools.pairwise(spans))


def test_a_killed_worker_costs_only_its_item(ray_cluster: None, tmp_path: Path) -> None:
    items = ["a", "die", "b", "c"]
    found = dict(spread(Cluster(workers=1, attempts=2), prepared, (str(tmp_path),), worked, items))
    assert {item: double for item, (double, _) in found.items()} == {item: item * 2 for item in items}
    tries = {item: len((tmp_path / item).read_text().splitlines()) for item in items}
    assert tries["die"] == 2
    assert sum(tries.values()) <= len(items) + 2  # with it, at most the task that had been handed to that process


def test_what_goes_wrong_is_one_sentence(ray_cluster: None, tmp_path: Path) -> None:
    def run(item: str) -> list[Any]:
        return list(spread(Cluster(workers=1, attempts=2), prepared, (str(tmp_path),), worked, [item]))

    with pytest.raises(BitloftError, match=r"process that worked on always died 2 times.*resume"):
        run("always")
    setup, kept = (str(tmp_path),), ["always", "a"]
    found = dict(spread(Cluster(workers=1, attempts=2), prepared, setup, worked, kept, lost=lambda item, why: (why, 0)))
    assert "process that worked on always died 2 times" in found["always"][0]
    assert found["a"][0] == "aa"
    with pytest.raises(DataError, match=r"row 3 is no row\. \(on node "):
        run("bad")
    with pytest.raises(KeyError):
        run("bug")


# a worker that starts with this finds no bitloft
HIDDEN = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "bitloft":
            raise ModuleNotFoundError("No module named 'bitloft'", name="bitloft")
sys.meta_path.insert(0, Hidden())
"""


def test_a_node_with_another_version_or_without_the_package(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "versions", lambda: versions() | {"torch": "1.0"})
    with pytest.raises(BitloftError, match=r"begun with torch 1\.0, and this node has .*install the same there"):
        list(spread(Cluster(workers=1), prepared, (str(tmp_path),), worked, ["a"]))
    monkeypatch.undo()
    (tmp_path / "sitecustomize.py").write_text(HIDDEN)
    ray = library()
    task = ray.remote(module._task).options(runtime_env={"env_vars": {"PYTHONPATH": str(tmp_path)}}, max_retries=0)
    ready = task.remote(("key", versions(), prepared, (str(tmp_path),), worked), "a")
    with pytest.raises(BitloftError, match=r"a node of the Ray cluster lacks bitloft; install bitloft .*and resume"):
        module._result(ray, Cluster(), ready, "a")


def test_full_store_and_lost_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = library()

    def failing(error: Exception) -> None:
        def get(ready: object) -> None:
            raise error

        monkeypatch.setattr(ray, "get", get)

    failing(ray.exceptions.ObjectStoreFullError("full"))
    with pytest.raises(BitloftError, match=r"object store of Ray is full at x; .*resume"):
        module._result(ray, Cluster(), None, "x")
    failing(ray.exceptions.OutOfMemoryError("killed"))
    with pytest.raises(BitloftError, match=r"died 3 times \(out of memory\?\)"):
        module._result(ray, Cluster(), None, "x")


def test_a_task_that_no_node_can_hold_is_refused(ray_cluster: None) -> None:
    with pytest.raises(OptionError, match=r"asks for 64 threads, and no node of the cluster has more than 2"):
        list(spread(Cluster(threads=64), prepared, (".",), worked, ["a"]))
    with pytest.raises(OptionError, match=r"asks for 1,000,000,000,000,000 bytes of memory"):
        list(spread(Cluster(memory=10**15), prepared, (".",), worked, ["a"]))


def test_an_address_that_does_not_answer() -> None:
    """In a process of its own: this one may be connected already."""
    code = (
        "import time\nfrom bitloft.integrations.ray import Cluster, connected\n"
        "try:\n    with connected(Cluster(address='127.0.0.1:9')): pass\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("OptionError nothing answers at 127.0.0.1:9 (")
    assert "resume when it is there" in done.stdout
    assert time.monotonic() - began < 60  # Ray itself would wait two minutes


@pytest.mark.parametrize("address", ["ray://host:10001", "host", "host:99999", "a b:6379"])
def test_addresses(address: str) -> None:
    with pytest.raises(OptionError, match="neither auto nor HOST:PORT"):
        Cluster(address=address)


def test_bad_numbers_and_no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("workers", "threads", "memory", "attempts", "store"):
        with pytest.raises(OptionError, match=f"{name} of the cluster is 0; use 1 or more"):
            Cluster(**{name: 0})  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "ray", None)
    with (
        pytest.raises(OptionError, match=r"the engine ray needs Ray .*pip install 'bitloft\[ray\]'"),
        connected(Cluster()),
    ):
        pass


def test_no_dashboard_and_no_usage_statistics(ray_cluster: None) -> None:
    ray = library()
    assert not ray._private.worker.global_worker.node.webui_url
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
