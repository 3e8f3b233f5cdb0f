"""Hugging Face folders: their config, tensor names and files. Nothing here imports transformers or Megatron."""
