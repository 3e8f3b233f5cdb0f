"""The decoder of small models: its logits and greedy tokens are transformers', and what it draws follows them."""

import pytest
import torch

from remit_megatron.errors import UserError
from remit_megatron.posttrain.decode import CachedDecoder, draw
from tests.hf import tiny

CASES = [name for name, (kind, _) in tiny.CASES.items() if kind in ("Olmo2", "Llama", "SmolLM3")]


def prompts(vocab_size: int) -> list[list[int]]:
    """Of several lengths; the first two and the last two are read once each."""
    generator = torch.Generator().manual_seed(3)
    one, two, three = (torch.randint(vocab_size, (n,), generator=generator).tolist() for n in (5, 1, 9))
    return [one, one, two, three, three]


def greedy(model: object, prompt: list[int], steps: int, stops: set[int]) -> tuple[list[int], float]:
    """By whole forward passes of transformers; the smallest lead of a chosen logit over the next one, too."""
    found, lead = [], float("inf")
    for _ in range(steps):
        logits = model(torch.tensor([prompt + found])).logits[0, -1]  # type: ignore[operator]
        first, second = logits.topk(2).values.tolist()
        lead = min(lead, first - second)
        found.append(int(logits.argmax()))
        if found[-1] in stops:
            break
    return found, lead


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_greedy(case: str) -> None:
    """Token by token as transformers, with sequences that end and leave the batch at different steps.

    Where a choice is closer than 1e-4, rounding could decide it; float32 logits agree to 2e-6 here.
    """
    model = tiny.make_model(case)
    asked = prompts(model.config.vocab_size)
    wanted = [greedy(model, prompt, 12, set()) for prompt in asked]
    assert min(lead for _, lead in wanted) > 1e-4
    # Stops that end some sequences early and let others run on.
    stops = {wanted[0][0][3], wanted[3][0][7]}
    expected = [greedy(model, prompt, 12, stops)[0] for prompt in asked]
    assert len({len(tokens) for tokens in expected}) > 1
    found = CachedDecoder(model).generate(asked, max_new_tokens=12, stop_ids=sorted(stops), temperature=0)
    assert found == expected


@torch.no_grad()
def test_weights_are_read_anew() -> None:
    """One decoder serves a model that is being trained."""
    model = tiny.make_model("olmo2")
    decoder = CachedDecoder(model)
    before = decoder.generate([[3, 4, 5]], max_new_tokens=8, stop_ids=[], temperature=0)
    for parameter in model.parameters():
        parameter.mul_(-1.5)
    assert decoder.generate([[3, 4, 5]], max_new_tokens=8, stop_ids=[], temperature=0) == [
        greedy(model, [3, 4, 5], 8, set())[0]
    ]
    assert before != decoder.generate([[3, 4, 5]], max_new_tokens=8, stop_ids=[], temperature=0)


@torch.no_grad()
def test_sampling_distribution() -> None:
    """The second token's frequencies, at a temperature, against softmax of transformers' logits.

    chi square over 61 tokens: mean 60, standard deviation 11; 110 is beyond 1 in 10,000, and the seed is fixed.
    """
    model, count, temperature = tiny.make_model("llama"), 20_000, 1.7
    decoder = CachedDecoder(model)
    generator = torch.Generator().manual_seed(0)
    prompt = [7, 9, 11]
    drawn = decoder.generate(
        [prompt] * count, max_new_tokens=2, stop_ids=[], temperature=temperature, generator=generator
    )
    first = model(torch.tensor([prompt])).logits[0, -1].double().div(temperature).softmax(-1)
    contexts = torch.tensor([[*prompt, token] for token in range(len(first))])
    second = model(contexts).logits[:, -1].double().div(temperature).softmax(-1)
    wanted = count * first @ second
    found = torch.bincount(torch.tensor([tokens[1] for tokens in drawn]), minlength=len(first))
    assert ((found - wanted) ** 2 / wanted).sum() < 110
    # And the test can tell: the same draws do not follow the distribution at temperature 1.
    plain = model(torch.tensor([prompt])).logits[0, -1].double().softmax(-1) @ model(contexts).logits[
        :, -1
    ].double().softmax(-1)
    assert ((found - count * plain) ** 2 / (count * plain)).sum() > 200


def test_draw_never_takes_the_impossible() -> None:
    """Tokens of probability 0 are never drawn, also at the ends of the vocabulary."""
    logits = torch.full((5000, 8), float("-inf"))
    logits[:, 3] = 0.0
    logits[:, 5] = 1.0
    assert set(draw(logits, 1.0, torch.Generator().manual_seed(0)).tolist()) == {3, 5}


def test_refused() -> None:
    with pytest.raises(
        UserError, match=r"rl.rollouts = 'cached' computes llama, olmo2, smollm3 .* this model is a youtu"
    ):
        CachedDecoder(tiny.make_model("youtu"))
    with pytest.raises(UserError, match="computes in float32"):
        CachedDecoder(tiny.make_model("llama").bfloat16())
