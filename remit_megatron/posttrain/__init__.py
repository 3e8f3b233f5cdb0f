"""Supervised fine-tuning, preference optimisation and reinforcement learning, by engines that are processes."""
