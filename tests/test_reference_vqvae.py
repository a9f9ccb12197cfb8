"""VQ-VAE, VQ-VAE-2 and their codebooks beside a second implementation in float64, written down from the papers.

van den Oord et al. 2017, arXiv:1711.00937: section 4.1 (layers), equations 1-3 (quantization), appendix A.1 (moving
averages); Razavi et al. 2019, arXiv:1906.00446: algorithm 1. Weights are copied; images, losses, indices, the gradients
of all weights and that of the images agree, and so do the codebooks after their update.
"""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from models.network_vqgan import EMAVectorQuantizer, GumbelQuantize, VectorQuantizer
from models.network_vqvae import VQVAE2, VqVae

SIZES = dict(num_hiddens=6, num_res_hiddens=4, num_res_blocks=2, n_embed=7, embed_dim=3, beta=0.4)


class Reference:
    """The layers as functions, with weights under the keys of the networks' states."""

    def __init__(self, state):
        self.state = state

    def conv(self, x, key, stride=1):
        weight = self.state[f"{key}.weight"]  # 4x4 halves the size, 3x3 and 1x1 keep it
        return F.conv2d(x, weight, self.state[f"{key}.bias"], stride, {4: 1, 3: 1, 1: 0}[weight.shape[-1]])

    def twice(self, x, key):
        return F.conv_transpose2d(x, self.state[f"{key}.weight"], self.state[f"{key}.bias"], stride=2, padding=1)

    def residuals(self, x, key, first):
        """Two blocks of ReLU, 3x3, ReLU, 1x1 beside the identity, then a ReLU."""
        for place in (first, first + 1):
            block = f"{key}.{place}.layers"
            x = x + self.conv(self.conv(x.relu(), f"{block}.1").relu(), f"{block}.3")
        return x.relu()

    def encoder(self, x, key, halvings):
        for n in range(halvings):
            x = self.conv(x, f"{key}.{2 * n}", stride=2).relu()
        return self.residuals(self.conv(x, f"{key}.{2 * halvings}"), key, 2 * halvings + 1)

    def decoder(self, x, key, doublings):
        x = self.residuals(self.conv(x, f"{key}.0"), key, 1)
        for n in range(doublings):
            x = self.twice(x if n == 0 else x.relu(), f"{key}.{4 + 2 * n}")
        return x


def quantized(z, codes, beta, averaged):
    """Equations 1 to 3, one latent after another: z (B,C,h,w), codes (K,C)."""
    flat = z.movedim(1, -1)
    indices = ((flat[..., None, :] - codes) ** 2).sum(-1).argmin(-1)
    q = codes[indices].movedim(-1, 1)
    loss = beta * ((z - q.detach()) ** 2).mean() + (0 if averaged else ((q - z.detach()) ** 2).mean())
    share = torch.bincount(indices.flatten(), minlength=len(codes)) / indices.numel()
    perplexity = math.exp(-sum(p * math.log(p) for p in share.tolist() if p))
    return SimpleNamespace(z=flat.detach().flatten(0, 2), indices=indices, loss=loss, perplexity=perplexity,
                           output=z + (q - z).detach())


def updated(book, z, indices, decay, eps=1e-5):
    """Appendix A.1 with the smoothing of the counts: codes, counts and sums after the latents z chose their codes."""
    counts, sums = book["cluster_size"].clone(), book["embed_avg"].clone()
    for code in range(len(counts)):
        chosen = z[indices.flatten() == code]
        counts[code] = decay * counts[code] + (1 - decay) * len(chosen)
        sums[code] = decay * sums[code] + (1 - decay) * chosen.sum(0)
    total = counts.sum()
    smooth = (counts + eps) / (total + len(counts) * eps) * total
    return {"weight": sums / smooth[:, None], "cluster_size": counts, "embed_avg": sums}


def one_codebook(ref, images, averaged):
    found = quantized(ref.conv(ref.encoder(images, "encoder", 2), "quant_conv"),
                      ref.state["quantize.embedding.weight"], SIZES["beta"], averaged)
    return ref.decoder(found.output, "decoder", 2), {"quantize": found}


