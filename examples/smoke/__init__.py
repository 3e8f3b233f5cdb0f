"""The small end-to-end run: a real corpus, a base, a reference, and mid-training with and without ReMiT."""
