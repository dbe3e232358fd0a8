"""The FX pass on graph modules: every spelling of attention, in subgraphs too, what it refuses and leaves intact."""

import copy

import pytest
import torch
from graph_tools import (
    CONFIG,
    OP,
    Rewriting,
    assert_same_snapshot,
    captured,
    choose,
    dense_left,
    expected,
    fill_graph,
    ops,
    snapshot,
    targets,
)
from models import SelfAttention, TinyDiT, build
from spellings import DEFAULT_SCALE, MASKED, SPELLINGS, Attention, Model
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import sla_compile
from sla_compile.passes import rewrite
from sla_compile.passes.find import find_attention, owner
from sla_compile.passes.rewrite import accelerate_graph, added_parameters, recorded_sites

LENGTH = 130


def inputs(length=LENGTH, batch=2, dim=32, seed=0):
    return torch.randn(batch, length, dim, generator=torch.Generator().manual_seed(seed))


def valid(counts=(LENGTH, 100), length=LENGTH):
    return torch.arange(length) < torch.tensor(counts)[:, None]


@pytest.mark.parametrize("name", [*SPELLINGS, *MASKED])
def test_every_spelling_under_dynamo(name):
    torch.manual_seed(0)
    keep = (valid(),) if name in MASKED else ()
    model, x = Model({**SPELLINGS, **MASKED}[name]), inputs()
    before = captured(model, x, *keep)
    assert dense_left(before)
    assert ops(before) == 0

    backend = Rewriting(prepare=fill_graph)
    torch._dynamo.reset()
    result = torch.compile(model, backend=backend, fullgraph=True)(x, *keep)
    (graph,), ((site,),) = backend.graphs, backend.sites
    assert ops(graph) == 1
    assert not dense_left(graph)
    assert site.name == "block.attn"
    assert site.rewritten
    assert site.head_dim == 16
    weight, bias = fill_graph(graph)
    scale = None if name in DEFAULT_SCALE else 0.3
    wanted = x + expected(model.block.attn, x, weight, bias, scale=scale, keep=keep[0] if keep else None)
    torch.testing.assert_close(result, wanted)


TRACED = "sdpa scale_both bmm_flat_heads einsum_tokens_first heads_in_batch_then_split keys_first masked_where".split()


class Traced(nn.Module):
    """A signature without varargs, which symbolic_trace cannot split."""

    def __init__(self, attend, masked=False):
        super().__init__()
        self.attn, self.masked = Attention(attend), masked

    def forward(self, x, keep=None):
        return self.attn(x, keep) if self.masked else self.attn(x)


@pytest.mark.parametrize("name", TRACED)
@pytest.mark.parametrize("capture", ["symbolic_trace", "make_fx"])
def test_traced_graphs_take_other_lengths_or_carry_their_shapes(name, capture):
    torch.manual_seed(0)
    model, x, keep = Traced({**SPELLINGS, **MASKED}[name], name in MASKED), inputs(), valid()
    graph = torch.fx.symbolic_trace(model) if capture == "symbolic_trace" else make_fx(model)(x, keep)
    (site,) = accelerate_graph(graph, choose, (x, keep) if capture == "symbolic_trace" else None)
    assert site.rewritten
    assert ops(graph) == 1
    assert not dense_left(graph)
    weight, bias = fill_graph(graph)
    scale = None if name in DEFAULT_SCALE else 0.3
    cases = [(x, keep)]
    if capture == "symbolic_trace":
        assert site.name == "attn"
        cases.append((inputs(200, batch=3), valid((200, 150, 1), 200)))
    for x, keep in cases:
        wanted = expected(model.attn, x, weight, bias, scale=scale, keep=keep if name in MASKED else None)
        torch.testing.assert_close(graph(x, keep), wanted)


# ---- nn.MultiheadAttention -------------------------------------------------------------------------------------------


