"""A Ray cluster as an executor: what ``executor=`` takes, for Ray brings none of its own.

.. code-block:: python

    ray.init("auto")
    with RayExecutor() as workers:
        memory.attend(model, images, executor=workers).top(10)

Needs ``dualhook[ray]``, here and on the cluster.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from concurrent import futures
from typing import Any, TypeVar

from dualhook.integrations import library

__all__ = ["RayExecutor"]

T = TypeVar("T")
_ray: Any = library("ray")


class RayExecutor(futures.Executor):
    """Does every call as a Ray task, on the cluster that ``ray.init`` has joined; without one Ray starts its own here.

    .. code-block:: python

        with RayExecutor(num_cpus=2) as workers:
            assert workers.submit(pow, 2, 10).result() == 1024

    Functions and arguments travel pickled, those of a module by its name, results likewise. Ray does the call of a lost
    worker again on another one (``max_retries``, by default three times); after that the future has Ray's exception.
    What a call itself raises is raised as it is, with Ray's account of it as the cause.

    A future is pending until its call is done, as Ray does not say when one begins: cancelling it takes a waiting call
    from the queue and interrupts one that runs, as Ctrl-C would, before its next Python instruction. Now and then Ray
    misses one that is about to begin, which then runs to its end for nobody.

    Args:
        **options: what a task needs, as ``ray.remote`` takes it: ``num_cpus``, ``num_gpus`` (without it Ray hides
            the GPUs, which ``device="cuda"`` wants), ``resources``, ``max_retries``, ``runtime_env``, …
    """

    def __init__(self, **options: Any) -> None:
        self._task = _ray.remote(_call).options(**options)
        self._lock = threading.Lock()
        self._pending: set[futures.Future[Any]] = set()
        self._over = False

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> futures.Future[T]:
        """The future of ``fn(*args, **kwargs)``, whose exception says so where Ray could not take the call.

        Raises:
            RuntimeError: after ``shutdown``.
        """
        future: futures.Future[T] = futures.Future()
        with self._lock:
            if self._over:
                raise RuntimeError("cannot schedule new futures after shutdown")
            try:
                reference = self._task.remote(fn, args, kwargs)
            except Exception as error:  # not to be pickled, or a store that is full
                future.set_exception(error)
                return future
            self._pending.add(future)
        future.add_done_callback(lambda future: _ray.cancel(reference) if future.cancelled() else None)
        reference.future().add_done_callback(functools.partial(self._settle, future))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more calls; Ray itself stays as it is.

        Args:
            wait: return when every call has ended.
            cancel_futures: cancel those that have not, also where they run.
        """
        with self._lock:
            self._over = True
            pending = list(self._pending)
        if cancel_futures:
            for future in pending:
                future.cancel()
        if wait:
            futures.wait(pending)

    def _settle(self, future: futures.Future[Any], ended: futures.Future[Any]) -> None:
        """Pass on how a task has ended."""
        if future.set_running_or_notify_cancel():
            error = ended.exception()
            if isinstance(error, _ray.exceptions.RayTaskError):
                error.cause.__cause__ = error
                error = error.cause
            if error is None:
                future.set_result(ended.result())
            else:
                future.set_exception(error)
        self._pending.discard(future)


def _call(fn: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any]) -> T:
    return fn(*args, **kwargs)
