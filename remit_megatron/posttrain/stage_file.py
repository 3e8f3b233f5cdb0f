"""A stage as its TOML file has it."""

import json
from pathlib import Path

from pydantic import Field, ValidationError

from remit_megatron import toml
from remit_megatron.config import NonNegative, Section
from remit_megatron.errors import UserError
from remit_megatron.hf.folder import HFFolder
from remit_megatron.posttrain.contract import DPO, RL, SFT, Chat, Engine, Kind, StageSpec, data_files


class StageFile(Section):
    """A StageSpec without what is found out by reading files."""

    run: str
    """The stage's folder; the result is in its model/."""
    model: str
    """Hugging Face folder that the stage starts from."""
    data: tuple[str, ...] = Field(min_length=1)
    seed: NonNegative = 0
    keep: tuple[float, ...] = ()
    engine: Engine = Engine()
    chat: Chat = Chat()
    sft: SFT | None = None
    dpo: DPO | None = None
    rl: RL | None = None


def load_stage(kind: Kind, path: Path, overrides: list[str], *, allow_code: bool) -> tuple[Path, StageSpec]:
    """(folder, request) of a stage file. Reads the model and the data whole. Raises UserError naming key or file."""
    settings = toml.read(path, "stage")
    for override in overrides:
        toml.override(settings, override)
    try:
        stage = StageFile.model_validate_json(json.dumps(settings))  # JSON's lists are tuples
        if not Path(stage.model).is_dir():
            raise UserError(f"model = '{stage.model}' is no folder")
        spec = StageSpec(
            name=Path(stage.run).name,
            kind=kind,
            model=stage.model,
            data=data_files(stage.data),
            seed=stage.seed,
            keep=stage.keep,
            parents={"model": HFFolder(Path(stage.model)).content_key()},
            engine=stage.engine,
            chat=stage.chat,
            sft=stage.sft,
            dpo=stage.dpo,
            rl=stage.rl,
            allow_code_execution=allow_code,
        )
    except ValidationError as error:
        raise UserError(f"{path}: {toml.first_problem(error, StageFile)}") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return Path(stage.run), spec
