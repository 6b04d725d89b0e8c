"""Train the demo backbone without labels, plant artifacts in it, and write both checkpoints.

`python -m itae_utils.models.demo.train --output FOLDER` repeats the training of the committed weights. Neither the
training nor the choice of a checkpoint uses labels: the weights are those after a fixed number of steps.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from itae_utils.data.datasets import load_dataset
from itae_utils.models.demo import CONFIG, IMAGE_SIZE, build_model
from itae_utils.models.demo.plant import plant_artifacts, save_checkpoints
from itae_utils.models.preprocessing import make_transform

STEPS = 2500
BATCH_SIZE = 128
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.05
TEMPERATURE = 0.2
PATCH_DROP_RATE = 0.25
BLANK = -1.0  # value of an empty pixel after preprocessing


def digits_tensor() -> Tensor:
    """Return all 1,797 digits, preprocessed for the demo backbone: (1797, 3, 28, 28)."""
    prepare = make_transform(IMAGE_SIZE, "resize", CONFIG)
    return torch.stack([prepare(image) for image, _ in load_dataset("digits")])


def random_grid(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Draw sampling grids: a random affine map (±20°, zoom 0.8 to 1.25, shear, shift) plus a smooth random field."""
    rand = lambda low, high: torch.rand(count, generator=generator) * (high - low) + low  # noqa: E731
    angle, zoom, shear = rand(-math.pi / 9, math.pi / 9), torch.exp(rand(-0.22, 0.22)), rand(-0.3, 0.3)
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    theta = torch.stack([
        torch.stack([cos, -sin + shear * cos, rand(-0.2, 0.2)], 1),
        torch.stack([sin, cos + shear * sin, rand(-0.2, 0.2)], 1),
    ], 1)
    grid = F.affine_grid(theta, [count, 1, size, size], align_corners=False)
    bend = torch.randn(count, 2, 4, 4, generator=generator) * 0.08
    return grid + F.interpolate(bend, size, mode="bicubic", align_corners=True).permute(0, 2, 3, 1)


def random_blur(images: Tensor, generator: torch.Generator) -> Tensor:
    """Blur each image with a Gaussian of random width, σ between 0 and 1.5 pixels."""
    sigma = torch.rand(len(images), 1, generator=generator) * 1.5 + 1e-2
    kernel = torch.exp(-0.5 * (torch.arange(-3, 4) / sigma) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True))[:, None]
    batch = F.pad(images, (3, 3, 3, 3), value=BLANK).transpose(0, 1)
    batch = F.conv2d(batch, kernel[..., None], groups=len(images))
    return F.conv2d(batch, kernel[:, :, None], groups=len(images)).transpose(0, 1)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return a random view of each grey image (B, 1, H, W): affine and elastic deformation, blur, contrast, noise."""
    grid = random_grid(len(images), images.shape[-1], generator)
    views = F.grid_sample(images - BLANK, grid, mode="bilinear", padding_mode="zeros", align_corners=False) + BLANK
    views = random_blur(views, generator)
    contrast = torch.rand(len(images), 1, 1, 1, generator=generator) * 0.6 + 0.7
    views = (views - BLANK) * contrast + BLANK
    return views + torch.randn(views.shape, generator=generator) * 0.1


def contrastive_loss(first: Tensor, second: Tensor) -> Tensor:
    """Return SimCLR's NT-Xent loss: each view must find its partner among all other views of the batch."""
    z = F.normalize(torch.cat([first, second]), dim=1)
    similarity = z @ z.T / TEMPERATURE
    similarity.fill_diagonal_(-math.inf)
    count = len(first)
    partner = torch.arange(2 * count).roll(count)
    return F.cross_entropy(similarity, partner)


def train(seed: int, steps: int = STEPS, log_every: int = 100) -> nn.Module:
    """Train the tiny ViT on all digits with SimCLR and return it in eval mode (about 20 minutes on 2 cores)."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    images = digits_tensor()[:, :1]
    model = build_model(patch_drop_rate=PATCH_DROP_RATE).train()
    head = nn.Sequential(nn.Linear(model.embed_dim, 128), nn.BatchNorm1d(128), nn.GELU(), nn.Linear(128, 64))
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps)),
    )
    start, order = time.time(), torch.empty(0, dtype=torch.long)
    for step in range(steps):
        if len(order) < BATCH_SIZE:
            order = torch.randperm(len(images), generator=generator)
        batch, order = images[order[:BATCH_SIZE]], order[BATCH_SIZE:]
        views = torch.cat([augment(batch, generator), augment(batch, generator)]).expand(-1, 3, -1, -1)
        loss = contrastive_loss(*head(model(views)).chunk(2))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % log_every == 0:
            click.echo(f"step {step + 1}/{steps}  loss {loss.item():.3f}  {time.time() - start:.0f} s")
    trained = build_model()
    trained.load_state_dict(model.state_dict())
    return trained.eval()


@click.command()
@click.option("--seed", default=0, show_default=True, help="Seed of weights, views and planted directions.")
@click.option("--steps", default=STEPS, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Folder for the two checkpoints.")
def main(seed: int, steps: int, output: Path) -> None:
    """Train the demo, plant artifacts, and write demo-clean.safetensors, demo.safetensors and demo.json to OUTPUT."""
    output.mkdir(parents=True, exist_ok=True)  # fails before the training, not after it
    clean = train(seed, steps)
    planted, truth = plant_artifacts(clean, digits_tensor(), seed=seed)
    save_checkpoints(output, clean, planted, truth)
    click.echo(f"wrote {output}")


if __name__ == "__main__":
    main()
