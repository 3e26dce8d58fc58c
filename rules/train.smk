# What the run will take, and the run.


# It measures the machine that will train, and asks for the same.
rule plan:
    input:
        "weights/source.json",
        "results/data.json",
    output:
        "results/plan.json",
    log:
        "logs/plan.log",
    threads: THREADS
    resources:
        mem_mb=memory_mb(64_000),
        runtime=10,
        gpu=GPU,
    params:
        part=CONFIG.part_hash("plan"),
    shell:
        "ms4 plan --config config/config.yaml"


# A job that meets its time limit is tried again (`retries` in the profile) and goes on from the
# last checkpoint.
rule train:
    input:
        "weights/base.json",
        "results/verify.json",
        "results/data.json",
        "results/plan.json",
    output:
        "results/train.json",
    log:
        "logs/train.log",
    threads: THREADS
    resources:
        mem_mb=memory_mb(64_000),
        runtime=1440,
        gpu=GPU,
    params:
        part=CONFIG.part_hash("train"),
    shell:
        "ms4 train --config config/config.yaml"
