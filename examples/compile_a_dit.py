"""Accelerate a diffusers video transformer, compile it, and compare it with the dense one.

python examples/compile_a_dit.py            # random weights, 4680 tokens, about a minute and a half on two cores
python examples/compile_a_dit.py --small    # 220 tokens, seconds
python examples/compile_a_dit.py --checkpoint Wan-AI/Wan2.1-T2V-1.3B-Diffusers    # downloads; wants a GPU
"""

import argparse
import copy
import time

import torch
from diffusers import WanTransformer3DModel

import sla_compile


def build(checkpoint: str | None, small: bool, device: str) -> WanTransformer3DModel:
    if checkpoint is not None:
        model = WanTransformer3DModel.from_pretrained(checkpoint, subfolder="transformer", torch_dtype=torch.bfloat16)
        return model.to(device).eval()
    torch.manual_seed(0)
    size = dict(num_attention_heads=2, attention_head_dim=64, ffn_dim=256) if small else dict(
        num_attention_heads=12, attention_head_dim=128, ffn_dim=8960
    )  # fmt: skip
    return WanTransformer3DModel(num_layers=2, text_dim=4096, **size).to(device).eval()


def timed(model: torch.nn.Module, inputs: dict) -> tuple[torch.Tensor, float]:
    model(**inputs)[0].cpu()  # compiles; .cpu() waits for a GPU
    began = time.perf_counter()
    output = model(**inputs)[0].float().cpu()
    return output, time.perf_counter() - began


@torch.no_grad()
def main(arguments: list[str] | None = None) -> float:
    """Returns the relative difference between the accelerated and the dense output."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="a Wan model of diffusers, local or on the Hugging Face Hub")
    parser.add_argument("--small", action="store_true", help="a tiny model and clip")
    parser.add_argument("--backend", default="inductor", help="backend of torch.compile")
    given = parser.parse_args(arguments)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build(given.checkpoint, given.small, device)
    frames, height, width = (2, 20, 22) if given.small else (3, 60, 104)  # latents; two by two of them are a token
    inputs = dict(
        hidden_states=torch.randn(1, 16, frames, height, width, device=device, dtype=model.dtype),
        timestep=torch.tensor([500], device=device),
        encoder_hidden_states=torch.randn(1, 512, 4096, device=device, dtype=model.dtype),
        return_dict=False,
    )
    dense = copy.deepcopy(model)

    # In place: the same object comes back. Shorter sequences than min_seq_len would stay dense.
    config = sla_compile.SLAConfig(sparsity=0.95, min_seq_len=64 if given.small else 4096)
    model = sla_compile.accelerate(model, config=config, example_inputs=inputs)
    print(sla_compile.report(model))

    expected, dense_seconds = timed(torch.compile(dense, backend=given.backend), inputs)
    output, seconds = timed(torch.compile(model, backend=given.backend), inputs)
    difference = float((output - expected).norm() / expected.norm())
    print(f"one forward: dense {dense_seconds:.3f} s, accelerated {seconds:.3f} s, on {device}")
    print(f"relative difference {difference:.4f}: the model has to be fine-tuned, see fine_tune.py")
    return difference


if __name__ == "__main__":
    main()
