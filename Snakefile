# One rule a stage; what the stages do is in the Python package `ms4`. All settings are in
# config/config.yaml: see config/schema.json for what may stand there.
from snakemake.utils import min_version

min_version("9.19")


# The image that containers/ms4.def builds; used with `--software-deployment-method apptainer`.
container: "containers/ms4.sif"


include: "rules/common.smk"
include: "rules/weights.smk"
include: "rules/data.smk"
include: "rules/train.smk"
include: "rules/evaluate.smk"
include: "rules/deliver.smk"


localrules:
    all,


rule all:
    default_target: True
    input:
        "results/deliver.json",
