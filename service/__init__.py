"""HTTP in, answers with their energy bill out. Never imports torch, transformers or training."""
