"""Extraction on Dask workers, in several processes or on several machines that share the feature store.

A task computes some shards, stores them and returns a `TaskResult`; features are not sent back. If a worker is lost,
its unfinished shards are recomputed elsewhere; its stored shards are reused.
"""

from __future__ import annotations

import copy
import logging
import math
import pickle
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch.utils.data import Dataset

from itae_utils.environment import gpus_are_chosen
from itae_utils.errors import ItaeError
from itae_utils.extraction.job import Job, Work, compute, missing_work
from itae_utils.machine import available_cores
from itae_utils.models.backbones import Backbone
from itae_utils.store.store import Store, open_store
from itae_utils.store.variants import device_name

try:
    import cloudpickle
    import dask
    from distributed import CancelledError, Client, KilledWorker, LocalCluster, as_completed, get_worker
except ImportError:  # the optional dependency; `connect` and `local_cluster` report that it is missing
    Client = None

log = logging.getLogger("itae_utils")
TASK_SECONDS = 10     # of work per task: enough to make Dask's overhead negligible
TASKS_PER_WORKER = 2  # running or queued, so that no worker waits for the next one
ROUNDS = 5            # in a row in which all workers are lost, before giving up
CONNECT_SECONDS = 20
_unpickled: dict[str, Backbone] = {}
_one_at_a_time = threading.Lock()  # a worker may have several threads, but hooks on a model serve one pass


@dataclass(frozen=True)
class TaskResult:
    """The numbers of shards and images that a task computed, the seconds it took, and its worker's address."""

    shards: int
    images: int
    seconds: float
    worker: str


@dataclass(frozen=True)
class PickledBackbone:
    """A backbone as bytes: Dask copies objects from worker to worker, and a model in use has hooks."""

    key: str
    content: bytes = field(repr=False)

    @classmethod
    def of(cls, backbone: Backbone) -> PickledBackbone:
        """Pickle a backbone."""
        return cls(uuid.uuid4().hex, cloudpickle.dumps(backbone))

    def load(self) -> Backbone:
        """Return the backbone. A process unpickles it once, and holds only the latest one."""
        if self.key not in _unpickled:
            _unpickled.clear()
            _unpickled[self.key] = pickle.loads(self.content)
        return _unpickled[self.key]


@contextmanager
def connect(where: Client | str) -> Iterator[Client]:
    """Yield a client of a Dask cluster.

    Args:
        where: a client, the address of a scheduler, or "local:N" to start N processes on this machine.

    Raises:
        ItaeError: no scheduler answers, Dask is not installed, or N is not a number of processes.
    """
    _check_dask()
    if isinstance(where, Client):
        yield where
        return
    if not isinstance(where, str):
        raise ItaeError(f"client={where!r} is not a Dask cluster: pass a Client, an address or local:N")
    if where.startswith("local:"):
        with local_cluster(where) as cluster, Client(cluster) as client:
            yield client
        return
    try:
        client = Client(where, timeout=CONNECT_SECONDS)
    except (OSError, ValueError, TypeError) as error:
        raise ItaeError(f"no Dask scheduler answers at {where!r}: start one with `dask scheduler`, or use local:N"
                        ) from error
    with client:
        yield client


def _check_dask() -> None:
    if Client is None:
        raise ItaeError("Dask is not installed: pip install 'itae-utils[dask]'")


@contextmanager
def cluster_address(where: Client | str, store: str | Path | Store | None = "auto") -> Iterator[str]:
    """Yield the address of a cluster's scheduler, which other processes can pass as `client` to `extract_features`.

    `where` is as for `connect`; a cluster that is started for "local:N" ends with the context. `store` is the feature
    store of the extraction.

    Raises:
        ItaeError: as `connect`; or the workers can't reach the store.
    """
    _check_shared(open_store(store))
    with connect(where) as client:
        yield client.scheduler.address


def _check_shared(store: Store | None) -> None:
    if store is None or not store.is_shared:
        raise ItaeError("Dask workers share the feature store: name a folder that they all reach, or a URL, with "
                        "--store or ITAE_STORE")


