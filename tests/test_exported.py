"""The FX pass on exported programs: dynamic lengths, parameters in state dict and signature, saving, training."""

import subprocess
import sys
import textwrap

import pytest
import torch
from graph_tools import CONFIG, choose, dense_left, expected, fill, ops
from models import SelfAttention, build
from sampling import every_other
from spellings import DEFAULT_SCALE, MASKED, SPELLINGS, Model
from test_passes import MultiHead, inputs, valid
from torch import nn
from torch.export import Dim, export
from torch.export.graph_signature import InputKind
from torch.nn import functional as F

from sla_compile.passes.exported import accelerate_exported
from sla_compile.passes.rewrite import added_parameters, recorded_sites

# run_decompositions copies tree specifications, whose class warns about it from inside the standard library
pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
LENGTH = Dim("length", max=4096)


def exported(model, *args, length=LENGTH, strict=False, decomposed=False):
    shapes = None if length is None else tuple({1: length} for _ in args)
    if isinstance(model, Model) and len(args) > 1:
        shapes = (shapes[0], shapes[1:])  # its masks are varargs
    program = export(model, args, dynamic_shapes=shapes, strict=strict)
    return program.run_decompositions() if decomposed else program


def check_lengths(program, model, name="sdpa"):
    """The accelerated program against the functional form, at the exported length and others."""
    weight, bias = fill(added_parameters(program).values())
    scale = None if name in DEFAULT_SCALE else 0.3
    module = program.module()
    for length in (130, 64, 333):
        keep = (valid((length, length - 30), length),) if name in MASKED else ()
        x = inputs(length)
        wanted = x + expected(model.block.attn, x, weight, bias, scale=scale, keep=keep[0] if keep else None)
        torch.testing.assert_close(module(x, *keep), wanted)


@pytest.mark.parametrize("name", every_other([*SPELLINGS, *MASKED]))
def test_every_spelling_decomposed_with_a_dynamic_length(name):
    torch.manual_seed(0)
    model = Model({**SPELLINGS, **MASKED}[name])
    length = Dim.DYNAMIC  # non-strict, torch 2.11 takes no named one through a reshape that copies
    program = exported(model, inputs(), *((valid(),) if name in MASKED else ()), length=length, decomposed=True)
    assert not any("scaled_dot_product" in str(node.target) for node in program.graph.nodes)
    assert dense_left(program.graph_module)
    accelerated, (site,) = accelerate_exported(program, choose)
    assert site.rewritten
    assert site.name == "block.attn"
    assert ops(accelerated.graph_module) == 1
    assert not dense_left(accelerated.graph_module)
    check_lengths(accelerated, model, name)


@pytest.mark.parametrize("name", ["sdpa", "einsum_ellipsis", "masked_add"])
@pytest.mark.parametrize("strict", [False, True], ids=["non_strict", "strict"])
def test_training_ir(name, strict):
    torch.manual_seed(0)
    model = Model({**SPELLINGS, **MASKED}[name])
    program = exported(model, inputs(), *((valid(),) if name in MASKED else ()), strict=strict)
    code = program.graph_module.code
    accelerated, (site,) = accelerate_exported(program, choose)
    assert site.rewritten
    assert site.name == "block.attn"
    assert program.graph_module.code == code
    assert ops(program.graph_module) == 0
    assert program.state_dict.keys() == model.state_dict().keys()
    check_lengths(accelerated, model, name)


@pytest.mark.parametrize("decomposed", [False, True], ids=["training", "decomposed"])
@pytest.mark.parametrize("batch_first", [False, True], ids=["tokens_first", "batch_first"])
def test_multihead_attention(batch_first, decomposed):
    torch.manual_seed(0)
    model = MultiHead(batch_first)
    program, _ = accelerate_exported(exported(model, inputs(), ~valid(), length=None, decomposed=decomposed), choose)
    weight, bias = fill(added_parameters(program).values())
    result = program.module()(inputs(), ~valid())
    torch.testing.assert_close(result, model.expected(inputs(), weight, bias, ~valid()))


