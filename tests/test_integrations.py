"""An accelerated diffusers model in the company of diffusers, peft, accelerate and torch.distributed."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import sla_compile
from sla_compile import SLAConfig

pytest.importorskip("diffusers")
from diffusers import WanTransformer3DModel

CONFIG = SLAConfig(sparsity=0.8, min_seq_len=64)


def build(seed=0, **options):
    torch.manual_seed(seed)
    sizes = dict(num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16)
    return WanTransformer3DModel(**sizes, freq_dim=32, ffn_dim=32, num_layers=2, **options).eval()


def make_inputs(frames=3):
    generator = torch.Generator().manual_seed(frames)
    return dict(
        hidden_states=torch.randn(1, 4, frames, 16, 18, generator=generator),
        timestep=torch.tensor([5]),
        encoder_hidden_states=torch.randn(1, 72 * frames, 16, generator=generator),
        return_dict=False,
    )


def accelerated(trained=True, **options):
    model = sla_compile.accelerate(build(**options), config=CONFIG)
    if trained:
        for parameter in sla_compile.parameters(model):
            nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(1))
    return model


def run(model):
    with torch.no_grad():
        return model(**make_inputs())[0]


@pytest.fixture(scope="module")
def expected():
    return run(accelerated())


@pytest.fixture
def one_rank(tmp_path):
    torch.distributed.init_process_group(
        "gloo", rank=0, world_size=1, store=torch.distributed.FileStore(str(tmp_path / "s"), 1)
    )
    yield
    torch.distributed.destroy_process_group()


def test_save_pretrained_and_from_pretrained(tmp_path, expected):
    model = accelerated()
    model.save_pretrained(tmp_path)
    sla_compile.save(model, tmp_path / "sla.safetensors")
    again = WanTransformer3DModel.from_pretrained(tmp_path)
    sla_compile.load(again, tmp_path / "sla.safetensors")
    assert torch.equal(run(again), expected)
    assert (again.config["_class_name"], again.config["num_layers"]) == ("WanTransformer3DModel", 2)


def test_fused_projections_before_and_after(expected):
    for fuse_first in (True, False):
        model = build() if fuse_first else accelerated()
        model.fuse_qkv_projections()
        if fuse_first:
            sla_compile.accelerate(model, config=CONFIG)
            copy_parameters(accelerated(), model)
        torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-5)


def copy_parameters(source, target):
    for one, other in zip(sla_compile.parameters(source), sla_compile.parameters(target), strict=True):
        other.data.copy_(one)


def test_attention_is_pinned_to_the_native_backend(expected):
    from diffusers import attention_backend

    model = build()
    processor = model.blocks[0].attn1.processor
    model.blocks[0].attn1.set_attention_backend("_native_math")
    sla_compile.accelerate(model, config=CONFIG)
    copy_parameters(accelerated(), model)
    with attention_backend("_native_math"):  # for the whole process; an owner must not follow it
        torch.testing.assert_close(run(model), expected, rtol=1e-5, atol=1e-6)
    assert len(sla_compile.report(model).rewritten) == 2
    sla_compile.restore(model)
    assert processor._attention_backend.value == "_native_math"
    assert model.blocks[1].attn1.processor._attention_backend is None


def test_layerwise_casting_leaves_the_projection_alone():
    model = accelerated()
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert {p.dtype for p in sla_compile.parameters(model)} == {torch.float32}
    assert torch.isfinite(run(model)).all() and len(sla_compile.report(model).rewritten) == 2


@pytest.mark.parametrize("when", ["before", "after"])
def test_cpu_offload_hooks(when, expected):
    accelerate = pytest.importorskip("accelerate")
    model = build() if when == "before" else accelerated()
    accelerate.cpu_offload(model, torch.device("cpu"))
    if when == "before":
        sla_compile.accelerate(model, config=CONFIG)
        copy_parameters(accelerated(), model)
    torch.testing.assert_close(run(model), expected, rtol=1e-5, atol=1e-6)
    assert len(sla_compile.report(model).rewritten) == 2
    accelerate.hooks.remove_hook_from_submodules(model)
    torch.testing.assert_close(run(model), expected, rtol=1e-5, atol=1e-6)
    assert len(sla_compile.report(model).rewritten) == 2


@pytest.mark.parametrize("when", ["before", "after"])
def test_cache_hooks_on_attentions(when, expected):
    from diffusers import PyramidAttentionBroadcastConfig

    cache = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(0, 9),
        spatial_attention_block_identifiers=("blocks",),
        current_timestep_callback=lambda: 5,
    )
    model = build() if when == "before" else accelerated()
    model.enable_cache(cache)
    if when == "before":
        sla_compile.accelerate(model, config=CONFIG)
        copy_parameters(accelerated(), model)
    assert torch.equal(run(model), expected) and torch.equal(run(model), expected)  # the second time from the cache
    model.disable_cache()
    assert torch.equal(run(model), expected)
    model.enable_cache(cache)
    sla_compile.restore(model)
    assert torch.equal(run(model), run(build()))


@pytest.mark.parametrize("hooks", ["cache", "group offload", "layerwise casting"])
def test_examples_for_a_model_with_hooks(hooks, expected):
    """A copy's hooks would run the original, where no attention can be told from another."""
    from diffusers import FirstBlockCacheConfig

    model = build()
    if hooks == "cache":
        model.enable_cache(FirstBlockCacheConfig())
    elif hooks == "group offload":
        model.enable_group_offload(torch.device("cpu"), num_blocks_per_group=1)
    else:
        model.enable_layerwise_casting(storage_dtype=torch.float64, compute_dtype=torch.float32)
    sla_compile.accelerate(model, config=CONFIG, example_inputs=make_inputs())
    assert [site.name for site in sla_compile.report(model).rewritten] == ["blocks.0.attn1", "blocks.1.attn1"]
    copy_parameters(accelerated(), model)
    with model.cache_context("prompt"):
        assert torch.equal(run(model), expected)


