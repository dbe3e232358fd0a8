"""What the tests of export share: attentions of every kind with their inputs, and a small accelerated network."""

import math
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import torch
from models import build, make_inputs
from torch import nn
from torch.export import Dim

import sla_compile
from sla_compile import SLAConfig, sparse_linear_attention
from sla_compile.kernels.spec import num_blocks

LENGTH = Dim("length", max=4096)
LENGTHS = (200, 1, 63, 64, 65, 128, 333)  # the example's first; one block, a full one, ragged, many


@dataclass(frozen=True)
class Case:
    """A kind of attention; 4 query heads share 2 key heads, 12 dimensions, scale 0.2.

    SLA2 where the configuration says so: with routers, and alpha as `alpha_per` has it.
    """

    name: str
    config: SLAConfig
    mask: str | None = None
    block_map: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def dynamic_shapes(self):
        tokens = ({2: LENGTH},) * 3
        return (*tokens, None, None, None if self.mask is None else {3: LENGTH}, *(None,) * 4)

    def inputs(self, length):
        """query, key, value, projection, mask, block map, routers, alpha; the same for the same length."""
        generator = torch.Generator().manual_seed(length)

        def draw(*shape):
            return torch.randn(*shape, generator=generator)

        query, key = (draw(2, length, heads, 12).transpose(1, 2) for heads in (4, 2))
        tokens = (query, key, draw(2, 2, length, 12))
        weight, bias = (draw(12, 12), draw(12)) if self.config.has_projection else (None, None)
        mask = None
        if self.mask == "bool":
            mask = torch.rand(2, 1, 1, length, generator=generator) > 0.3
            mask[0, ..., :70] = False  # a block without a key that takes part, or no key at all
        elif self.mask == "float":
            mask = draw(2, 1, 1, length)
        blocks = None
        if self.block_map:
            count = num_blocks(length, 64)
            blocks = torch.randint(-1, 2, (2, 4, count, count), generator=generator, dtype=torch.int8)
            blocks[..., 0] = 1
        routers_and_alpha = (None, None, None)
        if self.config.has_alpha:
            shared = 1 if self.config.alpha_per == "head" else num_blocks(length, self.config.block_q)
            routers_and_alpha = (draw(12, 12), draw(12, 12), torch.rand(4, shared, generator=generator))
            tokens = (query, key + 1, tokens[2])  # keys with a mean
        return (*(t.to(self.dtype) for t in tokens), weight, bias, mask, blocks, *routers_and_alpha)


def config(**options):
    return SLAConfig(min_seq_len=1, **{"sparsity": 0.7, **options})


CASES = [
    Case("plain", config()),
    Case("bool_mask", config(feature_map="elu"), "bool"),
    Case("all_keys_pinned_start", config(linear="all", pinned=(70, 0), negligible=0.3, block_q=128), "float"),
    Case("sparse_alone_pinned", config(linear="none", pinned=(20, 130))),
    Case("count_pinned_end", config(critical_blocks=3, pinned=(0, 70)), "float"),
    Case("all_keys_relu", config(linear="all", feature_map="relu"), "bool"),
    Case("float64", config(negligible=0.3), "float", dtype=torch.float64),
]
SLA2 = [
    Case("sla2", config(method="sla2")),
    Case("sla2_mask_pinned", config(method="sla2", feature_map="elu", pinned=(20, 130)), "bool"),
    Case("sla2_all_keys", config(method="sla2", linear="all"), "float"),
]
CASES += SLA2
# Sizes that are quotients of the length: no dynamic one.
SLA2_BY_BLOCK = Case("sla2_by_block", config(method="sla2", alpha_per="block", block_q=128), "bool")
BLOCK_MAP = Case("block_map", config(), "bool", block_map=True)


class Attention(nn.Module):
    """The functional form, with everything as an input."""

    def __init__(self, case):
        super().__init__()
        self.config = case.config

    def forward(self, query, key, value, weight, bias, mask, block_map, router_q, router_k, alpha):
        return sparse_linear_attention(
            query, key, value, config=self.config, proj_weight=weight, proj_bias=bias, key_padding_mask=mask,
            block_map=block_map, scale=0.2, enable_gqa=True, router_q=router_q, router_k=router_k, alpha=alpha,
        )  # fmt: skip


def network(depth=1, **options):
    """A small accelerated DiT in eval mode, whose added parameters are not what they start from."""
    model = sla_compile.accelerate(build(0, depth=depth), config=config(**options), example_inputs=make_inputs(200))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in sla_compile.parameters(model):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


NETWORK_SHAPES = ({1: LENGTH}, {1: LENGTH})


def difference(result, expected):
    """Largest difference, relative to the largest value."""
    return ((result.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def run_python(script, *arguments):
    """Runs a script in a fresh interpreter."""
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def build_runner(folder):
    """Compiles aoti_runner.cpp against torch's libraries, without its Python part."""
    torch_folder = Path(torch.__file__).parent
    includes = [f"-I{torch_folder}/include", f"-I{torch_folder}/include/torch/csrc/api/include"]
    libraries = [f"-L{torch_folder}/lib", f"-Wl,-rpath,{torch_folder}/lib", "-ltorch", "-ltorch_cpu", "-lc10"]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    source, runner = Path(__file__).parent / "aoti_runner.cpp", folder / "runner"
    subprocess.run(["g++", "-std=c++20", abi, *includes, str(source), "-o", str(runner), *libraries], check=True)
    return runner


def run_runner(runner, package, inputs, folder):
    """The first output, float32, of a package for these tensors."""
    arguments = []
    for index, tensor in enumerate(inputs):
        path = folder / f"input_{index}"
        tensor.contiguous().numpy().tofile(path)
        dtype = {torch.float32: "float", torch.int64: "long", torch.bool: "bool"}[tensor.dtype]
        arguments += [str(path), dtype, "x".join(map(str, tensor.shape))]
    output = folder / "output"
    command = [str(runner), str(package), str(output), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shape = [int(size) for size in done.stdout.strip(" []\n").split(",")]
    return torch.from_file(str(output), size=math.prod(shape)).view(shape).clone()