def test_parameters_are_inputs_of_their_own_behind_the_others():
    model = build(0)
    program, sites = accelerate_exported(exported(model, inputs(), inputs(seed=1)), choose)
    assert [(site.name, site.rewritten) for site in sites] == [
        ("blocks.0.attn", True), ("blocks.0.text", False), ("blocks.1.attn", True), ("blocks.1.text", False),
    ]  # fmt: skip
    added = [f"blocks.{i}.attn.sla.proj_{kind}" for i in range(2) for kind in ("weight", "bias")]
    specs = program.graph_signature.input_specs
    parameters = [spec.target for spec in specs if spec.kind == InputKind.PARAMETER]
    assert parameters == [*model.state_dict(), *added]
    assert [spec.kind for spec in specs[len(parameters) :]] == [InputKind.USER_INPUT] * 2
    placeholders = [node.name for node in program.graph.nodes if node.op == "placeholder"]
    assert placeholders == [spec.arg.name for spec in specs]
    assert list(program.state_dict) == parameters
    assert [program.state_dict[name].any().item() for name in added] == [False] * 4
    assert all(isinstance(program.state_dict[name], nn.Parameter) for name in added)
    assert recorded_sites(program) == sites
    assert program.example_inputs is not None


class Regions(nn.Module):
    """Attentions in the subgraphs that torch.export makes of grad modes, autocast and cond."""

    def __init__(self):
        super().__init__()
        self.frozen, self.low, self.branch = SelfAttention(), SelfAttention(), SelfAttention()

    def forward(self, x):
        with torch.no_grad():
            x = self.frozen(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = x + self.low(x)
        return torch.cond(x.sum() > -1e9, lambda y: self.branch(y), lambda y: y.clone(), (x.float(),))


def test_attention_in_subgraphs():
    torch.manual_seed(0)
    model, x = Regions(), inputs()
    program = exported(model, x, length=None)
    dense = program.module()(x)
    program, sites = accelerate_exported(program, lambda name: CONFIG.replace(critical_blocks=3))  # all blocks: exact
    assert [site.rewritten for site in sites] == [True] * 3
    assert [site.name for site in sites[:2]] == ["frozen", "low"]
    assert ops(program.graph_module) == 3
    assert len(added_parameters(program)) == 6
    result = program.module()(x)
    torch.testing.assert_close(result, dense, rtol=0, atol=0.02)  # bfloat16 in one of the regions
    parameters = dict(program.module().named_parameters())
    fill(parameters[name] for name in added_parameters(program))
    assert not torch.allclose(program.module()(x), result, atol=0.1)
    result = program.module()(x)
    result.square().sum().backward()
    grads = {name: parameters[name].grad is not None for name in added_parameters(program)}
    assert all(has is not name.startswith("frozen") for name, has in grads.items())


def rotated(x, table):
    """Written into halves of an empty tensor, as Wan does."""
    out = torch.empty_like(x)
    out[..., 0::2] = x[..., 1::2] * table[..., 0::2]
    out[..., 1::2] = x[..., 0::2] * table[..., 1::2]
    return out.type_as(x)


class Rotary(nn.Module):
    """Rotary tables are often applied in full precision: query and key leave a subgraph that value does not enter."""

    def __init__(self):
        super().__init__()
        self.attn = SelfAttention()

    def forward(self, x, context, table):
        query, key, value = self.attn.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        with torch.autocast("cpu", enabled=False):
            query, key, foreign = rotated(query, table), key * table, context[:, None] * table
        own = F.scaled_dot_product_attention(query, key, value)
        return own, F.scaled_dot_product_attention(query, foreign.expand_as(key), value)


def test_self_attention_is_followed_through_subgraphs():
    table = torch.rand(130, 16)
    program = exported(Rotary(), inputs(), torch.randn(2, 130, 16), table, length=None)
    assert any("wrap_with_autocast" in str(node.target) for node in program.graph.nodes)
    _, sites = accelerate_exported(program, choose)
    assert [site.rewritten for site in sites] == [True, False]
    assert sites[1].reason.startswith("cross-attention")


@pytest.mark.parametrize("decomposed", [False, True], ids=["training", "decomposed"])
def test_padding_masks_of_keys_and_queries(decomposed):
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = SelfAttention()

        def forward(self, x, keep):
            return self.attn(x, keep[:, None, None] & keep[:, None, :, None])

    model = Padded()
    program = exported(model, inputs(), valid(), decomposed=decomposed)
    config = CONFIG.replace(linear="none", critical_blocks=100, padding_masks=True)
    program, _ = accelerate_exported(program, lambda name: config)
    for length in (130, 333):
        keep = valid((length, length - 30), length)
        torch.testing.assert_close(program.module()(inputs(length), keep), model(inputs(length), keep))


def test_lengths_that_agree_in_the_example_alone_stay_dense():
    class Two(nn.Module):
        def forward(self, query, key):
            both = query.sum() + key.sum()
            return F.scaled_dot_product_attention(query + both, key + both, key + both)

    heads = torch.randn(2, 2, 130, 16)
    shapes = ({2: Dim("queries")}, {2: Dim("keys")})
    program = export(Two(), (heads, heads.clone()), dynamic_shapes=shapes)
    with pytest.raises(ValueError, match=r"s\d+ and s\d+ are equal in the example alone"):
        accelerate_exported(program, choose)


def test_program_trains():
    torch.manual_seed(0)
    model, x = Model(SPELLINGS["sdpa"]), inputs()
    program, _ = accelerate_exported(exported(model, x), choose)
    module = program.module()
    parameters = [p for name, p in module.named_parameters() if ".sla." in name]
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    target = model(x).detach()
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = F.mse_loss(module(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.99 * losses[0]
    assert all(p.grad.any() for p in model.parameters())  # the program shares the model's own


def test_save_and_load_in_a_fresh_process(tmp_path):
    torch.manual_seed(0)
    model, x = Model(SPELLINGS["sdpa"]), inputs(200)
    program, _ = accelerate_exported(exported(model, inputs()), choose)
    fill(added_parameters(program).values())
    torch.export.save(program, tmp_path / "program.pt2")
    torch.save((x, program.module()(x).detach()), tmp_path / "expected.pt")
    script = """
        import sys, torch, sla_compile
        from sla_compile.passes.exported import accelerate_exported
        from sla_compile.passes.rewrite import added_parameters, recorded_sites
        program = torch.export.load(sys.argv[1] + "/program.pt2")
        x, expected = torch.load(sys.argv[1] + "/expected.pt")
        torch.testing.assert_close(program.module()(x), expected)
        assert list(added_parameters(program)) == ["block.attn.sla.proj_weight", "block.attn.sla.proj_bias"]
        (site,) = recorded_sites(program)
        assert site.name == "block.attn" and site.rewritten and site.head_dim == 16, site
        try:
            accelerate_exported(program, lambda name: sla_compile.SLAConfig())
        except RuntimeError as error:
            assert "already" in str(error)
        else:
            raise AssertionError("accelerated twice")
        print("fine")
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "fine"


def test_applying_twice_names_the_first_call():
    program, _ = accelerate_exported(exported(Model(SPELLINGS["sdpa"]), inputs()), choose)
    with pytest.raises(RuntimeError, match=r"accelerated already, by a call at .*test_exported\.py:\d+"):
        accelerate_exported(program, choose)


def test_a_name_that_is_taken_is_an_error():
    class Taken(Model):
        def __init__(self):
            super().__init__(SPELLINGS["sdpa"])
            self.block.attn.sla = nn.Linear(32, 32)

        def forward(self, x):
            return self.block.attn.sla(super().forward(x))

    program = exported(Taken(), inputs())
    with pytest.raises(ValueError, match=r"belong at block\.attn\.sla, but the program has"):
        accelerate_exported(program, choose)


def test_nothing_qualifies():
    program = exported(Model(SPELLINGS["sdpa"]), inputs())
    with pytest.raises(ValueError, match=r"block\.attn: sequence shorter than min_seq_len=4096"):
        accelerate_exported(program, lambda name: CONFIG.replace(min_seq_len=4096))
    same, (site,) = accelerate_exported(program, lambda name: "excluded", allow_no_match=True)
    assert site.reason == "excluded"
    assert same.graph_module.code == program.graph_module.code
