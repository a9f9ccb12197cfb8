"""The straightforward implementations that benchmarks/step_time.py compares with: KAIR's VRT and taming's VQGAN loop.

VRT: deformable alignment, mutual attention and optical flow run frame by frame and one direction at a time; masks and
position indices are computed in every block; convolutions are 3D; the optimizer and the moving average update one
tensor at a time; each step waits for its loss.

VQGAN: each batch takes two passes through the autoencoder, one for each optimizer, in the usual memory format. The
discriminator is stepped every time; before disc_start its terms are computed and multiplied by 0.
"""

from __future__ import annotations

from types import MethodType

import torch
import torch.nn.functional as F
from torchvision.ops import deform_conv2d

from models import network_vrt as vrt
from models.model_base import ModelBase
from models.model_vqgan import ModelVQGAN


def straightforward(model: ModelBase) -> None:
    """Replace the methods of this model alone, and of its modules, with the straightforward ones."""
    if isinstance(model, ModelVQGAN):
        for network in model.networks.values():
            network.to(memory_format=torch.contiguous_format)
        model.optimize_parameters = MethodType(taming_step, model)
        return
    if not isinstance(model.netG, vrt.VRT):
        raise SystemExit("--against straightforward: there is one for VRT and VQGAN only")
    ways = {vrt.DeformableAlignment: align_frame_by_frame, vrt.WindowAttention: attend_plainly,
            vrt.Group: mask_each_time, vrt.FrameConv: conv_3d, vrt.LastConv: conv_3d}
    for module in model.netG.modules():
        if type(module) in ways:
            module.forward = MethodType(ways[type(module)], module)
        if isinstance(module, vrt.Stage):
            for block in module.residual_group2.blocks:
                block.checkpoint_attn = True
    model.netG._flows = MethodType(flow_one_way_then_the_other, model.netG)
    groups = [{**group, "fused": False, "foreach": False} for group in model.G_optimizer.param_groups]
    model.G_optimizer = model.optimizers["optimizerG"] = type(model.G_optimizer)(groups)
    model.update_E = MethodType(average_one_by_one, model)
    step = model.optimize_parameters

    def step_and_wait(iteration):
        step(iteration)
        model.log_dict["G_loss"].item()

    model.optimize_parameters = step_and_wait


# ---------------------------------------------------------------- VRT


