"""What a training step needs of a sample, where documents are as short as they can be."""

import numpy as np
import pytest
import torch

from remit_megatron.config import Data
from remit_megatron.data.samples import assemble
from remit_megatron.ops.weights import remit_weights

DATA = Data.model_validate({"sequence_length": 4, "train": ({"path": "x"},), "document_mask": True})


@pytest.mark.parametrize(
    ("text", "segments", "documents"),
    [
        ([0, 0, 0, 0, 0], [0, 1, 2, 3], [0, 1, 2, 3]),
        ([0, 5, 6, 0, 7], [0, 0, 0, 1], [0, 1, 1, 1]),
        ([5, 0, 6, 7, 0], [0, 1, 1, 1], [0, 0, 1, 1]),
    ],
)
def test_documents_are_numbered_below_the_samples_length(
    text: list[int], segments: list[int], documents: list[int]
) -> None:
    """EOD is 0. Weights of centring by document take these numbers."""
    sample = assemble(np.array(text), DATA, eod_id=0, sample_id=3)
    assert sample["segment_ids"].tolist() == segments
    assert sample["documents"].tolist() == documents
    nll, ref_nll = torch.tensor([[4.0, 3.0, 2.5, 1.0]]), torch.zeros(1, 4)
    weights = remit_weights(nll, ref_nll, segment_ids=torch.from_numpy(sample["segment_ids"])[None])
    alone = [torch.tensor(segments) == segment for segment in segments]
    gaps = [float(nll[0, i] - nll[0, one].mean()) for i, one in enumerate(alone)]
    want = (2 * torch.sigmoid(torch.tensor(gaps))).clamp(0.8, 1.2)
    torch.testing.assert_close(weights[0], want, rtol=1e-6, atol=0.0)
