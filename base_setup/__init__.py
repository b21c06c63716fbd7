"""What must stand before anything can learn: backend, tokenizer, adapters."""
