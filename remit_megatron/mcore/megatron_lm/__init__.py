"""ReMiT inside Megatron-LM's own training script: `pretrain`, and the checkpoints that it writes and reads.

`shapes` needs Megatron-Core alone; `pretrain`, `steps` and `reference` also `megatron.training`, which comes with a
checkout of Megatron-LM and is in no package. examples/megatron_lm/pretrain_remit.py is the script.
"""
