"""Load tests that count joules, and comparisons with peers; they know nothing of the service's code."""
