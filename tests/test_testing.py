"""What users' CI relies on: the checks pass on what is right, and each kind of wrong is caught and told."""

import argparse
import json
import re
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
from models import CrossAttention, SelfAttention, TinyDiT, build, make_inputs
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import sla_compile
from sla_compile import SLAConfig
from sla_compile.checks import add_check_parser, add_inspect_parser
from sla_compile.testing import (
    assert_accurate,
    assert_captured,
    assert_rewritten,
    error_over_budget,
    reference,
)

pytest_plugins = "pytester"

ROOT = Path(__file__).parent.parent
CONFIG = SLAConfig(sparsity=0.8, min_seq_len=64)
ATTENTIONS = ["blocks.0.attn", "blocks.1.attn"]


def accelerated(**options):
    return sla_compile.accelerate(build(**options), config=CONFIG)


@pytest.fixture
def no_ci(monkeypatch):
    monkeypatch.delenv("CI", raising=False)


# ---- assert_rewritten ------------------------------------------------------------------------------------------------


def only_first(report):
    return [row.name for row in report.rewritten] == ATTENTIONS[:1]


@pytest.mark.parametrize("examples", [None, make_inputs()], ids=["structure", "inputs"])
@pytest.mark.parametrize("made", ["planned", "accelerated"])
def test_expectations(made, examples):
    model = accelerated() if made == "accelerated" else build()
    arguments = {} if made == "accelerated" else {"config": CONFIG}
    before = [(name, type(module)) for name, module in model.named_modules()], list(model.state_dict())
    for expect in (None, 2, "*.attn", ATTENTIONS, lambda report: len(report.dense) == 2):
        report = assert_rewritten(model, examples, expect=expect, **arguments)
        assert [row.name for row in report.rewritten] == ATTENTIONS
        assert report.rewritten[0].shape == ("(1, 2, 200, 16)" if examples else "")
    for expect, told in (
        (3, "expected 3 rewritten attentions, found 2\n  blocks.0.attn and 1 more"),
        ("blocks.0.*", "expected to be rewritten, but dense:\n  blocks.0.text"),
        ("blocks.0.attn", "rewritten, but not expected:\n  blocks.1.attn"),
        (["*.attn", "mid.*"], r"no attention 'mid.\*'"),
        (only_first, "does not satisfy <function only_first"),
    ):
        with pytest.raises(AssertionError, match=told):
            assert_rewritten(model, examples, expect=expect, **arguments)
    assert ([(name, type(module)) for name, module in model.named_modules()], list(model.state_dict())) == before


def test_nothing_rewritten_fails_by_default():
    with pytest.raises(
        AssertionError, match=r"(?s)no attention of TinyDiT is rewritten.*sequence shorter than min_seq_len"
    ):
        assert_rewritten(build(), make_inputs())
    assert_rewritten(build(), make_inputs(), expect=0)
    with pytest.raises(TypeError, match="bool"):
        assert_rewritten(build(), make_inputs(), expect=True)


def test_a_model_on_the_meta_device_takes_real_inputs():
    with torch.device("meta"):
        model = TinyDiT().eval()
    assert assert_rewritten(model, make_inputs(), expect=2, config=CONFIG).rows[0].shape == "(1, 2, 200, 16)"
    sla_compile.accelerate(model, config=CONFIG)
    assert assert_rewritten(model, make_inputs(), expect=2).rows[0].shape == "(1, 2, 200, 16)"
    assert all(parameter.is_meta for parameter in model.parameters())


def test_arguments_of_accelerate_are_for_models_that_are_not():
    with pytest.raises(ValueError, match="accelerated already: config, include would say"):
        assert_rewritten(accelerated(), config=CONFIG, include="*")
    with pytest.raises(ValueError, match=r"include pattern 'mid.\*' matches no attention"):
        assert_rewritten(build(), config=CONFIG, include=["mid.*"])
    with pytest.raises(TypeError, match="got function"):
        assert_rewritten(test_expectations)
    with pytest.raises(ValueError, match="does not run with these example_inputs"):
        assert_rewritten(accelerated(), make_inputs(dim=31))