def two_codebooks(ref, images, averaged):
    fine = ref.encoder(images, "encoder_bottom", 2)
    top = quantized(ref.conv(ref.encoder(fine, "encoder_top", 1), "quant_conv_top"),
                    ref.state["quantize_top.embedding.weight"], SIZES["beta"], averaged)
    fine = torch.cat([ref.decoder(top.output, "decoder_top", 1), fine], 1)
    bottom = quantized(ref.conv(fine, "quant_conv_bottom"), ref.state["quantize_bottom.embedding.weight"],
                       SIZES["beta"], averaged)
    both = torch.cat([ref.twice(top.output, "upsample_top"), bottom.output], 1)
    return ref.decoder(both, "decoder", 2), {"quantize_top": top, "quantize_bottom": bottom}


@pytest.mark.parametrize("decay", [0.0, 0.8])
@pytest.mark.parametrize("kind, plain", [(VqVae, one_codebook), (VQVAE2, two_codebooks)])
def test_outputs_gradients_and_codebooks_are_the_papers(kind, plain, decay):
    net = kind(**SIZES, decay=decay)
    with torch.no_grad():
        for name, p in net.state_dict().items():
            if "embedding.weight" in name or "embed_avg" in name:
                p.copy_(torch.randn(p.shape))
            elif "cluster_size" in name:
                p.copy_(1 + torch.rand(p.shape))
            elif p.ndim == 4:
                p.mul_(2.5)  # latents as wide as the codes, so that several codes are in use
    state = {key: value.double().requires_grad_() for key, value in net.state_dict().items()}
    images = torch.rand(2, 3, 16, 24) * 2 - 1
    ours, theirs = images.clone().requires_grad_(), images.double().requires_grad_()
    loss, restored, usage, indices = net(ours)
    wanted, books = plain(Reference(state), theirs, bool(decay))
    indices = [indices] if kind is VqVae else list(indices)
    for found, book in zip(indices, books.values(), strict=True):
        assert torch.equal(found, book.indices) and len(found.unique()) > 1
    wanted_loss = sum(book.loss for book in books.values())
    assert loss.item() == pytest.approx(wanted_loss.item(), rel=1e-5)
    assert usage.item() == pytest.approx(sum(book.perplexity for book in books.values()) / len(books), rel=1e-5)
    torch.testing.assert_close(restored.double(), wanted, rtol=1e-5, atol=1e-6)
    cotangent = torch.randn_like(restored)
    (loss + (restored * cotangent).sum()).backward()
    (wanted_loss + (wanted * cotangent).sum()).backward()
    for name, p, other in [("images", ours, theirs), *((name, p, state[name]) for name, p in net.named_parameters())]:
        largest = other.grad.abs().max().item()
        torch.testing.assert_close(p.grad.double(), other.grad, rtol=1e-4, atol=1e-5 * largest, msg=name)
    net.update_codebook()
    for name, book in books.items() if decay else ():
        old = {key: state[f"{name}.embedding.{key}"].detach() for key in ("weight", "cluster_size", "embed_avg")}
        for key, value in updated(old, book.z, book.indices, decay).items():
            torch.testing.assert_close(net.state_dict()[f"{name}.embedding.{key}"].double(), value, rtol=1e-5,
                                       atol=1e-6, msg=f"{name} {key}")


# Codes 0 and 1, latents 0.2, 0.9 and 0.4: they choose 0, 1, 0; the differences z - q are 0.2, -0.1 and 0.4.
LATENTS = torch.tensor([0.2, 0.9, 0.4]).view(1, 1, 1, 3)
DIFFERENCES = (0.2, -0.1, 0.4)


