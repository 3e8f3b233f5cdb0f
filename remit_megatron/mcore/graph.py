"""A frozen model's forward pass as a CUDA graph: one launch in place of thousands, for passes too short to hide them.

A replay reads the buffers and the weights it was captured with, whatever became of them, so a mistake gives wrong
scores and no error. Therefore a replay is compared with the pass itself, the first one and then every so many.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from remit_megatron.errors import RunError

CHECK_EVERY = 200
TOLERANCE_NATS = 0.02
"""Of the mean difference of a token's NLL. A captured matrix product may use another algorithm, so bits may differ;
scores of other tokens or weights differ by tenths of nats."""
WARMUP_PASSES = 3

Capture = Callable[[Callable[[], Tensor]], tuple[Tensor, Callable[[], object]]]
"""A pass -> (the tensor that its result is in, a call that runs it again into that tensor)."""


def capture_cuda(run: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], object]]:
    """Warm up beside the current stream, as torch asks for, and capture."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARMUP_PASSES):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()
    return output, graph.replay


@dataclass(slots=True)
class _Captured:
    inputs: dict[str, Tensor]
    output: Tensor
    replay: Callable[[], object]
    calls: int = 0


class Replayed:
    """Runs a pass by replay, one capture for each set of input shapes. Its memory stays held between passes."""

    def __init__(self, capture: Capture = capture_cuda, check_every: int = CHECK_EVERY):
        self._capture = capture
        self._check_every = check_every
        self._captured: dict[tuple[object, ...], _Captured] = {}

    def __call__(self, run: Callable[..., Tensor], inputs: dict[str, Tensor]) -> Tensor:
        """`run(**inputs)`, in memory of its own. `run` must do the same work every time, without autograd.

        Raises RunError where a replay that is checked gives another result than `run`.
        """
        key = tuple((name, x.shape, x.dtype, x.device) for name, x in inputs.items())
        if key not in self._captured:
            # Other values than the first call's, so that its check sees a graph that does not read its buffers.
            buffers = {name: x.roll(1, -1) for name, x in inputs.items()}
            self._captured[key] = _Captured(buffers, *self._capture(lambda: run(**buffers)))
        one = self._captured[key]
        for name, x in inputs.items():
            one.inputs[name].copy_(x)
        one.replay()
        result = one.output.clone()
        if one.calls % self._check_every == 0:
            _compare(result, run(**inputs))
        one.calls += 1
        return result


def _compare(replayed: Tensor, eager: Tensor) -> None:
    error = float((replayed - eager).abs().mean())
    if not error <= TOLERANCE_NATS:  # also for NaN
        raise RunError(
            f"reference.cuda_graph: a replay differs from the pass itself by {error:.3g} nats in the mean (allowed: "
            f"{TOLERANCE_NATS:g}): scores since the last check may be wrong; set reference.cuda_graph = false and go "
            "back to a checkpoint from before it"
        )
