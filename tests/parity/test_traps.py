"""The silent traps of the stack that this project stands on, each with a test that would catch it.

Where the code that could fall into one has a test elsewhere, it is named here and not repeated:

1. FP8 experts that are read without their scales:
   tests/parity/test_model.py::test_experts_without_their_scales_would_be_seen
   tests/parity/test_experts.py::test_stores_give_the_weights
   tests/parity/test_gradients.py::test_fp8_computes_as_its_bf16_products_do
   tests/parity/test_transformers.py::test_transformers_own_dequantization_still_drops_the_experts_scales
2. Experts that are not quantized: here.
3. Expert adapters that do nothing or get no gradient: here, and
   tests/parity/test_adapters.py::test_every_adapter_learns
   tests/parity/test_adapters.py::test_a_dead_adapter_stops_the_run
   tests/parity/test_gradients.py::test_fp32
4. Target patterns that match almost nothing:
   tests/parity/test_adapters.py::test_matches
   tests/parity/test_adapters.py::test_a_surprising_match_is_refused
5. More elements in a call than int32 counts: here, and
   tests/parity/test_experts.py::test_a_slice_of_the_published_size_can_be_counted
6. The softmax scale of another version: here, and
   tests/parity/test_model.py::test_the_softmax_scale_is_the_configured_one
   tests/parity/test_attention.py::test_packed_attention_is_that_under_a_block_mask
7. Packed documents that see each other, positions that run on:
   tests/parity/test_gradients.py::test_fp32
   tests/parity/test_attention.py::test_packed_attention_is_that_under_a_block_mask
   tests/parity/test_model.py::test_packed_logits_and_restarting_positions
8. Sizes that are read from a device where there are no numbers: here.
9. Packed weights in buffers, which sharding leaves whole; a head that is used outside: here.
10. Grouped products that leave memory as it was: here, and
    tests/parity/test_experts.py::test_grouped_products_are_their_plain_twins
    tests/parity/test_experts.py::test_odd_sizes
11. A fused cross-entropy whose BF16 loss is off, or that needs Triton: here, and
    tests/parity/test_loss.py::test_bf16_is_as_near_to_fp32_as_torch_is
    tests/parity/test_loss.py::test_the_logits_of_all_rows_are_never_held
12. Extras for images that fail at import: here.
13. The layout of an exported expert adapter, and dropout beside it:
    tests/parity/test_adapters.py::test_peft_loads_it_onto_transformers_own_model
    tests/parity/test_adapters.py::test_saved_settings_hold_what_peft_accepts
14. Adapters that vLLM refuses:
    tests/unit/test_report.py::test_card_names_the_adapters_that_vllm_refuses
15. Numbers that YAML reads as text:
    tests/unit/test_config.py::test_numbers_that_pyyaml_reads_as_text
16. Downloads that never resume, locks that everyone is granted:
    tests/unit/test_hub.py::test_cut_connection_goes_on_with_the_rest
    tests/unit/test_lock.py::test_live_owner_is_refused_even_where_flock_grants_everyone
17. Text that the tokenizer's library changes:
    tests/unit/test_chat.py::test_what_is_trained_reads_as_the_assistant_wrote_it
18. Optimizers that fall back on a CPU:
    tests/parity/test_optim.py::test_what_a_cpu_cannot_do_is_refused
"""

import re
import subprocess
import sys

import pytest
import torch
from torch import nn

from ms4 import spec
from ms4.config import AdaptersSection
from ms4.model import experts, lora, stores
from ms4.model.build import load_model
from ms4.model.module import PackedLoss
from ms4.train.batches import collate
from ms4.weights import nf4
from tests.commands import CHECKOUT

from .conftest import documents, relative
from .test_experts import KINDS, Module, results

CPU = torch.device("cpu")


def test_the_tests_that_are_named_above_exist():
    named = re.findall(r"(tests/\S+\.py)::(\w+)", __doc__)
    assert len(named) > 20
    for path, name in named:
        assert f"def {name}(" in (CHECKOUT / path).read_text(), f"{path}::{name}"
    assert re.findall(r"^(\d+)\. ", __doc__, re.M) == [str(n) for n in range(1, 19)]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "most"), [("nf4", 0.53), ("fp8", 1.01), ("bf16", 2.0)])
def test_2_experts_stay_packed_in_memory(device, bases, kind, most):
    """Trap 2: the fused experts left in BF16. Bytes a weight while the rest is in fp32, also after
    a training step."""
    model = load_model(bases[kind] / "weights/base", kind, device, torch.float32)
    lora.add_adapters(model, AdaptersSection(targets=("experts",), rank=2), spec.TINY)
    batch = collate([documents([20, 9])]).to(device)
    for _ in range(2):
        held = sum(
            p.nbytes
            for name, p in model.named_parameters()
            if ".mlp.experts." in name and not p.requires_grad
        )
        weights = spec.parameters_by_role(spec.TINY)["experts"]
        assert held <= most * weights
        PackedLoss(model.train(), 64)(batch).backward()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_3_each_expert_adapter_moves_the_logits(device, bases, kind):
    """Trap 3: a gate_up adapter over packed experts without effect. One factor is stirred at a
    time, of one layer: the logits move, and by what W + ΔW in the plain reference says."""
    model = load_model(bases[kind] / "weights/base", kind, device, torch.float32)
    lora.add_adapters(model, AdaptersSection(targets=("experts",), rank=3), spec.TINY)
    tokens = torch.arange(1000, 1040, device=device)[None]
    text = model.model.language_model
    module = text.layers[1].mlp.experts
    with torch.no_grad():
        before = model(input_ids=tokens).logits
        for name in ("gate_up_lora", "down_lora"):
            factor = getattr(module, name).B
            factor.normal_(std=0.3)
            moved = model(input_ids=tokens).logits
            experts.ALL_EXPERTS_FUNCTIONS.register("plain", experts.experts_forward_plain)
            text.set_experts_implementation("plain")
            wanted = model(input_ids=tokens).logits
            text.set_experts_implementation(experts.IMPLEMENTATION)
            factor.zero_()
            assert relative(moved, before) > 1e-3
            assert relative(moved, wanted) < 1e-5


