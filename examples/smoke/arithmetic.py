"""Seeded arithmetic word problems with step-by-step solutions, an exact answer, and a split that no problem crosses."""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from examples.smoke.corpus import is_held_out

MAX_VALUE = 99
HELD_OUT_IN_16 = 2


@dataclass(frozen=True, slots=True)
class Problem:
    """One word problem. `canonical` (the kind and its numbers, no wording) decides whether it is held out."""

    question: str
    solution: str
    answer: str
    canonical: str
    reworded: str
    """The same question in another wording, with the same people, things and numbers."""

    @property
    def kind(self) -> str:
        return self.canonical.partition(":")[0]

    @property
    def prompt(self) -> str:
        """What a model is given to continue."""
        return f"Question: {self.question}\nAnswer:"

    @property
    def document(self) -> str:
        """Question and solution as one training document."""
        return f"{self.prompt} {self.solution}\n"

    @property
    def statement(self) -> str:
        """The question in two wordings and without a solution, as one training document."""
        return f"Question: {self.question}\nIn other words: {self.reworded}\n"


@dataclass(frozen=True, slots=True)
class Kind:
    """A family of problems.

    `ranges` gives each drawn number's inclusive range. `given` derives further numbers that the question states;
    `steps` pairs each sentence of the solution with its equation. Both use "a op b -> c"; the last result is
    the answer.
    """

    name: str
    ranges: dict[str, tuple[int, int]]
    steps: tuple[tuple[str, str], ...]
    questions: tuple[str, ...]
    given: tuple[str, ...] = ()


KINDS = (
    Kind(
        "gain",
        {"a": (2, 30), "b": (2, 9)},
        (("Now {eq} {items}.", "a + b -> c"),),
        (
            "{name} has {a} {items} and gets {b} more. How many {items} now?",
            "{name} had {a} {items}, then found {b}. How many {items} is that?",
            "There are {a} {items} in a bag. {name} adds {b}. How many {items} are in it?",
        ),
    ),
    Kind(
        "loss",
        {"a": (6, 30), "b": (2, 9)},
        (("Left are {eq} {items}.", "a - b -> c"),),
        (
            "{name} has {a} {items} and gives away {b}. How many {items} are left?",
            "{name} had {a} {items} but lost {b}. How many {items} remain?",
            "Of {a} {items} {name} sold {b}. How many {items} are left?",
        ),
    ),
    Kind(
        "groups",
        {"a": (2, 9), "b": (2, 9)},
        (("In all {eq} {items}.", "a * b -> c"),),
        (
            "{name} has {a} boxes with {b} {items} each. How many {items} in all?",
            "{name} puts {a} rows of {b} {items}. How many {items} are there?",
            "{name} carries {a} bags of {b} {items}. How many {items} is that?",
        ),
    ),
    Kind(
        "rate",
        {"a": (2, 9), "b": (2, 9)},
        (("Together {eq} {items}.", "a * b -> c"),),
        (
            "{name} makes {a} {items} an hour. How many {items} in {b} hours?",
            "{name} sells {a} {items} a day for {b} days. How many {items} is that?",
            "Each hour {name} packs {a} {items}. How many {items} after {b} hours?",
        ),
    ),
    Kind(
        "share",
        {"b": (2, 9), "q": (2, 9)},
        (("Each gets {eq} {items}.", "a / b -> c"),),
        (
            "{name} shares {a} {items} among {b} friends. How many {items} does each get?",
            "{name} splits {a} {items} evenly into {b} bags. How many {items} in each?",
            "There are {a} {items} for {b} friends of {name}. How many {items} for each?",
        ),
        given=("b * q -> a",),
    ),
    Kind(
        "difference",
        {"a": (6, 30), "b": (2, 9)},
        (("More by {eq} {items}.", "a - b -> c"),),
        (
            "{name} has {a} {items} and {other} has {b}. How many more has {name}?",
            "{name} made {a} {items}, {other} made {b}. By how many is {name} ahead?",
            "With {a} {items} against {b}, how many more has {name} than {other}?",
        ),
    ),
    Kind(
        "compare",
        {"a": (2, 20), "d": (2, 9)},
        (("{other} has {eq}.", "a + d -> b"), ("Both have {eq} {items}.", "a + b -> c")),
        (
            "{name} has {a} {items}. {other} has {d} more. How many {items} have both?",
            "{name} picked {a} {items} and {other} {d} more than that. How many {items} in all?",
        ),
    ),
    Kind(
        "change",
        {"q": (2, 9), "p": (2, 9), "r": (1, 20)},
        (("They cost {eq} dollars.", "q * p -> c"), ("Back come {eq} dollars.", "n - c -> e")),
        (
            "{name} buys {q} {items} for {p} dollars each and pays {n}. How much comes back?",
            "{name} takes {q} {items} at {p} dollars each out of {n} dollars. How much is left?",
            "{q} {items} cost {p} dollars each. {name} has {n} dollars. How much is left?",
        ),
        given=("q * p -> s", "s + r -> n"),
    ),
    Kind(
        "packs_and_more",
        {"q": (2, 9), "p": (2, 9), "r": (2, 9)},
        (("The packs hold {eq}.", "q * p -> c"), ("In all {eq} {items}.", "c + r -> e")),
        (
            "{name} has {q} packs of {p} {items} and {r} loose ones. How many {items} in all?",
            "{name} buys {q} packs of {p} {items}. {other} brings {r} more. How many {items} now?",
            "There are {q} packs of {p} {items} and {r} beside them. How many {items} are there?",
        ),
    ),
    Kind(
        "day",
        {"a": (6, 30), "b": (2, 9), "d": (2, 9)},
        (("First {eq} stay.", "a - b -> c"), ("Then {eq} {items}.", "c + d -> e")),
        (
            "{name} has {a} {items}, sells {b} and buys {d}. How many {items} now?",
            "{name} had {a} {items}. {He} lost {b} and got {d} new ones. How many {items} is that?",
            "A shop has {a} {items}. {name} buys {b}, then {d} arrive. How many {items} are there?",
        ),
    ),
    Kind(
        "keep_and_share",
        {"q": (2, 9), "k": (2, 9), "f": (2, 9)},
        (("To share are {eq}.", "n - k -> c"), ("Each gets {eq} {items}.", "c / f -> e")),
        (
            "{name} has {n} {items}, keeps {k} and shares the rest among {f} friends. How many {items} for each?",
            "Of {n} {items} {name} keeps {k}. The rest goes to {f} friends. How many {items} does each get?",
        ),
        given=("q * f -> s", "s + k -> n"),
    ),
    Kind(
        "boxes_and_gifts",
        {"a": (2, 9), "b": (2, 9), "d": (2, 9), "f": (2, 9)},
        (
            ("The boxes hold {eq}.", "a * b -> c"),
            ("With {other}'s {eq}.", "c + d -> e"),
            ("Left are {eq} {items}.", "e - f -> g"),
        ),
        (
            "{name} has {a} boxes of {b} {items}. {other} adds {d}. They give away {f}. How many {items} are left?",
            "{name} fills {a} boxes with {b} {items} each. {other} adds {d} and takes {f}. How many {items} are there?",
        ),
    ),
)

