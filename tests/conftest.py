"""Profiles of the property tests: the same examples at every run, a few hundred or, for `make test-long`, many more."""

from hypothesis import HealthCheck, settings

common = settings(derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("default", common, max_examples=300)
settings.register_profile("long", common, max_examples=5_000)
settings.load_profile("default")
