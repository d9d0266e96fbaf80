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

WORKDIR = flags.DEFINE_string("workdir", None, "Working folder: checkpoints, metrics, report.", required=True)


def main(config) -> int:
    if "model" not in config or "data" not in config:
        raise InputError(
            "--config names no configuration of a training run; take configs/nano.py or configs/full.py:256."
        )
    commandline.refuse_url("config.data.path", config.data.path)
    if config.train.deterministic:  # read when JAX starts; on the CPU everything is deterministic already
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_deterministic_ops=true"
    import jax

    # A night's log is read by the clock.
    absl_logging.get_absl_handler().setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%a %d %b %H:%M:%S"))
    from jaxdit import checkpoint, mesh, teller, train

    mesh.keep_programs()
    try:
        result = train.train(config, commandline.path_of(WORKDIR.value))
    except teller.TrainingStopped as error:
        return commandline.fail(str(error))
    except checkpoint.SaveFailed as error:
        commandline.fail(str(error))
        os._exit(1)  # a failed save leaves threads behind that fill pages when the interpreter ends them
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return commandline.fail(
            f"the device's memory does not hold this: take --config.model.remat=block, or a new --workdir with a smaller "
            f"train.micro_batch than {config.train.micro_batch}."
        )
    print(f"The run's page: {commandline.path_of(WORKDIR.value) / 'report.html'}")
    return 0 if result == "done" else 3


if __name__ == "__main__":
    commandline.run(main, config="configs/quickstart.py")
