"""Names that settings choose from, in a file that needs no torch."""

from typing import Literal, NamedTuple

Implementation = Literal["auto", "torch", "triton"]
"""Of an operation: plain torch, Triton kernels, or what fits the device."""
Compared = Literal["forward", "reverse", "top1"]
"""Of the reference's distribution with the student's: KL(reference || student), KL(student || reference), or the
student's NLL of the reference's most probable token."""
RoutedBy = Literal["low_entropy", "high_entropy", "random", "correct"]
"""What a token is chosen by: the reference's entropy, low or high; a random number; or that the reference's most
probable token is the label."""
RoutingScope = Literal["global", "sequence", "microbatch"]
"""Where tokens compete: in the step's whole batch, in each packed sample, or in each microbatch."""


class Routing(NamedTuple):
    """How tokens are chosen by what the reference says of them."""

    share: float
    """Of the unmasked tokens of a scope, rounded up; 0 or at least a millionth. Not read with by = "correct"."""
    by: RoutedBy = "low_entropy"
    scope: RoutingScope = "global"
    seed: int = 0
    """Of by = "random", with the step, the sample and the position."""
