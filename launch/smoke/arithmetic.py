"""Seeded arithmetic word problems with step-by-step solutions, an exact answer, and a split that no problem crosses."""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from launch.smoke.corpus import is_held_out

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
        {"a": (2, 70), "b": (2, 29)},
        (("{name} has {eq} {items} now.", "a + b -> c"),),
        (
            "{name} has {a} {items}. {He} gets {b} more. How many {items} does {name} have now?",
            "{name} had {a} {items} and then found {b} more {items}. How many {items} is that in all?",
            "There are {a} {items} in {name}'s bag. {other} adds {b} {items}. How many {items} are in the bag?",
            "{other} gave {name} {b} {items}. {name} already had {a}. How many {items} does {name} have?",
        ),
    ),
    Kind(
        "loss",
        {"a": (5, 90), "b": (2, 29)},
        (("{name} has {eq} {items} left.", "a - b -> c"),),
        (
            "{name} has {a} {items}. {He} gives {b} to {other}. How many {items} are left?",
            "{name} had {a} {items} but lost {b} of them. How many {items} does {he} still have?",
            "Out of {a} {items}, {name} sold {b}. How many {items} remain?",
            "{other} took {b} of {name}'s {a} {items}. How many {items} does {name} have left?",
        ),
    ),
    Kind(
        "groups",
        {"a": (2, 12), "b": (2, 12)},
        (("There are {eq} {items}.", "a * b -> c"),),
        (
            "{name} has {a} boxes with {b} {items} in each. How many {items} does {he} have?",
            "There are {b} {items} in every bag, and {name} carries {a} bags. How many {items} are there?",
            "{name} puts {items} in {a} rows of {b}. How many {items} are there in all?",
        ),
    ),
    Kind(
        "rate",
        {"a": (2, 12), "b": (2, 12)},
        (("In {b} hours {name} makes {eq} {items}.", "a * b -> c"),),
        (
            "{name} makes {a} {items} an hour. How many {items} does {he} make in {b} hours?",
            "In one hour {name} can make {a} {items}. {He} works for {b} hours. How many {items} is that?",
            "{name} works for {b} hours and makes {a} {items} each hour. How many {items} does {he} make?",
        ),
    ),
    Kind(
        "share",
        {"b": (2, 12), "q": (2, 12)},
        (("Each friend gets {eq} {items}.", "a / b -> c"),),
        (
            "{name} shares {a} {items} equally among {b} friends. How many {items} does each friend get?",
            "{b} friends split {a} {items} evenly. How many {items} does each one get?",
            "{name} wants to give {a} {items} to {b} friends, the same number to each. How many does each get?",
        ),
        given=("b * q -> a",),
    ),
    Kind(
        "compare",
        {"a": (3, 80), "d": (2, 25)},
        (
            ("{other} has {eq} {items}.", "a + d -> b"),
            ("Together they have {eq} {items}.", "a + b -> c"),
        ),
        (
            "{name} has {a} {items}. {other} has {d} more than {name}. How many {items} do they have together?",
            "{other} has {d} more {items} than {name}, who has {a}. How many {items} have they in total?",
            "{name} picked {a} {items} and {other} picked {d} more than that. How many did both pick?",
        ),
    ),
    Kind(
        "difference",
        {"a": (5, 90), "b": (2, 29)},
        (("{name} has {eq} more {items} than {other}.", "a - b -> c"),),
        (
            "{name} has {a} {items} and {other} has {b}. How many more {items} does {name} have?",
            "{other} has {b} {items}. {name} has {a}. By how many {items} is {name} ahead?",
            "How many more {items} than {other} does {name} have, if {name} has {a} and {other} has {b}?",
        ),
    ),
    Kind(
        "change",
        {"q": (2, 9), "p": (2, 12), "r": (1, 30)},
        (
            ("The {items} cost {eq} dollars.", "q * p -> c"),
            ("{name} gets {eq} dollars back.", "n - c -> e"),
        ),
        (
            "{name} buys {q} {items} for {p} dollars each and pays with {n} dollars. How much change does {he} get?",
            "One {item} costs {p} dollars. {name} has {n} dollars and buys {q} {items}. How many dollars are left?",
            "{name} had {n} dollars. {He} bought {q} {items} at {p} dollars each. How much money is left?",
        ),
        given=("q * p -> s", "s + r -> n"),
    ),
    Kind(
        "packs_and_more",
        {"q": (2, 9), "p": (2, 12), "r": (2, 29)},
        (
            ("The packs hold {eq} {items}.", "q * p -> c"),
            ("In all there are {eq} {items}.", "c + r -> e"),
        ),
        (
            "{name} has {q} packs of {p} {items} and {r} loose {items}. How many {items} does {he} have?",
            "{name} buys {q} packs with {p} {items} each. {other} brings {r} more {items}. How many are there?",
            "There are {r} {items} on the table and {q} packs of {p} {items} in the box. How many {items} in all?",
        ),
    ),
    Kind(
        "day",
        {"a": (10, 70), "b": (2, 25), "d": (2, 25)},
        (
            ("In the morning {name} sells {b} and keeps {eq} {items}.", "a - b -> c"),
            ("Then {he} has {eq} {items}.", "c + d -> e"),
        ),
        (
            "{name} starts with {a} {items}, sells {b} and buys {d} more. How many {items} does {he} have now?",
            "A shop has {a} {items}. {name} sells {b} in the morning, then {d} arrive. How many {items} are there?",
            "{name} had {a} {items}. {He} sold {b} of them and later got {d} new ones. How many are there now?",
        ),
    ),
    Kind(
        "keep_and_share",
        {"q": (2, 9), "k": (2, 9), "f": (2, 9)},
        (
            ("{name} shares {eq} {items}.", "n - k -> c"),
            ("Each friend gets {eq} {items}.", "c / f -> e"),
        ),
        (
            "{name} has {n} {items}. {He} keeps {k} and shares the rest equally among {f} friends. "
            "How many does each friend get?",
            "From {n} {items} {name} keeps {k} and splits the others evenly between {f} friends. "
            "How many {items} for each friend?",
        ),
        given=("q * f -> s", "s + k -> n"),
    ),
    Kind(
        "two_packs",
        {"a": (2, 9), "b": (2, 9), "d": (2, 9), "f": (2, 20)},
        (
            ("The boxes hold {eq} {items}.", "a * b -> c"),
            ("With {other}'s there are {eq} {items}.", "c + f -> e"),
            ("After giving some away there are {eq} {items}.", "e - d -> g"),
        ),
        (
            "{name} has {a} boxes of {b} {items}. {other} brings {f} more. They give {d} away. "
            "How many {items} are left?",
            "{name} fills {a} boxes with {b} {items} each and {other} adds {f} {items}. "
            "Later {d} {items} are given away. How many remain?",
        ),
    ),
)

