"""Where a rank stands among the others, from what SLURM or torchrun has put into its environment."""

from collections.abc import Mapping


def torch_variables(variables: Mapping[str, str]) -> dict[str, str]:
    """RANK and the like, from SLURM's names for them; none where torchrun has set them.

    Where SLURM gives each task one GPU of its own, that is device 0 for every one of them.
    """
    if "RANK" in variables or "SLURM_PROCID" not in variables:
        return {}
    total, nodes = int(variables["SLURM_NTASKS"]), int(variables.get("SLURM_NNODES", "1"))
    local = variables["SLURM_LOCALID"]
    per_node = int(variables.get("SLURM_NTASKS_PER_NODE") or total // nodes)
    visible = variables.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return {
        "RANK": variables["SLURM_PROCID"],
        "WORLD_SIZE": str(total),
        "LOCAL_RANK": "0" if len(visible) == 1 and visible[0] and per_node > 1 else local,
        "LOCAL_WORLD_SIZE": str(per_node),
    }
