"""`remit plan`: what a recipe needs on so many GPUs, in memory and time, before any of them is asked for.

Weights, gradients and optimizer states are counted; activations are estimated from the tensors that autograd keeps.
What Megatron, NCCL and the allocator take besides (1 to 4 GB a GPU) is not in the sum.
"""

from dataclasses import dataclass
from pathlib import Path

from remit_megatron import flops
from remit_megatron.config import Parallel, Recipe
from remit_megatron.data.tokenizer import tokenizer_hash
from remit_megatron.errors import UserError
from remit_megatron.fit import check_fit, num_microbatches
from remit_megatron.hf.config import read_json
from remit_megatron.hf.folder import is_hf_folder
from remit_megatron.hf.mapping import read_shape
from remit_megatron.hf.tokenizer import has_tokenizer
from remit_megatron.presets import student_shape
from remit_megatron.run.build_plan import check_pair
from remit_megatron.run.checkpoint import BYTES_PER_PARAMETER, Meta, read_meta, resolve_checkpoint
from remit_megatron.shape import ModelShape

GB = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMemory:
    """Bytes on one GPU of a pipeline stage."""

    weights: float
    gradients: float
    optimizer: float
    reference: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        return sum(getattr(self, name) for name in self.__slots__)


def stage_parameters(shape: ModelShape, parallel: Parallel, stage: int) -> int:
    """Parameters that a rank of pipeline stage `stage` holds: exactly, whatever its tensor-parallel rank."""
    tp, h = parallel.tensor, shape.hidden_size
    layer = _sharded_attention(shape) // tp + _whole_attention(shape) + 3 * h * shape.ffn_hidden_size // tp + 2 * h
    total = shape.num_layers // parallel.pipeline * layer
    table = shape.padded_vocab(tp) // tp * h
    first, last = stage == 0, stage == parallel.pipeline - 1
    # The last stage holds a copy of a tied table where the first one is elsewhere.
    total += table if first or last else 0
    total += table if first and last and not shape.tied_embeddings else 0
    return total + (h if last else 0)


def _whole_attention(shape: ModelShape) -> int:
    """Of one layer's attention, what every tensor-parallel rank holds whole: down projections and their norms."""
    if shape.latent is None:
        return 2 * shape.kv_channels if shape.qk_norm == "per_head" else 0
    m = shape.latent
    return shape.hidden_size * (m.q_lora_rank + m.kv_lora_rank + m.qk_rope_head_dim) + m.q_lora_rank + m.kv_lora_rank


def _sharded_attention(shape: ModelShape) -> int:
    return shape.attention_parameters() - _whole_attention(shape)


