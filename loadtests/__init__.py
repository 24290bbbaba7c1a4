"""Load tests and comparisons with peers; they speak HTTP and know nothing of the service's code."""
