"""Extraction on Dask workers gives the bytes of a run without them, and computes each shard once, whoever dies."""

import dataclasses
import os
import pickle
import signal
import subprocess
import sys

import distributed
import numpy as np
import pytest
import torch
from click.testing import CliRunner

from itae_utils.cli import main
from itae_utils.errors import ItaeError
from itae_utils.extraction import job, workers
from itae_utils.extraction.features import extract_features
from itae_utils.extraction.job import Job, missing_work
from itae_utils.method.setting import ITAE
from itae_utils.store.store import open_store
from itae_utils.store.variants import StoredVariant
from tests import faulty
from tests.faulty import BATCH, VARIANTS

pytestmark = pytest.mark.slow
COUNT = 60


@pytest.fixture(autouse=True)
def _as_the_workers(monkeypatch):
    """Use small shards and one thread, as each worker does: the number of threads can change the last bits."""
    monkeypatch.setattr(job, "SHARD_IMAGES", faulty.SHARD)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def cluster():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "available_cores", lambda: 2)
        with workers.local_cluster("local:2") as made:
            yield made


@pytest.fixture
def client(cluster):
    with distributed.Client(cluster) as made:
        yield made


@pytest.fixture
def tasks(monkeypatch):
    """Return the results of all tasks."""
    found, compute_on = [], workers.compute_on
    monkeypatch.setattr(workers, "compute_on", lambda *args, **options: found.extend(compute_on(*args, **options)))
    return found


def extract(store, client=None, variants=VARIANTS, count=COUNT, backbone=None):
    return extract_features(backbone or faulty.backbone(), faulty.dataset(count), variants, batch_size=BATCH,
                            store=store, client=client)


def prepared(folder, count: int, name: str = "it", device: str = "cpu") -> StoredVariant:
    entry = {"size": count, "dim": 24, "shard_size": 4, "device": device}
    variant = StoredVariant(open_store(folder), entry, {"name": name})
    variant.prepare()
    return variant


def test_the_same_bytes_and_every_image_once(client, tmp_path, tasks):
    alone, together = extract(None), extract(tmp_path, client)
    for name in VARIANTS:
        assert np.array_equal(alone[name], together[name])
        assert np.array_equal(alone.artifact_counts[name], together.artifact_counts[name])
    assert sum(task.images for task in tasks) == COUNT
    assert sum(task.shards for task in tasks) == COUNT // faulty.SHARD
    assert len({task.worker for task in tasks}) == 2
    assert set(together.computed.values()) == {COUNT}


def test_the_command(tmp_path, tasks):
    def run(store: object):
        return CliRunner().invoke(main, ["extract", "--limit", "20", "--dask", "local:1", "--store", str(store),
                                         "--output", str(tmp_path / "features.npz")])

    done = run(tmp_path / "store")
    assert done.exit_code == 0, done.output
    assert len(np.load(tmp_path / "features.npz")["itae"]) == sum(task.images for task in tasks) == 20
    refused = run("none")
    assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)
    assert "--store" in refused.stderr


def test_stored_features_are_not_computed_again(client, tmp_path, tasks):
    extract(tmp_path)
    assert set(extract(tmp_path, client).computed.values()) == {0}
    grown = extract(tmp_path, client, VARIANTS | {"more": ITAE("query", 9.0)})
    assert (grown.computed["itae"], grown.computed["more"]) == (0, COUNT)
    assert sum(task.images for task in tasks) == COUNT
    assert np.array_equal(grown["more"], extract(None, variants={"more": ITAE("query", 9.0)})["more"])


def test_an_address_and_the_environment_name_a_cluster(cluster, tmp_path, tasks, monkeypatch):
    extract(tmp_path / "a", cluster.scheduler_address, count=8)
    monkeypatch.setenv("ITAE_DASK", cluster.scheduler_address)
    extract_features(faulty.backbone(), faulty.dataset(8), VARIANTS, batch_size=BATCH, store=tmp_path / "b")
    assert [task.images for task in tasks] == [4, 4, 4, 4]


@pytest.mark.parametrize("where", ["local:1", "address", "client"])
def test_the_address_of_a_cluster(where, client, cluster, tmp_path):
    """Another process can connect to the address while the context is open."""
    given = {"local:1": where, "address": cluster.scheduler_address, "client": client}[where]
    with workers.cluster_address(given, tmp_path) as address, distributed.Client(address) as other:
        assert (address == cluster.scheduler_address) == (where != "local:1")
        assert other.submit(sum, [1, 2]).result() == 3
    assert client.submit(sum, [1, 2]).result() == 3


@pytest.mark.parametrize("store", [None, "none", "memory://x"])
def test_workers_need_a_store_that_they_reach(store, client):
    with pytest.raises(ItaeError, match="--store"):
        extract(store, client, count=8)
    with pytest.raises(ItaeError, match="--store"), workers.cluster_address(client, store):
        pass


