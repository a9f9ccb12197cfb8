"""How long a VQGAN step takes against taming's loop on the same networks, data and losses.

    python benchmarks/vqgan_step.py [options/train_vqgan.json] [--steps 12] [--set KEY=VALUE ...]

Taming's loop takes two passes through the autoencoder for each batch, one for each optimizer, and steps the
discriminator every time, in the usual memory format; before disc_start it computes all of that and multiplies it by 0.
Ours takes one pass, steps the discriminator every `disc_every` iterations and leaves it alone before disc_start. Both
take turns, before and after disc_start. Taming's own discriminator is --set train.lossconfig.disc_ndf=64
--set train.lossconfig.disc_num_layers=3; the default's is smaller.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import options
import train
from data import DATASETS
from log.run_log import RunLog
from models import MODELS, NETWORKS
from runtime import determinism


def taming_step(model, step: int) -> None:
    """What taming-transformers does with a batch: `training_step` for optimizer 0, then for optimizer 1."""
    loss, images, began = model.loss, model.images.contiguous(), model.loss.has_discriminator(step)
    for player, optimizer in enumerate((model.G_optimizer, model.calculator.optimizer)):
        vq_loss, restored, _, _ = model.netG(images)
        optimizer.zero_grad()
        if player == 0:
            rec = (images - restored).abs().mean()
            fooled = -loss.discriminator(restored).mean()
            layer = model.get_bare_model(model.netG).last_layer
            by_rec, by_fooled = (torch.autograd.grad(term, layer, retain_graph=True)[0] for term in (rec, fooled))
            weight = (by_rec.norm() / (by_fooled.norm() + 1e-4)).clamp(0, 1e4).detach()
            total = rec + weight * float(began) * fooled + vq_loss
        else:
            real, fake = loss.discriminator(images), loss.discriminator(restored.detach())
            total = float(began) * 0.5 * ((1 - real).relu().mean() + (1 + fake).relu().mean())
        total.backward()
        optimizer.step()
        float(total)  # what its logging waits for
    model.get_bare_model(model.netG).update_codebook(step)
    if model.netE is not None:
        model.update_E(model.opt_train["E_decay"])


def ready(opt, run):
    """A model of its own with the run's weights, ready to train."""
    model = type(run.model)(opt)
    model.init_train(copy.deepcopy(run.model.parts()), "the run")
    model.update_learning_rate(0)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("option_file", nargs="?", default="options/train_vqgan.json")
    parser.add_argument("--steps", type=int, default=12, help="a multiple of disc_every")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    pairs = [text.partition("=") for text in args.set]
    opt, _ = options.parse(args.option_file, [(k, options.as_value(v), "--set") for k, _, v in pairs],
                           MODELS, NETWORKS, DATASETS)
    determinism.prepare_machine(opt)
    run = train.Run(opt, RunLog())
    run.restore(None)
    start = opt["train"]["lossconfig"]["disc_start"]
    data = {"H": torch.stack([run.train_set[0, i]["H"] for i in range(run.batches.batch_size)])}
    for when, first in (("before disc_start", 1), ("after disc_start", start + 1)):
        ours, theirs = ready(opt, run), ready(opt, run)
        for network in theirs.networks.values():
            network.to(memory_format=torch.contiguous_format)
        seconds: dict[str, list[float]] = {"ours": [], "taming": []}
        for step in range(first - 3, first + args.steps):
            for name, model, way in (("ours", ours, type(ours).optimize_parameters), ("taming", theirs, taming_step)):
                model.feed_data(data)
                began = time.perf_counter()
                way(model, max(step, 1))
                if step >= first:  # the ones before allocate
                    seconds[name].append(time.perf_counter() - began)
        # Of ours every third step is longer: medians of whole rounds of disc_every steps, for both alike.
        every = opt["train"]["disc_every"]
        mean = {name: statistics.median(statistics.mean(times[i : i + every]) for i in range(0, len(times), every))
                for name, times in seconds.items()}
        print(f"{when:<18} ours {mean['ours']:.4f} s, taming's loop {mean['taming']:.4f} s a step, "
              f"ratio {mean['ours'] / mean['taming']:.3f}")


if __name__ == "__main__":
    main()
