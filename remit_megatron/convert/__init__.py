"""`remit convert`: Hugging Face checkpoints in and out of this package's checkpoints."""
