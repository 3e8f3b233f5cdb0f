"""What every command that runs a recipe's models begins with; not a byte of a run has been written when it is done."""

from dataclasses import dataclass
from pathlib import Path

from remit_megatron.config import Recipe
from remit_megatron.data.deal import Deal
from remit_megatron.mcore.datasets import TrainingData
from remit_megatron.mcore.groups import Groups, initialize_groups
from remit_megatron.run.build_plan import BuildPlan, make_build_plan, plan_checkpoint
from remit_megatron.run.process import Process, from_rank_0
from remit_megatron.run.sources import open_training


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """A recipe on this rank: its models are planned, its layout stands, its data are open."""

    recipe: Recipe
    process: Process
    plan: BuildPlan
    groups: Groups
    tokenizer: str | None
    """Hash of the tokenizer that made the data; None where nothing names one."""
    training: TrainingData | None
    """None where only a checkpoint is looked at."""

    @property
    def data(self) -> TrainingData:
        """The training data, where they were opened."""
        assert self.training is not None, "a command that looks at a checkpoint opens no training data"
        return self.training

    @property
    def deal(self) -> Deal:
        """How the recipe's batches are dealt to ranks, and this rank's place."""
        return self.groups.deal(self.recipe.batch.microbatch_samples)


def prepare(recipe: Recipe, process: Process, *, resume: Path | None = None, checkpoint: Path | None = None) -> Ready:
    """Plan the models, build the process groups and open the training data. Collective.

    Args:
        resume: one of the run's checkpoints to go on from; default: the newest.
        checkpoint: a trained model that is looked at alone. Then there is neither a reference nor training data.

    Raises UserError, on every rank alike, for what does not fit together.
    """
    plan: BuildPlan = from_rank_0(lambda: _plan(recipe, process, resume, checkpoint), process.device)
    groups = initialize_groups(recipe.parallel, recipe.seed, recipe.compute.collective_timeout_s)
    training, tokenizer = None, plan.init_meta.tokenizer if plan.init_meta else None
    if checkpoint is None:
        training, tokenizer = open_training(recipe, plan)
    return Ready(recipe=recipe, process=process, plan=plan, groups=groups, tokenizer=tokenizer, training=training)


def _plan(recipe: Recipe, process: Process, resume: Path | None, checkpoint: Path | None) -> BuildPlan:
    if checkpoint is not None:
        return plan_checkpoint(recipe, checkpoint, process.device.type)
    return make_build_plan(recipe, process.device.type, resume)
