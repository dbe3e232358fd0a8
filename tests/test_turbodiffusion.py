"""Checkpoints of TurboDiffusion: their names, here those of a small model, in diffusers' Wan transformer."""

import pytest
import torch
from torch import nn

import sla_compile
from sla_compile import turbodiffusion

diffusers = pytest.importorskip("diffusers")

SPARSITY = 0.6
# What the authors' model calls the weights, from what diffusers' does; the first that fits.
NAMES = {
    "condition_embedder.time_embedder.linear_": ("time_embedding.", {"1": "0", "2": "2"}),
    "condition_embedder.text_embedder.linear_": ("text_embedding.", {"1": "0", "2": "2"}),
}
PARTS = {
    "condition_embedder.time_proj.": "time_projection.1.",
    "scale_shift_table": "modulation",
    "proj_out.": "head.head.",
    ".norm2.": ".norm3.",
    ".ffn.net.0.proj.": ".ffn.0.",
    ".ffn.net.2.": ".ffn.2.",
    ".sla.proj_": ".attn_op.local_attn.proj_l.",
    ".attn1.": ".self_attn.",
    ".attn2.": ".cross_attn.",
    ".to_out.0.": ".o.",
    ".to_q.": ".q.",
    ".to_k.": ".k.",
    ".to_v.": ".v.",
}


def build(layers=2, **options):
    sizes = dict(num_attention_heads=2, attention_head_dim=32, in_channels=4, out_channels=4, text_dim=16)
    return diffusers.WanTransformer3DModel(**sizes, freq_dim=32, ffn_dim=160, num_layers=layers, **options).eval()


def original_name(name):
    if name == "scale_shift_table":
        return "head.modulation"
    for ours, (theirs, numbers) in NAMES.items():
        if name.startswith(ours):
            return theirs + numbers[name[len(ours)]] + name[len(ours) + 1 :]
    for ours, theirs in PARTS.items():
        name = name.replace(ours, theirs)
    return name


def run(model):
    random = torch.Generator().manual_seed(1)
    video, text = torch.randn(1, 4, 3, 16, 18, generator=random), torch.randn(1, 7, 16, generator=random)
    with torch.no_grad():
        dtype = model.proj_out.weight.dtype
        return model(video.to(dtype), torch.tensor([500.0]), text.to(dtype), return_dict=False)[0]


@pytest.fixture(scope="module")
def source():
    """An accelerated model, all weights random."""
    torch.manual_seed(0)
    model = sla_compile.accelerate(build(), SPARSITY, config=turbodiffusion.CONFIG)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture
def published(source):
    """The same weights as the authors keep them: patches are embedded by a linear layer there."""
    tensors = {original_name(name): tensor.clone() for name, tensor in source.state_dict().items()}
    tensors["patch_embedding.weight"] = tensors["patch_embedding.weight"].flatten(1)
    return tensors


def test_the_names_are_the_authors(published):
    expected = "q k v o norm_q norm_k".split()
    parts = {name.split(".")[3] for name in published if name.startswith("blocks.0.self_attn.")}
    assert parts == {*expected, "attn_op"} and "blocks.1.self_attn.attn_op.local_attn.proj_l.bias" in published
    assert {name.partition(".")[0] for name in published} == {
        "patch_embedding", "text_embedding", "time_embedding", "time_projection", "blocks", "head",
    }  # fmt: skip


@pytest.mark.parametrize("form", ["tensors", "pth", "pth of training", "safetensors"])
def test_the_model_computes_what_the_checkpoint_says(form, source, published, tmp_path):
    checkpoint = published
    if form.startswith("pth"):
        checkpoint = tmp_path / "model.pth"
        kept = published
        if form == "pth of training":
            kept = {"state_dict": {f"net.{name}": tensor for name, tensor in published.items()}}
        torch.save(kept, checkpoint)
    elif form == "safetensors":
        checkpoint = tmp_path / "model.safetensors"
        from safetensors.torch import save_file

        save_file(published, checkpoint)
    model = build()
    assert turbodiffusion.load(model, checkpoint, sparsity=SPARSITY) is model
    assert torch.equal(run(model), run(source))
    assert len(sla_compile.report(model).rewritten) == 2
    assert model.blocks[0].attn1.sla.config == turbodiffusion.CONFIG.replace(sparsity=SPARSITY)


