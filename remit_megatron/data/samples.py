"""From the tokens of one sample to what a training step needs of it."""

import numpy as np

from remit_megatron.config import Data


def assemble(text: np.ndarray, data: Data, eod_id: int | None, sample_id: int) -> dict[str, np.ndarray]:
    """Arrays of one sample from its tokens [s + 1] int64.

    tokens, labels [s] int64; loss_mask [s] float32; segment_ids [s] int64: the document of each label (EOD belongs to
    the document it ends), absent without an EOD id; documents [s] int64: the document of each input token, only with
    data.document_mask; sample_id: int64 scalar.
    """
    tokens, labels = text[:-1], text[1:]
    sample = {"tokens": tokens, "labels": labels, "sample_id": np.array(sample_id, dtype=np.int64)}
    assert eod_id is not None or not (data.eod_mask_loss or data.document_mask), "both are defined by the EOD token"
    loss_mask = np.ones(len(tokens), dtype=np.float32)
    if eod_id is not None:
        ends = tokens == eod_id
        sample["segment_ids"] = np.cumsum(ends, dtype=np.int64) - ends[0]  # below s, as groups are numbered
        if data.eod_mask_loss:
            loss_mask[ends] = 0
        if data.document_mask:
            sample["documents"] = sample["segment_ids"] - ends + ends[0]
    sample["loss_mask"] = loss_mask
    return sample
