"Several workers share the cores: one thread of arithmetic each, and the same for every process that a test starts."

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
