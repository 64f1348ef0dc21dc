"""Large arrays in reused memory: a buffer is leased, and comes back when the last array or tensor that shares it is deleted."""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Sequence
from threading import Lock

import numpy as np


class _Lease:
    """The owner of a leased buffer's memory, as NumPy sees it.

    A finalizer on the array itself would come too early: NumPy gives a view of a view the base of the first, so a slice does not keep the
    array that it was cut from alive. That shortening ends at an object that is not an array, so every view refers to its lease.
    """

    def __init__(self, buffer: np.ndarray):
        self.__array_interface__ = buffer.__array_interface__  # its address; the finalizer keeps the buffer itself alive


class BufferPool:
    "Buffers for large arrays, reused once no array or tensor shares their memory."

    def __init__(
        self,
        limit: float = 5e8,  # bytes of unused buffers to keep
    ):
        self._limit, self._lock = limit, Lock()
        self._free: list[np.ndarray] = []
        self._returned: deque[np.ndarray] = deque()  # finalizers run at any point of any thread, also while it holds the lock

    def lease(
        self,
        shape: Sequence[int],
        dtype: np.dtype | type,
    ) -> np.ndarray:  # not initialized
        "Return an array in an unused buffer."
        buffer = self._find(math.prod(shape) * np.dtype(dtype).itemsize)
        lease = _Lease(buffer)
        weakref.finalize(lease, self._returned.append, buffer).atexit = False
        return np.asarray(lease).view(dtype).reshape(shape)

    def _find(self, n_bytes: int) -> np.ndarray:
        "Return an unused buffer of that size, or allocate one."
        with self._lock:
            while self._returned:
                self._free.append(self._returned.popleft())
            for k, buffer in enumerate(self._free):
                if buffer.nbytes == n_bytes:
                    return self._free.pop(k)
            while sum(buffer.nbytes for buffer in self._free) > self._limit:
                self._free.pop(0)
        return np.empty(n_bytes, np.uint8)


POOL = BufferPool()
