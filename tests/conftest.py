"""How Hypothesis works here: as on any machine, however slow, and the same in every run."""

from hypothesis import HealthCheck, settings

# A deadline, or a judgement of how long examples take to draw, would fail a test because the machine was busy; an example
# that nobody has seen before would fail a run of something else. New ones are looked for on purpose:
# `pytest --hypothesis-profile=search`, which also forgets nothing that it has found.
settings.register_profile(
    "steady", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("search", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("steady")
