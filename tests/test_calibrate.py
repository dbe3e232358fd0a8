"""calibrate on modules: what it trains and leaves alone, that it resumes, and what it refuses."""

import copy
import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from models import SelfAttention, TinyDiT, build, make_inputs
from torch import nn

import sla_compile
from sla_compile import SLAConfig, calibrate

CONFIG = SLAConfig(method="sla2", sparsity=0.8, min_seq_len=64)
ATTENTIONS = ["blocks.0.attn", "blocks.1.attn"]
TRAINED = ("router_q", "router_k", "alpha_logit")
FAST = dict(steps=4, samples=3, query_blocks=2, progress=False)


def accelerated(config=CONFIG, length=330, **options):
    return sla_compile.accelerate(build(), config=config, example_inputs=make_inputs(length), **options)


def batches(count=4, length=330, batch=1):
    generator = torch.Generator().manual_seed(5)
    return [tuple(torch.randn(2, batch, length, 32, generator=generator).unbind()) for _ in range(count)]


def tensors(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_trains_routers_and_alphas_and_nothing_else():
    model = accelerated().train()
    model.blocks[1].eval()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before, flags = tensors(model), [(m.training, m.__dict__.get("dense")) for m in model.modules()]
    frozen = [parameter.requires_grad for parameter in model.parameters()]
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    result = calibrate(model, batches(), **{**FAST, "steps": 8, "learning_rate": 0.01})
    assert torch.equal(torch.rand(3), expected)
    assert [(m.training, m.__dict__.get("dense")) for m in model.modules()] == flags
    assert [parameter.requires_grad for parameter in model.parameters()] == frozen
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    owners = dict(model.named_modules())
    assert all(owners[name]._sla_redirection.observer is None for name in ATTENTIONS)
    names = changed(before, tensors(model))
    assert names and all(name.rpartition(".")[2] in TRAINED for name in names)
    assert {f"{name}.sla.alpha_logit" for name in ATTENTIONS} <= names
    assert [row.name for row in result] == ATTENTIONS and len(result) == 2


def test_the_report_is_of_the_model_as_it_is():
    model, given = accelerated(), batches()
    start = copy.deepcopy(model)
    result = calibrate(model, given, **{**FAST, "samples": 99})

    def measured(model, site):
        """The error of the held-out calls, from the model itself."""
        wrong = size = 0.0
        for x, _ in given[3:]:  # a quarter of four
            attention = dict(model.named_modules())[site]
            query, key, value = attention.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
            exact = nn.functional.scaled_dot_product_attention(query, key, value)
            wrong += (attention.sla(query, key, value) - exact).double().square().sum().item()
            size += exact.double().square().sum().item()
        return wrong / size

    for module in (model, start):
        module.blocks[0].norm, module.blocks[0].norm_was = nn.Identity(), module.blocks[0].norm
    row = calibrate(copy.deepcopy(start), given, **{**FAST, "samples": 99}).rows[0]
    assert row.samples == 3 and row.held_out == 1 and row.sparsity == 0.8
    with torch.no_grad():
        assert row.before == pytest.approx(measured(start, "blocks.0.attn"), rel=1e-4)
    row = calibrate(start, given, **{**FAST, "samples": 99}).rows[0]
    with torch.no_grad():
        assert row.after == pytest.approx(measured(start, "blocks.0.attn"), rel=1e-4)
    assert row.after < row.before  # alpha fits, if nothing else
    torch.testing.assert_close(torch.tensor(row.alpha), start.blocks[0].attn.sla.alpha.detach().flatten())
    table = str(result)
    assert "blocks.1.attn" in table and "TinyDiT" in table and "3 + 1" in table
    assert json.loads(result.to_json())["sites"][0]["name"] == "blocks.0.attn"


def test_several_sparsities_and_blocks():
    model = accelerated(CONFIG.replace(alpha_per="block"))
    result = calibrate(model, batches(), sparsities=[0.5], **FAST)
    assert [(row.name, row.sparsity) for row in result] == [(name, s) for name in ATTENTIONS for s in (0.8, 0.5)]
    assert model.blocks[0].attn.sla.alpha_logit.shape == (2, 6)
    own = model.blocks[0].attn.sla.alpha.detach().mean(1)
    torch.testing.assert_close(own, torch.tensor(result.rows[0].alpha))
    assert all(len(row.alpha) == 2 for row in result)


def test_batches_come_in_every_form():
    model, (x, context) = accelerated(), batches(1)[0]
    seen = []

    def forward(model, batch):
        seen.append(batch)
        return model(x, context)

    one = calibrate(copy.deepcopy(model), [(x, context)], **FAST)
    two = calibrate(copy.deepcopy(model), iter([dict(x=x, context=context)]), **FAST)
    three = calibrate(copy.deepcopy(model), ["anything"], forward=forward, **FAST)
    assert one == two == three and seen == ["anything"]
    alone = sla_compile.accelerate(SelfAttention().eval(), config=CONFIG, example_inputs=(x,))
    assert calibrate(alone, [x], **FAST).rows[0].name == ""
    assert "(the model itself)" in str(calibrate(alone, [x], **FAST))


def test_a_batch_counts_by_its_entries():
    model = accelerated()
    assert calibrate(model, batches(1, batch=4), **FAST).rows[0].samples == 2  # three kept, one held out


def test_low_precision_parameters():
    model = accelerated().bfloat16()
    given = [tuple(tensor.bfloat16() for tensor in batch) for batch in batches()]
    row = calibrate(model, given, **FAST).rows[0]
    assert model.blocks[0].attn.sla.alpha_logit.dtype == torch.bfloat16
    torch.testing.assert_close(torch.tensor(row.alpha), model.blocks[0].attn.sla.alpha.detach().flatten())


def test_works_inside_other_modes():
    expected = calibrate(accelerated(), batches(), **FAST)
    with torch.no_grad():
        assert calibrate(accelerated(), batches(), **FAST) == expected
    with torch.inference_mode():
        assert calibrate(accelerated(), batches(), **FAST).rows[0].samples == 2
    if torch.__version__ >= "2.13":  # the Adam of 2.11 keeps its count of steps on the default device
        model, given = accelerated(), batches()
        with torch.device("meta"):  # a default device that nothing here is on
            assert calibrate(model, given, **FAST) == expected


def test_takes_what_autocast_has_yet_to_cast():
    """Normalised queries and keys are float32 there, and values are not."""

    class Normed(SelfAttention):
        def forward(self, x):
            query, key, value = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
            attended = nn.functional.scaled_dot_product_attention(query.float(), key.float(), value)
            return self.proj(attended.transpose(1, 2).flatten(2))

    given = [x for x, _ in batches()]
    model = sla_compile.accelerate(Normed().eval(), config=CONFIG, example_inputs=(given[0],))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        row = calibrate(model, given, **FAST).rows[0]
    assert row.after < row.before


def test_blocks_compiled_in_place_are_observed():
    model = accelerated()
    for block in model.blocks:
        block.compile(backend="aot_eager")
    with torch.no_grad():
        model(*batches(1)[0])
    assert calibrate(model, batches(), **FAST) == calibrate(accelerated(), batches(), **FAST)


class Stop(Exception):
    pass


def stopping(given, after):
    for number, batch in enumerate(given):
        if number == after:
            raise Stop
        yield batch


def test_an_interrupted_collection_goes_on(tmp_path):
    expected = accelerated()
    report = calibrate(expected, batches(6), **FAST)
    model = accelerated()
    before = tensors(model)
    with pytest.raises(Stop):
        calibrate(model, stopping(batches(6), 4), folder=tmp_path / "run", **FAST)
    assert not changed(before, tensors(model))
    assert model.blocks[0].attn._sla_redirection.observer is None and not model.blocks[0].attn.sla.dense
    fresh, ran = accelerated(), []
    fresh.register_forward_pre_hook(lambda *_: ran.append(1))
    assert calibrate(fresh, batches(6), folder=tmp_path / "run", **FAST) == report
    assert len(ran) == 2  # four were collected before
    assert not changed(tensors(expected), tensors(fresh))


def test_an_interrupted_training_goes_on(tmp_path, monkeypatch):
    expected = accelerated()
    report = calibrate(expected, batches(), **FAST)
    from sla_compile import router_training

    train, calls = router_training.train, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise Stop
        return train(*arguments)

    monkeypatch.setitem(calibrate.__globals__, "train", interrupted)
    with pytest.raises(Stop):
        calibrate(accelerated(), batches(), folder=tmp_path, **FAST)
    fresh = accelerated()
    assert calibrate(fresh, [], folder=tmp_path, **FAST) == report
    assert len(calls) == 3  # the second attention, again
    assert not changed(tensors(expected), tensors(fresh))
    assert not list(tmp_path.glob("*.part"))


def test_a_folder_belongs_to_one_run(tmp_path):
    calibrate(accelerated(), batches(), folder=tmp_path, **FAST)
    other = accelerated()
    with torch.no_grad():
        other.blocks[0].mlp[0].weight.add_(1)
    before = tensors(other)
    for model, changes, message in (
        (other, {}, "holds another calibration: its weights is"),
        (accelerated(CONFIG.replace(sparsity=0.6)), {}, "holds another calibration: its sites is"),
        (accelerated(exclude="blocks.1*"), {}, "holds another calibration: its sites is"),
        (accelerated(), dict(samples=2), "holds another calibration: its samples is 3, here it is 2"),
        (accelerated(), dict(steps=5), "results trained with steps=4, here 5; delete"),
    ):
        with pytest.raises(ValueError, match=message):
            calibrate(model, batches(), folder=tmp_path, **{**FAST, **changes})
    assert not changed(before, tensors(other))
    for file in tmp_path.glob("result*.safetensors"):
        file.unlink()
    again = calibrate(accelerated(), [], folder=tmp_path, **{**FAST, "steps": 5})  # on the samples that are there
    assert again == calibrate(accelerated(), batches(), **{**FAST, "steps": 5})


def test_refuses_what_it_cannot_calibrate():
    with pytest.raises(ValueError, match="was not accelerated"):
        calibrate(build(), batches(), **FAST)
    with pytest.raises(ValueError, match='none with SLA2.*method="sla2"'):
        calibrate(accelerated(CONFIG.replace(method="sla")), batches(), **FAST)
    with pytest.raises(TypeError, match="takes an nn.Module that was accelerated, got str"):
        calibrate("model", batches(), **FAST)
    with pytest.raises(TypeError, match="calibrate first, then trace"):
        calibrate(torch.fx.symbolic_trace(nn.Linear(2, 2)), batches(), **FAST)
    with pytest.raises(ValueError, match="calibrate before torch.compile"):
        calibrate(torch.compile(accelerated()), batches(), **FAST)
    with pytest.raises(ValueError, match="there are no batches"):
        calibrate(accelerated(), iter(()), **FAST)
    with pytest.raises(TypeError, match="got str"):
        calibrate(accelerated(), ["x"], **FAST)
    with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
        calibrate(accelerated(), batches(), **{**FAST, "samples": 0})
    for wrong in (dict(steps=0), dict(tau=0.0), dict(query_blocks=0), dict(learning_rate=-1.0)):
        (name,) = wrong
        with pytest.raises(ValueError, match=f"{name} must be"):
            calibrate(accelerated(), batches(), **{**FAST, **wrong})
    with pytest.raises(ValueError, match="sparsity must be in"):
        calibrate(accelerated(), batches(), sparsities=[1.5], **FAST)
    with pytest.raises(TypeError, match=r"sparsities must be a sequence of numbers, got 0.5; pass \[0.5\]"):
        calibrate(accelerated(), batches(), sparsities=0.5, **FAST)
    with pytest.raises(ValueError, match="critical_blocks=2 stands in place"):
        calibrate(accelerated(CONFIG.replace(critical_blocks=2)), batches(), sparsities=[0.5], **FAST)
    inputs = tuple(tensor.to("meta") for tensor in make_inputs())
    meta = sla_compile.accelerate(TinyDiT().to("meta"), config=CONFIG, example_inputs=inputs)
    with pytest.raises(ValueError, match="on the meta device"):
        calibrate(meta, batches(), **FAST)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_samples_that_are_not_finite_are_refused(value):
    model, given = accelerated(), batches()
    given[2][0][0, 5] = value
    before = tensors(model)
    with pytest.raises(ValueError, match=r"blocks\.0\.attn: \d+ of the 10560 values of its query are NaN or infinite"):
        calibrate(model, given, **FAST)
    assert not changed(before, tensors(model)) and not model.blocks[0].attn.sla.dense


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("calibration.json", "delete its folder"), ("collected.json", "delete its folder"),
     ("site001-sample000.safetensors", "delete its folder"), ("result000.safetensors", "delete it to train")],
)  # fmt: skip
def test_a_damaged_file_is_named(name, remedy, tmp_path):
    calibrate(accelerated(), batches(), folder=tmp_path, **FAST)
    (tmp_path / "result001.safetensors").unlink()  # as if interrupted before
    file = tmp_path / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ValueError, match=f"{re.escape(str(file))} cannot be read .*; {remedy}"):
        calibrate(accelerated(), batches(), folder=tmp_path, **FAST)


