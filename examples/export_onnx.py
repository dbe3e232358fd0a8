"""Export an accelerated network to ONNX with a dynamic length, and compare ONNX Runtime with PyTorch.

python examples/export_onnx.py            # 4096 tokens and more
python examples/export_onnx.py --small    # a few hundred tokens, seconds

Needs: pip install "sla-compile[onnx]"
"""

import argparse
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sla_compile
import sla_compile.export


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class Network(nn.Module):
    """Two blocks of a diffusion transformer, without its conditioning."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.dim = dim
        self.attentions = nn.ModuleList(Attention(dim, heads) for _ in range(2))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        for attention, mlp in zip(self.attentions, self.mlps, strict=True):
            x = x + attention(F.layer_norm(x, x.shape[-1:]))
            x = x + mlp(F.layer_norm(x, x.shape[-1:]))
        return x

    def make_inputs(self, length: int) -> tuple[Tensor]:
        return (torch.randn(1, length, self.dim, generator=torch.Generator().manual_seed(length)),)


def build(small: bool) -> tuple[Network, tuple[int, ...]]:
    """An accelerated network and the lengths to try; the first is the example's."""
    torch.manual_seed(0)
    model, lengths = (Network(32, 2), (200, 128, 333)) if small else (Network(256, 2), (4096, 5000, 8192))
    config = sla_compile.SLAConfig(sparsity=0.7 if small else 0.95, min_seq_len=64)
    model = sla_compile.accelerate(model.eval(), config=config, example_inputs=model.make_inputs(lengths[0]))
    with torch.no_grad():  # as if it had been fine-tuned
        for parameter in sla_compile.parameters(model):
            parameter.normal_(std=0.1)
    return model, lengths


def relative_difference(result: Tensor, expected: Tensor) -> float:
    return ((result - expected).abs().max() / expected.abs().max()).item()


@torch.no_grad()
def main(arguments: list[str] | None = None) -> float:
    """Returns the largest relative difference between ONNX Runtime and PyTorch."""
    import onnxruntime

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tiny model and few tokens")
    parser.add_argument("--output", type=Path, help="the file; a temporary one by default")
    given = parser.parse_args(arguments)
    path = given.output or Path(tempfile.mkdtemp()) / "network.onnx"
    model, lengths = build(given.small)

    tokens = torch.export.Dim("tokens", min=64, max=65536)
    inputs = model.make_inputs(lengths[0])
    sla_compile.export.onnx(
        model, path, inputs, dynamic_shapes={"x": {1: tokens}}, input_names=["x"], output_names=["result"]
    )
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    worst = 0.0
    for length in lengths:
        (x,) = model.make_inputs(length)
        result = torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
        difference = relative_difference(result, model(x))
        worst = max(worst, difference)
        print(f"{length} tokens: ONNX Runtime is {difference:.1e} from PyTorch")
    print("written to", path)
    return worst


if __name__ == "__main__":
    main()
