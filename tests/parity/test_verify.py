"""What verify says of a base: faults made on purpose, losses, and what it does with them."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from ms4 import spec, tiny
from ms4.cli import main, run_stage
from ms4.errors import Ms4Error
from ms4.manifest import file_entry
from ms4.weights import verify
from ms4.weights.convert import descale_directory

from .conftest import settings, spoil

BASE = "weights/base"
LAYER = "language_model.model.layers.0."
O_PROJ = LAYER + "self_attn.o_proj.weight"
GATE_UP = LAYER + "mlp.experts.gate_up_proj"


def edit_json(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def revouch(project):
    """Make the manifest agree with a spoiled base, so that verify has to look at the tensors."""
    base = project / BASE

    def change(manifest):
        manifest["files"] = [file_entry(base / e["path"], base) for e in manifest["files"]]

    edit_json(project / "weights/base.json", change)


def as_json(capsys, *arguments):
    """Exit code and findings of `ms4 verify … --json`, and what it says on standard error."""
    capsys.readouterr()  # what was printed before
    code = main(["verify", *map(str, arguments), "--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out), err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(O_PROJ), r"layer-00\.safetensors: .*o_proj.weight: is missing"),
        (lambda t: t.update(extra=torch.zeros(1)), r"layer-00\.safetensors: extra: is unexpected"),
        (
            lambda t: t.update({O_PROJ: t[O_PROJ].float()}),
            r"o_proj.weight: is F32 \[128, 128\] instead of BF16",
        ),
        (
            lambda t: t.update({O_PROJ: t[O_PROJ].flatten()}),
            r"o_proj.weight: is BF16 \[16384\] instead of BF16 \[128, 128\]",
        ),
        (lambda t: t[O_PROJ].mul_(1.01), "o_proj.*differs from source × scale"),
        (lambda t: t[GATE_UP + ".absmax_scale"].mul_(2), "gate_up_proj: differs from source ×"),
    ],
)
def test_faults_of_tensors(project, checkpoint, change, message):
    spoil(project / BASE / "layer-00.safetensors", change)
    revouch(project)
    with pytest.raises(Ms4Error, match=message):
        run_stage("verify", settings(checkpoint))
    assert not (project / "results/verify.json").exists()


def test_faults_of_many_files_are_told_together(project, capsys):
    spoil(project / BASE / "layer-00.safetensors", lambda t: t.pop(O_PROJ))
    spoil(project / BASE / "layer-01.safetensors", lambda t: t.update(extra=torch.zeros(1)))
    cut = project / BASE / "layer-02.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1])
    spoil(project / BASE / "vision.safetensors", lambda t: t.update(extra=torch.zeros(1)))
    edit_json(
        project / BASE / "model.safetensors.index.json",
        lambda index: index["weight_map"].update(
            {"language_model.lm_head.weight": "layer-00.safetensors", "ghost": "a.safetensors"}
        ),
    )
    edit_json(
        project / BASE / "config.json",
        lambda config: config["text_config"].update(softmax_scale=0.5),
    )
    (project / BASE / "tekken.json").unlink()
    code, found, err = as_json(capsys, BASE)
    assert code == 2
    for message in (
        f"weights/base/layer-00.safetensors: {O_PROJ}: is missing",
        "weights/base/vision.safetensors: extra: is unexpected",
        "extra: is in layer-01.safetensors too",
        "layer-02.safetensors: language_model.model.layers.2.mlp.experts.gate_up_proj.nf4: its",
        "language_model.lm_head.weight: is in text.safetensors and not in layer-00.safetensors",
        "ghost: should be in a.safetensors, and is in no file",
        "text_config.softmax_scale is 0.5",
        "weights/base/tekken.json: is missing",
        "weights/base/layer-00.safetensors: has",
    ):
        assert any(message in fault for fault in found["faults"]), (message, found["faults"])
    # A file that cannot be read is one fault, and not one for each of its tensors.
    assert sum("layer-02" in fault for fault in found["faults"]) <= 3
    assert f"{len(found['faults'])} faults" in err
    assert found["losses"] is None
    assert found["verdict"] == "skipped"


def test_of_a_damaged_file_the_tensors_that_differ_are_named(project, checkpoint, capsys):
    path = project / BASE / "layer-00.safetensors"
    down = GATE_UP.replace("gate_up", "down")
    size = path.stat().st_size
    data = bytearray(path.read_bytes())
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    begin = 8 + int.from_bytes(data[:8], "little")
    # In an expert that is not sampled, too.
    for name, at in ((down + ".nf4", 2 * 4096), (O_PROJ, 0)):
        data[begin + header[name]["data_offsets"][0] + at] ^= 1
    path.write_bytes(data)
    assert path.stat().st_size == size
    code, found, err = as_json(capsys, BASE)
    assert code == 2
    (fault,) = found["faults"]
    assert "layer-00.safetensors: its content differs from its SHA-256" in fault
    assert "2 of its tensors differ from source × scale: " in fault
    assert down in fault
    assert O_PROJ in fault
    assert "remove its files that are named and weights/base.json" in err

    (project / "nothing").mkdir()
    code, found, _ = as_json(capsys, BASE, "--source", project / "nothing")
    assert code == 2
    assert found["faults"][0].endswith("its content differs from its SHA-256")


def poison(source):
    """Codes and scales that are no numbers, in several files; returns what must be named."""
    named = []
    where = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]

    def put(name, at, value):
        def change(tensors):
            tensor = tensors[name]
            if tensor.dtype == torch.float8_e4m3fn:
                tensor.view(torch.uint8).view(-1)[at] = value
            else:
                tensor.view(-1)[at] = value

        spoil(source / where[name], change)
        named.append((where[name], name))

    put(GATE_UP, 7, 0x7F)
    put(GATE_UP, 65_535, 0xFF)
    put("language_model.model.layers.3.self_attn.q_a_proj.weight", 11, 0xFF)
    put(GATE_UP + "_scale_inv", 2, 0.0)
    put(GATE_UP + "_scale_inv", 5, -1.0)
    put("language_model.model.layers.2.mlp.experts.down_proj_scale_inv", 0, float("nan"))
    put("language_model.model.layers.1.self_attn.o_proj.weight_scale_inv", 0, float("inf"))
    put("language_model.model.layers.1.self_attn.q_b_proj.weight_scale_inv", 0, 1e36)
    put("language_model.model.layers.3.mlp.experts.down_proj_activation_scale", 1, float("nan"))
    put("language_model.model.norm.weight", 3, float("-inf"))
    return named


def test_codes_and_scales_that_are_no_numbers_are_all_named(bases, checkpoint, tmp_path, capsys):
    source = tmp_path / "source"
    shutil.copytree(checkpoint, source)
    named = poison(source)
    assert len({file for file, _ in named}) > 1
    activation = "language_model.model.layers.0.mlp.experts.down_proj_activation_scale"
    where = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    spoil(source / where[activation], lambda t: t[activation].fill_(0.0))
    code, found, err = as_json(capsys, bases["nf4"] / BASE, "--source", source)
    assert code == 2
    for file, name in named:
        assert any(f"{file}: {name}: " in fault for fault in found["faults"]), name
        assert f"{file}: {name}: " in err
    text = "\n".join(found["faults"])
    assert f"{GATE_UP}: 2 of its FP8 codes are not a number" in text
    assert f"{GATE_UP}_scale_inv: 2 of 8 scales are 0.0 (number 2), -1.0 (number 5)" in text
    assert "down_proj_scale_inv: 1 of 8 scales are nan (number 0)" in text
    assert "o_proj.weight_scale_inv: the scale is inf" in text
    assert "model.norm.weight: 1 of its BF16 values are not a number" in text
    assert "of the scales that it keeps are not the source's" in text
    # No weight depends on it: that is no fault of the base.
    assert f"{activation}: 8 of 8" not in text
    assert any(f"{activation}: 8 of 8" in note for note in found["notes"])


@pytest.mark.slow
def test_another_source_is_no_source(bases, tmp_path, capsys):
    tiny.build(tmp_path / "other", seed=2, threads=1, steps=1)
    code, found, _ = as_json(capsys, bases["nf4"] / BASE, "--source", tmp_path / "other")
    assert code == 2
    assert any("of the scales that it keeps are not the source's" in f for f in found["faults"])


@pytest.mark.slow
def test_what_a_good_base_gives(bases, capsys):
    """The same from the stage's file and from the command; NF4 beside the exact weights."""
    found = json.loads((bases["nf4"] / "results/verify.json").read_text())
    exact = json.loads((bases["bf16"] / "results/verify.json").read_text())
    assert (found["stage"], found["tensors"], found["parameters"]) == ("verify", 111, 2_203_776)
    assert (found["faults"], found["verdict"]) == ([], "unpredicted")
    assert sum(note.startswith("warning: ") for note in found["notes"]) == 1
    kinds = {"experts": 2, "attention": 5, "shared": 3, "norm": 5, "router": 1}
    for role, count in kinds.items():
        tensors = [t.disk for t in spec.tensors(spec.TINY) if t.role == role]
        assert len(found["recomputed"].keys() & set(tensors)) >= count
    errors = {name: error for name, error in found["recomputed"].items() if error}
    assert set(errors) == {name for name in found["recomputed"] if ".mlp.experts." in name}
    assert set(exact["recomputed"].values()) == {0.0}
    losses = found["losses"]
    assert losses["exact"] == pytest.approx(exact["losses"]["plain"], abs=1e-4)
    assert losses["added"] == pytest.approx(losses["plain"] - losses["exact"], abs=2e-4)
    assert losses["plain"] != losses["exact"]
    assert exact["losses"]["exact"] is None
    code, again, _ = as_json(capsys, bases["nf4"] / BASE)
    assert code == 0
    assert {key: again[key] for key in again if key != "directory"} == {
        key: found[key] for key in again if key != "directory"
    }


