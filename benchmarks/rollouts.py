"""Tokens a second of processor time, of the decoder for small models and of transformers' own generation.

    python -m benchmarks.rollouts [--hidden 128] [--layers 2] [--vocab 4096] [--new-tokens 32] [--mean-length 12]

Sixty-four completions of eight prompts by a random OLMo-2, in float32 on one thread, in turns; TRL's default path is
transformers' `generate` with a dynamic cache.
"""

import argparse
import time
from collections.abc import Callable

import torch
from transformers import GenerationConfig, Olmo2Config, Olmo2ForCausalLM

from remit_megatron.posttrain.decode import CachedDecoder

TURNS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("hidden", 128), ("layers", 2), ("vocab", 4096), ("new-tokens", 32), ("mean-length", 12)):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = Olmo2ForCausalLM(
        Olmo2Config(
            vocab_size=asked.vocab,
            hidden_size=asked.hidden,
            intermediate_size=asked.hidden * 11 // 4,
            num_hidden_layers=asked.layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
            pad_token_id=0,
        )
    ).eval()
    # A random model draws tokens nearly evenly, so this many stops give that mean length.
    stops = list(range(1, 1 + asked.vocab // asked.mean_length))
    different = [torch.randint(3, asked.vocab, (int(size),)).tolist() for size in torch.randint(10, 30, (8,))]
    prompts = [prompt for prompt in different for _ in range(8)]
    decoder = CachedDecoder(model)

    def cached() -> int:
        drawn = decoder.generate(prompts, max_new_tokens=asked.new_tokens, stop_ids=stops, temperature=1.0)
        return sum(map(len, drawn))

    ways: dict[str, Callable[[], int]] = {"cached": cached}
    for name, cache in (("transformers, dynamic cache", None), ("transformers, static cache", "static")):
        ways[name] = lambda cache=cache: _transformers(model, prompts, stops, asked.new_tokens, cache)
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(TURNS + 1):
        for name, generate in ways.items():
            began = time.process_time()
            tokens = generate()
            if turn:
                rates[name].append(tokens / (time.process_time() - began))
    base = sorted(rates["transformers, dynamic cache"])[TURNS // 2]
    for name, found in rates.items():
        median = sorted(found)[TURNS // 2]
        print(f"{name:30} {median:8,.0f} tokens/s  {median / base:.1f}x  (best {max(found):,.0f})")


@torch.no_grad()
def _transformers(
    model: Olmo2ForCausalLM, prompts: list[list[int]], stops: list[int], new_tokens: int, cache: str | None
) -> int:
    """Tokens up to and with each first stop, as TRL counts them."""
    size = max(map(len, prompts))
    ids = torch.tensor([[0] * (size - len(prompt)) + prompt for prompt in prompts])
    mask = torch.arange(size) >= torch.tensor([[size - len(prompt)] for prompt in prompts])
    settings = GenerationConfig(
        max_new_tokens=new_tokens, do_sample=True, top_k=0, top_p=1.0, pad_token_id=0, eos_token_id=stops,
        cache_implementation=cache, disable_compile=True,
    )  # fmt: skip
    drawn = model.generate(input_ids=ids, attention_mask=mask.long(), generation_config=settings)[:, size:]
    ended = torch.isin(drawn, torch.tensor(stops))
    return int(torch.where(ended.any(1), ended.int().argmax(1) + 1, drawn.size(1)).sum())


if __name__ == "__main__":
    main()
