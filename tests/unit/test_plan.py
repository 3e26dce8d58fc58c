"""The memory plan: computed by hand, its order, what it proposes, the stage."""

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ms4 import cli, config, fitting, manifest, memory, spec, throughput
from ms4 import plan as planner
from ms4.device import GPUS
from ms4.errors import Ms4Error
from tests.examples import examples

FULL = spec.Dimensions()
SMALL = spec.Dimensions(
    vocabulary=512, hidden=128, layers=2, experts=4, experts_per_token=2, expert_width=64, heads=4,
    q_rank=64, kv_rank=48, nope=16, rope=16, value=32, vision_hidden=32, vision_layers=1,
    vision_heads=2, vision_head=16, vision_width=64, patch=4,
)  # fmt: skip
GIB = 2**30


def make(**sections):
    values = {"data": {"train": ["train.jsonl"]}}
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section} if isinstance(section, dict) else section
    return config.check(values, "test")


def test_steps():
    assert planner.total_steps(make(train={"steps": 7}), 1000) == 7
    batch = {"micro_batch": 2, "accumulation": 4}
    assert planner.total_steps(make(train={"epochs": 2, **batch}), 100) == 25
    assert planner.total_steps(make(train={"epochs": 2, **batch}), 101) == 26
    assert planner.total_steps(make(train={"epochs": 0.01, **batch}), 3) == 1


def test_full_size_weights_by_hand():
    parts = memory.weights(make(), FULL, "cuda")
    # gate_up has 2^24 weights an expert, so 2^18 blocks and 2^10 scales; down has half of each.
    gate_up = 128 * (2**23 + 2**18 + 4 * 2**10 + 4)
    down = 128 * (2**22 + 2**17 + 4 * 2**9 + 4)
    assert parts == {
        "routed experts (nf4)": 36 * (gate_up + down),
        # FP8 codes, and a scale for each of the five and the three matrices of a layer.
        "attention": 1_009_778_688 + 2 * 5 * 36,
        "shared experts": 905_969_664 + 2 * 3 * 36,
        "embedding": 0,  # in host memory
        "head": 2 * 536_870_912,
        "router and norms": 2 * (18_874_368 + 345_088),
        "vision": 2 * (403_305_472 + 25_166_848),
    }
    assert parts["routed experts (nf4)"] / GIB == pytest.approx(55.7, abs=0.05)  # published
    bf16 = memory.weights(make(model={"experts": "bf16", "dense": "full"}), FULL, "cuda")
    assert sum(bf16.values()) == 2 * (spec.PUBLISHED_PARAMETERS - 536_870_912)
    on_cpu = memory.weights(make(), FULL, "cpu")
    assert on_cpu["attention"] == 4 * 1_009_778_688


def test_full_size_adapters_by_hand():
    # in + out of q_a, q_b, kv_a, kv_b, o
    attention = (4096 + 1024) + (1024 + 4096) + (4096 + 320) + (256 + 6144) + (4096 + 4096)
    assert memory.adapter_parameters(FULL, "attention", 32) == 36 * 32 * attention
    assert memory.adapter_parameters(FULL, "shared", 32) == 36 * 32 * 3 * (4096 + 2048)
    experts = (4096 + 4096) + (2048 + 4096)
    assert memory.adapter_parameters(FULL, "experts", 32) == 36 * 128 * 32 * experts