@pytest.mark.parametrize(("place", "target"), [("weights", "base"), (BASE, "."), (BASE, "../base")])
def test_a_projects_base_is_found_from_anywhere(project, monkeypatch, capsys, place, target):
    (project / BASE / "tekken.json").unlink()  # no loss: only where things are
    edit_json(
        project / "weights/base.json",
        lambda m: m.update(files=[e for e in m["files"] if e["path"] != "tekken.json"]),
    )
    monkeypatch.chdir(project / place)
    code, found, _ = as_json(capsys, target)
    assert (code, found["scanned"], found["faults"]) == (0, 4, [])


def test_the_table_on_the_screen(bases, capsys):
    assert main(["verify", str(bases["nf4"] / BASE)]) == 0
    out, _ = capsys.readouterr()
    for text in ("111 (2,203,776 parameters, experts in nf4)", "4 files scanned", "largest error"):
        assert text in out
    assert "loss, plain (the base's)" in out
    assert "loss, exact BF16" in out
    assert "none: the model does not predict this text" in out
    assert "  - warning: " in out


@pytest.mark.slow
def test_nothing_is_written_outside_a_project(checkpoint, tmp_path, capsys):
    target = tmp_path / "base"
    descale_directory(checkpoint, target, "fp8", "plain")
    before = {path: path.read_bytes() for path in target.rglob("*") if path.is_file()}
    code, found, _ = as_json(capsys, target, "--source", checkpoint)
    assert (code, found["faults"], found["experts"]) == (0, [], "fp8")
    assert set(found["recomputed"].values()) == {0.0}
    assert found["losses"]["exact"] is None  # it would be the same weights again
    after = {path: path.read_bytes() for path in target.rglob("*") if path.is_file()}
    assert after == before