def test_short_inputs_make_an_accelerated_model_dense_and_say_why():
    report = assert_rewritten(accelerated(), make_inputs(60), expect=0)
    assert report.rows[0].reason == "sequence shorter than min_seq_len=64"


class HandWritten(SelfAttention):
    """As another attention backend: no call of scaled_dot_product_attention."""

    def forward(self, x, mask=None):
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        attended = (
            (query @ key.mT).softmax(-1) @ value if self.by_hand else F.scaled_dot_product_attention(query, key, value)
        )
        return self.proj(attended.transpose(1, 2).flatten(2))


def test_silently_dense_models_are_caught():
    replaced = accelerated()
    replaced.blocks[1].attn = SelfAttention()
    with pytest.raises(AssertionError, match=r"silently dense:\n  blocks.1.attn: its redirect is gone"):
        assert_rewritten(replaced, expect=1)

    bypassed = build()
    bypassed.blocks[0].attn = HandWritten()
    bypassed.blocks[0].attn.by_hand = False
    sla_compile.accelerate(bypassed, config=CONFIG)
    assert_rewritten(bypassed, make_inputs(), expect=2)
    bypassed.blocks[0].attn.by_hand = True
    with pytest.raises(AssertionError, match=r"silently dense:\n  blocks.0.attn: ran without calling"):
        assert_rewritten(bypassed, make_inputs(), expect=1)

    added = accelerated()
    added.blocks[1].mlp.append(SelfAttention())
    with pytest.raises(
        AssertionError, match=r"blocks.1.mlp.3 \(1, 2, 200, 16\): not found when the model was accelerated"
    ):
        assert_rewritten(added, make_inputs(), expect=2)


class Wrapper(nn.Module):
    """As peft wraps a model."""

    def __init__(self, model):
        super().__init__()
        self.base = model

    def forward(self, x, context):
        return self.base(x, context)


def test_wrapped_and_compiled_models_are_looked_into():
    report = assert_rewritten(Wrapper(accelerated()), make_inputs(), expect="base.*.attn")
    assert [row.name for row in report.rewritten] == [f"base.{name}" for name in ATTENTIONS]
    assert_rewritten(torch.compile(accelerated()), make_inputs(), expect=ATTENTIONS)


@pytest.mark.parametrize("wrap", [lambda block: torch.compile(block, backend="eager"), checkpoint_wrapper])
def test_blocks_wrapped_one_by_one_are_looked_into(wrap):
    model = accelerated()
    for i, block in enumerate(model.blocks):
        model.blocks[i] = wrap(block)
    assert_rewritten(model, make_inputs(), expect=ATTENTIONS)
    assert_captured(model, [make_inputs()])


class ReadsValues(TinyDiT):
    def forward(self, x, context):
        return super().forward(x, context) * x.mean().item()


def test_a_model_that_reads_values_runs_itself():
    model = sla_compile.accelerate(ReadsValues().train(), config=CONFIG)
    assert_rewritten(model, make_inputs(), expect=2)
    assert model.blocks[0].attn.training and not hasattr(model.blocks[0].attn._sla_redirection, "reasons")
    with torch.device("meta"), pytest.raises(ValueError, match="reads tensor values"):
        assert_rewritten(sla_compile.accelerate(ReadsValues(), config=CONFIG), make_inputs())


def test_owners_inside_of_owners_and_multi_head_attention():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.num_heads, self.to_q, self.inner = 2, nn.Linear(32, 32), CrossAttention()
            self.packed = nn.MultiheadAttention(32, 2, batch_first=True)

        def forward(self, x):
            x = x + self.inner(x, x[:, :40])
            x = x + self.packed(x, x, x, need_weights=False)[0]
            query = self.to_q(x).unflatten(-1, (2, -1)).transpose(1, 2)
            return x + F.scaled_dot_product_attention(query, query, query).transpose(1, 2).flatten(2)

    inputs = make_inputs()[:1]
    planned = assert_rewritten(Outer(), inputs, config=CONFIG, expect=["", "packed"])
    model = sla_compile.accelerate(Outer(), config=CONFIG, example_inputs=inputs)
    verified = assert_rewritten(model, inputs, expect=["", "packed"])
    assert {row.name: row.shape for row in verified} == {row.name: row.shape for row in planned}
    assert [row.reason for row in verified.dense] == ["cross-attention: as many keys as queries are needed"]


