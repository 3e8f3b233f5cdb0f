"""Times the loss path against the machine's ceilings and against other implementations, side by side in one process.

    python -m benchmarks.loss                      # a CUDA device; writes benchmarks/results/loss_<device>.json
    python -m benchmarks.loss --device cpu --tokens 64 --vocab 512 --repeats 3     # does it run? not a measurement

Everything is interleaved: each repeat times every item once, so that clocks and neighbours act on all alike, and a
ratio is the median over repeats of (item / its ceiling in the same repeat). Before timing, each provider's NLL and
gradient are compared with float64 under non-uniform token weights. Absent providers are named with the reason.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.loss_providers import NLL, PROVIDERS, reader
from remit_megatron.errors import RemitError, RunError, UserError
from remit_megatron.ops import spec
from remit_megatron.ops.fp8 import quantise_rows
from remit_megatron.ops.implementation import describe_implementation
from remit_megatron.ops.linear_nll import linear_nll
from remit_megatron.ops.shard import Shard, combine_stats
from remit_megatron.ops.token_nll import select_kernels, token_nll
from remit_megatron.ops.weights import remit_weights

LIMITS = {
    "statistics / read": ("<=", 1.15, 1.05),
    "gradient / read and write in place": ("<=", 1.15, 1.05),
    "whole loss / copy": ("<=", 1.70, 1.58),
    "megatron unfused / ours": (">=", 7.0, 9.0),
    "megatron fused / ours": (">=", 6.0, 7.5),
    "liger / ours": (">=", 3.0, 3.5),
    "compiled cross_entropy / ours": (">=", 1.0, 1.3),
    "chunked head NLL / its product": ("<=", 1.15, 1.09),
}
"""Ratio: direction, what it must reach, what it aims at."""

L2_FLUSH_BYTES = 256 * 2**20
MAX_GRADIENT_ERROR = 0.02


@dataclass
class Setting:
    device: str
    tokens: int
    vocab: int
    hidden: int
    chunk_tokens: int
    dtype: torch.dtype = torch.bfloat16
    logits: Tensor = field(init=False)
    labels: Tensor = field(init=False)
    weights: Tensor = field(init=False)
    ref_nll: Tensor = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator(self.device).manual_seed(0)
        options: Any = {"generator": generator, "device": self.device}
        self.logits = torch.randn(self.tokens, self.vocab, dtype=self.dtype, **options).mul_(3)
        self.labels = torch.randint(0, self.vocab, (self.tokens,), **options)
        self.weights = torch.rand(self.tokens, **options) + 0.5
        self.ref_nll = torch.rand(self.tokens, **options) * 12


def errors_against_float64(nll_of: NLL, device: str) -> dict[str, float]:
    """Relative errors of NLL and gradient on a small case; a provider that drops or permutes weights shows here."""
    case = Setting(device, tokens=64, vocab=1000, hidden=8, chunk_tokens=64)
    exact = case.logits.double().requires_grad_()
    want = spec.token_nll(exact, case.labels)
    want.backward(case.weights.double())
    logits = case.logits.clone().requires_grad_()
    nll = nll_of(logits * 1, case.labels)
    nll.backward(case.weights)
    assert exact.grad is not None
    assert logits.grad is not None

    def relative(found: Tensor, wanted: Tensor) -> float:
        return float((found.double() - wanted).norm() / wanted.norm())

    return {"nll": relative(nll.detach(), want.detach()), "gradient": relative(logits.grad, exact.grad)}


class _Intermediate(torch.autograd.Function):
    """Existing logits as the result of an operation, as a model hands them over: no leaf, and no copy to make one."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, logits: Tensor) -> Tensor:
        return logits.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        return None, None


def as_intermediate(logits: Tensor) -> Tensor:
    anchor = torch.zeros((), device=logits.device, requires_grad=True)
    result: Tensor = _Intermediate.apply(anchor, logits)
    return result


def make_ceilings(setting: Setting) -> dict[str, Callable[[], Any]]:
    """What the memory and the matrix units of this machine give for the same bytes and the same product."""
    source, target = setting.logits, torch.empty_like(setting.logits)
    hidden, head = make_head(setting)
    whole = torch.empty(setting.tokens, setting.vocab, dtype=setting.dtype, device=setting.device)
    return {
        "read": reader(source),
        "read and write in place": lambda: target.mul_(1.0),
        "copy": lambda: target.copy_(source),
        "head product": lambda: torch.mm(hidden, head.t(), out=whole),
    }


