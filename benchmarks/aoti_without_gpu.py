"""AOTInductor's whole way to a CUDA package, short of linking and loading it, on a machine without a GPU.

    pip install --no-deps nvidia-cuda-cccl             # headers that the CUDA headers in Triton want
    python benchmarks/aoti_without_gpu.py              # every case, about a minute each
    python benchmarks/aoti_without_gpu.py --cases one_head --arch 89

Torch's and Triton's questions about the device are answered in its place. Inductor then writes the C++ of the package
and compiles every kernel in it, the operator's and its own, to a cubin; nothing is launched. g++ compiles the C++ with
the CUDA headers that come with Triton. Reported are the kernels and what the C++ launches.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import sysconfig
import tempfile
import types
import zipfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import torch
import triton
from cuda_programs import stand_in_for_a_gpu
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import sla_compile
from sla_compile import SLAConfig, sparse_linear_attention

CUDA = Path(triton.__file__).parent / "backends" / "nvidia"


class Case(nn.Module):
    """An attention of (batch, tokens, heads, dimension), 200 tokens in the example, up to 32768 in the package."""

    def __init__(
        self,
        heads: int,
        kv_heads: int,
        dim: int,
        dtype: torch.dtype = torch.bfloat16,
        mask: bool = False,
        batch: int = 1,
        **options: Any,
    ):
        super().__init__()
        self.heads, self.kv_heads, self.dim, self.dtype = heads, kv_heads, dim, dtype
        self.mask, self.batch = mask, batch
        self.config = SLAConfig(min_seq_len=1, **options)

    def inputs(self) -> tuple[Any, ...]:
        tokens = [
            torch.empty(self.batch, 200, heads, self.dim, dtype=self.dtype, device="cuda")
            for heads in (self.heads, self.kv_heads, self.kv_heads)
        ]
        weight = torch.empty(self.dim, self.dim, device="cuda")
        alpha = torch.empty(self.heads, 1, device="cuda")
        mask = torch.empty(self.batch, 1, 1, 200, dtype=torch.bool, device="cuda") if self.mask else None
        return (*tokens, weight, alpha, mask)

    def dynamic_shapes(self) -> tuple[Any, ...]:
        length = Dim("length", max=32768)
        return (*[{1: length}] * 3, None, None, {3: length} if self.mask else None)

    def forward(self, query: Any, key: Any, value: Any, weight: Any, alpha: Any, mask: Any) -> Any:
        sla2 = self.config.has_alpha
        attended = sparse_linear_attention(
            *(tokens.transpose(1, 2) for tokens in (query, key, value)),
            config=self.config, proj_weight=None if sla2 else weight, proj_bias=None if sla2 else weight[0],
            router_q=weight if sla2 else None, router_k=weight if sla2 else None, alpha=alpha if sla2 else None,
            key_padding_mask=mask, enable_gqa=True,
        )  # fmt: skip
        return attended.transpose(1, 2).flatten(2)


CASES = {
    "wan": Case(12, 12, 128),
    # Arguments that are 1 become constants of the kernels.
    "one_head": Case(1, 1, 64, torch.float16, method="sla2", mask=True),
    "grouped_int8": Case(4, 2, 128, mask=True, batch=2, low_bit="int8"),
    "all_keys_fp8": Case(2, 1, 64, method="sla2", linear="all", low_bit="fp8"),
}


def answer_for_a_device(capability: tuple[int, int]) -> None:
    """What Inductor asks of a device while it compiles, beyond tracing; launches are taken for done."""
    import torch._inductor.fx_passes.joint_graph as joint_graph
    import torch.utils.cpp_extension as cpp_extension
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.runtime import triton_helpers, triton_heuristics
    from torch._inductor.runtime.hints import DeviceProperties
    from torch._inductor.select_algorithm import AlgorithmSelectorCache
    from triton.compiler import CompiledKernel

    properties = types.SimpleNamespace(
        name="none", major=capability[0], minor=capability[1], multi_processor_count=132, total_memory=80 << 30,
        regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024, warp_size=32,
        shared_memory_per_block_optin=232448 if capability[0] == 9 else 101376, L2_cache_size=50 << 20,
        gcnArchName="none",
    )  # fmt: skip
    known = DeviceProperties("cuda", 0, 132, 10 * capability[0] + capability[1], capability[0], 65536, 2048, 1024, 32)
    DeviceProperties.create = staticmethod(lambda device: known)
    nothing = lambda *_: 0  # noqa: E731
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 1
    torch.cuda.get_device_properties = lambda *_: properties
    torch.cuda.get_device_capability = lambda *_: capability
    torch.cuda.get_rng_state = lambda *_: torch.get_rng_state()
    for name in ("current_device", "synchronize", "set_rng_state", "_exchange_device", "_maybe_exchange_device"):
        setattr(torch.cuda, name, nothing)
    for name in ("current_device", "synchronize", "exchange_device", "maybe_exchange_device", "get_raw_stream"):
        setattr(CudaInterface, name, staticmethod(nothing))
    torch.cuda._DeviceGuard = lambda index: torch.no_grad()
    torch._C._cuda_getCurrentRawStream = nothing
    torch._C._dynamo.guards._empty_strided_cuda = torch._C._dynamo.guards._empty_strided_xpu = None
    cpp_extension.CUDA_HOME = str(CUDA)

    # Patterns of dense attention are traced with tensors on the device: there is none here to be found.
    joint_graph.lazy_init = nothing
    triton_helpers.set_driver_to_gpu = lambda: None
    triton_heuristics.StaticTritonCompileResult.can_statically_launch = staticmethod(lambda *_: None)
    CompiledKernel._init_handles = lambda self: vars(self).update(module=0, function=0, n_regs=0, n_spills=0)
    CompiledKernel.run = property(lambda self: nothing)
    AlgorithmSelectorCache.generate_example_value = staticmethod(lambda *_, **__: None)

    def keep_first(self: Any, *_: Any, stream: int, **__: Any) -> None:
        self.precompile()
        self.save_gpu_kernel(stream, self.launchers[0])

    triton_heuristics.CachingAutotuner.run = keep_first


def compile_case(case: Case, folder: Path) -> None:
    """Compiles a case and reports what came out."""
    with FakeTensorMode(shape_env=ShapeEnv()), torch.no_grad():
        program = torch.export.export(case, case.inputs(), dynamic_shapes=case.dynamic_shapes())
    options = {
        "aot_inductor.package_cpp_only": True,
        "aot_inductor.precompile_headers": False,
        "compile_threads": 1,
        "joint_graph_constant_folding": False,  # by running the operations
    }
    path = sla_compile.export.aoti(program, folder / "package.pt2", inductor_configs=options)
    with zipfile.ZipFile(path) as package:
        package.extractall(folder)
    (wrapper,) = folder.rglob("*.wrapper.cpp")
    of_torch = Path(torch.__file__).parent / "include"
    target = min(Path(sysconfig.get_path("purelib"), "nvidia").rglob("nv/target"))
    folders = (of_torch, of_torch / "torch/csrc/api/include", CUDA / "include", target.parent.parent)
    flags = ["-std=c++20", "-DUSE_CUDA", "-DCPU_CAPABILITY_DEFAULT", "-fsyntax-only"]
    subprocess.run(["g++", *flags, *(f"-I{path}" for path in folders), wrapper], check=True)
    text = wrapper.read_text()
    body = text[text.index("AOTInductorModel::run_impl") :]
    launched = re.findall(r"^ +call_(\w+)\(", body, re.MULTILINE)
    ours = [name for name in launched if re.search(r"_kernel_\d+$", name)]
    cubins = len(list(folder.rglob("*.cubin")))
    assert cubins == len(set(launched)), (cubins, sorted(set(launched)))
    called = sorted(set(re.findall(r"aoti_torch_cuda_(\w+)", body)))
    print(f"  {cubins} cubins, {len(launched) - len(ours)} launches of Inductor's kernels")
    print(f"  launches of ours: {', '.join(ours)}; operations called: {', '.join(called) or 'none'}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--arch", type=int, default=90, help="compute capability, 90 for sm_90")
    arguments = parser.parse_args()
    stand_in_for_a_gpu()
    answer_for_a_device(divmod(arguments.arch, 10))
    for name in arguments.cases:
        print(f"{name}, sm_{arguments.arch}, torch {torch.__version__}, Triton {triton.__version__}")
        with tempfile.TemporaryDirectory() as folder:
            compile_case(CASES[name].eval(), Path(folder))


if __name__ == "__main__":
    main()
