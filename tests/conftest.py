"""Settings of all tests."""

import hypothesis

pytest_plugins = ["tests.versions.results"]

# A busy machine is no failure: time is measured by benchmarks, never by tests.
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")
