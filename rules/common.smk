# What all rules use: the configuration, the environment of the jobs, and what they ask for.
import os
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake.io import contains_wildcard

try:
    import ms4.config
    from ms4 import pipeline_files
    from ms4.data.sources import local_files
    from ms4.errors import Ms4Error
    from ms4.manifest import sha256_file
except ModuleNotFoundError as error:
    raise WorkflowError(
        f"{error.name} is not installed in the Python that runs Snakemake, {sys.executable}: "
        "call the snakemake of the environment that ms4 was installed into."
    )

if config:
    # Values from the command line would be in no file, and `ms4` would not see them.
    raise WorkflowError(
        f"--config and --configfile are not read (given: {', '.join(config)}). "
        "Settings belong in config/config.yaml; edit them there."
    )

try:
    pipeline_files.check_writer(Path())
    CONFIG = ms4.config.load(Path("config/config.yaml"))
except Ms4Error as error:
    raise WorkflowError(str(error))

# `ms4` lies beside the Python that runs Snakemake: so `.venv/bin/snakemake` needs no activation.
os.environ.update(
    PATH=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
)

if workflow.is_main_process and workflow.resource_settings.nodes is not None:
    # Started inside a Slurm job (an interactive allocation, say), the jobs that are submitted
    # from here would inherit its sizes. The plugin cleans that up as well, but only after its
    # thread that waits for jobs has started, which can leave Snakemake hanging. A job's own
    # Snakemake is not the main process: it needs these variables for srun.
    if "SLURM_JOB_ID" in os.environ:
        for name in [name for name in os.environ if name.startswith("SLURM_")]:
            if name != "SLURM_CONF":  # where the cluster is, and not what the job is
                del os.environ[name]

TINY = CONFIG.model.source == "tiny"

# A bit-identical rerun needs the same number of threads wherever it runs: it comes from the
# configuration, never from the size of the machine.
THREADS = CONFIG.run.threads or (2 if TINY else 8)

# `auto` asks for a GPU too: on a cluster a job sees only what it asked for, and a machine
# without one ignores the request. `cpu` asks for none.
GPU = 0 if CONFIG.run.device == "cpu" else 1


def memory_mb(full):
    """Host memory of a job: `full` MB for the 119 B model, 4 GB for the tiny one."""
    return 4_000 if TINY else full


# Patterns stand for the files that they match now; a data set of the hub is no file, and its
# revision stands in the configuration.
try:
    DATA_FILES = local_files(CONFIG.data_files())
except Ms4Error as error:
    raise WorkflowError(str(error))

# Snakemake would take `{name}` in a path for a wildcard. Such a data file is not an input; the
# hash of its content stands among the params, which has the same effect.
WITH_BRACES = [path for path in DATA_FILES if contains_wildcard(path)]


def hashes_with_braces(wildcards):
    """Their hashes; of one that is missing, nothing: `ms4 preprocess` will say so."""
    return {
        path: sha256_file(Path(path)) for path in WITH_BRACES if Path(path).is_file()
    }
