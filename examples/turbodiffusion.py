"""Text to video with a public checkpoint that was trained with SLA: nothing is left to fine-tune.

    python examples/turbodiffusion.py --checkpoint TurboWan2.1-T2V-1.3B-480P.pth "A cat surfs on a wave at sunset ..."
    python examples/turbodiffusion.py --small    # random weights, a tiny model, no download, seconds

The checkpoint is TurboDiffusion's (arXiv 2512.16093), from https://huggingface.co/TurboDiffusion, quantized or not;
text encoder and autoencoder are those of the Wan model that it was made from. It takes one to four steps. diffusers'
pipeline needs transformers and ftfy.
"""

import argparse
import math

import numpy
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from diffusers.utils import export_to_video

import sla_compile
from sla_compile import turbodiffusion

# Where the authors' scripts stop on the way from noise to video, as angles: tan is noise over signal.
ANGLES = (math.atan(80), 1.5, 1.4, 1.0)
SIGMAS = tuple(math.sin(angle) / (math.sin(angle) + math.cos(angle)) for angle in ANGLES)


class FewSteps(FlowMatchEulerDiscreteScheduler):
    """Each step jumps to the model's estimate of the video and adds fresh noise, less every time."""

    def __init__(self) -> None:
        super().__init__(stochastic_sampling=True)

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        super().set_timesteps(sigmas=list(SIGMAS[:num_inference_steps]), device=device)


def small_pipeline() -> WanPipeline:
    """Random weights; its text embeddings are given."""
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        num_layers=2, num_attention_heads=2, attention_head_dim=64, ffn_dim=128, text_dim=32, freq_dim=32
    )
    autoencoder = AutoencoderKLWan(base_dim=3, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    parts = dict(tokenizer=None, text_encoder=None, scheduler=FewSteps(), transformer_2=None)
    return WanPipeline(transformer=transformer, vae=autoencoder, **parts)


def main(arguments: list[str] | None = None) -> numpy.ndarray:
    """Returns the frames, (F, H, W, 3) from 0 to 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", help="long English prompts are what the checkpoints were trained on")
    parser.add_argument("--small", action="store_true", help="random weights and a clip of 5 frames")
    parser.add_argument("--checkpoint", help="a .pth file of TurboDiffusion")
    parser.add_argument("--base", default="Wan-AI/Wan2.1-T2V-1.3B-Diffusers", help="the Wan model it was made from")
    parser.add_argument("--sparsity", type=float, default=0.9, help="0.85 is the authors' advice for quality")
    parser.add_argument("--steps", type=int, default=4, choices=range(1, len(SIGMAS) + 1))
    parser.add_argument("--size", type=int, nargs=2, default=(480, 832), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--output", help="an .mp4 file (needs imageio and imageio-ffmpeg)")
    given = parser.parse_args(arguments)
    if not given.small and not (given.checkpoint and given.prompt):
        parser.error("pass a prompt and --checkpoint, or --small")

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if given.small:
        pipeline, text = small_pipeline(), dict(prompt_embeds=torch.randn(1, 16, 32))
        given.size, given.frames = (128, 160), 5
        sla_compile.accelerate(pipeline.transformer, config=turbodiffusion.CONFIG)
    else:
        pipeline, text = WanPipeline.from_pretrained(given.base, torch_dtype=torch.bfloat16), dict(prompt=given.prompt)
        pipeline.scheduler = FewSteps()
        turbodiffusion.load(pipeline.transformer, given.checkpoint, sparsity=given.sparsity)
    pipeline.to(device)
    if device == "cuda":
        pipeline.transformer.compile()

    height, width = given.size
    channels, every = pipeline.transformer.config.in_channels, pipeline.vae_scale_factor_spatial
    shape = 1, channels, (given.frames - 1) // pipeline.vae_scale_factor_temporal + 1, height // every, width // every
    frames = pipeline(
        **text, height=height, width=width, num_frames=given.frames, num_inference_steps=given.steps,
        guidance_scale=1.0, latents=SIGMAS[0] * torch.randn(shape, device=device),
    ).frames[0]  # fmt: skip
    print(sla_compile.report(pipeline.transformer))
    if given.output:
        export_to_video(list(frames), given.output, fps=16)
    return frames


if __name__ == "__main__":
    main()
