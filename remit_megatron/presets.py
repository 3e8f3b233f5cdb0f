"""Published sizes of the paper's models, so that a run can be planned before its checkpoint is on this machine."""

import difflib

from remit_megatron.config import Recipe
from remit_megatron.errors import UserError
from remit_megatron.shape import Latent, ModelShape, resolve_shape

PRESETS: dict[str, ModelShape] = {
    # allenai/OLMo-2-0425-1B: 1,484,916,736 parameters. The tokenizer has 100,278 tokens; the rows past them are part
    # of the softmax that the model was trained with.
    "olmo2_1b": ModelShape(
        family="olmo2",
        norm_placement="post",
        qk_norm="full_width",
        num_layers=16,
        hidden_size=2048,
        ffn_hidden_size=8192,
        num_attention_heads=16,
        num_query_groups=16,
        kv_channels=128,
        vocab_size=100_352,
        tied_embeddings=False,
        rope_theta=500_000.0,
        norm_epsilon=1e-6,
    ),
    # HuggingFaceTB/SmolLM3-3B: 3,075,098,624 parameters. The RoPE base is that of the 4k stages; later checkpoints
    # have 2e6 and 5e6.
    "smollm3_3b": ModelShape(
        family="smollm3",
        no_rope_layers=tuple(range(3, 36, 4)),
        num_layers=36,
        hidden_size=2048,
        ffn_hidden_size=11_008,
        num_attention_heads=16,
        num_query_groups=4,
        kv_channels=128,
        vocab_size=128_256,
        tied_embeddings=True,
        rope_theta=50_000.0,
        norm_epsilon=1e-6,
    ),
    # tencent/Youtu-LLM-2B: 1.96B parameters.
    "youtu_2b": ModelShape(
        family="youtu",
        latent=Latent(q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128),
        num_layers=32,
        hidden_size=2048,
        ffn_hidden_size=6144,
        num_attention_heads=16,
        num_query_groups=16,
        kv_channels=192,
        vocab_size=128_256,
        tied_embeddings=True,
        rope_theta=1_600_000.0,
        norm_epsilon=1e-6,
    ),
}


def preset_shape(name: str) -> ModelShape:
    """Raises UserError for an unknown name."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(PRESETS)}"
        raise UserError(f"model.preset = '{name}' is unknown; {hint}")
    return PRESETS[name]


def check_preset(name: str, carried: ModelShape) -> None:
    """Raise UserError naming a key in which model.init is not the preset. Its RoPE base may be another."""
    published = preset_shape(name)
    for key in ModelShape.model_fields:
        a, b = getattr(published, key), getattr(carried, key)
        if key != "rope_theta" and a != b:
            raise UserError(f"model.preset = '{name}' has {key} = {a}, the checkpoint of model.init has {b}")


def student_shape(recipe: Recipe, carried: ModelShape | None) -> ModelShape:
    """The student's shape: of its initial checkpoint, else of the preset, else as the recipe gives it."""
    if recipe.model.preset is not None:
        if carried is not None:
            check_preset(recipe.model.preset, carried)
        carried = carried or preset_shape(recipe.model.preset)
    return resolve_shape(recipe.model, carried)
