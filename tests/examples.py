"""How many examples a property is tried on: all of them, or a share where `make check` asks so."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# A busy machine fails nothing: no example has a time limit, and none is drawn too slowly.
settings.register_profile("full", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("full")
settings.register_profile("check", settings.get_profile("full"), max_examples=10)
"""`--hypothesis-profile check` takes a tenth of each count: hypothesis' own default is 100."""


def examples(count: int) -> int:
    """`count`, or its share under the profile that is loaded; at least 5."""
    return max(5, count * settings().max_examples // 100)
