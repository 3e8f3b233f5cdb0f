"""The benchmarks of the paper (Sections 5.1, D.3 and D.4), as tasks of lm-evaluation-harness.

A metric is named as lm_eval's results name it: `metric,filter`. Where the paper does not say which of several it
reports, all are read; the first is the one that averages and tables put first.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from remit_megatron.errors import UserError

LM_EVAL_VERSION = "0.4.13"
"""The version whose tasks these are, and whose log messages `harness` reads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """One column of the paper's tables."""

    name: str
    """As the paper's tables head it."""
    task: str
    """Task or group of lm_eval."""
    few_shot: int | None
    """Examples in the prompt as the paper states them; None: it states none, and the task's own number is taken."""
    metrics: tuple[str, ...]
    """Keys of lm_eval's results, shares of 1."""
    items: int
    """Items of the whole test set; the paper's percentages are multiples of one over it where that can be told."""
    runs_code: bool = False
    """Whether code that the model writes is executed."""
    gated: bool = False
    """Whether the hub gives the data only to who has accepted their terms."""
    modules: tuple[str, ...] = ()
    """Modules that the task imports and lm_eval alone does not install."""
    caveats: tuple[str, ...] = ()
    """What lm_eval's task does that a reader of its figure should know."""
    own: tuple[str, ...] = ()
    """Those of `metrics` that are no result of lm_eval's, but read here from the answers that it keeps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """Benchmarks that are averaged."""

    name: str
    benchmarks: tuple[Benchmark, ...]
    """In the order of the paper's columns."""
    chat: bool
    """Whether prompts go through the model's chat template."""


ACC, BOTH_ACC = ("acc,none",), ("acc_norm,none", "acc,none")
STRICT, FLEXIBLE = "exact_match,strict-match", "exact_match,flexible-extract"
PASS_AT_1, PASS_AT_1_OF_TEXT = ("pass@1,create_test",), ("pass_at_1,extract_code",)

LOSES_LAST = "the pattern that reads the answer drops its last character where no full stop follows it"
STRICT_LOSES_LAST = "the strict pattern drops the answer's last digit where nothing follows it"
UNSEEDED = "the check of an answer's language is random where the answer is short"
SHOWS_ITSELF = "4 of the 448 questions stand among their own examples"

MATH = Benchmark(
    name="MATH",
    task="minerva_math",
    few_shot=4,
    metrics=("exact_match,none", "math_verify,none"),
    items=5000,
    modules=("math_verify", "sympy", "antlr4"),
)
GPQA = Benchmark(
    name="GPQA",
    task="gpqa_main_n_shot",
    few_shot=5,
    metrics=("acc,none", "acc_norm,none"),
    items=448,
    gated=True,
    caveats=(SHOWS_ITSELF,),
)
IFEVAL = Benchmark(
    name="IFE",
    task="ifeval",
    few_shot=3,
    # By instruction: the paper's figures are multiples of 1/834, the number of instructions.
    metrics=("inst_level_strict_acc,none", "inst_level_loose_acc,none"),
    items=541,
    modules=("langdetect", "immutabledict", "nltk"),
    caveats=(UNSEEDED,),
)
HUMANEVAL = Benchmark(name="HE", task="humaneval", few_shot=0, metrics=PASS_AT_1, items=164, runs_code=True)
MBPP = Benchmark(name="MBPP", task="mbpp", few_shot=3, metrics=("pass_at_1,none",), items=500, runs_code=True)
MMLU_PRO = Benchmark(name="MMLU-Pro", task="mmlu_pro", few_shot=5, metrics=("exact_match,custom-extract",), items=12032)

BASE = Suite(
    name="base",
    chat=False,
    benchmarks=(
        Benchmark(name="GSM8K", task="gsm8k", few_shot=8, metrics=(STRICT, FLEXIBLE), items=1319),
        MATH,
        GPQA,
        Benchmark(
            name="BBH",
            task="bbh_cot_fewshot",
            few_shot=3,
            metrics=("exact_match,get-answer",),
            items=6511,
            caveats=(LOSES_LAST,),
        ),
        IFEVAL,
        HUMANEVAL,
        MBPP,
        Benchmark(name="TQA", task="truthfulqa_mc1", few_shot=3, metrics=ACC, items=817),
        Benchmark(name="ARC-C", task="arc_challenge", few_shot=25, metrics=BOTH_ACC, items=1172),
        MMLU_PRO,
    ),
)
"""Tables 1 and 2: pre-trained and mid-trained models, few-shot (Section D.3)."""

