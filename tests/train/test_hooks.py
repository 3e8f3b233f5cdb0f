"""When hooks are due: in a run of ten steps that goes through, and in one that is stopped after its seventh."""

import pytest

from remit_megatron.train.hooks import Moment, every

CASES = {
    (0, False): ([10], []),
    (0, True): ([10], [7]),
    (3, False): ([3, 6, 9, 10], [3, 6]),
    (3, True): ([3, 6, 9, 10], [3, 6, 7]),
    (5, True): ([5, 10], [5, 7]),
    (7, True): ([7, 10], [7]),
}
"""Every so many steps, at a stop as well: steps in the one run and in the other. None twice."""


@pytest.mark.parametrize(("steps", "at_stop"), CASES)
def test_every(steps: int, at_stop: bool) -> None:
    for stop, expected in zip((None, 7), CASES[steps, at_stop], strict=True):
        called: list[int] = []
        hook = every(steps, lambda moment, called=called: called.append(moment.step), at_stop=at_stop)
        for step in range(1, (stop or 10) + 1):
            hook(Moment(step=step, line={}, is_last=step == 10, is_stop=step == stop))
        assert called == expected
