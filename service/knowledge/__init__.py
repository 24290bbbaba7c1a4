"""Knowledge bases: documents in, passages that bear on a question out."""