def test_the_given_tensors_stay(published):
    before = dict(published)
    turbodiffusion.load(build(), published)
    assert published.keys() == before.keys() and all(published[name] is before[name] for name in before)


def test_a_model_keeps_its_dtype(published):
    model = turbodiffusion.load(build().to(torch.bfloat16), published)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert torch.isfinite(run(model)).all()


def test_a_model_without_memory_takes_the_checkpoints_tensors(published):
    accelerate = pytest.importorskip("accelerate")
    with accelerate.init_empty_weights():
        model = build()
    half = {name: t if "proj_l" in name else t.to(torch.bfloat16) for name, t in published.items()}
    turbodiffusion.load(model, half)
    for name, parameter in model.named_parameters():
        expected = half[original_name(name)].to(torch.bfloat16)  # a projection, too: FSDP wants one dtype of a group
        assert torch.equal(parameter, expected.view(parameter.shape)), name
    assert torch.isfinite(run(model)).all()


def test_quantized_layers(published):
    """Ragged blocks of 128 x 128 share a scale: 160 rows are two of them."""
    expected, quantized = dict(published), dict(published)
    random = torch.Generator().manual_seed(2)
    layers = [name.removesuffix(".weight") for name in published if name.startswith("blocks.") and ".ffn." in name]
    for layer in [layer for layer in layers if not layer.endswith(".bias")]:
        rows, columns = published[f"{layer}.weight"].shape
        weight = torch.randint(-127, 128, (rows, columns), generator=random, dtype=torch.int8)
        scale = torch.rand(-(-rows // 128), -(-columns // 128), generator=random) / 100
        del quantized[f"{layer}.weight"]
        quantized |= {f"{layer}.int8_weight": weight, f"{layer}.scale": scale}
        wide = torch.empty(rows, columns)
        for row in range(rows):
            for column in range(columns):
                wide[row, column] = weight[row, column] * scale[row // 128, column // 128]
        expected[f"{layer}.weight"] = wide.to(torch.bfloat16)
    assert len(quantized) == len(published) + 4
    assert torch.equal(run(turbodiffusion.load(build(), quantized)), run(turbodiffusion.load(build(), expected)))
    del quantized["blocks.0.ffn.2.scale"]
    with pytest.raises(ValueError, match="blocks.0.ffn.2: an int8 weight .* needs scales .*, found none"):
        turbodiffusion.load(build(), quantized)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("head.head.bias"), "1 only in the model ..proj_out.bias"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), "1 weights are only in the file ..extra"),
        (
            lambda tensors: tensors.update({"head.head.bias": torch.zeros(3)}),
            r"proj_out.bias is \(3,\) in the file and \(16,\) in the model",
        ),
        (
            lambda tensors: tensors.pop("blocks.1.self_attn.attn_op.local_attn.proj_l.bias"),
            "only in the model ..blocks.1.attn1.sla.proj_bias",
        ),
    ],
    ids=["one less", "one more", "another shape", "half a projection"],
)
def test_another_models_checkpoint_changes_nothing(change, message, published):
    model = build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    change(published)
    with pytest.raises(ValueError, match=message):
        turbodiffusion.load(model, published)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    with pytest.raises(ValueError, match="not accelerated"):
        sla_compile.report(model)


def test_what_is_no_checkpoint_of_sla(published, tmp_path):
    plain = {name: tensor for name, tensor in published.items() if "proj_l" not in name}
    torch.save(plain, tmp_path / "wan.pth")
    with pytest.raises(ValueError, match="wan.pth is no checkpoint of TurboDiffusion with SLA.*blocks.0"):
        turbodiffusion.load(build(), tmp_path / "wan.pth")


def test_a_linear_branch_of_another_kind_is_refused(published):
    with pytest.raises(ValueError, match='linear attention over all keys.*got method="sla" and linear="marginal"'):
        turbodiffusion.load(build(), published, config=sla_compile.SLAConfig())


def test_a_model_is_accelerated_once(published):
    model = turbodiffusion.load(build(), published)
    with pytest.raises(RuntimeError, match=r"accelerated already, by turbodiffusion.load\(WanTransformer3DModel"):
        turbodiffusion.load(model, published)
