"""The CPU kernels in C: compiled at first use with the system's C compiler, as torch.compile does for the CPU.

NOTE [Compiled on demand]
`cpu_native.c` needs no header beyond the compiler's and no library of torch, so it is built by one command for the
processor at hand, kept in the user's cache folder under a digest of sources, command and processor, and called through
ctypes. Without a compiler PyTorch operations run, which are slower (benchmarks/results).

NOTE [Operands of products]
The library computes in float32, on tensors in float32. Where the processor multiplies bfloat16 (AVX512-BF16, twice the
rate), it holds every function a second time, for tensors in bfloat16, whose products have bfloat16 operands.

NOTE [Phases]
A key-value head goes through phases, each a function of the library that works on a range of its blocks. Threads share
the ranges of a phase, of several heads where there are, and wait for each other at its end. What is written does
not depend on who writes it, nor do sums run over what threads happened to do: their number changes no result.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sla_compile.kernels.cpu_blocked import key_biases
from sla_compile.kernels.cpu_blocks import ask_for_huge_pages, thread_workspace
from sla_compile.kernels.layout import transposed_empty
from sla_compile.kernels.spec import MIN_DENOMINATOR, Spec, num_blocks

_LOG = logging.getLogger(__name__)
_FOLDER = Path(__file__).parent
_SOURCES = tuple(_FOLDER / name for name in ("cpu_native.c", "cpu_native_bfloat16.c"))
_READ = (*_SOURCES, _FOLDER / "cpu_matrix.h")
# What GCC and Clang both call the processor at hand.
_NATIVE = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
_FLAGS = ("-O3", _NATIVE, "-ffp-contract=fast", "-fno-math-errno", "-shared", "-fPIC", "-w")
_COMPILE_SECONDS = 120
_FEATURE_MAPS = ("softmax", "elu", "relu")
_SCOPES = ("none", "marginal", "all")
BLOCK_K = 64
MAX_BLOCK_Q = 128
MAX_DIM = 256
PART = 8  # key blocks of a piece of sla_backward_linear
TASKS = 8  # of a phase, for each thread
STRIP = 8  # query blocks whose keys the backward goes through at a time, for each thread, over all heads at once

_POINTERS = (
    "query key value output logsumexp block_map weight offset key_bias key_weight alpha key_mean arena grad_output "
    "grad_query grad_key grad_value grad_weight grad_offset grad_alpha"
).split()
_INTEGERS = (
    "query_head query_token key_token value_token output_head output_token map_head map_row alpha_head alpha_row "
    "grad_output_head grad_output_token grad_query_head grad_query_token grad_key_token grad_value_token "
    "length dim group block_q most panels strip strip_first strip_last head"
).split()


class _Call(ctypes.Structure):
    """``struct call`` of cpu_native.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _INTEGERS),
        *((name, ctypes.c_int32) for name in ("feature_map", "linear")),
        *((name, ctypes.c_float) for name in ("scale", "epsilon", "min_denominator")),
    )


