"""Sampling from a small transformers model on a CPU, where calls cost more than arithmetic.

transformers' `generate` spends most of its time outside of the kernels when a model is small: it builds masks, looks
for stop criteria and dispatches one module after another for every token. Here the forward of the Llama family is
written out over the model's own weights, in float32, with as few calls as possible: projections that read one input are
one matrix, a norm's weight is folded into what reads its output, the scale of the attention into the rotary table.
Keys and values lie in buffers allocated once, a prompt that several completions share is read once, and completions
that have ended leave the batch.

Letters: B sequences, S new tokens of each, N = B x S rows, T tokens so far, H query heads, G KV heads, D width of a
head, V vocabulary.
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
    attention_norm: Tensor | None
    """Of a family that norms a block's output. None: its input is normed, and the weight is in qkv."""
    mlp_norm: Tensor | None
    turn_2THD: Tensor
    """[2, T, H + G, D]: what a head is multiplied by, and the same with its halves exchanged: cos and sin, which has
    the sign of its half, the weight of the head's norm and the scale of the attention."""


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

    @torch.inference_mode()
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
        tokens_BS, lengths_B = _pad_left(unique)
        state = _State(self, lengths_B, tokens_BS.size(1), max_new_tokens)
        logits_BV = state.advance(tokens_BS)[owner]
        state.select(torch.tensor(owner))
        stops_V = torch.zeros(logits_BV.size(1), dtype=torch.bool)
        stops_V[list(stop_ids)] = True
        found = torch.full((len(prompts), max_new_tokens), -1)
        alive_B = torch.arange(len(prompts))
        for step in range(max_new_tokens):
            drawn_B = draw(logits_BV, temperature, generator)
            found[alive_B, step] = drawn_B
            going_B = ~stops_V[drawn_B]
            going = int(going_B.sum())
            if not going or step + 1 == max_new_tokens:
                break
            # To leave means to copy the cache, which costs as much as some steps: a quarter has to have ended.
            if going <= 0.75 * len(going_B):
                rows = going_B.nonzero()[:, 0]
                state.select(rows)
                alive_B, drawn_B = alive_B[rows], drawn_B[rows]
            logits_BV = state.advance(drawn_B[:, None])
        return [_until(tokens, set(stop_ids)) for tokens in found.tolist()]


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

    def __init__(self, decoder: CachedDecoder, lengths_B: Tensor, prompt_size: int, max_new_tokens: int):
        model = decoder.model.model
        self.decoder = decoder
        self.room = prompt_size + max_new_tokens
        self.length = 0
        self.padding_B = prompt_size - lengths_B
        rope = _rotary_table(model.rotary_emb, self.room, decoder.width)
        self.layers = [self._read_layer(layer, *rope) for layer in model.layers]
        self.embedding = model.embed_tokens.weight
        self.head = decoder.model.lm_head.weight * model.norm.weight
        self.eps = torch.tensor(decoder.eps)
        # One look-up a step serves all layers: [T, L, 2, H + G, D].
        self.turns_TL2HD = torch.stack([layer.turn_2THD for layer in self.layers]).permute(2, 0, 1, 3, 4).contiguous()
        padding_BT = torch.arange(self.room) < self.padding_B[:, None]
        self._put_bias(torch.zeros(padding_BT.shape).masked_fill_(padding_BT, float("-inf")))
        shape = (2, len(self.layers), len(lengths_B), decoder.groups, self.room, decoder.width)
        self._put_cache(torch.zeros(shape))

    def _read_layer(self, layer: Any, cos_TD: Tensor, sin_TD: Tensor) -> _Layer:
        attention, mlp, decoder = layer.self_attn, layer.mlp, self.decoder
        heads, groups, width = decoder.heads, decoder.groups, decoder.width
        qkv = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
        gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
        scale_HD = torch.ones(heads + groups, width)
        if decoder.norms_output:
            scale_HD = torch.cat([attention.q_norm.weight, attention.k_norm.weight]).view_as(scale_HD).clone()
        else:
            qkv = qkv * layer.input_layernorm.weight
            gate_up = gate_up * layer.post_attention_layernorm.weight
        exchanged_HD = scale_HD.roll(width // 2, -1)
        for scale in (scale_HD, exchanged_HD):
            scale[:heads] *= width**-0.5
        if not getattr(attention, "use_rope", True):
            cos_TD, sin_TD = torch.ones_like(cos_TD), torch.zeros_like(sin_TD)
        return _Layer(
            qkv=qkv.t().contiguous(),
            out=attention.o_proj.weight.t(),
            gate_up=gate_up.t().contiguous(),
            down=mlp.down_proj.weight.t(),
            attention_norm=layer.post_attention_layernorm.weight if decoder.norms_output else None,
            mlp_norm=layer.post_feedforward_layernorm.weight if decoder.norms_output else None,
            turn_2THD=torch.stack([cos_TD[:, None] * scale_HD, sin_TD[:, None] * exchanged_HD]),
        )

    def _put_cache(self, cache_2LBGTD: Tensor) -> None:
        """Keys and values, and the view of each layer's that is multiplied with, [B x G, T, D]."""
        self.cache_2LBGTD = cache_2LBGTD
        self.keys, self.values = (list(part.flatten(1, 2).unbind()) for part in cache_2LBGTD.unbind())

    def select(self, rows: Tensor) -> None:
        """Keep these sequences, in this order; one may be kept several times."""
        old = self.cache_2LBGTD
        new = torch.empty(*old.shape[:2], len(rows), *old.shape[3:])
        new[..., : self.length, :] = old[..., : self.length, :][:, :, rows]
        self._put_cache(new)
        self.padding_B = self.padding_B[rows]
        self._put_bias(self.bias_BT[rows])

    def _put_bias(self, bias_BT: Tensor) -> None:
        """What keeps queries from the padding, and the same for each group, [B x G, 1, T]."""
        self.bias_BT = bias_BT
        self.bias_of_groups = bias_BT.repeat_interleave(self.decoder.groups, 0)[:, None]

    def advance(self, tokens_BS: Tensor) -> Tensor:
        """Put S tokens after each sequence; the logits after the last of them, [B, V]."""
        size, steps = tokens_BS.shape
        until = self.length + steps
        if steps == 1:
            place_N = self.length - self.padding_B
        else:
            place_N = (torch.arange(self.length, until) - self.padding_B[:, None]).clamp_min_(0).flatten()
        turns = self.turns_TL2HD[place_N].unbind(1)
        bias = self._bias(steps, until)
        x = self.embedding[tokens_BS.flatten()]
        for number, layer in enumerate(self.layers):
            mixed = self._attend(number, layer, x, turns[number], bias, size)
            if layer.attention_norm is None or layer.mlp_norm is None:
                x = torch.addmm(x, mixed, layer.out)
                x = torch.addmm(x, self._gated(layer, x * self._inverse_rms(x)), layer.down)
            else:
                y = torch.mm(mixed, layer.out)
                x = torch.addcmul(x, y.mul_(self._inverse_rms(y)), layer.attention_norm)
                y = torch.mm(self._gated(layer, x), layer.down)
                x = torch.addcmul(x, y.mul_(self._inverse_rms(y)), layer.mlp_norm)
        self.length = until
        last = x.view(size, steps, -1)[:, -1]
        return F.linear(last * self._inverse_rms(last), self.head)

    def _bias(self, steps: int, until: int) -> Tensor:
        """Added to the scores: [B x G, 1 or rows, T], minus infinity where a query must not look."""
        groups = self.decoder.groups
        if steps == 1:
            return self.bias_of_groups[:, :, :until]
        causal_ST = torch.full((steps, until), float("-inf")).triu_(1 + self.length)
        # A padding position sees itself, so that no row is without anything to attend to.
        own_ST = torch.eye(steps, until, dtype=torch.bool)
        bias = (self.bias_BT[:, None, :until] + causal_ST).masked_fill_(own_ST, 0.0)
        per_group = self.decoder.heads // groups
        return bias[:, None, :, None].expand(-1, groups, -1, per_group, -1).reshape(-1, steps * per_group, until)

    def _attend(self, number: int, layer: _Layer, x: Tensor, turn_N2HD: Tensor, bias: Tensor, size: int) -> Tensor:
        """What the heads gather, [N, H x D]."""
        heads, groups, width = self.decoder.heads, self.decoder.groups, self.decoder.width
        steps, both = len(x) // size, heads + groups
        until = self.length + steps
        if layer.attention_norm is None:
            qkv = torch.mm(x * self._inverse_rms(x), layer.qkv).view(-1, both + groups, width)
            qk, v = qkv[:, :both], qkv[:, both:]
        else:
            qk, v = torch.mm(x, layer.qkv).view(-1, both + groups, width).split([both, groups], 1)
            qk = self._norm_heads(qk)
        cos, sin = turn_N2HD.unbind(1)
        exchanged = qk.unflatten(-1, (2, width // 2)).flip(-2).view(-1, both, width)
        turned = torch.mul(qk, cos).addcmul_(exchanged, sin)
        keys, values = self.keys[number], self.values[number]
        if steps == 1:
            # Rows of a group's matrix are its query heads.
            keys[:, self.length] = turned[:, heads:].reshape(-1, width)
            values[:, self.length] = v.reshape(-1, width)
            query = turned[:, :heads].reshape(size * groups, -1, width)
        else:
            # For each new token.
            keys[:, self.length : until] = _by_group(turned[:, heads:], size, groups)
            values[:, self.length : until] = _by_group(v, size, groups)
            query = _by_group(turned[:, :heads], size, groups)
        scores = torch.baddbmm(bias, query, keys[:, :until].transpose(1, 2))
        mixed = torch.bmm(torch.softmax(scores, -1), values[:, :until])
        if steps > 1:
            mixed = mixed.view(size, groups, steps, -1, width).transpose(1, 2)
        return mixed.reshape(-1, heads * width)

    def _norm_heads(self, qk: Tensor) -> Tensor:
        """Query and key of each row, each divided by its root mean square over all heads, [N, H + G, D]."""
        heads, groups = self.decoder.heads, self.decoder.groups
        if heads == groups:
            both = qk.reshape(len(qk), 2, -1)
            return (both * self._inverse_rms(both)).view_as(qk)
        q, k = (part.flatten(1) for part in qk.split([heads, groups], 1))
        return torch.cat([q * self._inverse_rms(q), k * self._inverse_rms(k)], -1).view_as(qk)

    def _gated(self, layer: _Layer, x: Tensor) -> Tensor:
        gate, up = torch.mm(x, layer.gate_up).chunk(2, -1)
        return F.silu(gate).mul_(up)

    def _inverse_rms(self, x: Tensor) -> Tensor:
        """[N, 1]"""
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return torch.addcmul(self.eps, norm, norm, value=1 / x.size(-1)).rsqrt_()


def _by_group(rows: Tensor, size: int, groups: int) -> Tensor:
    """[N, heads, D] to [B x G, S x heads a group, D]."""
    width = rows.size(-1)
    by_head = rows.reshape(size, -1, groups, rows.size(1) // groups, width)
    return by_head.transpose(1, 2).reshape(size * groups, -1, width)


def _rotary_table(rotary: Any, room: int, width: int) -> tuple[Tensor, Tensor]:
    """(cos, sin) of each position, scaled as the model's config says, [T, D]; sin with the sign of its half."""
    cos, sin = rotary(torch.zeros(1), torch.arange(room)[None])
    half = width // 2
    return cos[0].float(), torch.cat((-sin[0, :, :half], sin[0, :, half:]), -1).float()


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
    """(tokens [B, S], how many of each are no padding [B])."""
    size = max(map(len, prompts))
    tokens = torch.tensor([[0] * (size - len(prompt)) + list(prompt) for prompt in prompts])
    return tokens, torch.tensor([len(prompt) for prompt in prompts])


def _until(tokens: list[int], stops: set[int]) -> list[int]:
    """What comes after a stop was drawn only because others still ran; -1 was not drawn."""
    end = next((place for place, token in enumerate(tokens) if token in stops), len(tokens))
    return tokens[: end + 1]
