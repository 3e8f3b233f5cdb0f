"""Every node is looked at before training: what one rank finds, what all find together, and who is told."""
