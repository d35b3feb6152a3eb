"""Sets up one thread a test, Triton's interpreter, and the profiles of the property tests.

The profiles draw the same examples in every run: a few hundred or, for `make test-long`, many more.
"""

import os

# Small tensors on several threads take longer, and cost all cores; what tests threads sets their number itself.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Triton reads this when a kernel is defined, so it is set before any test can import one. Nothing else here uses
# Triton. On a machine with a GPU, TRITON_INTERPRET=0 compiles the kernels instead.
os.environ.setdefault("TRITON_INTERPRET", "1")

from hypothesis import HealthCheck, settings

common = settings(derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("default", common, max_examples=200)
settings.register_profile("long", common, max_examples=5_000)
settings.load_profile("default")