@pytest.mark.slow
def test_a_source_that_was_freed(project, checkpoint, tmp_path, capsys):
    """What is not here is said, and is no fault."""
    source = tmp_path / "source"
    shutil.copytree(checkpoint, source)
    shards = sorted(source.glob("*.safetensors"))
    shards[1].unlink()
    code, found, _ = as_json(capsys, BASE, "--source", source)
    assert (code, found["scanned"]) == (0, 3)
    assert any(f"{shards[1].name} not here" in note for note in found["notes"])
    here = {n for path in source.glob("*.safetensors") for n in load_file(path)}
    assert found["recomputed"]
    assert found["recomputed"].keys() <= here
    assert found["losses"]["exact"] is None
    for shard in source.glob("*.safetensors"):
        shard.unlink()
    code, found, _ = as_json(capsys, BASE, "--source", source)
    assert (code, found["scanned"], found["recomputed"]) == (0, 0, {})
    assert any("weights are gone" in note for note in found["notes"])
    assert found["losses"]["plain"] > 0


@pytest.mark.slow
def test_what_was_compared_before_it_was_freed_is_told(project, checkpoint, capsys):
    """As the manifest of a source has it whose shards were freed on arrival."""
    freed = [{"path": "a.safetensors", "size": 1, "sha256": "0", "pieces": ["base/layer-00"]}]
    edit_json(
        project / "weights/source.json",
        lambda m: m.update(freed=freed, recomputed={O_PROJ: 0.0, GATE_UP: 0.0926}),
    )
    run_stage("verify", settings(checkpoint))
    assert (
        "files of the source that were freed: 1; 2 parameters of the base had been compared with "
        "it before, largest error 9.26%"
    ) in capsys.readouterr().out


