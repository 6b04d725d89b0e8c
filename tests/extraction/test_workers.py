"""Extraction on Dask workers: the bytes of a run without them, each shard once, whoever dies."""

import dataclasses
import os
import signal
from collections import Counter

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from itae_utils.cli import main
from itae_utils.data.datasets import ImageDataset
from itae_utils.errors import ItaeError
from itae_utils.extraction import job
from itae_utils.extraction import workers as ours
from itae_utils.extraction.features import extract_features
from itae_utils.extraction.job import Job, missing_work
from itae_utils.method.setting import ITAE
from itae_utils.store.store import open_store
from itae_utils.store.variants import InMemory, InStore
from tests import faulty
from tests.faulty import BATCH, VARIANTS

pytestmark = pytest.mark.slow
COUNT = 60


@pytest.fixture(autouse=True)
def _as_the_workers(monkeypatch):
    """Small shards, and one thread, as each of the workers has: their number can change the last bits."""
    monkeypatch.setattr(job, "SHARD_IMAGES", faulty.SHARD)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def cluster():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ours.os, "cpu_count", lambda: 2)
        with ours.local_cluster("local:2") as made:
            yield made


@pytest.fixture
def client(cluster):
    import distributed

    with distributed.Client(cluster) as made:
        yield made


@pytest.fixture
def receipts(monkeypatch):
    """What the workers did."""
    found, compute_on = [], ours.compute_on
    monkeypatch.setattr(ours, "compute_on", lambda *args, **options: found.extend(compute_on(*args, **options)))
    return found


def extract(store, client=None, variants=VARIANTS, count=COUNT, backbone=None):
    return extract_features(backbone or faulty.backbone(), faulty.dataset(count), variants, batch_size=BATCH,
                            store=store, client=client)


def test_the_same_bytes_and_every_image_once(client, tmp_path, receipts):
    alone, together = extract(None), extract(tmp_path, client)
    for name in VARIANTS:
        assert np.array_equal(alone[name], together[name])
        assert np.array_equal(alone.artifact_counts[name], together.artifact_counts[name])
    assert sum(receipt.images for receipt in receipts) == COUNT
    assert sum(receipt.shards for receipt in receipts) == COUNT // faulty.SHARD
    assert len({receipt.worker for receipt in receipts}) == 2
    assert set(together.computed.values()) == {COUNT}


def test_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("ITAE_STORE", str(tmp_path))  # and set back, for --store sets it
    monkeypatch.setattr(ours.os, "cpu_count", lambda: 2)  # a thread each
    done = {}
    for name, more in {"alone": [], "together": ["--dask", "local:2"]}.items():
        output, store = tmp_path / f"{name}.npz", tmp_path / name
        done[name] = CliRunner().invoke(main, ["extract", "--limit", "50", "--batch-size", "4", "--output", str(output),
                                               "--store", str(store), *more])
        assert done[name].exit_code == 0, done[name].output
    alone, together = (np.load(tmp_path / f"{name}.npz") for name in done)
    assert all(np.array_equal(alone[name], together[name]) for name in ("baseline", "itae"))
    assert "ITAE_DASK" not in os.environ
    refused = CliRunner().invoke(main, ["report", "--dask", "local:1", "--store", "none"])
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert refused.stderr.startswith("Error: Dask workers meet in the feature store")


def test_what_is_stored_is_not_sent_out(client, tmp_path, receipts):
    extract(tmp_path)
    assert set(extract(tmp_path, client).computed.values()) == {0}
    grown = extract(tmp_path, client, VARIANTS | {"more": ITAE("query", 9.0)})
    assert (grown.computed["itae"], grown.computed["more"]) == (0, COUNT)
    assert sum(receipt.images for receipt in receipts) == COUNT
    assert np.array_equal(grown["more"], extract(None, variants={"more": ITAE("query", 9.0)})["more"])


def test_an_address_and_the_environment_name_a_cluster(cluster, tmp_path, receipts, monkeypatch):
    extract(tmp_path / "a", cluster.scheduler_address, count=8)
    monkeypatch.setenv("ITAE_DASK", cluster.scheduler_address)
    extract_features(faulty.backbone(), faulty.dataset(8), VARIANTS, batch_size=BATCH, store=tmp_path / "b")
    assert [receipt.images for receipt in receipts] == [4, 4, 4, 4]


def test_processes_that_are_started_learn_of_the_cluster(cluster, tmp_path, monkeypatch):
    with pytest.raises(ItaeError, match="meet in the feature store"), ours.in_environment(cluster.scheduler_address):
        pass
    monkeypatch.setenv("ITAE_STORE", str(tmp_path))
    monkeypatch.delenv("ITAE_DASK", raising=False)
    with ours.in_environment(cluster.scheduler_address):
        assert os.environ["ITAE_DASK"] == cluster.scheduler_address
    assert "ITAE_DASK" not in os.environ
    monkeypatch.setenv("ITAE_DASK", "tcp://other")
    with ours.in_environment("local:1"):
        assert os.environ["ITAE_DASK"].startswith("tcp://127.0.0.1")
    assert os.environ["ITAE_DASK"] == "tcp://other"


