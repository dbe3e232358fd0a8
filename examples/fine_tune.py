"""Fine-tune an accelerated video transformer with the flow-matching loss, save what was added, and load it again.

    python examples/fine_tune.py            # random weights, 780 tokens, about a minute on two cores
    python examples/fine_tune.py --small    # a tiny model, seconds

The data is synthetic; with your own, replace `clips`. SLA's authors fine-tune a trained model for about 2000 steps.
"""

import argparse
import copy
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from torch.nn import functional as F

import sla_compile


def clips(frames: int, height: int, width: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Latents (1, 16, F, H, W) of a moving wave, and text embeddings (1, 64, 128), without end."""
    random = torch.Generator().manual_seed(0)
    text = torch.randn(1, 64, 128, generator=random)
    where = [torch.linspace(0, 6, size) for size in (frames, height, width)]
    while True:
        speed, down, right = torch.rand(3, generator=random)
        wave = speed * where[0][:, None, None] + down * where[1][:, None] + right * where[2]
        yield wave.sin().expand(1, 16, -1, -1, -1), text


def main(arguments: list[str] | None = None) -> list[float]:
    """Returns the loss of every step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tiny model and clip")
    parser.add_argument("--steps", type=int, default=20)
    given = parser.parse_args(arguments)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    heads, head_dim, size = (2, 64, (2, 20, 22)) if given.small else (12, 128, (2, 30, 52))
    model = WanTransformer3DModel(
        num_layers=2, num_attention_heads=heads, attention_head_dim=head_dim, ffn_dim=4 * heads * head_dim, text_dim=128
    ).to(device)
    before = copy.deepcopy(model)

    sla_compile.accelerate(model, config=sla_compile.SLAConfig(sparsity=0.9, min_seq_len=64))
    added = sla_compile.parameters(model)
    others = [parameter for parameter in model.parameters() if all(parameter is not a for a in added)]
    # The projections start at zero and have further to go than trained weights.
    optimizer = torch.optim.AdamW([dict(params=others, lr=1e-4), dict(params=added, lr=1e-3)])

    losses = []
    for step, (video, text) in zip(range(given.steps), clips(*size), strict=False):
        noise, sigma = torch.randn_like(video), torch.rand(1)
        noisy = (1 - sigma) * video + sigma * noise
        output = model(noisy.to(device), (1000 * sigma).to(device), text.to(device), return_dict=False)[0]
        loss = F.mse_loss(output, (noise - video).to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        print(f"step {step}: loss {losses[-1]:.3f}")

    with tempfile.TemporaryDirectory() as folder:
        # The model's own weights are saved as ever; the added parameters also go by themselves, with their settings.
        path = Path(folder) / "sla.safetensors"
        sla_compile.save(model, path)
        sla_compile.load(before, path)  # accelerates it just as the saved one was
        print(f"saved and loaded {path.stat().st_size / 1e3:.0f} kB for {len(added)} parameters")
    assert all(torch.equal(a, b) for a, b in zip(added, sla_compile.parameters(before), strict=True))
    return losses


if __name__ == "__main__":
    main()
