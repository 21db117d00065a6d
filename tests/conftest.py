"""One thread for every test and the processes it starts.

Tiny models gain nothing from more, and sums taken in another order differ in the last bit, which
tests of exact resume would see.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
