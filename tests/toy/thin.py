"""The thin networks of the tiny base, and their zero-padding into the layout of SD1.x.

A thin network has the parts of the full one with fewer channels. Its normalization layers count the channels that
padding will add (GroupNorm keeps the channels per group, LayerNorm takes its statistics over the full width), so the
padded network computes the same numbers. Parameter names are those of an SD1.x single file, so padding needs no
renaming.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

FULL_WIDTH = 320
HEAD_WIDTH = 40
CONTEXT_WIDTH = 768
LATENT_CHANNELS = 4
FULL_VAE_WIDTH = 64
VAE_WIDTHS = (16, 32, 48, 64)
COLOR_STD = 0.3

# ---- UNet --------------------------------------------------------------------------------------


def embed_timesteps(timesteps, width=FULL_WIDTH):
    """Return DDPM's sinusoids: [n] -> [n, width], cosines first."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
    angles = timesteps[:, None].float() * frequencies[None]
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class WideLayerNorm(nn.LayerNorm):
    """LayerNorm whose mean and variance count zeros up to the full width."""

    def forward(self, x):
        mean = x.sum(-1, keepdim=True) / FULL_WIDTH
        centered = x - mean
        missing = FULL_WIDTH - x.shape[-1]
        variance = (centered.square().sum(-1, keepdim=True) + missing * mean.square()) / FULL_WIDTH
        return centered * torch.rsqrt(variance + self.eps) * self.weight + self.bias