@contextmanager
def local_cluster(where: str, threads: int | None = None) -> Iterator[LocalCluster]:
    """Start a cluster of N processes on this machine, where `where` is "local:N"; they take its GPUs in turn.

    Each process has a number of `threads`; None shares the cores among the processes.

    Raises:
        ItaeError: N is not a number of processes, or Dask is not installed.
    """
    _check_dask()
    count = where.removeprefix("local:")
    if not count.isdigit() or int(count) < 1:
        raise ItaeError(f"{where!r} is not a number of processes: write local:2")
    threads = threads or max(1, available_cores() // int(count))
    options = {
        "distributed.worker.daemon": False,  # workers may start processes that decode images
        "distributed.nanny.pre-spawn-environ": {},  # Dask's MALLOC_TRIM_THRESHOLD_ slows a model by half
    }
    with dask.config.set(options), LocalCluster(n_workers=int(count), threads_per_worker=threads, memory_limit=0,
                                                dashboard_address=None) as cluster:
        yield cluster


def on_workers(client: Client, backbone: Backbone) -> tuple[Backbone, str]:
    """Return the backbone as it will be on the workers, and the name of the device that they all have.

    Raises:
        ItaeError: there is no worker, the workers have different devices, or the backbone is compiled, which can't be
            pickled.
    """
    if backbone.compiled:
        raise ItaeError("a compiled backbone can't be sent to Dask workers: load it with compile=False")
    try:
        client.wait_for_workers(1, timeout=CONNECT_SECONDS)
    except TimeoutError as error:
        raise ItaeError(f"the Dask cluster at {client.scheduler.address} has no worker: start some") from error
    devices = client.run(_device_of)
    workers = {name: worker for worker, (_, name) in devices.items()}  # one of each kind
    if len(workers) > 1:
        kinds = ", ".join(f"{name} ({worker})" for name, worker in sorted(workers.items()))
        raise ItaeError(f"the Dask workers have different devices, {kinds}: use workers of one kind")
    kind, name = next(iter(devices.values()))
    model = backbone.model if backbone.device.type == "cpu" else copy.deepcopy(backbone.model).cpu()
    return replace(backbone, model=model, device=torch.device(kind)), name


def _device_of(dask_worker: object) -> tuple[str, str]:
    """Return the type and the name of the device that a worker computes on; Dask passes the worker."""
    device = _worker_device("cuda", dask_worker.name)
    return device.type, device_name(device)


def compute_on(client: Client, job: Job, work: Work, advance: Callable[[int], None] = lambda images: None
               ) -> list[TaskResult]:
    """Run `itae_utils.extraction.job.compute` on the workers of a cluster; each worker receives the model once.

    Raises:
        ItaeError: as `compute`; or the workers can't reach the store, or were all lost several times in a row.
    """
    store = next(iter(job.stored.values())).store
    _check_shared(store)
    job, left, results, lost = job.of(work), work, [], 0
    while left:
        done = len(results)
        try:
            for result in _round(client, job, left):
                results.append(result)
                advance(result.images)
            left = {}
        except (KilledWorker, CancelledError, OSError, TimeoutError) as error:
            lost = lost + 1 if len(results) == done else 0
            if lost == ROUNDS:
                raise ItaeError(f"the Dask workers were lost {lost} times in a row ({type(error).__name__}): see their "
                                "logs; they usually run out of memory") from error
            log.warning("The Dask workers were lost (%s): missing shards are computed again", type(error).__name__)
            client.wait_for_workers(1, timeout=10 * CONNECT_SECONDS)
            left = missing_work(job.stored)
    if missing := missing_work(job.stored):
        raise ItaeError(f"{len(missing)} shards that Dask workers stored are not in {store.place} on this machine: "
                        "name a folder on a file system that all machines share, or a URL")
    return results


def _round(client: Client, job: Job, work: Work) -> Iterator[TaskResult]:
    """Submit the work until it is done: one shard per task at first, then as many as take `TASK_SECONDS`."""
    sent = client.scatter([PickledBackbone.of(job.backbone), job.dataset], broadcast=True, hash=False)
    job = replace(job, backbone=None, dataset=None)  # each worker has received them
    waiting, per_task, running = list(work.items()), 1, as_completed()
    while waiting or running.count():
        workers = max(1, len(client.scheduler_info(n_workers=-1)["workers"]))
        # Short tasks at the end, so that all workers end together.
        per_task = min(per_task, math.ceil(len(waiting) / (TASKS_PER_WORKER * workers)) or 1)
        while waiting and running.count() < TASKS_PER_WORKER * workers:
            part, waiting = dict(waiting[:per_task]), waiting[per_task:]
            running.add(client.submit(_task, *sent, job.of(part), part, pure=False))
        result: TaskResult | ItaeError = next(running).result()
        if isinstance(result, ItaeError):
            raise result
        per_task = max(1, math.ceil(TASK_SECONDS * result.shards / result.seconds))
        yield result


def _task(pickled: PickledBackbone, dataset: Dataset, job: Job, work: Work) -> TaskResult | ItaeError:
    """Compute shards on a worker and store them, except those that another worker has stored since.

    Return an error instead of raising it, because Dask would print the traceback.
    """
    worker = get_worker()
    with _one_at_a_time:
        start, missing = time.perf_counter(), missing_work(job.stored)
        work = {shard: left for shard, names in work.items()
                if (left := [name for name in names if name in missing.get(shard, ())])}
        backbone = pickled.load()
        device = _worker_device(backbone.device.type, worker.name)
        expected, name = next(iter(job.stored.values())).entry["device"], device_name(device)
        if name != expected:  # the worker joined the cluster later
            return ItaeError(f"the Dask workers have different devices, {expected} and {name} ({worker.address}): use "
                             "workers of one kind")
        if device.type == "cpu":
            torch.set_num_threads(max(1, worker.state.nthreads))
        try:
            backbone = replace(backbone, device=device, model=backbone.model.to(device))  # only the first task moves it
            if work:
                compute(replace(job, backbone=backbone, dataset=dataset), work)
        except ItaeError as error:
            return error
        return TaskResult(len(work), job.images(work), time.perf_counter() - start, worker.address)


def _worker_device(kind: str, name: object) -> torch.device:
    """Return a worker's device: its number chooses the GPU, unless CUDA_VISIBLE_DEVICES does."""
    if kind != "cuda" or not torch.cuda.is_available():
        return torch.device("cpu")
    numbered = isinstance(name, int) and not gpus_are_chosen()
    return torch.device("cuda", name % torch.cuda.device_count() if numbered else 0)
