"""The command line: the demo in its quick mode, its checks, and what a user's mistakes lead to."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sla_compile import cli, demo

pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")


def small_model(layers):
    """Wan with two narrow heads instead of demo.build_model's real width."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    return WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=64, ffn_dim=128, num_layers=layers, text_dim=demo.TEXT_DIM
    )


def colors_of(path):
    from matplotlib.image import imread

    return {tuple(round(255 * float(c)) for c in pixel) for row in imread(path)[::2, ::2, :3] for pixel in row}


def test_quick_demo_reports_compares_draws_and_learns(tmp_path, capsys):
    picture = tmp_path / "blocks.png"
    assert cli.main(["demo", "--quick", "--device", "cpu", "--sparsity", "0.5", "--output", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert "1 of 2 attentions rewritten" in printed
    assert "blocks.0.attn1" in printed and "cross-attention" in printed
    assert "220 tokens" in printed and "whole forward" in printed and "relative difference" in printed
    assert "yes: it fell" in printed and "gradients reached 2 of the 2 added parameters" in printed
    # 4 key blocks at 50 %: 2 critical, 2 marginal; 10 % of 4 is no negligible one, which only the legend shows.
    assert {(178, 24, 43), (158, 202, 225), (232, 232, 232)} <= colors_of(picture)


def test_demo_compiles_and_runs_in_low_precision(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "build_model", small_model)
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function) or function)
    compiled = []
    arguments = "demo --device cpu --dtype bfloat16 --frames 1 --height 240 --width 176 --layers 1 --steps 2".split()
    assert cli.main([*arguments, "--output", str(tmp_path / "b.png")]) == 0
    assert len(compiled) == 4, "dense and accelerated, attention and whole model"
    printed = capsys.readouterr().out
    assert "bfloat16" in printed and "both compiled" in printed and "165 tokens" in printed


def test_demo_fails_when_a_parameter_gets_no_gradient(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "build_model", small_model)
    unused = torch.nn.Parameter(torch.zeros(2))
    real = demo.parameters
    monkeypatch.setattr(demo, "parameters", lambda model: [*real(model), unused])
    assert cli.main(["demo", "--quick", "--device", "cpu", "--output", str(tmp_path / "b.png")]) == 1
    assert "no: gradients reached 2 of the 3 added parameters" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--frames", "8"], "frames must be 4 n + 1"),
        (["--height", "100"], "multiples of 16"),
        (["--sparsity", "1.5"], "sparsity must be in (0, 1)"),
        (["--layers", "0"], "at least 1"),
        (["--steps", "1"], "at least 2"),
        (["--frames", "many"], "whole number"),
        (["--dtype", "int8"], "invalid choice"),
        (["--device", "tpu9"], "no such device"),
        (["--device", "meta"], "runs on cpu and cuda"),
        (["--device", "cuda:99"], "CUDA devices"),
        (["--output", "no/such/folder/x.png"], "does not exist"),
        (["--output", "x.jpg"], "must end in .png"),
        (["--unknown"], "unrecognized arguments"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_told_without_traceback(arguments, told, capsys):
    try:
        code = cli.main(["demo", *arguments])
    except SystemExit as stopped:  # argparse's own
        code = stopped.code
    assert code == 2
    error = capsys.readouterr().err
    assert told in error and "Traceback" not in error


def test_missing_compiler_is_told_without_traceback(tmp_path):
    environment = {**os.environ, "CXX": "/no/such/compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    size = "--frames 1 --height 96 --width 96 --layers 1".split()
    command = [
        sys.executable,
        "-m",
        "sla_compile",
        "demo",
        "--device",
        "cpu",
        *size,
        "--output",
        str(tmp_path / "b.png"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parent.parent)
    assert done.returncode == 2, done.stderr
    assert "found no C++ compiler" in done.stderr
    assert "Traceback" not in done.stderr


def test_running_out_of_memory_is_told_without_traceback(monkeypatch, capsys):
    def exhausted(options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")

    monkeypatch.setattr(demo, "run", exhausted)
    assert cli.main(["demo", "--device", "cpu"]) == 2
    assert "CUDA out of memory; give fewer --frames" in capsys.readouterr().err


def test_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == "matplotlib" else object())
    assert cli.main(["demo"]) == 2
    error = capsys.readouterr().err
    assert "matplotlib" in error and "diffusers" not in error and "[demo]" in error


def test_a_command_is_required_and_help_lists_it(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([])
    assert stopped.value.code == 2
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--help"])
    assert stopped.value.code == 0
    assert "demo" in capsys.readouterr().out


def test_module_runs_as_a_script():
    command = [sys.executable, "-m", "sla_compile", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("sla-compile ")
    assert torch.__version__ in done.stdout


@pytest.mark.parametrize(
    ("size", "tokens"), [((81, 480, 832), 32760), ((81, 720, 1280), 75600), ((9, 480, 832), 4680), ((1, 16, 16), 1)]
)
def test_clip_counts_the_tokens_of_wan(size, tokens):
    assert demo.Clip(*size).tokens == tokens


def test_relative_difference():
    expected = torch.tensor([3.0, 4.0])
    assert demo.relative_difference(expected, expected) == 0
    assert demo.relative_difference(torch.tensor([3.0, 4.5]), expected) == pytest.approx(0.1)


def test_captured_attention_is_the_last_self_attention():
    model = small_model(2).eval()
    clip = demo.Clip(1, 96, 96)
    inputs = demo.make_inputs(clip, torch.device("cpu"), torch.float32)
    query, key, value = demo.capture_self_attention(model, inputs)
    assert query.shape == key.shape == value.shape == (1, 2, clip.tokens, 64)
    seen = []
    model.blocks[1].attn1.to_v.register_forward_hook(lambda module, args, output: seen.append(output))
    model(**inputs)
    assert torch.equal(value.transpose(1, 2).flatten(2), seen[0])
