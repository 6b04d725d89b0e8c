"""Extraction by Dask, on several processes or machines: shards are the tasks, and all meet in the feature store.

A task computes some shards, writes them and returns a receipt; no feature travels. What a lost worker was at is done
again elsewhere, and what it had stored is not.
"""

from __future__ import annotations

import copy
import logging
import math
import os
import pickle
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from distributed import Client, LocalCluster
from torch.utils.data import Dataset

from itae_utils.errors import ItaeError
from itae_utils.extraction.job import Job, Work, compute, missing_work
from itae_utils.models.backbones import Backbone
from itae_utils.store.store import open_store
from itae_utils.store.variants import InStore

log = logging.getLogger("itae_utils")
TASK_SECONDS = 10  # work worth a task: then what Dask adds to it doesn't count
TASKS_A_WORKER = 2  # under way or waiting, so that none runs dry
ROUNDS = 5  # that in a row lose all their workers, after which it is given up
CONNECT_SECONDS = 20
_opened: dict[str, Backbone] = {}
_one_at_a_time = threading.Lock()  # a worker may have several threads; a model with hooks serves one


@dataclass(frozen=True)
class Receipt:
    """What a task did: how many shards and images, in how many seconds, and where."""

    shards: int
    images: int
    seconds: float
    worker: str


@dataclass(frozen=True)
class Parcel:
    """A backbone as bytes: Dask copies what was sent from worker to worker, and a model at work has hooks on it."""

    name: str
    content: bytes = field(repr=False)

    @classmethod
    def of(cls, backbone: Backbone) -> Parcel:
        """Pack it."""
        import cloudpickle

        return cls(uuid.uuid4().hex, cloudpickle.dumps(backbone))

    def opened(self) -> Backbone:
        """The backbone, unpacked once a process, where only the latest is kept."""
        if self.name not in _opened:
            _opened.clear()
            _opened[self.name] = pickle.loads(self.content)
        return _opened[self.name]


@contextmanager
def connect(where: Client | str) -> Iterator[Client]:
    """A client of a cluster: one that is given, one at an address, or of a cluster of `local:N` processes made for it.

    Raises:
        ItaeError: nothing answers there, Dask isn't installed, or N is no number of processes.
    """
    try:
        import distributed
    except ImportError as error:
        raise ItaeError("Dask is not installed: pip install 'itae-utils[dask]'") from error

    if isinstance(where, distributed.Client):
        yield where
        return
    if where.startswith("local:"):
        with local_cluster(where) as cluster, distributed.Client(cluster) as client:
            yield client
        return
    try:
        client = distributed.Client(where, timeout=CONNECT_SECONDS)
    except (OSError, ValueError, TypeError) as error:
        raise ItaeError(f"no Dask scheduler answers at {where!r}: start one with `dask scheduler`, or use local:N"
                        ) from error
    with client:
        yield client


@contextmanager
def in_environment(where: str) -> Iterator[None]:
    """While open, ITAE_DASK names the cluster at `where` to this process and those it starts, such as notebooks.

    Raises:
        ItaeError: as `connect`; and there is no store that workers reach.
    """
    store = open_store()
    if store is None or store.place.startswith("memory:"):
        raise _no_common_store()
    with connect(where) as client:
        before = os.environ.get("ITAE_DASK")
        os.environ["ITAE_DASK"] = client.scheduler.address
        try:
            yield
        finally:
            del os.environ["ITAE_DASK"]
            if before is not None:
                os.environ["ITAE_DASK"] = before


