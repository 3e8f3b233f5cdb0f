"""What the packages are used for, each example by itself: `python -m examples.NAME` in a clone of this repository."""
