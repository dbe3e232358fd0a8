"""The definition of the low-bit operands, and what smoothing the keys is worth."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sla_compile.kernels import quantize
from sla_compile.kernels.smoothing import token_mean

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "low_bit_error.py"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_int8_is_within_half_a_step(dtype: torch.dtype) -> None:
    tokens = torch.randn(2, 3, 100, 24).to(dtype)
    integers, scales = quantize.quantize_blocks(tokens, 64)
    assert integers.dtype == torch.int8 and integers.shape == tokens.shape
    assert scales.shape == (2, 3, 2) and scales.dtype == torch.promote_types(dtype, torch.float32)
    steps = scales.repeat_interleave(64, 2)[:, :, :100, None]
    # Half a step, and a rounding of the quotient, which is at most 127.
    assert ((integers * steps - tokens).abs() <= steps * (0.5 + 127 * torch.finfo(scales.dtype).eps)).all()
    # Every block reaches its own largest magnitude: the ragged one, too.
    assert [integers[:, :, part].abs().amax().item() for part in (slice(0, 64), slice(64, 100))] == [127, 127]


def test_halves_go_to_even() -> None:
    tokens = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -3.5, 126.5]).view(1, 1, 8, 1)
    integers, scales = quantize.quantize_blocks(tokens, 64)
    assert scales.item() == 1 and integers.flatten().tolist() == [127, 0, 2, 2, 0, -2, -4, 126]


def test_zeros_have_a_scale_and_nan_is_seen() -> None:
    integers, scales = quantize.quantize_blocks(torch.zeros(1, 1, 64, 4), 64)
    assert not integers.any() and scales.isfinite().all() and (scales > 0).all()
    tokens = torch.ones(1, 1, 128, 4)
    tokens[0, 0, 70, 1] = torch.nan
    _, scales = quantize.quantize_blocks(tokens, 64)
    assert scales.isnan().flatten().tolist() == [False, True]
    assert quantize.channel_scales(tokens).isnan().flatten().tolist() == [False, True, False, False]


def test_masked_tokens_move_no_scale() -> None:
    tokens = torch.randn(1, 2, 100, 8)
    bias = torch.zeros(1, 100)
    bias[0, 60:70] = -torch.inf
    outlier = tokens.clone()
    outlier[:, :, 60:70] = 1e6
    for scales in (
        lambda t: quantize.quantize_blocks(t, 64, mean=token_mean(t, bias), key_bias=bias)[1],
        lambda t: quantize.quantize_channels(t, key_bias=bias)[1],
        lambda t: token_mean(t, bias),
    ):
        assert torch.equal(scales(tokens), scales(outlier))
    kept = bias[0] == 0
    torch.testing.assert_close(token_mean(tokens, bias), tokens[:, :, kept].mean(2))
    nobody = torch.full((1, 100), -torch.inf)
    assert not token_mean(tokens, nobody).any()


def test_channels_reach_the_largest_number_and_no_further() -> None:
    value = torch.randn(2, 2, 300, 16, dtype=torch.bfloat16) * 10.0 ** torch.arange(-8, 8)
    low, scales = quantize.quantize_channels(value)
    assert low.dtype == torch.float8_e4m3fn and scales.shape == (2, 2, 16)
    assert (low.float().abs().amax(2) == 448).all()
    error = (low.float() * scales[:, :, None] - value.float()).abs()
    # Half of a step of 2^-3, below 2^-6 of a step of 2^-9.
    assert (error <= value.float().abs() * 2.0**-4 + scales[:, :, None] * 2.0**-10).all()


class Divisors(TorchDispatchMode):
    """What is divided by."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._overloadpacket is torch.ops.aten.div:
            self.found.append(args[1])
        return func(*args, **(kwargs or {}))


def test_scales_of_channels_are_quotients_on_a_gpu_too() -> None:
    """There PyTorch divides by a number, or by a tensor on the CPU, as it multiplies by the rounded inverse."""
    with Divisors() as divisors:
        scales = quantize.channel_scales(torch.empty(1, 2, 30, 16, dtype=torch.bfloat16, device="meta"))
    assert scales.dtype == torch.float32 and scales.shape == (1, 2, 16)
    assert [isinstance(divisor, torch.Tensor) and divisor.is_meta for divisor in divisors.found] == [True]


def test_probabilities_round_alike_whatever_the_reference() -> None:
    exponents = -14 * torch.rand(10000, dtype=torch.float64)
    rounded = quantize.quantize_probabilities(exponents).double()
    for shift in (1, 3):
        later = quantize.quantize_probabilities(exponents - shift).double() * 2.0**shift
        normal = 448 * (exponents - shift).exp2() >= 2.0**-6
        assert normal.any() and torch.equal(later[normal], rounded[normal])
    assert quantize.quantize_probabilities(torch.zeros(1)).item() == 448


def test_smoothing_takes_the_keys_offset_out(capsys: pytest.CaptureFixture[str]) -> None:
    specification = importlib.util.spec_from_file_location("low_bit_error", SCRIPT)
    script = importlib.util.module_from_spec(specification)
    kept = list(sys.path)
    try:
        specification.loader.exec_module(script)
        found = {
            outliers: {name: error for name, (error, _) in row.items()}
            for outliers, row in script.table(400, 64, 2, 0.3)
        }
        assert script.main(["--length", "100", "--dim", "32", "--heads", "1"]) == 0
    finally:
        sys.path[:] = kept
    assert capsys.readouterr().out.count("|") > 6 * 6
    plain, offset = found["none"], found["key channels"]
    for low_bit in ("int8", "fp8"):
        # Smoothed, an offset costs what no offset costs; not smoothed, it costs more.
        assert offset[low_bit] == pytest.approx(plain[low_bit], rel=0.15)
        assert offset[f"{low_bit}, not smoothed"] > 1.15 * offset[low_bit]
        assert found["key tokens"]["bf16"] < plain[low_bit] < 0.1
        # One scale for each channel of V: an outlier among them costs nothing.
        assert found["value channels"][low_bit] < 1.15 * plain[low_bit]
    assert plain["bf16"] < plain["int8"] < plain["fp8"]
