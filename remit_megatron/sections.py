"""Sections of a recipe: keys, types, defaults and ranges. What several sections have to agree on is in `config`."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from remit_megatron.ops.choices import Implementation

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    LATER: ClassVar[frozenset[str]] = frozenset()
    """Fields that runs and stages existed without: at their defaults they are no part of an identity."""


def without_later(section: Section, content: dict[str, Any]) -> dict[str, Any]:
    """The section as `model_dump` gives it, in whole or in part, but for fields of LATER that have their defaults."""
    found = {}
    for name, dumped in content.items():
        value, field = getattr(section, name), type(section).model_fields[name]
        if name not in section.LATER or value != field.get_default(call_default_factory=True):
            found[name] = _inner(value, dumped)
    return found


def _inner(value: Any, dumped: Any) -> Any:
    if isinstance(value, Section):
        return without_later(value, dumped)
    if isinstance(value, tuple):
        return [_inner(*pair) for pair in zip(value, dumped, strict=True)]
    return dumped


class Model(Section):
    """The student. Shapes may be left out where `init` names a checkpoint, which carries its own."""

    init: str | None = None
    """Initial weights: a checkpoint folder, a run folder (its latest), or a Hugging Face folder; none: random."""
    preset: str | None = None
    """Published sizes by name: `olmo2_1b`, `smollm3_3b`, `youtu_2b`. What `init` has must agree with them."""
    num_layers: Positive | None = None
    hidden_size: Positive | None = None
    ffn_hidden_size: Positive | None = None
    num_attention_heads: Positive | None = None
    num_query_groups: Positive | None = None
    """KV heads (GQA); default: num_attention_heads."""
    kv_channels: Positive | None = None
    """Width of a head; default: hidden_size / num_attention_heads."""
    vocab_size: Positive | None = None
    """Rows of the embedding, exactly; padding for tensor parallelism is added and masked by the program."""
    tied_embeddings: bool | None = None
    """Share the input embedding and the output head; default false."""
    rope_theta: float | None = Field(None, gt=0)
    """Base of the rotary embedding; default 10000."""
    norm_epsilon: float | None = Field(None, gt=0)
    """Default 1e-5."""
    init_std: float = Field(0.02, gt=0)
    implementation: Literal["local", "transformer_engine"] = "local"
    """Layer spec. `transformer_engine` fails at start where it is not installed."""


class Source(Section):
    path: str
    """Prefix of a .bin/.idx pair."""
    weight: float = Field(1.0, gt=0)
    """Share of samples, relative to the other sources."""


class Data(Section):
    sequence_length: Positive
    train: tuple[Source, ...] = Field(min_length=1)
    eval: dict[str, str] = {}
    """Held-out sets: name to prefix of a .bin/.idx pair."""
    seed: NonNegative = Field(1234, lt=1 << 32)
    """Order of documents and samples, of 32 bits; `seed` of the recipe is for the initial weights only."""
    eod_id: NonNegative | None = None
    """Token that ends a document; default: the manifest's. Needed by document centring, masks and resets."""
    document_mask: bool = False
    """Attention stays inside a document. Positions still run over the whole sample."""
    eod_mask_loss: bool = False
    """No loss where the input is the EOD token: the first token of a document is not predicted from the one before."""
    cache_dir: str | None = None
    """Where sample indices are kept; default: a folder `.index` beside each dataset."""
    loader: Literal["default", "dali"] = "default"
    """`default` assembles steps ahead in a thread; `dali` runs them through NVIDIA DALI. Both give the same tensors."""
    prefetch_steps: Positive = 2
    """Steps that are assembled ahead."""
    tokenizer: str | None = None
    """tokenizer.json, or a folder with one, that the datasets must have been made with."""

    @field_validator("train", mode="before")
    @classmethod
    def _lists_are_tuples(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value


class Parallel(Section):
    tensor: Positive = 1
    sequence: bool = False
    """Shard norms and residuals over the tensor-parallel ranks along the sequence."""
    pipeline: Positive = 1
    virtual_pipeline: Positive = 1
    """Model chunks on each pipeline rank."""
    context: Positive = 1
    distributed_optimizer: bool = True
    """Shard optimizer states over data-parallel ranks."""
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False


class Queue(Section):
    """A scorer, `remit score RECIPE --follow`, runs ahead of the run and leaves each step's scores in a folder."""

    folder: str | None = None
    """On a file system that run and scorer share; default: `queue` in the run's folder."""
    ahead_steps: Positive = 8
    """Steps that the scorer may be ahead. So many lie in the folder, 4 bytes a token; the scorer removes used ones."""
    timeout_s: float = Field(60.0, ge=1)
    """A scorer that has not moved for so long counts as gone. Reading files late, a shared file system adds to it; with
    fallback = "stop" it also has to cover the scorer's start."""
    fallback: Literal["online", "stop"] = "online"
    """Without a scorer the run scores online until one comes back. `stop`: the reference is not loaded, and the run
    stops when it has waited for `timeout_s`."""
    parallel: Parallel | None = None
    """Layout of the scorer; default: the run's."""
    microbatch_samples: Positive | None = None
    """Of the scorer; default: the run's."""


class Reference(Section):
    """The frozen model whose confidence weights the tokens."""

    path: str
    """Checkpoint, run or Hugging Face folder, as `model.init`. It may differ from the student in width and depth."""
    head_chunk_tokens: Positive = 2048
    """Tokens whose reference logits exist at one time."""
    merge_microbatches: Positive = 1
    """Microbatches that the reference scores in one pass."""
    precision: Literal["same", "fp8"] = "same"
    """`fp8`: the layers' linears multiply in 8 bits. What that does to scores and weights is measured at the start."""
    allow_added_tokens: bool = False
    """Accept a reference whose tokenizer has other added tokens than the student's: ids differ where a text spells one.
    """
    cuda_graph: bool = False
    """Replay the reference's pass as a CUDA graph, checked against the pass itself at the start and every 200 passes.
    For one GPU a model (no tensor, pipeline or context parallelism). Its activations stay allocated."""
    distribution: NonNegative = 0
    """Above 0: of the reference's distribution so many most probable tokens are kept, the mass of all others and the
    entropy, at the objective's temperature: by `remit score`, on disk and beside the run, and online too. 0: the
    label's score alone is kept, and an objective that compares distributions has them whole, online."""
    scores: str | None = None
    """Folder of scores made by `remit score`, read in place of running the model."""
    check_samples: NonNegative = 4
    """Samples that are scored again at the start, to compare with `scores`. 0: the model is not loaded at all."""
    write_scores: str | None = None
    """Folder that keeps the scores made online, rounded; samples that are scored already are read from it."""
    round_scores: bool = False
    """Round scores made online to the steps in which `remit score` stores them."""

    queue: Queue | None = None
    """Scores made beside the run by a scorer of its own."""

    @property
    def rounds(self) -> bool:
        """Whether the scores that weights are made of are rounded."""
        return self.round_scores or self.scores is not None or self.write_scores is not None


class Batch(Section):
    global_batch_tokens: Positive
    microbatch_samples: Positive = 1


class Optimizer(Section):
    peak_lr: float = Field(gt=0)
    min_lr: float = Field(1e-7, ge=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    epsilon: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    clip_grad_norm: float = Field(1.0, ge=0)
    """0: no clipping."""
    max_bad_steps: Positive = 5
    """The run stops after so many steps in a row whose gradient norm is not finite; each of them is skipped."""


class Schedule(Section):
    train_tokens: Positive
    warmup_tokens: NonNegative = 0
    decay: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    wsd_decay_tokens: Positive | None = None
    """Length of the final decay of `wsd`."""
    wsd_shape: Literal["linear", "cosine", "minus_sqrt"] = "linear"

    @model_validator(mode="after")
    def _consistent(self) -> "Schedule":
        if self.warmup_tokens >= self.train_tokens:
            raise ValueError("warmup_tokens must be smaller than train_tokens")
        if (self.decay == "wsd") != (self.wsd_decay_tokens is not None):
            raise ValueError("wsd_decay_tokens goes with decay = 'wsd', and only with it")
        if self.wsd_decay_tokens and self.wsd_decay_tokens + self.warmup_tokens > self.train_tokens:
            raise ValueError("warmup_tokens + wsd_decay_tokens must not exceed train_tokens")
        return self


class Compute(Section):
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """bf16 keeps float32 master weights and reduces gradients in float32. auto: bf16 on CUDA, fp32 on CPU."""
    recompute: Literal["none", "full"] = "none"
    """`full` keeps one activation a layer and computes the rest again in backward."""
    loss_implementation: Implementation = "auto"
    """Of the token NLL and of FP8 rounding; `remit doctor` says what auto is here."""
    loss_head: Literal["logits", "sequence_chunks"] = "logits"
    """`sequence_chunks` forms the student's logits one sample at a time, so [s, b, V] never exists: for long contexts.
    Its gradients are formed in forward, and the head's is rounded once a sample."""
    threads: Positive | None = None
    """CPU threads a rank; default: the machine's cores over its local ranks."""
    collective_timeout_s: Positive = 3600
    """Of torch's own. On CUDA it aborts the process without more, so the watchdog's limits are to be shorter."""


class Evaluation(Section):
    every_steps: NonNegative = 0
    """0: at the end only."""
    samples: Positive = 64
    """Of each held-out set, at most."""


class Checkpoint(Section):
    every_steps: NonNegative = 0
    """0: at the end, and when asked to stop, only."""
    keep: Positive = 2
    """Newest checkpoints that stay; older ones are removed once a newer one is complete."""
    keep_every_tokens: NonNegative = 0
    """One is also saved at the first step that reaches each multiple of so many tokens, and stays: for `remit benchmark
    --kept`. `keep` does not count these. 0: none."""
    asynchronous: bool = False
    """Write in a background process while training goes on."""


class Watchdog(Section):
    """A run that makes no progress is ended with exit code 86, after every rank has written its stacks."""

    step_timeout_s: NonNegative = 600
    """A step may take so long. 0: no watchdog."""
    slow_timeout_s: Positive = 1800
    """Until the first step is complete, in an evaluation, in a checkpoint and at the end: so long, each time."""


class Logging(Section):
    every_steps: Positive = 1
    """Progress lines and external loggers; metrics.jsonl always has every step."""
    tensorboard: bool = False
    wandb: Literal["off", "offline", "online"] = "off"
    wandb_project: str = "remit"
    tokens_every_steps: NonNegative = 0
    """NLL, reference and weight of each token of a few held-out samples go to `tokens/` of the run folder as Parquet,
    and a histogram of the weights to the loggers. 0: never."""
    tokens_samples: Positive = 4
    """The first so many samples."""
    tokens_source: str | None = None
    """Name of the held-out set in data.eval; default: the first."""
