"""What an objective says of itself holds, and a new one is a file and a line, or no line at all."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from remit_megatron.config import Parallel, Recipe, dump_toml, load_recipe, parse_recipe
from remit_megatron.errors import UserError
from remit_megatron.mcore.platform import activate
from remit_megatron.objectives import OBJECTIVES, Need, Objective, ObjectiveSettings, TokenStats, build_objective
from remit_megatron.ops.routing import Routed
from tests.mcore.harness import BUILD, REFERENCE, SEQUENCE, STUDENT, randomise
from tests.ranks import run_ranks
from tests.test_config import minimal
from tests.train import runs

ROOT = Path(__file__).parents[2]
LIKELY = next(
    block
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs/objectives.md").read_text(), re.DOTALL)
    if "class Likely" in block
)
"""The objective that docs/objectives.md shows."""

UNSURE = '''
from typing import Literal

from remit_megatron.objectives import Distribution, LossSum, Need, ObjectiveSettings, TokenStats
from remit_megatron.objectives.base import kept_tokens, mean_over


class Unsure(ObjectiveSettings):
    """The KL where the reference's entropy is below a threshold, the NLL elsewhere."""

    name: Literal["unsure"] = "unsure"
    threshold_nats: float = 3.9

    @property
    def needs(self):
        return frozenset({Need.DISTRIBUTION, Need.ENTROPY, Need.REF_NLL})

    @property
    def metrics(self):
        return ("loss", "nll", "ref_nll", "kl", "sure")

    @property
    def distribution(self):
        return Distribution(temperature=2.0)

    def __call__(self, stats: TokenStats) -> LossSum:
        kept, nll, num_tokens = kept_tokens(stats)
        sure = stats.ref_entropy < self.threshold_nats
        token_loss = stats.kl.where(sure, nll).where(kept, 0.0)
        values = {"loss": token_loss, "nll": nll, "ref_nll": stats.ref_nll, "kl": stats.kl, "sure": sure}
        metrics = {name: mean_over(kept, value) for name, value in values.items()}
        return LossSum(loss_sum=token_loss.sum(), num_tokens=num_tokens, metrics=metrics)
