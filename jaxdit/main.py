"""python -m jaxdit.main --config=configs/quickstart.py --workdir=DIR --config.data.path=OUT/RES

Trains in the working folder DIR, or goes on where it stopped. Any field of the configuration can be overridden. Exit code
0 done, 1 the work failed, 2 the call or the input is wrong, 3 stopped on request with everything saved.
"""

import logging
import os

# Read when JAX starts: XLA would take 75% of a card and waste 6 GB of 24.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")

from absl import flags
from absl import logging as absl_logging

from encode import commandline
from encode.records import InputError

COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where many processes train one model.")
PROCESSES = flags.DEFINE_integer(
    "processes", None, "How many they are. Slurm, Open MPI and Kubernetes say it themselves."
)
PROCESS = flags.DEFINE_integer("process", None, "The number of this one, from 0.")
WORKDIR = flags.DEFINE_string("workdir", None, "Working folder: checkpoints, metrics, report.", required=True)


def main(config) -> int:
    if "model" not in config or "data" not in config:
        raise InputError(
            "--config names no configuration of a training run; take configs/nano.py or configs/full.py:256."
        )
    commandline.check_folder("config.data.path", config.data.path)
    commandline.check_folder("--workdir", WORKDIR.value)
    if config.train.deterministic:  # read when JAX starts; on the CPU everything is deterministic already
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_deterministic_ops=true"
    from jaxdit import processes

    processes.start(COORDINATOR.value, PROCESSES.value, PROCESS.value)
    name = "" if processes.first() else f"process {processes.number()}: "
    # A night's log is read by the clock.
    form = logging.Formatter(f"%(asctime)s  {name}%(message)s", "%a %d %b %H:%M:%S")
    absl_logging.get_absl_handler().setFormatter(form)
    if not processes.many():
        return train(config)
    if not processes.first():
        absl_logging.set_verbosity(absl_logging.WARNING)  # what all say alike, the first one says
    try:
        code = train(config)
    except InputError as error:
        processes.leave(f"Error: {error}", 2)
    except Exception as error:
        processes.leave(processes.why(error), 1)
    if code not in (0, 3):
        processes.leave("", code)
    return code


def train(config) -> int:
    """Train, and give the exit code."""
    import jax

    from jaxdit import checkpoint, data, mesh, processes, progress
    from jaxdit.train import train as run

    mesh.keep_programs()
    try:
        result = run(config, commandline.path_of(WORKDIR.value))
    except (progress.TrainingStopped, data.ReadFailed) as error:
        return commandline.fail(str(error))
    except checkpoint.SaveFailed as error:
        processes.leave(f"Error: {error}", 1)  # its threads would fill pages when the interpreter ends them
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return commandline.fail(
            f"the device's memory does not hold this: take --config.model.scan_unroll=1 (an eighth slower), "
            f"--config.model.remat=block (a quarter), or a smaller train.micro_batch than {config.train.micro_batch} (where it "
            "has trained already, in a new --workdir)."
        )
    if result == "stopped":  # perhaps because the terminal was closed, which takes no more words
        return 3
    if processes.first():
        print(f"The run's page: {commandline.path_of(WORKDIR.value) / 'report.html'}")
    return 0


if __name__ == "__main__":
    commandline.run(main, config="configs/quickstart.py")
