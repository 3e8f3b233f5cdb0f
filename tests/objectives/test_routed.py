"""Switch and token-routed distillation: values and gradients against plain float64 code, and what they reduce to."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from remit_megatron.errors import UserError
from remit_megatron.objectives import KD, NTP, Switch, TokenStats, build_objective
from remit_megatron.ops.routing import Routed, route
from tests.objectives.test_objectives import given, make_stats
from tests.ops.cases import gradient_of

IDS, POSITIONS = torch.tensor([3, 1, 4]), torch.arange(12)


def with_routed(objective: Any, parts: int = 1) -> list[TokenStats]:
    """`make_stats` cut into microbatches after the first row, or whole, with what the objective needs; NaN and inf
    where masked. What is routed was chosen over all of them."""
    stats = make_stats()
    generator = torch.Generator().manual_seed(5)
    kept = stats.mask > 0
    kl, entropy = (torch.rand(3, 12, generator=generator) * 3 for _ in range(2))
    agrees = (torch.rand(3, 12, generator=generator) < 0.5).float()
    rows = [slice(0, 3)] if parts == 1 else [slice(0, 1), slice(1, 3)]
    cut = [{"mask": stats.mask[one], "ref_entropy": entropy[one], "ref_agrees": agrees[one]} for one in rows]
    found = route(
        objective.routing,
        *([one[name] for one in cut] for name in ("ref_entropy", "ref_agrees", "mask")),
        sample_ids=[IDS[one] for one in rows],
        positions=POSITIONS,
        step=2,
    )  # type: ignore[misc]
    made = []
    for one, fields, routed in zip(rows, cut, found, strict=True):
        masked = ~kept[one]
        kl_leaf = kl[one].where(routed.compared, 0.0).masked_fill(masked, torch.nan).requires_grad_()
        nll_leaf = stats.nll.detach()[one].clone().requires_grad_()
        made.append(TokenStats(nll=nll_leaf, kl=kl_leaf, routed=routed, sample_id=IDS[one], step=2, **fields))
    return made


def plain(settings: dict[str, Any], chosen: Tensor, nll: Tensor, kl: Tensor, kept: Tensor) -> Tensor:
    """The mean loss as the equations have it, float64."""
    on, off, n = kept & (chosen > 0), kept & (chosen == 0), kept.sum()
    tau = settings.get("temperature", 2.0 if settings["name"] == "switch" else 1.0)
    if settings["name"] == "trkd":
        scale = tau**2 if settings.get("scale") == "tau_squared" else 1.0
        alpha = settings.get("kd_alpha", 0.5)
        return (1 - alpha) * nll[kept].mean() + alpha * scale * kl[on].sum() / n
    scale = 1.0 if settings.get("target") == "top1" else tau**2
    labelled = kept if settings.get("nll_on") == "all" else off
    if settings.get("means") == "token":
        return (scale * kl[on].sum() + nll[labelled].sum()) / n
    return scale * kl[on].mean() + nll[labelled].mean()


CASES: list[dict[str, Any]] = [
    {"name": "switch"},
    {"name": "switch", "means": "token", "temperature": 1.5},
    {"name": "switch", "scope": "sequence", "share": 0.5},
    {"name": "switch", "nll_on": "all"},
    {"name": "switch", "nll_on": "all", "means": "token"},
    {"name": "switch", "route": "random", "share": 0.4},
    {"name": "switch", "route": "correct"},
    {"name": "switch", "target": "top1"},
    {"name": "switch", "direction": "forward"},
    {"name": "trkd"},
    {"name": "trkd", "share": 0.3, "kd_alpha": 0.25, "temperature": 2.0, "scale": "tau_squared", "scope": "global"},
]


@pytest.mark.parametrize("settings", CASES, ids=str)
@pytest.mark.parametrize("parts", [1, 2])
def test_matches_the_equations(settings: dict[str, Any], parts: int) -> None:
    """Also where the batch is cut unevenly: the mean of each group is over the whole batch."""
    objective = build_objective(settings)
    made = with_routed(objective, parts)
    results = [objective(stats) for stats in made]
    count = sum(int(result.num_tokens) for result in results)
    total = torch.stack([result.loss_sum for result in results]).sum() / count
    total.backward()

    def joined(name: str) -> Tensor:
        return torch.cat([given(getattr(stats, name)).detach() for stats in made])

    routed = [stats.routed for stats in made if stats.routed is not None]
    chosen = torch.cat([one.chosen for one in routed])
    kept = joined("mask") > 0
    nll, kl = (joined(name).double().requires_grad_() for name in ("nll", "kl"))
    want = plain(settings, chosen, nll, kl, kept)
    want.backward()
    # Products and sums in float32.
    assert total.item() == pytest.approx(want.item(), rel=1e-6)
    for name, leaf in (("nll", nll), ("kl", kl)):
        gradient = torch.cat([gradient_of(getattr(stats, name)) for stats in made]).double()
        torch.testing.assert_close(gradient, gradient_of(leaf), rtol=1e-6, atol=1e-9)

    metrics = results[0].metrics
    for result in results[1:]:
        metrics = {name: ratio + result.metrics[name] for name, ratio in metrics.items()}
    on, off = kept & (chosen > 0), kept & (chosen == 0)
    compared = torch.cat([one.compared for one in routed])
    entropy, agrees = joined("ref_entropy").double(), joined("ref_agrees").double()
    wanted = {
        "loss": want,
        "nll": nll[kept].mean(),
        "routed": on.sum() / kept.sum(),
        "ref_entropy": entropy[kept].mean(),
        "kl_routed": kl[on].mean(),
        "kl_rest": kl[off & compared].mean(),
        "nll_routed": nll[on].mean(),
        "nll_rest": nll[off].mean(),
        "agrees_routed": agrees[on].mean(),
        "agrees_rest": agrees[off].mean(),
    }
    if "entropy_threshold" in metrics and settings.get("scope", "sequence" if settings["name"] == "trkd" else "") == "":
        wanted["entropy_threshold"] = entropy[on].max()
    for name, value in wanted.items():
        assert metrics[name].read() == pytest.approx(value.item(), rel=1e-6, nan_ok=True), name
    assert tuple(metrics) == objective.metrics


def test_a_mean_of_means_is_another_number() -> None:
    """What the global counts are for: the microbatches' own means, averaged, are far from the loss."""
    objective = Switch()
    made = with_routed(objective, 2)
    results = [objective(stats) for stats in made]
    loss = sum(r.loss_sum.item() for r in results) / sum(int(r.num_tokens) for r in results)
    means = []
    for stats in made:
        kept, chosen = stats.mask > 0, given(stats.routed.chosen if stats.routed else None)
        on, off = kept & (chosen > 0), kept & (chosen == 0)
        means.append(4 * given(stats.kl)[on].mean().item() * bool(on.any()) + stats.nll[off].mean().item())
    assert abs(sum(means) / 2 - loss) > 0.05