def layer_activation_bytes(shape: ModelShape, parallel: Parallel, element_bytes: int, fused: bool = True) -> int:
    """Bytes that one layer keeps for backward for a token on one rank, without recomputation.

    fused: norms and SwiGLU are one kernel each, as on CUDA; on the CPU they keep what is between their operations.
    """
    tp = parallel.tensor
    rows = tp if parallel.sequence else 1
    heads, groups, width = shape.num_attention_heads, shape.num_query_groups, shape.kv_channels
    if shape.latent is None:
        # The fused projection, which the value is a view of; rotated query and key; output; the QK norms' inputs.
        attention = (heads + 2 * groups + heads + groups + heads) * width
        attention += (heads + groups) * width if shape.qk_norm != "none" else 0
        latents = 0
    else:
        m = shape.latent
        attention = heads * (2 * width + 2 * m.v_head_dim)
        latents = (2 if fused else 3) * (m.q_lora_rank + m.kv_lora_rank) + m.qk_rope_head_dim
    # The sublayers' inputs before and after the norm. After it, ranks keep their slice and gather it again.
    residual = (4 if fused else 6) * shape.hidden_size
    feed_forward = (3 if fused else 5) * shape.ffn_hidden_size
    return element_bytes * ((residual + latents) // rows + (attention + feed_forward) // tp)


def stage_memory(
    recipe: Recipe, shape: ModelShape, reference: ModelShape | None, stage: int, num_gpus: int
) -> StageMemory:
    """Estimate for a GPU of a pipeline stage."""
    p = recipe.parallel
    wide = recipe.compute.precision == "fp32"
    element = 4 if wide else 2
    parameters = stage_parameters(shape, p, stage)
    # Beside bf16 weights AdamW keeps a float32 copy and two moments; float32 weights are their own copy.
    states = parameters * (8 if wide else 12)
    shards = num_gpus // (p.tensor * p.pipeline) if p.distributed_optimizer else 1
    samples = recipe.batch.microbatch_samples
    tokens = recipe.data.sequence_length * samples // p.context
    last = stage == p.pipeline - 1
    columns = shape.padded_vocab(p.tensor) // p.tensor
    logits = tokens * columns * element if last else 0
    if last and recipe.compute.loss_head == "sequence_chunks":
        logits //= samples
    if last and recipe.reference and reference:
        logits = max(logits, min(tokens, recipe.reference.head_chunk_tokens) * columns * element)
    return StageMemory(
        weights=parameters * element,
        gradients=parameters * 4,
        optimizer=states / shards,
        reference=stage_parameters(reference, p, stage) * element if reference else 0,
        activations=_activation_bytes(recipe, shape, stage, tokens, element, num_gpus),
        logits=logits,
    )


def _activation_bytes(recipe: Recipe, shape: ModelShape, stage: int, tokens: int, element: int, num_gpus: int) -> float:
    p = recipe.parallel
    layers = shape.num_layers // p.pipeline
    # A stage has at most as many microbatches in flight as there are stages from it to the end, and a round more of
    # its first chunks where stages are interleaved.
    flight = min(p.pipeline - stage, num_microbatches(recipe, num_gpus))
    interleaved = 1 + (p.pipeline - 1) / (p.pipeline * p.virtual_pipeline) if p.virtual_pipeline > 1 else 1
    one = layer_activation_bytes(shape, p, element) * tokens
    if recipe.compute.recompute == "full":
        kept = shape.hidden_size // (p.tensor if p.sequence else 1) * element * tokens
        return kept * layers * flight * interleaved + one
    return one * layers * flight * interleaved


def step_flops(recipe: Recipe, shape: ModelShape, reference: ModelShape | None) -> float:
    """Floating-point operations of one step: forward, backward, the reference's forward, and what is recomputed."""
    length = recipe.data.sequence_length
    per_token = flops.training_flops_per_token(shape, reference, length)
    if recipe.compute.recompute == "full":
        per_token += shape.flops_per_token(length)
    return per_token * recipe.batch.global_batch_tokens


def plan(recipe: Recipe, num_gpus: int, gpu: str = "H100", mfu: float = 0.4) -> str:
    """The report. gpu: a name of PEAK_DENSE_BF16. mfu: share of its peak that training is taken to reach.

    Raises UserError for a layout that does not divide, an unknown GPU, and a model whose sizes nothing gives.
    """
    if gpu not in flops.PEAK_DENSE_BF16:
        raise UserError(f"--gpu {gpu} is unknown; known: {', '.join(flops.PEAK_DENSE_BF16)}")
    if not 0 < mfu <= 1:
        raise UserError(f"--mfu {mfu:g} is no share between 0 and 1")
    init = _known(recipe.model.init, "model.init", recipe.model.vocab_size)
    shape = student_shape(recipe, init.model_shape() if init else None)
    reference, assumed = None, ""
    if recipe.reference is not None:
        known = _known(recipe.reference.path, "reference.path", recipe.model.vocab_size)
        reference = known.model_shape() if known else shape
        if known is None:
            assumed = " (not on this machine: taken to be of the student's size)"
        elif init or recipe.model.init is None:
            check_pair(recipe, shape, init, known)
    count = check_fit(recipe, shape, reference, device_type="cuda", num_ranks=num_gpus)
    p = recipe.parallel
    data = num_gpus // (p.tensor * p.pipeline * p.context)
    lines = [
        f"{recipe.run}: objective {recipe.objective.name}, {recipe.train_steps:,} steps of "
        f"{recipe.batch.global_batch_tokens:,} tokens",
        f"model      {shape.num_parameters() / 1e9:.3f}B parameters",
    ]
    if reference:
        lines.append(f"reference  {reference.num_parameters() / 1e9:.3f}B parameters{assumed}")
    lines.append(
        f"layout     {num_gpus} GPUs: tensor {p.tensor}{' + sequence' if p.sequence else ''}, pipeline {p.pipeline} x "
        f"{p.virtual_pipeline}, context {p.context}, data {data}; {count} microbatches of "
        f"{recipe.batch.microbatch_samples} x {recipe.data.sequence_length} tokens"
    )
    lines += _memory_table(recipe, shape, reference, num_gpus)
    lines += ["", _disk(recipe, shape)]
    lines += _time(recipe, shape, reference, num_gpus, gpu, mfu)
    return "\n".join(lines)


def _known(path: str | None, key: str, vocab_size: int | None) -> Meta | None:
    """Shape and tokenizer of a model that is on this machine, no weights read; None of one that is not."""
    if path is None or not Path(path).exists():
        return None
    if not is_hf_folder(path):
        return read_meta(resolve_checkpoint(path, key), vocab_size)
    shape = read_shape(read_json(Path(path) / "config.json"), Path(path) / "config.json")
    return Meta(shape=shape.model_dump(), tokenizer=tokenizer_hash(path) if has_tokenizer(Path(path)) else None)


def _memory_table(recipe: Recipe, shape: ModelShape, reference: ModelShape | None, num_gpus: int) -> list[str]:
    names = StageMemory.__slots__
    lines = ["", f"GB a GPU   {' '.join(f'{name:>11}' for name in (*names, 'sum'))}"]
    last = recipe.parallel.pipeline - 1
    for stage in sorted({0, last}):
        memory = stage_memory(recipe, shape, reference, stage, num_gpus)
        cells = [getattr(memory, name) / GB for name in names] + [memory.total / GB]
        lines.append(f"stage {stage:<4} {' '.join(f'{cell:11.2f}' for cell in cells)}")
    return lines


def _disk(recipe: Recipe, shape: ModelShape) -> str:
    """Of the checkpoints that are there at the end; one more is while the newest is written."""
    one = shape.num_parameters() * BYTES_PER_PARAMETER / GB
    newest, kept = recipe.checkpoint.keep, recipe.kept_checkpoints
    text = f"disk       {one:.2f} GB a checkpoint; the newest {newest} stay"
    if kept:
        text += f", and {kept} more (checkpoint.keep_every_tokens)"
    return f"{text}: {(newest + kept) * one:,.1f} GB"


def _time(
    recipe: Recipe, shape: ModelShape, reference: ModelShape | None, num_gpus: int, gpu: str, mfu: float
) -> list[str]:
    total = step_flops(recipe, shape, reference)
    seconds = total / (num_gpus * flops.PEAK_DENSE_BF16[gpu] * mfu)
    days = seconds * recipe.train_steps / 86400
    return [
        "",
        f"time       {total:.3g} FLOP a step; at {mfu:.0%} of the {gpu}'s {flops.PEAK_DENSE_BF16[gpu] / 1e12:.0f} "
        f"TFLOP/s: {seconds:.2f} s a step, {recipe.batch.global_batch_tokens / seconds:,.0f} tokens/s, {days:.2f} days",
    ]
