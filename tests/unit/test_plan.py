"""The memory plan: computed by hand, its order, what it proposes, the stage."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ms4 import config, manifest, spec
from ms4 import plan as planner
from ms4.errors import Ms4Error

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
    parts = planner.weights(make(), FULL, "cuda")
    # gate_up has 2^24 weights an expert, so 2^18 blocks and 2^10 scales; down has half of each.
    gate_up = 128 * (2**23 + 2**18 + 4 * 2**10 + 4)
    down = 128 * (2**22 + 2**17 + 4 * 2**9 + 4)
    assert parts == {
        "routed experts (nf4)": 36 * (gate_up + down),
        "attention": 2 * 1_009_778_688,
        "shared experts": 2 * 905_969_664,
        "embedding and head": 4 * 536_870_912,
        "router and norms": 2 * (18_874_368 + 345_088),
        "vision": 2 * (403_305_472 + 25_166_848),
    }
    assert parts["routed experts (nf4)"] / GIB == pytest.approx(55.7, abs=0.05)  # published
    bf16 = planner.weights(make(model={"experts": "bf16"}), FULL, "cuda")
    assert sum(bf16.values()) == 2 * spec.PUBLISHED_PARAMETERS
    on_cpu = planner.weights(make(), FULL, "cpu")
    assert on_cpu["attention"] == 4 * 1_009_778_688


def test_full_size_adapters_by_hand():
    # in + out of q_a, q_b, kv_a, kv_b, o
    attention = (4096 + 1024) + (1024 + 4096) + (4096 + 320) + (256 + 6144) + (4096 + 4096)
    assert planner.adapter_parameters(FULL, "attention", 32) == 36 * 32 * attention
    assert planner.adapter_parameters(FULL, "shared", 32) == 36 * 32 * 3 * (4096 + 2048)
    experts = (4096 + 4096) + (2048 + 4096)
    assert planner.adapter_parameters(FULL, "experts", 32) == 36 * 128 * 32 * experts


def test_full_size_default():
    found = planner.plan(make(), FULL, "cuda")
    assert found.moment == "backward"
    assert sum(found.components.values()) == found.peak
    # An allocation-exact simulation with NF4 text linears gave 62 GiB. Ours are in BF16 (2.65 GiB
    # more), and process, down's scratch and the margin (2.6 GiB) were not in it.
    assert 64 * GIB < found.peak < 70 * GIB
    trained = 36 * 32 * (29248 + 18432)
    assert found.components["adapters"] == 4 * trained
    assert found.components["gradients"] == 4 * trained
    assert found.components["optimizer state"] == 8 * trained
    assert found.components["layer inputs"] == 36 * 2048 * 4096 * 2
    assert found.components["block mask"] == 2048**2 * 3
    two = planner.plan(make(train={"micro_batch": 2}), FULL, "cuda")
    assert two.components["block mask"] == 2 * 2048**2 * 3
    assert found.components["head's hidden states"] == 2048 * 4096 * 6
    assert found.components["dequantized experts"] == 64 * 3 * 4096 * 2048 * 2 + 64 * 3 * 2**17 * 16
    moving = found.peak - sum(planner.weights(make(), FULL, "cuda").values())
    margin = found.components["allocator margin"]
    assert margin == pytest.approx((moving - margin) * 0.05, abs=1)
    # FP8 source as published and the base
    base = sum(planner.weights(make(), FULL, "cuda").values())
    assert found.disk == pytest.approx(120.92e9 + base + 40 * trained, rel=1e-3)


def test_layer_by_hand():
    attention = 128 + 2 * 64 + 3 * 4 * 32 + (48 + 16) + 48 + 4 * 48 + 2 * 4 * 32 + 2 * 128
    moe = 2 * (128 + 128 + 128 + 256) + 4 * 64 + 2 * 128
    single = 4 * (attention + moe) + 4 * (2 * 2 * 128 + 2 * 4)
    assert planner.layer_saved(SMALL, 1, 4) == single
    assert planner.layer_saved(SMALL, 100, 4) == 100 * single
    gradients = planner.layer_gradients(make(), SMALL, 100, 4)
    adapters = sum(planner.adapter_parameters(SMALL, t, 32) for t in ("attention", "shared"))
    assert gradients == 100 * 4 * (2 * (2 * 128 + 3 * 64) + 2 * 128) + 4 * adapters // 2


def test_the_fullest_moment():
    loss = make(train={"loss_chunk": 2**20}, data={"sequence_length": 65536})
    found = planner.plan(loss, FULL, "cuda")
    assert found.moment == "loss"
    assert found.components["loss chunk"] == 65536 * 131072 * 10  # no more than there are tokens
    on_cpu = planner.plan(loss, FULL, "cpu")
    assert on_cpu.components["loss chunk"] == 65536 * 131072 * 8
    many = make(adapters={"targets": ["experts"], "rank": 512}, data={"sequence_length": 16})
    found = planner.plan(many, FULL, "cuda")
    assert found.moment == "optimizer"
    assert found.components["optimizer temporaries"] == found.components["adapters"]


@settings(max_examples=60, deadline=None)
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
    assert now > sum(planner.weights(make(), SMALL, kind).values())
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


@pytest.mark.parametrize("budget", [560, 330, 280, 120, 80, 72])
def test_each_proposal_is_planned_and_fits(budget):
    greedy = make(**GREEDY)
    found = planner.proposals(greedy, FULL, "cuda", 3000, budget * GIB)
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
    assert "Largest parts: layer activations" in message


def test_single_changes_before_pairs():
    roomy = planner.proposals(make(**GREEDY), FULL, "cuda", 3000, 560 * GIB)
    assert [len(p.changes) for p in roomy] == [1] * len(roomy)
    assert roomy[0].changes[0].startswith("train.checkpointing: full")
    tight = planner.proposals(make(**GREEDY), FULL, "cuda", 3000, 280 * GIB)
    assert {len(p.changes) for p in tight} == {2}


def test_sequence_is_not_cut_below_the_longest_sample():
    changes = list(planner._changes(make(**GREEDY), 4096))
    assert ("data", {"sequence_length": 4096}, "the longest sample has 4096 tokens") in changes
    assert "data" not in [section for section, _, _ in planner._changes(make(**GREEDY), 4097)]


def test_nothing_fits():
    message = str(planner.does_not_fit(make(), FULL, "cuda", 500, 40 * GIB))
    least = planner.least(make(), FULL, "cuda", 500)
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
    expected = planner.plan(demo(), SMALL, "cpu")
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
