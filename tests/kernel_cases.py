"""Cases for the Triton kernels, and one run of a case against the float64 reference with a derived error budget.

As a script it reads cases as JSON lines and answers with a JSON line each: the worker that runs kernels in Triton's
interpreter, in a process of its own because an access out of bounds ends the process there.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
TF32_EPS = 2.0**-10
NAMES = ("output", "logsumexp", "grad_query", "grad_key", "grad_value", "grad_weight", "grad_bias")


@dataclass(frozen=True)
class Case:
    """One call of the kernels, drawn from `seed`."""

    length: int = 100
    dim: int = 32
    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    dtype: str = "fp32"
    linear: str = "marginal"
    feature_map: str = "softmax"
    # alpha: "" (SLA) or SLA2's, for each "block", each "head" (with strides of 0), or "extreme" (0, nearly 0, nearly 1)
    alpha: str = ""
    low_bit: str = "none"
    block_q: int = 64
    block_k: int = 64
    # blocks: random | critical | marginal | negligible (only critical and negligible) | none (rows without critical)
    blocks: str = "random"
    # layout: blhd | bhld | packed | padded (surrounded by NaN) | spread (last stride 3, NaN between)
    layout: str = "blhd"
    # grad: same (layout) | expanded (all strides 0)
    grad: str = "same"
    # mask: "" | keys (some at -inf) | additive | row (a batch entry without any key)
    mask: str = ""
    proj_dtype: str = "fp32"
    bias: bool = True
    scale: float | None = None
    magnitude: float = 1.0
    # Added to the first channel of all keys.
    key_offset: float = 0.0
    # Whose tiles are interpreted: this architecture's; "shipped" leaves the small ones small, which is slow.
    arch: int | str = 90
    shipped: bool = False
    # Launches are tuned, and of a kernel's candidates for that, counted around, this one is the fastest.
    candidate: int | None = None
    wide: bool = False
    chunk_bytes: int | None = None
    seed: int = 0

    def __str__(self) -> str:
        parts = [f"B{self.batch}-H{self.heads}-L{self.length}-D{self.dim}-{self.dtype}"]
        for name, value in asdict(self).items():
            if name not in ("batch", "heads", "length", "dim", "dtype") and value != getattr(Case(), name):
                parts.append(f"{name}={value}")
        return "-".join(parts)


def tokens(case: Case, heads: int, which: int, generator: torch.Generator) -> Tensor:
    """(B, heads, L, D) normal values in the case's dtype and layout; what surrounds them is NaN."""
    shape = case.batch, case.length, heads, case.dim
    values = (torch.randn(shape, generator=generator) * case.magnitude).to(DTYPES[case.dtype])
    if case.layout == "bhld":
        return values.transpose(1, 2).contiguous()
    if case.layout == "packed":  # one of seven in a (B, L, 7, H, D) tensor
        base = torch.full((*shape[:2], 7, *shape[2:]), torch.nan, dtype=values.dtype)
        view = base[:, :, which]
    elif case.layout == "padded":
        base = torch.full((shape[0], shape[1] + 200, shape[2], shape[3] + 7), torch.nan, dtype=values.dtype)
        view = base[:, 100 : 100 + shape[1], :, 3 : 3 + shape[3]]
    elif case.layout == "spread":
        base = torch.full((*shape, 3), torch.nan, dtype=values.dtype)
        view = base[..., 1]
    else:
        view = torch.empty(shape, dtype=values.dtype)
    view.copy_(values)
    return view.transpose(1, 2)