@pytest.mark.parametrize("means", ["group", "token"])
def test_nothing_routed_is_ntp_bit_for_bit(means: str) -> None:
    (stats,) = with_routed(build_objective({"name": "switch", "share": 0.0}))
    plain_stats = TokenStats(nll=stats.nll.detach().clone().requires_grad_(), mask=stats.mask)
    result, ntp = build_objective({"name": "switch", "share": 0.0, "means": means})(stats), NTP()(plain_stats)
    result.loss_sum.backward()
    ntp.loss_sum.backward()
    assert torch.equal(result.loss_sum, ntp.loss_sum)
    assert result.num_tokens == ntp.num_tokens
    assert torch.equal(gradient_of(stats.nll), gradient_of(plain_stats.nll))
    assert not gradient_of(given(stats.kl)).nan_to_num().any()


def test_everything_routed_is_reverse_kd() -> None:
    """At kd_alpha 1 with the squared temperature."""
    objective = build_objective({"name": "switch", "share": 1.0, "means": "token"})
    kd = KD(temperature=2.0, direction="reverse", scale="tau_squared")
    assert objective.distribution == kd.distribution
    (stats,) = with_routed(objective)
    other = dataclasses.replace(stats, kl=given(stats.kl).detach().clone().requires_grad_())
    results = [objective(stats), kd(other)]
    for result in results:
        result.loss_sum.backward()
    assert torch.equal(results[0].loss_sum, results[1].loss_sum)
    assert torch.equal(gradient_of(given(stats.kl)), gradient_of(given(other.kl)))


def test_a_choice_that_failed_reaches_the_loss() -> None:
    (stats,) = with_routed(Switch())
    routed = stats.routed
    assert isinstance(routed, Routed)
    failed = dataclasses.replace(routed, chosen=routed.chosen.masked_fill(stats.mask > 0, torch.nan))
    assert Switch()(dataclasses.replace(stats, routed=failed)).loss_sum.isnan()


def test_a_microbatch_without_tokens_runs_backward() -> None:
    (stats,) = with_routed(Switch())
    result = Switch()(dataclasses.replace(stats, mask=torch.zeros_like(stats.mask), routed=emptied(stats)))
    result.loss_sum.backward()
    assert result.loss_sum == 0
    assert result.num_tokens == 0


def emptied(stats: TokenStats) -> Routed:
    assert stats.routed is not None
    fields = {field.name: getattr(stats.routed, field.name) for field in dataclasses.fields(Routed)}
    return Routed(**{name: torch.zeros_like(value) for name, value in fields.items()})


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("switch", "share", 1e-7),
        ("switch", "share", -0.1),
        ("switch", "temperature", 0.0),
        ("switch", "means", "sample"),
        ("switch", "scope", "batch"),
        ("switch", "route", "label"),
        ("trkd", "kd_alpha", 1.5),
        ("trkd", "share", 2.0),
        ("kd", "direction", "both"),
        ("kd", "scale", "tau"),
    ],
)
def test_wrong_settings_name_the_key(name: str, key: str, value: object) -> None:
    with pytest.raises(UserError, match=f"objective.{key} must be"):
        build_objective({"name": name, key: value})


def test_what_depends_on_the_cut_is_said() -> None:
    for name in ("switch", "trkd"):
        assert "microbatch_samples" in str(build_objective({"name": name, "scope": "microbatch"}).remark)
        assert build_objective({"name": name}).remark is None
