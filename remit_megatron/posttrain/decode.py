"""Sampling from a small transformers model on a CPU, where calls cost more than arithmetic.

transformers' `generate` spends most of its time outside of the kernels when a model is small: it builds masks, looks
for stop criteria and dispatches one module after another for every token. Here the forward of the Llama family is
written out over the model's own weights, in float32: projections that read one input are one matrix, keys and values
lie in buffers allocated once, a prompt that several completions share is read once, and completions that have ended
leave the batch.

Letters: B sequences, P prompt tokens (left-padded), H query heads, G KV heads, D width of a head, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from remit_megatron.errors import UserError

FAMILIES = ("llama", "olmo2", "smollm3")


@dataclass(frozen=True, slots=True)
class _Layer:
    qkv: Tensor
    out: Tensor
    gate_up: Tensor
    down: Tensor
    q_norm: Tensor | None
    """Of OLMo 2: over all heads together."""
    k_norm: Tensor | None
    attention_norm: Tensor
    mlp_norm: Tensor
    rotates: bool


class CachedDecoder:
    """Draws completions from `model`, a transformers causal language model of one of FAMILIES, with float32 weights.

    Weights are read when `generate` is called, so one decoder serves a model that is being trained. Raises UserError
    for a model that it does not compute.
    """

    def __init__(self, model: Any):
        config = model.config
        kind = config.model_type
        if kind not in FAMILIES or getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False):
            raise UserError(
                f"rl.rollouts = 'cached' computes {', '.join(FAMILIES)} without biases, and this model is a {kind}: "
                "set it to 'transformers' or 'vllm'"
            )
        if {parameter.dtype for parameter in model.parameters()} != {torch.float32}:
            raise UserError("rl.rollouts = 'cached' computes in float32: set it to 'transformers' or 'vllm'")
        self.model = model
        self.norms_output = kind == "olmo2"
        self.eps = config.rms_norm_eps
        self.heads = config.num_attention_heads
        self.groups = config.num_key_value_heads
        self.width = getattr(config, "head_dim", None) or config.hidden_size // self.heads

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        stop_ids: Sequence[int],
        temperature: float,
        generator: torch.Generator | None = None,
    ) -> list[list[int]]:
        """One completion of each prompt (token ids), up to and with the first of stop_ids.

        temperature: 0 takes the most likely token. generator: none: torch's own. Prompts that are equal and follow
        each other are read once.
        """
        owner, unique = _unique(prompts)
        tokens_BP, mask_BP = _pad_left(unique)
        state = _State(self, mask_BP, max_new_tokens)
        logits_BV = state.read_prompts(tokens_BP)
        state.select(torch.tensor(owner))
        logits_BV = logits_BV[owner]
        stops = torch.tensor(sorted(stop_ids))
        found: list[list[int]] = [[] for _ in prompts]
        alive = list(range(len(prompts)))
        for step in range(max_new_tokens):
            drawn_B = draw(logits_BV, temperature, generator)
            for number, token in zip(alive, drawn_B.tolist(), strict=True):
                found[number].append(token)
            going_B = ~torch.isin(drawn_B, stops)
            if step + 1 == max_new_tokens or not going_B.any():
                break
            # Copying the cache costs as much as some steps: completions leave it when a quarter has ended.
            if going_B.sum() <= 0.75 * len(going_B):
                state.select(going_B.nonzero()[:, 0])
                alive = [number for number, goes in zip(alive, going_B.tolist(), strict=True) if goes]
                drawn_B = drawn_B[going_B]
            logits_BV = state.step(drawn_B)
        return [_until(tokens, set(stop_ids)) for tokens in found]


def draw(logits_BV: Tensor, temperature: float, generator: torch.Generator | None = None) -> Tensor:
    """A token of each row, [B] int64, by one uniform number and the inverse of the distribution function.

    The sums are float64: in float32 those of a large vocabulary would lose its rare tokens.
    """
    if temperature == 0:
        return logits_BV.argmax(-1)
    below_BV = torch.softmax(logits_BV / temperature, -1).cumsum(-1, dtype=torch.float64)
    uniform_B1 = torch.rand(len(logits_BV), 1, dtype=torch.float64, generator=generator)
    # Right: at 0 the first token with a probability above 0 is drawn. The last sum is 1 but for round-off.
    drawn_B1 = torch.searchsorted(below_BV, uniform_B1 * below_BV[:, -1:], right=True)
    return drawn_B1[:, 0].clamp_max_(logits_BV.size(1) - 1)


class _State:
    """Keys and values of the sequences so far, and the weights that read them."""

    def __init__(self, decoder: CachedDecoder, mask_BP: Tensor, max_new_tokens: int):
        self.decoder = decoder
        self.layers = [self._read_layer(layer) for layer in decoder.model.model.layers]
        self.length = 0
        self.room = mask_BP.size(1) + max_new_tokens
        self.bias_BT = F.pad(torch.where(mask_BP, 0.0, float("-inf")), (0, max_new_tokens))
        self.prompt_tokens_B = mask_BP.sum(-1)
        self.padding_B = mask_BP.size(1) - self.prompt_tokens_B
        shape = (len(self.layers), mask_BP.size(0), decoder.groups, self.room, decoder.width)
        self.keys_LBGTD, self.values_LBGTD = torch.zeros(shape), torch.zeros(shape)
        # cos and sin of every position, scaled as the model's config says: [T, D].
        every = torch.arange(self.room)[None]
        cos, sin = decoder.model.model.rotary_emb(torch.zeros(1), every)
        half = decoder.width // 2
        self.cos_TD = cos[0].float()
        self.sin_TD = torch.cat((-sin[0, :, :half], sin[0, :, half:]), -1).float()

    def _read_layer(self, layer: Any) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        post = self.decoder.norms_output
        return _Layer(
            qkv=torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]),
            out=attention.o_proj.weight,
            gate_up=torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]),
            down=mlp.down_proj.weight,
            q_norm=attention.q_norm.weight if post else None,
            k_norm=attention.k_norm.weight if post else None,
            attention_norm=(layer.post_attention_layernorm if post else layer.input_layernorm).weight,
            mlp_norm=(layer.post_feedforward_layernorm if post else layer.post_attention_layernorm).weight,
            rotates=bool(getattr(attention, "use_rope", True)),
        )

    def select(self, rows: Tensor) -> None:
        """Keep these sequences, in this order; one may be kept several times."""
        filled = slice(0, self.length)
        for name in ("keys_LBGTD", "values_LBGTD"):
            old = getattr(self, name)
            new = torch.empty(old.size(0), len(rows), *old.shape[2:])
            new[:, :, :, filled] = old[:, rows][:, :, :, filled]
            setattr(self, name, new)
        self.bias_BT, self.padding_B = self.bias_BT[rows], self.padding_B[rows]

    def read_prompts(self, tokens_BP: Tensor) -> Tensor:
        """Logits after each prompt, [B, V]."""
        size = tokens_BP.size(1)
        position_BP = (torch.arange(size) - self.padding_B[:, None]).clamp_min(0)
        causal_PP = torch.full((size, size), float("-inf")).triu(1)
        # A padding position sees itself, so that no row is without anything to attend to.
        bias_BPP = (self.bias_BT[:, None, :size] + causal_PP).masked_fill(torch.eye(size, dtype=torch.bool), 0.0)
        return self._forward(tokens_BP, position_BP, bias_BPP)

    def step(self, tokens_B: Tensor) -> Tensor:
        """Logits after one more token of each sequence, [B, V]."""
        position_B1 = (self.length - self.padding_B)[:, None]
        return self._forward(tokens_B[:, None], position_B1, self.bias_BT[:, None, : self.length + 1])

    def _forward(self, tokens_BS: Tensor, position_BS: Tensor, bias_BST: Tensor) -> Tensor:
        """S tokens of each sequence, put after those that are there; logits after the last one, [B, V]."""
        model, norms_output = self.decoder.model, self.decoder.norms_output
        # Heads come before positions: [B, 1, S, D].
        cos, sin = self.cos_TD[position_BS][:, None], self.sin_TD[position_BS][:, None]
        x = F.embedding(tokens_BS, model.model.embed_tokens.weight)
        for number, layer in enumerate(self.layers):
            if norms_output:
                x = x + self._norm(self._attend(number, layer, x, cos, sin, bias_BST), layer.attention_norm)
                x = x + self._norm(self._mlp(layer, x), layer.mlp_norm)
            else:
                x = x + self._attend(number, layer, self._norm(x, layer.attention_norm), cos, sin, bias_BST)
                x = x + self._mlp(layer, self._norm(x, layer.mlp_norm))
        self.length += tokens_BS.size(1)
        return F.linear(self._norm(x[:, -1], model.model.norm.weight), model.lm_head.weight)

    def _attend(self, number: int, layer: _Layer, x: Tensor, cos: Tensor, sin: Tensor, bias_BST: Tensor) -> Tensor:
        heads, groups, width = self.decoder.heads, self.decoder.groups, self.decoder.width
        size, steps = x.size(0), x.size(1)
        q, k, v = F.linear(x, layer.qkv).split([heads * width, groups * width, groups * width], -1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = self._norm(q, layer.q_norm), self._norm(k, layer.k_norm)
        qk = torch.cat([q, k], -1).view(size, steps, heads + groups, width).transpose(1, 2)
        if layer.rotates:
            # sin carries the sign of the half that it multiplies.
            qk = qk * cos + qk.unflatten(-1, (2, width // 2)).flip(-2).flatten(-2) * sin
        until = self.length + steps
        keys, values = self.keys_LBGTD[number], self.values_LBGTD[number]
        keys[:, :, self.length : until] = qk[:, heads:]
        values[:, :, self.length : until] = v.view(size, steps, groups, width).transpose(1, 2)
        # The query heads of a group are rows of one matrix: [B, G, heads a group x S, D].
        query = qk[:, :heads].reshape(size, groups, -1, width)
        bias = bias_BST[:, None, None].expand(-1, groups, heads // groups, -1, -1).flatten(2, 3)
        scores = torch.matmul(query, keys[:, :, :until].transpose(2, 3)).mul_(width**-0.5).add_(bias)
        mixed = torch.matmul(torch.softmax(scores, -1), values[:, :, :until])
        mixed = mixed.view(size, heads, steps, width).transpose(1, 2).reshape(size, steps, heads * width)
        return F.linear(mixed, layer.out)

    def _mlp(self, layer: _Layer, x: Tensor) -> Tensor:
        gate, up = F.linear(x, layer.gate_up).chunk(2, -1)
        return F.linear(F.silu(gate).mul_(up), layer.down)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (x.size(-1),), weight, self.decoder.eps)


def _unique(prompts: Sequence[Sequence[int]]) -> tuple[list[int], list[Sequence[int]]]:
    """(for each prompt its place among the different ones, those). Only neighbours are compared."""
    owner: list[int] = []
    unique: list[Sequence[int]] = []
    for prompt in prompts:
        if not unique or list(prompt) != list(unique[-1]):
            unique.append(prompt)
        owner.append(len(unique) - 1)
    return owner, unique


def _pad_left(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """(tokens [B, P], which of them are no padding)."""
    size = max(map(len, prompts))
    tokens = torch.tensor([[0] * (size - len(prompt)) + list(prompt) for prompt in prompts])
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    return tokens, torch.arange(size) >= size - lengths[:, None]


def _until(tokens: list[int], stops: set[int]) -> list[int]:
    """What comes after a stop was drawn only because others still ran."""
    end = next((place for place, token in enumerate(tokens) if token in stops), len(tokens))
    return tokens[: end + 1]
