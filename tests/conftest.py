"""Triton's interpreter, and profiles of the property tests.

The profiles give the same examples at every run, a few hundred or, for `make test-long`, many more.
"""

import os

# Triton asks for this when a kernel is defined, so it stands before any test can import one. Nothing else here uses
# Triton. On a machine with a GPU, TRITON_INTERPRET=0 compiles the kernels instead.
os.environ.setdefault("TRITON_INTERPRET", "1")

from hypothesis import HealthCheck, settings

common = settings(derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("default", common, max_examples=300)
settings.register_profile("long", common, max_examples=5_000)
settings.load_profile("default")
