"""Per-token operations of the loss path, on plain tensors and explicit process groups.

Letters in shapes and in kernel names:
    b  samples (rows) of the microbatch
    s  label positions of a sample on this rank (s = sequence / cp_size)
    n  tokens, the leading dimensions flattened
    h  hidden size
    V  vocabulary rows of the model, padding included; L = V / tp_size are the columns held by one rank
"""
