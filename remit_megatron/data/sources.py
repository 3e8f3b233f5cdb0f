"""What the datasets of one recipe are to each other: none counts twice, and none that is held out is trained on."""

from collections.abc import Mapping, Sequence

from remit_megatron.data.manifest import DatasetInfo, manifest_path
from remit_megatron.errors import UserError


def check_sources(train: Sequence[DatasetInfo], held_out: Mapping[str, DatasetInfo], eod_id: int | None) -> None:
    """Raise UserError where two sources are one dataset, a held-out set is trained on, or data.eod_id is not theirs.

    Datasets are compared by content, so a copy, a link and another spelling of a path are found too.
    train: of data.train, in its order. held_out: of data.eval, by name. eod_id: data.eod_id of the recipe.
    """
    known: dict[str, str] = {}
    for number, info in enumerate(train):
        key = f"data.train[{number}]"
        if info.fingerprint in known:
            raise UserError(
                f"{key} {info.prefix} is the dataset of {known[info.fingerprint]}: its documents would count twice; "
                "name it once, with the sum of the weights"
            )
        known[info.fingerprint] = f"{key} {info.prefix}"
    for name, info in held_out.items():
        if info.fingerprint in known:
            raise UserError(
                f"data.eval.{name} {info.prefix} is the dataset of {known[info.fingerprint]}: a run that trains on "
                "what it is measured by says nothing; hold other documents out"
            )
    for key, info in [
        *((f"data.train[{number}]", info) for number, info in enumerate(train)),
        *((f"data.eval.{name}", info) for name, info in held_out.items()),
    ]:
        if eod_id is not None and info.eod_id is not None and info.eod_id != eod_id:
            raise UserError(
                f"data.eod_id = {eod_id}, but {manifest_path(info.prefix)} of {key} says that its documents end with "
                f"{info.eod_id}: leave data.eod_id out, or name a dataset made with it"
            )
