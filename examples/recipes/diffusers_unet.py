"""A diffusion model: the UNet of diffusers learns the noise that was added to digits.

python examples/recipes/diffusers_unet.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DModel
from sklearn.datasets import load_digits

import kfac_fx


def train(steps: int) -> tuple[list[float], kfac_fx.Preconditioner]:
    """Return the loss of every step, and the preconditioner.

    Args:
        steps: of 32 images of 8 x 8 pixels.
    """
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
    )
    schedule = DDPMScheduler(num_train_timesteps=100)
    images = torch.tensor(load_digits().images[:, None] / 8 - 1, dtype=torch.float32)

    # One example is enough; the batch size stays open, and so does the time.
    net = kfac_fx.transform(unet, (images[:2], torch.tensor([3, 5])))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3, momentum=0.9)
    # The squared error of the noise is the likelihood of a normal with the network as its mean.
    preconditioner = kfac_fx.Preconditioner(net, "normal")

    losses = []
    for step in range(steps):
        clean = images[step * 32 : (step + 1) * 32]
        noise = torch.randn_like(clean)
        times = torch.randint(0, 100, (len(clean),))
        optimizer.zero_grad()
        predicted = net(schedule.add_noise(clean, noise, times), times).sample
        loss = F.mse_loss(predicted, noise)
        preconditioner.observe(predicted)
        loss.backward()
        preconditioner.step()
        optimizer.step()
        losses.append(loss.item())
    return losses, preconditioner


def main() -> None:
    """Train for 20 steps."""
    losses, preconditioner = train(20)
    print(preconditioner.curvature)
    print("loss:", *(f"{loss:.3f}" for loss in losses))


if __name__ == "__main__":
    main()