class MultiHead(nn.Module):
    def __init__(self, batch_first=True, **options):
        super().__init__()
        self.batch_first = batch_first
        self.attn = nn.MultiheadAttention(32, 2, batch_first=batch_first, **options)

    def forward(self, x, padding):
        x = x if self.batch_first else x.transpose(0, 1)
        y = self.attn(x, x, x, key_padding_mask=padding, need_weights=False)[0]
        return y if self.batch_first else y.transpose(0, 1)

    def expected(self, x, weight, bias, padding):
        packed = F.linear(x, self.attn.in_proj_weight, self.attn.in_proj_bias)
        query, key, value = (t.unflatten(-1, (2, 16)).transpose(1, 2) for t in packed.chunk(3, -1))
        attended = sla_compile.sparse_linear_attention(
            query,
            key,
            value,
            config=CONFIG,
            proj_weight=weight,
            proj_bias=bias,
            key_padding_mask=~padding[:, None, None],
        )
        return self.attn.out_proj(attended.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("batch_first", [True, False], ids=["batch_first", "tokens_first"])
@pytest.mark.parametrize("capture", ["dynamo", "symbolic_trace"])
def test_multihead_attention(batch_first, capture):
    torch.manual_seed(0)
    model, x, padding = MultiHead(batch_first), inputs(), ~valid()
    if capture == "dynamo":
        backend = Rewriting(prepare=fill_graph)
        result = torch.compile(model, backend=backend, fullgraph=True)(x, padding)
        graph = backend.graphs[0]
    else:
        names = list(model.state_dict())
        graph = torch.fx.symbolic_trace(model)
        accelerate_graph(graph, choose, {"x": x, "padding": padding})
        assert list(model.state_dict()) == names  # the traced model shares its leaf module and must not change
        fill_graph(graph)
        result = graph(x, padding)
    assert ops(graph) == 1
    assert not dense_left(graph)
    assert list(added_parameters(graph)) == ["attn.sla.proj_weight", "attn.sla.proj_bias"]
    torch.testing.assert_close(result, model.expected(x, *fill_graph(graph), padding))


def test_multihead_attention_whose_weights_are_used_stays():
    class Weights(MultiHead):
        def forward(self, x):
            return self.attn(x, x, x)

    with pytest.raises(ValueError, match="probabilities are used elsewhere"):
        accelerate_graph(captured(Weights(), inputs()), choose)


# ---- owners ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "blocks.0.attn1",
        "blocks.0.attn1@1",
        "L['self'].blocks.0.attn1",
        "L['self'].__dict__['_modules']['blocks'].0.attn1",
        "L['fn']._orig_mod.blocks[0].attn1",
        "L['self']._modules['blocks']._modules['0']._modules['attn1']",
        "L__self___blocks_0_attn1",
    ],
)
def test_owner_names_are_one(path):
    node = torch.fx.Graph().placeholder("x")
    node.meta["nn_module_stack"] = {"": ("", nn.Module), "key": (path, nn.Module)}
    assert owner(node) == "blocks.0.attn1"