POST = Suite(
    name="post",
    chat=True,
    benchmarks=(
        Benchmark(
            name="GSM8K",
            task="gsm8k_cot_zeroshot",
            few_shot=0,
            metrics=(FLEXIBLE, STRICT),
            items=1319,
            caveats=(STRICT_LOSES_LAST,),
        ),
        # Without examples no prompt shows the phrase that exact_match looks for.
        replace(MATH, few_shot=0, metrics=("math_verify,none", "exact_match,none")),
        replace(MBPP, task="mbpp_instruct", few_shot=0, metrics=PASS_AT_1_OF_TEXT),
        replace(MBPP, name="MBPP+", task="mbpp_plus_instruct", few_shot=0, metrics=PASS_AT_1_OF_TEXT, items=378),
        replace(HUMANEVAL, task="humaneval_instruct"),
        # lm_eval has no form of it for chat models: the template is put around the plain one.
        replace(HUMANEVAL, name="HE+", task="humaneval_plus"),
        Benchmark(
            name="ARC-C",
            task="arc_challenge_chat",
            few_shot=0,
            metrics=("exact_match,remove_whitespace",),
            items=1172,
        ),
        replace(GPQA, name="GPQA-DM", task="gpqa_diamond_zeroshot", few_shot=0, items=198, caveats=()),
        replace(MMLU_PRO, few_shot=0),
        replace(IFEVAL, few_shot=0),
    ),
)
"""Tables 3 and 4: post-trained models, zero-shot (Section D.4)."""

EXTENDED = Suite(
    name="extended",
    chat=False,
    benchmarks=(
        Benchmark(name="HellaSwag", task="hellaswag", few_shot=None, metrics=BOTH_ACC, items=10042),
        Benchmark(name="PIQA", task="piqa", few_shot=None, metrics=BOTH_ACC, items=1838),
        Benchmark(name="Social IQA", task="social_iqa", few_shot=None, metrics=ACC, items=1954),
        Benchmark(name="WinoGrande", task="winogrande", few_shot=None, metrics=ACC, items=1267),
        Benchmark(name="OpenBookQA", task="openbookqa", few_shot=None, metrics=BOTH_ACC, items=500),
        Benchmark(name="CommonsenseQA", task="commonsense_qa", few_shot=None, metrics=ACC, items=1221),
        Benchmark(name="MuSR", task="leaderboard_musr", few_shot=None, metrics=("acc_norm,none",), items=756),
    ),
)
"""Named in Section D.3 without figures or numbers of examples."""

ANY_ANSWER = "exact_match,any-answer"
"""BBH by `readings`: a final answer in a box counts too."""

REASONING = Suite(
    name="reasoning",
    chat=False,
    benchmarks=(
        Benchmark(name="GSM8K", task="gsm8k", few_shot=None, metrics=(FLEXIBLE, STRICT), items=1319),
        replace(MATH, name="MATH-500", task="minerva_math500", few_shot=None, metrics=MATH.metrics[::-1], items=500),
        Benchmark(
            name="BBH",
            task="bbh_cot_fewshot",
            few_shot=None,
            metrics=("exact_match,get-answer", ANY_ANSWER),
            items=6511,
            caveats=(LOSES_LAST,),
            own=(ANY_ANSWER,),
        ),
        replace(IFEVAL, few_shot=None, metrics=IFEVAL.metrics[::-1]),
    ),
)
"""What "Knowledge Distillation During Mid-Training Favors Reasoning over Factual Recall" (arXiv 2609.01532) reports of
reasoning, as far as it is known here: MATH by a flexible match, IFEval loose and by instruction."""

WHOLE_SET = "lm_eval has all 17,944 validation questions; 7,993 of them are reported elsewhere"

RECALL = Suite(
    name="recall",
    chat=False,
    benchmarks=(
        Benchmark(
            name="TriviaQA",
            task="triviaqa",
            few_shot=None,
            metrics=("exact_match,remove_whitespace",),
            items=17944,
            caveats=(WHOLE_SET,),
        ),
        Benchmark(name="NQ", task="nq_open", few_shot=None, metrics=("exact_match,remove_whitespace",), items=3610),
    ),
)
"""Facts, which distillation costs: TriviaQA and NaturalQuestions without their texts. lm_eval has no SimpleQA."""

SUITES = {suite.name: suite for suite in (BASE, POST, EXTENDED, REASONING, RECALL)}


def choose(suite: Suite, names: Sequence[str]) -> tuple[Benchmark, ...]:
    """The benchmarks of those names, the paper's or lm_eval's; all where none is named. Raises UserError."""
    known = {name: benchmark for benchmark in suite.benchmarks for name in (benchmark.task, benchmark.name)}
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f", did you mean '{near[0]}'?" if near else f": it has {', '.join(b.name for b in suite.benchmarks)}"
            raise UserError(f"--tasks: suite '{suite.name}' has no '{name}'{hint}")
    chosen = {known[name].name for name in names}
    return tuple(b for b in suite.benchmarks if not names or b.name in chosen)
