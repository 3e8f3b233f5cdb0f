"""Which variables ranks get: by layout and hardware, and never over what is set."""

import pytest

from launch.environment import RULES, Facts, chosen, contradictions
from launch.place import torch_variables
from remit_megatron.config import Parallel

CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"


@pytest.mark.parametrize(
    ("capability", "parallel", "value"),
    [
        (9.0, {"tensor": 2}, "1"),
        (8.0, {"context": 2}, "1"),
        (9.0, {"pipeline": 4}, None),
        (9.0, {}, None),
        (10.0, {"tensor": 8}, None),
        (12.0, {"tensor": 8}, None),
        (None, {"tensor": 8}, None),
    ],
)
def test_max_connections(capability: float | None, parallel: dict[str, int], value: str | None) -> None:
    facts = Facts(parallel=Parallel(**parallel), compute_capability=capability)
    assert chosen(facts, {}).get(CONNECTIONS) == value


def test_by_hardware() -> None:
    names = [rule.name for rule in RULES]
    assert len(names) == len(set(names))
    assert set(chosen(Facts(parallel=Parallel()), {})) == {"OMP_NUM_THREADS"}
    one_node = Facts(parallel=Parallel(tensor=2), compute_capability=9.0)
    assert set(names) - set(chosen(one_node, {})) == {"NCCL_IB_TIMEOUT"}
    assert set(names) == set(chosen(Facts(parallel=Parallel(tensor=2), compute_capability=9.0, nodes=2), {}))


def test_what_is_set_stays_and_a_contradiction_is_said() -> None:
    facts = Facts(parallel=Parallel(tensor=2), compute_capability=9.0)
    given = {CONNECTIONS: "32", "NCCL_DEBUG": "INFO"}
    assert not given.keys() & chosen(facts, given).keys()
    (line,) = contradictions(facts, given)
    assert line.startswith(f"{CONNECTIONS} = 32 is set")
    assert contradictions(facts, {CONNECTIONS: "1"}) == []
    assert contradictions(Facts(parallel=Parallel(tensor=2), compute_capability=10.0), given) == []


SLURM = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_NNODES": "2", "SLURM_LOCALID": "1"}


@pytest.mark.parametrize(
    ("more", "local"),
    [
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, "1"),
        ({}, "1"),
        ({"CUDA_VISIBLE_DEVICES": "3"}, "0"),
        ({"CUDA_VISIBLE_DEVICES": ""}, "1"),
    ],
)
def test_ranks_from_slurm(more: dict[str, str], local: str) -> None:
    """A device of its own for each task is device 0 to each of them."""
    assert torch_variables(SLURM | more) == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": local,
        "LOCAL_WORLD_SIZE": "4",
    }


def test_torchrun_knows_better() -> None:
    assert torch_variables(SLURM | {"RANK": "3"}) == {}
    assert torch_variables({}) == {}
