"""What all tests share."""

from hypothesis import settings

# No deadline: a busy machine is not a failure. The same examples in every run: a red build is the change's fault.
settings.register_profile("wattle", deadline=None, derandomize=True)
settings.load_profile("wattle")