def test_graphs_and_exported_programs():
    program = torch.export.export(build(), make_inputs())
    for graph in (program, program.module()):
        report = assert_rewritten(graph, make_inputs(), config=CONFIG, expect="*.attn")
        assert len(report) == 4 and report.rows[0].shape == "(1, 2, 200, 16)"
        with pytest.raises(AssertionError, match="found 2"):
            assert_rewritten(graph, config=CONFIG, expect=3)
    rewritten = sla_compile.accelerate(program, config=CONFIG)
    assert len(assert_rewritten(rewritten, expect=2)) == 4
    with pytest.raises(ValueError, match="accelerated already: sparsity"):
        assert_rewritten(rewritten, sparsity=0.9)
    captured = torch.export.export(accelerated(), make_inputs())
    report = assert_rewritten(captured, expect="*.attn*")
    assert [row.reason for row in report.dense] == ["dense when it was captured"] * 2


@pytest.mark.parametrize("options", [{}, {"method": "sla2", "pinned": (3, 70)}], ids=["sla", "sla2"])
def test_snapshots_of_captured_and_rewritten_graphs_hold_the_configuration(tmp_path, options):
    def captured(config):
        return torch.export.export(sla_compile.accelerate(build(), config=config), make_inputs())

    def rewritten(config):
        return sla_compile.accelerate(torch.export.export(build(), make_inputs()), config=config)

    config = CONFIG.replace(**options)
    for graph, minimum in ((captured, 1), (rewritten, CONFIG.min_seq_len)):  # the op takes every length
        path = tmp_path / f"{graph.__name__}.json"
        assert_rewritten(graph(config), snapshot=path, update=True)
        kept = json.loads(path.read_text())
        assert kept["configurations"] == {"A": config.replace(min_seq_len=minimum).to_dict()}
        assert [row["becomes"] for row in kept["attentions"]].count("sparse-linear A") == 2
        with pytest.raises(AssertionError, match="differs from its snapshot"):
            assert_rewritten(graph(config.replace(critical_blocks=2)), snapshot=path)


# ---- snapshots -------------------------------------------------------------------------------------------------------


def test_snapshot_is_written_once_and_compared(tmp_path, no_ci):
    path = tmp_path / "new" / "dit.json"
    with pytest.raises(AssertionError, match="written now; look at it and commit it"):
        assert_rewritten(build(), make_inputs(), config=CONFIG, snapshot=path)
    assert_rewritten(build(), make_inputs(), config=CONFIG, snapshot=path)
    text = path.read_text()
    values = json.loads(text)
    assert values["model"] == "TinyDiT" and [row["name"] for row in values["attentions"]][::2] == ATTENTIONS
    assert values["configurations"] == {"A": CONFIG.to_dict()} and text.endswith("}\n")
    assert sum('"name"' in line for line in text.splitlines()) == len(values["attentions"]) == 4
    # A model that is accelerated decides the same.
    model = sla_compile.accelerate(build(), config=CONFIG, example_inputs=make_inputs())
    assert_rewritten(model, make_inputs(), snapshot=path)


def test_snapshot_mismatch_shows_a_diff_and_updates(tmp_path, no_ci):
    path = tmp_path / "dit.json"
    assert_rewritten(build(), make_inputs(), config=CONFIG, snapshot=path, update=True)
    kept = path.read_text()
    other = dict(config=CONFIG, per_site={"blocks.0.*": CONFIG.replace(sparsity=0.5), "blocks.1.*": None})
    with pytest.raises(AssertionError) as caught:
        assert_rewritten(build(), make_inputs(), snapshot=path, **other)
    changed = [line for line in str(caught.value).splitlines() if line[:2] in ("- ", "+ ")]
    assert len([line for line in changed if '"blocks.1.attn"' in line]) == 2
    assert any('"sparsity": 0.5' in line for line in changed) and "--sla-update-snapshots" in str(caught.value)
    assert path.read_text() == kept
    assert_rewritten(build(), make_inputs(), snapshot=path, update=True, **other)
    assert_rewritten(build(), make_inputs(), snapshot=path, **other)
    assert [entry.name for entry in tmp_path.iterdir()] == ["dit.json"]


