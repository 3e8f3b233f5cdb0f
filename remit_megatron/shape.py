"""What a model is, apart from its weights and its layout: the part of a recipe that a checkpoint carries too."""

from pydantic import BaseModel, ConfigDict

from remit_megatron.config import Model, Parallel
from remit_megatron.errors import UserError

REQUIRED = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "vocab_size")


class ModelShape(BaseModel):
    """A decoder-only transformer: RMSNorm before each sublayer, SwiGLU, RoPE, grouped-query attention, no biases."""

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

    def num_parameters(self, embedding: bool = True) -> int:
        """Weights of the model; without the input embedding: those that multiply every token."""
        h, f = self.hidden_size, self.ffn_hidden_size
        heads = (self.num_attention_heads + 2 * self.num_query_groups) * self.kv_channels * h
        layer = heads + self.num_attention_heads * self.kv_channels * h + 3 * h * f + 2 * h
        table = self.vocab_size * h
        tables = table * (1 if self.tied_embeddings or not embedding else 2)
        return self.num_layers * layer + h + tables

    def flops_per_token(self, sequence_length: int) -> float:
        """Floating-point operations of one forward pass over one token, attention not halved for causality."""
        attention = 4 * self.num_layers * self.num_attention_heads * self.kv_channels * sequence_length
        return 2 * self.num_parameters(embedding=False) + attention

    def padded_vocab(self, tensor_parallel: int) -> int:
        """Rows after padding to a multiple of the tensor-parallel size."""
        return -(-self.vocab_size // tensor_parallel) * tensor_parallel


def resolve_shape(model: Model, carried: ModelShape | None = None) -> ModelShape:
    """The recipe's shape, completed by the one that the initial checkpoint carries.

    Raises UserError naming a key that is missing, contradicts the checkpoint, or is inconsistent.
    """
    given = {k: v for k, v in model.model_dump().items() if k in ModelShape.model_fields and v is not None}
    if carried is not None:
        for key, value in given.items():
            if value != getattr(carried, key):
                raise UserError(
                    f"model.{key} = {value} contradicts the checkpoint of model.init, which has {getattr(carried, key)}: "
                    "remove the key or name another checkpoint"
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
    stages = parallel.pipeline * parallel.virtual_pipeline
    if shape.num_layers % stages:
        raise UserError(
            f"{who}.num_layers = {shape.num_layers} does not divide by parallel.pipeline x virtual_pipeline = {stages}"
        )
