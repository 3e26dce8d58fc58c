# From conversations to packed tokens.


rule preprocess:
    input:
        source="weights/source.json",
        data=CONFIG.data_files(),
    output:
        "results/data.json",
    log:
        "logs/preprocess.log",
    threads: 1
    resources:
        mem_mb=memory_mb(16_000),
        runtime=240,
    params:
        part=CONFIG.part_hash("preprocess"),
    shell:
        "ms4 preprocess --config config/config.yaml"