def test_full_size_default():
    found = planner.plan(make(), FULL, "cuda")
    assert sum(found.components.values()) == found.peak
    assert found.weights == sum(memory.weights(make(), FULL, "cuda").values())
    trained = 36 * 32 * (29248 + 18432)
    assert found.components["adapters"] == 4 * trained
    # Of the micro-steps before, and a layer's new ones.
    assert found.components["gradients"] == 4 * (trained + trained // 36)
    assert found.components["optimizer state"] == 8 * trained
    assert found.components["layer inputs"] == 36 * 2048 * 4096 * 2
    slices = memory.EXPERT_SLICE
    assert found.components["dequantized experts"] == slices * (2**24 * 2 + 5 * 2**18)
    step = (
        "gradients",
        "layer inputs",
        "backward of a layer",
        "head's hidden states",
        "loss chunk",
    )
    moving = sum(found.components.get(name, 0) for name in step)
    assert found.components["allocator margin"] == pytest.approx(moving * 0.05, abs=1)
    assert found.tensors == (
        found.peak - found.components["process"] - found.components["allocator margin"]
    )
    # FP8 source as published, the base, three checkpoints of 12 bytes a parameter and the adapter.
    # The base has BF16 where FP8 is held, and the embedding.
    base = found.weights + 1_009_778_688 + 905_969_664 + 2 * 536_870_912
    assert found.disk == pytest.approx(120.92e9 + base + 40 * trained, rel=1e-3)


def test_full_size_host_memory_by_hand():
    """Protects the RAM that a job on a GPU asks for: libraries, the embedding, what of the
    base is on its way, a checkpoint."""
    trained = 36 * 32 * (29248 + 18432)
    found = planner.plan(make(), FULL, "cuda").host
    assert found == 3 * GIB + 2 * 536_870_912 + 4 * 536_870_912 + (4 + 8) * trained


def test_on_a_cpu():
    found = planner.plan(make(), SMALL, "cpu")
    assert found.host == found.peak


def test_what_is_trained_by_hand():
    trained = 36 * 32 * (29248 + 18432)
    eight = planner.plan(make(train={"optimizer": "adamw_8bit"}), FULL, "cuda")
    assert eight.components["optimizer state"] == 2 * (trained + 4 * -(-trained // 256))
    paged = planner.plan(make(train={"optimizer": "paged_adamw_8bit"}), FULL, "cuda")
    assert "optimizer state" not in paged.components
    assert paged.host > eight.host
    half = planner.plan(make(adapters={"dtype": "bf16"}), FULL, "cuda")
    assert half.components["adapters"] == 2 * trained
    assert half.components["gradients"] == 2 * (trained + trained // 36)
    assert half.components["optimizer state"] == 8 * trained
    own = planner.plan(make(adapters={"targets": ["all"], "expert_rank": 4}), FULL, "cuda")
    experts = 36 * 128 * 4 * (4096 + 4096 + 2048 + 4096)
    assert own.components["adapters"] == 4 * (trained + experts)


def test_layer_by_hand():
    one = make()
    attention = 4 * (2 * 32 + 16 + 3 * 32)
    moe = 128 + 2 * 2 * 64 + 4 + 3 * 64
    dense = (128 + 64 + 48) + 64
    thin = 8 * 32
    single = 4 * (attention + moe + dense + thin) + 4 * (2 * 128 + 64 + 48 + 4)
    assert memory.layer_saved(one, SMALL, 1, 4) == single
    assert memory.layer_saved(one, SMALL, 100, 4) == 100 * single
    # In BF16, and the casts of FP32 adapters beside.
    cast = 2 * sum(memory.adapter_parameters(SMALL, p, 32) for p in ("attention", "shared")) // 2
    exact = 4 * (2 * 128 + 64 + 48 + 4)
    assert memory.layer_saved(one, SMALL, 1, 2) == (single - exact) // 2 + exact + cast


def test_the_fullest_moment():
    def moment(**sections):
        found = planner.plan(make(**sections), FULL, "cuda")
        return found.moment, found.components

    assert moment(train={"loss_chunk": 1024})[0] == "loss"
    assert moment()[0] == "last layer"
    many = {"adapters": {"targets": ["experts"], "rank": 64}}
    once = {"train": {"accumulation": 1, "loss_chunk": 64}}
    assert moment(**many, **once)[0] == "first layer"
    name, parts = moment(data={"sequence_length": 65536}, train={"loss_chunk": 10**6})
    assert name == "loss"
    assert parts["loss chunk"] == 65536 * (131072 * 6 + 2 * 4096)  # no more than there are tokens


def test_full_fine_tuning_by_hand():
    question = planner.read_question(None, ["method=full", "model.experts=bf16"])
    found = planner.plan(question, FULL, "cuda")
    trained = spec.PUBLISHED_PARAMETERS - 403_305_472 - 25_166_848
    assert found.components["gradients"] >= 2 * trained
    assert found.components["optimizer state"] == 8 * trained
    assert "adapters" not in found.components


@pytest.mark.parametrize("experts", ["nf4", "fp8", "bf16"])
def test_every_storage(experts):
    question = planner.read_question(None, [f"model.experts={experts}"])
    gib = planner.plan(question, FULL, "cuda").components[f"routed experts ({experts})"] / GIB
    assert gib == pytest.approx({"nf4": 55.7, "fp8": 108, "bf16": 216}[experts], abs=0.05)


@settings(max_examples=examples(60), deadline=None)
@given(
    micro_batch=st.integers(1, 16),
    length=st.integers(16, 4096),
    rank=st.integers(1, 256),
    chunk=st.integers(1, 8192),
    checkpointing=st.sampled_from(["full", "selective", "none", "auto"]),
    kind=st.sampled_from(["cpu", "cuda"]),
    targets=st.sets(st.sampled_from(["attention", "shared", "experts"]), min_size=1),
)
def test_more_never_takes_less(micro_batch, length, rank, chunk, checkpointing, kind, targets):
    def peak(**changes):
        values = {
            "micro_batch": micro_batch,
            "length": length,
            "rank": rank,
            "chunk": chunk,
            "checkpointing": checkpointing,
            "targets": sorted(targets),
            **changes,
        }
        built = make(
            data={"sequence_length": values["length"]},
            adapters={"rank": values["rank"], "targets": values["targets"]},
            train={
                "micro_batch": values["micro_batch"],
                "loss_chunk": values["chunk"],
                "checkpointing": values["checkpointing"],
            },
        )
        return planner.plan(built, SMALL, kind).peak

    now = peak()
    assert now > sum(memory.weights(make(), SMALL, kind).values())
    assert peak(micro_batch=micro_batch + 1) > now
    assert peak(length=length + 1) > now
    assert peak(rank=rank + 1) > now
    assert peak(chunk=chunk + 1) >= now
    assert peak(checkpointing="none") >= peak(checkpointing="full")
    assert peak(targets=["attention", "shared", "experts"]) >= now


GREEDY = {
    "model": {"experts": "bf16"},
    "data": {"sequence_length": 8192},
    "adapters": {"targets": ["attention", "shared", "experts"]},
    "train": {"micro_batch": 4, "checkpointing": "none", "loss_chunk": 65536},
}


@pytest.mark.parametrize("budget", [420, 330, 280, 120, 80, 72])
def test_each_proposal_is_planned_and_fits(budget):
    greedy = make(**GREEDY)
    found = fitting.proposals(greedy, FULL, "cuda", 3000, budget * GIB)
    assert found
    message = str(planner.does_not_fit(greedy, FULL, "cuda", 3000, budget * GIB))
    for proposal in found:
        # The user would write it into the file: so it must be a configuration in its own right.
        again = config.check(proposal.config.model_dump(mode="json"), "test")
        assert planner.plan(again, FULL, "cuda").peak == proposal.plan.peak <= budget * GIB
        assert again.data.sequence_length >= 3000
        assert again.train.micro_batch * again.train.accumulation == 4 * 8 or budget < 80
    for proposal in found[:6]:
        assert f"{' and '.join(proposal.changes)}: {planner.size(proposal.plan.peak)}" in message
    assert len({len(proposal.changes) for proposal in found}) == 1
    assert f"the budget is {budget}.0 GiB" in message
    assert "Largest parts: routed experts (bf16)" in message


def test_single_changes_before_pairs():
    roomy = fitting.proposals(make(**GREEDY), FULL, "cuda", 3000, 420 * GIB)
    assert [len(p.changes) for p in roomy] == [1] * len(roomy)
    assert roomy[0].changes[0].startswith("train.checkpointing: full")
    tight = fitting.proposals(make(**GREEDY), FULL, "cuda", 3000, 280 * GIB)
    assert {len(p.changes) for p in tight} == {2}


@pytest.mark.parametrize(
    ("experts", "budget", "wanted"),
    [
        ("fp8", 79, "model.experts: nf4 (rounds the experts)"),
        ("bf16", 79, "model.experts: nf4 (rounds the experts)"),
        ("bf16", 139, "model.experts: fp8 (the same values, a little slower)"),
    ],
)
def test_experts_held_in_less_come_before_all_at_its_least(experts, budget, wanted):
    run = make(model={"experts": experts}, train={"checkpointing": "full"})
    found = fitting.proposals(run, FULL, "cuda", 500, budget * GIB)
    assert found[0].changes == (wanted,)


def test_all_at_its_least_names_what_changes():
    run = make(model={"experts": "nf4"}, train={"micro_batch": 1, "optimizer": "adamw_8bit"})
    told = " ".join(fitting.least(run, FULL, "cuda", 500).changes)
    assert "adapters.rank: 1" in told
    for same in ("model.experts", "micro_batch", "optimizer", "expert_rank"):
        assert same not in told


def test_sequence_is_not_cut_below_the_longest_sample():
    changes = list(fitting._changes(make(**GREEDY), 4096, "cuda"))
    assert ("data", {"sequence_length": 4096}, "the longest sample has 4096 tokens") in changes
    assert "data" not in [
        section for section, _, _ in fitting._changes(make(**GREEDY), 4097, "cuda")
    ]


def test_nothing_fits():
    message = str(planner.does_not_fit(make(), FULL, "cuda", 500, 40 * GIB))
    least = fitting.least(make(), FULL, "cuda", 500)
    assert least.plan.peak > 55.7 * GIB
    assert f"needs at least {planner.size(least.plan.peak)}" in message
    assert "Use a device with more memory" in message
    again = planner.does_not_fit(make(), FULL, "cuda", 500, least.plan.peak)
    assert "adapters.rank: 1" in str(again)


# The stage.


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "weights/tiny"
    source.mkdir(parents=True)
    names = {**spec._TEXT_KEYS}
    (source / "config.json").write_text(
        json.dumps(
            {
                "model_type": "mistral3",
                "text_config": {
                    "model_type": "mistral4",
                    **{key: getattr(SMALL, name) for name, key in names.items()},
                },
                "vision_config": {
                    key: getattr(SMALL, name) for name, key in spec._VISION_KEYS.items()
                },
            }
        )
    )
    manifest.write_manifest(
        Path("weights/source.json"),
        "fetch",
        config_hash="0",
        directory="weights/tiny",
        origin="tiny",
    )
    train = {"samples": 90, "documents": 90, "tokens": 9000, "trained_tokens": 3000, "dropped": 0,
             "bins": 40, "fill": 0.88, "longest": 120, "by_effort": {"none": 90}}  # fmt: skip
    manifest.write_manifest(
        Path("results/data.json"), "preprocess", config_hash="0", train=train, test={}
    )
    return tmp_path


def demo(**run):
    return make(
        model={"source": "tiny"},
        data={"sequence_length": 256},
        train={"micro_batch": 4, "accumulation": 2},
        run={"device": "cpu", **run},
    )


def test_stage(project, capsys):
    planner.run_stage(demo(memory_gib=3.5))
    text = Path("results/plan.json").read_text()
    written = manifest.read_manifest(Path("results/plan.json"), "plan")
    assert written["checkpointing"] == "none"
    expected = planner.plan(fitting.changed(demo(), "train", checkpointing="none"), SMALL, "cpu")
    assert written["peak_gib"] == pytest.approx(expected.peak / GIB, abs=1e-6)
    assert sum(written["components"].values()) == pytest.approx(written["peak_gib"], abs=1e-4)
    assert written["budget_gib"] == 3.5
    assert (written["device"], written["steps"], written["tokens_per_step"]) == ("cpu", 5, 1800)
    assert isinstance(written["device_gib"], int)
    assert set(written["inputs"]) == {"results/data.json", "weights/source.json"}
    assert written["config_hash"] == demo(memory_gib=3.5).part_hash("plan")
    shown = capsys.readouterr().out
    assert "layer activations" in shown
    assert "5 steps of about 1,800 tokens" in shown
    assert "\x1b" not in shown
    assert shown.isascii()
    planner.run_stage(demo(memory_gib=3.5))
    assert Path("results/plan.json").read_text() == text


def test_stage_without_a_budget_records_none(project):
    planner.run_stage(demo())
    assert manifest.read_manifest(Path("results/plan.json"), "plan")["budget_gib"] is None


def test_stage_refuses_what_does_not_fit(project):
    with pytest.raises(Ms4Error, match=r"does not fit: it needs .* \(run.memory_gib\)"):
        planner.run_stage(demo(memory_gib=0.1))
    assert not Path("results/plan.json").exists()


def test_stage_needs_the_stages_before(project):
    Path("results/data.json").unlink()
    with pytest.raises(Ms4Error, match="ms4 preprocess"):
        planner.run_stage(demo())


# What `auto` comes to, and what is best.


@pytest.mark.parametrize(("budget", "policy"), [(60, "full"), (71, "selective"), (100, "none")])
def test_auto(budget, policy):
    chosen = planner.choose_checkpointing(make(), FULL, "cuda", budget * GIB)
    assert chosen == policy
    assert planner.choose_checkpointing(make(), FULL, "cuda", None) == "full"
    fixed = make(train={"checkpointing": "selective"})
    assert planner.choose_checkpointing(fixed, FULL, "cuda", budget * GIB) == "selective"


def test_auto_offloads_what_is_recomputed():
    offloading = make(train={"offload_activations": True})
    assert planner.choose_checkpointing(offloading, FULL, "cuda", 1000 * GIB) == "selective"


def test_best_fits_and_more_memory_is_never_slower():
    speeds = []
    for budget in (68, 80, 140, 300):
        found = planner.best(make(), FULL, "cuda", budget * GIB)
        assert found is not None
        assert found.plan.peak <= budget * GIB
        assert found.config.train.micro_batch * found.config.train.accumulation == 8
        assert found.config.adapters == make().adapters
        speeds.append(throughput.estimate(found.config, FULL, GPUS[0]).tokens_per_s)
    assert speeds == sorted(speeds)
    assert planner.best(make(), FULL, "cuda", 40 * GIB) is None


@pytest.mark.parametrize("budget", [68, 80, 300])
def test_nothing_that_fits_is_faster_than_best(budget):
    """Protects that what is proposed as the fastest is not merely something that fits."""
    best = planner.best(make(), FULL, "cuda", budget * GIB)
    fitting_speeds = []
    for policy, micro in itertools.product(("none", "selective", "full"), (1, 2, 4, 8)):
        values = {"checkpointing": policy, "micro_batch": micro, "accumulation": 8 // micro}
        tried = make(train=values)
        if planner.plan(tried, FULL, "cuda").peak <= budget * GIB:
            fitting_speeds.append(throughput.estimate(tried, FULL, GPUS[0]).tokens_per_s)
    found = throughput.estimate(best.config, FULL, GPUS[0]).tokens_per_s
    assert found >= max(fitting_speeds) > min(fitting_speeds)


# The command outside a project.


def test_answer_without_a_configuration(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["plan", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    expected = planner.plan(make(train={"checkpointing": "full"}), FULL, "cuda")
    assert found["peak_gib"] == pytest.approx(expected.peak / GIB, abs=1e-5)
    assert sum(found["components"].values()) == pytest.approx(found["peak_gib"], abs=1e-4)
    assert {estimate["kind"] for estimate in found["estimates"]} == {"estimate"}
    assert found["budget_gib"] is None
    assert list(tmp_path.iterdir()) == []
    assert cli.main(["plan"]) == 0
    assert "none measured" in capsys.readouterr().out


def test_answer_with_a_file_settings_and_a_budget(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text("adapters: {rank: 16}\ntrain: {steps: 5, accumulation: 4}\n")
    arguments = ["plan", "--config", "run.yaml", "--set", "adapters.targets=all", "--json"]
    assert cli.main([*arguments, "--budget", "70"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["fits"], found["checkpointing"], found["budget_gib"]) == (False, "full", 70)
    assert found["proposals"]
    assert all(proposal["peak_gib"] <= 70 for proposal in found["proposals"])
    speed = found["estimates"][0]["tokens_per_s"]
    assert found["estimates"][0]["hours"] == pytest.approx(5 * 4 * 2048 / speed / 3600, abs=0.01)
    assert cli.main([*arguments[:-1], "--budget", "70"]) == 0
    assert "any one of these makes it fit" in capsys.readouterr().out
    assert cli.main(["plan", "--config", "run.yaml"]) == 0
    assert "Device: a GPU" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set", "adapters.rnk=1"], "did you mean `rank`"),
        (["--set", "adapters.rank=0"], "greater than or equal to 1"),
        (["--set", "method=full"], "set it to bf16"),
        (["--budget", "-3"], "must be GiB"),
        (["--budget", "nan"], "must be GiB"),
        (["--config", "nothing.yaml", "--json"], "no such configuration file"),
    ],
)
def test_answer_refuses(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["plan", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_compare():
    planned = {"device": "cuda", "peak_gib": 66.0, "tensors_gib": 64.0}
    assert planner.compare(planned, 64.0).share == 1
    assert planner.compare({**planned, "device": "cpu"}, 33.0).share == 0.5
    told = str(planner.compare(planned, 65.28))
    assert told == "memory: measured 65.28 GiB at the fullest, planned 64.00 GiB (+2 %)"
