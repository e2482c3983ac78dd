"""Where the shards of a stage are worked on: this machine's processes, or a cluster through datatrove's executors.

An executor is a function of jobs that yields each shard's record as the shard ends. What is done and what is not is
decided by the records that the jobs leave beside their outputs (stage.py), never by the engine: datatrove's markers
know a task by its number alone, and so do not notice other inputs, settings or code; and where one of its tasks raises,
it ends the others. So our tasks never raise, and its markers are not asked.

`local` needs no engine, and survives a worker that the kernel kills (a process of `datatrove` that is killed is waited
for without end). `datatrove`, `ray` and `slurm` are datatrove's LocalPipelineExecutor, RayPipelineExecutor and
SlurmPipelineExecutor. Between machines nothing travels but files: the corpus folder must lie on a file system that all
of them share.
"""

import hashlib
import json
import logging
import multiprocessing
import multiprocessing.connection
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .stage import Executor, Job, Record, here, settings_of, work

KINDS = ("local", "datatrove", "ray", "slurm")

# A network file system may show a record this many seconds late.
GRACE = 60.0
_POLL = 1.0


@dataclass(frozen=True)
class Run:
    """The section [run]: where and how wide, never what. Nothing that is written depends on it."""

    executor: str = "local"
    workers: int = 1  # shards at a time
    memory_gb: int = 2  # reserved for a shard, on ray and slurm
    address: str = ""  # ray: of the cluster, "auto" for the one that this machine belongs to; "" starts one here
    partition: str = ""  # slurm
    time: str = "24:00:00"  # slurm: limit of a shard
    setup: str = ""  # slurm: shell lines before the work, such as `source /shared/venv/bin/activate`


def run_settings(values: Any, executor: str | None = None, workers: int | None = None) -> Run:
    """The section [run], with what the command line says instead. Raises ValueError for what cannot be run."""
    given = {"executor": executor, "workers": workers}
    if isinstance(values, Mapping):
        values = dict(values) | {key: value for key, value in given.items() if value is not None}
    run = settings_of(Run, "run", values)
    if run.workers < 1:
        raise ValueError(f"{run.workers} workers cannot build a corpus; give 1 or more")
    if run.executor not in KINDS:
        raise ValueError(f"unknown executor {run.executor!r}; known: {', '.join(KINDS)}")
    return run


@contextmanager
def running(run: Run) -> Iterator[Executor]:
    """The executor for all stages of one run. Raises ValueError when the engine is not there."""
    if run.executor == "local":
        if run.workers == 1:
            yield here
        else:
            with _Processes(run.workers) as processes:
                yield processes
        return
    try:
        import datatrove.executor as engines
        from loguru import logger
    except ModuleNotFoundError as missing:
        raise ValueError(
            f"the executor {run.executor} needs {missing.name}; pip install "
            '"deepseek-coder-torch[corpus]", or take --executor local'
        ) from None
    logger.disable("datatrove")  # the records say what there is to say
    if run.executor == "datatrove":
        yield _Datatrove(engines.LocalPipelineExecutor, {"workers": run.workers, "start_method": "spawn"})
    elif run.executor == "ray":
        with _ray(run):
            ours = {"workers": run.workers, "mem_per_cpu_gb": run.memory_gb}
            yield _Datatrove(engines.RayPipelineExecutor, ours)
    else:
        if shutil.which("sbatch") is None:
            raise ValueError("sbatch is not on this machine; run on a login node of Slurm, or take --executor local")
        yield _Datatrove(_waiting_slurm(engines.SlurmPipelineExecutor), slurm_options(run))


# ---- this machine's processes ----------------------------------------------------------------------------------------


class _Processes:
    """Processes for all stages, started when the first needs them.

    When the kernel kills a worker the whole pool is broken, and nobody knows over which shard. The few that were being
    worked on are then tried again, each alone in a new pool: the one that kills again has failed, and no other.
    """

    def __init__(self, workers: int):
        self.workers = workers
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "_Processes":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def __call__(self, jobs: list[Job]) -> Iterator[tuple[str, Record]]:
        if len(jobs) == 1:
            yield from here(jobs)
            return
        ahead, suspects = iter(jobs), []
        running: dict[Future[Record], Job] = {}
        more = True
        while more or running:
            while more and len(running) < self.workers:  # no more than work at once, so that few are suspects
                job = next(ahead, None)
                if job is None:
                    more = False
                else:
                    running[self._submit(job)] = job
            if not running:
                break
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                job = running.pop(future)
                try:
                    yield job.shard.name, future.result()
                except BrokenProcessPool:
                    self._pool = None
                    suspects.append(job)
        for job in suspects:
            try:
                yield job.shard.name, self._submit(job).result()
            except BrokenProcessPool:
                self._pool = None
                yield job.shard.name, {"failed": "its process was killed, perhaps for want of memory"}

    def _submit(self, job: Job) -> "Future[Record]":
        try:
            return self._started().submit(work, job)
        except BrokenProcessPool:  # broken since the last submission, before any of its futures was looked at
            self._pool = None
            return self._started().submit(work, job)

    def _started(self) -> ProcessPoolExecutor:
        if self._pool is None:
            context = multiprocessing.get_context("spawn")  # forking a process with threads (torch, pyarrow) can hang
            self._pool = ProcessPoolExecutor(self.workers, mp_context=context, initializer=_end_with_parent)
        return self._pool


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever, or go on writing beside the next run."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


