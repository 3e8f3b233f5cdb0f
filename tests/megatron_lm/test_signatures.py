"""`pretrain` is called by the signature that each version of Megatron-LM gives it.

signatures.json has the parameters of what is called, as they are in its sources; `name=` has a default. Where
MEGATRON_LM names a checkout, the description is compared with it.
"""

import ast
import inspect
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from remit_megatron.errors import UserError
from tests.megatron_lm.scripts import MEGATRON_LM, needs_megatron_lm

RECORDED: dict[str, dict[str, str]] = json.loads((Path(__file__).parent / "signatures.json").read_text())


def described(parameters: str, calls: dict[str, dict[str, Any]], name: str) -> Any:
    """A function of that signature, which keeps what it was called with and returns its own name."""
    kinds = inspect.Parameter
    made = [
        kinds(one.rstrip("="), kinds.POSITIONAL_OR_KEYWORD, default=None if one.endswith("=") else kinds.empty)
        for one in parameters.split()
    ]
    signature = inspect.Signature(made)

    def function(*args: Any, **kwargs: Any) -> Any:
        calls[name] = dict(signature.bind(*args, **kwargs).arguments)
        return types.SimpleNamespace(name=name, pre_wrap_hooks=[])

    function.__signature__ = signature  # type: ignore[attr-defined]
    return function


@pytest.mark.parametrize("version", RECORDED)
def test_pretrain_gets_each_argument_by_its_place(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.enums import ModelType

    from remit_megatron.mcore.megatron_lm import pretrain

    calls: dict[str, dict[str, Any]] = {}
    functions = {name: described(parameters, calls, name) for name, parameters in RECORDED[version].items()}
    monkeypatch.setitem(sys.modules, "megatron.training", types.ModuleType("megatron.training"))
    for name, function in functions.items():
        module, _, attribute = f"megatron.training.{name}".rpartition(".")
        monkeypatch.setitem(sys.modules, module, sys.modules.get(module) or types.ModuleType(module))
        setattr(sys.modules[module], attribute, function)

    def datasets(*args: Any) -> None: ...

    def build(*args: Any) -> None: ...

    def ranks(*args: Any) -> None: ...

    pretrain.call(functions["training.pretrain"], datasets, build, args_defaults={"seed": 1}, get_embedding_ranks=ranks)
    given = calls["training.pretrain"]
    assert given["train_valid_test_dataset_provider"] is datasets
    assert given["model_type"] is ModelType.encoder_or_decoder
    assert given["get_embedding_ranks"] is ranks
    assert given["forward_step_func"] is pretrain._not_called
    parsed = given if version in ("0.16", "0.17") else calls["arguments.parse_and_validate_args"]
    assert parsed["args_defaults"] == {"seed": 1}
    assert parsed["extra_args_provider"] is pretrain.add_arguments
    if version in ("0.18", "0.19"):
        assert given["cfg_container"].name == "argument_utils.pretrain_cfg_container_from_args"
        assert calls["argument_utils.pretrain_cfg_container_from_args"]["args"].name.endswith("validate_args")
    if version == "0.19":
        model = calls["argument_utils.pretrain_cfg_container_from_args"]["model_cfg"]
        assert model.name == "argument_utils.gpt_config_from_args"
        assert model.pre_wrap_hooks == [pretrain.hook_chunks]
        assert "model_provider" not in given
    else:
        assert given["model_provider"].func is pretrain._provide
        assert given["model_provider"].args == (build,)


def test_another_signature_is_refused() -> None:
    from remit_megatron.mcore.megatron_lm import pretrain

    unknown = described("config state", {}, "pretrain")
    with pytest.raises(UserError, match=r"takes config, state, \.\.\.: .* 0\.16 to 0\.19 are known"):
        pretrain.call(unknown, print, print, args_defaults={})


@needs_megatron_lm
def test_recorded_signatures_are_those_of_the_source() -> None:
    root = Path(MEGATRON_LM)
    info = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse((root / "megatron/core/package_info.py").read_text()).body
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.targets[0], ast.Name)
    }
    for name, parameters in RECORDED[f"{info['MAJOR']}.{info['MINOR']}"].items():
        module, function = name.split(".")
        (found,) = [
            node
            for node in ast.parse((root / f"megatron/training/{module}.py").read_text()).body
            if isinstance(node, ast.FunctionDef) and node.name == function
        ]
        names = [one.arg for one in found.args.args]
        required = len(names) - len(found.args.defaults)
        assert parameters == " ".join(names[:required] + [f"{one}=" for one in names[required:]])