@pytest.mark.parametrize("times", [1, 2])
def test_a_worker_that_dies_is_made_up_for(client, tmp_path, times):
    """Its shards are done again elsewhere, or by the one that takes its place; what it had stored is not."""
    killed = []

    def kill_one(images: int) -> None:
        if len(killed) < times and images:
            workers = client.run(os.getpid)
            killed.append(sorted(workers.values())[0])
            os.kill(killed[-1], signal.SIGKILL)

    variants = {name: InStore(open_store(tmp_path), {"size": 200, "dim": 24, "shard_size": 4}, {"name": name})
                for name in VARIANTS}
    for variant in variants.values():
        variant.prepare()
    dataset = faulty.dataset(200)
    job = Job(faulty.backbone(), dataset, variants, VARIANTS, BATCH)
    done = ours.compute_on(client, job, missing_work(variants), kill_one)
    assert len(killed) == times
    assert missing_work(variants) == {}
    alone = extract(None, count=200)
    for name in VARIANTS:
        assert np.array_equal(variants[name].features(), alone[name])
    assert sum(receipt.images for receipt in done) <= 200


def test_all_workers_die_at_once(client, tmp_path):
    calls = Counter()

    def kill_all(images: int) -> None:
        calls["receipts"] += 1
        if calls["receipts"] == 2:
            for pid in client.run(os.getpid).values():
                os.kill(pid, signal.SIGKILL)

    variant = InStore(open_store(tmp_path), {"size": 120, "dim": 24, "shard_size": 4}, {})
    variant.prepare()
    job = Job(faulty.backbone(), faulty.dataset(120), {"it": variant}, {"it": None}, BATCH)
    ours.compute_on(client, job, missing_work(job.kept), kill_all)
    assert np.array_equal(variant.features(), extract(None, variants={"it": None}, count=120)["it"])


def test_an_error_on_a_worker_is_the_same_line_and_no_traceback(client, tmp_path, capfd):
    backbone = faulty.backbone()
    backbone.model.norm.weight[0] = float("nan")
    with pytest.raises(ItaeError, match=r"'baseline' are not finite in the batch of images \d+ to"):
        extract(tmp_path, client, {"baseline": None}, backbone=backbone)
    assert "Traceback" not in capfd.readouterr().err


def test_a_folder_that_the_workers_see_elsewhere_is_told(client, tmp_path, monkeypatch):
    monkeypatch.setattr(ours, "missing_work", lambda kept: {0: list(kept)})
    with pytest.raises(ItaeError, match=r"are not in .* as seen from here: name a folder on a file system"):
        extract(tmp_path, client, count=8)


def test_what_can_t_be_sent_or_reached_is_told(client, tmp_path, monkeypatch):
    for store in (None, "none", f"memory://{tmp_path.name}"):
        with pytest.raises(ItaeError, match="Dask workers meet in the feature store: name a folder"):
            extract(store, client, count=8)
    with pytest.raises(ItaeError, match="compile=False"):
        extract(tmp_path, client, backbone=dataclasses.replace(faulty.backbone(), compiled=True))
    monkeypatch.setattr(ours, "CONNECT_SECONDS", 1)
    for where in ("tcp://127.0.0.1:9", "nonsense", "tcp://"):
        with pytest.raises(ItaeError, match=f"no Dask scheduler answers at '{where}'"):
            extract(tmp_path, where)
    for where in ("local:0", "local:", "local:x", "local:-1"):
        with pytest.raises(ItaeError, match=f"'{where}' names no number of processes: write local:2"):
            extract(tmp_path, where)


def test_a_cluster_without_workers_is_told(tmp_path, monkeypatch):
    import distributed

    monkeypatch.setattr(ours, "CONNECT_SECONDS", 1)
    with (distributed.LocalCluster(n_workers=0, dashboard_address=None, processes=False) as empty,
          distributed.Client(empty) as client,
          pytest.raises(ItaeError, match="has no worker: start some")):
        extract(tmp_path, client)


def test_workers_of_two_kinds_are_told(client, monkeypatch):
    monkeypatch.setattr(client, "run", lambda _: {"tcp://a": "cuda", "tcp://b": "cpu"})
    with pytest.raises(ItaeError, match="some Dask workers have a GPU and tcp://b has none"):
        ours.on_workers(client, faulty.backbone())
    monkeypatch.setattr(client, "run", lambda _: {"tcp://a": "cuda", "tcp://b": "cuda"})
    assert ours.on_workers(client, faulty.backbone()).device.type == "cuda"


def test_a_worker_s_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [ours._worker_device("cuda", name).index for name in (0, 1, 4, "a")] == [0, 1, 1, 0]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,0,1")
    assert str(ours._worker_device("cuda", 1)) == "cuda:0"
    assert str(ours._worker_device("cpu", 1)) == "cpu"


def test_a_model_at_work_can_be_sent_on():
    """Workers copy what they were sent from each other, while hooks are on the model."""
    parcel = ours.Parcel.of(faulty.backbone())
    model = parcel.opened().model
    handle = model.blocks[2].register_forward_pre_hook(lambda *_: 1 / 0)
    ours._opened.clear()
    assert not parcel.opened().model.blocks[2]._forward_pre_hooks
    assert parcel.opened() is parcel.opened()
    handle.remove()


def test_features_in_memory_can_t_be_computed_elsewhere(client):
    kept = {"it": InMemory(8, 24, 4)}
    with pytest.raises(ItaeError, match="meet in the feature store"):
        ours.compute_on(client, Job(faulty.backbone(), faulty.dataset(8), kept, {"it": None}, BATCH), {0: ["it"]})
    assert isinstance(faulty.dataset(8), ImageDataset)
