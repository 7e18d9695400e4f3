"""Property tests here have no deadline: on a busy machine it would say nothing of the code."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("steady", deadline=None)
settings.load_profile("steady")
