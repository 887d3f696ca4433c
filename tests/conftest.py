"""One thread for each test process: pytest-xdist takes the cores, and threads that wait for each other take ten times
as long as one. And SIGINT as it is in a terminal: a shell's background jobs, and what they start, ignore it.
"""

import os
import signal

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
