"""accelerate on modules: what is found, what is attached, and that everything a model could do it can still do."""

import copy
import functools
import io
import pickle
import re
import sys
import threading
import typing
from pathlib import Path

import pytest
import torch
from models import SelfAttention, TinyDiT, build, make_inputs
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import sla_compile
from sla_compile import SLAConfig, snapshot
from sla_compile.examine import examine
from sla_compile.testing import assert_rewritten

CONFIG = SLAConfig(sparsity=0.8, min_seq_len=64)
ATTENTIONS = ["blocks.0.attn", "blocks.1.attn"]


def accelerated(seed=0, trained=True, config=CONFIG, **options):
    """An accelerated TinyDiT; `trained` gives its projections values, so that they matter."""
    model = sla_compile.accelerate(build(seed, **options), config=config)
    if trained:
        for parameter in sla_compile.parameters(model):
            nn.init.normal_(parameter, std=0.3)
    return model


def fingerprint(model):
    """Everything about a module tree that accelerate could change: classes, attributes, tensors' bits."""
    return [
        (name, type(module), sorted(module.__dict__), list(module._modules), module.training)
        for name, module in model.named_modules()
    ], {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(model, before):
    after = fingerprint(model)
    assert after[0] == before[0]
    assert after[1].keys() == before[1].keys()
    assert all(torch.equal(after[1][name], tensor) for name, tensor in before[1].items())


def names(report):
    return [site.name for site in report.rewritten]


@pytest.mark.parametrize("examples", [None, make_inputs(), dict(zip(("x", "context"), make_inputs(), strict=True))])
def test_finds_self_attention_and_leaves_cross_attention(examples):
    model = build()
    before = set(model.state_dict())
    assert sla_compile.accelerate(model, config=CONFIG, example_inputs=examples) is model
    report = sla_compile.report(model)
    assert names(report) == ATTENTIONS
    assert [site.name for site in report.dense] == ["blocks.0.text", "blocks.1.text"]
    assert all("cross-attention" in site.reason for site in report.dense)
    added = set(model.state_dict()) - before
    assert added == {f"{name}.sla.proj_{kind}" for name in ATTENTIONS for kind in ("weight", "bias")}
    assert type(model).__name__ == "TinyDiT" and isinstance(model, TinyDiT)
    assert isinstance(model.blocks[0].attn, SelfAttention)


def test_output_is_the_functional_form():
    attention = sla_compile.accelerate(SelfAttention().eval(), config=CONFIG)
    weight, bias = sla_compile.parameters(attention)
    nn.init.normal_(weight)
    nn.init.normal_(bias)
    x, _ = make_inputs()
    query, key, value = attention.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
    expected = sla_compile.sparse_linear_attention(query, key, value, config=CONFIG, proj_weight=weight, proj_bias=bias)
    torch.testing.assert_close(attention(x), attention.proj(expected.transpose(1, 2).flatten(2)), rtol=0, atol=0)


def test_short_sequences_stay_exactly_dense():
    model, inputs = build(), make_inputs(60)
    expected = model(*inputs)
    sla_compile.accelerate(model, config=CONFIG)
    assert torch.equal(model(*inputs), expected)
    report = sla_compile.report(model)
    assert not report.rewritten and "min_seq_len=64" in report.rows[0].reason


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype:UserWarning")
def test_an_empty_batch_and_packed_sequences_stay_dense():
    class Separate(SelfAttention):
        def forward(self, x):  # nested tensors allow neither permute nor a packed projection
            query, key, value = (self.proj(x).unflatten(-1, (2, -1)).transpose(1, 2) for _ in range(3))
            return F.scaled_dot_product_attention(query, key, value)

    attention = Separate().eval()
    packed = torch.nested.nested_tensor([torch.randn(200, 32), torch.randn(150, 32)], layout=torch.jagged)
    expected = attention(packed).values()
    sla_compile.accelerate(attention, config=CONFIG)
    assert torch.equal(attention(packed).values(), expected)
    assert "nested tensors" in sla_compile.report(attention).rows[0].reason
    assert attention(torch.randn(0, 200, 32)).shape == (0, 2, 200, 16)
    assert "empty" in sla_compile.report(attention).rows[0].reason


def test_all_critical_equals_dense():
    inputs = make_inputs()
    expected = build()(*inputs)
    model = sla_compile.accelerate(build(), config=CONFIG.replace(critical_blocks=1000))
    torch.testing.assert_close(model(*inputs), expected, rtol=1e-5, atol=1e-5)


def test_report_shows_shapes_after_a_run():
    model = accelerated()
    assert sla_compile.report(model).rows[0].shape == ""
    model(*make_inputs())
    row = sla_compile.report(model).rows[0]
    assert (row.shape, row.keys, row.head_dim) == ("(1, 2, 200, 16)", "200", 16)
    assert (
        "blocks.0.attn" in str(sla_compile.report(model)) and '"blocks.0.attn"' in sla_compile.report(model).to_json()
    )


class Both(SelfAttention):
    """Attends to its own tokens and to others."""

    def forward(self, x, context):
        query, key, value = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        other = self.proj(context).unflatten(-1, (2, -1)).transpose(1, 2)
        own = F.scaled_dot_product_attention(query, key, value)
        return (own + F.scaled_dot_product_attention(query, other, other)).transpose(1, 2).flatten(2)


def test_the_calls_of_one_owner_are_told_apart():
    """One of them stays dense, and nothing hides that."""
    inputs = torch.randn(1, 200, 32), torch.randn(1, 20, 32)
    model = sla_compile.accelerate(Both().eval(), config=CONFIG, example_inputs=inputs)
    for _ in range(2):  # as accelerate found them, and as they were called
        (row,) = sla_compile.report(model)
        assert row.rewritten and (row.shape, row.keys, row.calls) == ("(1, 2, 200, 16)", "200", 2)
        assert row.reason == "1 of 2 calls stays dense: cross-attention: as many keys as queries are needed"
        model(*inputs)
    shown = examine(model, example_inputs=inputs)
    assert shown.report.rows[0].reason == row.reason and f'"why": "{row.reason}"' in snapshot.render(shown)
    assert shown.report.rows[0].calls == 2


def test_an_owner_whose_cross_attention_looks_like_its_own_stays_dense():
    model, inputs = Both().eval(), make_inputs()  # context as long as x
    expected = model(*inputs)
    sla_compile.accelerate(model, config=CONFIG, example_inputs=inputs, allow_no_match=True)
    assert "nothing tells them apart later" in sla_compile.report(model).rows[0].reason
    assert torch.equal(model(*inputs), expected)


def test_a_second_sequence_that_the_examples_left_out_stays_dense():
    class Optional(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = build().blocks[0].text

        def forward(self, x, context=None):
            return self.layer(x, context) + (0 if context is None else self.layer(x))

    model, (x, context) = Optional().eval(), make_inputs()
    expected = model.layer(x, context)
    for examples in ((x,), (x, context)):
        sla_compile.accelerate(model, config=CONFIG, example_inputs=examples)
        assert names(sla_compile.report(model)) == ["layer"]
        assert torch.equal(model.layer(x, context), expected)
        assert not torch.equal(model.layer(x), build().blocks[0].text(x))
        sla_compile.restore(model)


def test_report_of_replaced_and_removed_modules():
    model = accelerated()
    model.blocks[0].attn = SelfAttention()
    del model.blocks[1]
    assert [row.reason for row in sla_compile.report(model)][::2] == [
        "its redirect is gone: the module was replaced or its class changed after accelerate"
    ] * 2


def test_masks():
    attention, (x, _) = SelfAttention().eval(), make_inputs(batch=2)
    padding = torch.ones(2, 1, 1, 200, dtype=torch.bool)
    padding[1, ..., 150:] = False
    square = torch.ones(200, 200, dtype=torch.bool).tril()
    expected = attention(x, padding), attention(x, square)
    sla_compile.accelerate(attention, config=CONFIG.replace(critical_blocks=100))
    torch.testing.assert_close(attention(x, padding), expected[0], rtol=1e-5, atol=1e-5)
    assert sla_compile.report(attention).rewritten
    assert torch.equal(attention(x, square), expected[1])
    assert "key-padding" in sla_compile.report(attention).rows[0].reason


WRITTEN_OUT = SLAConfig(critical_blocks=100, min_seq_len=64, padding_masks=True)


def padding(batch=2, length=200):
    """Key-padding masks (batch, 1, 1, length), the second of 150 tokens."""
    return torch.arange(length) < torch.tensor([length, 150])[:batch, None, None, None]


@pytest.mark.parametrize("way", ["eager", "compiled", "exported"])
@pytest.mark.parametrize("kind", ["bool", "bool for heads", "float", "float for queries"])
def test_padding_masks_written_out_for_queries(kind, way):
    attention, (x, _) = SelfAttention().eval(), make_inputs(batch=2)
    keys, mask = padding(), padding() & padding().mT  # padded queries see nothing, as models write it
    if kind == "bool for heads":
        mask = mask.repeat(1, 2, 1, 1)
    elif kind == "float":
        mask = torch.zeros(()).masked_fill(~keys, -torch.inf).repeat(1, 1, 200, 1)
    elif kind == "float for queries":
        mask = torch.zeros(()).masked_fill(~mask, -torch.inf)
    expected = attention(x, mask)
    plain = sla_compile.accelerate(copy.deepcopy(attention), config=WRITTEN_OUT)
    plain(x, mask)
    sla_compile.accelerate(attention, config=WRITTEN_OUT.replace(padding_masks=False))
    assert torch.equal(attention(x, mask), expected)
    assert "choose padding_masks=True" in sla_compile.report(attention).rows[0].reason
    run = {
        "eager": lambda: plain,
        "compiled": lambda: torch.compile(plain, fullgraph=True, backend="aot_eager"),
        "exported": lambda: torch.export.export(plain, (x, mask)).module(),
    }[way]()
    torch.testing.assert_close(run(x, mask), expected, rtol=1e-5, atol=1e-5)
    assert sla_compile.report(plain).rewritten
    torch.testing.assert_close(run(x, mask)[0], plain(x, keys)[0])
    lower = torch.ones(200, 200, dtype=torch.bool).tril()
    different = mask & lower if mask.dtype == torch.bool else mask.masked_fill(~lower, 1)
    with pytest.raises(RuntimeError, match="hides other keys from other queries"):
        run(x, different)


def test_compiled_blocks_with_padding_masks_share_a_graph():
    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(SelfAttention() for _ in range(3))

        def forward(self, x, mask):
            for block in self.blocks:
                x = block(x, mask)
            return x

    model, (x, _) = sla_compile.accelerate(Stack().eval(), config=WRITTEN_OUT), make_inputs(batch=2)
    expected = model(x, padding() & padding().mT)
    graphs = CompileCounter()
    for block in model.blocks:
        block.compile(backend=graphs, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(model(x, padding() & padding().mT), expected)
    assert graphs.frame_count == 1


def test_masks_that_cannot_be_padding_stay_dense():
    attention, (x, _) = SelfAttention().eval(), make_inputs(batch=2)
    mask = torch.ones(200, 200, dtype=torch.uint8)
    config = WRITTEN_OUT
    plain = sla_compile.accelerate(attention, config=config)
    with pytest.raises(RuntimeError, match="attn_mask dtype"):  # of dense attention's
        plain(x, mask)
    assert sla_compile.report(plain).rows[0].reason == "attention mask is not a key-padding mask (batch, 1, 1, tokens)"


def test_include_exclude_and_per_site():
    other = CONFIG.replace(sparsity=0.5)
    cases = [
        (dict(include="blocks.0.*"), ["blocks.0.attn"]),
        (dict(include=["*.attn"]), ATTENTIONS),
        (dict(include=lambda name, module: isinstance(module, SelfAttention) and "1" in name), ["blocks.1.attn"]),
        (dict(exclude="blocks.0.*"), ["blocks.1.attn"]),
        (dict(per_site={"blocks.0.attn": other}), ATTENTIONS),
        (dict(per_site={"blocks.0.attn": None}), ["blocks.1.attn"]),
    ]
    for arguments, expected in cases:
        model = sla_compile.accelerate(build(), config=CONFIG, **arguments)
        assert names(sla_compile.report(model)) == expected, arguments
        assert len(sla_compile.parameters(model)) == 2 * len(expected)
    model = sla_compile.accelerate(build(), config=CONFIG, per_site={"blocks.0.attn": other})
    assert [model.blocks[i].attn.sla.config for i in (0, 1)] == [other, CONFIG]


def test_linear_none_adds_nothing():
    model = build()
    before = set(model.state_dict())
    sla_compile.accelerate(model, config=CONFIG.replace(linear="none"))
    assert set(model.state_dict()) == before and sla_compile.parameters(model) == []
    assert not torch.equal(model(*make_inputs()), build()(*make_inputs()))


def test_restore_gives_back_exactly_what_came():
    model, inputs = build(), make_inputs()
    before, expected = fingerprint(model), model(*inputs)
    sla_compile.accelerate(model, config=CONFIG)
    assert not torch.equal(model(*inputs), expected)
    assert sla_compile.restore(model) is model
    assert_unchanged(model, before)
    assert torch.equal(model(*inputs), expected)
    sla_compile.accelerate(model, config=CONFIG)  # and again


def test_dense_context_is_exact_and_ends():
    inputs = make_inputs()
    expected, model = build()(*inputs), accelerated()
    sparse = model(*inputs)
    with pytest.raises(KeyError), sla_compile.dense(model):
        assert torch.equal(model(*inputs), expected)
        raise KeyError
    assert torch.equal(model(*inputs), sparse)


def test_copies_and_pickles_stay_accelerated():
    model, inputs = accelerated(), make_inputs()
    expected = model(*inputs)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (
        copy.deepcopy(model),
        copy.copy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ):
        assert type(other) is type(model) and torch.equal(other(*inputs), expected)
        assert names(sla_compile.report(other)) == ATTENTIONS
    other = copy.deepcopy(model)
    sla_compile.restore(other)
    assert torch.equal(model(*inputs), expected) and sla_compile.parameters(other) == []


def test_state_dict_round_trip_and_strictness():
    model, inputs = accelerated(), make_inputs()
    other = sla_compile.accelerate(build(seed=1), config=CONFIG)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(*inputs), model(*inputs))
    with pytest.raises(RuntimeError, match="sla.proj_weight"):
        build().load_state_dict(model.state_dict())


def test_dtype_and_freezing_follow_the_owner():
    model = sla_compile.accelerate(build().to(torch.bfloat16), config=CONFIG)
    assert {p.dtype for p in sla_compile.parameters(model)} == {torch.bfloat16}
    assert model(*(t.bfloat16() for t in make_inputs())).dtype == torch.bfloat16
    assert {p.dtype for p in sla_compile.parameters(model.to(torch.float32))} == {torch.float32}
    frozen = sla_compile.accelerate(build().requires_grad_(False), config=CONFIG)
    assert not frozen(*make_inputs()).requires_grad
    for parameter in sla_compile.parameters(frozen):
        parameter.requires_grad_(True)
    frozen(*make_inputs()).sum().backward()
    assert all(p.grad is not None for p in sla_compile.parameters(frozen))


def test_meta_model_is_filled_by_loading_or_to_empty():
    expected, inputs = accelerated(), make_inputs()
    with torch.device("meta"):
        model = sla_compile.accelerate(TinyDiT().eval(), config=CONFIG)
        again = sla_compile.accelerate(TinyDiT().eval(), config=CONFIG, example_inputs=make_inputs())
    assert names(sla_compile.report(again)) == ATTENTIONS
    assert all(p.is_meta for p in model.parameters())
    model.load_state_dict(expected.state_dict(), assign=True)
    assert torch.equal(model(*inputs), expected(*inputs))
    again.to_empty(device="cpu").load_state_dict(expected.state_dict())
    assert torch.equal(again(*inputs), expected(*inputs))


def test_a_model_that_cannot_be_copied_runs_itself():
    for device in ("cpu", "meta"):
        model = build().to(device)
        model.lock = threading.Lock()
        examples = tuple(tensor.to(device) for tensor in make_inputs())
        if device == "cpu":
            sla_compile.accelerate(model, config=CONFIG, example_inputs=examples)
            assert names(sla_compile.report(model)) == ATTENTIONS
        else:
            with pytest.raises(ValueError, match="(?s)no values to run.*cannot pickle.*without example_inputs"):
                sla_compile.accelerate(model, config=CONFIG, example_inputs=examples)


def test_parameters_are_made_where_quantized_weights_are():
    model = build()
    for block in model.blocks:
        block.attn.to("meta", torch.float8_e4m3fn)
    assert all(p.is_meta for p in sla_compile.parameters(sla_compile.accelerate(model, config=CONFIG)))


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_attentions_whose_weights_are_packed_are_owners():
    model = torch.ao.quantization.quantize_dynamic(build(), {nn.Linear})
    assert not list(model.blocks[0].attn.parameters())
    sla_compile.accelerate(model, config=CONFIG, example_inputs=make_inputs())
    model(*make_inputs())
    assert [site.name for site in sla_compile.report(model).rewritten] == ["blocks.0.attn", "blocks.1.attn"]


def test_training_reaches_every_parameter():
    model = accelerated(trained=False).train()
    optimizer = torch.optim.SGD(sla_compile.parameters(model), lr=1.0)
    target = build()(*make_inputs()).detach()
    losses = []
    for _ in range(8):
        loss = F.mse_loss(model(*make_inputs()), target)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad.abs().sum() > 0 for p in sla_compile.parameters(model))
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_checkpointing_gives_the_same_gradients():
    plain, checkpointed = accelerated(), accelerated(checkpointing=True)
    checkpointed.load_state_dict(plain.state_dict())
    for model in (plain, checkpointed):
        model.train()(*make_inputs()).square().sum().backward()
    for one, other in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_inside_an_owner_stays_dense_in_training(reentrant):
    """Its backward runs without the redirect: the gradients would be those of dense attention, or an error."""

    class Checkpointed(SelfAttention):
        def forward(self, x, mask=None):
            return checkpoint(super().forward, x, mask, use_reentrant=reentrant)

    attention, x = Checkpointed(), make_inputs()[0].requires_grad_()
    expected = torch.autograd.grad(SelfAttention.forward(attention, x).square().sum(), x)
    sla_compile.accelerate(attention, config=CONFIG)
    with pytest.warns(UserWarning, match="checkpoint inside its own forward"):
        attention(x).square().sum().backward()
    torch.testing.assert_close(x.grad, *expected)
    assert "checkpoint or autograd.Function" in sla_compile.report(attention).rows[0].reason
    with torch.no_grad():
        attention(x)
    assert sla_compile.report(attention).rewritten


def test_hooks_fire_once_a_call():
    model, seen = build(), []
    model.blocks[0].attn.register_forward_hook(lambda *_: seen.append("before"))
    sla_compile.accelerate(model, config=CONFIG)
    model.blocks[0].attn.register_forward_pre_hook(lambda *_: seen.append("after"))
    model(*make_inputs())
    assert seen == ["after", "before"]


def hook_forward(module, *args, **kwargs):
    return module._old_forward(*args, **kwargs)


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_instance_forward_that_keeps_the_class_one(when):
    """accelerate's hooks: a partial in the instance's dict over the bound original."""
    expected = accelerated(trained=False)(*make_inputs())
    model = build()
    if when == "after":
        sla_compile.accelerate(model, config=CONFIG)
    attention = model.blocks[0].attn
    attention._old_forward = attention.forward
    attention.forward = functools.update_wrapper(functools.partial(hook_forward, attention), attention._old_forward)
    if when == "before":
        sla_compile.accelerate(model, config=CONFIG)
    assert torch.equal(model(*make_inputs()), expected)
    attention.forward = attention._old_forward  # the hook is removed
    assert torch.equal(model(*make_inputs()), expected)


def test_an_instance_forward_that_hides_the_class_one():
    expected, dense = accelerated(trained=False)(*make_inputs()), build()(*make_inputs())
    model = build()
    attention = model.blocks[0].attn
    original = attention.forward
    attention.forward = lambda *args, **kwargs: original(*args, **kwargs)
    before = fingerprint(model)
    sla_compile.accelerate(model, config=CONFIG)
    assert torch.equal(model(*make_inputs()), expected)
    sla_compile.restore(model)
    assert_unchanged(model, before)
    assert torch.equal(model(*make_inputs()), dense)


@pytest.mark.parametrize("patched", [TinyDiT, SelfAttention])
def test_a_class_whose_forward_is_replaced(patched, monkeypatch):
    model, (x, context), forward = accelerated(), make_inputs(), patched.forward
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        expected = model(x, context), compiled(x, context)
        monkeypatch.setattr(patched, "forward", lambda self, x, *rest: forward(self, x, *rest) * 2)
        for run, before in zip((model, compiled), expected, strict=True):
            assert not torch.allclose(run(x, context), before, rtol=0.1, atol=0.1)
        assert len(sla_compile.report(model).rewritten) == 2


@pytest.mark.parametrize("examples", [None, make_inputs()])
def test_a_wrapper_around_the_function(examples, monkeypatch):
    """Some libraries put one into torch.nn.functional."""
    expected, plain, function = accelerated(trained=False), build(), F.scaled_dot_product_attention
    expected, dense = expected(*make_inputs()), plain(*make_inputs())
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args, **kwargs: function(*args, **kwargs))
    model = sla_compile.accelerate(plain, config=CONFIG, example_inputs=examples)
    assert torch.equal(model(*make_inputs()), expected)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(*make_inputs()), expected)
    with sla_compile.dense(model):
        assert torch.equal(model(*make_inputs()), dense)


