"""How much work something is, by a count that no busy machine changes."""

import cProfile
import pstats


def calls(function, *arguments):
    """How many functions, Python's own among them, are called by function(*arguments)."""
    profile = cProfile.Profile()
    profile.runcall(function, *arguments)
    return pstats.Stats(profile).total_calls
