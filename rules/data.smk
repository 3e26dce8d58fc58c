# From conversations to packed tokens.


rule preprocess:
    input:
        source="weights/source.json",
        data=[path for path in DATA_FILES if path not in WITH_BRACES],
    output:
        "results/data.json",
    log:
        "logs/preprocess.log",
    threads: THREADS
    resources:
        mem_mb=memory_mb(16_000),
        runtime=240,
    params:
        part=CONFIG.part_hash("preprocess"),
        data=hashes_with_braces,
    shell:
        "ms4 preprocess --config config/config.yaml"
