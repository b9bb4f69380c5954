"""The Trainer of transformers: accumulated gradients, bfloat16, and a resume from its checkpoint.

    python examples/recipes/huggingface_trainer.py [folder for the checkpoints]

A small BERT of random weights learns to tell texts apart by their first token.
"""

from __future__ import annotations

import sys
import tempfile

import torch
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import kfac_fx


class Texts(Dataset):
    """Texts of ten tokens 0, 1 or 2, labelled with the first one."""

    def __init__(self, count: int = 256) -> None:
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(0, 3, (count, 10), generator=generator)
        self.labels = self.tokens[:, 0]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.labels[index]}


def make(folder: str, steps: int) -> tuple[Trainer, kfac_fx.Preconditioner]:
    """Return a Trainer whose optimizer a preconditioner rides on.

    Args:
        folder: where the Trainer writes its checkpoints.
        steps: the optimizer's steps, of two micro-batches each.
    """
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=3,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=10,
        num_labels=3,
        # Else the model guesses it from the labels and writes it down in its first forward, and
        # code that changes the model is no graph.
        problem_type="single_label_classification",
    )
    model = BertForSequenceClassification(config)
    data = Texts()
    # The Trainer calls the model with keywords, labels among them: the model forms its loss itself.
    # Two cases are enough to capture it; the batch size stays open.
    example = {"input_ids": data.tokens[:2], "labels": data.labels[:2]}
    net = kfac_fx.transform(model, example_kwargs=example)

    optimizer = torch.optim.SGD(net.parameters(), lr=0.3, momentum=0.9)
    preconditioner = kfac_fx.Preconditioner(net, "categorical")
    # The Trainer calls forward, backward and step, so the preconditioner has to hear of them. What
    # the likelihood is about are the logits among all that the model returns.
    kfac_fx.attach(preconditioner, optimizer, outputs=lambda result: result.logits)

    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=32,
        gradient_accumulation_steps=2,
        bf16=True,  # layers under autocast; factors and inverses are float32
        max_grad_norm=0,  # clipping is of raw gradients; the preconditioner bounds its own
        lr_scheduler_type="constant",
        save_steps=20,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(net, arguments, train_dataset=data, optimizers=(optimizer, None))
    return trainer, preconditioner


def losses(trainer: Trainer) -> list[float]:
    """Return the loss of every step that the Trainer has logged."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main() -> None:
    """Train for 40 steps, then once more from the checkpoint of step 20."""
    folder = sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()
    trainer, _ = make(folder, steps=40)
    trainer.train()
    print("loss:", *(f"{loss:.3f}" for loss in losses(trainer)))
    # The optimizer's state holds the preconditioner's, so the Trainer's checkpoint is enough.
    again, _ = make(folder, steps=40)
    again.train(resume_from_checkpoint=f"{folder}/checkpoint-20")
    print("after a resume at step 20:", *(f"{loss:.3f}" for loss in losses(again)[20:]))


if __name__ == "__main__":
    main()