def test_a_forward_kept_by_somebody_outlives_restore_and_a_new_instance_is_plain():
    model, (x, _) = accelerated(), make_inputs()
    attention = model.blocks[0].attn
    kept, new = attention.forward, type(attention)()
    new.load_state_dict(build().blocks[0].attn.state_dict())
    sla_compile.restore(model)
    assert torch.equal(kept(x), attention(x)) and torch.equal(new(x), attention(x))


def test_a_second_sequence_stays_dense_even_of_equal_length():
    model = Undeclared().eval()
    x, context = make_inputs()
    expected = model(x=x, context=context), model(x=x, context=None)
    sla_compile.accelerate(model, config=CONFIG, include="layer")
    assert torch.equal(model(x=x, context=context), expected[0])
    assert "second sequence" in sla_compile.report(model).rows[0].reason
    assert not torch.equal(model(x=x, context=None), expected[1])
    assert sla_compile.report(model).rewritten


def test_attention_in_the_root_with_other_owners_below():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = build().blocks[0].text
            self.num_heads = 2
            self.qkv = nn.Linear(32, 96)

        def forward(self, x, context):
            x = x + self.block(x, context)
            query, key, value = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
            return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)

    torch.manual_seed(0)
    model = Root().eval()
    inputs = make_inputs()
    with torch.no_grad():
        block = model.block(*inputs)
    sla_compile.accelerate(model, config=CONFIG, example_inputs=inputs)
    assert names(sla_compile.report(model)) == [""]
    noted = []
    handle = model.block.register_forward_hook(lambda module, args, output: noted.append(output))
    output = model(*inputs)
    handle.remove()
    assert torch.equal(noted[0], block), "the cross-attention below must not be caught by the root's redirect"
    with torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(*inputs)
    torch.testing.assert_close(compiled, output.detach(), rtol=0, atol=0)


