"""One thread for each test process: pytest-xdist takes the cores, and threads that wait for each other take ten times
as long as one."""

import os

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")
