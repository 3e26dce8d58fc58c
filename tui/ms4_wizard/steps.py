"""The questions, by screen: the one tuple from which the screens are made and that the headless run
shares. What stands here is offered; what the pipeline does not run is not."""

from __future__ import annotations

from ms4_wizard.questions import Choice, Question, Step

STEPS: tuple[Step, ...] = (
    Step(
        "machine",
        "Machine",
        (
            Question(
                "run.device",
                "choice",
                "Which device trains?",
                "The plan beside this counts its memory. Most people leave auto.",
                (
                    Choice("auto", "a GPU if there is one, else the CPU"),
                    Choice("cuda", "a GPU, here or where it will train"),
                    Choice("cpu", "the CPU"),
                ),
                label="Device",
            ),
        ),
    ),
    Step(
        "data",
        "Training data",
        (
            Question(
                "data.train",
                "lines",
                "Training data",
                "Files of conversations, one path a line; JSONL of OpenAI messages is usual.",
            ),
            Question(
                "data.faulty",
                "choice",
                "What of records that cannot be used?",
                "Most people mend them. The first ones are named at the right.",
                (
                    Choice("error", "the run stops, and lists them"),
                    Choice("drop", "they are left out and listed"),
                ),
                label="Faulty records",
            ),
        ),
    ),
    Step(
        "modality",
        "Modality",
        (
            Question(
                "data.modality",
                "choice",
                "What do the conversations hold?",
                "The vision tower is not trained. Images take memory and time: most data is text.",
                (Choice("text", "text only"), Choice("text_vision", "text and images")),
                label="Content",
            ),
        ),
    ),
    Step(
        "reasoning",
        "Reasoning mode",
        (
            Question(
                "data.reasoning",
                "choice",
                "Reasoning effort of the training data",
                "The model is told its effort before each conversation. Most data is mixed.",
                (
                    Choice("per_sample", "each sample its own effort"),
                    Choice("high", "all samples think before they answer"),
                    Choice("none", "no sample thinks"),
                ),
                label="Effort",
            ),
        ),
    ),
    Step(
        "method",
        "Model and method",
        (
            Question(
                "model.source",
                "text",
                "Weights",
                "Hub id or a local directory. `tiny` is a toy model that trains in minutes.",
            ),
            Question(
                "method",
                "choice",
                "What is trained?",
                "Adapters learn most tasks and take a fraction of the memory.",
                (Choice("lora", "LoRA adapters over the frozen model"),),
                label="Trained",
            ),
        ),
    ),
    Step(
        "memory",
        "Memory and experts",
        (
            Question(
                "run.memory_gib",
                "number",
                "Memory budget in GiB",
                "Empty: what the device has. Give it when another machine trains.",
            ),
            Question(
                "model.experts",
                "choice",
                "How are the routed experts held?",
                "97 % of the 119 B model's weights. Most people choose nf4.",
                (
                    Choice("nf4", "4 bits a weight"),
                    Choice("fp8", "8 bits, as published"),
                    Choice("bf16", "16 bits, the same values as fp8"),
                ),
                label="Experts held as",
            ),
        ),
    ),
    Step(
        "adapters",
        "Adapters",
        (
            Question(
                "adapters.targets",
                "several",
                "What gets adapters?",
                "Attention and shared experts suit most tasks; all experts hold more.",
                (
                    Choice("attention", "the five projections of attention"),
                    Choice("shared", "the shared experts"),
                    Choice("experts", "all routed experts (the most memory)"),
                ),
                label="Targets",
            ),
            Question("adapters.rank", "number", "Rank", "Size of each adapter. 16 to 64 is usual."),
            Question(
                "adapters.expert_rank",
                "number",
                "Rank of routed experts",
                "Empty: the same rank. There are many experts: 4 to 16 is usual.",
                only_if=("adapters.targets", "experts"),
            ),
            Question(
                "adapters.alpha",
                "number",
                "Alpha",
                "Adapters are scaled by alpha / rank. Twice the rank is usual.",
            ),
        ),
    ),
    Step(
        "training",
        "Training",
        (
            Question(
                "data.sequence_length",
                "number",
                "Sequence length",
                "Tokens; samples are packed into it. 2048 suits most chats.",
            ),
            Question(
                "train.micro_batch",
                "number",
                "Micro-batch",
                "Sequences in one forward pass. 1 takes the least memory.",
            ),
            Question(
                "train.accumulation",
                "number",
                "Accumulation",
                "Forward passes in one optimizer step. 8 sequences a step are usual.",
            ),
            Question(
                "train.learning_rate",
                "number",
                "Learning rate",
                "How far a step goes, at its highest. 1e-4 is usual for adapters.",
            ),
            Question(
                "train.epochs",
                "number",
                "Epochs",
                "Passes over the data. 1 to 3; more repeats it word by word.",
            ),
            Question(
                "train.checkpointing",
                "choice",
                "Checkpointing",
                "What is computed again instead of kept. Most people leave auto.",
                (
                    Choice("auto", "the fastest that there is room for"),
                    Choice("full", "each layer again: the least memory"),
                    Choice("selective", "the cheap parts again"),
                    Choice("none", "keep all: the fastest"),
                ),
            ),
        ),
    ),
    Step(
        "where",
        "Where to run",
        (
            Question(
                "where.run",
                "choice",
                "Where does the pipeline run?",
                "The project can do both; this is what its README and its plan are about.",
                (
                    Choice("local", "on this machine"),
                    Choice("slurm", "on a Slurm cluster, each stage a job"),
                ),
            ),
            Question(
                "where.partition",
                "text",
                "Slurm partition",
                "Empty: the cluster's default.",
                only_if=("where.run", "slurm"),
            ),
            Question(
                "where.account",
                "text",
                "Slurm account",
                "Empty: your default.",
                only_if=("where.run", "slurm"),
            ),
            Question(
                "where.hours",
                "number",
                "Training job, hours",
                "Empty: 24. A job that meets its limit is submitted again and goes on.",
                only_if=("where.run", "slurm"),
            ),
            Question(
                "where.requeue",
                "choice",
                "When a node fails or a job is preempted",
                "Nothing that was computed is lost in any case. Most people leave cluster.",
                (
                    Choice("cluster", "as the cluster is set up (JobRequeue)"),
                    Choice("always", "Slurm puts the job back into its queue"),
                    Choice("never", "Snakemake submits another job"),
                ),
                only_if=("where.run", "slurm"),
                label="Requeue",
            ),
        ),
    ),
    Step(
        "evaluation",
        "Evaluation",
        (
            Question(
                "data.test",
                "named_lines",
                "Held-out data",
                "`name = path`, one a line. Never trained on; untuned and tuned are compared.",
            ),
            Question(
                "data.holdout",
                "number",
                "Held-out share",
                "Of the training samples, kept aside as set `holdout`. 0: none; 0.05 is usual.",
            ),
            Question(
                "evaluate.max_samples",
                "number",
                "Samples a set",
                "The first ones of each held-out set that are answered. 200 is usual.",
            ),
            Question(
                "evaluate.max_new_tokens",
                "number",
                "Tokens an answer",
                "Thinking counts. 512 suits short answers; long thinking needs more.",
            ),
            Question(
                "evaluate.min_exact_match",
                "named_numbers",
                "Thresholds",
                "`name = share` of exact answers (0 to 1) to reach. Empty: no verdict.",
            ),
        ),
    ),
)

NUMBERS = {step.key: number for number, step in enumerate(STEPS)}
"""Where a step stands."""

QUESTIONS = {question.field: question for step in STEPS for question in step.questions}
"""Each question by its field."""
