"""Deliberate breakages of the loss path, each of which must turn a test red.

    python -m tests.mutants [words of a name ...]

Prints KILLED or SURVIVED for each, on a copy of the package, after an unbroken run of the same tests that must pass.
Exits with the number of survivors. A breakage is a text that occurs once in a file, and what takes its place.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]

NLL = ("tests/ops/test_token_nll.py",)
RANKS = ("tests/ops/test_ranks.py",)
WEIGHTS = ("tests/ops/test_weights.py",)
MEMORY = ("tests/ops/test_memory.py",)
LINEAR_LOSS = ("tests/ops/test_linear_loss.py", "-k", "not tensor_parallel")
OBJECTIVES = ("tests/objectives",)
DEALING = ("tests/data/test_deal.py", "tests/data/test_microbatch.py")
INTERPRETED = ("tests/ops/interpreted.py", "-k", "not tensor_parallel")
INTERPRETED_RANKS = ("tests/ops/interpreted.py", "-k", "tensor_parallel")
COMPILED = ("tests/ops/test_triton.py", "-k", "not interpreter")
FP8 = ("tests/ops/test_fp8.py",)
INTERPRETED_FP8 = ("tests/ops/interpreted_fp8.py",)


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


TORCH, TRITON, SHARD = "ops/token_nll.py", "ops/token_nll_triton.py", "ops/shard.py"
FP8_FILE, FP8_TRITON = "ops/fp8.py", "ops/fp8_triton.py"
WEIGHTS_FILE, LINEAR_LOSS_FILE = "ops/weights.py", "ops/linear_loss.py"

MUTANTS = (
    Mutant("torch: upstream gradient dropped", TORCH, "work.mul_(coefficient).masked_fill_", "work.masked_fill_", NLL),
    Mutant("torch: no max subtraction", TORCH, "keepdim=True).float()", "keepdim=True).float().mul(0.0)", NLL),
    Mutant(
        "torch: gradient rounded before the multiply",
        TORCH,
        "out.copy_(work.mul_(",
        "out.copy_(work.to(out.dtype).float().mul_(",
        NLL,
    ),
    Mutant("torch: forward writes float32 logits", TORCH, "copy=True).sub_(largest)", "copy=False).sub_(largest)", NLL),
    Mutant("torch: no onehot", TORCH, "-owned.float()[..., None])", "0.0 * owned.float()[..., None])", NLL),
    Mutant("torch: padding keeps its gradient", TORCH, "out[piece][..., shard.num_valid :] = 0", "pass", NLL),
    Mutant("torch: a leaf is overwritten", TORCH, "if logits.is_leaf or (", "if False and (", NLL),
    Mutant("torch: a view of a leaf is overwritten", TORCH, "logits._base.is_leaf", "False", NLL),
    Mutant("torch: shared memory is overwritten", TORCH, "if size > 1 and stride < extent:", "if False:", NLL),
    Mutant("torch: never in place", TORCH, "is_overwritable(logits))", "False)", NLL),
    Mutant("torch: one row in another order", TORCH, "if x.numel() == x.shape[-1]:", "if False:", NLL),
    Mutant(
        "torch: label past the shard's edge",
        TORCH,
        "< shard.first + shard.num_valid)",
        "<= shard.first + shard.num_valid)",
        RANKS,
    ),
    Mutant("torch: pieces too large", TORCH, "// 512, MIN", "// 32, MIN", MEMORY),
    Mutant("shard: padding in the softmax", SHARD, "max(0, min(num_local, valid_vocab - first))", "num_local", NLL),
    Mutant("shard: wrong offset", SHARD, "first = rank * num_local", "first = (size - 1 - rank) * num_local", RANKS),
    Mutant(
        "shard: ignored labels trained", SHARD, "(labels == IGNORED_LABEL) | (upstream == 0)", "(upstream == 0)", NLL
    ),
    Mutant(
        "shard: ignored labels have an NLL",
        SHARD,
        "labels == IGNORED_LABEL, 0.0, nll)",
        "labels == IGNORED_LABEL, lse, nll)",
        NLL,
    ),
    Mutant("shard: label outside is quiet", SHARD, "upstream, torch.nan)", "upstream, 0.0)", NLL),
    Mutant(
        "shard: other ranks' targets lost", SHARD, "target = target + one[1]", "target = target + 0 * one[1]", RANKS
    ),
    Mutant(
        "shard: combined without a maximum",
        SHARD,
        "largest.clamp(min=torch.finfo(torch.float32).min)",
        "largest * 0",
        RANKS,
    ),
    Mutant(
        "shard: own statistics first",
        SHARD,
        "return flat.view(size, *values.shape)",
        "return flat.view(size, *values.shape).roll(dist.get_rank(self.tp_group), 0)",
        RANKS,
    ),
    Mutant(
        "shard: two collectives",
        SHARD,
        "        return flat.view(size",
        "        dist.barrier(group=self.tp_group)\n        return flat.view(size",
        RANKS,
    ),
    Mutant(
        "head: chunks shifted",
        "ops/linear_nll.py",
        "local_stats(logits, labels[chunk],",
        "local_stats(logits, labels[: chunk.stop - chunk.start],",
        ("tests/ops/test_linear_nll.py",),
    ),
    Mutant(
        "linear loss: head's gradient of the last sample only",
        LINEAR_LOSS_FILE,
        "weight_gradient.addmm_(logits.t(), x)",
        "weight_gradient.copy_(logits.t() @ x)",
        LINEAR_LOSS,
    ),
    Mutant(
        "linear loss: upstream dropped",
        LINEAR_LOSS_FILE,
        "_scaled(hidden_gradient, upstream)",
        "hidden_gradient",
        LINEAR_LOSS,
    ),
    Mutant("linear loss: factor rounded", LINEAR_LOSS_FILE, "factor.view(1)", "factor.to(gradient.dtype)", LINEAR_LOSS),
    Mutant(
        "weights: not centred",
        WEIGHTS_FILE,
        "torch.sigmoid(gap - mean.gather(1, group_of_token))",
        "torch.sigmoid(gap)",
        WEIGHTS,
    ),
    Mutant(
        "weights: gap of the wrong sign",
        WEIGHTS_FILE,
        "nll.double() - ref_nll.double()",
        "ref_nll.double() - nll.double()",
        WEIGHTS,
    ),
    Mutant(
        "weights: masked tokens counted", WEIGHTS_FILE, "fixed, kept.long(),", "fixed, torch.ones_like(fixed),", WEIGHTS
    ),
    Mutant(
        "weights: masked by a product",
        WEIGHTS_FILE,
        "torch.where(kept, nll.double() - ref_nll.double(), 0.0)",
        "kept * (nll.double() - ref_nll.double())",
        WEIGHTS,
    ),
    Mutant(
        "weights: one-sided clip",
        WEIGHTS_FILE,
        "weights.clamp(1.0 - epsilon, 1.0 + epsilon)",
        "weights.clamp(max=1.0 + epsilon)",
        WEIGHTS,
    ),
    Mutant(
        "weights: documents ignored",
        WEIGHTS_FILE,
        "torch.where(kept, segment_ids, 0)",
        "torch.where(kept, 0, 0)",
        WEIGHTS,
    ),
    Mutant(
        "weights: a float sum",
        WEIGHTS_FILE,
        "fixed_sum.double() / FIXED_POINT_PER_NAT",
        "gap.float().sum(1, keepdim=True).double()",
        WEIGHTS,
    ),
    Mutant("weights: gradient flows", WEIGHTS_FILE, "@torch.no_grad()\n", "", WEIGHTS),
    Mutant("weights: unusable gap is quiet", WEIGHTS_FILE, "unusable > 0, torch.nan", "unusable > 0, 0.0", WEIGHTS),
    Mutant(
        "weights: context-parallel sum dropped", WEIGHTS_FILE, "dist.all_reduce(totals, group=cp_group)", "pass", RANKS
    ),
    Mutant(
        "remit: mean of weights instead of the token count",
        "objectives/remit.py",
        "loss_sum=token_loss.sum()",
        "loss_sum=token_loss.sum() * num_tokens / weights.sum()",
        OBJECTIVES,
    ),
    Mutant(
        "remit: weights not applied",
        "objectives/remit.py",
        "token_loss = weights * nll",
        "token_loss = 1.0 * nll",
        OBJECTIVES,
    ),
    Mutant(
        "objectives: a product with the mask",
        "objectives/base.py",
        "stats.nll.where(kept, 0.0)",
        "stats.nll * kept",
        OBJECTIVES,
    ),
    Mutant(
        "deal: microbatches in a row", "data/deal.py", "microbatch * self.dp_size + self.dp_rank", "microbatch", DEALING
    ),
    Mutant(
        "deal: rounds not filled",
        "data/deal.py",
        "(self.turn_samples * round_of)) * round_of",
        "self.turn_samples)",
        DEALING,
    ),
    Mutant(
        "deal: rows that fill up wrap round", "data/deal.py", "part[..., :held, :]", "part[..., -held:, :]", DEALING
    ),
    Mutant(
        "context parallelism: no zigzag",
        "ops/context_parallel.py",
        "chunks[rank], chunks[2 * size - 1 - rank]",
        "chunks[2 * rank], chunks[2 * rank + 1]",
        DEALING,
    ),
    Mutant(
        "microbatch: positions of a part",
        "data/microbatch.py",
        "positions=deal.positions(self.length, device)",
        "positions=torch.arange(self.length // deal.cp_size)",
        DEALING,
    ),
    Mutant("microbatch: a key is dropped", "data/microbatch.py", "if key not in BATCH_KEYS:", "if False:", DEALING),
    Mutant(
        "triton: lanes not rescaled",
        TRITON,
        "        m = m_new\n    if full",
        "        m = m_new + 0.5\n    if full",
        INTERPRETED,
    ),
    Mutant("triton: tail tile dropped", TRITON, "    if full < num_valid:", "    if full < 0:", INTERPRETED),
    Mutant(
        "triton: target of another shard",
        TRITON,
        "y = tl.load(Y + r) - first\n    target",
        "y = tl.load(Y + r)\n    target",
        INTERPRETED_RANKS,
    ),
    Mutant(
        "triton: onehot of another shard",
        TRITON,
        "label = tl.load(Y + r) - first",
        "label = tl.load(Y + r)",
        INTERPRETED_RANKS,
    ),
    Mutant(
        "triton: upstream gradient dropped",
        TRITON,
        "g) * c\n            tl.store(OUT, tl.where",
        "g)\n            tl.store(OUT, tl.where",
        INTERPRETED,
    ),
    Mutant(
        "triton: upstream gradient dropped in a full block",
        TRITON,
        "g) * c\n            tl.store(OUT, g.to",
        "g)\n            tl.store(OUT, g.to",
        INTERPRETED,
    ),
    Mutant(
        "triton: gradient rounded before the multiply",
        TRITON,
        "g) * c\n            tl.store(OUT, tl.where",
        "g).to(OUT.dtype.element_ty).to(tl.float32) * c\n            tl.store(OUT, tl.where",
        INTERPRETED,
    ),
    Mutant(
        "triton: padding keeps a gradient", TRITON, "tl.where(valid, g, 0.0)", "tl.where(valid, g, 0.5)", INTERPRETED
    ),
    Mutant("triton: masked rows are read", TRITON, "if c == 0.0:", "if c == 12345.0:", INTERPRETED),
    Mutant(
        "triton: inner stride ignored",
        TRITON,
        "(r % n_inner).to(tl.int64) * stride_inner\n",
        "(r % n_inner).to(tl.int64)\n",
        INTERPRETED,
    ),
    Mutant(
        "triton: row offsets of 32 bits",
        TRITON,
        "(r % n_inner).to(tl.int64) * stride_inner\n",
        "(r % n_inner) * stride_inner\n",
        INTERPRETED,
    ),
    Mutant(
        "triton: column offsets of 32 bits in a tail",
        TRITON,
        "x = tl.load(X + o.to(tl.int64) * stride_column, mask",
        "x = tl.load(X + o * stride_column, mask",
        INTERPRETED,
    ),
    Mutant(
        "triton: gradient's offsets of 32 bits",
        TRITON,
        "(r // n_inner).to(tl.int64), (r % n_inner).to(tl.int64), o.to(tl.int64)",
        "r // n_inner, r % n_inner, o",
        INTERPRETED,
    ),
    Mutant("triton: column stride ignored", TRITON, "wide * stride_column", "wide", INTERPRETED),
    Mutant(
        "triton: write unseen by autograd", TRITON, "torch.autograd.graph.increment_version(out)", "pass", INTERPRETED
    ),
    Mutant(
        "triton: lanes meet in the loop",
        TRITON,
        "m_new = tl.maximum(m, tl.max(x, 1))\n        # The",
        "m_new = tl.maximum(m, tl.max(tl.max(x, 1), 0))\n        # The",
        COMPILED,
    ),
    Mutant(
        "triton: mask in the loop",
        TRITON,
        "x = tl.load(X + (i + columns).to(tl.int64) * stride_column)",
        "x = tl.load(X + (i + columns).to(tl.int64), mask=(i + columns) < num_valid)",
        COMPILED,
    ),
    Mutant("fp8: 448 itself is too large", FP8_FILE, "> LARGEST_MANTISSA", ">= LARGEST_MANTISSA", FP8),
    Mutant("fp8: half of the range", FP8_FILE, "over.int()).clamp_min", "1).clamp_min", FP8),
    Mutant("fp8: an infinity is a number", FP8_FILE, ".masked_fill(exponent == 255, torch.nan)", "", FP8),
    Mutant("fp8: no smallest scale", FP8_FILE, ".clamp_min(1)", ".clamp_min(-9)", FP8),
    Mutant("fp8 triton: 449 is not too large", FP8_TRITON, "> 0x600000", "> 0x700000", INTERPRETED_FP8),
    Mutant("fp8 triton: sign lost in the largest", FP8_TRITON, "tl.abs(x), 0", "x, 0", INTERPRETED_FP8),
    Mutant(
        "fp8 triton: an infinity is a number",
        FP8_TRITON,
        'tl.where(exponent == 255, float("nan"), scale)',
        "scale",
        INTERPRETED_FP8,
    ),
    Mutant("fp8 triton: row stride ignored", FP8_TRITON, "r * stride_row", "r * num_columns", INTERPRETED_FP8),
    Mutant("fp8 triton: narrow loads", FP8_TRITON, "block // COLUMNS_PER_WARP", "block // 128", COMPILED),
)


def apply(mutant: Mutant, folder: Path) -> None:
    """Breaks the copy in `folder`."""
    path = folder / "remit_megatron" / mutant.file
    source = path.read_text()
    assert source.count(mutant.old) == 1, f"{mutant.name}: its text occurs {source.count(mutant.old)} times"
    path.write_text(source.replace(mutant.old, mutant.new))


def tests_pass(folder: Path, tests: tuple[str, ...]) -> bool:
    command = [sys.executable, "-W", "ignore", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    if tests[0] in (INTERPRETED[0], INTERPRETED_FP8[0]):
        environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True)
    # Below 0: ended by a signal, as a load past the end may do. Anything else: the tests did not run.
    assert done.returncode <= 1, done.stdout.decode()[-3000:]
    return done.returncode == 0


def copy_to(folder: Path) -> None:
    for part in ("remit_megatron", "tests", "data_prep", "docs", "examples", "launch"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)


def main(words: list[str]) -> int:
    chosen = [mutant for mutant in MUTANTS if all(word in mutant.name for word in words)]
    survivors = 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        copy_to(folder)
        for tests in dict.fromkeys(mutant.tests for mutant in chosen):
            assert tests_pass(folder, tests), f"the unbroken code fails {' '.join(tests)}"
        for mutant in chosen:
            target = folder / "remit_megatron" / mutant.file
            whole = target.read_text()
            apply(mutant, folder)
            survived = tests_pass(folder, mutant.tests)
            target.write_text(whole)
            survivors += survived
            print("SURVIVED" if survived else "KILLED  ", mutant.name, flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} killed")
    return survivors


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