@pytest.mark.parametrize("when", ["before", "after"])
def test_lora(when):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(
        r=2, target_modules="all-linear" if when == "after" else ["to_q", "to_v"], init_lora_weights=False
    )
    torch.manual_seed(3)
    model = build() if when == "before" else accelerated(trained=False)
    model.add_adapter(lora)
    if when == "before":
        sla_compile.accelerate(model, config=CONFIG)
    assert not any("lora" in name for name, _ in model.named_modules() if ".sla." in name)
    with_lora = run(model)
    model.disable_adapters()
    torch.testing.assert_close(run(model), run(accelerated(trained=False)), rtol=1e-5, atol=1e-6)
    model.enable_adapters()
    assert not torch.allclose(with_lora, run(accelerated(trained=False)))
    for parameter in sla_compile.parameters(model):
        parameter.requires_grad_(True)
    model(**make_inputs())[0].square().mean().backward()
    trained = [name for name, p in model.named_parameters() if p.grad is not None]
    assert any("lora" in name for name in trained) and sum(".sla." in name for name in trained) == 4


def test_added_parameters_that_peft_trains_and_saves(tmp_path, expected):
    """It trains a copy of each and keeps the original."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    config = peft.LoraConfig(r=2, target_modules=["to_q"], modules_to_save=["sla"])
    model = peft.get_peft_model(accelerated(), config)
    assert torch.equal(run(model), expected)
    assert all(p.requires_grad for p in sla_compile.parameters(model)) and len(sla_compile.parameters(model)) == 4
    for parameter in sla_compile.parameters(model):
        parameter.data.mul_(2)
    trained = run(model)  # LoRA begins with zeros
    assert not torch.equal(trained, expected)
    sla_compile.save(model, tmp_path / "sla.safetensors")
    again = peft.get_peft_model(accelerated(trained=False), config)
    for other in (build(), again):
        sla_compile.load(other, tmp_path / "sla.safetensors")
        assert torch.equal(run(other), trained)
    with again.disable_adapter():
        sla_compile.save(again, tmp_path / "originals.safetensors")
    untrained = sla_compile.load(build(), tmp_path / "originals.safetensors")
    assert not any(p.any() for p in sla_compile.parameters(untrained))


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")  # about the model's own output
def test_sharded_parameters_are_saved_and_loaded(one_rank, tmp_path, expected):
    from torch.distributed.fsdp import fully_shard

    trained, other = accelerated(), accelerated(trained=False)
    for model in (trained, other):
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
    sla_compile.save(trained, tmp_path / "sla.safetensors")
    for model in (other, build()):
        assert torch.equal(run(sla_compile.load(model, tmp_path / "sla.safetensors")), expected)
    with pytest.raises(RuntimeError, match="the class of the model was changed after accelerate, to FSDPWan"):
        sla_compile.restore(other)
    assert torch.equal(run(other), expected)


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")  # about the model's own output
def test_fully_shard_afterwards(one_rank, expected):
    from torch.distributed.fsdp import fully_shard

    model = accelerated().to(torch.bfloat16).float()
    copy_parameters(accelerated(), model)
    reference = run(copy.deepcopy(model))
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    torch.testing.assert_close(run(model), reference, rtol=1e-5, atol=1e-6)
    model(**make_inputs())[0].square().mean().backward()
    assert all(p.grad is not None for p in sla_compile.parameters(model))
    with pytest.raises(RuntimeError, match="accelerate before fully_shard"):
        other = build()
        fully_shard(other)
        sla_compile.accelerate(other, config=CONFIG)


def test_distributed_data_parallel_needs_no_unused_parameters(one_rank):
    model = nn.parallel.DistributedDataParallel(accelerated().train())
    for _ in range(2):
        model(**make_inputs())[0].square().mean().backward()
    assert all(p.grad is not None for p in sla_compile.parameters(model.module))


def test_gradients_on_two_processes(tmp_path):
    """Data parallel, and fully sharded and compiled, against one process that sees the inputs of both."""
    command = [sys.executable, Path(__file__).with_name("two_processes.py"), tmp_path / "store"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("mode", ["regional", "whole"])
def test_compiled_blocks_use_their_own_parameters(mode, expected):
    """Regional compilation has one artefact for all blocks, and diffusers tests it with a recompile limit of 1."""
    from torch._dynamo.utils import counters

    model = accelerated()
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        if mode == "regional":
            model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
        else:
            model.compile(fullgraph=True, backend="aot_eager")
        assert torch.equal(run(model), expected)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_context_parallelism_is_refused_where_it_would_be_wrong():
    from types import SimpleNamespace

    model = accelerated()
    for block in model.blocks:
        block.attn1.processor._parallel_config = SimpleNamespace(context_parallel_config=SimpleNamespace(ring_degree=2))
    with pytest.raises(NotImplementedError, match="blocks.0.attn1: ring attention"):
        run(model)
    for block in model.blocks:
        block.attn1.processor._parallel_config.context_parallel_config.ring_degree = 1
    with pytest.raises(NotImplementedError, match="would get no gradient"):
        model(**make_inputs())
