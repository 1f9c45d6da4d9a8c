"""RayExecutor keeps the promises of an executor, whatever becomes of Ray's workers."""

from __future__ import annotations

import time
from concurrent.futures import CancelledError

import pytest
from rays import MISSING, die, die_once, fail, linger, local_ray, resources

pytest.importorskip("ray", reason=MISSING)

from dualhook.integrations.ray import RayExecutor
from ray.exceptions import WorkerCrashedError

from dualhook.errors import StoreError


@pytest.fixture(scope="module", autouse=True)
def ray():
    with local_ray(1):
        yield


def test_calls_come_back_in_their_order():
    with RayExecutor() as workers:
        assert list(workers.map(pow, range(5), [2] * 5)) == [0, 1, 4, 9, 16]
        assert workers.submit(dict, fn=1, args=2).result() == {"fn": 1, "args": 2}


def test_an_error_of_the_call_is_raised_as_it_is():
    with RayExecutor() as workers:
        error = workers.submit(fail, StoreError("0000.safetensors is gone")).exception()
    assert type(error) is StoreError
    assert str(error) == "0000.safetensors is gone"
    assert "in fail" in str(error.__cause__)  # where that was


def test_what_cannot_travel_is_an_error_of_its_future():
    with RayExecutor() as workers:
        travels, stays = workers.submit(abs, -1), workers.submit(abs, (n for n in ()))
        assert travels.result() == 1
        with pytest.raises(TypeError, match="generator"):
            stays.result()


def test_a_lost_workers_call_is_done_by_another(tmp_path):
    with RayExecutor() as workers:
        assert workers.submit(die_once, tmp_path / "seen").result() == "done"


def test_a_call_that_no_worker_survives_says_so():
    with RayExecutor(max_retries=0) as workers:
        lost, kept = workers.submit(die), workers.submit(abs, -1)
        assert isinstance(lost.exception(), WorkerCrashedError)
        assert kept.result() == 1


def test_options_are_those_of_a_task():
    with RayExecutor(num_cpus=0.5) as workers:
        assert workers.submit(resources).result() == {"CPU": 0.5}
    with pytest.raises(ValueError, match="num_cups"):
        RayExecutor(num_cups=1)


def lingering(workers, begun):
    """A call that runs and two that wait for its worker."""
    futures = [workers.submit(linger, begun) for _ in range(3)]
    while not begun.exists():
        time.sleep(0.01)
    return futures


def test_a_cancelled_call_frees_its_worker(tmp_path):
    with RayExecutor() as workers:
        futures = lingering(workers, tmp_path / "begun")
        assert all(future.cancel() for future in futures)
        assert workers.submit(abs, -1).result(timeout=20) == 1
    with pytest.raises(CancelledError):
        futures[0].result()


def test_shutdown_waits_for_what_was_asked():
    workers = RayExecutor()
    future = workers.submit(time.sleep, 0.5)
    workers.shutdown(wait=False)
    assert not future.done()
    with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
        workers.submit(abs, -1)
    workers.shutdown()
    assert future.done()


def test_shutdown_cancels_where_it_is_told_to(tmp_path):
    workers = RayExecutor()
    futures = lingering(workers, tmp_path / "begun")
    workers.shutdown(cancel_futures=True)
    assert all(future.cancelled() for future in futures)
