"""Youtu-LLM: dense, multi-head latent attention as DeepSeek's, plain rotary positions."""

from remit_megatron.errors import UserError
from remit_megatron.hf.config import Fields
from remit_megatron.hf.mapping.base import MLP, PRE_NORMS, Family, Names, decoder_fields
from remit_megatron.shape import Latent, ModelShape


def read(config: Fields) -> ModelShape:
    # Megatron's latent attention rotates neighbouring columns, which is what true stands for.
    config.expect("rope_interleave", True, "a rotary embedding that is not interleaved")
    if config.take("q_lora_rank") is None:
        raise UserError(f"{config.where}: q_lora_rank = null: latent attention with whole queries is not supported")
    latent = Latent(
        q_lora_rank=config.size("q_lora_rank"),
        kv_lora_rank=config.size("kv_lora_rank"),
        qk_nope_head_dim=config.size("qk_nope_head_dim"),
        qk_rope_head_dim=config.size("qk_rope_head_dim"),
        v_head_dim=config.size("v_head_dim"),
    )
    width = latent.qk_nope_head_dim + latent.qk_rope_head_dim
    config.expect("qk_head_dim", width, "a query of another width than qk_nope_head_dim + qk_rope_head_dim")
    config.expect("head_dim", latent.qk_rope_head_dim, "a rotary width other than qk_rope_head_dim")
    fields = decoder_fields(config, tied_default=True, head_width=width)
    if fields["rope_llama3_factor"]:
        raise UserError(f"{config.where}: RoPE scaling 'llama3' in latent attention is not supported")
    if fields["num_query_groups"] != fields["num_attention_heads"]:
        raise UserError(f"{config.where}: num_key_value_heads must equal num_attention_heads in latent attention")
    return ModelShape(family="youtu", latent=latent, **fields)


LATENT_ATTENTION: Names = {
    "self_attention.linear_q_down_proj.weight": ("self_attn.q_a_proj.weight",),
    "self_attention.q_layernorm.weight": ("self_attn.q_a_layernorm.weight",),
    "self_attention.linear_q_up_proj.weight": ("self_attn.q_b_proj.weight",),
    "self_attention.linear_kv_down_proj.weight": ("self_attn.kv_a_proj_with_mqa.weight",),
    "self_attention.kv_layernorm.weight": ("self_attn.kv_a_layernorm.weight",),
    "self_attention.linear_kv_up_proj.weight": ("self_attn.kv_b_proj.weight",),
    "self_attention.linear_proj.weight": ("self_attn.o_proj.weight",),
}
FAMILY = Family(
    name="youtu",
    former_name="youtu_llm",
    architecture="YoutuForCausalLM",
    read=read,
    layer=PRE_NORMS | LATENT_ATTENTION | MLP,
)