_PHASE = ctypes.CFUNCTYPE(None, ctypes.POINTER(_Call), ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they cannot be compiled here."""
    compiler = _compiler()
    if compiler is None:
        _LOG.info("no C compiler found (CC names one): PyTorch operations run, which are slower")
        return None
    try:
        try:
            built = ctypes.CDLL(str(_build(compiler)))
        except OSError:  # a damaged file would stay one
            built = ctypes.CDLL(str(_build(compiler, anew=True)))
    except (OSError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", None)
        reason = output.decode(errors="replace").strip() if output else error
        _LOG.warning("%s cannot build the CPU kernels; PyTorch operations run, which are slower: %s", compiler, reason)
        return None
    return built


def operand_dtype(query: Tensor) -> torch.dtype:
    """What the library multiplies: bfloat16 where query and processor have it, else float32."""
    multiplies = query.dtype == torch.bfloat16 and hasattr(library(), "sla_sizes_bfloat16")
    return torch.bfloat16 if multiplies else torch.float32


def _compiler() -> str | None:
    if os.environ.get("SLA_COMPILE_NATIVE") == "0":
        return None
    return next(filter(None, map(shutil.which, (os.environ.get("CC", ""), "cc", "gcc", "clang"))), None)


def _build(compiler: str, *, anew: bool = False) -> Path:
    """The shared library for this processor, from the cache or, where it is not there or `anew`, compiled now."""
    processor = [platform.system(), platform.machine(), sorted(torch.cpu.get_capabilities().items())]
    sources = b"".join(path.read_bytes() for path in _READ)
    digest = hashlib.sha256(f"{compiler} {_FLAGS} {processor}".encode() + sources).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sla_compile"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    target = folder / f"cpu_native_{digest}.so"
    if anew or not target.exists():
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            built = Path(temporary) / target.name
            command = [compiler, *_FLAGS, "-o", str(built), *map(str, _SOURCES), "-lm"]
            subprocess.run(command, check=True, capture_output=True, timeout=_COMPILE_SECONDS)
            with built.open("rb") as file:
                os.fsync(file.fileno())  # not a file cut short, should the machine stop now
            os.replace(built, target)  # at once: other processes see all of it or nothing
    return target


def supports(query: Tensor, spec: Spec) -> bool:
    """Whether the compiled kernels take a call."""
    return (
        query.dtype != torch.float64
        and spec.low_bit == "none"
        and spec.block_k == BLOCK_K
        and spec.block_q <= MAX_BLOCK_Q
        and spec.block_q % BLOCK_K == 0
        and query.shape[3] <= MAX_DIM
        and library() is not None
    )


@torch.no_grad()
def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_map: Tensor,
    spec: Spec,
    *,
    proj_weight: Tensor | None = None,
    proj_bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    alpha: Tensor | None = None,
    key_mean: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp; arguments as of :func:`sla_compile.kernels.cpu_blocked.forward`."""
    output = ask_for_huge_pages(transposed_empty(query, operand_dtype(query)))
    logsumexp = query.new_empty(query.shape[:3], dtype=torch.float32)
    heads = _Heads(query, key, value, block_map, spec, proj_weight, proj_bias, key_bias, alpha, key_mean)
    heads.run(dict(output=output), logsumexp)
    return output.to(query.dtype), logsumexp


@torch.no_grad()
def backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor | None,
    logsumexp: Tensor,
    block_map: Tensor,
    spec: Spec,
    *,
    proj_weight: Tensor | None = None,
    proj_bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    alpha: Tensor | None = None,
    key_mean: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients; arguments as of :func:`sla_compile.kernels.cpu_blocked.backward`."""
    heads = _Heads(query, key, value, block_map, spec, proj_weight, proj_bias, key_bias, alpha, key_mean)
    grads = [ask_for_huge_pages(transposed_empty(tensor, heads.dtype)) for tensor in (query, key, value)]
    units = query.shape[0] * key.shape[1]
    grad_weights, grad_offsets = (
        None if parameter is None else torch.empty(units, *parameter.shape, dtype=torch.float32)
        for parameter in (heads.weight, heads.offset)
    )
    grad_alpha = None if alpha is None else torch.empty(block_map.shape[:3], dtype=torch.float32)
    names = ("grad_query", "grad_key", "grad_value")
    tensors = dict(zip(names, grads, strict=True), grad_output=_readable(grad_output, heads.dtype))
    heads.run(tensors, logsumexp, grad_weights, grad_offsets, grad_alpha)
    grad_weight, grad_bias = (
        None if grad is None or parameter is None else grad.sum(0).to(parameter.dtype)
        for grad, parameter in ((grad_weights, proj_weight), (grad_offsets, proj_bias))
    )
    grad_query, grad_key, grad_value = (grad.to(query.dtype) for grad in grads)
    return grad_query, grad_key, grad_value, grad_weight, grad_bias, grad_alpha


class _Heads:
    """The arguments of a call, and its key-value heads going through the phases of the library."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        block_map: Tensor,
        spec: Spec,
        weight: Tensor | None,
        offset: Tensor | None,
        key_bias: Tensor | None,
        alpha: Tensor | None,
        key_mean: Tensor | None,
    ) -> None:
        if spec.linear != "none" and weight is None and alpha is None:
            raise ValueError(f'linear="{spec.linear}" needs proj_weight or alpha')
        self.dtype = operand_dtype(query)
        self.query, self.key, self.value = (_readable(tensor, self.dtype) for tensor in (query, key, value))
        self.block_map = block_map.contiguous()
        self.spec = spec
        projects = spec.linear != "none" and alpha is None
        self.weight = weight.to(self.dtype).contiguous() if projects and weight is not None else None
        self.offset = offset.float().contiguous() if projects and offset is not None else None
        self.alpha = None if alpha is None else alpha.float()
        self.key_mean = None if key_mean is None else key_mean.float().contiguous()
        batch, length = query.shape[0], query.shape[2]
        self.biases = [key_biases(key_bias, entry, length, spec.block_k, torch.float32) for entry in range(batch)]

    def run(
        self,
        tensors: dict[str, Tensor],
        logsumexp: Tensor,
        grad_weight: Tensor | None = None,
        grad_offset: Tensor | None = None,
        grad_alpha: Tensor | None = None,
    ) -> None:
        """The forward or, with a tensor `grad_output`, the backward of every key-value head.

        Args:
            tensors: (B, heads, L, D) each, named as in `struct call`.
            grad_weight, grad_offset: (B * H_kv, ...).
        """
        built = library()
        if built is None:
            raise RuntimeError("the compiled CPU kernels are not available")
        batch, kv_heads = self.key.shape[:2]
        group = self.query.shape[1] // kv_heads
        tensors = dict(query=self.query, key=self.key, value=self.value, **tensors)
        calls = []
        for unit in range(batch * kv_heads):
            entry, kv_head = divmod(unit, kv_heads)
            head = kv_head * group
            bias, key_weight = self.biases[entry]
            call = self._call(tensors, entry, kv_head)
            for name, tensor in (
                ("weight", self.weight),
                ("offset", self.offset),
                ("key_bias", bias),
                ("key_weight", key_weight),
                ("logsumexp", logsumexp[entry, head]),
                ("block_map", self.block_map[entry, head]),
                ("alpha", None if self.alpha is None else self.alpha[entry, head]),
                ("key_mean", None if self.key_mean is None else self.key_mean[entry, kv_head]),
                ("grad_weight", None if grad_weight is None else grad_weight[unit]),
                ("grad_offset", None if grad_offset is None else grad_offset[unit]),
                ("grad_alpha", None if grad_alpha is None else grad_alpha[entry, head]),
            ):
                setattr(call, name, None if tensor is None else tensor.data_ptr())
            calls.append(call)
        suffix = "_bfloat16" if self.dtype == torch.bfloat16 else ""
        _run(lambda name, prototype: prototype((f"sla_{name}{suffix}", built)), calls)

    def _call(self, tensors: dict[str, Tensor], entry: int, kv_head: int) -> _Call:
        """The pointers and strides of tensors (B, heads, L, D) at a key-value head, and the scalars."""
        spec, group = self.spec, self.query.shape[1] // self.key.shape[1]
        call = _Call(length=self.query.shape[2], dim=self.query.shape[3], group=group, block_q=spec.block_q)
        for name, tensor in tensors.items():
            head = kv_head * (tensor.shape[1] // self.key.shape[1])
            setattr(call, name, tensor[entry, head].data_ptr())
            setattr(call, f"{name}_token", tensor.stride(2))
            if f"{name}_head" in _INTEGERS:
                setattr(call, f"{name}_head", tensor.stride(1))
        call.map_head, call.map_row = self.block_map.stride()[1:3]
        if self.alpha is not None:
            call.alpha_head, call.alpha_row = self.alpha.stride()[1:]
        call.feature_map, call.linear = _FEATURE_MAPS.index(spec.feature_map), _SCOPES.index(spec.linear)
        call.scale, call.epsilon, call.min_denominator = spec.scale, spec.epsilon, MIN_DENOMINATOR
        return call


def _run(function: Callable[[str, Any], Any], calls: list[_Call]) -> None:
    """All phases of all calls, as many at once as there are threads, which is what memory is kept for."""
    rows = calls[0].group * num_blocks(calls[0].length, calls[0].block_q)
    threads = min(torch.get_num_threads(), rows * len(calls))
    at_once = -(-len(calls) // -(-len(calls) // threads))
    sizes = function("sizes", ctypes.CFUNCTYPE(None, ctypes.POINTER(_Call), *2 * [ctypes.POINTER(ctypes.c_int64)]))
    shared, own = ctypes.c_int64(), ctypes.c_int64()
    floats = []
    for call in calls:
        call.strip = min(-(-STRIP * threads // at_once), rows)
        sizes(call, shared, own)
        floats.append([-(-count.value // 16) * 16 for count in (shared, own)])
    with thread_workspace(torch.float32) as workspace, ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(threads)) if threads > 1 else None
        arenas = workspace("arena", at_once, max(of_call for of_call, _ in floats))
        scratch = workspace("scratch", threads, max(of_thread for _, of_thread in floats))

        def work(slot: int) -> None:
            for call, first, last in tasks:  # shared by the threads: each takes the next
                phase(call, scratch[slot].data_ptr(), first, last)

        for start in range(0, len(calls), at_once):
            wave = calls[start : start + at_once]
            for call, arena in zip(wave, arenas, strict=False):
                call.arena = arena.data_ptr()
            for name, first, last in _phases(wave):
                phase = function(name, _PHASE)
                step = last - first if pool is None else -(-(last - first) * len(wave) // (TASKS * threads))
                tasks = iter(
                    [(call, at, min(at + step, last)) for call in wave for at in range(first, last, max(step, 1))]
                )
                if pool is None:
                    work(0)
                else:
                    list(pool.map(work, range(threads)))


def _phases(calls: list[_Call]) -> Iterator[tuple[str, int, int]]:
    """Function, first and last piece of each phase of calls of one size; sets what they have to know of it."""
    call = calls[0]
    rows, columns = num_blocks(call.length, call.block_q), num_blocks(call.length, BLOCK_K)
    yield "pack_weight", 0, 1
    yield "pack_keys", 0, columns
    for head in range(call.group):
        for call in calls:
            call.head = head
        yield "list_rows", 0, rows
        yield "sum_states", 0, call.panels
        if call.grad_output is None:
            yield "forward_rows", head * rows, (head + 1) * rows
            continue
        for first in range(head * rows, (head + 1) * rows, call.strip):
            last = min(first + call.strip, (head + 1) * rows)
            for call in calls:
                call.strip_first, call.strip_last = first, last
            yield "backward_rows", first, last
            yield "backward_keys", 0, columns
        yield "list_columns", 0, columns
        yield "sum_gradients", 0, call.panels
        yield "backward_linear", 0, num_blocks(columns, PART)
    if call.grad_output is not None:
        yield "unpack_keys", 0, columns
        yield "unpack_weight", 0, 1


def _readable(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In that dtype, with a head dimension that is contiguous."""
    tensor = tensor.to(dtype)
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()
