"""The longer page of each question: what `?` shows beside the field's own docstring."""

from __future__ import annotations

from ms4_wizard.answers import Answers
from ms4_wizard.questions import Question

PAGES: dict[str, str] = {
    "run.device": "The plan is made for the device that trains. Planning on a laptop for a GPU "
    "elsewhere: choose `cuda` and give its memory on the memory screen.",
    "data.train": "Files (JSONL, JSON, Parquet, Arrow, CSV, text; also .gz or .zst), patterns like "
    "`sets/*.jsonl`, or data sets of the hub: `hub:owner/name@REVISION#SPLIT`. The format is told "
    "from the records: OpenAI messages, ShareGPT, Alpaca, prompt–completion, question–answer. "
    "Thinking stands in the assistant's content as parts of type `thinking`. What the assistant "
    "says is trained; what it is told is not. Ctrl+O opens a file picker, Ctrl+E shows samples "
    "as the model sees them.",
    "data.faulty": "A line that is cut off, a conversation without an answer, an unknown role. A "
    "few of many are best left out; many of the same kind say that something is read wrong. "
    "`ms4 data FILE` lists them all, with their lines and what to do.",
    "data.modality": "Under `text` a sample with an image is a fault. Under `text_vision` images "
    "go through the vision tower, which stays as it is; the text model learns from what it sees.",
    "data.reasoning": "Mistral Small 4 answers at once (`none`) or thinks first (`high`), as it is "
    "told before each conversation. Train it on what it should do under each: data without "
    "thinking under `high` teaches it not to think. A share of samples of the other kind keeps it.",
    "model.source": "The published model has 119 billion parameters and takes some 120 GB to "
    "fetch. `tiny` is made on the spot, so that the whole pipeline can be tried first.",
    "method": "LoRA trains small matrices beside the frozen ones. With the experts in nf4 it is "
    "what people call QLoRA.",
    "run.memory_gib": "All of it is planned for, so leave what other programs on that device take. "
    "A GPU that is called 80 GB has about 79 GiB.",
    "model.experts": "nf4 rounds each weight to one of sixteen values. fp8 is what was published "
    "and loses nothing. bf16 says the same as fp8 in twice the memory and is faster, as nothing "
    "is unpacked. The plan beside this shows what each takes.",
    "adapters.targets": "Each projection of a chosen kind gets an adapter. Routed experts are 97 % "
    "of the weights: adapters on all of them hold much and take much memory; a small rank is "
    "enough for them.",
    "adapters.rank": "An adapter of rank r adds r · (inputs + outputs) parameters to a projection. "
    "More rank holds more; when the task is style or format, 8 to 16 do.",
    "adapters.expert_rank": "There are 128 experts in each of 36 layers, each with three "
    "projections. Each expert sees a 32nd of the tokens, so its adapter has less to learn.",
    "adapters.alpha": "Doubling alpha is like doubling the adapters' learning rate. If the rank "
    "changes and alpha goes with it, the learning rate can stay.",
    "data.sequence_length": "Samples are packed so that each sequence is nearly full; no token "
    "sees another sample's. A sample that is longer is an error, unless data.too_long says to "
    "drop or cut it. Memory for activations grows with it.",
    "train.micro_batch": "More sequences at once keep a GPU busier and take more memory. As they "
    "are packed full, 1 of 2048 or more already does well.",
    "train.accumulation": "Gradients of so many forward passes are summed before the weights "
    "change. It costs no memory: sequences in a step = micro-batch · accumulation.",
    "train.learning_rate": "Too high: the loss jumps or rises. Too low: it hardly falls. It rises "
    "during the first steps and falls along a cosine afterwards.",
    "train.epochs": "Small sets of data gain from two or three passes. The held-out loss says when "
    "it was too much.",
    "train.checkpointing": "The backward pass needs what the forward pass computed. Kept, it takes "
    "memory; computed again, a third more time. `auto` is decided when the run starts.",
    "where.run": "The same project does both: `snakemake --profile local` or "
    "`snakemake --profile slurm`. With Slurm, Snakemake runs on a login node and submits a job a "
    "stage; training that meets its time limit is submitted again and goes on.",
    "where.partition": "`sinfo` lists them. It stands in profiles/slurm/config.yaml.",
    "where.account": "`sacctmgr show associations user=$USER` lists them.",
    "where.hours": "Training keeps its state every few steps, so a short limit that starts earlier "
    "is no loss.",
    "where.requeue": "A job that is begun again finds what is whole on the disk and goes on from "
    "there: training from its last checkpoint. `always` is `sbatch --requeue` and keeps the job's "
    "number and its age in the queue; `never` is `sbatch --no-requeue`, and Snakemake submits the "
    "stage again, twice at most.",
    "data.test": "The untuned and the tuned model answer these. Take them aside before training: "
    "what the model has seen says nothing. Besides the task, hold out what must not be lost.",
    "data.holdout": "Where there is no data of its own to evaluate on. The share is chosen by the "
    "samples' content, so a sample stays on its side when data is added, and near duplicates of "
    "what is held out are told.",
    "evaluate.max_samples": "Each is answered by both models in both efforts: four answers a "
    "sample. 200 tell 50 % from 60 % of exact answers.",
    "evaluate.max_new_tokens": "An answer that is cut off counts as wrong. Thinking of the full "
    "model can take thousands of tokens.",
    "evaluate.min_exact_match": "The verdict is `pass` if the tuned model gives so large a share "
    "of exactly the reference answers, for each set that is named. Sets of free text have none.",
}


def description(field: str) -> str:
    """What the configuration says of a field."""
    model = Answers
    *sections, name = field.split(".")
    for section in sections:
        model = model.model_fields[section].annotation  # type: ignore[assignment]
    return " ".join((model.model_fields[name].description or "").split())


def page(question: Question) -> list[tuple[str, str]]:
    """The page of a question: style (`title`, `text`, `choice` or `key`) and text, in order."""
    found = [("title", question.ask), ("text", question.advice)]
    if own := PAGES.get(question.field):
        found.append(("text", own))
    found += [("choice", f"{choice.value}: {choice.meaning}") for choice in question.choices]
    if told := description(question.field):
        found.append(("text", f"{told}"))
    return [*found, ("key", f"In an answers file, and for --set: {question.field}")]