NAMES = (
    *(
        (name, "she")
        for name in (
            *("Mia", "Emma", "Nora", "Lena", "Sara", "Anna", "Ruth", "Ida", "Zoe", "Clara", "Alice", "Maya", "Julia"),
            *("Olga", "Priya", "Yuki", "Fatima", "Rosa", "Grace", "Helen"),
        )
    ),
    *(
        (name, "he")
        for name in (
            *("Tom", "Ben", "Max", "Paul", "Omar", "Leo", "Jack", "Noah", "Ivan", "Hugo", "Felix", "Peter", "Adam"),
            *("Kofi", "Ravi", "Kenji", "Carlos", "Simon", "Oscar", "David"),
        )
    ),
)

ITEMS = tuple(
    (singular, singular + "s")
    for singular in (
        *("apple", "book", "pencil", "ticket", "stamp", "card", "cake", "coin", "shell", "marble", "cookie", "pear"),
        *("flower", "candle", "button", "sticker", "balloon", "egg", "lemon", "cup", "plate", "toy", "photo", "stone"),
        *("ring", "hat", "orange", "muffin", "brick", "bead"),
    )
)

_OPERATION = re.compile(r"(\w) ([-+*/]) (\w) -> (\w)")


def _apply(operation: str, numbers: dict[str, int]) -> str | None:
    """Carry out "a op b -> c" in `numbers` and return "1 + 2 = 3"; None if inexact or not in [1, MAX_VALUE]."""
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
    return f"{left} {match[2]} {right} = {result}"


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
    item, items = rng.choice(ITEMS)
    words: dict[str, Any] = {
        "name": name,
        "other": other,
        "he": he,
        "He": he.capitalize(),
        "item": item,
        "items": items,
    }
    words |= numbers
    question, reworded = rng.sample(kind.questions, 2)
    answer = str(numbers[kind.steps[-1][1][-1]])
    sentences = [text.format(eq=eq, **words) for (text, _), eq in zip(kind.steps, equations, strict=True)]
    return Problem(
        question=question.format(**words),
        solution=" ".join(sentences) + f" The answer is \\boxed{{{answer}}}.",
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
