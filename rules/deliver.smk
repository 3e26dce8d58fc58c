# The report, the model card and the record of the run.


rule deliver:
    input:
        "weights/source.json",
        "weights/base.json",
        "results/verify.json",
        "results/data.json",
        "results/plan.json",
        "results/train.json",
        "results/evaluation.json",
    output:
        "results/deliver.json",
    log:
        "logs/deliver.log",
    threads: 1
    resources:
        mem_mb=4_000,
        runtime=30,
    params:
        part=CONFIG.part_hash("deliver"),
    shell:
        "ms4 deliver --config config/config.yaml"
