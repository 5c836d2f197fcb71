import os
import signal

# A shell without job control has what it starts in the background ignore Ctrl-C, and what that
# starts in turn. Several tests are about Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Each of several workers gets its share of the cores, and so do the processes that its tests start.
# OpenMP reads this when torch is imported, which is later than here.
n_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if n_workers > 1:
    n_cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (n_cpus or 1) // n_workers)))