def test_an_attention_that_never_ran_is_named():
    model = accelerated()
    with pytest.raises(ValueError, match="blocks.0.attn never ran.*shorter than min_seq_len"):
        calibrate(model, batches(length=40), **FAST)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it ran without calling attention is told besides
        model.blocks[1] = nn.Sequential(model.blocks[1])
        model.blocks[1].forward = lambda x, context: x
        with pytest.raises(ValueError, match="was not accelerated|blocks.1.*never ran.*was not called"):
            calibrate(model, batches(), **FAST)


def test_another_length_than_alphas_is_named():
    model = accelerated(CONFIG.replace(alpha_per="block"))
    with pytest.raises(ValueError, match="blocks.0.attn: alpha"):
        calibrate(model, batches(length=500), **FAST)
    assert not model.blocks[0].attn.sla.dense


def test_the_page_tells_the_truth(tmp_path, monkeypatch):
    page = (Path(__file__).parent.parent / "docs" / "sla2.md").read_text()
    (program,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    for there, here in (("sparsity=0.95", "sparsity=0.8, min_seq_len=64"), ("batches)", "batches, **fast)")):
        assert there in program
        program = program.replace(there, here)
    monkeypatch.chdir(tmp_path)
    names = dict(torch=torch, model=build(), batches=batches(), training_data=batches(2), fast=FAST)
    names["loss_of"] = lambda model, batch: model(*batch).square().mean()
    before = tensors(names["model"])
    exec(compile(program, "docs/sla2.md", "exec"), names)
    after = tensors(names["model"])
    assert [row.name for row in names["report"]] == ATTENTIONS
    assert "blocks.0.attn.qkv.weight" in {name for name in before if not torch.equal(before[name], after[name])}
    assert (tmp_path / "sla2.safetensors").is_file()


def test_progress_goes_to_stderr(capsys):
    calibrate(accelerated(), batches(), **{**FAST, "progress": True})
    told = capsys.readouterr()
    assert told.out == ""