def _group_norm(channels, full_channels, eps=1e-5):
    return nn.GroupNorm(channels * 32 // full_channels, channels, eps=eps)


class ResBlock(nn.Module):
    """in_layers, time embedding, out_layers, and a 1x1 skip if the width changes."""

    def __init__(self, width, inputs=1):
        super().__init__()
        wide = width * inputs
        self.in_layers = nn.Sequential(
            _group_norm(wide, FULL_WIDTH * inputs), nn.SiLU(), nn.Conv2d(wide, width, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(4 * width, width))
        self.out_layers = nn.Sequential(
            _group_norm(width, FULL_WIDTH), nn.SiLU(), nn.Identity(), nn.Conv2d(width, width, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if inputs == 1 else nn.Conv2d(wide, width, 1)

    def forward(self, x, emb):
        h = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class Attention(nn.Module):
    """Multi-head attention with heads of 40."""

    def __init__(self, width, context_width):
        super().__init__()
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_width, width, bias=False)
        self.to_v = nn.Linear(context_width, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def forward(self, x, context):
        q, k, v = (self._split(f(y)) for f, y in ((self.to_q, x), (self.to_k, context), (self.to_v, context)))
        out = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(out.transpose(1, 2).flatten(2))

    @staticmethod
    def _split(x):
        return x.unflatten(2, (-1, HEAD_WIDTH)).transpose(1, 2)


class GEGLU(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.proj = nn.Linear(width, 8 * width)

    def forward(self, x):
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.net = nn.Sequential(GEGLU(width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x):
        return self.net(x)


class TransformerBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.attn1 = Attention(width, width)
        self.attn2 = Attention(width, CONTEXT_WIDTH)
        self.ff = FeedForward(width)
        self.norm1 = WideLayerNorm(width)
        self.norm2 = WideLayerNorm(width)
        self.norm3 = WideLayerNorm(width)

    def forward(self, x, context):
        h = self.norm1(x)
        x = x + self.attn1(h, h)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = _group_norm(width, FULL_WIDTH, eps=1e-6)
        self.proj_in = nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(width)])
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x, context):
        h = self.proj_in(self.norm(x))
        tokens = h.flatten(2).transpose(1, 2)
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        return x + self.proj_out(tokens.transpose(1, 2).reshape(h.shape))


class ThinUNet(nn.Module):
    """SD1's UNet with one level, one res block and no middle block, `width` channels of 320."""

    def __init__(self, width=120):
        super().__init__()
        self.width = width
        self.time_embed = nn.Sequential(nn.Linear(FULL_WIDTH, 4 * width), nn.SiLU(), nn.Linear(4 * width, 4 * width))
        self.input_blocks = nn.ModuleList(
            [
                nn.ModuleList([nn.Conv2d(LATENT_CHANNELS, width, 3, padding=1)]),
                nn.ModuleList([ResBlock(width), SpatialTransformer(width)]),
            ]
        )
        self.output_blocks = nn.ModuleList(
            [nn.ModuleList([ResBlock(width, inputs=2), SpatialTransformer(width)]) for _ in range(2)]
        )
        self.out = nn.Sequential(
            _group_norm(width, FULL_WIDTH), nn.SiLU(), nn.Conv2d(width, LATENT_CHANNELS, 3, padding=1)
        )

    def forward(self, x, timesteps, context):
        """Map x [n, 4, h, w], timesteps [n] in 0..999, context [n, 77, 768] to eps [n, 4, h, w]."""
        emb = self.time_embed(embed_timesteps(timesteps))
        skips = [self.input_blocks[0][0](x)]
        res, attention = self.input_blocks[1]
        h = attention(res(skips[0], emb), context)
        skips.append(h)
        for res, attention in self.output_blocks:
            h = attention(res(torch.cat([h, skips.pop()], dim=1), emb), context)
        return self.out(h)


def zero_outputs(unet):
    """Start every residual branch and the output at zero, as SD does."""
    for name, module in unet.named_modules():
        if name.endswith(("out_layers.3", "proj_out", "out.2")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)


# ---- VAE (the architecture of TAESD, MIT licensed, by Ollin Boer Bohan) --------------------------


def _conv(inputs, outputs, **options):
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


class Clamp(nn.Module):
    def forward(self, x):
        return torch.tanh(x / 3) * 3


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Sequential(_conv(width, width), nn.ReLU(), _conv(width, width), nn.ReLU(), _conv(width, width))

    def forward(self, x):
        return F.relu(self.conv(x) + x)


def _encoder(a, b, c, d):
    return nn.Sequential(
        _conv(3, a), Block(a),
        _conv(a, b, stride=2, bias=False), Block(b), Block(b), Block(b),
        _conv(b, c, stride=2, bias=False), Block(c), Block(c), Block(c),
        _conv(c, d, stride=2, bias=False), Block(d), Block(d), Block(d),
        _conv(d, LATENT_CHANNELS),
    )  # fmt: skip


def _decoder(a, b, c, d):
    def up():
        return nn.Upsample(scale_factor=2)

    return nn.Sequential(
        Clamp(), _conv(LATENT_CHANNELS, d), nn.ReLU(),
        Block(d), Block(d), Block(d), up(), _conv(d, c, bias=False),
        Block(c), Block(c), Block(c), up(), _conv(c, b, bias=False),
        Block(b), Block(b), Block(b), up(), _conv(b, a, bias=False),
        Block(a), _conv(a, 3),
    )  # fmt: skip


class ThinVAE(nn.Module):
    """TAESD with narrow outer levels. Pixels are [n, 3, h, w] in 0..1, latents have unit variance."""

    def __init__(self, widths=VAE_WIDTHS):
        super().__init__()
        self.taesd_encoder = _encoder(*widths)
        self.taesd_decoder = _decoder(*widths)

    def encode(self, pixels):
        return self.taesd_encoder(pixels)

    def decode(self, latents):
        return self.taesd_decoder(latents)


def _stages(vae):
    """Return the convolutions between the blocks, first to last."""
    return [layer for layer in (*vae.taesd_encoder, *vae.taesd_decoder) if isinstance(layer, nn.Conv2d)]


@torch.no_grad()
def start_blurred(vae, pixels):
    """Initialize a VAE to shrink and enlarge pictures [n, 3, h, w] in its first three channels.

    The fourth latent is random, of unit variance. All other weights are random, and the residual branches quiet. From
    He's initialization alone, edges appear only after ten times as many pictures.
    """
    for module in vae.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in vae.modules():
        if isinstance(module, Block):
            module.conv[4].weight *= 0.1
    for conv in _stages(vae):
        conv.weight[:, :3] *= 0.2
        conv.weight[:3] = 0
        taps = slice(1, 3) if conv.stride[0] == 2 else slice(1, 2)
        for i in range(3):
            conv.weight[i, i, taps, taps] = 1 / len(range(3)[taps]) ** 2
    to_latents, from_latents = vae.taesd_encoder[-1], vae.taesd_decoder[1]
    to_latents.weight[:3] /= COLOR_STD
    to_latents.bias[:3] = -0.5 / COLOR_STD
    latents = vae.encode(pixels)[:, 3]
    to_latents.weight[3] /= latents.std()
    to_latents.bias[3] = -latents.mean() / latents.std()
    from_latents.weight[:3] *= COLOR_STD
    from_latents.bias[:3] = 0.5
    vae.taesd_decoder[-1].weight[:, 3:] = 0


# ---- padding -------------------------------------------------------------------------------------


def pad(tensor, shape, axis_parts=None):
    """Zero-pad to shape; axis_parts {axis: n} splits that axis into n equal parts, padded separately."""
    for axis, parts in (axis_parts or {}).items():
        chunks = tensor.chunk(parts, dim=axis)
        tensor = torch.cat([_pad_axis(c, axis, shape[axis] // parts) for c in chunks], dim=axis)
    for axis, length in enumerate(shape):
        tensor = _pad_axis(tensor, axis, length)
    return tensor


def _pad_axis(tensor, axis, length):
    missing = length - tensor.shape[axis]
    if missing == 0:
        return tensor
    shape = list(tensor.shape)
    shape[axis] = missing
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=axis)


def _parts(name):
    """Return the axes of a UNet parameter that hold two halves, each active in its own first channels."""
    if ".ff.net.0.proj." in name:
        return {0: 2}
    if name.startswith("output_blocks.") and name.endswith(("0.in_layers.0.weight", "0.in_layers.0.bias")):
        return {0: 2}
    if name.startswith("output_blocks.") and name.endswith(("0.in_layers.2.weight", "0.skip_connection.weight")):
        return {1: 2}
    return {}


def pad_unet(state):
    """Pad thin UNet parameters to the full width, under the same names."""
    with torch.device("meta"):
        full = ThinUNet(FULL_WIDTH).state_dict()
    return {name: pad(value, full[name].shape, _parts(name)) for name, value in state.items()}


def pad_vae(state):
    """Pad thin VAE parameters to TAESD with 64 channels throughout, under the same names."""
    with torch.device("meta"):
        full = ThinVAE((FULL_VAE_WIDTH,) * 4).state_dict()
    return {name: pad(value, full[name].shape) for name, value in state.items()}