def test_configurations_are_told_once_each(tmp_path):
    path = tmp_path / "dit.json"
    per_site = {"blocks.1.*": CONFIG.replace(sparsity=0.5)}
    assert_rewritten(build(depth=3), make_inputs(), config=CONFIG, per_site=per_site, snapshot=path, update=True)
    values = json.loads(path.read_text())
    assert [c["sparsity"] for c in values["configurations"].values()] == [0.8, 0.5]
    assert [row["becomes"] for row in values["attentions"]][::2] == [f"sparse-linear {letter}" for letter in "ABA"]


def test_no_snapshot_is_made_up_in_ci(tmp_path, monkeypatch):
    monkeypatch.setenv("CI", "true")
    path = tmp_path / "dit.json"
    with pytest.raises(AssertionError, match="none is written under CI"):
        assert_rewritten(build(), config=CONFIG, snapshot=path)
    assert not path.exists()
    assert_rewritten(build(), config=CONFIG, snapshot=path, update=True)
    assert_rewritten(build(), config=CONFIG, snapshot=path)


@pytest.mark.parametrize("update", [False, True])
def test_files_of_others_are_refused(tmp_path, update):
    path = tmp_path / "dit.json"
    for text, told in (
        ("{}", "is not a snapshot of sla_compile"),
        ("hello", "is not a snapshot of sla_compile"),
        ("[1]", "is not a snapshot of sla_compile"),
        ('{"sla_compile": 1, "model": "Other"}', "is the snapshot of a Other, not of a TinyDiT"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=told):
            assert_rewritten(build(), config=CONFIG, snapshot=path, update=update)
        assert path.read_text() == text
    path.write_text('{"sla_compile": 99, "model": "TinyDiT"}')
    if update:
        assert_rewritten(build(), config=CONFIG, snapshot=path, update=True)
        assert_rewritten(build(), config=CONFIG, snapshot=path)
    else:
        with pytest.raises(ValueError, match="has format 99, this version"):
            assert_rewritten(build(), config=CONFIG, snapshot=path)


# ---- assert_captured -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [None, True, False])
def test_captured_models_pass(dynamic):
    lengths = (200, 330, 577)
    assert_captured(accelerated(), [make_inputs(length) for length in lengths], dynamic=dynamic)


def test_captured_training_with_checkpointed_blocks_passes():
    assert_captured(accelerated(checkpointing=True).train(), [make_inputs()])


def test_captured_on_the_meta_device():
    with torch.device("meta"):
        model, inputs = TinyDiT().eval(), [make_inputs(), make_inputs(330)]
    assert_captured(sla_compile.accelerate(model, config=CONFIG), inputs)


class Untraceable(TorchFunctionMode):
    """No torch traces it in one graph; unflatten under torch.device(...), the usual case, is traced from 2.15 on."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        torch._dynamo.graph_break()
        return func(*args, **(kwargs or {}))


def test_modes_that_are_traced_too_are_named():
    model = accelerated()
    with torch.no_grad():
        assert_captured(model, [make_inputs()])
        with Untraceable(), pytest.raises(AssertionError, match="outside of Untraceable"):
            assert_captured(model, [make_inputs()])


class CheckpointInside(SelfAttention):
    """Dynamo traces what is under a checkpoint without the redirect that stands outside of it."""

    def forward(self, x, mask=None):
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        attended = checkpoint(F.scaled_dot_product_attention, query, key, value, use_reentrant=False)
        return self.proj(attended.transpose(1, 2).flatten(2))


def test_a_checkpoint_inside_an_owner_is_caught():
    model = sla_compile.accelerate(nn.Sequential(CheckpointInside(), SelfAttention()), config=CONFIG)
    assert_rewritten(model, make_inputs()[:1], expect=2)  # in eager mode all is well
    with pytest.raises(AssertionError, match=r"  0: 1 calls of the op in eager mode and 0 in the graph.* 0 and 1\n"):
        assert_captured(model, [make_inputs()[:1]])
    with pytest.raises(AssertionError, match="2 calls of the op in eager mode, 1 in the graphs"):
        assert_captured(model, [make_inputs()[:1]], fullgraph=False)


class Breaks(TinyDiT):
    def forward(self, x, context):
        x = super().forward(x, context)
        torch._dynamo.graph_break()
        return super().forward(x, context)


def test_graph_breaks():
    model = sla_compile.accelerate(Breaks().eval(), config=CONFIG)
    with pytest.raises(AssertionError, match="does not capture as one graph"):
        assert_captured(model, [make_inputs()])
    assert_captured(model, [make_inputs()], fullgraph=False)


class DataDependent(TinyDiT):
    def forward(self, x, context):
        return super().forward(x[:, : context.argmax()] if context.argmax() > 3 else x, context)


def test_guards_on_data():
    model = sla_compile.accelerate(DataDependent().eval(), config=CONFIG)
    with pytest.raises(AssertionError, match="does not capture as one graph"), torch.no_grad():
        assert_captured(model, [make_inputs()])


def test_recompiles_are_caught():
    with pytest.raises(AssertionError, match=r"one of these inputs is captured anew(?s:.*)min_seq_len"):
        assert_captured(accelerated(), [make_inputs(200), make_inputs(330), make_inputs(40)])
    with pytest.raises(AssertionError, match=r"one of these inputs is captured anew(?s:.*)min_seq_len"):
        assert_captured(accelerated(), [make_inputs(200), make_inputs(40)], dynamic=True)


class FillsTable(TinyDiT):
    """As a model that makes its rotary tables when it first runs."""

    table = None

    def forward(self, x, context):
        if self.table is None:
            self.table = torch.ones(32)
        return super().forward(x * self.table, context)


def test_tables_that_the_first_run_fills_are_no_recompile():
    model = sla_compile.accelerate(FillsTable().eval(), config=CONFIG)
    with torch.no_grad():
        assert_captured(model, [make_inputs()])


def test_captured_refuses_what_it_cannot_check():
    with pytest.raises(ValueError, match="accelerate this TinyDiT first"):
        assert_captured(build(), [make_inputs()])
    for inputs_list in (make_inputs()[0], dict(x=1), [], None):
        with pytest.raises(TypeError, match="must be a list of example inputs"):
            assert_captured(accelerated(), inputs_list)


# ---- accuracy --------------------------------------------------------------------------------------------------------


def test_reference_and_budget():
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 2, 4, 300, 32, generator=generator).bfloat16().unbind()
    key, value = key[:, :2], value[:, :2]
    weight, bias = torch.randn(32, 32, generator=generator) / 6, torch.randn(32, generator=generator)
    mask = torch.ones(2, 1, 1, 300, dtype=torch.bool)
    mask[1, ..., 200:] = False
    options = dict(config=CONFIG, proj_weight=weight, proj_bias=bias, key_padding_mask=mask, scale=0.3)
    block_map = sla_compile.route(query, key, config=CONFIG, key_padding_mask=mask, scale=0.3, enable_gqa=True)
    result = sla_compile.sparse_linear_attention(query, key, value, enable_gqa=True, **options)
    exact = reference(query, key, value, **options)
    assert exact.dtype == torch.float64 and torch.equal(
        exact, reference(query, key, value, block_map=block_map, **options)
    )
    # The plain formula in bfloat16 is not at hand here: rounding alone is the stricter budget.
    assert_accurate(result, exact, exact.bfloat16(), tokens=300)
    wrong = reference(query, key, value, **options | {"scale": 0.4})
    with pytest.raises(AssertionError, match=r"bfloat16 result of shape .* is off by"):
        assert_accurate(wrong.bfloat16(), exact, exact.bfloat16(), tokens=300)
    with pytest.raises(AssertionError, match="not finite"):
        assert_accurate(result * torch.nan, exact, exact.bfloat16(), tokens=300)


def test_budget_is_what_its_formula_says():
    exact = torch.tensor([4.0, 1.0], dtype=torch.float64)
    eager, result = torch.tensor([4.0, 1.5]), torch.tensor([4.0, 2.0])
    eps = torch.finfo(torch.float32).eps
    assert error_over_budget(result, exact, eager, tokens=9) == pytest.approx(1 / (1 + 4 * 4 * eps))
    assert error_over_budget(exact.float(), exact, eager, tokens=9) == 0
    assert error_over_budget(result, exact, exact.float(), tokens=9, scale=100) == pytest.approx(1 / (400 * eps))


def test_example(capsys):
    pytest.importorskip("diffusers")
    spec = spec_from_file_location("example_check_rewrites", ROOT / "examples" / "check_rewrites.py")
    example = module_from_spec(spec)
    spec.loader.exec_module(example)
    report = example.main(["--small"])
    assert [row.name for row in report.rewritten] == ["blocks.0.attn1", "blocks.1.attn1"]
    assert "2 of 4 attentions rewritten" in capsys.readouterr().out


def test_documentation(tmp_path, monkeypatch, no_ci):
    pytest.importorskip("diffusers")
    text = (ROOT / "docs" / "checks.md").read_text()
    names = {}
    exec(re.search(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)[1], names)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssertionError, match="written now"):
        names["test_wan"]()
    names["test_wan"]()
    snapshot = (tmp_path / "tests" / "wan.json").read_text()
    shown = [line.strip() for line in text.splitlines() if line.startswith('        {"name"')]
    assert len(shown) == 2 and all(line.partition('"why"')[0] in snapshot for line in shown)
    workflow = (ROOT / "docs" / "github_actions.yml").read_text()
    for command in re.findall(r"sla-compile (\w+ .*?)(?:  +#.*)?$", text + workflow, re.MULTILINE):
        if ":build" in command:
            parser = argparse.ArgumentParser()
            commands = parser.add_subparsers()
            add_check_parser(commands), add_inspect_parser(commands)
            assert parser.parse_args(command.split()).build == "models.py:build"


# ---- the pytest plugin -----------------------------------------------------------------------------------------------

USER_TEST = """
import pytest, torch
from torch import nn
from torch.nn import functional as F

class Attention(nn.Module):
    num_heads = 2
    def __init__(self):
        super().__init__()
        self.num_heads, self.qkv = 2, nn.Linear(8, 24)
    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v)

