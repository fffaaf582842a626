"""What launchers tell the processes that they start, in the environment."""

from __future__ import annotations

from collections.abc import Mapping

RANKS_AND_SIZES = (
    ("RANK", "WORLD_SIZE"),  # torchrun, accelerate
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),  # MPICH and its kin
    # Of a step: in a batch script SLURM_NTASKS is what was asked for, though one process runs it.
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
)
"""Variables, the innermost launcher's first: srun may start mpirun's daemons, or torchrun."""


def check_alone(environment: Mapping[str, str]) -> None:
    """Checks that a process without a process group is not one of several ranks.

    Raises:
        ValueError: a launcher says that it is; tells what to call first.
    """
    for rank, size in RANKS_AND_SIZES:
        if environment.get(rank, "").isdecimal() and environment.get(size, "").isdecimal():
            if int(environment[size]) > 1:
                num = environment[size]
                raise ValueError(
                    f"rank {environment[rank]}: {size}={num} in the environment says that there "
                    f"are {num} ranks, but there is no process group: each would have a buffer of "
                    "its own, of the full capacity. Make the buffer after "
                    "torch.distributed.init_process_group (or Accelerator(), Fabric.launch(), "
                    "...), or use transport='mpi' with mpirun. If this process alone shall have a "
                    "buffer, say so: transport='local'"
                )
            return