def make_head(setting: Setting) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(setting.device).manual_seed(1)
    options: Any = {"generator": generator, "device": setting.device, "dtype": setting.dtype}
    hidden = torch.randn(setting.tokens, setting.hidden, **options)
    return hidden, torch.randn(setting.vocab, setting.hidden, **options).mul_(0.02)


def make_parts(setting: Setting) -> dict[str, Callable[[], Any]]:
    """The two passes, the whole weighted loss, the reference's head, and the rounding of a layer's widest input."""
    shard = Shard.of(setting.vocab, None, None)
    kernels = select_kernels("auto", setting.device)
    scratch, labels = setting.logits.clone(), setting.labels
    lse, _ = combine_stats(kernels.local_stats(setting.logits, labels, shard), labels, shard)
    hidden, head = make_head(setting)
    ref_nll = setting.ref_nll[None]
    activations = hidden.repeat(1, 4)

    def whole_loss() -> None:
        nll = token_nll(as_intermediate(scratch), labels)[None]
        (remit_weights(nll, ref_nll) * nll).sum().backward()

    return {
        "statistics": lambda: kernels.local_stats(setting.logits, labels, shard),
        "gradient": lambda: kernels.write_gradient(scratch, labels, lse, setting.weights, shard, scratch),
        "whole loss": whole_loss,
        "chunked head NLL": lambda: linear_nll(hidden, head, labels, chunk_tokens=setting.chunk_tokens),
        "FP8 rows": lambda: quantise_rows(activations),
        "FP8 rows by torch": lambda: quantise_rows(activations, implementation="torch"),
    }


def forward_and_backward(nll_of: NLL, setting: Setting) -> Callable[[], Any]:
    scratch = setting.logits.clone()

    def run() -> None:
        nll_of(as_intermediate(scratch), setting.labels).backward(setting.weights)

    return run


def check_capture(setting: Setting) -> bool:
    """Captures both passes in a CUDA graph; whether a replay gives the bits of the eager run."""
    shard = Shard.of(setting.vocab, None, None)
    kernels = select_kernels("auto", setting.device)

    def both() -> tuple[Tensor, Tensor]:
        lse, nll = combine_stats(kernels.local_stats(setting.logits, setting.labels, shard), setting.labels, shard)
        out = torch.empty_like(setting.logits)
        kernels.write_gradient(setting.logits, setting.labels, lse, setting.weights, shard, out)
        return nll, out

    eager = both()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    graph.replay()
    torch.cuda.synchronize()
    return all(torch.equal(one, other) for one, other in zip(eager, captured, strict=True))


def time_once(run: Callable[[], Any], device: str, flush: Tensor | None) -> float:
    """Milliseconds of one call, from a cold level-2 cache."""
    if device == "cpu":
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3
    assert flush is not None
    flush.zero_()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def time_interleaved(items: dict[str, Callable[[], Any]], device: str, repeats: int) -> dict[str, list[float]]:
    flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device=device) if device == "cuda" else None
    for run in items.values():
        for _ in range(3 if device == "cuda" else 1):
            run()
    times: dict[str, list[float]] = {name: [] for name in items}
    for _ in range(repeats):
        for name, run in items.items():
            times[name].append(time_once(run, device, flush))
    return times