def test_without_a_tokenizer_there_is_no_loss(checkpoint, tmp_path, capsys):
    source = tmp_path / "source"
    shutil.copytree(checkpoint, source)
    (source / "tekken.json").unlink()
    descale_directory(source, tmp_path / "base", "bf16", "plain")
    code, found, _ = as_json(capsys, tmp_path / "base")
    assert (code, found["losses"], found["verdict"]) == (0, None, "skipped")
    assert any("has no tekken.json" in note for note in found["notes"])
    assert any("no source was given" in note for note in found["notes"])


def test_a_tokenizer_that_is_none_is_a_fault(project, capsys):
    (project / BASE / "tekken.json").write_text("{}")
    revouch(project)
    code, found, _ = as_json(capsys, BASE)
    assert code == 2
    assert any("tekken.json: cannot be loaded" in fault for fault in found["faults"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda base: (base / "base.json").unlink(), "is missing: run `ms4 descale`"),
        (
            lambda base: edit_json(base / "base.json", lambda m: m.pop("softmax_scale")),
            "does not say how the base is stored",
        ),
        (lambda base: (base / "config.json").unlink(), r"config\.json: cannot be read"),
        (shutil.rmtree, "no such directory"),
    ],
)
def test_what_is_no_base(bases, tmp_path, capsys, change, message):
    base = tmp_path / "base"
    shutil.copytree(bases["nf4"] / BASE, base)
    shutil.copy(bases["nf4"] / "weights/base.json", base)
    change(base)
    with pytest.raises(Ms4Error, match=message):
        verify.verify_directory(base, None, as_json=True)
    assert main(["verify", str(base)]) == 2


def tokens(mean, spread, count=1000):
    values = torch.linspace(-1, 1, count, dtype=torch.float64)
    return mean + spread * values / values.std()


def test_when_the_other_scale_is_clearly_better():
    V = 131072
    assert verify.judge(tokens(3.0, 1), tokens(2.5, 1), V) == "other"
    assert verify.judge(tokens(2.5, 1), tokens(3.0, 1), V) == "holds"
    assert verify.judge(tokens(3.0, 0), tokens(2.96, 0), V) == "holds"  # too small to matter
    assert verify.judge(tokens(3.0, 0), tokens(2.94, 0), V) == "other"
    # 0.1 nats, with a standard error of 0.1 of the difference.
    assert verify.judge(tokens(3.0, 0), tokens(2.9, 3.2), V) == "holds"
    assert verify.judge(tokens(11.0, 1), tokens(9.0, 1), V) == "unpredicted"  # of ln V = 11.8
    assert verify.judge(tokens(float("nan"), 1), tokens(2.0, 1), V) != "holds"


def unpredicted(dims):
    losses = verify.Losses("prose", 400, plain=11.5, yarn=11.25, difference=-1, standard_error=0.1)
    found = verify.Findings("base", "nf4", "plain", 1, losses=losses, verdict="unpredicted")
    verify.tell_unpredicted(found, dims)
    return found


