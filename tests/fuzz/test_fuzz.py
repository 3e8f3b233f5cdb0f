"""A few broken inputs of every reader, and that the framework sees a guard that is gone."""

from pathlib import Path

import pytest

from remit_megatron.data import manifest
from tests.fuzz.__main__ import fuzz, report
from tests.fuzz.framework import TARGETS, ready, run
from tests.fuzz.targets import load

load()
INPUTS = 2000


def test_broken_inputs() -> None:
    outcomes = fuzz(sorted(TARGETS), seed=0, inputs=INPUTS)
    assert len(outcomes) >= INPUTS
    assert not [outcome for outcome in outcomes if outcome.wrong], report(outcomes)
    assert {outcome.code for outcome in outcomes} >= {0, 2}


def test_a_guard_that_is_gone_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forked commands inherit what is broken here: without checksums changed tokens pass, and the judge says so."""
    for name in ("_check_block", "_changed_block", "_check_idx_sum"):
        monkeypatch.setattr(manifest, name, lambda *_: None)
    monkeypatch.setattr("data_prep.inspect.verify_content", lambda prefix: (manifest.Manifest.read(prefix), True))
    target = TARGETS["dataset.verify"]
    outcomes = list(run(target, range(40), ready(target, tmp_path), tmp_path))
    assert "a.bin was changed, and passed" in {outcome.wrong for outcome in outcomes}, report(outcomes)
