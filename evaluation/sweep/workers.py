"""Who does the work: this process, the ranks of torchrun, or tasks on a Ray cluster. All run `labour` on one folder."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from evaluation.metrics.catalogue import make_metrics
from evaluation.metrics.protocol import Choices, Metric
from evaluation.sweep.make import Maker, Task, make_tasks
from evaluation.sweep.measure import measure_units
from evaluation.sweep.record import record_units
from evaluation.sweep.results import refuse_unknown_metrics
from evaluation.sweep.settings import Sweep, chosen_of
from evaluation.sweep.work import Claims, start_of, wait_for_others_with, work_off
from pipeline.render import is_finished
from utils.config import REPOSITORY, ConfigError
from utils.devices import choose_device

CLAIMS = ".claims"
RETRIES = 8  # of a Ray task whose worker or machine died


def prepare(
    sweep: Sweep, folder: Path, *, device: str, local_rank: int, random_weights: bool, only: Sequence[str] = (),
) -> tuple[list[Task], list[Metric]]:
    """The tasks that `only` needs, and the sweep's metrics, all checked.

    Raises: as `refuse_unknown_metrics`, `make_metrics` and `make_tasks` do.
    """
    chosen = choose_device(device, local_rank)
    metrics = make_metrics(sweep.metrics, Choices(str(chosen), vlm=sweep.vlm))
    refuse_unknown_metrics(sweep, folder, [metric.name for metric in metrics], only)
    tasks = make_tasks(sweep, folder, device=chosen, random_weights=random_weights, only=only)
    record_units(folder, [task for task in tasks if task.variant.name in sweep.record.methods], sweep.record)
    return tasks, metrics


def outstanding(
    sweep: Sweep, tasks: Sequence[Task], metrics: Sequence[Metric], folder: Path, only: Sequence[str] = (),
) -> str:
    """What `labour` would do, in a line."""
    wanted, seen = chosen_of(sweep, only)
    watched = [task for task in tasks if task.variant.name in seen]
    tasks = [task for task in tasks if task.variant.name in wanted]
    jobs = [(task, job) for task in tasks for job in task.jobs]
    make = sum(not is_finished(task.output, job) for task, job in jobs)
    measure = sum(not unit.is_done() for task in tasks for unit in measure_units(folder, task, metrics))
    record = sum(not unit.is_done() for unit in record_units(folder, watched, sweep.record))
    return f"of {len(jobs)} videos, {make} are to be made and {measure} to be measured; {record} to be recorded"


def labour(
    sweep: Sweep, tasks: Sequence[Task], metrics: Sequence[Metric], folder: Path, *, rank: int, world_size: int,
    only: Sequence[str] = (),
) -> dict[str, str]:
    """Make and measure what no other worker does, until all is done; returns what failed here and is not done, and why.

    Args:
        only: names that `chosen_of` knows; empty is all.
    """
    wanted, seen = chosen_of(sweep, only)
    watched = [task for task in tasks if task.variant.name in seen]
    tasks = [task for task in tasks if task.variant.name in wanted]
    claims, maker = Claims(folder / CLAIMS), Maker(sweep.batch_size)
    make = [unit for task in tasks for unit in maker.units(task)]
    measure = [unit for task in tasks for unit in measure_units(folder, task, metrics)]
    failed = work_off(make, claims, start=start_of(make, rank, world_size), meanwhile=measure)
    maker.release()
    record = record_units(folder, watched, sweep.record)
    failed |= work_off(record, claims, start=start_of(record, rank, world_size), meanwhile=measure)
    wait_for_others_with([unit for unit in make if unit.name in failed], claims)
    left = [unit for unit in measure if unit.name not in failed]
    failed |= work_off(left, claims, start=start_of(left, rank, world_size))
    tried = [unit for unit in (*make, *record, *measure) if unit.name in failed]
    wait_for_others_with(tried, claims)
    return {unit.name: failed[unit.name] for unit in tried if not unit.is_done()}


def labour_on_ray(
    sweep: Sweep, folder: Path, *, address: str, workers: int, device: str, random_weights: bool,
    only: Sequence[str] = (),
) -> dict[str, str]:
    """The same by `workers` tasks on the cluster at `address` (`local` starts one on this machine).

    A task whose process or machine dies is started again elsewhere. All machines must see the repository and
    `folder` at the same paths.
    Raises: ConfigError if Ray is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise ConfigError("--ray needs Ray. Get it with: pip install -e '.[cluster]'") from error
    paths = {"PYTHONPATH": str(REPOSITORY)}
    ray.init(
        address=None if address == "local" else address, runtime_env={"env_vars": paths}, include_dashboard=False,
        log_to_driver=True, num_cpus=workers if address == "local" else None,
    )
    resources = resources_of_task(device, ray.cluster_resources())
    task = ray.remote(max_retries=RETRIES, **resources)(_ray_task)
    try:
        waiting = [
            task.remote(sweep, str(folder.absolute()), device, random_weights, rank, workers, only)
            for rank in range(workers)
        ]
        first, *others = ray.get(waiting)  # each tries what is not done: what one of them lacks is done
        return {name: why for name, why in first.items() if all(name in failed for failed in others)}
    finally:
        ray.shutdown()


def resources_of_task(device: str, cluster: Mapping[str, float]) -> dict[str, int]:
    """What one task takes: a processor, and a GPU unless `device` is cpu, or auto where the cluster has none."""
    on_gpu = cluster.get("GPU", 0) >= 1 if device == "auto" else device != "cpu"
    return {"num_cpus": 1, "num_gpus": 1} if on_gpu else {"num_cpus": 1}


def _ray_task(
    sweep: Sweep, folder: str, device: str, random_weights: bool, rank: int, world_size: int, only: Sequence[str],
) -> dict[str, str]:
    path = Path(folder)
    tasks, metrics = prepare(sweep, path, device=device, local_rank=0, random_weights=random_weights, only=only)
    return labour(sweep, tasks, metrics, path, rank=rank, world_size=world_size, only=only)
