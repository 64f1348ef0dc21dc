"One thread of arithmetic per worker, also in the processes that tests start; longest files first; no garbage is sought in imports."

import gc
import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

gc.disable()  # while PyTorch and the tests are imported: their million objects stay

LONGEST = "test_reproduction test_training test_processes test_tools test_share test_command test_repository test_models test_lab".split()


def pytest_collection_modifyitems(items: list) -> None:
    "Sort the files of `LONGEST` to the front; with --no-loadscope-reorder, workers take files in this order."
    rank = {name: k for k, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(LONGEST)))


def pytest_collection_finish() -> None:
    "Collect garbage from now on, but seldom, and not among what was imported: else it takes a tenth of the time."
    gc.freeze()
    gc.set_threshold(10_000)
    gc.enable()