def test_5_no_kernel_is_asked_for_more_than_it_counts():
    """Trap 5: 2**31 elements of gate_up_proj in one call. Whatever a workspace is set to, no slice
    of the published size comes near."""
    workspace = stores.Workspace(experts=128)
    store = stores.BF16Store((128, 4096, 4096))
    size = workspace.size(store.shape[1] * store.shape[2], torch.bfloat16)
    assert store.take(slice(0, size), torch.float32, workspace).numel() < 2**31
    packed = nf4.Packed(*(torch.empty(128, 1, device="meta") for _ in range(4)))
    with pytest.raises(ValueError, match="128 experts in one call; slice them by 64"):
        nf4.dequantize(packed, (128, 4096, 4096), torch.bfloat16)


@pytest.mark.parametrize("kind", ["bf16", "nf4"])
def test_6_cosines_and_sines_are_not_multiplied(device, bases, kind):
    """Trap 6: `mscale_all_dim: 0` alone gives the plain scale, but multiplies cos and sin by 1.4852
    unless `attention_factor: 1.0` stands beside it."""
    model = load_model(bases[kind] / "weights/base", kind, device, torch.float32)
    rotary = model.model.language_model.rotary_emb
    assert rotary.attention_scaling == 1.0
    cos, sin = rotary(torch.zeros(1, 9, 1, device=device), torch.arange(9, device=device)[None])
    assert torch.allclose(cos.square() + sin.square(), torch.ones_like(cos))


@pytest.mark.parametrize("kind", KINDS)
def test_8_the_experts_run_where_there_are_no_numbers(kind):
    """Trap 8: `.item()` on a fake device raises. What is read is read through the workspace."""
    asked = []

    def spread(offsets_E):
        asked.append(offsets_E.shape)
        return [12, 24, 36]

    module = Module(kind, E=3, H=64, I=32)
    # Of bitsandbytes' two kernels the one that writes into held memory refuses every shape there.
    module.workspace = stores.Workspace(read=spread, held=kind != "nf4")
    module = module.to("meta")
    # torch's grouped product has no other dtype there.
    options = {"device": "meta", "dtype": torch.bfloat16}
    hidden = torch.randn(18, 64, requires_grad=True, **options)
    routes = torch.zeros(18, 2, device="meta", dtype=torch.long)
    out = experts.experts_forward(module, hidden, routes, torch.rand(18, 2, **options))
    out.sum().backward()
    assert out.shape == hidden.grad.shape == (18, 64)
    assert asked == [(3,)]
    assert all(p.grad is not None for p in module.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", KINDS)
def test_9_packed_weights_are_parameters_by_expert(device, bases, kind):
    """Trap 9: FSDP2 shards uint8 parameters and leaves buffers whole."""
    model = load_model(bases[kind] / "weights/base", kind, device, torch.bfloat16)
    packed = [m for m in model.modules() if isinstance(m, stores.ExpertStore)]
    assert len(packed) == 2 * spec.TINY.layers
    for store in packed:
        assert not list(store.buffers())
        assert all(p.shape[0] == spec.TINY.experts for p in store.parameters())
        assert {p.device.type for p in store.parameters()} == {device.type}


def test_9_the_head_is_used_inside_the_modules_forward(device, bases):
    """Trap 9: the head's weight outside of the root's forward. Were it sharded and gathered by
    hooks around that forward, a hook that gathers would have to be enough."""
    model = load_model(bases["bf16"] / "weights/base", "bf16", device, torch.float32)
    training = PackedLoss(model, 64)
    whole = model.lm_head.weight
    model.lm_head.weight = nn.Parameter(torch.empty(0), requires_grad=False)

    def gather(*_):
        model.lm_head.weight = whole

    def scatter(*_):
        model.lm_head.weight = nn.Parameter(torch.empty(0), requires_grad=False)

    training.register_forward_pre_hook(gather)
    training.register_forward_hook(scatter)
    lora.add_adapters(model, AdaptersSection(targets=("shared",), rank=2), spec.TINY)
    training(collate([documents([30, 9])]).to(device)).backward()
    assert all(p.grad is not None for p in lora.trainable(model).values())


@pytest.mark.parametrize("kind", KINDS)
def test_10_memory_that_nobody_wrote_is_never_read(kind, device):
    """Trap 10: rows past a grouped product's last offset, and slices without rows, are memory as it
    was. Here all fresh memory is filled with NaN."""
    torch.manual_seed(0)
    module = Module(kind, 9, experts=3).to(device)
    inputs = module.inputs(13, 2, [0, 4, 5])
    wanted = results(module, inputs)
    torch.use_deterministic_algorithms(True)
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(3, device=device).isnan().all()
        found = results(module, inputs)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = before
        torch.use_deterministic_algorithms(False)
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_11_and_12_training_imports_nothing_that_a_cpu_lacks():
    """Traps 11 and 12: packages that need Triton, and image extras that need torchvision."""
    code = (
        "import sys\n"
        "for name in ('triton', 'torchvision', 'liger_kernel', 'cut_cross_entropy'):\n"
        "    sys.modules[name] = None\n"  # whoever imports it fails
        "import ms4.train.loop, ms4.evaluate.compare\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
