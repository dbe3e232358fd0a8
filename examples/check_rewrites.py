"""Check in CI which attentions of a model are rewritten, without its weights.

python examples/check_rewrites.py            # Wan2.1-14B at 720p, on the meta device: seconds, half a GiB
python examples/check_rewrites.py --small    # a tiny model of the same class, seconds
python examples/check_rewrites.py --update   # writes the snapshot anew, after a change that is meant

The same from the command line:
sla-compile check examples/check_rewrites.py:build --inputs examples/check_rewrites.py:inputs --meta \
    --snapshot examples/wan2.1-14b.json
"""

import argparse
import resource
import time
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel

import sla_compile
from sla_compile.testing import assert_captured, assert_rewritten

SNAPSHOT = Path(__file__).with_name("wan2.1-14b.json")


def build(small: bool = False) -> WanTransformer3DModel:
    size = dict(num_attention_heads=2, attention_head_dim=64, ffn_dim=256, num_layers=2) if small else dict(
        num_attention_heads=40, attention_head_dim=128, ffn_dim=13824, num_layers=40
    )  # fmt: skip
    return WanTransformer3DModel(text_dim=4096, **size).eval()


def inputs(frames: int = 21, height: int = 90, width: int = 160) -> dict:
    """Latents of 81 frames of 720 x 1280, and 512 tokens of text; two by two latents are a token."""
    return dict(
        hidden_states=torch.zeros(1, 16, frames, height, width),
        timestep=torch.tensor([500]),
        encoder_hidden_states=torch.zeros(1, 512, 4096),
        return_dict=False,
    )


@torch.no_grad()
def main(arguments: list[str] | None = None) -> sla_compile.Report:
    """Returns the report of the model after it was accelerated."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tiny model, without a snapshot")
    parser.add_argument("--update", action="store_true", help="write the snapshot instead of comparing with it")
    given = parser.parse_args(arguments)

    began = time.perf_counter()
    with torch.device("meta"):  # shapes without memory
        model = build(given.small)
        clips = [inputs(*size) for size in ((21, 60, 104), (21, 90, 160))]

    # Before: what accelerate would do, and that it does what it did when the snapshot was reviewed.
    snapshot = None if given.small else SNAPSHOT
    assert_rewritten(model, clips[-1], expect="blocks.*.attn1", snapshot=snapshot, update=given.update)

    # After: what the model really calls. One graph for both lengths, with the op for every chosen attention.
    sla_compile.accelerate(model, sparsity=0.95)
    report = assert_rewritten(model, clips[-1], expect="blocks.*.attn1")
    if given.small:
        assert_captured(model, clips, dynamic=True)

    seconds, memory = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{len(report.rewritten)} of {len(report)} attentions rewritten, {parameters:,} parameters")
    print(f"checked in {seconds:.1f} s besides imports, {memory:.2f} GiB of memory at most")
    return report


if __name__ == "__main__":
    main()
