"""docs/bridge.md against Megatron-Bridge's sources, as far as they import: MEGATRON_BRIDGE=FOLDER is their `src`."""

import ast
import importlib.util
import os
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = os.environ.get("MEGATRON_BRIDGE", "")
needs_bridge = pytest.mark.skipif(
    not SOURCE, reason="MEGATRON_BRIDGE=FOLDER names the src of a checkout of Megatron-Bridge v0.6.0, and is not set"
)


def page() -> ast.Module:
    text = (ROOT / "docs/bridge.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return ast.parse(code)


def test_names_of_this_package_are_there() -> None:
    """And take what the page gives them."""
    import inspect

    from remit_megatron.mcore.platform import activate

    activate("cpu")
    from remit_megatron.mcore import weighting
    from remit_megatron.objectives import Remit

    inspect.signature(weighting.pre_wrap_hook).bind(Remit(epsilon=0.2), print, valid_vocab=1)
    assert "take_metrics" in vars(weighting.WeightingGPTModel)
    imported = [node for node in page().body if isinstance(node, ast.ImportFrom)]
    ours = {alias.name for node in imported if str(node.module).startswith("remit_") for alias in node.names}
    assert ours == {"pre_wrap_hook", "Remit"}


def definition(module: str, name: str) -> Any:
    """A function, a class, or a method as Class.method, in a module's source."""
    path = Path(SOURCE) / (module.replace(".", "/") + ".py")
    body: list[Any] = ast.parse((path if path.exists() else path.with_suffix("") / "__init__.py").read_text()).body
    for part in name.split("."):
        (found,) = [node for node in body if getattr(node, "name", None) == part]
        body = getattr(found, "body", [])
    return found


def parameters(found: Any) -> list[str]:
    return [one.arg for one in (*found.args.args, *found.args.kwonlyargs)]


@needs_bridge
def test_names_of_bridge_are_there() -> None:
    training, models = "megatron.bridge.training", "megatron.bridge.models"
    batch = definition(f"{training}.gpt_step", "get_batch")
    assert parameters(batch)[:2] == ["data_iterator", "cfg"]
    assert "pg_collection" in parameters(batch)
    returned = [node for node in ast.walk(batch) if isinstance(node, ast.Return)][-1].value
    named = re.findall(r"batch(?:\.get\(|\[)'(\w+)'", ast.unparse(returned))
    assert named == ["tokens", "labels", "loss_mask", "attention_mask", "position_ids"]
    assert len(returned.elts) == 6
    loss = definition(f"{training}.losses", "create_masked_next_token_loss_function")
    assert parameters(loss) == ["loss_mask", "check_for_nan_in_loss", "check_for_spiky_loss"]
    assert parameters(definition(f"{training}.pretrain", "pretrain"))[:2] == ["config", "forward_step_func"]
    assert parameters(definition(f"{training}.utils.pg_utils", "get_pg_collection"))[:1] == ["model"]
    mixin = "ModelProviderMixin"
    assert "hook" in parameters(definition(f"{models}.model_provider", f"{mixin}.register_pre_wrap_hook"))
    provide = definition(f"{models}.model_provider", f"{mixin}.provide_distributed_model")
    assert "wrap_with_ddp" in parameters(provide)
    bridge = definition(f"{models}.conversion.auto_bridge", "AutoBridge")
    methods = {node.name for node in bridge.body if isinstance(node, ast.FunctionDef)}
    assert methods >= {"from_hf_pretrained", "to_megatron_provider", "export_ckpt"}


@needs_bridge
def test_an_adopted_model_under_bridges_loss() -> None:
    """Its loss function gives sum of w * nll and the count of the mask."""
    import torch

    from remit_megatron.ops.weights import remit_weights

    path = Path(SOURCE) / "megatron/bridge/training/losses.py"
    spec = importlib.util.spec_from_file_location("bridge_losses", path)
    assert spec is not None
    assert spec.loader is not None
    losses = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(losses)
    generator = torch.Generator().manual_seed(0)
    nll, ref_nll = torch.rand(2, 2, 8, generator=generator) * 5
    mask = (torch.rand(2, 8, generator=generator) < 0.7).float()
    output = nll * remit_weights(nll, ref_nll, mask)
    loss, count, _ = losses.create_masked_next_token_loss_function(mask, False, False)(output)
    assert int(count) == int(mask.sum())
    assert float(loss) == pytest.approx(float((output * mask).sum()), rel=1e-6)
