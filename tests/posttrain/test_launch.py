"""Several processes of the engine `trl`, by torchrun on gloo."""

from pathlib import Path

import pytest

from remit_megatron.errors import UserError
from remit_megatron.posttrain.contract import Engine, read_metrics, verify, write_spec
from remit_megatron.posttrain.stage import run_stage
from tests.posttrain import tiny

pytestmark = pytest.mark.slow
TWO = Engine(launch=("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"))


def test_two_processes(tmp_path: Path) -> None:
    """The losses of two processes are those of one that holds both microbatches, but for the order of float32 sums."""
    base, rows = tiny.save_base(tmp_path / "base"), tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.sft_rows(32))
    losses = []
    for name, engine, microbatch in (("one", Engine(), 8), ("two", TWO, 4)):
        settings = tiny.SFT_SETTINGS.model_copy(update={"microbatch_samples": microbatch, "epochs": 1})
        write_spec(tmp_path / name, tiny.spec("sft", base, rows, engine=engine, sft=settings))
        run_stage(tmp_path / name)
        assert verify(tmp_path / name).steps == 4
        losses.append([line["loss"] for line in read_metrics(tmp_path / name)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_mistake_is_said(tmp_path: Path) -> None:
    """A launcher's exit code is its own; the message is the rank's all the same."""
    base = tiny.save_base(tmp_path / "base")
    rows = tiny.write_jsonl(tmp_path / "rows.jsonl", [*tiny.sft_rows(8), {"text": "x"}])
    write_spec(tmp_path / "stage", tiny.spec("sft", base, rows, engine=TWO))
    with pytest.raises(UserError, match=r"sft: .*row 9: column `messages` is missing"):
        run_stage(tmp_path / "stage")
