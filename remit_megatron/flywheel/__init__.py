"""The wheel: rounds of mid-training and post-training from one file, each stage known by what goes into it."""