def block_map(case: Case, generator: torch.Generator) -> Tensor:
    """int8 (B, H, T_m, T_n); the number of critical blocks differs between rows."""
    shape = case.batch, case.heads, -(-case.length // case.block_q), -(-case.length // case.block_k)
    classes = torch.randint(-1, 2, shape, generator=generator, dtype=torch.int8)
    if case.blocks == "critical":
        classes.fill_(1)
    elif case.blocks == "marginal":
        classes.clamp_(min=0)
    elif case.blocks == "negligible":
        classes[classes == 0] = -1
    if case.blocks == "none":
        classes[:, :, ::2].clamp_(max=0)
    else:
        picked = torch.randint(shape[-1], shape[:-1], generator=generator)
        classes.scatter_(-1, picked[..., None], 1)
        if case.blocks in ("random", "marginal") and shape[-1] > 1:  # every other row has a marginal block for certain
            classes[:, :, ::2].scatter_(-1, (picked[:, :, ::2, None] + 1) % shape[-1], 0)
    return classes


def key_bias(case: Case, generator: torch.Generator) -> Tensor | None:
    """(B, L) float32, at most 0."""
    if not case.mask:
        return None
    bias = torch.zeros(case.batch, case.length)
    drawn = torch.rand(case.batch, case.length, generator=generator)
    if case.mask == "additive":
        return -3 * drawn + 3 * drawn.min()
    bias[drawn < 0.4] = -torch.inf
    bias[:, : min(70, case.length // 2)] = -torch.inf  # a whole block, and a ragged edge inside the next
    if case.mask == "row":
        bias[0] = -torch.inf
    return bias


def draw_alpha(case: Case, classes: Tensor, generator: torch.Generator) -> Tensor | None:
    """float32 (B, H, T_m), 1 where a query block has no marginal block."""
    if not case.alpha:
        return None
    if case.alpha == "head":
        alpha = torch.rand(case.heads, 1, generator=generator).expand(case.batch, case.heads, classes.shape[2])
        return alpha if bool((classes == 0).any(-1).all()) else alpha.where((classes == 0).any(-1), 1.0)
    alpha = torch.rand(classes.shape[:3], generator=generator)
    if case.alpha == "extreme":
        picked = torch.randint(4, classes.shape[:3], generator=generator)
        alpha = torch.tensor([0.0, 1e-5, 1 - 2.0**-24, 0.5])[picked]
    return alpha.where((classes == 0).any(-1), 1.0)


def key_mean(key: Tensor, bias: Tensor | None) -> Tensor:
    """float32 (B, H_kv, D): mean of the tokens that take part, 0 where none does."""
    taking_part = torch.ones(key.shape[0], key.shape[2]) if bias is None else (bias > -torch.inf).float()
    taking_part = taking_part[:, None, :, None]
    return (key.float() * taking_part).sum(2) / taking_part.sum(2).clamp(min=1)


def evaluate(
    inputs: list[Tensor | None],
    grad: Tensor,
    classes: Tensor,
    spec: Any,
    bias: Tensor | None,
    mean: Tensor | None = None,
) -> list[Any]:
    """Output, log-sum-exp and gradients of the dense formula in the dtype of its inputs.

    inputs: query, key, value, proj_weight, proj_bias, and for SLA2 alpha, which goes with the keys' mean.
    """
    from sla_compile.kernels.reference import reference_attention

    leaves = [None if tensor is None else tensor.detach().clone().requires_grad_() for tensor in inputs]
    query, key, value, weight, proj_bias, *alpha = leaves
    options = dict(proj_weight=weight, proj_bias=proj_bias, key_bias=bias)
    if any(tensor is not None for tensor in alpha):
        options |= dict(alpha=alpha[0], key_mean=mean.to(key.dtype))
    output, logsumexp = reference_attention(query, key, value, classes, spec, **options)
    used = [leaf for leaf in leaves if leaf is not None and not (spec.linear == "none" and leaf in leaves[3:])]
    found = iter(torch.autograd.grad(output, used, grad.to(output.dtype)))
    grads = [next(found) if any(leaf is other for other in used) else None for leaf in leaves]
    return [output.detach(), logsumexp.detach(), *grads]


def run(case: Case, device: str) -> dict[str, float]:
    """Error over budget of every result of a case, NaN where one is not finite where the reference is.

    The budget of a result: twice the error that the dense formula makes in the tested dtype; the rounding of two terms
    that the kernels keep in the result's dtype, half an ulp of the largest element each; and a random walk of float32
    roundings over the sequence and the head dimension.
    """
    from sla_compile.kernels import gpu
    from sla_compile.kernels.spec import Spec

    generator = torch.Generator().manual_seed(case.seed)
    spec = Spec(case.scale or case.dim**-0.5, case.feature_map, case.linear, case.block_q, case.block_k, case.low_bit)
    query = tokens(case, case.heads, 0, generator)
    key = tokens(case, case.kv_heads, 3, generator)
    key[..., 0] += case.key_offset
    value = tokens(case, case.kv_heads, 4, generator)
    weight = bias = None
    if case.linear != "none" and not case.alpha:
        weight = (torch.randn(case.dim, case.dim, generator=generator) * case.dim**-0.5).to(DTYPES[case.proj_dtype])
        bias = torch.randn(case.dim, generator=generator).to(DTYPES[case.proj_dtype]) if case.bias else None
    classes = block_map(case, generator)
    key_biases = key_bias(case, generator)
    alpha = draw_alpha(case, classes, generator)
    mean = key_mean(key, key_biases) if case.alpha else None
    if case.grad == "expanded":
        grad = torch.ones((), dtype=query.dtype).expand(query.shape)
    else:
        grad = tokens(replace(case, magnitude=1.0), case.heads, 5, generator)

    inputs = [query, key, value, weight, bias, alpha]
    double = [None if tensor is None else tensor.double() for tensor in inputs]
    slack = torch.zeros_like(query, dtype=torch.float64)
    if case.low_bit == "none":
        oracle = evaluate(double, grad.double(), classes, spec, key_biases, mean)
        low = [None if tensor is None else tensor.to(query.dtype) for tensor in inputs[:5]] + [alpha]
        eager = evaluate(low, grad, classes, spec, key_biases, mean)
    else:
        from low_bit_reference import low_bit_evaluate

        from sla_compile.kernels.smoothing import token_mean

        # The keys are rounded to integers after the mean is subtracted: one that is summed in another order, as a GPU
        # does, would round some of them to others.
        smoothing = mean
        if smoothing is None:
            smoothing = token_mean(moved(key, device), None if key_biases is None else key_biases.to(device)).cpu()
        oracle, slack = low_bit_evaluate(
            inputs, grad.double(), classes, spec, key_biases, mean, smoothing, torch.float64
        )
        eager, _ = low_bit_evaluate(
            inputs, grad, classes, spec, key_biases, mean, smoothing, query.dtype, tensor_cores=True
        )

    on_device = [None if tensor is None else moved(tensor, device) for tensor in inputs]
    options = dict(
        proj_weight=on_device[3],
        proj_bias=on_device[4],
        key_bias=None if key_biases is None else key_biases.to(device),
        alpha=on_device[5],
        key_mean=None if mean is None else mean.to(device),
    )
    kept = gpu.TRANSIENT_BYTES, gpu.PROJECTION_TOKENS, gpu.addressing
    gpu.TRANSIENT_BYTES = case.chunk_bytes or kept[0]
    gpu.PROJECTION_TOKENS = 128  # several parts
    if case.wide:
        gpu.addressing = lambda *tensors: {**kept[2](*tensors), "WIDE": True}
    tuning = contextlib.nullcontext() if case.candidate is None else tuning_chooses(case.candidate)
    try:
        classes, given = classes.to(device), moved(grad, device)
        with tuning:
            output, logsumexp = gpu.forward(*on_device[:3], classes, spec, **options)
            grads = gpu.backward(given, *on_device[:3], output, logsumexp, classes, spec, **options)
        if device != "cpu" and case.candidate is None:  # rows differ in their last bits
            again = gpu.backward(given, *on_device[:3], output, logsumexp, classes, spec, **options)
            assert all(one is None or torch.equal(one, two) for one, two in zip(grads, again, strict=True)), (
                "not deterministic"
            )
        if case.low_bit != "none":
            check_operands(on_device, classes, spec, options)
    finally:
        gpu.TRANSIENT_BYTES, gpu.PROJECTION_TOKENS, gpu.addressing = kept
    results = [output, logsumexp, *grads]

    assert logsumexp.dtype == torch.float32 and logsumexp.is_contiguous()
    assert grads[3] is None or grads[3].dtype == weight.dtype
    for result in (output, *grads[:3]):
        assert result.dtype == query.dtype and result.transpose(1, 2).is_contiguous(), result.stride()
    if case.blocks == "critical" and case.mask == "" and case.linear != "all" and bias is None:
        dense = torch.nn.functional.scaled_dot_product_attention(*double[:3], scale=spec.scale, enable_gqa=True)
        torch.testing.assert_close(oracle[0], dense)
    # A log-sum-exp that is off by x makes probabilities off by the share x: its unit is 1. In the gradients to q, k and
    # v differences cancel, s (dP - delta) K: they are measured by the terms, dP being of size |dO| |V| / sqrt(D). And
    # delta = <dO, O> is formed from the rounded O, to which every element adds half an ulp, at random.
    factor = abs(spec.scale) * max(tensor.abs().max().item() for tensor in (query, key))
    norms = [tensor.double().norm(dim=-1).max().item() for tensor in (grad, value, grad * oracle[0])]
    size = max(factor * norms[0] * norms[1] / math.sqrt(case.dim), *(exact.abs().max().item() for exact in oracle[2:5]))
    rounded = torch.finfo(query.dtype).eps * factor * norms[2]
    sizes = [0.0, 1.0, size, size, size, 0.0, 0.0, size]
    swayed = grad.double().norm(dim=-1) * slack.norm(dim=-1)  # of <dO, O>, where a probability was all but a tie
    rounded += factor * swayed.max().item()
    # Tensor cores drop the low bits of tf32 operands. The projection's gradient comes of five of them, one after
    # another: phi(Q) / (phi(Q) Z), dH, its sums, phi(K) and dV'.
    truncated = 0.0
    if query.dtype == torch.float16 and oracle[5] is not None:
        truncated = 5 * TF32_EPS * oracle[5].abs().max().item()
    extra = [slack, 0.0, rounded, rounded, 0.0, truncated, 0.0, 0.0]
    if alpha is not None:
        # The gradient to alpha comes of the rounded O, too, over alpha. Its logit gets alpha (1 - alpha) times as much.
        results[-1], oracle[-1], eager[-1] = (alpha * found[-1].cpu() for found in (results, oracle, eager))
        squares = (grad * oracle[0]).double().square().sum(-1).split(case.block_q, -1)
        norm = max(block.sum(-1).max().item() for block in squares) ** 0.5
        extra[-1] = torch.finfo(query.dtype).eps * norm
        extra[-1] += max(block.sum(-1).max().item() for block in swayed.split(case.block_q, -1))
    return {
        name: ratio(result, exact, low, more, size, case.length + case.dim)
        for name, result, exact, low, more, size in zip(
            (*NAMES, "grad_alpha"), results, oracle, eager, extra, sizes, strict=True
        )
        if result is not None or exact is not None
    }


@contextlib.contextmanager
def tuning_chooses(candidate: int) -> Iterator[None]:
    """Tunes launches between the first candidate and this one, which a clock of our own finds faster.

    The first is not run: what it wrote would hide what the other one does not write.
    """
    import triton

    from sla_compile.kernels import autotune

    times, candidates = itertools.cycle((1.0, 0.0)), autotune.candidates

    def two(kernel: Any, arguments: dict[str, Any]) -> list[dict[str, int]]:
        rows = candidates(kernel, arguments)
        return rows if len(rows) == 1 else [rows[0], rows[candidate % len(rows)]]

    def do_bench(call: Callable[[], None], quantiles: tuple[float, ...]) -> list[float]:
        time = next(times)
        if time == 0:
            call()
        return [time] * len(quantiles)

    with (
        mock.patch.multiple(autotune, asked=mock.Mock(return_value=True), candidates=two, _chosen={}),
        mock.patch.object(triton, "autotune", functools.partial(triton.autotune, do_bench=do_bench)),
        mock.patch.object(torch.cuda, "get_device_name", return_value="any"),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=False),
    ):
        yield


def check_operands(inputs: list[Tensor | None], classes: Tensor, spec: Any, options: dict[str, Tensor | None]) -> None:
    """Asserts that the kernel that quantises keys and values agrees with quantize.py, bit for bit."""
    from sla_compile.kernels import gpu, quantize
    from sla_compile.kernels.smoothing import token_mean

    mean = token_mean(inputs[1], options["key_bias"])
    # The definition runs on the CPU: on a GPU PyTorch divides by a number as it multiplies by its inverse.
    key, value, bias = (None if t is None else t.cpu() for t in (*inputs[1:3], options["key_bias"]))
    scales = quantize.channel_scales(value, bias).contiguous().to(mean.device) if spec.low_bit == "fp8" else None
    call = gpu._call(*inputs[:3], classes, spec, *options.values())
    low_key, key_scales, low_value = (None if t is None else t.cpu() for t in call.quantized(mean, scales))
    expected, expected_scales = quantize.quantize_blocks(key, spec.block_k, mean=mean.cpu(), key_bias=bias)
    length, dim = key.shape[2:]
    found = low_key.flatten(1, 2).unflatten(0, key.shape[:2])
    assert torch.equal(found[:, :, :length, :dim], expected), "int8 keys"
    assert not found[:, :, length:].any() and not found[..., dim:].any(), "int8 padding"
    assert torch.equal(key_scales.unflatten(0, key.shape[:2]), expected_scales), "scales of keys"
    if low_value is not None:
        expected, _ = quantize.quantize_channels(value, key_bias=bias)
        found = low_value.view(torch.uint8).transpose(2, 3).flatten(1, 2).unflatten(0, key.shape[:2])
        assert torch.equal(found[:, :, :length, :dim], expected.view(torch.uint8)), "E4M3 values"
        assert not found[:, :, length:].any() and not found[..., dim:].any(), "E4M3 padding"


def ratio(result: Tensor, exact: Tensor, low: Tensor, extra: float | Tensor, size: float, terms: int) -> float:
    """Largest error over the budget; NaN where the result is not finite and the reference is."""
    eps, eps32 = torch.finfo(result.dtype).eps, torch.finfo(torch.float32).eps
    result, low = result.detach().cpu().double(), low.double()
    absent = exact.isinf()  # a log-sum-exp of nothing
    if result.shape != exact.shape or not torch.equal(result.isinf(), absent) or result.isnan().any():
        return math.nan
    result, low, exact = (tensor.masked_fill(absent, 0) for tensor in (result, low, exact))
    largest = exact.abs().max().item()
    # Where the low-precision evaluation overflowed it says nothing.
    eager_error = (low - exact).abs().nan_to_num(0, posinf=0).max().item()
    error = (result - exact).abs()
    walk = math.sqrt(terms) * eps32 * max(size, largest)
    budget = 2 * eager_error + eps * largest + extra + walk
    return (error / budget).where(error > 0, 0).max().item()


def moved(tensor: Tensor, device: str) -> Tensor:
    """The tensor on the device with its strides and what surrounds it."""
    if device == "cpu":
        return tensor
    base = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage()).to(device)
    return base.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def emulate(arch: int | str, shipped: bool) -> None:
    """Takes another architecture's tiles, in a process without a GPU."""
    from sla_compile.kernels import gpu, tuning

    target = tuning.Target.of_arch(arch)
    gpu.target_of = lambda device: target

    def chosen(dims: int, itemsize: int, *rest: Any) -> tuning.Plan:
        if shipped:
            return tuning.plan(dims, itemsize, *rest)
        plan = tuning.plan(dims, 2, *rest)  # float32 has smaller tiles, so more programs
        precision = "ieee" if itemsize == 4 else plan.precision
        return replace(plan, block_sums=replace(plan.block_sums, tile_q=16, slice=2048), precision=precision)

    gpu.plan = chosen


def serve() -> None:
    """Answers each case on stdin with a line on stdout."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import interpreter_bf16
    import interpreter_fp8
    import interpreter_tensor_cores

    interpreter_bf16.install()
    interpreter_fp8.install()
    interpreter_tensor_cores.install()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # torch.empty gives NaN and huge integers
    torch.utils.deterministic.fill_uninitialized_memory = True
    answers = sys.stdout
    sys.stdout = sys.stderr
    for line in sys.stdin:
        case = Case(**json.loads(line))
        try:
            emulate(case.arch, case.shipped)
            answer: Any = run(case, "cpu")
        except Exception as error:  # reported as the case's failure
            answer = f"{type(error).__name__}: {error}"
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve()
