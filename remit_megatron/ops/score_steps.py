"""Former names of what `ops.score_quanta` has."""

from remit_megatron.ops.score_quanta import LARGEST, dequantise, quantise
from remit_megatron.ops.score_quanta import QUANTA_PER_NAT as STEPS_PER_NAT
from remit_megatron.ops.score_quanta import round_to_quanta as round_to_steps

__all__ = ["LARGEST", "STEPS_PER_NAT", "dequantise", "quantise", "round_to_steps"]
