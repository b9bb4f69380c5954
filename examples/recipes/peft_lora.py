"""PEFT: LoRA on a small transformer, held near the model that it began from.

    python examples/recipes/peft_lora.py

A GPT-2 of random weights learns to count modulo 11, with a penalty on the Kullback-Leibler
divergence from its own logits without the adapter.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

import kfac_fx


def train(steps: int) -> tuple[list[float], kfac_fx.Preconditioner]:
    """Return the loss of every step, and the preconditioner.

    Args:
        steps: of 16 sequences of 12 tokens.
    """
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=11,
        initializer_range=0.3,
        n_positions=12,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    base = GPT2LMHeadModel(config)
    lora = LoraConfig(r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    model = get_peft_model(base, lora)
    tokens = (torch.arange(12) + torch.arange(16)[:, None]) % 11

    # What is trained gets curvature: the two factors of each adapter are layers of their own. The
    # frozen weights around them are passed through.
    net = kfac_fx.transform(model, example_kwargs={"input_ids": tokens[:2]})
    optimizer = torch.optim.SGD(
        [p for p in net.parameters() if p.requires_grad], lr=0.3, momentum=0.9
    )
    # The second factor of an adapter begins at zero, where a bound in units of the weights' length
    # would hold it; the trust region bounds the step alone.
    preconditioner = kfac_fx.Preconditioner(net, "categorical", largest_step=None)

    # The captured network has the adapter in it, for good. Logits without the adapter come from
    # the model itself, which has the same parameters.
    with torch.no_grad(), model.disable_adapter():
        reference = model(input_ids=tokens).logits.log_softmax(-1)

    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        logits = net(input_ids=tokens).logits
        fit = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        drift = F.kl_div(reference, logits.log_softmax(-1), log_target=True, reduction="sum")
        loss = fit + 0.01 * drift / tokens.numel()
        preconditioner.observe(logits[:, :-1])  # the positions that have a target
        loss.backward()
        preconditioner.step()
        optimizer.step()
        losses.append(loss.item())
    return losses, preconditioner


def main() -> None:
    """Train for 40 steps."""
    losses, preconditioner = train(40)
    print(preconditioner.curvature)
    print("loss:", *(f"{loss:.3f}" for loss in losses))


if __name__ == "__main__":
    main()
