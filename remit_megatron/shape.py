"""What a model is, apart from its weights and its layout: the part of a recipe that a checkpoint carries too."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, model_serializer
from pydantic.functional_serializers import SerializerFunctionWrapHandler

from remit_megatron.config import Model, Parallel
from remit_megatron.errors import UserError

REQUIRED = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "vocab_size")


class Latent(BaseModel):
    """Sizes of multi-head latent attention: queries, and keys with values, pass through a low-rank latent."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    """Width of the rotary part of a head; its key is shared by all heads."""
    v_head_dim: int


class ModelShape(BaseModel):
    """A decoder-only transformer with RMSNorm, SwiGLU, RoPE, grouped-query or latent attention.

    The defaults make the plain one: norm before each sublayer, rotary positions in every layer, no biases.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    """Rows of the embedding without padding: the softmax of the model runs over exactly these."""
    tied_embeddings: bool
    rope_theta: float
    norm_epsilon: float
    family: str = "gpt"
    """Whose Hugging Face names and config the model goes by; `gpt` was never one and is exported as Llama."""
    norm_placement: Literal["pre", "post"] = "pre"
    """`pre`: x + f(norm(x)). `post`: x + norm(f(x)), and no other norm in the layer."""
    qk_norm: Literal["none", "per_head", "full_width"] = "none"
    """RMSNorm of queries and keys before rotation: each head by itself, or all heads of a token together."""
    qkv_bias: bool = False
    no_rope_layers: tuple[int, ...] = ()
    """Layers without positions, counted from 0."""
    rope_llama3_factor: float | None = None
    """Set: long wavelengths of the rotary embedding are stretched by it, as in Llama 3.1 and later."""
    latent: Latent | None = None
    """Set: latent attention; `num_query_groups` is the number of heads and `kv_channels` the width of a query."""

    @model_serializer(mode="wrap")
    def _without_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Traits that a model lacks are left out, so that a shape on disk stays the same when traits are added."""
        fields = type(self).model_fields
        kept = {k: v for k, v in handler(self).items() if fields[k].is_required() or v != fields[k].default}
        # As JSON reads it back, so that the two compare equal.
        return {k: list(v) if isinstance(v, tuple) else v for k, v in kept.items()}

    def attention_parameters(self) -> int:
        """Weights of one layer's attention, its own norms included."""
        h, heads = self.hidden_size, self.num_attention_heads
        if self.latent is not None:
            m = self.latent
            queries = h * m.q_lora_rank + m.q_lora_rank + m.q_lora_rank * heads * self.kv_channels
            down = h * (m.kv_lora_rank + m.qk_rope_head_dim) + m.kv_lora_rank
            up = m.kv_lora_rank * heads * (m.qk_nope_head_dim + m.v_head_dim)
            return queries + down + up + heads * m.v_head_dim * h
        fused = (heads + 2 * self.num_query_groups) * self.kv_channels
        norms = {"none": 0, "per_head": 2, "full_width": heads + self.num_query_groups}[self.qk_norm] * self.kv_channels
        return fused * (h + int(self.qkv_bias)) + heads * self.kv_channels * h + norms

    def num_parameters(self, embedding: bool = True) -> int:
        """Weights of the model; without the input embedding: those that multiply every token."""
        h = self.hidden_size
        layer = self.attention_parameters() + 3 * h * self.ffn_hidden_size + 2 * h
        table = self.vocab_size * h
        tables = table * (1 if self.tied_embeddings or not embedding else 2)
        return self.num_layers * layer + h + tables

    def flops_per_token(self, sequence_length: int) -> float:
        """Floating-point operations of one forward pass over one token, attention not halved for causality."""
        values = self.latent.v_head_dim if self.latent else self.kv_channels
        attention = 2 * self.num_layers * self.num_attention_heads * (self.kv_channels + values) * sequence_length
        return 2 * self.num_parameters(embedding=False) + attention

    def padded_vocab(self, tensor_parallel: int) -> int:
        """Rows after padding to a multiple of the tensor-parallel size."""
        return -(-self.vocab_size // tensor_parallel) * tensor_parallel


def resolve_shape(model: Model, carried: ModelShape | None = None) -> ModelShape:
    """The recipe's shape, completed by the one that the initial checkpoint carries.

    Raises UserError naming a key that is missing, contradicts the checkpoint, or is inconsistent.
    """
    given = {k: v for k, v in model.model_dump().items() if k in ModelShape.model_fields and v is not None}
    source = "the checkpoint of model.init" + (" or model.preset" if model.preset else "")
    if carried is not None:
        for key, value in given.items():
            if value != getattr(carried, key):
                raise UserError(
                    f"model.{key} = {value} contradicts {source}, which has {getattr(carried, key)}: remove the key or "
                    "name another checkpoint"
                )
        return carried
    for key in REQUIRED:
        if key not in given:
            raise UserError(f"missing key model.{key} (or model.init, a checkpoint that carries the shape)")
    if "kv_channels" not in given and given["hidden_size"] % given["num_attention_heads"]:
        raise UserError(
            f"model.hidden_size = {given['hidden_size']} does not divide by model.num_attention_heads = "
            f"{given['num_attention_heads']}: change one of them or set model.kv_channels"
        )
    defaults = {
        "num_query_groups": given["num_attention_heads"],
        "kv_channels": given["hidden_size"] // given["num_attention_heads"],
        "tied_embeddings": False,
        "rope_theta": 10000.0,
        "norm_epsilon": 1e-5,
    }
    shape = ModelShape(**{**defaults, **given})
    if shape.kv_channels % 2:
        raise UserError(f"model.kv_channels = {shape.kv_channels} is odd: rotary embeddings turn pairs of channels")
    if shape.num_attention_heads % shape.num_query_groups:
        raise UserError(
            f"model.num_attention_heads = {shape.num_attention_heads} does not divide by model.num_query_groups = "
            f"{shape.num_query_groups}"
        )
    return shape


def check_layout(shape: ModelShape, parallel: Parallel, who: str) -> None:
    """Raise UserError, naming `who` ('model' or 'reference') and the key, when a layout does not divide the shape."""
    for key in ("num_attention_heads", "num_query_groups", "ffn_hidden_size"):
        if getattr(shape, key) % parallel.tensor:
            raise UserError(
                f"{who}.{key} = {getattr(shape, key)} does not divide by parallel.tensor = {parallel.tensor}"
            )
    if shape.latent is not None:
        key_width = shape.latent.kv_lora_rank + shape.latent.qk_rope_head_dim
        for key, width in (("q_lora_rank", shape.latent.q_lora_rank), ("kv_lora_rank + qk_rope_head_dim", key_width)):
            if width % parallel.tensor:
                raise UserError(f"{who}.{key} = {width} does not divide by parallel.tensor = {parallel.tensor}")
    stages = parallel.pipeline * parallel.virtual_pipeline
    if shape.num_layers % stages:
        raise UserError(
            f"{who}.num_layers = {shape.num_layers} does not divide by parallel.pipeline x virtual_pipeline = {stages}"
        )