@pytest.mark.parametrize("padding", [None, "bool", "float"])
def test_multi_head_attention_module(padding):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(32, 2, batch_first=True)

        def forward(self, x, mask=None):
            return self.attention(x, x, x, key_padding_mask=mask, need_weights=False)[0]

    torch.manual_seed(0)
    model, (x, _) = Model().eval(), make_inputs(batch=2)
    mask = None
    if padding is not None:
        mask = torch.zeros(2, 200, dtype=torch.bool)
        mask[1, 150:] = True
        mask = mask if padding == "bool" else torch.zeros(2, 200).masked_fill(mask, -torch.inf)
    with torch.no_grad():
        expected = model(x, mask)
        sla_compile.accelerate(model, config=CONFIG.replace(critical_blocks=100), example_inputs=(x, mask))
        torch.testing.assert_close(model(x, mask), expected, rtol=1e-5, atol=1e-5)
        sla_compile.restore(model)
        sla_compile.accelerate(model, config=CONFIG)
        sparse = model(x, mask)
        assert not torch.allclose(sparse, expected, rtol=1e-3, atol=1e-3)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(x, mask)
        torch.testing.assert_close(compiled, sparse, rtol=0, atol=0)


@pytest.mark.parametrize("examples", [False, True])
def test_an_encoder_of_torch_that_may_bypass_its_attention(examples):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2).eval(), make_inputs()[0]
    arguments = dict(config=CONFIG, example_inputs=(x,) if examples else None)
    with pytest.raises(ValueError, match="may bypass its attention by a fused path; call torch.backends.mha.set_fast"):
        sla_compile.accelerate(model, **arguments)
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            expected = model(x)
            sla_compile.accelerate(model, **arguments)
            assert not torch.allclose(model(x), expected, rtol=1e-3, atol=1e-3)
        assert names(sla_compile.report(model)) == ["layers.0.self_attn", "layers.1.self_attn"]
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def test_a_head_dimension_that_is_declared_wrongly_is_named():
    def make():
        model = nn.Sequential(SelfAttention())
        model[0].head_dim = 8
        return model

    x, model = make_inputs()[0], sla_compile.accelerate(make(), config=CONFIG)
    with pytest.raises(ValueError, match="0: its parameters are for head dimension 8, .* 16; pass example_inputs"):
        model(x)
    assert sla_compile.accelerate(make(), config=CONFIG, example_inputs=(x,))(x).shape == x.shape
    sla_compile.accelerate(make(), config=CONFIG.replace(linear="none"))(x)  # needs none


