"""Reinforcement learning by TRL: who generates, and what a completion earns."""

import json
import time
from collections.abc import Callable
from typing import Any

from transformers import AutoTokenizer
from trl import GRPOTrainer

from remit_megatron.posttrain import verifiers
from remit_megatron.posttrain.contract import StageSpec
from remit_megatron.posttrain.decode import CachedDecoder


class RLTrainer(GRPOTrainer):  # type: ignore[misc]
    """GRPO that logs `response_tokens_per_s` and `generate_s`, and with rollouts = "cached" generates by itself."""

    def __init__(self, *args: Any, rollouts: str, **more: Any):
        super().__init__(*args, **more)
        unwrapped = self.accelerator.unwrap_model(self.model)
        self._decoder = CachedDecoder(unwrapped) if rollouts == "cached" else None

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **more: Any) -> tuple[Any, Any]:
        """(completion ids, their log-probabilities or None). TRL calls it once a generation, with token ids."""
        began = time.monotonic()
        if self._decoder is None:
            completions, logps = super()._generate_single_turn(prompt_ids, *args, **more)
        else:
            logps = None
            assert self.max_completion_length is not None, "the stage's settings give it"
            completions = self._decoder.generate(
                prompt_ids,
                max_new_tokens=self.max_completion_length,
                stop_ids=self.eos_token_ids,
                temperature=self.temperature,
            )
        seconds = time.monotonic() - began
        metrics = self._metrics["train"]
        metrics["generate_s"].append(seconds)
        metrics["response_tokens_per_s"].append(sum(map(len, completions)) / seconds)
        return completions, logps


def reward_function(spec: StageSpec, model: str) -> Callable[..., list[float]]:
    """The verifiers' scores, in [0, 1]: advantages are normalised within a group, so a scale would change nothing."""
    assert spec.rl is not None
    must_stop = spec.rl.must_stop
    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    end = tokenizer.eos_token_id

    def correct_answers(
        prompts: list[Any], completion_ids: list[list[int]], ground_truth: list[str], verifier: list[str], **more: Any
    ) -> list[float]:
        scores = []
        for ids, truth, name in zip(completion_ids, ground_truth, verifier, strict=True):
            if must_stop and (not ids or ids[-1] != end):
                scores.append(0.0)
                continue
            text = str(tokenizer.decode(ids, skip_special_tokens=True))
            scores.append(verifiers.VERIFIERS[name].score(text, json.loads(truth)))
        return scores

    return correct_answers
