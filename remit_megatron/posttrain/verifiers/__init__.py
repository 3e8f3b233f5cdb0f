"""What says whether an answer is right, by name. docs/posttraining.md has a table of what each takes as right."""

from remit_megatron.errors import UserError
from remit_megatron.posttrain.verifiers import code, ifeval, math, reasoning, text
from remit_megatron.posttrain.verifiers.base import Verifier

VERIFIERS: dict[str, Verifier] = {
    verifier.name: verifier
    for verifier in (
        text.EXACT,
        text.FINAL_NUMBER,
        text.MULTIPLE_CHOICE,
        math.MATH,
        ifeval.IFEVAL,
        reasoning.REASONING_GYM,
        code.PYTHON,
    )
}
ALIASES = {"math_verify": "math", "exact": "exact_match", "arc": "multiple_choice", "string_matcher": "exact_match"}
"""Other names under which published data know them; case does not count."""


def find(name: str, where: str, *, allow_code: bool) -> Verifier:
    """Raises UserError for an unknown one, for one whose package is missing, and for code that may not run."""
    lower = name.lower()
    verifier = VERIFIERS.get(ALIASES.get(lower, lower))
    if verifier is None:
        raise UserError(f"{where}: verifier '{name}' is unknown; known: {', '.join(VERIFIERS)}")
    if verifier.runs_code and not allow_code:
        raise UserError(f"{where}: verifier '{name}' runs code that the model wrote: --allow-code-execution")
    verifier.load()
    return verifier