# ---- datatrove's executors -------------------------------------------------------------------------------------------


class _Datatrove:
    """The jobs of a stage as the tasks of one of datatrove's pipelines, whose logs lie under OUT/logs/STAGE."""

    def __init__(self, engine: Any, options: dict[str, Any]):
        self.engine, self.options = engine, options

    def __call__(self, jobs: list[Job]) -> Iterator[tuple[str, Record]]:
        if not jobs:
            return
        logs = jobs[0].out / "logs" / jobs[0].stage
        shutil.rmtree(logs, ignore_errors=True)
        logs.mkdir(parents=True)
        (logs / "jobs").mkdir(mode=0o700)  # in a crawl's there may be logins
        for rank, job in enumerate(jobs):
            job.record.unlink(missing_ok=True)  # not today's: from here on a record means that its shard has ended
            (logs / "jobs" / f"{rank:05}.pickle").write_bytes(pickle.dumps(job))
        engine = self.engine(
            pipeline=[_Task(logs / "jobs")],
            tasks=len(jobs),
            logging_dir=str(logs),
            skip_completed=False,
            **self.options,
        )
        with ThreadPoolExecutor(1) as thread:
            yield from _records(jobs, thread.submit(engine.run))
        shutil.rmtree(logs / "jobs")


class _Task:
    """A step of a datatrove pipeline: rank number n does job number n. It reads no job but its own."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __repr__(self) -> str:
        return f"jobs in {self.folder}"

    def __setstate__(self, state: dict[str, Any]) -> None:
        from loguru import logger

        logger.disable("datatrove")  # in the worker's process too
        self.__dict__.update(state)

    def __call__(self, data: object, rank: int, world_size: int) -> None:
        job: Job = pickle.loads((self.folder / f"{rank:05}.pickle").read_bytes())
        if not job.record.exists():  # a task that was put back into the queue may be done already
            work(job)


def _records(jobs: list[Job], run: "Future[Any]") -> Iterator[tuple[str, Record]]:
    """Each shard's record as it appears on the disk, until all are there or nothing is to be expected any more."""
    waiting = {job.record.name: job for job in jobs}
    deadline = None
    while waiting:
        ended = bool(wait([run], timeout=_POLL).done)
        for name in sorted(waiting.keys() & set(os.listdir(jobs[0].record.parent))):
            job = waiting.pop(name)
            yield job.shard.name, json.loads(job.record.read_text())
        if ended:
            deadline = deadline or time.monotonic() + (GRACE if waiting else 0)
            if time.monotonic() >= deadline:
                break
            time.sleep(_POLL)
    error = run.exception() if run.done() else None
    said = f" ({type(error).__name__}: {error})" if error else ""
    for job in waiting.values():
        yield job.shard.name, {"failed": f"its task ended without a record{said}; see {jobs[0].out / 'logs'}"}


@contextmanager
def _ray(run: Run) -> Iterator[None]:
    try:
        import ray
    except ModuleNotFoundError:
        raise ValueError('ray is not installed; pip install "deepseek-coder-torch[corpus]"') from None
    options: dict[str, Any] = {"address": run.address} if run.address else {"num_cpus": run.workers}
    try:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR, **options)
    except (ConnectionError, OSError) as error:
        raise ValueError(f"no Ray cluster at {run.address or 'this machine'} ({error}); check [run] address") from None
    try:
        yield
    finally:
        ray.shutdown()


def slurm_options(run: Run) -> dict[str, Any]:
    """Arguments of SlurmPipelineExecutor; each shard is a task of a job array.

    The job's script always ends well, because what failed stands in the records; and sbatch waits for the job, because
    the next stage is planned from this one's records.
    """
    setup = run.setup or f"export PATH={os.path.dirname(sys.executable)}:$PATH"
    return {
        "time": run.time,
        "partition": run.partition,
        "workers": run.workers,
        "mem_per_cpu_gb": run.memory_gb,
        "qos": "",
        "env_command": f"trap 'exit 0' EXIT\n{setup}",
        "sbatch_args": {"wait": ""},
    }


def _waiting_slurm(engine: Any) -> Any:
    class Waiting(engine):
        def launch_job(self) -> None:
            """Submits the job and waits for it, after ending one that a killed run of this stage has left behind."""
            self.job_name = f"corpus-{hashlib.sha256(self.logging_dir.path.encode()).hexdigest()[:12]}"
            subprocess.run(["scancel", "--quiet", f"--name={self.job_name}"], check=False)
            try:
                super().launch_job()
            except subprocess.CalledProcessError as error:
                raise RuntimeError(f"sbatch ended with status {error.returncode}") from error

        def launch_merge_stats(self) -> None:
            """datatrove's statistics are not used; a job for them would only wait in the queue."""

    return Waiting