@contextmanager
def local_cluster(where: str, threads: int | None = None) -> Iterator[LocalCluster]:
    """A cluster of N processes on this machine for "local:N", which share its GPUs in turn, and its cores.

    Args:
        where: "local:N".
        threads: of each process; None shares the cores.

    Raises:
        ItaeError: N is no number of processes, or Dask isn't installed.
    """
    count = where.removeprefix("local:")
    if not count.isdigit() or int(count) < 1:
        raise ItaeError(f"{where!r} names no number of processes: write local:2")
    try:
        import dask
        from distributed import LocalCluster
    except ImportError as error:
        raise ItaeError("Dask is not installed: pip install 'itae-utils[dask]'") from error

    threads = threads or max(1, (os.cpu_count() or 1) // int(count))
    options = {
        "distributed.worker.daemon": False,  # workers may have processes that decode images
        "distributed.nanny.pre-spawn-environ": {},  # MALLOC_TRIM_THRESHOLD_ makes a model half as slow again
    }
    with dask.config.set(options), LocalCluster(n_workers=int(count), threads_per_worker=threads, memory_limit=0,
                                                dashboard_address=None) as cluster:
        yield cluster


def on_workers(client: Client, backbone: Backbone) -> Backbone:
    """The backbone as it will be on the workers: on the type of device that they have.

    Raises:
        ItaeError: there is no worker, or only some have a GPU; a compiled backbone, which can't travel.
    """
    if backbone.compiled:
        raise ItaeError("a compiled backbone can't be sent to Dask workers: load it with compile=False")
    try:
        client.wait_for_workers(1, timeout=CONNECT_SECONDS)
    except TimeoutError as error:
        raise ItaeError(f"the Dask cluster at {client.scheduler.address} has no worker: start some") from error
    found = client.run(_device_type)
    if len(set(found.values())) > 1:
        without = next(worker for worker, kind in found.items() if kind == "cpu")
        raise ItaeError(f"some Dask workers have a GPU and {without} has none: use workers of one kind")
    model = backbone.model if backbone.device.type == "cpu" else copy.deepcopy(backbone.model).cpu()
    return replace(backbone, model=model, device=torch.device(next(iter(found.values()))))


def _device_type() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def compute_on(client: Client, job: Job, work: Work, advance: Callable[[int], None] = lambda images: None
               ) -> list[Receipt]:
    """`itae_utils.extraction.compute` on the workers of a cluster; every worker gets the model once.

    Raises:
        ItaeError: features are kept in memory, where no worker reaches them; all workers were lost again and again; and
            whatever `compute` raises.
    """
    from distributed import CancelledError, KilledWorker

    if not all(isinstance(variant, InStore) and not variant.store.place.startswith("memory:")
               for variant in job.kept.values()):
        raise _no_common_store()
    job, left, receipts, lost = job.of(work), work, [], 0
    while left:
        done = len(receipts)
        try:
            for receipt in _round(client, job, left):
                receipts.append(receipt)
                advance(receipt.images)
            left = {}
        except (KilledWorker, CancelledError, OSError, TimeoutError) as error:
            lost = lost + 1 if len(receipts) == done else 0
            if lost == ROUNDS:
                raise ItaeError(f"the Dask workers were lost {lost} times in a row ({type(error).__name__}): see their "
                                "logs; out of memory is the usual reason") from error
            log.warning("Dask lost its workers (%s): what is missing is tried again", type(error).__name__)
            client.wait_for_workers(1, timeout=10 * CONNECT_SECONDS)
            left = missing_work(job.kept)
    if astray := missing_work(job.kept):
        place = next(iter(job.kept.values())).store.place
        raise ItaeError(f"Dask workers stored {len(astray)} shards that are not in {place} as seen from here: name a "
                        "folder on a file system that all machines share, or a URL")
    return receipts


def _no_common_store() -> ItaeError:
    return ItaeError("Dask workers meet in the feature store: name a folder they all reach, or a URL, with --store or "
                     "ITAE_STORE")


def _round(client: Client, job: Job, work: Work) -> Iterator[Receipt]:
    """Hand out the work until it is done: first a shard a task, then as many as make `TASK_SECONDS`."""
    from distributed import as_completed

    sent = client.scatter([Parcel.of(job.backbone), job.dataset], broadcast=True, hash=False)
    job = replace(job, backbone=None, dataset=None)  # which are there then
    waiting, a_task, under_way = list(work.items()), 1, as_completed()
    while waiting or under_way.count():
        workers = max(1, len(client.scheduler_info(n_workers=-1)["workers"]))
        a_task = min(a_task, math.ceil(len(waiting) / (TASKS_A_WORKER * workers)) or 1)  # the last ones end together
        while waiting and under_way.count() < TASKS_A_WORKER * workers:
            part, waiting = dict(waiting[:a_task]), waiting[a_task:]
            under_way.add(client.submit(_task, *sent, job.of(part), part, pure=False))
        receipt: Receipt | ItaeError = next(under_way).result()
        if isinstance(receipt, ItaeError):
            raise receipt
        a_task = max(1, math.ceil(TASK_SECONDS * receipt.shards / receipt.seconds))
        yield receipt


def _task(parcel: Parcel, dataset: Dataset, job: Job, work: Work) -> Receipt | ItaeError:
    """On a worker: compute some shards and store them; those that another worker stored meanwhile are left out.

    An error is returned: raised, Dask would print its traceback.
    """
    from distributed import get_worker

    worker = get_worker()
    with _one_at_a_time:
        start, missing = time.perf_counter(), missing_work(job.kept)
        work = {shard: left for shard, names in work.items()
                if (left := [name for name in names if name in missing.get(shard, ())])}
        backbone = parcel.opened()
        device = _worker_device(backbone.device.type, worker.name)
        if device.type == "cpu":
            torch.set_num_threads(max(1, worker.state.nthreads))
        backbone = replace(backbone, device=device, model=backbone.model.to(device))  # moved at the first task only
        try:
            if work:
                compute(replace(job, backbone=backbone, dataset=dataset), work)
        except ItaeError as error:
            return error
        return Receipt(len(work), job.images(work), time.perf_counter() - start, worker.address)


def _worker_device(kind: str, name: object) -> torch.device:
    """A worker's own: its number picks the GPU, unless whoever started it has picked one by CUDA_VISIBLE_DEVICES."""
    if kind != "cuda":
        return torch.device(kind)
    numbered = isinstance(name, int) and "CUDA_VISIBLE_DEVICES" not in os.environ
    return torch.device("cuda", name % torch.cuda.device_count() if numbered else 0)