def align_frame_by_frame(self, clip, flows):
    """DeformableAlignment with torchvision's kernel, one pair of frames of one direction at a time."""
    def align(clip, t):  # what follows frame t onto it
        sources = [clip[:, t + n] if t + n < clip.shape[1] else torch.zeros_like(clip[:, 0])
                   for n in range(1, self.num_sources + 1)]
        onto = [flow[:, t] if t < flow.shape[1] else torch.zeros_like(flow[:, 0]) for flow in self.one_way]
        warped = [vrt.warp_frames(source[:, None], flow[:, None])[:, 0] for source, flow in zip(sources, onto)]
        offset, modulation = self.conv_offset(torch.cat((*warped, clip[:, t], *onto), 1)).split(self.splits, dim=1)
        parts = (self.max_residue * offset.tanh()).chunk(self.num_sources, dim=1)
        offset = torch.cat([part + flow.flip(1).repeat(1, part.shape[1] // 2, 1, 1)
                            for part, flow in zip(parts, onto)], dim=1)
        return deform_conv2d(torch.cat(sources, 1), offset, self.weight, self.bias, padding=1,
                             mask=modulation.sigmoid())

    aligned = []
    for half, *self.one_way in zip(clip.chunk(2), *(flow.chunk(2) for flow in flows)):
        frames = [align(half, t) for t in range(clip.shape[1] - 1)]
        aligned.append(torch.stack((*frames, torch.zeros_like(frames[0])), dim=1))
    return torch.cat(aligned)


def attend_plainly(self, x, window, mask):
    """WindowAttention that computes its indices each time, and mutual attention one frame after the other."""
    def attend(q, k, v, bias, mask):  # (B*K, h, N, C/h)
        scores = q * self.scale @ k.transpose(-2, -1)
        scores = scores if bias is None else scores + bias
        if mask is not None:
            scores = (scores.unflatten(0, (-1, len(mask))) + mask[:, None]).flatten(0, 1)
        return (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)

    def heads(qkv):
        return qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)

    shape, x = x.shape, x.flatten(0, 1)
    n = x.shape[1]
    d, h, w = window
    index = vrt.relative_index(self.window).view(*self.window, *self.window)[:d, :h, :w, :d, :h, :w].to(x.device)
    bias = self.relative_position_bias_table[index.flatten()].view(n, n, -1).permute(2, 0, 1)
    out = attend(*heads(self.qkv_self(x)), bias, mask)
    if self.mutual:
        q, k, v = heads(self.qkv_mut(x + self.position_bias.repeat(1, 2, 1)))
        (q1, q2), (k1, k2), (v1, v2) = (t.chunk(2, dim=2) for t in (q, k, v))
        corner = None if mask is None else mask[:, : n // 2, : n // 2]
        other = torch.cat((attend(q2, k1, v1, None, corner), attend(q1, k2, v2, None, corner)), dim=1)
        out = torch.cat((other, out), dim=-1)
    return self.proj(out).view(shape)


def conv_3d(self, x, inner=None):
    """FrameConv as the 3D convolution it is in the file, all frames as one clip; LastConv after the other one."""
    x = x if inner is None else inner(x)
    return F.conv3d(x.transpose(0, 1)[None], self.weight, self.bias, padding=self.padding)[0].transpose(0, 1)


def mask_each_time(self, x):
    """Group that computes the mask in each block."""
    size = tuple(x.shape[1:4])
    window = tuple(min(s, w) for s, w in zip(size, self.window))
    shift = tuple(w // 2 if s > w else 0 for s, w in zip(size, self.window))
    for i, block in enumerate(self.blocks):
        mask = None
        if i % 2 and any(shift):
            mask = vrt.shift_mask(vrt.shift_regions(size, window, shift, x.device), x)
        x = block(x, window, shift, mask)
    return x


def flow_one_way_then_the_other(self, clip):
    ways = [type(self)._flows(self, half) for half in clip.chunk(2)]
    return [[torch.cat(both) for both in zip(*scale)] for scale in zip(*ways)]


def average_one_by_one(self, decay=0.999):
    current = dict(self.get_bare_model(self.netG).named_parameters())
    for name, average in self.get_bare_model(self.netE).named_parameters():
        average.data.mul_(decay).add_(current[name].data, alpha=1 - decay)


# ---------------------------------------------------------------- VQGAN


def taming_step(self, step):
    """taming-transformers' `training_step` for optimizer 0, then for optimizer 1."""
    loss, images, started = self.loss, self.images.contiguous(), self.loss.has_discriminator(step)
    netG = self.get_bare_model(self.netG)
    for player, optimizer in enumerate(self.optimizers.values()):
        vq_loss, restored, _, _ = self.netG(images)
        optimizer.zero_grad()
        if player == 0:
            rec, fooled = (images - restored).abs().mean(), -loss.discriminator(restored).mean()
            by_rec, by_fooled = (torch.autograd.grad(term, netG.last_layer, retain_graph=True)[0]
                                 for term in (rec, fooled))
            weight = (by_rec.norm() / (by_fooled.norm() + 1e-4)).clamp(0, 1e4).detach()
            total = rec + weight * float(started) * fooled + vq_loss
        else:
            real, fake = loss.discriminator(images), loss.discriminator(restored.detach())
            total = float(started) * 0.5 * ((1 - real).relu().mean() + (1 + fake).relu().mean())
        self.backward(total)
        optimizer.step()
        self.log_dict = {"G_loss": total.detach()}
        self.log_dict["G_loss"].item()  # its logging waits for it
    netG.update_codebook(step)
    if self.netE is not None:
        self.update_E(self.opt_train["E_decay"])
