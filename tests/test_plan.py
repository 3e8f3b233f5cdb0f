"""Every recipe in the repository loads and can be planned, and the plan's arithmetic and refusals."""

from pathlib import Path

import pytest

from remit_megatron.cli import main
from remit_megatron.config import Recipe, load_recipe, parse_recipe
from remit_megatron.errors import UserError
from remit_megatron.fit import num_microbatches
from remit_megatron.plan import plan, stage_memory, stage_parameters, step_flops
from remit_megatron.presets import PRESETS, check_preset

RECIPES = sorted((Path(__file__).parents[1] / "launch" / "recipes").glob("*.toml"))
PAPER = {  # family: (peak, tokens of a batch, sequence), Appendix D
    "olmo2_1b": (3e-4, 2_097_152, 4096),
    "smollm3_3b": (2e-4, 2_097_152, 8192),
    "youtu_2b": (2e-4, 67_108_864, 8192),
}
PUBLIC = {"olmo2_1b": (7.4487e-5, 2_097_152, 4096), "smollm3_3b": (2e-4, 2_359_296, 4096)}


def recipe(**changes: object) -> Recipe:
    base = load_recipe(RECIPES[0].parent / "olmo2_1b_remit.toml").model_dump(exclude_none=True)
    for key, value in changes.items():
        base[key] = {**base[key], **value} if isinstance(value, dict) else value
    return parse_recipe(base)


@pytest.mark.parametrize("gpus", [8, 64])
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_can_be_planned(path: Path, gpus: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(path), "--gpus", str(gpus)]) == 0
    out = capsys.readouterr().out
    total = float(next(line for line in out.splitlines() if line.startswith("stage 0")).split()[-1])
    assert total < 76, "it has to fit beside what the estimate leaves out, on 80 GB"


@pytest.mark.parametrize("family", list(PAPER))
@pytest.mark.parametrize("objective", ["ntp", "remit"])
def test_recipes_carry_the_published_numbers(family: str, objective: str) -> None:
    folder = RECIPES[0].parent
    paper = load_recipe(folder / f"{family}_{objective}.toml")
    got = paper.optimizer.peak_lr, paper.batch.global_batch_tokens, paper.data.sequence_length
    assert got == PAPER[family]
    assert (paper.optimizer.min_lr, paper.schedule.decay, paper.schedule.train_tokens) == (1e-7, "cosine", 50 * 10**9)
    assert paper.objective.name == objective
    if family in PUBLIC:
        public = load_recipe(folder / f"{family}_public_{objective}.toml")
        assert (public.optimizer.peak_lr, public.batch.global_batch_tokens, public.data.sequence_length) == PUBLIC[
            family
        ]
        assert (public.optimizer.min_lr, public.schedule.decay) == (0.0, "linear")
    smollm = load_recipe(folder / "smollm3_3b_public_ntp.toml")
    assert smollm.train_steps == 522_000


def test_memory_by_hand() -> None:
    """OLMo-2-1B on 8 GPUs, data parallel: 1,484,916,736 parameters."""
    n = PRESETS["olmo2_1b"].num_parameters()
    assert n == 2 * 100_352 * 2048 + 16 * (4 * 2048**2 + 3 * 2048 * 8192 + 4 * 2048) + 2048
    memory = stage_memory(recipe(), PRESETS["olmo2_1b"], PRESETS["olmo2_1b"], 0, 8)
    assert (memory.weights, memory.gradients, memory.optimizer) == (2 * n, 4 * n, 12 * n / 8)
    assert memory.reference == 2 * n
    assert memory.logits == 4 * 4096 * 100_352 * 2
    # A token and layer: 4 h of residual; q, k, v, rotated q and k, output, and q and k before their norms; 3 ffn.
    assert memory.activations == 16 * 4 * 4096 * 2 * (4 * 2048 + 8 * 2048 + 3 * 8192)
    wide = stage_memory(recipe(compute={"precision": "fp32"}), PRESETS["olmo2_1b"], None, 0, 8)
    assert (wide.weights, wide.optimizer, wide.reference) == (4 * n, 8 * n / 8, 0)
    kept = stage_memory(recipe(compute={"recompute": "full"}), PRESETS["olmo2_1b"], None, 0, 8)
    assert kept.activations == 4 * 4096 * 2 * (16 * 2048 + 4 * 2048 + 8 * 2048 + 3 * 8192)


@pytest.mark.parametrize("name", list(PRESETS))
def test_stages_add_up(name: str) -> None:
    """All ranks' parts are the model, and copies of what each rank holds whole."""
    from remit_megatron.config import Parallel

    shape = PRESETS[name]
    alone = stage_parameters(shape, Parallel(), 0)
    assert alone == shape.num_parameters()
    stages = sum(stage_parameters(shape, Parallel(pipeline=4), stage) for stage in range(4))
    assert stages - alone == (shape.vocab_size * shape.hidden_size if shape.tied_embeddings else 0)
    halves = 2 * stage_parameters(shape, Parallel(tensor=2), 0) - alone
    assert 0 < halves < (0.08 if shape.latent else 0.001) * alone


def test_time_by_hand() -> None:
    shape = PRESETS["olmo2_1b"]
    per_token = 2 * (shape.num_parameters() - 100_352 * 2048) + 4 * 16 * 2048 * 4096
    assert step_flops(recipe(), shape, shape) == 4 * per_token * 2_097_152
    assert step_flops(recipe(compute={"recompute": "full"}), shape, None) == 4 * per_token * 2_097_152
    text = plan(recipe(), 16, "H100", 0.5)
    seconds = 4 * per_token * 2_097_152 / (16 * 989e12 * 0.5)
    assert f"{seconds:.2f} s a step" in text
    assert "taken to be of the student's size" in text


def test_microbatches() -> None:
    assert num_microbatches(recipe(), 8) == 512 // (8 * 4)
    assert num_microbatches(recipe(parallel={"tensor": 2, "context": 2}), 8) == 512 // (2 * 4)


@pytest.mark.parametrize(
    ("changes", "gpus", "message"),
    [
        ({"parallel": {"tensor": 3}}, 9, "does not divide by parallel.tensor"),
        (
            {"parallel": {"tensor": 2}},
            3,
            "3 ranks do not divide by parallel.tensor x pipeline x context",
        ),
        ({"batch": {"microbatch_samples": 3}}, 8, "do not divide by batch.microbatch_samples"),
        ({"parallel": {"pipeline": 5}}, 10, "does not divide by parallel.pipeline"),
        ({"model": {"preset": "olmo_1b"}}, 8, "did you mean olmo2_1b?"),
        ({"model": {"num_layers": 3}}, 8, "contradicts the checkpoint of model.init or model.preset"),
    ],
)
def test_refusals(changes: dict[str, object], gpus: int, message: str) -> None:
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        plan(recipe(**changes), gpus)


def test_unknown_gpu_and_share() -> None:
    with pytest.raises(UserError, match=r"known: .*H200"):
        plan(recipe(), 8, "V100")
    with pytest.raises(UserError, match=r"--mfu 1\.5"):
        plan(recipe(), 8, "H100", 1.5)


def test_a_preset_is_checked_against_the_checkpoint() -> None:
    shape = PRESETS["smollm3_3b"]
    check_preset("smollm3_3b", shape.model_copy(update={"rope_theta": 5e6}))
    with pytest.raises(UserError, match="no_rope_layers"):
        check_preset("smollm3_3b", shape.model_copy(update={"no_rope_layers": (0,)}))