def test_a_published_model_that_predicts_nothing_is_a_fault(tmp_path):
    found = unpredicted(spec.Dimensions())
    with pytest.raises(Ms4Error, match=r"costs 11\.25 nats per token, and guessing 11\.78") as e:
        verify.insist(found, tmp_path / "base.json")
    assert "its weights are broken" in str(e.value)
    assert found.notes == []


@pytest.mark.parametrize("dims", [spec.TINY, replace(spec.Dimensions(), layers=35)])
def test_another_model_that_predicts_nothing_is_a_warning(dims, tmp_path):
    found = unpredicted(dims)
    verify.insist(found, tmp_path / "base.json")
    (note,) = found.notes
    assert note.startswith("warning: prose costs 11.25 nats per token")


@pytest.mark.parametrize("verdict", ["holds", "skipped"])
def test_only_the_verdict_makes_it_one(verdict):
    found = verify.Findings("base", "nf4", "plain", 1, verdict=verdict)
    verify.tell_unpredicted(found, spec.Dimensions())
    assert (found.faults, found.notes) == ([], [])


def found_other(directory, manifest):
    losses = verify.Losses("prose", 400, plain=2.5, yarn=1.5, difference=-1.0, standard_error=0.1)
    found = verify.Findings(directory, "nf4", "plain", 1, losses=losses, verdict="other")
    with pytest.raises(Ms4Error) as caught:
        verify.insist(found, manifest)
    return str(caught.value)


def test_the_setting_is_named(tmp_path):
    text = found_other("weights/base", verify.MANIFEST)
    assert "costs 2.500 nats per token under the softmax scale `plain`" in text
    assert "1.500 under `yarn`" in text
    assert "model.softmax_scale to `yarn`" in text
    alone = found_other(tmp_path.as_posix(), tmp_path / "base.json")
    assert "--softmax-scale yarn" in alone
    assert "model.softmax_scale" not in alone


# A model that was really taught, under the plain scale.


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    directory = tmp_path_factory.mktemp("taught")
    tiny.build(directory, seed=1, threads=1, steps=60)
    return directory


def own_project(root, taught, monkeypatch, scale):
    """A project with the taught model as its own tiny model."""
    monkeypatch.chdir(root)
    chosen = settings(taught, experts="nf4", softmax_scale=scale)
    run_stage("fetch", chosen)
    edit_json(root / "weights/source.json", lambda source: source.update(origin="tiny"))
    run_stage("descale", chosen)
    return chosen


@pytest.mark.slow
def test_the_scale_that_a_model_was_taught_under_holds(taught, tmp_path, monkeypatch, capsys):
    run_stage("verify", own_project(tmp_path, taught, monkeypatch, "plain"))
    found = json.loads((tmp_path / "results/verify.json").read_text())
    losses = found["losses"]
    assert (found["verdict"], losses["text"]) == ("holds", "the tiny model's own text")
    assert losses["plain"] < 2
    assert losses["difference"] > 4 * losses["standard_error"]
    assert abs(losses["added"]) < 0.1
    assert "`plain` holds" in capsys.readouterr().out


@pytest.mark.slow
def test_the_other_scale_stops_and_is_named(taught, tmp_path, monkeypatch, capsys):
    chosen = own_project(tmp_path, taught, monkeypatch, "yarn")
    before = {path: path.read_bytes() for path in (tmp_path / BASE).iterdir() if path.is_file()}
    with pytest.raises(Ms4Error, match=r"Set model\.softmax_scale to `plain`"):
        run_stage("verify", chosen)
    assert not (tmp_path / "results/verify.json").exists()
    after = {path: path.read_bytes() for path in (tmp_path / BASE).iterdir() if path.is_file()}
    assert after == before
    assert "`plain` is clearly better than `yarn`" in capsys.readouterr().out
    code, found, err = as_json(capsys, BASE)
    assert (code, found["verdict"], found["faults"]) == (2, "other", [])
    assert f"{found['losses']['plain']:.3f}" in err
    assert f"{found['losses']['yarn']:.3f}" in err
