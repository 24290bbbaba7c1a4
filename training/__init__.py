"""From raw text to an exported model: data, tokenizer, training, evaluation, export. Knows nothing of the service."""
