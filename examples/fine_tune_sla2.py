"""Fine-tune a video transformer with SLA2 in its two stages, save what was added, and load it again.

    python examples/fine_tune_sla2.py            # random weights, 780 tokens, some minutes on two cores
    python examples/fine_tune_sla2.py --small    # a tiny model, seconds

The data is synthetic; with your own, replace `clips`. docs/sla2.md says what the stages are.
"""

import argparse
import copy
import tempfile
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from fine_tune import clips
from torch.nn import functional as F

import sla_compile


def main(arguments: list[str] | None = None) -> tuple[sla_compile.Calibration, list[float]]:
    """Returns what stage 1 did, and the loss of every step of stage 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tiny model and clip")
    parser.add_argument("--steps", type=int, default=20, help="of stage 2")
    parser.add_argument("--router-steps", type=int, default=100, help="of stage 1, for each attention")
    parser.add_argument("--folder", help="keep stage 1's samples and results here, to go on after an interruption")
    given = parser.parse_args(arguments)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    heads, head_dim, size = (2, 64, (2, 20, 22)) if given.small else (12, 128, (2, 30, 52))
    model = WanTransformer3DModel(
        num_layers=2, num_attention_heads=heads, attention_head_dim=head_dim, ffn_dim=4 * heads * head_dim, text_dim=128
    ).to(device)
    before = copy.deepcopy(model)
    sla_compile.accelerate(model, config=sla_compile.SLAConfig(method="sla2", sparsity=0.75, min_seq_len=64))

    def noisy(video: torch.Tensor, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        noise = torch.randn_like(video)
        return (1 - sigma) * video + sigma * noise, noise - video

    # Stage 1: routers and alphas imitate full attention, over clips at all noise levels. The model is not trained.
    batches = []
    for (video, text), sigma in zip(clips(*size), torch.linspace(0.1, 0.9, 4), strict=False):
        given_video = noisy(video, sigma)[0]
        batches.append(tuple(t.to(device) for t in (given_video, 1000 * sigma[None], text)))
    steps = 10 if given.small else given.router_steps
    calibration = sla_compile.calibrate(model, batches, samples=4, steps=steps, folder=given.folder)
    print(calibration)

    # Stage 2: your own loop, with the routers frozen. Alphas may move faster than trained weights.
    tuned = sla_compile.parameters(model, stage=2)
    alphas = [parameter for name, parameter in model.named_parameters() if name.endswith("alpha_logit")]
    others = [parameter for parameter in tuned if all(parameter is not alpha for alpha in alphas)]
    optimizer = torch.optim.AdamW([dict(params=others, lr=1e-4), dict(params=alphas, lr=1e-2, weight_decay=0.0)])
    losses = []
    for step, (video, text) in zip(range(given.steps), clips(*size), strict=False):
        sigma = torch.rand(1)
        noisy_video, target = noisy(video, sigma)
        output = model(noisy_video.to(device), (1000 * sigma).to(device), text.to(device), return_dict=False)[0]
        loss = F.mse_loss(output, target.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        print(f"step {step}: loss {losses[-1]:.3f}")

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sla2.safetensors"
        sla_compile.save(model, path)
        sla_compile.load(before, path)  # accelerates it just as the saved one was, routers and alphas included
        print(f"saved and loaded {path.stat().st_size / 1e3:.0f} kB")
    pairs = zip(sla_compile.parameters(model), sla_compile.parameters(before), strict=True)
    assert all(torch.equal(one, two) for one, two in pairs)
    return calibration, losses


if __name__ == "__main__":
    main()
