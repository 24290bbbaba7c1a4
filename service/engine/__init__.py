"""Token ids in, logits or token ids out: queues, batches, rows and steps. Knows nothing of text or HTTP."""
