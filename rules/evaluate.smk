# The untuned against the tuned model.


rule evaluate:
    input:
        "weights/base.json",
        "results/train.json",
        "results/data.json",
    output:
        "results/evaluation.json",
    log:
        "logs/evaluate.log",
    threads: THREADS
    resources:
        mem_mb=memory_mb(64_000),
        runtime=480,
        gpu=GPU,
    params:
        part=CONFIG.part_hash("evaluate"),
    shell:
        "ms4 evaluate --config config/config.yaml"