'''

DOCUMENTS, SELECTION = Need.DOCUMENTS, Need.GLOBAL_SELECTION
ROUTED = {Need.DISTRIBUTION, Need.ENTROPY, Need.AGREEMENT, Need.ROUTING}
CONTRACTS: list[tuple[dict[str, Any], set[Need], bool]] = [
    ({"name": "ntp"}, set(), True),
    ({"name": "remit"}, {Need.REF_NLL}, True),
    ({"name": "remit", "centering": "document"}, {Need.REF_NLL, DOCUMENTS}, True),
    ({"name": "remit", "clip": False}, {Need.REF_NLL}, True),
    ({"name": "rho1"}, {Need.REF_NLL}, True),
    ({"name": "rho1", "scope": "microbatch"}, {Need.REF_NLL}, False),
    ({"name": "rho1", "scope": "global"}, {Need.REF_NLL, SELECTION}, False),
    ({"name": "kd"}, {Need.DISTRIBUTION}, False),
    ({"name": "kd", "direction": "reverse"}, {Need.DISTRIBUTION}, False),
    ({"name": "switch"}, ROUTED, False),
    ({"name": "switch", "route": "correct", "target": "top1"}, ROUTED, False),
    ({"name": "trkd"}, ROUTED, False),
]


@pytest.mark.parametrize(("settings", "needs", "by_sample"), CONTRACTS)
def test_what_each_says_of_itself(settings: dict[str, Any], needs: set[Need], by_sample: bool) -> None:
    """Its needs suffice, in that nothing else is given here; and it returns the metrics that it declares, in order."""
    objective = build_objective(settings)
    assert (objective.needs, objective.by_sample) == (needs, by_sample)
    assert objective.needs_reference == bool(needs)
    values = torch.rand(2, 6)
    given = {
        Need.REF_NLL: {"ref_nll": values * 2},
        Need.DISTRIBUTION: {"kl": values},
        Need.GLOBAL_SELECTION: {"selected": torch.ones(2, 6)},
        Need.ENTROPY: {"ref_entropy": values},
        Need.AGREEMENT: {"ref_agrees": torch.ones(2, 6)},
        Need.ROUTING: {"routed": Routed(**dict.fromkeys(("chosen", "balance", "compared", "threshold"), values > 0.5))},
        Need.DOCUMENTS: {"segment_ids": torch.zeros(2, 6, dtype=torch.int64)},
    }
    stats: dict[str, Any] = {key: value for need in needs for key, value in given[need].items()}
    result = objective(TokenStats(nll=values, mask=torch.ones(2, 6), **stats))
    assert tuple(result.metrics) == objective.metrics


def test_recipes_are_read_without_torch() -> None:
    """Every shipped recipe and every objective's settings, in a process of their own."""
    code = """
import sys
from pathlib import Path
from remit_megatron.config import dump_toml, load_recipe
from remit_megatron.objectives.settings import OBJECTIVES, parse_objective
for path in [*Path("launch/recipes").glob("*.toml"), *Path("examples/smoke/recipes").glob("*.toml")]:
    dump_toml(load_recipe(path))
    load_recipe(path).fingerprint()
for name in OBJECTIVES:
    parse_objective({"name": name})
print([name for name in ("torch", "megatron", "numpy", "triton") if name in sys.modules])
"""
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder outside of this repository from which Python imports."""
    folder = tmp_path / "mypackage"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "likely.py").write_text(LIKELY)
    (folder / "unsure.py").write_text(UNSURE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield folder
    for name in [name for name in sys.modules if name.split(".")[0] == "mypackage"]:
        del sys.modules[name]


OWN = {"import_path": "mypackage.likely:Likely", "below_nats": 2.5}


def own_recipe(**objective: Any) -> Recipe:
    return parse_recipe(minimal(objective={**OWN, **objective}, reference={"path": "r"}))


def test_a_package_of_one_s_own_brings_one(package: Path, tmp_path: Path) -> None:
    """Without a line here: read, written, compared and computed like those that are built in."""
    recipe = own_recipe()
    assert recipe.objective.name == "likely"
    assert recipe.objective.needs_reference
    path = tmp_path / "r.toml"
    path.write_text(dump_toml(recipe))
    assert load_recipe(path) == recipe
    assert own_recipe(below_nats=2).fingerprint() != recipe.fingerprint()
    assert own_recipe(name="likely").fingerprint() == recipe.fingerprint()
    assert (
        own_recipe(below_nats=3.0).fingerprint()
        == own_recipe()
        .model_copy(update={"objective": build_objective({"import_path": OWN["import_path"]})})
        .fingerprint()
    ), "a default written out is no other recipe"

    nll = torch.tensor([[1.0, 2.0, 4.0, 8.0]])
    ref_nll = torch.tensor([[2.0, 3.0, 1.0, torch.nan]])
    result = recipe.build_objective()(TokenStats(nll=nll, ref_nll=ref_nll, mask=torch.tensor([[1.0, 1.0, 1.0, 0.0]])))
    assert (result.loss_sum.item(), int(result.num_tokens)) == (5.0, 2)
    assert tuple(result.metrics) == recipe.objective.metrics
    assert result.metrics["chosen"].read() == pytest.approx(2 / 3)


def test_it_trains_by_recipe(package: Path, tmp_path: Path) -> None:
    """On two ranks, through the trainer: its metrics reach metrics.jsonl, and its count divides the loss."""
    runs.make_data(tmp_path)
    short = {"schedule": {"train_tokens": 3 * runs.SEQUENCE * runs.SAMPLES}}
    recipes = [
        runs.settings(tmp_path, "base", **short),
        runs.remit(tmp_path, "own", objective={**OWN, "below_nats": 4.1}, **short),
        runs.remit(tmp_path, "all", objective={**OWN, "below_nats": 1e9}, **short),
        runs.settings(tmp_path, "ntp", **short),
    ]
    for outcomes in run_ranks(2, runs.train_all, recipes):
        assert outcomes == [(0, "")] * 4
    own, all_of_them, ntp = (runs.metrics(tmp_path, name) for name in ("own", "all", "ntp"))
    assert all(0 < line["chosen"] < 1 and line["loss"] != line["nll"] for line in own)
    assert [{k: v for k, v in line.items() if k != "chosen"} for line in all_of_them] == ntp, "every token is NTP"


def test_a_new_one_here_is_a_file_and_a_line(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OBJECTIVES, "likely", "mypackage.likely:Likely")
    recipe = parse_recipe(minimal(objective={"name": "likely", "below_nats": 1}, reference={"path": "r"}))
    assert recipe.identity()["objective"] == {"name": "likely", "below_nats": 1.0}
    assert recipe.build_objective().metrics == ("loss", "nll", "chosen")
    with pytest.raises(UserError, match=r"unknown key objective.below for 'likely', did you mean below_nats\?"):
        build_objective({"name": "likely", "below": 1.0})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"import_path": "mypackage.likely"}, "'mypackage.likely': write it as package.module:Class"),
        ({"import_path": 3}, "objective.import_path = '3': write it as package.module:Class"),
        ({"import_path": "mypackag.likely:Likely"}, "No module named 'mypackag': install the package, or add its"),
        ({"import_path": "mypackage.likely:Unlikely"}, "mypackage.likely has no Unlikely"),
        ({"import_path": "mypackage.likely:TokenStats"}, "TokenStats must be a subclass of"),
        ({"import_path": "remit_megatron.objectives.settings:NTPSettings"}, "with __call__"),
        ({**OWN, "name": "remit"}, "objective.name must be one of likely, got 'remit'"),
        ({**OWN, "below_nats": "2"}, "objective.below_nats must be of type float, got '2'"),
        ({**OWN, "epsilon": 0.2}, "unknown key objective.epsilon for 'likely': known are below_nats"),
    ],
)
def test_mistakes_in_one_s_own_name_the_key(package: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_recipe(minimal(objective=settings, reference={"path": "r"}))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("objective", [{"name": "kd"}, {"name": "switch"}, {"name": "trkd"}, {}])
@pytest.mark.parametrize("source", [{"scores": "s"}, {"write_scores": "s"}, {"queue": {}}])
def test_one_number_a_token_serves_no_distribution(
    package: Path, objective: dict[str, Any], source: dict[str, Any]
) -> None:
    """Refused by the names of both; the reference beside the student serves, and so does a kept distribution."""
    objective = objective or {"import_path": "mypackage.unsure:Unsure"}
    recipe = parse_recipe(minimal(objective=objective, reference={"path": "r"}))
    wanted = (
        f"reference.{next(iter(source))} carries one number a token, and objective.name = '{recipe.objective.name}'"
    )
    with pytest.raises(UserError, match=re.escape(wanted)):
        parse_recipe(minimal(objective=objective, reference={"path": "r", **source}))
    parse_recipe(minimal(objective=objective, reference={"path": "r", "distribution": 8, **source}))


def train_unsure(rank: int) -> dict[str, Any]:
    """One microbatch by `mypackage.unsure`, with the entropy carried and the rest made; and what it should be. And the
    entropy that is made where none is carried."""
    activate("cpu")
    from remit_megatron.data.microbatch import Microbatch, Scores
    from remit_megatron.mcore import passes
    from remit_megatron.mcore.groups import destroy_groups, initialize_groups
    from remit_megatron.mcore.model import build_chunks
    from remit_megatron.mcore.step import make_forward_step

    groups = initialize_groups(Parallel(tensor=2), seed=1)
    student, _ = build_chunks(STUDENT, Parallel(tensor=2), BUILD, max_sequence_length=SEQUENCE)
    frozen, _ = build_chunks(REFERENCE, Parallel(tensor=2), BUILD, max_sequence_length=SEQUENCE, scorer=True)
    randomise(student)
    randomise(frozen)
    generator = torch.Generator().manual_seed(3)
    text = torch.randint(61, (2, SEQUENCE + 1), generator=generator)
    entropy = torch.rand(2, SEQUENCE, generator=generator) + 3.4
    microbatch = Microbatch(tokens=text[:, :-1], labels=text[:, 1:], loss_mask=torch.ones(2, SEQUENCE))
    objective = build_objective({"import_path": "mypackage.unsure:Unsure"})
    step = make_forward_step(objective, frozen, groups=groups)
    found: dict[str, Any] = {}
    (made,) = step.scored([microbatch])
    (states,) = passes.hidden(frozen, [microbatch], groups)
    logits = [torch.empty(2, SEQUENCE, frozen[0].head_weight().shape[0]) for _ in range(2)]
    dist.all_gather(logits, states @ frozen[0].head_weight().t(), group=groups.tp)
    log_q = (torch.cat(logits, dim=-1)[..., :61].double() / 2.0).log_softmax(-1)
    assert made.scores is not None
    assert made.scores.entropy is not None
    assert made.scores.agrees is None, "what is not asked for is not kept"
    found["entropy error"] = float((made.scores.entropy + (log_q.exp() * log_q).sum(-1)).abs().max())
    scored = step.scored([microbatch.with_scores(Scores(entropy=entropy))])
    (report,) = passes.run_schedule(step, scored, student, forward_only=True)
    (both,) = passes.nll_and_kl(student, frozen, [microbatch], groups, temperature=2.0)
    (ref_nll,) = passes.nll(frozen, [microbatch], groups)
    sure = entropy < 3.9
    want = {"loss": both[1].where(sure, both[0]), "ref_nll": ref_nll, "kl": both[1], "sure": sure.float()}
    found["pairs"] = {name: (float(report[name][0] / report[name][1]), float(x.mean())) for name, x in want.items()}
    destroy_groups()
    return found


def test_one_that_asks_for_distribution_and_entropy(package: Path) -> None:
    """Under tensor parallelism: the pieces are those that the passes give by themselves."""
    for found in run_ranks(2, train_unsure):
        assert found["entropy error"] < 2e-6  # float32
        for name, (got, want) in found["pairs"].items():
            assert got == pytest.approx(want, rel=1e-6), name  # float64 sums of the same float32 numbers
        assert 0.2 < found["pairs"]["sure"][0] < 0.8


def test_every_objective_is_one(package: Path) -> None:
    """Objects that a recipe can name have all that the protocol asks for."""
    asked = {name for name in vars(Objective) if not name.startswith("_")}
    for name in OBJECTIVES:
        objective = build_objective({"name": name})
        assert isinstance(objective, ObjectiveSettings)
        assert all(hasattr(objective, one) for one in asked), name
    assert {"needs", "metrics", "by_sample", "remark", "distribution", "global_share", "routing"} <= asked
