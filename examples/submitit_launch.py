"""Starts a training script from Python with submitit: a SLURM job, or processes of this machine.

    python examples/submitit_launch.py examples/train_ddp_rehearsal.py                 # SLURM
    python examples/submitit_launch.py --cluster local examples/train_ddp_rehearsal.py

The job is sent where SLURM's commands are. It waits, and prints what the ranks have printed.
"""

import argparse
import runpy
import sys

import submitit


def train(script: str, arguments: list[str]) -> None:
    """Runs a script as one rank of the job."""
    # RANK, WORLD_SIZE, MASTER_ADDR, ...: what init_process_group looks for.
    submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def main() -> None:
    """Sends the job, and waits for it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the script")
    parser.add_argument("--cluster", help="local: on this machine; if not given, SLURM's if any")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--ranks-per-node", type=int, default=2)
    parser.add_argument("--gpus-per-node", type=int, default=0)
    parser.add_argument("--minutes", type=int, default=60, help="time limit")
    parser.add_argument("--logs", default="submitit", help="folder, visible to all nodes")
    given = parser.parse_args()
    executor = submitit.AutoExecutor(folder=given.logs, cluster=given.cluster)
    executor.update_parameters(
        nodes=given.nodes,
        tasks_per_node=given.ranks_per_node,
        gpus_per_node=given.gpus_per_node,
        timeout_min=given.minutes,
        name="training",
    )
    job = executor.submit(train, given.script, given.arguments)
    print(f"job {job.job_id}: logs in {given.logs}")
    job.results()  # waits for all ranks; raises what one has raised
    print(job.stdout())


if __name__ == "__main__":
    main()
