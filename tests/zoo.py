"""Small diffusion transformers of diffusers: a table of constructor arguments and inputs.

Two layers, two or four heads, ragged self-attention lengths of 130 to 400 tokens. Image and video tokens outnumber
:data:`MIN_SEQ_LEN` and prompts do not, unless an entry says otherwise. A name is a class of diffusers, and what follows
it tells variants of one class apart.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sla_compile import SLAConfig

MIN_SEQ_LEN = 64
TEXT = 13  # tokens of a prompt
PADDING_MASKS = " padding_masks"  # ends the names of those that are tried with padding_masks=True, too


@dataclass(frozen=True)
class Entry:
    """How to build and to call one model.

    Args:
        family: heading in tables.
        rewritten: how many attentions qualify with these inputs.
        config: keyword arguments of the constructor.
        arguments: keyword arguments of the forward, for 0 or more additional frames or rows.
    """

    family: str
    rewritten: int
    config: dict[str, Any]
    arguments: Callable[[int], dict[str, Any]]


ZOO: dict[str, Entry] = {}


def build(name: str) -> nn.Module:
    """The model in evaluation mode, the same at every call. No parameter is zero, so that no branch is cut off."""
    import diffusers

    entry = ZOO[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(diffusers, name.partition(" ")[0])(**entry.config)
        for parameter in model.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.2)
    return model.eval()


def chosen(name: str, config: SLAConfig) -> SLAConfig:
    """The configuration for one model."""
    return config.replace(padding_masks=name.endswith(PADDING_MASKS))


def inputs(name: str, extra: int = 0) -> dict[str, Any]:
    """Keyword arguments of the forward, the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return {**ZOO[name].arguments(extra), "return_dict": False}


def outputs(result: Any) -> list[Tensor]:
    """The tensors of a model's output."""
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]


def _add(family: str, name: str, rewritten: int, config: dict[str, Any], arguments: Callable[[int], Any]) -> None:
    ZOO[name] = Entry(family, rewritten, config, arguments)


def _add_padding_masks(name: str, rewritten: int) -> None:
    ZOO[name + PADDING_MASKS] = dataclasses.replace(ZOO[name], rewritten=rewritten)


_r = torch.randn


def _t(value: float = 500.0, batch: int = 1) -> Tensor:
    return torch.full((batch,), value)


def _prompt(batch: int = 1) -> Tensor:
    return _r(batch, TEXT, 16)


def _valid(*counts: int, length: int = TEXT, dtype: torch.dtype = torch.bool) -> Tensor:
    """A padding mask (B, length) with so many valid tokens in each row."""
    return (torch.arange(length) < torch.tensor(counts)[:, None]).to(dtype)


def _grid(*sizes: int, axes: int = 3) -> Tensor:
    """Coordinates (tokens, axes) of a grid, zero in the leading axes where there are more axes than sizes."""
    grid = torch.cartesian_prod(*(torch.arange(size).float() for size in sizes))
    return torch.cat([torch.zeros(len(grid), axes - len(sizes)), grid], dim=1)


