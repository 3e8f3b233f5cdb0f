"""The layout functions against the layout written out by hand, and their inverses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from remit_megatron.hf.layout import gate_up_parts, part_shape, qkv_parts, read_part, write_part


@settings(max_examples=40, deadline=None)
@given(groups=st.integers(1, 5), per=st.integers(1, 4), width=st.integers(1, 6), inputs=st.sampled_from([None, 1, 5]))
def test_qkv_rows(groups: int, per: int, width: int, inputs: int | None) -> None:
    """Row by row: group g holds its `per` queries, then its key, then its value; a bias has rows of one number."""
    tail = () if inputs is None else (inputs,)
    fused = torch.full((groups * (per + 2) * width, *tail), -1.0)
    sizes = [groups * per * width, groups * width, groups * width]
    q, k, v = (torch.randn(n, *tail) for n in sizes)
    parts = qkv_parts(fused, groups, width)
    for part, tensor in zip(parts, (q, k, v), strict=True):
        assert part_shape(part, fused.ndim) == tuple(tensor.shape)
        write_part(part, tensor)
    row = 0
    for group in range(groups):
        heads = [q[(group * per + i) * width :][:width] for i in range(per)]
        for head in (*heads, k[group * width :][:width], v[group * width :][:width]):
            assert torch.equal(fused[row : row + width], head)
            row += width
    assert row == len(fused)
    for part, tensor in zip(parts, (q, k, v), strict=True):
        back = read_part(part, fused.ndim)
        assert torch.equal(back, tensor)
        assert back.is_contiguous()


@pytest.mark.parametrize("ffn", [1, 27])
def test_gate_above_up(ffn: int) -> None:
    gate, up = torch.randn(ffn, 3), torch.randn(ffn, 3)
    fused = torch.empty(2 * ffn, 3)
    for part, tensor in zip(gate_up_parts(fused), (gate, up), strict=True):
        write_part(part, tensor)
    assert torch.equal(fused, torch.cat([gate, up]))
    assert all(torch.equal(read_part(p, 2), t) for p, t in zip(gate_up_parts(fused), (gate, up), strict=True))


def test_a_cast_is_the_only_change() -> None:
    part = torch.empty(2, 3, dtype=torch.bfloat16)
    write_part(part, torch.tensor([[1.0, 1.001, -3.0], [0.0, 65536.0, 1e-8]]))
    assert torch.equal(part, torch.tensor([[1.0, 1.001, -3.0], [0.0, 65536.0, 1e-8]]).bfloat16())
