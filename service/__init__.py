"""HTTP in, answers with their energy bill out. Never imports torch, transformers or training."""

__version__ = "0.1.0"
