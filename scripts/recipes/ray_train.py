"""Ray Train: `ray job submit --working-dir . -- python scripts/recipes/ray_train.py CONFIG NUM_HOSTS [--gpu]`.

Ray starts a process per host (TPU) or per GPU and calls `jax.distributed.initialize` in each;
`shardadam.runtime.initialize` sees that and leaves it so. After a failure Ray starts all anew, and they go on from the
newest checkpoint: `runs_dir` must be a disk that the hosts share.

Ray runs the function in a thread, where no signal handler can be set: cancelling the job does not save. Ray's own
heartbeat time-out is JAX's default, 100 s.

Tested: that it is valid Python, and the function that each process runs. Not tested: Ray, a cluster, TPUs, GPUs.
"""

import argparse


def train_config(options):
    """What every process runs; Ray reports nothing of it, the run's own metrics.jsonl does."""
    from dataclasses import replace

    from shardadam.trainer import load_config
    from shardadam.trainer.loop import train

    train(replace(load_config(options["config"]), mesh="data=-1"))


def main():
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.jax import JaxTrainer

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config")
    parser.add_argument("num_workers", type=int)
    parser.add_argument("--gpu", action="store_true", help="one process per GPU; else TPU hosts")
    parser.add_argument("--topology", default="4x4", help="of the TPU slice")
    parser.add_argument("--accelerator", default="TPU-V6E", help="Ray's name for the TPU")
    args = parser.parse_args()
    tpu = {"use_tpu": True, "topology": args.topology, "accelerator_type": args.accelerator}
    trainer = JaxTrainer(
        train_config,
        train_loop_config={"config": args.config},
        scaling_config=ScalingConfig(num_workers=args.num_workers, **({"use_gpu": True} if args.gpu else tpu)),
        run_config=RunConfig(failure_config=FailureConfig(max_failures=10)),
    )
    trainer.fit()


if __name__ == "__main__":
    main()