@pytest.mark.parametrize("legacy", [False, True])
def test_three_latents_and_two_codes_by_hand(legacy):
    book = VectorQuantizer(2, 1, beta=0.25, legacy=legacy)
    book.embedding.weight.data = torch.tensor([[0.0], [1.0]])
    z = LATENTS.clone().requires_grad_()
    output, loss, (usage, _, indices) = book(z)
    assert indices.tolist() == [0, 1, 0] and output.flatten().tolist() == pytest.approx([0, 1, 0], abs=1e-7)
    assert loss.item() == pytest.approx(1.25 * (0.04 + 0.01 + 0.16) / 3)
    assert usage.item() == pytest.approx(3 / 2 ** (2 / 3))  # exp of the entropy of (2/3, 1/3)
    (loss + (output * torch.tensor([1.0, 2.0, 3.0])).sum()).backward()
    to_latents, to_codes = (1, 0.25) if legacy else (0.25, 1)
    assert z.grad.flatten().tolist() == pytest.approx(
        [up + to_latents * 2 / 3 * d for up, d in zip((1, 2, 3), DIFFERENCES)])
    assert book.embedding.weight.grad.flatten().tolist() == pytest.approx(
        [-to_codes * 2 / 3 * (0.2 + 0.4), -to_codes * 2 / 3 * -0.1])


def test_an_update_of_averages_by_hand():
    book = EMAVectorQuantizer(3, 1, beta=0.25, decay=0.5, eps=0.1)
    for key, values in (("weight", [0.0, 1, 9]), ("cluster_size", [1.0, 3, 2]), ("embed_avg", [0.0, 3, 18])):
        buffer = getattr(book.embedding, key)
        buffer.copy_(torch.tensor(values).view(buffer.shape))
    output, loss, _ = book(LATENTS.clone().requires_grad_())
    assert loss.item() == pytest.approx(0.25 * (0.04 + 0.01 + 0.16) / 3)
    (loss + output.sum()).backward()
    book.update()
    counts, sums = [1.5, 2, 1], [0.3, 1.95, 9]  # halves of the old and of the new: 2, 1, 0 hits; 0.6, 0.9, 0
    assert book.embedding.cluster_size.tolist() == pytest.approx(counts)
    assert book.embedding.embed_avg.flatten().tolist() == pytest.approx(sums)
    assert book.embedding.weight.flatten().tolist() == pytest.approx(
        [m / ((n + 0.1) / (4.5 + 0.3) * 4.5) for n, m in zip(counts, sums)])


@pytest.mark.parametrize("hard", [True, False])
def test_codes_drawn_with_gumbel_noise_are_the_formula(hard):
    """Jang et al. 2017, arXiv:1611.01144, equations 1 and 2: a softmax of logits + noise over the temperature."""
    book = GumbelQuantize(3, 5, 2, kl_weight=0.3, straight_through=hard).train()
    book.temperature = 0.7
    z = torch.randn(2, 3, 4, 6, requires_grad=True)
    torch.manual_seed(1)
    output, loss, (_, _, indices) = book(z)
    torch.manual_seed(1)
    noise = -torch.empty(2, 5, 4, 6).exponential_().log()
    weight, bias, codes = (p.detach().double() for p in (book.proj.weight, book.proj.bias, book.embed.weight))
    other = z.detach().double().requires_grad_()
    logits = torch.einsum("bchw,kc->bkhw", other, weight[:, :, 0, 0]) + bias.view(-1, 1, 1)
    soft = torch.exp((logits + noise) / 0.7)
    soft = soft / soft.sum(1, keepdim=True)
    assert torch.equal(indices, soft.argmax(1).flatten())
    mixture = F.one_hot(soft.argmax(1), 5).movedim(-1, 1) - soft.detach() + soft if hard else soft
    wanted = torch.einsum("bkhw,kc->bchw", mixture, codes)
    share = logits.exp() / logits.exp().sum(1, keepdim=True)
    wanted_loss = 0.3 * (share * (5 * share).log()).sum(1).mean()
    torch.testing.assert_close(output.double(), wanted, rtol=1e-5, atol=1e-6)
    assert loss.item() == pytest.approx(wanted_loss.item(), rel=1e-5)
    cotangent = torch.randn_like(output)
    (loss + (output * cotangent).sum()).backward()
    (wanted_loss + (wanted * cotangent).sum()).backward()
    torch.testing.assert_close(z.grad.double(), other.grad, rtol=1e-4, atol=1e-6)