@pytest.mark.parametrize("length", [5000, 6000])
def test_dit(sla_snapshot, length):
    sla_snapshot(Attention(), (torch.empty(1, length, 8),), sparsity=SPARSITY)
    sla_snapshot(Attention(), name="structure", expect=1)

class TestWide:
    def test_dit(self, sla_snapshot):
        sla_snapshot(Attention(), name="../structure", sparsity=SPARSITY)
"""


def test_plugin(pytester, monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.syspath_prepend(str(ROOT))
    pytester.makepyfile(test_models=USER_TEST.replace("SPARSITY", "0.9"))

    def outcomes(*arguments):
        run = pytester.runpytest_inprocess("-p", "sla_compile_pytest", "-p", "no:cacheprovider", *arguments)
        return run.parseoutcomes(), run.stdout.str()

    assert outcomes("--sla-update-snapshots")[0] == {"passed": 3}
    folder = pytester.path / "__sla_snapshots__" / "test_models"
    names = {f"test_dit-{length}{kind}.json" for length in (5000, 6000) for kind in ("", ".structure")}
    assert {path.name for path in folder.iterdir()} == {*names, "TestWide-test_dit...-structure.json"}
    pytester.makepyfile(test_models=USER_TEST.replace("SPARSITY", "0.8"))
    counts, text = outcomes()
    assert counts == {"failed": 3} and '"sparsity": 0.8' in text and "--sla-update-snapshots" in text


def test_plugin_does_not_load_torch():
    program = "import sys, sla_compile_pytest; assert not {'torch', 'sla_compile'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
