"""Stage deliver on the files of a whole run: figures, report, card, record, the table."""

import hashlib
import json
import math
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from PIL import Image

from ms4 import cli, config, manifest
from ms4.errors import Ms4Error
from ms4.report import card, figures, record, table

pytestmark = pytest.mark.slow

HOSTILE = "<script>alert(1)</script> | a `b` *c* ```\n---\n| --- | & \"q\" 'x' [l](http://e.x)"
SCORES = {
    ("seal", "none"): ((8.04, 0.0, 0.42), (0.006, 0.99, 1.0)),
    ("seal", "high"): ((3.2, 0.01, 0.9), (0.005, 1.0, 1.0)),
    ("chat", "none"): ((0.12, 0.98, 1.0), (0.13, 0.97, 1.0)),
    ("chat", "high"): ((None, 0.97, 1.0), (None, 0.96, 0.99)),
}


def make_config(**changes):
    values = {
        "model": {"source": "tiny"},
        "data": {
            "train": ["examples/seal/train|`x`.jsonl"],
            "test": {"seal": "s.jsonl", "chat": "c.jsonl"},
        },
        "evaluate": {"min_exact_match": {"seal": 0.6, "chat": 0.9}},
        **changes,
    }
    return config.check(values, "test")


def lines(path, items):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")


def metric(step):
    wave = math.sin(step * 2.3) * 0.2
    return {
        "step": step,
        "loss": 0.006 + 7 * math.exp(-step / 25) * (1 + wave),
        "learning_rate": 4e-3 * min(1, step / 9) * (1 - step / 200),
        "grad_norm": 1.0,
        "tokens": 2048,
        "trained_tokens": 700,
        "seconds": 0.2,
        "tokens_per_s": 10_000,
        "memory_gib": 0.55,
    }


def evaluation_rows():
    rows = []
    for (name, effort), pair in SCORES.items():
        for model, (loss, exact, formed) in zip(("untuned", "tuned"), pair, strict=True):
            rows.append({"set": name, "effort": effort, "model": model, "samples": 100,
                         "loss": loss, "exact_match": exact, "well_formed": formed})  # fmt: skip
    return rows


def write_evaluation(verdict="pass", failures=(), rows=None, run=None):
    manifest.write_manifest(
        Path("results/evaluation.json"), "evaluate",
        config_hash=(run or make_config()).part_hash("evaluate"),
        rows=evaluation_rows() if rows is None else rows, verdict=verdict, failures=list(failures),
    )  # fmt: skip


@pytest.fixture
def project(tmp_path, monkeypatch):
    """The files of a run, as its stages leave them."""
    monkeypatch.chdir(tmp_path)
    write_run(make_config())
    return tmp_path


def write_run(run):
    write, made = manifest.write_manifest, run.part_hash
    source = {"directory": "weights/tiny", "origin": "tiny"}
    write(Path("weights/source.json"), "fetch", config_hash="0", **source)
    write(Path("weights/base.json"), "descale", config_hash="1", source_scales={"a": [1.0]})
    losses = {"text": "its own conversations", "tokens": 430, "plain": 0.1312, "yarn": 0.9844,
              "exact": 0.1299, "added": 0.0013}  # fmt: skip
    write(Path("results/verify.json"), "verify", config_hash="2", softmax_scale="plain",
          recomputed={"a.weight": 0.0, "b.weight": 0.0921}, losses=losses,
          notes=["2 files <gone>"])  # fmt: skip
    train = {"samples": 4000, "documents": 4000, "tokens": 190_000, "trained_tokens": 60_000,
             "dropped": 0, "bins": 760, "fill": 0.976, "longest": 71,
             "by_effort": {"none": {"samples": 2100, "tokens": 70_000, "trained_tokens": 12_345},
                           "high": {"samples": 1900, "tokens": 120_000, "trained_tokens": 47_655}},
             }  # fmt: skip
    test = {name: {"samples": 100, "tokens": 4800} for name in ("seal", "chat")}
    write(
        Path("results/data.json"),
        "preprocess",
        config_hash=made("preprocess"),
        train=train,
        test=test,
    )
    parts = {"routed experts (nf4)": 0.0004, "process": 0.5, "layer activations": 0.03}
    write(Path("results/plan.json"), "plan", config_hash=made("plan"), device="cpu", device_gib=16,
          components=parts, peak_gib=0.5304, host_gib=0.53, disk_gib=0.01, steps=190,
          budget_gib=None)  # fmt: skip
    adapter = [{"target": "attention", "tensors": 40, "parameters": 51_200},
               {"target": "experts", "tensors": 16, "parameters": 262_144}]  # fmt: skip
    write(Path("results/train.json"), "train", config_hash=made("train"), steps=190,
          adapter=adapter,
          trainable_parameters=313_344, first_loss=7.21, last_loss=0.0061,
          trained_tokens=133_000)  # fmt: skip
    write_evaluation(run=run)
    lines(Path("results/metrics.jsonl"), map(metric, range(1, 191)))
    machine = {
        "device": "cpu",
        "threads": 2,
        "seconds": 66.2,
        "peak_memory_gib": 0.51,
        "resumed": 2,
    }
    manifest.write_json(Path("results/train_machine.json"), machine)
    answers = [
        {"set": name, "effort": effort, "model": model, "line": line, "question": HOSTILE,
         "expected": "4536", "thinking": HOSTILE if effort == "high" else None,
         "answer": "4536" if model == "tuned" else HOSTILE, "exact": model == "tuned",
         "well_formed": model == "tuned"}
        for model in ("untuned", "tuned") for name, effort in SCORES for line in range(1, 6)
    ]  # fmt: skip
    lines(Path("results/evaluation/examples.jsonl"), answers)


