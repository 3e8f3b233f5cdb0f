"""The recipe: strict, round-trips through TOML, and has an identity that follows what is computed."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remit_megatron.config import Recipe, dump_toml, load_recipe, parse_recipe
from remit_megatron.errors import UserError


def minimal(**changes: Any) -> dict[str, Any]:
    recipe: dict[str, Any] = {
        "run": "runs/x",
        "model": {"init": "somewhere"},
        "data": {"sequence_length": 128, "train": [{"path": "a"}, {"path": "b", "weight": 0.5}]},
        "batch": {"global_batch_tokens": 1024},
        "optimizer": {"peak_lr": 3e-4},
        "schedule": {"train_tokens": 10_240},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            recipe.setdefault(section, {})[name] = value
        else:
            recipe[section] = value
    return recipe


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer__warmup": 3}, "unknown key optimizer.warmup"),
        ({"model__num_layer": 3}, "unknown key model.num_layer, did you mean num_layers?"),
        ({"paralel": {}}, "unknown key paralel, did you mean parallel?"),
        ({"optimizer": {}}, "missing key optimizer.peak_lr"),
        ({"optimizer__peak_lr": -1.0}, "optimizer.peak_lr"),
        ({"optimizer__peak_lr": "1e-4"}, "optimizer.peak_lr"),
        ({"optimizer": {"peak_l": 1e-4}}, "unknown key optimizer.peak_l, did you mean peak_lr?"),
        ({"run": ""}, "run: "),
        ({"seed": True}, "seed"),
        ({"optimizer__min_lr": 1.0}, "optimizer.min_lr must not exceed optimizer.peak_lr"),
        ({"schedule__warmup_tokens": 10_240}, "warmup_tokens must be smaller than train_tokens"),
        ({"schedule__decay": "wsd"}, "wsd_decay_tokens goes with decay = 'wsd'"),
        ({"schedule__decay": "cosin"}, "schedule.decay"),
        ({"parallel__sequence": True}, "parallel.sequence needs parallel.tensor > 1"),
        ({"parallel__virtual_pipeline": 2}, "parallel.virtual_pipeline > 1 needs parallel.pipeline > 1"),
        ({"parallel__overlap_param_gather": True}, "parallel.overlap_param_gather needs"),
        ({"reference": {"path": "r"}}, "[reference] is given but objective.name = 'ntp' uses none"),
        ({"objective": {"name": "remit"}}, "needs a [reference] section"),
        ({"objective": {"name": "remit", "epsilon": 2.0}, "reference": {"path": "r"}}, "objective.epsilon"),
        ({"objective": {"name": []}}, "unknown objective.name '[]'"),
        ({"objective": {"import_path": ":x"}}, "objective.import_path = ':x': write it as package.module:Class"),
        ({"objective": "x\n"}, "objective must be a section with objective.name, got x\\n"),
        ({"data__train": []}, "data.train"),
        ({"data__seed": 1 << 32}, "data.seed"),
    ],
)
def test_mistakes_name_the_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_recipe(minimal(**changes))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_overrides(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text(dump_toml(parse_recipe(minimal())))
    recipe = load_recipe(
        path, ["optimizer.peak_lr=1e-5", "run=runs/other", "objective.name=remit", "reference.path=r", "seed=7"]
    )
    assert (recipe.optimizer.peak_lr, recipe.run, recipe.seed) == (1e-5, "runs/other", 7)
    assert recipe.build_objective().name == "remit"
    for wrong, message in (
        ("seed", "write it as key=value"),
        ("run.x=1", "run is not a section"),
        ("run='x", "--set run='x: no valid TOML value"),
        ("data.train=[{path='a'}", "no valid TOML value"),
    ):
        with pytest.raises(UserError, match=message):
            load_recipe(path, [wrong])


PATH_CHARACTERS = st.characters(codec="utf-8", exclude_categories=["Cs"], exclude_characters="\0")
MAX_CHARACTERS = 255 // 4
"""A name of so many fits a file system's 255 bytes whatever they are."""


@given(
    st.builds(
        minimal,
        run=st.text(PATH_CHARACTERS, min_size=1, max_size=MAX_CHARACTERS),
        optimizer__peak_lr=st.floats(1e-6, 1.0),
        optimizer__min_lr=st.just(1e-7),
        seed=st.integers(0, 2**63),
        data__document_mask=st.booleans(),
        data__eval=st.dictionaries(
            st.text(st.characters(codec="ascii", exclude_categories=["Cc"])),
            st.text(PATH_CHARACTERS, max_size=MAX_CHARACTERS),
        ),
        compute__precision=st.sampled_from(["auto", "bf16", "fp32"]),
    )
)
def test_dumped_recipe_reads_back_equal(tmp_path_factory: pytest.TempPathFactory, settings: dict[str, Any]) -> None:
    recipe = parse_recipe(settings)
    path = tmp_path_factory.getbasetemp() / "dumped.toml"
    path.write_text(dump_toml(recipe), encoding="utf-8", newline="")
    assert load_recipe(path) == recipe


def test_fingerprint_follows_what_is_computed() -> None:
    base = parse_recipe(minimal()).fingerprint()
    same = [{"run": "runs/y"}, {"parallel__tensor": 2}, {"checkpoint__keep": 5}, {"batch__microbatch_samples": 4}]
    other = [
        {"seed": 1},
        {"optimizer__peak_lr": 1e-4},
        {"schedule__train_tokens": 20_480},
        {"data__train": [{"path": "a"}]},
        {"batch__global_batch_tokens": 2048},
        {"compute__precision": "bf16"},
        {"objective": {"name": "remit"}, "reference": {"path": "r"}},
    ]
    for change in same:
        assert parse_recipe(minimal(**change)).fingerprint() == base, change
    prints = [parse_recipe(minimal(**change)).fingerprint() for change in other]
    assert len({base, *prints}) == len(other) + 1
    written_out = {"objective": {"name": "remit", "epsilon": 0.2, "clip": True}, "reference": {"path": "r"}}
    assert parse_recipe(minimal(**written_out)).fingerprint() == prints[-1], "defaults are no other recipe"


def test_every_key_is_documented() -> None:
    """A bare name without a unit or a docstring is a question; names that say it all are listed here."""
    plain = {"num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads"}
    plain |= {
        "peak_lr",
        "min_lr",
        "beta1",
        "beta2",
        "epsilon",
        "weight_decay",
        "train_tokens",
        "warmup_tokens",
        "decay",
    }
    plain |= {"sequence_length", "train", "tensor", "pipeline", "context", "global_batch_tokens", "microbatch_samples"}
    plain |= {"overlap_grad_reduce", "overlap_param_gather", "init_std", "wsd_shape", "device", "tensorboard", "wandb"}
    plain |= {"wandb_project", "seed"}
    for section in Recipe.model_fields.values():
        fields = getattr(section.annotation, "model_fields", {})
        for name, field in fields.items():
            assert field.description or name in plain, f"{section.annotation}.{name} has no docstring"
