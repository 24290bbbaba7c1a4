"""What all tests share."""

import os

from hypothesis import settings

# Tiny models gain nothing from threads, and threads that wait for one another crawl where others use the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# No deadline: a busy machine is not a failure. The same examples in every run: a red build is the change's fault.
settings.register_profile("wattle", deadline=None, derandomize=True)
settings.load_profile("wattle")