def test_an_owner_that_computes_otherwise_is_named():
    class Cached(SelfAttention):
        def forward(self, x, mask=None):
            return x

    model = sla_compile.accelerate(nn.ModuleDict({"first": Cached()}), config=CONFIG)
    with pytest.warns(UserWarning, match="first ran without calling scaled_dot_product_attention"):
        model["first"](make_inputs()[0])
    with pytest.warns(UserWarning, match="first ran without calling"):
        torch.compile(model["first"], backend="eager", fullgraph=True)(make_inputs()[0])


def test_save_and_load(tmp_path):
    model, inputs = accelerated(), make_inputs()
    path = tmp_path / "sla.safetensors"
    sla_compile.save(model, path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    for other in (build(), sla_compile.accelerate(build(), config=CONFIG)):
        assert sla_compile.load(other, path) is other
        assert torch.equal(other(*inputs), model(*inputs))
    with torch.device("meta"):
        other = sla_compile.accelerate(TinyDiT(), config=CONFIG)
    sla_compile.load(other, path)
    assert not any(p.is_meta for p in sla_compile.parameters(other))


@pytest.mark.parametrize("wrap", [lambda model: torch.compile(model, backend="eager"), nn.DataParallel])
def test_wrappers_are_looked_through(wrap, tmp_path):
    model, inputs, path = accelerated(), make_inputs(), tmp_path / "sla.safetensors"
    wrapped = wrap(model)
    sla_compile.save(wrapped, path)
    assert torch.equal(sla_compile.load(build(), path)(*inputs), model(*inputs))
    assert sla_compile.load(wrap(sla_compile.accelerate(build(), config=CONFIG)), path) is not model
    assert names(sla_compile.report(wrapped)) == ATTENTIONS
    with sla_compile.dense(wrapped):
        assert torch.equal(model(*inputs), build()(*inputs))
    with pytest.raises(ValueError, match="but the TinyDiT inside of it was: pass that"):
        sla_compile.restore(wrapped)


def written_out(query, key, value):
    return (query @ key.mT).softmax(-1) @ value


FUNCTIONS = {"sdpa": F.scaled_dot_product_attention}


class FromATable(SelfAttention):
    def forward(self, x):
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        attended = FUNCTIONS.get("sdpa", written_out)(query, key, value)
        return self.proj(attended.transpose(1, 2).flatten(2))


def test_attention_from_a_table_takes_example_inputs():
    model = nn.Sequential(FromATable())
    with pytest.raises(ValueError, match="FromATable does not call .* by name but softmax; .* pass example_inputs"):
        sla_compile.accelerate(model, config=CONFIG)
    sla_compile.accelerate(model, config=CONFIG, example_inputs=(torch.randn(1, 200, 32),))
    assert names(sla_compile.report(model)) == ["0"]


def flash_attn_func(query, key, value):
    query = query * query.shape[-1] ** -0.5
    return written_out(*(x.transpose(1, 2) for x in (query, key, value))).transpose(1, 2)


class CallsALibrary(SelfAttention):
    def forward(self, x):
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        return self.proj(flash_attn_func(query, key, value).flatten(2))


def test_attention_of_a_library_stays_dense_and_says_so():
    model = sla_compile.accelerate(nn.Sequential(CallsALibrary(), SelfAttention()), config=CONFIG)
    report = sla_compile.report(model)
    assert names(report) == ["1"]
    assert "by name but flash_attn_func" in report.rows[0].reason


def test_attention_of_a_library_replaced_as_the_documents_say(monkeypatch):
    page = (Path(__file__).parent.parent / "docs/how_it_works.md").read_text()
    (code,) = re.findall(r"(?ms)^```python\n(.*?)^```$", page)
    dense = nn.Sequential(CallsALibrary())
    x = torch.randn(1, 200, 32)
    expected = dense(x)
    monkeypatch.setattr(sys.modules[__name__], "flash_attn_func", flash_attn_func)
    exec(code, {"file_of_the_model": sys.modules[__name__]})
    torch.testing.assert_close(dense(x), expected, rtol=1e-5, atol=1e-5)  # other sums of 200 float32 probabilities
    assert names(sla_compile.report(sla_compile.accelerate(dense, config=CONFIG))) == ["0"]


@pytest.mark.parametrize("part", ["", "attn"])
@pytest.mark.parametrize("wrap", [lambda module: torch.compile(module, backend="eager"), checkpoint_wrapper])
def test_blocks_wrapped_one_by_one_keep_their_names(wrap, part, tmp_path):
    model, inputs, path = accelerated(), make_inputs(), tmp_path / "sla.safetensors"
    expected = model(*inputs)

    def wrap_blocks(model):
        for i, block in enumerate(model.blocks):
            if part:
                block.attn = wrap(block.attn)
            else:
                model.blocks[i] = wrap(block)
        return model

    assert torch.equal(wrap_blocks(model)(*inputs), expected)
    assert names(sla_compile.report(model)) == ATTENTIONS
    assert assert_rewritten(model, inputs).rewritten
    sla_compile.save(model, path)
    assert torch.equal(sla_compile.load(build(), path)(*inputs), expected)
    assert torch.equal(sla_compile.load(wrap_blocks(accelerated(trained=False)), path)(*inputs), expected)
    if wrap is checkpoint_wrapper:  # accelerate comes before torch.compile
        assert torch.equal(sla_compile.load(wrap_blocks(build()), path)(*inputs), expected)


def test_load_refuses_what_does_not_belong(tmp_path):
    path = tmp_path / "sla.safetensors"
    sla_compile.save(accelerated(), path)
    junk = tmp_path / "junk.safetensors"
    junk.write_bytes(b"no")
    cases = [
        (build(depth=1), path, "the model has no blocks.1.attn"),
        (build(dim=64), path, "needs proj_weight \\(32, 32\\), found \\(16, 16\\)"),
        (sla_compile.accelerate(build(), config=CONFIG.replace(sparsity=0.9)), path, "but the file"),
        (sla_compile.accelerate(build(depth=3), config=CONFIG), path, "only in the model"),
        (build(), junk, "not a safetensors file"),
    ]
    for model, file, message in cases:
        before = fingerprint(model)
        with pytest.raises(ValueError, match=message):
            sla_compile.load(model, file)
        assert_unchanged(model, before)
    with pytest.raises(FileNotFoundError):
        sla_compile.load(build(), tmp_path / "absent")


class Undeclared(nn.Module):
    """Takes a second sequence and nobody tells whether it is given."""

    def __init__(self):
        super().__init__()
        self.layer = build().blocks[0].text

    def forward(self, **kwargs):
        return next(self.children())(kwargs["x"], kwargs["context"])  # hidden from a reader of the source


BAD = {
    "no attention": (lambda: nn.Sequential(nn.Linear(4, 4)), {}, ValueError, "none was found by structure"),
    "all short": (build, dict(config=SLAConfig(), example_inputs=make_inputs()), ValueError, "min_seq_len=4096"),
    "include": (build, dict(include="transformer.*"), ValueError, "matches no attention; found: blocks.0.attn"),
    "exclude": (build, dict(exclude=["*.attn", "x"]), ValueError, "exclude pattern 'x' matches no attention"),
    "per_site": (build, dict(per_site={"nope": None}), ValueError, "per_site pattern 'nope'"),
    "per_site value": (build, dict(per_site={"*": 0.9}), TypeError, "SLAConfig or None"),
    "config": (build, dict(config=0.95), TypeError, "must be an SLAConfig"),
    "sparsity": (build, dict(sparsity=1.5), ValueError, "sparsity must be in"),
    "undecided": (Undeclared, {}, ValueError, "layer: its forward takes context"),
    "model type": (lambda: F.softmax, {}, TypeError, 'backend="sla"'),
    "examples type": (build, dict(example_inputs=3), TypeError, "example_inputs must be"),
    "examples wrong": (build, dict(example_inputs=(torch.zeros(1, 200, 7),)), ValueError, "does not run with these"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_calls_name_the_remedy_and_change_nothing(case):
    make, arguments, error, message = BAD[case]
    model = make()
    before = fingerprint(model) if isinstance(model, nn.Module) else None
    with pytest.raises(error, match=message):
        sla_compile.accelerate(model, **({"config": CONFIG} | arguments))
    if before:
        assert_unchanged(model, before)


def test_twice_is_an_error_that_names_the_first_call():
    model = sla_compile.accelerate(build(), config=CONFIG)
    before = fingerprint(model)
    with pytest.raises(
        RuntimeError, match="accelerated already, by accelerate\\(TinyDiT, sparsity=0.8\\) at .*test_acc"
    ):
        sla_compile.accelerate(model, config=CONFIG)
    with pytest.raises(RuntimeError, match="its submodule inner is accelerated already"):
        sla_compile.accelerate(nn.ModuleDict({"inner": model}), config=CONFIG)
    assert_unchanged(model, before)


def test_wrappers_come_after():
    with pytest.raises(RuntimeError, match="before torch.compile"):
        sla_compile.accelerate(torch.compile(build()), config=CONFIG)
    with pytest.raises(RuntimeError, match="inside DataParallel"):
        sla_compile.accelerate(nn.DataParallel(build()), config=CONFIG)


def test_a_taken_name_is_refused():
    model = build()
    model.blocks[1].attn.sla = nn.Identity()
    before = fingerprint(model)
    with pytest.raises(ValueError, match="blocks.1.attn already has an attribute named 'sla'"):
        sla_compile.accelerate(model, config=CONFIG)
    assert_unchanged(model, before)


def test_allow_no_match_leaves_the_model():
    model = nn.Sequential(nn.Linear(4, 4))
    assert sla_compile.accelerate(model, allow_no_match=True) is model
    assert len(sla_compile.report(model)) == 0


def test_unaccelerated_models_are_named():
    for function in (sla_compile.report, sla_compile.restore, lambda m: sla_compile.dense(m).__enter__()):
        with pytest.raises(ValueError, match="this TinyDiT was not accelerated"):
            function(build())


def test_a_second_sequence_named_first_stays_dense():
    layer, (x, context) = build().blocks[0].text, make_inputs()
    expected = layer(x, context)
    sla_compile.accelerate(layer, config=CONFIG, include="")
    assert torch.equal(layer(context=context, x=x), expected)


def test_a_registry_of_subclasses_does_not_hear_of_it():
    class Registered(SelfAttention):
        names: typing.ClassVar = []

        def __init_subclass__(cls):
            assert cls.__name__ not in Registered.names
            Registered.names.append(cls.__name__)

    class Layer(Registered):
        pass

    model = sla_compile.accelerate(nn.ModuleList([Layer()]), config=CONFIG)
    assert Registered.names == ["Layer"] and type(model[0]).__mro__[2] is Layer


class TakesApart(nn.Module):
    """Attends itself, with the projections of attentions that nobody calls, as the double blocks of FLUX's own code."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.hidden_size = 2, 32
        self.img_attn, self.txt_attn = SelfAttention(), SelfAttention()

    def forward(self, img, txt):
        packed = torch.cat([self.txt_attn.qkv(txt), self.img_attn.qkv(img)], 1)
        query, key, value = packed.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return self.img_attn.proj(out[:, txt.shape[1] :])


@pytest.mark.parametrize("examples", [False, True])
def test_a_block_that_attends_itself_is_the_owner(examples):
    model, inputs = TakesApart().eval(), make_inputs(200, context=30)
    dense = model(*inputs)
    sla_compile.accelerate(model, config=CONFIG, example_inputs=inputs if examples else None)
    assert not torch.equal(model(*inputs), dense)
    report = sla_compile.report(model)
    assert [(site.name, site.shape) for site in report.rewritten] == [("", "(1, 2, 230, 16)")]
    assert sorted(site.name for site in report.dense) == ["img_attn", "txt_attn"]


@pytest.mark.parametrize("declares", ["its attentions", "the block"])
def test_heads_of_a_block_and_of_its_attentions(declares):
    block = TakesApart()
    del block.hidden_size
    if declares == "the block":  # and the attentions hold nothing but projections
        del block.img_attn.num_heads, block.txt_attn.num_heads
    else:
        del block.num_heads
    sla_compile.accelerate(block, config=CONFIG.replace(method="sla2"))
    assert (block.sla.num_heads, block.sla.head_dim) == (2, 16)


def test_an_attention_that_leaves_the_call_to_its_child_is_the_owner():
    class Core(nn.Module):
        def forward(self, q, k, v):
            return F.scaled_dot_product_attention(q, k, v)

    class WithCore(SelfAttention):
        def __init__(self):
            super().__init__()
            self.core = Core()

        def forward(self, x):
            query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
            return self.proj(self.core(query, key, value).transpose(1, 2).flatten(2))

    model = sla_compile.accelerate(nn.Sequential(WithCore()).eval(), config=CONFIG)
    model(make_inputs()[0])
    assert [(site.name, site.rewritten, bool(site.shape)) for site in sla_compile.report(model)] == [("0", True, True)]


def test_owners_that_nobody_calls_say_so_after_a_run():
    class HandsOn(nn.Module):
        """What structure cannot tell: something else gets an attention, and does not call it."""

        def __init__(self):
            super().__init__()
            self.used, self.unused = SelfAttention(), SelfAttention()

        def forward(self, x):
            return self.used(x) + len([self.unused])

    model = sla_compile.accelerate(HandsOn().eval(), config=CONFIG)
    assert not any(site.reason for site in sla_compile.report(model))
    model(make_inputs()[0])
    used, unused = sla_compile.report(model)
    assert not used.reason and used.shape
    assert "not called by an eager run" in unused.reason and unused.rewritten


def test_joint_attention_of_two_sequences_is_redirected():
    """Text and video concatenated inside the attention (CogVideoX, single blocks of HunyuanVideo)."""

    class Joint(SelfAttention):
        def forward(self, x, context=None):
            return super().forward(torch.cat([context, x], 1))

    class Caller(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Joint()

        def forward(self, x, context):
            return next(self.children())(x, context)  # hidden from a reader of the source

    model = sla_compile.accelerate(Caller().eval(), config=CONFIG, include="layer")
    model(*make_inputs(200, context=30))
    assert sla_compile.report(model).rewritten[0].shape == "(1, 2, 230, 16)"


@pytest.mark.parametrize("shape", [(2, 1, 1, 200), (1, 1, 1, 200), (1, 200), (2, 2, 200, 200)])
def test_spellings_of_a_key_padding_mask(shape):
    attention, (x, _) = SelfAttention().eval(), make_inputs(batch=2)
    mask = torch.rand(shape if len(shape) < 4 or shape[-2] == 1 else (2, 1, 1, 200)) > 0.3
    mask = mask.expand(shape)  # the last one: expanded over heads and queries
    expected = attention(x, mask)
    sla_compile.accelerate(attention, config=CONFIG.replace(critical_blocks=100))
    torch.testing.assert_close(attention(x, mask), expected, rtol=1e-5, atol=1e-5)
    assert sla_compile.report(attention).rewritten
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)(x, mask)
    torch.testing.assert_close(compiled, expected, rtol=1e-5, atol=1e-5)