NAMES = (
    *((name, "she") for name in ("Mia", "Emma", "Nora", "Sara", "Zoe", "Maya", "Priya", "Rosa", "Grace", "Yuki")),
    *((name, "he") for name in ("Tom", "Ben", "Omar", "Leo", "Jack", "Ivan", "Hugo", "Kofi", "Ravi", "Carlos")),
)

ITEMS = (
    *("apples", "books", "pencils", "tickets", "stamps", "cards", "cakes", "coins", "shells", "cookies"),
    *("flowers", "candles", "buttons", "eggs", "lemons", "cups", "stones", "rings", "hats", "beads"),
)

_OPERATION = re.compile(r"(\w) ([-+*/]) (\w) -> (\w)")


def _apply(operation: str, numbers: dict[str, int]) -> str | None:
    """Carry out "a op b -> c" in `numbers` and return "1+2=3"; None if inexact or not in [1, MAX_VALUE]."""
    match = _OPERATION.fullmatch(operation)
    assert match, operation
    left, right = numbers[match[1]], numbers[match[3]]
    if match[2] == "/":
        result, remainder = divmod(left, right)
        if remainder:
            return None
    else:
        result = {"+": left + right, "-": left - right, "*": left * right}[match[2]]
    if not 1 <= result <= MAX_VALUE:
        return None
    numbers[match[4]] = result
    return f"{left}{match[2]}{right}={result}"


def _draw(kind: Kind, rng: random.Random) -> tuple[dict[str, int], list[str]] | None:
    """Numbers and the equations of the steps, or None where these numbers make no fitting problem."""
    numbers = {key: rng.randint(low, high) for key, (low, high) in kind.ranges.items()}
    equations = []
    for operation in (*kind.given, *(step[1] for step in kind.steps)):
        equation = _apply(operation, numbers)
        if equation is None:
            return None
        equations.append(equation)
    return numbers, equations[len(kind.given) :]


def _word(kind: Kind, numbers: dict[str, int], equations: list[str], rng: random.Random) -> Problem:
    (name, he), (other, _) = rng.sample(NAMES, 2)
    words: dict[str, Any] = {
        "name": name,
        "other": other,
        "he": he,
        "He": he.capitalize(),
        "items": rng.choice(ITEMS),
    }
    words |= numbers
    question, reworded = rng.sample(kind.questions, 2)
    answer = str(numbers[kind.steps[-1][1][-1]])
    sentences = [text.format(eq=eq, **words) for (text, _), eq in zip(kind.steps, equations, strict=True)]
    return Problem(
        question=question.format(**words),
        solution=" ".join([*sentences, f"\\boxed{{{answer}}}"]),
        answer=answer,
        canonical=canonical_form(kind, numbers),
        reworded=reworded.format(**words),
    )


def canonical_form(kind: Kind, numbers: dict[str, int]) -> str:
    """The kind and its drawn numbers: what two problems share that differ in wording only."""
    return f"{kind.name}:" + ",".join(f"{key}={numbers[key]}" for key in sorted(kind.ranges))


def problems(seed: int, *, held_out: bool, unique_numbers: bool = False) -> Iterator[Problem]:
    """Endless problems without a repeated question; a canonical form is either in training or held out, for every seed.

    With `unique_numbers` no canonical form comes twice either (for evaluation, where each problem should count once);
    such a stream ends when 1,000 draws in a row bring nothing new.
    """
    rng = random.Random(f"{seed}:{held_out}")
    seen: set[str] = set()
    misses = 0
    while misses < 1000:
        kind = rng.choice(KINDS)
        drawn = _draw(kind, rng)
        if drawn is None or is_held_out(canonical_form(kind, drawn[0]), HELD_OUT_IN_16) != held_out:
            continue
        problem = _word(kind, *drawn, rng)
        key = problem.canonical if unique_numbers else problem.question
        if key in seen:
            misses += 1
            continue
        misses = 0
        seen.add(key)
        yield problem
