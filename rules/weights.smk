# From a hub, a local directory or nothing at all to the checked base that is trained on.


rule fetch:
    output:
        "weights/source.json",
    log:
        "logs/fetch.log",
    # The tiny model is made here; a source that is freed is converted here.
    threads: THREADS if TINY or CONFIG.model.free_source else 1
    resources:
        mem_mb=4_000,
        runtime=720,
    params:
        part=CONFIG.part_hash("fetch"),
    shell:
        "ms4 fetch --config config/config.yaml"


rule descale:
    input:
        "weights/source.json",
    output:
        "weights/base.json",
    log:
        "logs/descale.log",
    threads: THREADS
    resources:
        mem_mb=memory_mb(8_000),
        runtime=240,
    params:
        part=CONFIG.part_hash("descale"),
    shell:
        "ms4 descale --config config/config.yaml"


rule verify:
    input:
        "weights/source.json",
        "weights/base.json",
    output:
        "results/verify.json",
    log:
        "logs/verify.log",
    threads: THREADS
    resources:
        mem_mb=memory_mb(8_000),
        runtime=120,
    params:
        part=CONFIG.part_hash("verify"),
    shell:
        "ms4 verify --config config/config.yaml"