def _rotary(tokens: int, dim: int) -> tuple[Tensor, Tensor]:
    angles = _r(tokens, dim // 2).repeat_interleave(2, dim=1)
    return angles.cos(), angles.sin()


# fmt: off
# Wan and its kin: (B, C, F, H, W) latents in patches of (1, 2, 2), 48 tokens a frame.

_WAN = {
    "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4,
    "text_dim": 16, "freq_dim": 16, "ffn_dim": 32, "num_layers": 2, "rope_max_seq_len": 32,
}


def _wan(extra: int = 0, channels: int = 4, text: int = TEXT, **more: Any) -> dict[str, Any]:
    latents = _r(1, channels, 5 + 2 * extra, 12, 16)
    return {"hidden_states": latents, "timestep": _t(), "encoder_hidden_states": _r(1, text, 16), **more}


def _wan_vace(n: int) -> dict[str, Any]:
    return _wan(n, control_hidden_states=_r(1, 6, 5 + 2 * n, 12, 16), control_hidden_states_scale=torch.ones(1))


def _wan_animate(n: int) -> dict[str, Any]:
    return _wan(n, 12, pose_hidden_states=_r(1, 4, 4 + 2 * n, 12, 16), face_pixel_values=_r(1, 3, 13 + 8 * n, 16, 16),
                encoder_hidden_states_image=_r(1, 5, 16))


_add("Wan", "WanTransformer3DModel", 2, _WAN, functools.partial(_wan, text=240))
_add("Wan", "WanTransformer3DModel with image keys", 2, _WAN | {"image_dim": 16, "added_kv_proj_dim": 24},
     lambda n: _wan(n, encoder_hidden_states_image=_r(1, 240, 16), text=525))
_add("Wan", "WanVACETransformer3DModel", 3, _WAN | {"vace_layers": [0], "vace_in_channels": 6}, _wan_vace)
_add("Wan", "WanAnimateTransformer3DModel", 2,
     _WAN | {"in_channels": 12, "latent_channels": 4, "image_dim": 16, "added_kv_proj_dim": 24,
             "motion_encoder_size": 16,
             "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8}, "motion_style_dim": 8, "motion_dim": 4,
             "motion_encoder_dim": 8, "face_encoder_hidden_dim": 16, "face_encoder_num_heads": 2,
             "inject_face_latents_blocks": 2}, _wan_animate)
_add("Wan", "SkyReelsV2Transformer3DModel", 2, _WAN, _wan)
_add("Wan", "ChronoEditTransformer3DModel", 2, _WAN | {"rope_temporal_skip_len": 8}, _wan)
_add("Wan", "AnyFlowTransformer3DModel", 2, _WAN,
     lambda n: {**_wan(n), "hidden_states": _r(1, 5 + 2 * n, 4, 12, 16), "timestep": _t().expand(1, 5 + 2 * n),
                "r_timestep": _t(200.0).expand(1, 5 + 2 * n)})
_HELIOS = {key: value for key, value in _WAN.items() if key != "rope_max_seq_len"} | {"rope_dim": (4, 4, 4)}
_add("Wan", "HeliosTransformer3DModel", 2, _HELIOS, _wan)
_add("Wan", "HeliosTransformer3DModel with history", 2, _HELIOS,
     lambda n: _wan(n, indices_hidden_states=torch.arange(5 + 2 * n)[None] + 2,
                    indices_latents_history_short=torch.arange(2)[None], latents_history_short=_r(1, 4, 2, 12, 16)))

# Hunyuan: text after video in one sequence, padding masked.

_HUNYUAN = {
    "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 1,
    "num_single_layers": 1, "num_refiner_layers": 1, "mlp_ratio": 2.0, "patch_size": 2, "patch_size_t": 1,
    "guidance_embeds": False, "text_embed_dim": 16, "pooled_projection_dim": 8, "rope_axes_dim": (4, 4, 4),
}


def _hunyuan(extra: int, *valid: int, **more: Any) -> dict[str, Any]:
    batch = len(valid)
    return {"hidden_states": _r(batch, 4, 5 + 2 * extra, 12, 14), "timestep": _t(batch=batch),
            "encoder_hidden_states": _prompt(batch), "encoder_attention_mask": _valid(*valid, dtype=torch.long),
            "pooled_projections": _r(batch, 8), **more}


def _hunyuan15(n: int) -> dict[str, Any]:
    common = _hunyuan(n, 13, 6)
    del common["pooled_projections"]
    return common | {"hidden_states": _r(2, 9, 4 + 2 * n, 6, 7), "encoder_hidden_states_2": _r(2, 5, 16),
                     "encoder_attention_mask_2": _valid(5, 2, length=5), "image_embeds": _r(2, 7, 8)}


_add("Hunyuan", "HunyuanVideoTransformer3DModel", 2, _HUNYUAN, lambda n: _hunyuan(n, 13, 6))
_add("Hunyuan", "HunyuanVideoTransformer3DModel all valid", 2, _HUNYUAN | {"guidance_embeds": True},
     lambda n: _hunyuan(n, 13, guidance=_t(6.0)))
_add("Hunyuan", "HunyuanVideo15Transformer3DModel", 0,
     {key: value for key, value in _HUNYUAN.items()
      if key not in ("num_single_layers", "guidance_embeds", "pooled_projection_dim")}
     | {"in_channels": 9, "patch_size": 1, "num_layers": 2, "text_embed_2_dim": 16, "image_embed_dim": 8}, _hunyuan15)
_add_padding_masks("HunyuanVideo15Transformer3DModel", 2)
_add("Hunyuan", "HunyuanVideoFramepackTransformer3DModel", 2,
     _HUNYUAN | {"has_image_proj": True, "image_proj_dim": 8, "has_clean_x_embedder": True},
     lambda n: _hunyuan(n, 11, image_embeds=_r(1, 7, 8), indices_latents=torch.arange(5 + 2 * n) + 1,
                        latents_clean=_r(1, 4, 1, 12, 14), indices_latents_clean=torch.zeros(1),
                        latents_history_2x=_r(1, 4, 2, 12, 14), indices_latents_history_2x=torch.arange(2.0),
                        latents_history_4x=_r(1, 4, 4, 12, 14), indices_latents_history_4x=torch.arange(4.0)))
_add("Hunyuan", "HunyuanImageTransformer2DModel", 2,
     {key: value for key, value in _HUNYUAN.items() if key not in ("patch_size_t", "pooled_projection_dim")}
     | {"patch_size": (1, 1), "rope_axes_dim": (6, 6), "text_embed_2_dim": 16},
     lambda n: {key: value for key, value in _hunyuan(n, 13, 6).items() if key != "pooled_projections"}
     | {"hidden_states": _r(2, 4, 12 + 2 * n, 14), "encoder_hidden_states_2": _r(2, 5, 16),
        "encoder_attention_mask_2": _valid(5, 2, length=5)})
_add("Hunyuan", "HunyuanDiT2DModel", 2,
     {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "patch_size": 2, "sample_size": 24,
      "hidden_size": 16, "num_layers": 2, "mlp_ratio": 2.0, "cross_attention_dim": 16, "cross_attention_dim_t5": 16,
      "pooled_projection_dim": 8, "text_len": 5, "text_len_t5": 8},
     lambda n: {"hidden_states": _r(1, 4, 24, 24), "timestep": _t(), "encoder_hidden_states": _r(1, 5, 16),
                "text_embedding_mask": _valid(4, length=5), "encoder_hidden_states_t5": _r(1, 8, 16),
                "text_embedding_mask_t5": _valid(6, length=8), "image_meta_size": torch.full((1, 6), 24.0),
                "style": torch.zeros(1, dtype=torch.long), "image_rotary_emb": _rotary(144, 8)})

# CogVideoX, CogView: text before video in one sequence through one projection.

_COG = {
    "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "time_embed_dim": 8,
    "text_embed_dim": 16, "num_layers": 2, "sample_width": 16, "sample_height": 12, "sample_frames": 17,
    "patch_size": 2, "max_text_seq_length": TEXT, "use_rotary_positional_embeddings": True,
}


def _cog(n: int, **more: Any) -> dict[str, Any]:
    frames = 5 + 2 * n
    return {"hidden_states": _r(1, frames, 4, 12, 16), "encoder_hidden_states": _prompt(), "timestep": _t(),
            "image_rotary_emb": _rotary(frames * 48, 16), **more}


_FACE = {
    "num_attention_heads": 3, "is_train_face": True, "cross_attn_interval": 1, "cross_attn_dim_head": 8,
    "cross_attn_num_heads": 2,
    "LFE_id_dim": 8, "LFE_vit_dim": 8, "LFE_depth": 5, "LFE_dim_head": 8, "LFE_num_heads": 2, "LFE_num_id_token": 2,
    "LFE_num_querie": 4, "LFE_output_dim": 32, "LFE_ff_mult": 2, "LFE_num_scale": 5,
}
_add("CogVideoX", "CogVideoXTransformer3DModel", 2, _COG, _cog)
_add("CogVideoX", "ConsisIDTransformer3DModel", 2, _COG | _FACE,
     lambda n: _cog(n, id_cond=_r(1, 8), id_vit_hidden=[_r(1, 7, 8) for _ in range(5)]))


def _cogview(n: int, **more: Any) -> dict[str, Any]:
    size = torch.tensor([[24.0, 28.0]])
    return {"hidden_states": _r(1, 4, 24 + 4 * n, 28), "encoder_hidden_states": _prompt(), "timestep": _t(),
            "original_size": size, "target_size": size, "crop_coords": torch.zeros(1, 2), **more}


_COGVIEW = {
    "patch_size": 2, "in_channels": 4, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2,
    "out_channels": 4, "text_embed_dim": 16, "time_embed_dim": 8, "condition_dim": 4,
}
_add("CogVideoX", "CogView3PlusTransformer2DModel", 2, _COGVIEW | {"pos_embed_max_size": 32, "sample_size": 32},
     _cogview)
_add("CogVideoX", "CogView4Transformer2DModel", 2, _COGVIEW | {"rope_axes_dim": (64, 64)}, _cogview)
_add("CogVideoX", "GlmImageTransformer2DModel", 2, _COGVIEW | {"prior_vq_quantizer_codebook_size": 16},
     lambda n: {key: value for key, value in _cogview(n).items() if key != "original_size"}
     | {"prior_token_id": torch.randint(16, (1, (12 + 2 * n) * 14)), "prior_token_drop": torch.tensor([False])})

# LTX: packed tokens.

_LTX = {
    "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12, "cross_attention_dim": 24,
    "num_layers": 2, "caption_channels": 16,
}
_AUDIO = {
    "audio_in_channels": 4, "audio_out_channels": 4, "audio_num_attention_heads": 2, "audio_attention_head_dim": 8,
    "audio_cross_attention_dim": 16,
}


def _ltx2(n: int) -> dict[str, Any]:
    frames, audio = 5 + 2 * n, 130 + n
    return {"hidden_states": _r(1, frames * 48, 4), "audio_hidden_states": _r(1, audio, 4),
            "encoder_hidden_states": _prompt(), "audio_encoder_hidden_states": _prompt(), "timestep": _t(),
            "encoder_attention_mask": _valid(9, dtype=torch.long), "num_frames": frames, "height": 6, "width": 8,
            "audio_encoder_attention_mask": _valid(9, dtype=torch.long), "audio_num_frames": audio}


_add("LTX", "LTXVideoTransformer3DModel", 2, _LTX,
     lambda n: {"hidden_states": _r(1, (5 + 2 * n) * 48, 4), "encoder_hidden_states": _prompt(), "timestep": _t(),
                "encoder_attention_mask": _valid(9, dtype=torch.long), "num_frames": 5 + 2 * n, "height": 6,
                "width": 8})
_add("LTX", "LTX2VideoTransformer3DModel", 4, _LTX | _AUDIO, _ltx2)

# Other video transformers.

_add("Video", "MochiTransformer3DModel", 2,
     {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "pooled_projection_dim": 8, "in_channels": 4,
      "text_embed_dim": 16, "time_embed_dim": 8, "max_sequence_length": TEXT},
     lambda n: {"hidden_states": _r(2, 4, 5 + 2 * n, 12, 14), "encoder_hidden_states": _prompt(2),
                "timestep": _t(batch=2), "encoder_attention_mask": _valid(13, 6)})
_ALLEGRO = {
    "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "num_layers": 2,
    "cross_attention_dim": 24, "sample_height": 12, "sample_width": 16, "sample_frames": 5, "caption_channels": 16,
}


def _allegro(n: int, **more: Any) -> dict[str, Any]:
    frames = 5 + 2 * n
    position = [axis.long() for axis in _grid(frames, 6, 8).T[:, None]]
    rotary = tuple(_rotary(32, 4) for _ in range(3))
    return {"hidden_states": _r(1, 4, frames, 12, 16), "encoder_hidden_states": _prompt(), "timestep": _t(),
            "encoder_attention_mask": _valid(9), "image_rotary_emb": (rotary, position), **more}


_add("Video", "AllegroTransformer3DModel", 2, _ALLEGRO, _allegro)
_add("Video", "AllegroTransformer3DModel masked", 0, _ALLEGRO,
     lambda n: _allegro(n, attention_mask=(torch.arange(16) < 12).expand(1, 5 + 2 * n, 12, 16)))
_add_padding_masks("AllegroTransformer3DModel masked", 2)
_add("Video", "LatteTransformer3DModel", 2,
     {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2,
      "sample_size": 24, "patch_size": 2, "num_embeds_ada_norm": 10, "norm_type": "ada_norm_single",
      "norm_elementwise_affine": False, "caption_channels": 16, "cross_attention_dim": 16, "video_length": 3,
      "activation_fn": "gelu-approximate", "attention_bias": True},
     lambda n: {"hidden_states": _r(1, 4, 3, 24, 24), "timestep": _t(), "encoder_hidden_states": _prompt()})
_add("Video", "CosmosTransformer3DModel", 2,
     {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2,
      "mlp_ratio": 2.0, "text_embed_dim": 16, "adaln_lora_dim": 4, "max_size": (16, 16, 16),
      "concat_padding_mask": False},
     lambda n: {"hidden_states": _r(1, 4, 5 + 2 * n, 12, 16), "timestep": _t(), "encoder_hidden_states": _prompt(),
                "fps": 24})
_add("Video", "EasyAnimateTransformer3DModel", 2,
     {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "patch_size": 2,
      "sample_width": 16, "sample_height": 12, "num_layers": 2, "mmdit_layers": 1, "time_embed_dim": 8,
      "text_embed_dim": 16},
     lambda n: {"hidden_states": _r(1, 4, 5 + 2 * n, 12, 16), "timestep": _t(), "encoder_hidden_states": _prompt()})
_MOTIF = {
    "in_channels": 5, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 1,
    "num_single_layers": 2, "num_decoder_layers": 1, "mlp_ratio": 2.0, "text_embed_dim": 16, "rope_axes_dim": (4, 4, 4),
}


def _motif(n: int, **more: Any) -> dict[str, Any]:
    return {"hidden_states": _r(1, 5, 5 + 2 * n, 12, 14), "timestep": _t(), "encoder_hidden_states": _prompt(), **more}


_add("Video", "MotifVideoTransformer3DModel", 3, _MOTIF, _motif)
_add("Video", "MotifVideoTransformer3DModel text cross-attention", 3,
     _MOTIF | {"enable_text_cross_attention_dual": True, "enable_text_cross_attention_single": True},
     lambda n: _motif(n, encoder_attention_mask=_valid(9)))
_KANDINSKY = {
    "in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": 16, "in_text_dim2": 8, "time_dim": 16, "model_dim": 24,
    "ff_dim": 32, "num_text_blocks": 1, "num_visual_blocks": 2, "axes_dims": (4, 4, 4),
}
_add("Video", "Kandinsky5Transformer3DModel", 2, _KANDINSKY,
     lambda n: {"hidden_states": _r(1, 5 + 2 * n, 12, 14, 4), "encoder_hidden_states": _prompt(), "timestep": _t(),
                "pooled_projections": _r(1, 8), "text_rope_pos": torch.arange(TEXT),
                "visual_rope_pos": tuple(torch.arange(size) for size in (5 + 2 * n, 6, 7))})
_add("Video", "Kandinsky6Transformer3DModel", 4,
     _KANDINSKY | {"in_audio_dim": 4, "out_audio_dim": 4, "visual_cond": False},
     lambda n: {"hidden_states": _r(1, 5 + 2 * n, 12, 14, 4), "encoder_hidden_states": _prompt(), "timestep": _t(),
                "pooled_projections": _r(1, 8), "audio_hidden_states": _r(1, 130 + n, 4),
                "encoder_attention_mask": _valid(9)})
_add("Video", "SanaVideoTransformer3DModel", 0,
     {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2,
      "num_cross_attention_heads": 2, "cross_attention_head_dim": 12, "cross_attention_dim": 24, "caption_channels": 16,
      "sample_size": 16, "rope_max_seq_len": 32},
     lambda n: {**_wan(n), "encoder_attention_mask": _valid(9)})
_add("Video", "JoyImageEditTransformer3DModel", 2,
     {"in_channels": 4, "hidden_size": 24, "num_attention_heads": 2, "text_dim": 16, "mlp_width_ratio": 2.0,
      "num_layers": 2, "rope_dim_list": [4, 4, 4]}, _wan)


def _minimax(n: int) -> dict[str, Any]:
    video, audio = 180 + 30 * n, 20
    text_at, video_at, audio_at = torch.arange(TEXT + video + audio).split([TEXT, video, audio])
    tags = torch.cat([torch.full((count,), tag) for count, tag in ((TEXT, 1), (video, 0), (audio, 2))])
    return {"hidden_states": _r(1, video, 16), "audio_hidden_states": _r(1, audio, 4), "timestep": torch.tensor([0.5,
            0.0]), "encoder_hidden_states": _prompt(), "timestep_indices": (tags == 1).long(), "token_tags": tags,
            "position_ids": torch.arange(TEXT + video + audio)[:, None].expand(-1, 3).float(),
            "video_indices": video_at, "audio_indices": audio_at, "text_indices": text_at}


_add("Video", "MiniMaxH3Transformer3DModel", 2,
     {"num_attention_heads": 2, "attention_head_dim": 24, "hidden_size": 32, "num_layers": 2, "num_refiner_layers": 1,
      "ffn_dim": 32, "in_channels": 4, "audio_in_channels": 4, "text_dim": 16, "freq_dim": 16,
      "time_embed_hidden_dim": 16, "time_embed_dim": 16, "rope_freq_dim": 4}, _minimax)

# Flux and its kin: two streams, then one.

_FLUX = {
    "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 12, "num_attention_heads": 2,
    "joint_attention_dim": 16, "axes_dims_rope": (4, 4, 4),
}


def _flux(n: int, axes: int = 3, **more: Any) -> dict[str, Any]:
    rows = 12 + 2 * n
    return {"hidden_states": _r(1, rows * 14, 4), "encoder_hidden_states": _prompt(), "timestep": _t(0.5),
            "img_ids": _grid(rows, 14, axes=axes), "txt_ids": torch.zeros(TEXT, axes), **more}


_FOUR_AXES = {"axes_dims_rope": (4, 4, 4, 4), "attention_head_dim": 16}
_add("Flux", "FluxTransformer2DModel", 2, _FLUX | {"patch_size": 1, "pooled_projection_dim": 8},
     lambda n: _flux(n, pooled_projections=_r(1, 8)))
_add("Flux", "Flux2Transformer2DModel", 2, _FLUX | _FOUR_AXES | {"timestep_guidance_channels": 8},
     lambda n: _flux(n, 4, guidance=_t(4.0)))
_add("Flux", "Flux3Transformer2DModel", 3, _FLUX | _FOUR_AXES | {"cond_in_channels": 4, "timestep_channels": 8},
     lambda n: _flux(n, 4) | {"image_cond_hidden_states": _r(1, 130, 4), "image_cond_ids": _grid(10, 13, axes=4)})
_CHROMA = _FLUX | {"approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1}
_add("Flux", "ChromaTransformer2DModel", 2, _CHROMA, _flux)
_add("Flux", "ChromaTransformer2DModel masked", 0, _CHROMA,
     lambda n: _flux(n, attention_mask=torch.cat([_valid(9), torch.ones(1, (12 + 2 * n) * 14, dtype=torch.bool)], 1)))
_add_padding_masks("ChromaTransformer2DModel masked", 2)
_add("Flux", "BriaTransformer2DModel", 2, _FLUX, _flux)
_add("Flux", "BriaFiboTransformer2DModel", 2, _FLUX | {"text_encoder_dim": 12},
     lambda n: _flux(n, text_encoder_layers=[_r(1, TEXT, 12) for _ in range(2)]))
_add("Flux", "LongCatImageTransformer2DModel", 2, _FLUX | {"pooled_projection_dim": 8}, _flux)
_add("Flux", "OvisImageTransformer2DModel", 2, _FLUX | {"out_channels": 4}, _flux)
_add("Flux", "SD3Transformer2DModel", 3,
     {"sample_size": 32, "patch_size": 2, "in_channels": 4, "num_layers": 2, "attention_head_dim": 8,
      "num_attention_heads": 2, "joint_attention_dim": 16, "caption_projection_dim": 16, "pooled_projection_dim": 8,
      "out_channels": 4, "pos_embed_max_size": 32, "dual_attention_layers": (0,), "qk_norm": "rms_norm"},
     lambda n: {"hidden_states": _r(1, 4, 24 + 4 * n, 28), "encoder_hidden_states": _prompt(),
                "pooled_projections": _r(1, 8), "timestep": _t()})
_add("Flux", "AuraFlowTransformer2DModel", 2,
     {"sample_size": 32, "patch_size": 2, "in_channels": 4, "num_mmdit_layers": 1, "num_single_dit_layers": 1,
      "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 16, "caption_projection_dim": 16,
      "pos_embed_max_size": 256},
     lambda n: {"hidden_states": _r(1, 4, 24 + 4 * n, 28), "encoder_hidden_states": _prompt(), "timestep": _t(0.5)})

# Qwen, Z-Image, Lumina and their kin: prompts are padded and masked.

_QWEN = {"in_channels": 16, "out_channels": 4, "num_layers": 2, "attention_head_dim": 12, "num_attention_heads": 2}


def _qwen(n: int, *valid: int, **more: Any) -> dict[str, Any]:
    rows, batch = 12 + 2 * n, len(valid)
    return {"hidden_states": _r(batch, rows * 14, 16), "encoder_hidden_states": _prompt(batch),
            "encoder_hidden_states_mask": _valid(*valid), "timestep": _t(0.5, batch),
            "img_shapes": [[(1, rows, 14)]] * batch, **more}


def _qwen21(n: int) -> dict[str, Any]:
    rows = 12 + 2 * n
    slots = torch.cat([torch.zeros(1, TEXT), torch.ones(1, rows * 14 // 4)], dim=1).bool()
    return {"hidden_states": _r(1, rows * 14, 16), "encoder_hidden_states": _prompt(), "timestep": _t(0.5),
            "img_shapes": [[(1, rows, 14)]], "img_mask": slots}


_add("Masked prompts", "QwenImageTransformer2DModel", 2,
     _QWEN | {"patch_size": 2, "joint_attention_dim": 16, "axes_dims_rope": (4, 4, 4)}, lambda n: _qwen(n, 13, 6))
_add("Masked prompts", "QwenImage21Transformer2DModel", 0,
     _QWEN | {"out_channels": 16, "context_in_dim": 16, "mlp_ratio": 2, "axes_dims_rope": (4, 4, 4)}, _qwen21)
_add("Masked prompts", "NucleusMoEImageTransformer2DModel", 0,
     _QWEN | {"joint_attention_dim": 16, "axes_dims_rope": (4, 4, 4), "mlp_ratio": 2.0, "moe_enabled": False,
              "attention_head_dim": 12},
     lambda n: {**_qwen(n, 9), "img_shapes": [(1, 12 + 2 * n, 14)]})
_add("Masked prompts", "ZImageTransformer2DModel", 3,
     {"in_channels": 4, "dim": 24, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2,
      "cap_feat_dim": 16, "axes_dims": [4, 4, 4], "axes_lens": [256, 32, 32]},
     lambda n: {"x": [_r(4, 1, 24 + 4 * n, 28), _r(4, 1, 24, 20)], "t": _t(0.5, 2), "cap_feats": [_r(13, 16), _r(30,
                16)]})
_LUMINA = {
    "sample_size": 32, "patch_size": 2, "in_channels": 4, "hidden_size": 24, "num_layers": 2, "num_attention_heads": 4,
    "num_kv_heads": 2, "multiple_of": 8,
}


def _lumina(n: int, *valid: int) -> dict[str, Any]:
    batch = len(valid)
    return {"hidden_states": _r(batch, 4, 24 + 4 * n, 28), "timestep": _t(0.5, batch),
            "encoder_hidden_states": _prompt(batch)}


_add("Masked prompts", "Lumina2Transformer2DModel", 3,
     _LUMINA | {"num_refiner_layers": 1, "axes_dim_rope": (2, 2, 2), "axes_lens": (64, 32, 32), "cap_feat_dim": 16},
     lambda n: {**_lumina(n, 13, 6), "encoder_attention_mask": _valid(13, 6)})
_add("Masked prompts", "LuminaNextDiT2DModel", 2, _LUMINA | {"hidden_size": 32, "cross_attention_dim": 16},
     lambda n: {**_lumina(n, 13, 6), "encoder_mask": _valid(13, 6), "cross_attention_kwargs": {},
                "image_rotary_emb": torch.polar(
         torch.ones(1), _r(32, 32, 4))})
_add("Masked prompts", "Krea2Transformer2DModel", 2,
     {"in_channels": 4, "num_layers": 2, "attention_head_dim": 12, "num_attention_heads": 4, "num_key_value_heads": 2,
      "intermediate_size": 32, "timestep_embed_dim": 8, "text_hidden_dim": 16, "num_text_layers": 2,
      "text_num_attention_heads": 2, "text_num_key_value_heads": 2, "text_intermediate_size": 32,
      "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1, "axes_dims_rope": (4, 4, 4)},
     lambda n: {"hidden_states": _r(2, (12 + 2 * n) * 14, 4), "encoder_hidden_states": _r(2, TEXT, 2, 16),
                "timestep": _t(0.5, 2), "encoder_attention_mask": _valid(13, 6),
                "position_ids": torch.cat([torch.zeros(TEXT, 3), _grid(12 + 2 * n, 14)])})
_add("Masked prompts", "ErnieImageTransformer2DModel", 2,
     {"hidden_size": 24, "num_attention_heads": 2, "num_layers": 2, "ffn_hidden_size": 32, "in_channels": 4,
      "out_channels": 4, "text_in_dim": 16, "rope_axes_dim": (4, 4, 4)},
     lambda n: {"hidden_states": _r(2, 4, 12 + 2 * n, 14), "timestep": _t(batch=2), "text_bth": _prompt(2),
                "text_lens": torch.tensor([13, 6])})
_add("Masked prompts", "HiDreamImageTransformer2DModel", 2,
     {"patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_single_layers": 1,
      "attention_head_dim": 8, "num_attention_heads": 2, "caption_channels": [16, 12], "text_emb_dim": 8,
      "num_routed_experts": 2, "num_activated_experts": 1, "axes_dims_rope": (4, 2, 2), "max_resolution": (32, 32),
      "llama_layers": (0, 1), "force_inference_output": True},
     lambda n: {"hidden_states": _r(1, 4, 24 + 4 * n, 28), "timesteps": _t(), "encoder_hidden_states_t5": _r(1, 7, 16),
                "encoder_hidden_states_llama3": _r(2, 1, 5, 12), "pooled_embeds": _r(1, 8)})
_add("Masked prompts", "PRXTransformer2DModel", 0,
     {"in_channels": 4, "patch_size": 2, "context_in_dim": 16, "hidden_size": 24, "mlp_ratio": 2.0, "num_heads": 2,
      "depth": 2, "axes_dim": [6, 6]},
     lambda n: {"hidden_states": _r(2, 4, 24 + 4 * n, 28), "timestep": _t(0.5, 2), "encoder_hidden_states": _r(2,
                TEXT, 16), "attention_mask": _valid(13, 6)})
_add("Masked prompts", "BriaFibo2Transformer2DModel", 3,
     {"in_channels": 4, "dim": 24, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "cap_feat_dim": 16,
      "injection_layer_ids": (0, 1), "perceiver_num_layers": 1, "min_num_gist_tokens": 8, "max_num_gist_tokens": 16,
      "gist_step": 4, "gist_min_text_len": 4, "gist_max_text_len": 16, "axes_dims": (4, 4, 4), "axes_lens": (64, 32,
      32)},
     lambda n: {"hidden_states": _r(2, 4, 24 + 4 * n, 28), "timestep": _t(0.5, 2),
                "encoder_hidden_states": _r(2, 3, TEXT, 16), "encoder_attention_mask": _valid(13, 6)})
_add("Masked prompts", "OmniGenTransformer2DModel", 0,
     {"in_channels": 4, "hidden_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 32,
      "num_layers": 2, "pad_token_id": 0, "vocab_size": 32, "pos_embed_max_size": 32, "time_step_dim": 8,
      "rope_scaling": {"short_factor": [1.0] * 6, "long_factor": [1.0] * 6}},
     lambda n: {"hidden_states": _r(1, 4, 24 + 4 * n, 28), "timestep": _t(0.5), "input_ids": torch.ones(1, TEXT).long(),
                "input_img_latents": [], "input_image_sizes": {},
                "attention_mask": torch.ones(1, *[TEXT + 1 + (12 + 2 * n) * 14] * 2).tril(168 + 28 * n),
                "position_ids": torch.arange(TEXT + 1 + (12 + 2 * n) * 14)[None]})


def _ideogram(n: int) -> dict[str, Any]:
    tokens = TEXT + (12 + 2 * n) * 14
    return {"hidden_states": _r(1, tokens, 4), "timestep": _t(0.5), "encoder_hidden_states": _r(1, tokens, 16),
            "position_ids": torch.cat([torch.zeros(TEXT, 3), _grid(12 + 2 * n, 14)])[None].long(),
            "segment_ids": torch.zeros(1, tokens, dtype=torch.long),
            "indicator": torch.where(torch.arange(tokens) < TEXT, 3, 2)[None]}


_add("Masked prompts", "Ideogram4Transformer2DModel", 0,
     {"in_channels": 4, "num_layers": 2, "attention_head_dim": 12, "num_attention_heads": 2, "intermediate_size": 32,
      "adaln_dim": 8, "llm_features_dim": 16, "mrope_section": (2, 2, 2)}, _ideogram)

# Older image transformers, class- or cross-attention-conditioned.

_PATCHES = {
    "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "num_layers": 2, "sample_size": 24,
    "patch_size": 2,
}
_add("Image", "DiTTransformer2DModel", 2, _PATCHES | {"out_channels": 4, "num_embeds_ada_norm": 10},
     lambda n: {"hidden_states": _r(1, 4, 24, 24), "timestep": torch.tensor([5]), "class_labels": torch.tensor([3])})
_add("Image", "PixArtTransformer2DModel", 2, _PATCHES | {"cross_attention_dim": 16, "caption_channels": 16},
     lambda n: {"hidden_states": _r(1, 4, 24, 24), "encoder_hidden_states": _prompt(), "timestep": _t(),
                "encoder_attention_mask": _valid(9), "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}})
_add("Image", "SanaTransformer2DModel", 0,
     {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2,
      "num_cross_attention_heads": 2, "cross_attention_head_dim": 8, "cross_attention_dim": 16, "caption_channels": 16,
      "sample_size": 12},
     lambda n: {"hidden_states": _r(1, 4, 12, 12), "encoder_hidden_states": _r(1, 144, 16), "timestep": _t()})

# Audio.

_add("Audio", "StableAudioDiTModel", 2,
     {"sample_size": 200, "in_channels": 4, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 4,
      "num_key_value_attention_heads": 2, "out_channels": 4, "cross_attention_dim": 32, "time_proj_dim": 8,
      "global_states_input_dim": 16, "cross_attention_input_dim": 16},
     lambda n: {"hidden_states": _r(1, 4, 200 + 50 * n), "timestep": _t(0.5), "encoder_hidden_states": _prompt(),
                "global_hidden_states": _r(1, 1, 16), "rotary_embedding": _rotary(201 + 50 * n, 8)})
for _differential in (False, True):
    _add("Audio", "StableAudio3DiTModel" + " differential" * _differential, 2,
         {"io_channels": 4, "embed_dim": 64, "depth": 2, "num_heads": 2, "cond_token_dim": 16, "global_cond_dim": 16,
          "local_add_cond_dim": 4, "timestep_features_dim": 8, "num_memory_tokens": 4,
          "use_differential_attention": _differential},
         lambda n: {"hidden_states": _r(1, 4, 200 + 50 * n), "timestep": _t(0.5), "encoder_hidden_states": _prompt(),
                    "global_hidden_states": _r(1, 16), "local_add_cond": _r(1, 4, 200 + 50 * n)})
_add("Audio", "AceStepTransformer1DModel", 1,
     {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
      "num_key_value_heads": 2, "head_dim": 8, "in_channels": 12, "audio_acoustic_hidden_dim": 4, "sliding_window": 16},
     lambda n: {"hidden_states": _r(1, 300 + 50 * n, 4), "timestep": _t(0.5), "timestep_r": _t(0.2),
                "encoder_hidden_states": _r(1, TEXT, 24), "context_latents": _r(1, 300 + 50 * n, 8)})
_add("Audio", "LongCatAudioDiTTransformer", 2,
     {"dit_dim": 24, "dit_depth": 2, "dit_heads": 2, "dit_text_dim": 16, "latent_dim": 4, "ff_mult": 2.0},
     lambda n: {"hidden_states": _r(2, 200 + 50 * n, 4), "encoder_hidden_states": _prompt(2), "timestep": _t(0.5,
                2), "encoder_attention_mask": _valid(13, 6), "attention_mask": _valid(200, 150, length=200 + 50 * n),
                "latent_cond": _r(2, 200 + 50 * n, 4)})
_add("Audio", "MiniMaxMusic3Transformer1DModel", 2,
     {"in_channels": 4, "condition_dim": 16, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16,
      "ff_inner_dim": 32, "rotary_dim": 8, "fourier_embedding_dim": 8},
     lambda n: {"hidden_states": _r(1, 4, 200 + 50 * n), "timestep": _t(0.5),
                "encoder_hidden_states": _r(1, 200 + 50 * n, 16)})
