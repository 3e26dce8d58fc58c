"""Stage deliver: figures, the report, the run record and the adapter's model card.

All text that a user, a data file or a model wrote is escaped where it enters HTML or Markdown.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import yaml

from ms4 import config as configuration
from ms4.config import AdaptersSection, RunConfig
from ms4.manifest import file_entry, write_manifest, write_text
from ms4.plan import compare
from ms4.report.figures import draw_evaluation, draw_loss
from ms4.report.record import (
    EXAMPLES,
    MACHINE,
    MANIFESTS,
    METRICS,
    RESULTS,
    Run,
    read_run,
    write_record,
)
from ms4.report.table import (
    REPORT,
    VERDICTS,
    Pair,
    nats,
    percent,
    print_summary,
)

DELIVER = RESULTS / "deliver.json"
CARD = RESULTS / "adapter/README.md"

EXAMPLES_OF_A_SET = 3
LONGEST_TEXT = 2000
"""Characters of one generated text that the report shows."""


# HTML.

_CSS = """
:root { color-scheme: light dark; --ink: #212529; --page: #fff; --soft: #f1f3f5; --line: #dee2e6;
  --dim: #5c636a; --good: #2b8a3e; --bad: #c92a2a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e9ecef; --page: #16191d; --soft: #22262b;
  --line: #3b4148; --dim: #a5adb5; --good: #69db7c; --bad: #ff8787; } }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
  max-width: 62rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { margin: 0 0 .25rem; font-size: 1.9rem; } h2 { margin: 2.6rem 0 .8rem; font-size: 1.3rem; }
h3 { margin: 1.6rem 0 .5rem; font-size: 1.05rem; }
p.dim, .dim { color: var(--dim); } .good { color: var(--good); } .bad { color: var(--bad); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .9rem .35rem 0; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; } td.number, th.number { text-align: right; }
img { display: block; max-width: 100%; background: #fff; padding: .5rem; border-radius: .5rem;
  border: 1px solid var(--line); }
pre { background: var(--soft); padding: .8rem 1rem; border-radius: .5rem; overflow-x: auto;
  white-space: pre-wrap; overflow-wrap: anywhere; font-size: .86rem; margin: .3rem 0; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .75rem;
  margin: 1.5rem 0; } .facts div { background: var(--soft); border-radius: .5rem;
  padding: .7rem .9rem; } .facts b { display: block; font-size: 1.25rem; }
.example { border: 1px solid var(--line); border-radius: .5rem; padding: .4rem 1rem 1rem;
  margin: .8rem 0; } .answers { display: grid; gap: 0 1rem;
  grid-template-columns: repeat(auto-fit, minmax(16rem, 1fr)); }
summary { cursor: pointer; color: var(--dim); }
"""


def text(value: object) -> str:
    """A value as HTML text."""
    return html.escape(str(value), quote=True)


def html_table(head: Sequence[str], rows: Iterable[Sequence[object]], numbers: int) -> str:
    """A table of escaped cells; columns from number `numbers` on are aligned to the right."""

    def row(cells: Sequence[object], tag: str) -> str:
        styles = ["" if n < numbers else ' class="number"' for n in range(len(cells))]
        pairs = zip(styles, cells, strict=True)
        return "".join(f"<{tag}{style}>{text(cell)}</{tag}>" for style, cell in pairs)

    body = "\n".join(f"<tr>{row(cells, 'td')}</tr>" for cells in rows)
    return (
        f'<div class="wide"><table><thead><tr>{row(head, "th")}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )


def _image(path: Path, description: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<img alt="{text(description)}" src="data:image/png;base64,{data}">'


def _score_cells(pair: Pair) -> list[str]:
    loss, exact, formed = (pair.both(name) for name in ("loss", "exact_match", "well_formed"))
    return [*map(nats, loss), *map(percent, exact), *map(percent, formed)]


_SCORE_HEAD = (
    "set", "effort", "samples", "loss untuned", "loss tuned", "exact untuned", "exact tuned",
    "well formed untuned", "well formed tuned",
)  # fmt: skip


def _score_rows(pairs: Sequence[Pair]) -> list[list[str]]:
    return [[pair.set, pair.effort, f"{pair.samples:,}", *_score_cells(pair)] for pair in pairs]


def _facts(run: Run) -> str:
    train, plan = run.manifests["train"], run.manifests["plan"]
    facts = {
        "trained parameters": f"{train['trainable_parameters']:,}",
        "optimizer steps": f"{train['steps']:,}",
        "trained tokens": f"{train['trained_tokens']:,}",
        "training loss": f"{nats(train['first_loss'])} → {nats(train['last_loss'])}",
        "planned memory": gib(plan["peak_gib"]),
    }
    if run.machine.get("peak_memory_gib") is not None:
        facts["measured memory"] = gib(run.machine["peak_memory_gib"])
    if run.machine.get("seconds") is not None:
        facts["training time"] = duration(run.machine["seconds"])
    boxes = "".join(f"<div><b>{text(v)}</b>{text(name)}</div>" for name, v in facts.items())
    return f'<div class="facts">{boxes}</div>'


def gib(amount: float) -> str:
    """GiB, less than one of them as MiB."""
    return f"{amount:.2f} GiB" if amount >= 1 else f"{amount * 1024:.1f} MiB"


def duration(seconds: float) -> str:
    """A time in its two largest units."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_rest = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes_rest} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _memory(run: Run) -> str:
    plan = run.manifests["plan"]
    rows = [[name, gib(amount)] for name, amount in plan["components"].items()]
    rows.append(["planned at the fullest moment", gib(plan["peak_gib"])])
    measured = run.machine.get("peak_memory_gib")
    if measured is not None:
        share = compare(plan, measured).share  # of what a measurement can see
        rows.append(["measured", f"{gib(measured)} ({100 * share:.0f} % of the plan)"])
    return html_table(["part", f"memory ({plan['device']})"], rows, 1)


def _data(run: Run) -> str:
    data = run.manifests["preprocess"]
    train = data["train"]
    names = {
        "samples": "samples",
        "tokens": "tokens",
        "trained_tokens": "tokens that the loss is taken of",
        "dropped": "records dropped",
        "truncated": "samples truncated",
        "held_out": "samples held out",
        "bins": "packed sequences",
        "longest": "longest sample, tokens",
    }
    rows = [[name, f"{train[key]:,}"] for key, name in names.items() if key in train]
    if "fill" in train:
        rows.append(["fill of the packed sequences", percent(train["fill"])])
    rows += [
        [f"effort {effort}: {key.replace('_', ' ')}", f"{count:,}"]
        for effort, counts in train.get("by_effort", {}).items()
        for key, count in counts.items()
    ]
    held_out = [
        [name, *(f"{values[key]:,}" for key in ("samples", "tokens"))]
        for name, values in data["test"].items()
    ]
    return (
        f"<h3>Training data</h3>{html_table(['', 'count'], rows, 1)}"
        f"<h3>Held-out sets</h3>{html_table(['set', 'samples', 'tokens'], held_out, 1)}"
    )


def _shortened(value: object) -> str:
    full = "" if value is None else str(value)
    rest = len(full) - LONGEST_TEXT
    return full if rest <= 0 else f"{full[:LONGEST_TEXT]}… ({rest:,} more characters)"


Example = dict[str, Mapping[str, Any]]
"""One question's answers: model → line of the examples."""


def choose_examples(lines: Sequence[Mapping[str, Any]]) -> dict[str, list[Example]]:
    """Held-out set → some questions with the answers of both models, each effort in turn."""
    questions: dict[tuple[str, str, int], Example] = {}
    for line in lines:
        questions.setdefault((line["set"], line["effort"], line["line"]), {})[line["model"]] = line
    by_set: dict[str, dict[str, list[Example]]] = {}
    for (name, effort, _), answers in questions.items():
        by_set.setdefault(name, {}).setdefault(effort, []).append(answers)
    return {
        name: [
            example
            for turn in zip_longest(*efforts.values())
            for example in turn
            if example is not None
        ][:EXAMPLES_OF_A_SET]
        for name, efforts in by_set.items()
    }


def _answer(model: str, line: Mapping[str, Any]) -> str:
    mark = '<b class="good">exact</b>' if line["exact"] else '<b class="bad">not exact</b>'
    formed = "" if line["well_formed"] else ', <span class="bad">not well formed</span>'
    thinking = ""
    if line.get("thinking"):
        thinking = (
            f"<details><summary>thinking</summary><pre>{text(_shortened(line['thinking']))}</pre>"
            "</details>"
        )
    answer = text(_shortened(line["answer"])) or '<span class="dim">(empty)</span>'
    return f"<div><h3>{text(model)}: {mark}{formed}</h3>{thinking}<pre>{answer}</pre></div>"


def _examples(run: Run) -> str:
    parts = []
    for name, chosen in choose_examples(run.examples).items():
        parts.append(f"<h3>{text(name)}</h3>")
        for example in chosen:
            first = next(iter(example.values()))
            answers = "".join(
                _answer(model, example[model]) for model in ("untuned", "tuned") if model in example
            )
            parts.append(
                f'<div class="example"><p class="dim">line {text(first["line"])}, '
                f"effort {text(first['effort'])}</p>"
                f"<pre>{text(_shortened(first['question']))}</pre>"
                f'<p class="dim">expected</p><pre>{text(_shortened(first["expected"]))}</pre>'
                f'<div class="answers">{answers}</div></div>'
            )
    return "\n".join(parts) or '<p class="dim">No generated answers were kept.</p>'


def _verdict(evaluation: Mapping[str, Any]) -> str:
    verdict = evaluation["verdict"]
    style = {"pass": "good", "fail": "bad"}.get(verdict, "dim")
    failures = "".join(f"<li>{text(failure)}</li>" for failure in evaluation["failures"])
    return f'<p>Verdict: <b class="{style}">{text(VERDICTS.get(verdict, verdict))}</b></p>' + (
        f"<ul>{failures}</ul>" if failures else ""
    )


def _weights(verify: Mapping[str, Any]) -> str:
    """What the stage verify found of the base, as rows of fact and figure."""
    rows = [["softmax scale", verify.get("softmax_scale", "unknown")]]
    if errors := verify.get("recomputed"):
        rows.append(
            [f"{len(errors)} parameters recomputed from the source", f"{max(errors.values()):.2g}"]
        )
    if losses := verify.get("losses"):
        tokens = f"{losses['tokens']} tokens of {losses['text']}"
        rows += [
            [f"loss of {tokens}, softmax scale {scale}", nats(losses[scale])]
            for scale in ("plain", "yarn")
        ]
        if losses.get("exact") is not None:
            rows.append(["the same with the source's exact weights", nats(losses["exact"])])
    notes = "".join(f'<p class="dim">{text(note)}</p>' for note in verify.get("notes", ()))
    return html_table(["check of the base", "found"], rows, 1) + notes


def render_report(run: Run, loss: Path, evaluation: Path) -> str:
    """The report as one HTML file that needs no other.

    Args:
        run: what the stages left.
        loss: PNG of the loss.
        evaluation: PNG of the evaluation.
    """
    source, train = run.manifests["fetch"], run.manifests["train"]
    revision = f", revision {source['revision']}" if source.get("revision") else ""
    adapter = [
        [item["target"], f"{item['tensors']:,}", f"{item['parameters']:,}"]
        for item in train["adapter"]
    ]
    resumed = run.machine.get("resumed")
    went_on = f"<p>Training was resumed {int(resumed)} times.</p>" if resumed else ""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Fine-tuning {text(run.base_name)}</title>
<style>{_CSS}</style>
</head>
<body>
<h1>Fine-tuning {text(run.base_name)}</h1>
<p class="dim">{text(source["origin"])}{text(revision)}; routed experts in
{text(run.config.model.experts)}; made with ms4 {text(train["ms4_version"])}</p>
{_verdict(run.manifests["evaluate"])}
{_facts(run)}
<h2>Evaluation on the held-out sets</h2>
{html_table(_SCORE_HEAD, _score_rows(run.pairs), 2)}
<p class="dim">Loss in nats per token. Exact: share of answers that are exactly right.</p>
{_image(evaluation, "Exact answers of the untuned and the tuned model by held-out set and effort")}
<h2>Training</h2>
{_image(loss, "Loss and learning rate over the optimizer steps")}
{went_on}
<h3>Base weights</h3>
{_weights(run.manifests["verify"])}
<p class="dim">Errors are norm-wise: ‖base − recomputed‖ / ‖recomputed‖. Losses in nats per
token.</p>
<h3>Adapters</h3>
{html_table(["target", "tensors", "parameters"], adapter, 1)}
<h2>Generated answers</h2>
{_examples(run)}
<h2>Memory: plan and measurement</h2>
{_memory(run)}
<h2>Data</h2>
{_data(run)}
<h2>Configuration</h2>
<pre>{text(configuration.dump(run.config))}</pre>
</body>
</html>
"""


# The model card.


def markdown(value: object) -> str:
    """A value as one line of Markdown text: nothing in it is markup, a table's cell included."""
    line = " ".join(str(value).split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = re.sub(r"([\\`*_{}\[\]()#!|~$])", r"\\\1", line)
    # A list's mark counts only at the start, a colon only in an address that would become a link.
    return re.sub(r"^([-+])|(:)(?=//)", r"\\\1\2", line)


def _markdown_table(head: Sequence[str], rows: Iterable[Sequence[object]], numbers: int) -> str:
    rule = ["---" if n < numbers else "---:" for n in range(len(head))]
    lines = [[markdown(cell) for cell in head], rule, *([markdown(c) for c in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _limits(run: Run) -> list[str]:
    limits = [
        "It was evaluated only on the held-out sets above; what else changed in the model was not "
        "measured.",
        f"It was trained on sequences of at most {run.config.data.sequence_length:,} tokens, "
        + ("text only" if run.config.data.modality == "text" else "text and images")
        + "; the vision tower was not touched.",
        "Load it onto BF16 weights. Where the published checkpoint's FP8 weights are turned into "
        "BF16 on loading, some versions of transformers leave out the scales of the routed "
        "experts, without an error.",
        "Attention's softmax scale was "
        + {
            "plain": "1/sqrt(head dimension)",
            "yarn": "yarn's, with mscale squared",
        }[run.config.model.softmax_scale]
        + "; some versions of transformers use the other one.",
    ]
    if run.config.model.experts == "nf4":
        limits.append("The base's routed experts were held in NF4 during training.")
    if "attention" in run.config.adapters.presets:
        limits.append(
            "vLLM refuses adapters on q_a_proj and kv_a_proj_with_mqa; merge this one into the "
            "weights to serve it there."
        )
    return limits


def _ranks(adapters: AdaptersSection) -> str:
    """Ranks and scaling in words."""
    ranks = f"rank {adapters.rank_of(adapters.presets[0])}"
    if len({adapters.rank_of(preset) for preset in adapters.presets}) > 1:
        ranks += f", experts {adapters.rank_of('experts')}"
    stable = ", rank-stabilized" if adapters.rslora else ""
    dropout = f", dropout {adapters.dropout:g}" if adapters.dropout else ""
    return f"{ranks} (alpha {adapters.alpha:g}{stable}{dropout})"


def render_card(run: Run) -> str:
    """The model card: YAML front matter as model hubs read it, and Markdown."""
    train, data = run.manifests["train"], run.manifests["preprocess"]["train"]
    settings, source = run.config, run.manifests["fetch"]
    front = {
        "base_model": run.base_name,
        "library_name": "peft",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "ms4", "mistral-small-4", "base_model:adapter:" + run.base_name],
    }
    files = ", ".join(markdown(Path(name).name) for name in settings.data.train)
    revision = f" (revision {markdown(source['revision'])})" if source.get("revision") else ""
    adapter = [
        (item["target"], f"{item['tensors']:,}", f"{item['parameters']:,}")
        for item in train["adapter"]
    ]
    failures = "".join(f"- {markdown(text)}\n" for text in run.manifests["evaluate"]["failures"])
    verdict = VERDICTS.get(run.manifests["evaluate"]["verdict"], "unknown")
    return f"""---
{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---

# LoRA adapter for {markdown(run.base_name)}

A LoRA adapter of {_ranks(settings.adapters)} for
{markdown(run.base_name)}{revision}, trained with ms4 {markdown(train["ms4_version"])}.

## Training

- Data: {files}; {data["samples"]:,} samples, {data["tokens"]:,} tokens.
- {train["steps"]:,} optimizer steps, {train["trained_tokens"]:,} trained tokens, peak learning
  rate {settings.train.learning_rate:g} ({settings.train.schedule}), seed {settings.seed}.
- Training loss {nats(train["first_loss"])} → {nats(train["last_loss"])} nats per token.

{_markdown_table(["target", "tensors", "parameters"], adapter, 1)}

## Evaluation

{_markdown_table(_SCORE_HEAD, _score_rows(run.pairs), 2)}

Loss in nats per token on held-out answers; exact: share of answers that are exactly right.
Verdict: {markdown(verdict)}.

{failures}
## Use

```python
import torch
from peft import PeftModel
from transformers import Mistral3ForConditionalGeneration

base = Mistral3ForConditionalGeneration.from_pretrained(BASE, dtype=torch.bfloat16)
model = PeftModel.from_pretrained(base, ADAPTER)
```

`BASE` is a directory with the base model's weights in BF16, `ADAPTER` the one that this file lies
in. Write prompts with mistral-common, and say the reasoning effort (`none` or `high`) in them.

## Limits

{chr(10).join(f"- {limit}" for limit in _limits(run))}
"""


def run_stage(config: RunConfig) -> None:
    """Write report, figures, run record and model card, then `results/deliver.json`.

    Raises:
        Ms4Error: what a stage before should have left is missing or broken.
    """
    run = read_run(config)
    report = REPORT.parent
    loss = draw_loss(run.metrics, report / "loss")
    evaluation = draw_evaluation(run.pairs, config.evaluate.min_exact_match, report / "evaluation")
    write_text(REPORT, render_report(run, loss[0], evaluation[0]))
    write_text(CARD, render_card(run))
    write_record(report / "run.json", run)
    inputs = [*MANIFESTS.values(), METRICS, *(p for p in (MACHINE, EXAMPLES) if p.exists())]
    write_manifest(
        DELIVER,
        "deliver",
        config_hash=config.part_hash("deliver"),
        inputs=inputs,
        # Not run.json: it holds the time, and a manifest holds none.
        files=[file_entry(path, RESULTS) for path in (*loss, *evaluation, REPORT, CARD)],
    )
    print_summary(Path())