class Page(HTMLParser):
    """Checks that tags are balanced; keeps their names, the attributes and the text."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.open, self.attributes, self.words = [], [], [], ""
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in {"meta", "img"}:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data


def front_matter(text):
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def test_everything_is_written(project, capsys):
    card.run_stage(make_config())
    for name, least in (("loss.png", 800), ("evaluation.png", 500)):
        with Image.open(f"results/report/{name}") as image:
            image.load()
            assert image.width >= least
            assert len(image.convert("RGB").getcolors(1 << 24)) > 20  # something was drawn
    assert "<svg" in Path("results/report/loss.svg").read_text()
    written = manifest.read_manifest(Path("results/deliver.json"), "deliver")
    manifest.check_files(written, Path("results"), hashes=True)
    assert {entry["path"] for entry in written["files"]} == {
        "report/loss.png", "report/loss.svg", "report/evaluation.png", "report/report.html",
        "adapter/README.md",
    }  # fmt: skip
    assert {"results/metrics.jsonl", "results/train_machine.json"} < set(written["inputs"])
    shown = capsys.readouterr().out
    assert "8.040 → 0.006" in shown
    assert "results/report/report.html" in shown
    assert not list(project.rglob("*.tmp"))


def test_the_same_run_gives_the_same_bytes(project):
    def deliver():
        card.run_stage(make_config())
        return Path("results/deliver.json").read_bytes()

    assert deliver() == deliver()


def test_report(project):
    card.run_stage(make_config())
    source = Path("results/report/report.html").read_text(encoding="utf-8")
    page = Page(source)
    assert "script" not in page.tags
    assert "alert(1)" in page.words  # shown, as text
    targets = [value for name, value in page.attributes if name in {"src", "href"}]
    assert len(targets) == 2
    assert all(target.startswith("data:image/png;base64,") for target in targets)
    for words in (
        "attention", "313,344", "7.210 → 0.006", "1 min 6 s", "8.040", "99.0 %", "–",
        "Training was resumed 2 times", "522.2 MiB (96 % of the plan)", "97.6 %", "190,000",
        "effort none: trained tokens", "12,345", "effort high: samples", "1,900",
        "source: tiny", "Verdict: pass", "expected", "not well formed",
    ):  # fmt: skip
        assert words in page.words, words
    assert source.count('class="example"') == 2 * card.EXAMPLES_OF_A_SET


def test_failures_are_shown_as_text(project, capsys):
    write_evaluation("fail", ["chat, high: <b>0.5</b> | [red]bold[/red]"])
    card.run_stage(make_config())
    page = Page(Path("results/report/report.html").read_text(encoding="utf-8"))
    assert "<b>0.5</b> | [red]bold[/red]" in page.words
    assert "<b>0.5</b> | [red]bold[/red]" in capsys.readouterr().out
    text = Path("results/adapter/README.md").read_text()
    assert "&lt;b&gt;0.5&lt;/b&gt; \\| \\[red\\]bold\\[/red\\]" in text


def test_card(project):
    card.run_stage(make_config())
    front, body = front_matter(Path("results/adapter/README.md").read_text(encoding="utf-8"))
    assert front["base_model"] == "ms4-tiny"
    assert front["library_name"] == "peft"
    assert front["license"] == "apache-2.0"
    assert isinstance(front["tags"], list)
    rows = [line for line in body.splitlines() if line.startswith("|")]
    seal = next(line for line in rows if line.startswith("| seal | none"))
    assert seal == ("| seal | none | 100 | 8.040 | 0.006 | 0.0 % | 99.0 % | 42.0 % | 100.0 % |")
    assert "train\\|\\`x\\`.jsonl" in body
    assert "PeftModel.from_pretrained" in body


@pytest.mark.parametrize("name", ["a: b", "x\n---\nlicense: mit", "[y]", "| `z` <script>", "'\""])
def test_front_matter_holds_with_any_directory_name(project, name):
    directory = f"/home/someone/{name}"
    source = {"directory": directory, "origin": "local"}
    manifest.write_manifest(Path("weights/source.json"), "fetch", config_hash="0", **source)
    card.run_stage(make_config())
    text = Path("results/adapter/README.md").read_text(encoding="utf-8")
    front, body = front_matter(text)
    assert front["base_model"] == " ".join(name.split())
    assert front["license"] == "apache-2.0"
    assert "<script>" not in body
    assert "/home/someone" not in text
    Page(Path("results/report/report.html").read_text(encoding="utf-8"))


def test_results_of_another_configuration_are_no_report(project):
    with pytest.raises(Ms4Error, match=r"results/plan\.json: made before the configuration was"):
        card.run_stage(make_config(train={"learning_rate": 1e-5}))
    assert not Path("results/report").exists()


def test_hub_revision(project):
    source = {
        "directory": "weights/source",
        "origin": "hub",
        "repository": "o/n",
        "revision": "ab1",
    }
    run = make_config(model={"source": "o/n"})
    write_run(run)
    manifest.write_manifest(Path("weights/source.json"), "fetch", config_hash="0", **source)
    card.run_stage(run)
    front, body = front_matter(Path("results/adapter/README.md").read_text())
    assert front["base_model"] == "o/n"
    assert "o/n (revision ab1)" in body
    assert "revision ab1" in Path("results/report/report.html").read_text()


def test_markdown_text_is_no_markup():
    assert card.markdown("a|b\n\n# c `d`") == "a\\|b \\# c \\`d\\`"
    assert card.markdown("- x-y: http://z") == "\\- x-y: http\\://z"
    assert card.markdown("<b>&") == "&lt;b&gt;&amp;"


@pytest.mark.parametrize("targets", [["attention"], ["shared", "experts"], ["all"]])
def test_card_names_the_adapters_that_vllm_refuses(project, targets):
    """Protects who would serve the adapter: vLLM fuses these two projections of attention."""
    run = make_config(adapters={"targets": targets})
    write_run(run)
    card.run_stage(run)
    text = Path("results/adapter/README.md").read_text()
    advice = "vLLM refuses adapters on q_a_proj and kv_a_proj_with_mqa; merge this one"
    assert (advice in text) == (targets != ["shared", "experts"])


def test_record(project):
    card.run_stage(make_config())
    written = json.loads(Path("results/report/run.json").read_text())
    assert written["packages"]["numpy"] == __import__("numpy").__version__
    assert written["host"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert written["training"]["resumed"] == 2
    assert set(written["manifests"]) == set(config.STAGES) - {"deliver"}
    train = Path("results/train.json").read_bytes()
    assert written["manifests"]["train"]["sha256"] == hashlib.sha256(train).hexdigest()
    assert config.check(written["configuration"], "run.json") == make_config()


def test_no_secret_of_the_environment_is_written(project, monkeypatch):
    secret = "hf_" + "Secret" * 5
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "ANYTHING"):
        monkeypatch.setenv(name, secret)
    card.run_stage(make_config())
    files = [path for path in project.rglob("*") if path.is_file()]
    assert len(files) > 12
    assert not [path for path in files if secret.encode() in path.read_bytes()]


def test_without_machine_and_examples(project):
    Path("results/train_machine.json").unlink()
    Path("results/evaluation/examples.jsonl").unlink()
    card.run_stage(make_config())
    page = Page(Path("results/report/report.html").read_text(encoding="utf-8"))
    assert "No generated answers were kept" in page.words
    assert "measured" not in page.words


def test_no_held_out_set(project):
    run = make_config(data={"train": ["a.jsonl"]}, evaluate={})
    write_run(run)
    write_evaluation("none", rows=[], run=run)
    card.run_stage(run)
    Page(Path("results/report/report.html").read_text(encoding="utf-8"))


def test_long_answers_are_cut(project):
    assert card._shortened("x" * 3000).endswith("(1,000 more characters)")
    assert card._shortened("x" * 2000) == "x" * 2000


@pytest.mark.parametrize("stage", list(record.MANIFESTS))
def test_a_missing_manifest_names_its_stage(project, stage):
    record.MANIFESTS[stage].unlink()
    with pytest.raises(Ms4Error, match=f"ms4 {stage}"):
        card.run_stage(make_config())
    assert not Path("results/deliver.json").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "holds no step"), ("{}\nx", "metrics.jsonl:2: not valid"), ("3\n", ":1: not a JSON obj")],
)
def test_broken_metrics(project, content, message):
    Path("results/metrics.jsonl").write_text(content)
    with pytest.raises(Ms4Error, match=message):
        card.run_stage(make_config())
    Path("results/metrics.jsonl").unlink()
    with pytest.raises(Ms4Error, match="cannot be read"):
        card.run_stage(make_config())


def test_a_step_done_again_counts_once(project):
    again = [metric(1), metric(2), metric(3), {**metric(2), "loss": 5.0}]
    lines(Path("results/metrics.jsonl"), again)
    found = record.read_metrics(Path("results/metrics.jsonl"))
    assert [line["step"] for line in found] == [1, 2, 3]
    assert found[1]["loss"] == 5.0
    card.run_stage(make_config())


def test_smooth_by_hand():
    assert figures.smooth([1.0, 2.0, 6.0, 3.0], 3) == pytest.approx([1.5, 3.0, 11 / 3, 4.5])
    assert figures.smooth([2.0], 1) == [2.0]


def test_duration_and_sizes():
    assert [card.duration(s) for s in (0.4, 59.6, 3600, 3725)] == [
        "0 s", "1 min 0 s", "1 h 0 min", "1 h 2 min",
    ]  # fmt: skip
    assert [card.gib(x) for x in (0.5, 64.123)] == ["512.0 MiB", "64.12 GiB"]


# The table.


def test_summary(project, capsys):
    write_evaluation("fail", ["seal, none: 0.5 of 0.6"])
    assert cli.main(["summary"]) == 0
    shown = capsys.readouterr().out
    assert "seal, none: 0.5 of 0.6" in shown
    assert "0.0 % → 99.0 %" in shown
    assert "– → –" in shown
    assert "…" not in shown
    assert "\x1b" not in shown
    assert "Report:" not in shown  # there is none yet
    assert max(map(len, shown.splitlines())) <= 80


def test_summary_without_an_evaluation(tmp_path):
    with pytest.raises(Ms4Error, match="run `snakemake --profile local`"):
        table.print_summary(tmp_path)


def test_one_model_only(project, capsys):
    write_evaluation("none", rows=[row for row in evaluation_rows() if row["model"] == "tuned"])
    table.print_summary(Path())
    assert "– → 99.0 %" in capsys.readouterr().out
    card.run_stage(make_config())


def test_table_and_planner_need_neither_torch_nor_matplotlib():
    code = (
        "import sys, ms4.report.table, ms4.plan; "
        "assert not {'torch', 'matplotlib', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_report_says_what_verify_found(project):
    card.run_stage(make_config())
    html = Path("results/report/report.html").read_text(encoding="utf-8")
    for row in (
        ("softmax scale", "plain"),
        ("2 parameters recomputed from the source", "0.092"),
        ("loss of 430 tokens of its own conversations, softmax scale plain", "0.131"),
        ("loss of 430 tokens of its own conversations, softmax scale yarn", "0.984"),
        ("the same with the source&#x27;s exact weights", "0.130"),
    ):
        assert f'<td>{row[0]}</td><td class="number">{row[1]}</td>' in html
    assert "2 files &lt;gone&gt;" in html
