"""Fingerprints of recipes, frozen: run folders and checkpoints carry them, so they may not change with the code."""

from pathlib import Path
from typing import Any

import pytest

from remit_megatron.config import dump_toml, load_recipe, parse_recipe
from tests.test_config import minimal

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "launch/recipes"
SMOKE = ROOT / "examples/smoke/recipes"
SHIPPED = {
    "olmo2_1b_ntp.toml": "3a8ac31dfe2e",
    "olmo2_1b_public_ntp.toml": "d0ad67e08ddd",
    "olmo2_1b_public_remit.toml": "159c39682b05",
    "olmo2_1b_remit.toml": "563532c5bed4",
    "smoke/base.toml": "0f94dafa742d",
    "smoke/ntp.toml": "9de722de9448",
    "smoke/reference.toml": "2c820a4b879a",
    "smoke/remit.toml": "dc11447bfe5a",
    "smollm3_3b_ntp.toml": "b5b8f4331396",
    "smollm3_3b_public_ntp.toml": "994f7c35de0a",
    "smollm3_3b_public_remit.toml": "c2b67111e736",
    "smollm3_3b_remit.toml": "706abeaf293c",
    "youtu_2b_ntp.toml": "f9849377079e",
    "youtu_2b_remit.toml": "cd4a78bf4c70",
}
REFERENCE = {"path": "r"}
EVERY_SETTING: list[tuple[dict[str, Any], str]] = [
    ({"name": "ntp"}, "6e5bc6e2b1cc"),
    ({"name": "remit"}, "5eb7fcb15ce3"),
    (
        {
            "name": "remit",
            "epsilon": 0.5,
            "clip": False,
            "centering": "document",
            "shuffle": True,
            "shuffle_seed": 3,
        },
        "d5ad2c9f1bd0",
    ),
    ({"name": "remit", "epsilon": 1}, "c79a3f9b4405"),
    ({"name": "rho1"}, "8c81db1bac5c"),
    ({"name": "rho1", "share": 0.6, "scope": "global"}, "fb3ff672eee2"),
    ({"name": "kd"}, "b148b128141d"),
    ({"name": "kd", "kd_alpha": 0.5, "temperature": 2.0, "top_k": 64}, "90452740cdf4"),
    ({"name": "kd", "direction": "forward", "scale": "none"}, "b148b128141d"),
    ({"name": "kd", "direction": "reverse", "scale": "tau_squared"}, "1b253b5ee459"),
    ({"name": "switch"}, "3663f90a1832"),
    ({"name": "switch", "share": 0.4, "means": "token", "scope": "sequence", "route": "random"}, "63c1421973a3"),
    ({"name": "trkd"}, "aea27c9b3335"),
]


@pytest.mark.parametrize("name", SHIPPED)
def test_of_the_shipped_recipes(name: str) -> None:
    path = SMOKE / name.removeprefix("smoke/") if name.startswith("smoke/") else RECIPES / name
    assert load_recipe(path).fingerprint() == SHIPPED[name]


@pytest.mark.parametrize(("objective", "fingerprint"), EVERY_SETTING)
def test_of_every_objective_s_settings(objective: dict[str, Any], fingerprint: str) -> None:
    changes = {} if objective["name"] == "ntp" else {"reference": REFERENCE}
    recipe = parse_recipe(minimal(objective=objective, **changes))
    assert recipe.fingerprint() == fingerprint
    written = {**objective, "epsilon": float(objective["epsilon"])} if "epsilon" in objective else objective
    section = dump_toml(recipe).split("[objective]\n")[1].split("\n\n")[0]
    assert section.splitlines() == [
        f"{key} = {str(value).lower() if isinstance(value, bool) else repr(value).replace(chr(39), chr(34))}"
        for key, value in written.items()
    ], "what the recipe says and nothing else"
