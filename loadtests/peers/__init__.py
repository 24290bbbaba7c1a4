"""Wattle beside its peers: same weights, same inputs, same machine, taking turns. Each runs in its own environment."""