def spread(values: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(values, n=4)
    return {"median": median, "p25": low, "p75": high}


def ratios_of(times: dict[str, list[float]], device: str) -> dict[str, dict[str, Any]]:
    """Each ratio's spread; on a GPU, for which the limits are meant, also whether it meets them."""
    names = {name: name.split(" / ") for name in LIMITS}
    below = {"ours": "ours", "its product": "head product"}
    ratios: dict[str, dict[str, Any]] = {}
    for name, (above, under) in names.items():
        under = below.get(under, under)
        if above not in times:
            continue
        sign, must, aim = LIMITS[name]
        values = spread([a / b for a, b in zip(times[above], times[under], strict=True)])
        ratios[name] = values
        if device == "cpu":
            continue
        reached = [values["median"] <= x if sign == "<=" else values["median"] >= x for x in (must, aim)]
        ratios[name] = {**values, "must": f"{sign} {must}", "met": reached[0], "aim": aim, "aim_met": reached[1]}
    return ratios


def measure(setting: Setting, providers: dict[str, NLL], repeats: int) -> dict[str, Any]:
    items = {**make_ceilings(setting), **make_parts(setting)}
    items |= {name: forward_and_backward(nll_of, setting) for name, nll_of in providers.items()}
    times = time_interleaved(items, setting.device, repeats)
    bytes_of_logits = setting.logits.numel() * setting.logits.element_size()
    flops = 2 * setting.tokens * setting.vocab * setting.hidden
    result: dict[str, Any] = {
        "tokens": setting.tokens,
        "vocab": setting.vocab,
        "hidden": setting.hidden,
        "chunk_tokens": setting.chunk_tokens,
        "dtype": str(setting.dtype).removeprefix("torch."),
        "milliseconds": {name: spread(values) for name, values in times.items()},
        "copy_terabytes_per_second": 2 * bytes_of_logits / statistics.median(times["copy"]) / 1e9,
        "head_teraflops_per_second": flops / statistics.median(times["head product"]) / 1e9,
        "ratios": ratios_of(times, setting.device),
    }
    if setting.device == "cuda":
        result["graph_replay_has_the_same_bits"] = check_capture(setting)
    return result


def find_providers(wanted: list[str], device: str) -> tuple[dict[str, NLL], dict[str, str]]:
    """(the providers that can run here, the reason for each that cannot)."""
    found, absent = {}, {}
    for name in wanted:
        try:
            found[name] = PROVIDERS[name](device)
        except (ImportError, UserError) as error:
            absent[name] = str(error)
    return found, absent


def check_providers(providers: dict[str, NLL], absent: dict[str, str], device: str) -> dict[str, dict[str, float]]:
    """Errors against float64 of each provider. One that fails or errs moves to `absent`; ours must do neither."""
    errors: dict[str, dict[str, float]] = {}
    for name, nll_of in list(providers.items()):
        try:
            error = errors_against_float64(nll_of, device)
            # bfloat16 has 8 bits, and most providers round the gradient more than once.
            if not error["gradient"] <= MAX_GRADIENT_ERROR:
                raise RunError(
                    f"wrong gradient under token weights (relative error {error['gradient']:.3f}): not timed"
                )
            errors[name] = error
        except Exception as error:
            # Whatever another implementation fails with here, the others are still measured.
            if name == "ours":
                raise
            del providers[name]
            absent[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return errors


def machine(device: str) -> dict[str, str]:
    versions = {}
    for package in ("torch", "triton", "megatron-core", "liger-kernel"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "absent"
    name = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU"
    return {"device": name, "cuda": str(torch.version.cuda), "python": platform.python_version(), **versions}


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Benchmark of the loss path.")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocab", type=int, nargs="+", default=[100_352, 128_256])
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--chunk-tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--providers", nargs="+", choices=list(PROVIDERS), default=list(PROVIDERS))
    parser.add_argument("--out", type=Path, help="JSON file; default on CUDA: benchmarks/results/loss_<device>.json")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> dict[str, Any]:
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("no CUDA device is present: this benchmark measures one (--device cpu only shows that it runs)")
    if options.repeats < 2:
        raise UserError(f"--repeats must be at least 2 to show a spread, got {options.repeats}")
    wanted = ["ours", *(name for name in options.providers if name != "ours")]
    providers, absent = find_providers(wanted, options.device)
    errors = check_providers(providers, absent, options.device)
    results = []
    for vocab in options.vocab:  # one after the other: each holds several gigabytes
        setting = Setting(options.device, options.tokens, vocab, options.hidden, options.chunk_tokens)
        results.append(measure(setting, providers, options.repeats))
    return {
        "machine": machine(options.device),
        "implementation": describe_implementation(options.device)[0],
        "repeats": options.repeats,
        "absent": absent,
        "errors_against_float64": errors,
        "shapes": results,
    }


def show(report: dict[str, Any]) -> None:
    print(f"{report['machine']['device']}, {report['implementation']}, {report['repeats']} repeats")
    for shape in report["shapes"]:
        print(f"\n{shape['tokens']} tokens x {shape['vocab']} {shape['dtype']}")
        for name, value in shape["milliseconds"].items():
            print(f"  {name:32s} {value['median']:9.3f} ms  ({value['p25']:.3f} to {value['p75']:.3f})")
        for name, value in shape["ratios"].items():
            verdict = f"must {value['must']}: {'met' if value['met'] else 'NOT met'}" if "must" in value else ""
            print(f"  {name:40s} {value['median']:7.3f}  {verdict}")
    for name, reason in report["absent"].items():
        print(f"absent: {name}: {reason}")


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    try:
        report = run(options)
    except RemitError as error:
        print(f"loss.py: {error}", file=sys.stderr)
        return error.exit_code
    show(report)
    out = options.out
    if out is None and options.device == "cuda":
        slug = report["machine"]["device"].lower().replace(" ", "_")
        out = Path(__file__).parent / "results" / f"loss_{slug}.json"
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=1) + "\n")
        print(f"\nwritten: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
