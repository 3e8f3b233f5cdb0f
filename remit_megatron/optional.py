"""Optional parts that a recipe can ask for: whether they are usable here. What is not asked for is not imported."""

import importlib
import importlib.util

from remit_megatron.config import Recipe
from remit_megatron.errors import UserError


def check_optional_parts(recipe: Recipe) -> None:
    """Raise UserError, naming the key and the remedy, for a part that the recipe asks for and that is not installed."""
    check_wandb(required=recipe.logging.wandb != "off")
    check_loader(recipe.data.loader)
    check_implementation(recipe.model.implementation)


def check_wandb(required: bool) -> None:
    """Raise UserError where Weights & Biases is required and not installed."""
    if required and importlib.util.find_spec("wandb") is None:
        raise UserError("wandb is not installed: pip install wandb, or set logging.wandb to 'off'")


def check_loader(name: str) -> None:
    """Raise UserError where the loader called `name` cannot run."""
    if name == "dali" and (
        importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None
    ):
        raise UserError(
            "data.loader = 'dali' needs NVIDIA DALI: pip install 'remit-megatron[dali]', or use loader = 'default'"
        )


def check_implementation(name: str) -> None:
    """Raise UserError where model.implementation asks for what is not installed or does not import."""
    if name == "transformer_engine" and not importable("transformer_engine.pytorch"):
        raise UserError(
            "model.implementation = 'transformer_engine' but Transformer Engine is not importable: install it "
            "(it needs CUDA) or use 'local'"
        )


def importable(module: str) -> bool:
    """Whether `module` is installed and imports here; a broken install counts as absent."""
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        return False
    try:
        importlib.import_module(module)
    except (ImportError, OSError, RuntimeError):
        return False
    return True