class Twice(nn.Module):
    """One owner calls attention twice, another once."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Attention(self.twice), Attention(SPELLINGS["sdpa"])

    @staticmethod
    def twice(q, k, v):
        return F.scaled_dot_product_attention(q, k, v) + F.scaled_dot_product_attention(k, q, v)

    def forward(self, x):
        return self.second(self.first(x))


def test_an_owner_has_one_set_of_parameters_and_a_row_for_each_call():
    graph = captured(Twice(), inputs())
    sites = accelerate_graph(graph, choose)
    assert [site.name for site in sites] == ["first", "first", "second"]
    assert list(added_parameters(graph)) == [
        "first.sla.proj_weight", "first.sla.proj_bias", "second.sla.proj_weight", "second.sla.proj_bias",
    ]  # fmt: skip
    calls = [node for node in graph.graph.nodes if node.target is OP]
    assert calls[0].args[3] is calls[1].args[3]
    assert calls[0].args[3] is not calls[2].args[3]


class Chain(nn.Module):
    """Attention on the result of attention, with nothing between."""

    def forward(self, x):
        x = F.scaled_dot_product_attention(x, x, x)
        x = (x @ x.mT * 0.3).softmax(-1) @ x
        return F.scaled_dot_product_attention(x, x, x).flatten(1, 2)


def test_attention_on_attention():
    x, backend = torch.randn(2, 2, LENGTH, 16), Rewriting(choose=lambda name: CONFIG.replace(linear="none"))
    result = torch.compile(Chain(), backend=backend, fullgraph=True)(x)
    assert [site.rewritten for site in backend.sites[0]] == [True] * 3
    for scale in (None, 0.3, None):
        x = sla_compile.sparse_linear_attention(x, x, x, config=CONFIG.replace(linear="none"), scale=scale)
    torch.testing.assert_close(result, x.flatten(1, 2))


class Grouped(nn.Module):
    def forward(self, q):
        return F.scaled_dot_product_attention(q, q[:, :2], q[:, 2:] * 2, enable_gqa=True)


class OneHead(nn.Module):
    def forward(self, q):
        mask = q.new_zeros(q.shape[0], 1, q.shape[1]).masked_fill(q.new_ones(q.shape[1]).cumsum(0) > 100, -torch.inf)
        return F.scaled_dot_product_attention(q, q * 2, q, attn_mask=mask)


def test_shared_heads_and_missing_heads():
    config = CONFIG.replace(linear="none")
    q = torch.randn(2, 4, LENGTH, 16)
    result = torch.compile(Grouped(), backend=Rewriting(lambda name: config), fullgraph=True)(q)
    wanted = sla_compile.sparse_linear_attention(q, q[:, :2], q[:, 2:] * 2, config=config, enable_gqa=True)
    torch.testing.assert_close(result, wanted)
    q = q[:, 0]
    result = torch.compile(OneHead(), backend=Rewriting(lambda name: config), fullgraph=True)(q)
    heads, keep = q[:, None], torch.arange(LENGTH) < 100
    wanted = sla_compile.sparse_linear_attention(heads, heads * 2, heads, config=config, key_padding_mask=keep)
    torch.testing.assert_close(result, wanted[:, 0])


class WrittenOut(nn.Module):
    def forward(self, q, keep, additive):
        mask = q.new_zeros(LENGTH, LENGTH).masked_fill(~keep, -torch.inf) if additive else keep & keep.mT
        return F.scaled_dot_product_attention(q, q * 2, q, attn_mask=mask)


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("flat", [False, True])
def test_padding_masks_written_out_for_queries(additive, flat):
    config = CONFIG.replace(linear="none", padding_masks=True)
    q, keep = torch.randn(2, 4, LENGTH, 16), valid((LENGTH, 100))[:, None, None]
    if flat:
        q, keep = q[:, 0], keep[:, 0]
    model = torch.compile(WrittenOut(), backend=Rewriting(lambda name: config), fullgraph=True)
    wanted = q if q.dim() == 4 else q[:, None]
    wanted = sla_compile.sparse_linear_attention(
        wanted, wanted * 2, wanted, config=config, key_padding_mask=keep if keep.dim() == 4 else keep[:, None]
    )
    if not additive:
        wanted = wanted.masked_fill(~(keep if keep.dim() == 4 else keep[:, None]).mT, 0)
    torch.testing.assert_close(model(q, keep, additive), wanted.view_as(q))
    with pytest.raises(RuntimeError, match="hides other keys from other queries"):
        model(q, keep.expand(*keep.shape[:-2], LENGTH, LENGTH).tril(), additive)


@pytest.mark.parametrize("within", [False, True], ids=["input", "expanded within"])
def test_an_input_that_is_an_expanded_mask_may_be_another_at_the_next_call(within):
    class Masked(nn.Module):
        def forward(self, q, keep):
            keep = keep[..., :1, :].expand(2, 1, LENGTH + 5, LENGTH)[:, :, 5:] if within else keep[:, :]
            return F.scaled_dot_product_attention(q, q * 2, q, attn_mask=keep)

    q, keep = torch.randn(2, 4, LENGTH, 16), valid()[:, None, None].expand(2, 1, LENGTH, LENGTH)
    graph = torch.export.export(Masked(), (q, keep)).module()
    (site,) = accelerate_graph(graph, lambda name: CONFIG.replace(linear="none"), allow_no_match=True)
    assert site.rewritten is within
    graph = torch.export.export(Masked(), (q, keep)).module()
    config = CONFIG.replace(linear="none", padding_masks=True)
    accelerate_graph(graph, lambda name: config)
    wanted = sla_compile.sparse_linear_attention(q, q * 2, q, config=config, key_padding_mask=keep[:, :, :1])
    torch.testing.assert_close(graph(q, keep.contiguous()), wanted)
    if not within:
        with pytest.raises(RuntimeError, match="hides other keys from other queries"):
            graph(q, keep.tril())


def test_a_scale_before_a_cast_to_integers_stays_there():
    def quantized(q, k, v):
        return ((q * 8).to(torch.int8).to(q.dtype) @ k.mT * 0.05).softmax(-1) @ v

    model, x = Model(quantized), inputs()
    graph = torch.export.export(model, (x,)).module()
    (site,) = accelerate_graph(graph, lambda name: CONFIG.replace(linear="none", critical_blocks=9))
    assert site.rewritten
    torch.testing.assert_close(graph(x), model(x))


def test_choices_by_owner():
    graph = captured(Twice(), inputs())
    sites = accelerate_graph(graph, lambda name: "excluded" if name == "second" else CONFIG.replace(sparsity=0.9))
    assert [(site.rewritten, site.reason) for site in sites] == [(True, ""), (True, ""), (False, "excluded")]
    assert ops(graph) == 2
    assert F.scaled_dot_product_attention in targets(graph)
    assert all(node.args[11] == 0.9 for node in graph.graph.nodes if node.target is OP)
    assert recorded_sites(graph) == sites


def test_parameters_follow_the_owners():
    model = Model(SPELLINGS["sdpa"]).bfloat16().requires_grad_(False)
    graph = torch.fx.symbolic_trace(nn.Sequential(model.block.attn))
    accelerate_graph(graph, choose, (inputs().bfloat16(),))
    for parameter in added_parameters(graph).values():
        assert parameter.dtype == torch.bfloat16
        assert not parameter.requires_grad
        assert not parameter.any()


# ---- self- and cross-attention ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_cross_attention_with_as_many_keys_as_queries_stays_dense(checkpointing):
    graph = captured(build(0, checkpointing=checkpointing), inputs(), inputs(seed=1))
    sites = {site.name: site for site in accelerate_graph(graph, choose)}
    for block in ("blocks.0", "blocks.1"):
        assert sites[f"{block}.attn"].rewritten
        assert not sites[f"{block}.text"].rewritten
        assert sites[f"{block}.text"].reason.startswith("cross-attention: key and value")
        assert sites[f"{block}.text"].keys == str(LENGTH)
    assert ops(graph) == 2


class Joint(nn.Module):
    """Two streams: joint attention as in Flux, and one stream that attends to the other."""

    def __init__(self):
        super().__init__()
        self.image, self.text, self.mixed = SelfAttention(), SelfAttention(), nn.Linear(32, 64)

    def forward(self, image, text, rotation):
        for _ in range(2):
            streams = zip(self.split(self.image, image), self.split(self.text, text), strict=True)
            both = [torch.cat(pair, 1) for pair in streams]
            joint = F.scaled_dot_product_attention(both[0] * rotation, both[1] * rotation, both[2])
            joint = joint.flatten(2)
            image, text = image + joint[:, : image.shape[1]], text + joint[:, image.shape[1] :]
        key, value = self.mixed(text).chunk(2, -1)
        return image + F.scaled_dot_product_attention(image[:, None], key[:, None], value[:, None]).squeeze(1)

    def split(self, layer, x):
        return layer.qkv(x).chunk(3, -1)


def test_joint_attention_is_self_attention_and_the_streams_stay_apart():
    graph = captured(Joint(), inputs(), inputs(seed=1), torch.ones(2 * LENGTH, 1))
    reasons = [match.refusal for match in find_attention(graph)]
    assert reasons[:2] == ["", ""]
    assert reasons[2].startswith("cross-attention")


class Core(nn.Module):
    """A graph that begins behind the projections."""

    def forward(self, query, key, value):
        return F.scaled_dot_product_attention(query, key, value)


def test_a_graph_that_begins_with_query_key_and_value():
    def refusal(model, count):
        (match,) = find_attention(captured(model, *(torch.randn(2, 2, LENGTH, 16) for _ in range(count))))
        return match.refusal

    class Shared(nn.Module):
        def forward(self, query, context):
            return F.scaled_dot_product_attention(query, context, 2 * context)

    assert refusal(Core(), 3) == ""
    assert refusal(Shared(), 2).startswith("cross-attention")


# ---- refusals --------------------------------------------------------------------------------------------------------


def probabilities_used(q, k, v):
    p = (q @ k.mT * 0.3).softmax(-1)
    return p @ v + p.sum()


def scores_used(q, k, v):
    scores = q @ k.mT * 0.3
    return scores.softmax(-1) @ v + scores.amax()


def tensor_scale(q, k, v):
    return (q @ k.mT * q.amax()).softmax(-1) @ v


def softcapped(q, k, v):
    return (torch.tanh(q @ k.mT) * 5).softmax(-1) @ v


def integer_scores(q, k, v):
    return (q @ k.mT * 8).to(torch.int32).to(q.dtype).softmax(-1) @ v


def active_dropout(q, k, v):
    return F.dropout((q @ k.mT).softmax(-1), 0.1) @ v


def sdpa_dropout(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, dropout_p=0.1)


def causal(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def written_causal(q, k, v):
    mask = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).triu(1)
    return (q @ k.mT).masked_fill(mask, -torch.inf).softmax(-1) @ v


def two_masks(q, k, v):
    scores = (q @ k.mT).masked_fill(k.sum(-1)[:, :, None] > 3, -torch.inf)
    return (scores + v.sum(-1)[:, :, None]).softmax(-1) @ v


def weak_mask(q, k, v):
    return (q @ k.mT).masked_fill(k.sum(-1)[:, :, None] > 3, -5.0).softmax(-1) @ v


def weakened_mask(q, k, v):
    return ((q @ k.mT).masked_fill(k.sum(-1)[:, :, None] > 3, -1e9) * 1e-9).softmax(-1) @ v


def scaled_bias(q, k, v):
    return ((q @ k.mT + k.detach().sum(-1)[:, :1, None]) * 0.3).softmax(-1) @ v


def boolean_added(q, k, v):
    return (q @ k.mT + (k.sum(-1)[:, :1, None] > 3)).softmax(-1) @ v


def mutated_operand(q, k, v):
    k = k.clone()
    scores = q @ k.mT
    probabilities = scores.softmax(-1)
    k.mul_(2)
    return probabilities @ v


def over_queries(q, k, v):
    return (q @ k.mT).softmax(-2) @ v


def multi_query(q, k, v):
    return (q @ k[:, :1].mT).softmax(-1) @ v[:, :1]


def multi_query_einsum(q, k, v):
    return torch.einsum("bhij,bjd->bhid", torch.einsum("bhid,bjd->bhij", q, k[:, 0]).softmax(-1), v[:, 0])


def fewer_keys(q, k, v):
    return F.scaled_dot_product_attention(q, k[:, :, :100], v[:, :, :100])


def wider_values(q, k, v):
    return F.scaled_dot_product_attention(q, k, torch.cat([v, v], -1))[..., :16]


@pytest.mark.parametrize(
    ("attend", "reason"),
    [
        (probabilities_used, "attention probabilities are used elsewhere"),
        (scores_used, "scores are used elsewhere"),
        (tensor_scale, "scaled by a tensor"),
        (softcapped, "pass through tanh"),
        (integer_scores, "pass through a cast to torch.int32"),
        (active_dropout, "dropout is active"),
        (sdpa_dropout, "dropout is active"),
        (causal, "causal"),
        (written_causal, "not a key-padding mask"),
        (two_masks, "more than one mask"),
        (weak_mask, "something else than a very negative number"),
        (weakened_mask, "mask is scaled together with its scores"),
        (scaled_bias, "mask is scaled together with its scores"),
        (boolean_added, "boolean and added"),
        (mutated_operand, "in-place operation, mul_, lies between"),
        (multi_query, "share keys and values by broadcasting"),
        (multi_query_einsum, "share keys and values by broadcasting"),
        (over_queries, "does not sum over the keys"),
        (fewer_keys, "as many keys as queries"),
        (wider_values, "another head dimension"),
    ],
)
def test_refusals_say_why_and_change_nothing(attend, reason):
    graph = captured(Model(attend), inputs())
    before = snapshot(graph)
    with pytest.raises(ValueError, match=reason):
        accelerate_graph(graph, choose)
    assert_same_snapshot(snapshot(graph), before)
    (site,) = accelerate_graph(graph, choose, allow_no_match=True)
    assert not site.rewritten
    assert reason in site.reason


def test_short_sequences_stay_dense():
    graph = captured(Model(SPELLINGS["einsum"]), inputs())
    with pytest.raises(ValueError, match="min_seq_len=4096"):
        accelerate_graph(graph, lambda name: CONFIG.replace(min_seq_len=4096))


def test_softmax_that_is_no_attention_is_no_site():
    class Router(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.experts = nn.Linear(32, 4), nn.Parameter(torch.randn(4, 32))

        def forward(self, x):
            return self.gate(x).softmax(-1) @ self.experts + x.softmax(-1)

    graph = captured(Router(), inputs())
    assert accelerate_graph(graph, choose, allow_no_match=True) == []
    with pytest.raises(ValueError, match="no attention that the pass knows"):
        accelerate_graph(captured(Router(), inputs()), choose)


def test_long_sums_before_a_softmax_take_no_time():
    class Residual(nn.Module):
        def forward(self, x):
            y = x
            for _ in range(60):
                x = x + x * y + x
            return x.softmax(-1) @ y.mT

    graph = captured(Residual(), torch.randn(2, 8, 8))
    (site,) = accelerate_graph(graph, choose, allow_no_match=True)
    assert not site.rewritten


class OwnBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return F.scaled_dot_product_attention(x, x, x)

    @staticmethod
    def backward(ctx, grad):
        return grad


def test_attention_with_a_hand_written_backward_stays_dense():
    graph = captured(OwnBackward.apply, torch.randn(2, 2, LENGTH, 16, requires_grad=True))
    with pytest.raises(ValueError, match=r"autograd\.Function"):
        accelerate_graph(graph, choose)


# ---- subgraphs -------------------------------------------------------------------------------------------------------


def test_checkpointed_blocks_train_as_plain_ones_do():
    gradients = []
    for checkpointing in (False, True):
        backend = Rewriting(prepare=fill_graph)
        model = build(0, checkpointing=checkpointing)
        torch._dynamo.reset()
        torch.compile(model, backend=backend, fullgraph=True)(inputs(), inputs(20, seed=1)).square().sum().backward()
        (graph,) = backend.graphs
        assert ops(graph) == 2
        assert (len([m for m in graph.modules() if isinstance(m, torch.fx.GraphModule)]) > 1) is checkpointing
        gradients.append({name: p.grad for name, p in (*model.named_parameters(), *added_parameters(graph).items())})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient.any(), name
        torch.testing.assert_close(gradients[1][name], gradient)


@torch.compiler.nested_compile_region
def region(x, context):
    return F.scaled_dot_product_attention(x, context, context)


class Regional(nn.Module):
    def __init__(self, cross):
        super().__init__()
        self.cross = cross

    def forward(self, x, y):
        x = region(x, x * 1)
        return region(x, y if self.cross else x * 2)


def test_a_region_called_twice_shares_no_parameters():
    heads = torch.randn(2, 2, LENGTH, 16)
    graph = captured(Regional(cross=False), heads, heads.clone())
    with pytest.raises(ValueError, match="called 2 times and would share one set"):
        accelerate_graph(graph, choose)
    (site,) = accelerate_graph(graph, lambda name: CONFIG.replace(linear="none"))
    assert site.calls == 2
    assert ops(graph) == 1


def test_a_region_must_be_self_attention_for_every_caller():
    heads = torch.randn(2, 2, LENGTH, 16)
    with pytest.raises(ValueError, match="cross-attention"):
        accelerate_graph(
            captured(Regional(cross=True), heads, heads.clone()), lambda name: CONFIG.replace(linear="none")
        )


def test_graph_modules_called_as_modules():
    class OneInput(Traced):
        def forward(self, x):
            return self.attn(x)

    inner = torch.fx.symbolic_trace(OneInput(SPELLINGS["sdpa"]))
    outer = torch.fx.Graph()
    outer.output(outer.call_module("inner", (outer.placeholder("x"),)))
    graph = torch.fx.GraphModule({"inner": inner}, outer)
    (site,) = accelerate_graph(graph, choose, (inputs(),))
    assert site.rewritten
    assert list(added_parameters(graph)) == [f"{site.name}.sla.proj_weight", f"{site.name}.sla.proj_bias"]
    assert graph(inputs()).shape == inputs().shape


# ---- what must hold whatever happens ---------------------------------------------------------------------------------


def test_applying_twice_names_the_first_call():
    graph = captured(Model(SPELLINGS["sdpa"]), inputs())
    accelerate_graph(graph, choose)
    with pytest.raises(RuntimeError, match=r"accelerated already, by a call at .*test_passes\.py:\d+"):
        accelerate_graph(graph, choose)
    del graph.meta[rewrite.META_KEY]
    with pytest.raises(RuntimeError, match="computes sparse-linear attention already"):
        accelerate_graph(graph, choose)


def test_failures_midway_leave_the_graph_as_it_was(monkeypatch):
    graph = captured(Twice(), inputs())
    before = snapshot(graph)
    calls = []

    def failing(config, head_dim, scale):
        calls.append(head_dim)
        if len(calls) == 2:
            raise FloatingPointError("the second site fails")
        return sla_compile.ops.op_scalars(config, head_dim, scale)

    monkeypatch.setattr("sla_compile.passes.edit.op_scalars", failing)
    with pytest.raises(FloatingPointError):
        accelerate_graph(graph, choose)
    assert_same_snapshot(snapshot(graph), before)
    monkeypatch.undo()
    assert len(accelerate_graph(graph, choose)) == 3


def test_a_check_may_veto():
    def check(sites):
        raise KeyError(sites[0].name)

    graph = captured(Model(SPELLINGS["sdpa"]), inputs())
    before = snapshot(graph)
    with pytest.raises(KeyError, match=r"block\.attn"):
        accelerate_graph(graph, choose, check=check)
    assert_same_snapshot(snapshot(graph), before)


def test_a_name_that_is_taken_is_an_error():
    model = Model(SPELLINGS["sdpa"])
    model.block.attn.sla = nn.Linear(1, 1)
    graph = torch.export.export(model, (inputs(),)).module()
    graph.block.attn.sla = nn.Linear(1, 1)
    with pytest.raises(ValueError, match=r"belong at block\.attn\.sla"):
        accelerate_graph(graph, choose)
    assert ops(graph) == 0


def test_graphs_without_shapes_ask_for_inputs():
    graph = torch.fx.symbolic_trace(Traced(SPELLINGS["sdpa"]))
    with pytest.raises(ValueError, match="pass example_inputs"):
        accelerate_graph(graph, choose)
    with pytest.raises(ValueError, match="example_inputs"):
        accelerate_graph(graph, choose, (inputs(), None, None))
    with pytest.raises(ValueError, match="example_inputs lacks"):
        accelerate_graph(graph, choose, {})
    assert accelerate_graph(graph, choose, {"x": inputs()})[0].rewritten


def test_values_and_strides_in_the_metadata_are_those_of_the_run():
    graph = torch.export.export(Model(SPELLINGS["bmm_flat_heads"]), (inputs(),)).module()
    accelerate_graph(graph, choose)
    seen = {}

    class Recorder(torch.fx.Interpreter):
        def run_node(self, n):
            seen[n] = super().run_node(n)
            return seen[n]

    Recorder(graph).run(inputs())
    compared = 0
    for node, value in seen.items():
        if isinstance(value, torch.Tensor) and node.op == "call_function":
            known = node.meta["val"]
            assert (known.shape, known.stride(), known.dtype) == (value.shape, value.stride(), value.dtype), node
            compared += 1
    assert compared > 5


def test_parameters_train_and_travel():
    torch.manual_seed(0)
    model, x = Traced(SPELLINGS["matmul_scale_after"]), inputs()
    graph = torch.fx.symbolic_trace(model)
    accelerate_graph(graph, choose, (x, valid()))
    optimizer = torch.optim.SGD(added_parameters(graph).values(), lr=0.5)
    target = model(x, valid()).detach()
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = F.mse_loss(graph(x, valid()), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.99 * losses[0]

    twin = copy.deepcopy(graph)
    assert added_parameters(twin).keys() == added_parameters(graph).keys()
    torch.testing.assert_close(twin(x, valid()), graph(x, valid()), rtol=0, atol=0)
    fresh = torch.fx.symbolic_trace(Traced(SPELLINGS["matmul_scale_after"]))
    accelerate_graph(fresh, choose, (x, valid()))
    assert fresh.load_state_dict(graph.state_dict()).missing_keys == []
    torch.testing.assert_close(fresh(x, valid()), graph(x, valid()), rtol=0, atol=0)


def test_checkpoint_inside_the_owner():
    class Inside(TinyDiT):
        def forward(self, x, context):
            attn = self.blocks[0].attn
            query, key, value = attn.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
            return checkpoint(F.scaled_dot_product_attention, query, key, value, use_reentrant=False)

    graph = captured(Inside(), inputs(), inputs())
    (site,) = accelerate_graph(graph, choose)
    assert site.rewritten
    assert ops(graph) == 1
