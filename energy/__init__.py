"""Joules in, bills out: meters, attribution, carbon and ledger. Knows nothing of models or HTTP."""