@pytest.mark.parametrize("victims", [[1], [1, 1], [2]])
def test_the_shards_of_workers_that_die_are_computed_again(client, tmp_path, victims):
    """Another worker computes them, or the one that replaces it; stored shards are reused."""
    left = list(victims)
    client.wait_for_workers(2)

    def kill(images: int) -> None:
        if left and images:
            for pid in sorted(client.run(os.getpid).values())[:left.pop()]:
                os.kill(pid, signal.SIGKILL)

    variants = {name: prepared(tmp_path, 200, name) for name in VARIANTS}
    job = Job(faulty.backbone(), faulty.dataset(200), variants, VARIANTS, BATCH)
    done = workers.compute_on(client, job, missing_work(variants), kill)
    assert not left
    assert missing_work(variants) == {}
    alone = extract(None, count=200)
    for name in VARIANTS:
        assert np.array_equal(variants[name].features(), alone[name])
    assert sum(task.images for task in done) <= 200


def test_an_error_on_a_worker_is_the_same_line_and_no_traceback(client, tmp_path, capfd):
    backbone = faulty.backbone()
    backbone.model.norm.weight[0] = float("nan")
    with pytest.raises(ItaeError, match=r"'baseline'.* images \d+ to \d+"):
        extract(tmp_path, client, {"baseline": None}, backbone=backbone)
    assert "Traceback" not in capfd.readouterr().err


def test_a_folder_that_is_another_one_on_the_workers(client, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "missing_work", lambda stored: {0: list(stored)})
    with pytest.raises(ItaeError, match=str(tmp_path)):
        extract(tmp_path, client, count=8)


def test_invalid_clusters(client, tmp_path, monkeypatch):
    with pytest.raises(ItaeError, match="compile=False"):
        extract(tmp_path, client, backbone=dataclasses.replace(faulty.backbone(), compiled=True))
    monkeypatch.setattr(workers, "CONNECT_SECONDS", 1)
    for where in ("tcp://127.0.0.1:9", "nonsense", "tcp://", "local:0", "local:", "local:x", "local:-1"):
        with pytest.raises(ItaeError, match=f"'{where}'"):
            extract(tmp_path, where)
    with pytest.raises(ItaeError, match="client=4"):
        extract(tmp_path, 4)


def test_a_cluster_without_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "CONNECT_SECONDS", 1)
    with (distributed.LocalCluster(n_workers=0, dashboard_address=None, processes=False) as empty,
          distributed.Client(empty) as client,
          pytest.raises(ItaeError, match=empty.scheduler_address)):
        extract(tmp_path, client)


@pytest.mark.parametrize("other", [("cpu", "cpu"), ("cuda", "NVIDIA H100")])
def test_workers_with_different_devices_are_refused(client, monkeypatch, other):
    found = {"tcp://a": ("cuda", "NVIDIA A100"), "tcp://b": ("cuda", "NVIDIA A100")}
    monkeypatch.setattr(client, "run", lambda _: found)
    backbone, name = workers.on_workers(client, faulty.backbone())
    assert (backbone.device.type, name) == ("cuda", "NVIDIA A100")
    found["tcp://b"] = other
    with pytest.raises(ItaeError, match=r"NVIDIA A100 \(tcp://a\)") as caught:
        workers.on_workers(client, faulty.backbone())
    assert f"{other[1]} (tcp://b)" in str(caught.value)


def test_a_worker_with_another_device_that_joins_later_is_refused(client, tmp_path):
    """Its features would mix with those of the device that the entry was made for."""
    variant = prepared(tmp_path, 8, device="NVIDIA H100")
    job = Job(faulty.backbone(), faulty.dataset(8), {"it": variant}, {"it": None}, BATCH)
    with pytest.raises(ItaeError, match=r"NVIDIA H100 and cpu"):
        workers.compute_on(client, job, missing_work(job.stored))
    assert variant.missing() == [0, 1]


def test_a_worker_s_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert str(workers._worker_device("cuda", 1)) == "cpu", "a worker that joined later and has no GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [workers._worker_device("cuda", name).index for name in (0, 1, 4, "a")] == [0, 1, 1, 0]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,0,1")
    assert str(workers._worker_device("cuda", 1)) == "cuda:0"
    assert str(workers._worker_device("cpu", 1)) == "cpu"


def test_a_model_with_hooks_can_be_sent_on():
    """A worker may send the backbone to another one while its model has hooks."""
    pickled = workers.PickledBackbone.of(faulty.backbone())
    pickled.load().model.blocks[2].register_forward_pre_hook(lambda *_: 1 / 0)
    received = pickle.loads(pickle.dumps(pickled))
    assert received.load() is pickled.load()
    workers._unpickled.clear()
    assert not received.load().model.blocks[2]._forward_pre_hooks


def test_dask_is_optional(tmp_path):
    """Without it everything else works, and a cluster is refused with the package to install."""
    code = """
import sys
sys.modules["distributed"] = sys.modules["dask"] = None
from itae_utils.errors import ItaeError
from itae_utils.extraction import workers
from tests import faulty
print(len(faulty.extract(8, None)["baseline"]))
for cluster in (workers.connect("local:1"), workers.local_cluster("local:1"), workers.cluster_address("local:1")):
    try:
        cluster.__enter__()
    except ItaeError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env=os.environ | {"ITAE_STORE": str(tmp_path)})
    count, *refusals = done.stdout.splitlines()
    assert count == "8"
    assert [("itae-utils[dask]" in refusal) for refusal in refusals] == [True] * 3
