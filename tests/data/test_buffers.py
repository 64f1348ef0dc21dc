"Leased buffers: memory is reused when nothing shares it, and never before."

import gc
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from agrivision_repro.data.buffers import BufferPool

SHARING = {  # ways to share the memory of an array
    "array": lambda array: array,
    "slice": lambda array: array[1:],
    "slice of a slice": lambda array: array[1:][:, 1:][..., ::2],
    "view of another type": lambda array: array.view(np.int8),
    "transposed": lambda array: array.reshape(-1).reshape(4, 6).T,
    "read-only": lambda array: np.broadcast_to(array, (2, 4, 6)),
    "flipped": lambda array: np.flip(array, -1).swapaxes(-2, -1),
    "iterated row": lambda array: next(iter(array)),
    "memoryview": lambda array: memoryview(array[1:]),
    "frombuffer": lambda array: np.frombuffer(array, np.uint8),
    "tensor": torch.from_numpy,
    "tensor of a slice": lambda array: torch.from_numpy(array[1:]),
    "view of a tensor": lambda array: torch.from_numpy(array).view(torch.int8).view(-1)[3:],
    "split tensor": lambda array: torch.from_numpy(array).split(1)[2],
    "detached tensor": lambda array: torch.from_numpy(array).detach(),
    "array of a tensor": lambda array: torch.from_numpy(array)[1:].numpy(),
    "storage": lambda array: torch.from_numpy(array).untyped_storage(),
    "DLPack": lambda array: torch.from_dlpack(array),
    "asarray": lambda array: np.asarray(torch.as_tensor(array)),
}


@pytest.fixture(autouse=True, scope="module")
def only_new_garbage():
    "`gc.collect` looks through what this module makes, not through all that was imported before."
    gc.freeze()


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


@pytest.mark.parametrize("share", SHARING.values(), ids=SHARING)
def test_shared_memory_is_not_reused(share):
    "One survivor of any kind keeps the buffer; when it goes, the next array has the same memory."
    pool = BufferPool()
    array = pool.lease((4, 6), np.uint8)
    array[:], taken = 7, address(array)
    survivor = share(array)
    del array
    gc.collect()
    others = [pool.lease((4, 6), np.uint8) for _ in range(3)]
    for other in others:
        other[:] = 9
    assert taken not in map(address, others)
    assert 9 not in bytes(survivor if isinstance(survivor, memoryview) else np.asarray(survivor))
    del survivor
    gc.collect()
    assert address(pool.lease((4, 6), np.uint8)) == taken


def test_arrays_are_as_asked_for():
    pool = BufferPool()
    for shape, dtype in (((3, 5), np.uint16), ((30,), np.uint8), ((2, 0), np.float32), ((), np.int64)):
        array = pool.lease(shape, dtype)
        assert (array.shape, array.dtype, type(array)) == (shape, dtype, np.ndarray)
        assert array.flags.writeable and array.flags.c_contiguous and torch.from_numpy(array).shape == shape


def test_another_type_of_the_same_size_reuses_memory():
    pool = BufferPool()
    taken = address(pool.lease((8, 4), np.uint8))
    assert address(pool.lease((4, 2), np.float32)) == taken


def test_copies_keep_nothing():
    pool = BufferPool()
    array = pool.lease((64,), np.uint8)
    taken = address(array)
    copies = array.copy(), pickle.loads(pickle.dumps(array)), torch.from_numpy(array).clone()
    del array
    assert address(pool.lease((64,), np.uint8)) == taken and len(copies) == 3


def test_unused_memory_is_limited():
    "Buffers of sizes that are no longer asked for are let go."
    pool = BufferPool(limit=1000)
    for size in range(300, 400):
        pool.lease((size,), np.uint8)
    pool.lease((1,), np.uint8)
    assert sum(buffer.nbytes for buffer in pool._free) <= 1000


def test_a_cycle_collected_during_a_lease():
    "A garbage collection may return a buffer in the middle of `lease`, in the thread that holds its lock."
    pool = BufferPool()

    def lease_in_cycles() -> None:
        for _ in range(2000):
            cycle = [pool.lease((16,), np.uint8)]
            cycle.append(cycle)

    old = gc.get_threshold()
    gc.set_threshold(1)
    try:
        thread = threading.Thread(target=lease_in_cycles, daemon=True)
        thread.start()
        thread.join(60)
    finally:
        gc.set_threshold(*old)
    assert not thread.is_alive()


def test_threads_never_share_a_buffer():
    pool = BufferPool()

    def fill(k: int) -> bool:
        for _ in range(300):
            arrays = [pool.lease((64, 64), np.uint8) for _ in range(2)]
            for n, array in enumerate(arrays):
                array[:] = 2 * k + n
            tensor = torch.from_numpy(arrays.pop())[1:]
            if not ((arrays[0] == 2 * k).all() and (tensor == 2 * k + 1).all()):
                return False
        return True

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(fill, range(8)))
