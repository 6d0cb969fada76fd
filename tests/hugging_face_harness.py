"""A Trainer of transformers that goes through given batches."""

import random

import numpy as np
import torch
from harness import SGD, Model
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

CONFIG = {"vocab_size": 17, "n_positions": 12, "n_embd": 8, "n_layer": 1, "n_head": 2}


class Loop(Trainer):
    """In the order of the loader, at a constant rate."""

    def __init__(self, folder, model, loader, callbacks, *, accumulate, max_grad_norm, knows_items, epochs=2):
        self.loader = loader
        arguments = TrainingArguments(
            output_dir=folder, use_cpu=True, report_to="none", save_strategy="no", logging_strategy="no",
            disable_tqdm=True, num_train_epochs=epochs, gradient_accumulation_steps=accumulate,
            max_grad_norm=max_grad_norm,
        )  # fmt: skip
        optimizer = SGD(model.parameters())
        constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        super().__init__(model, arguments, optimizers=(optimizer, constant), callbacks=callbacks)
        self.model_accepts_loss_kwargs = knows_items

    def get_train_dataloader(self):
        return torch.utils.data.DataLoader(self.loader, batch_size=None)


def batches(n=5, ragged=False):
    """If ``ragged``, the batches have different numbers of tokens to predict."""
    torch.manual_seed(1)
    tokens = (torch.arange(12) + torch.randint(17, (4 * n, 1))) % 17
    labels = tokens.clone()
    for number, rows in enumerate(labels.split(4)):
        rows[:, : 1 + 2 * number * ragged] = -100  # the first token is never predicted, but the Trainer may count it
    return [{"input_ids": i, "labels": o} for i, o in zip(tokens.split(4), labels.split(4))]


def gpt2(**changes):
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    return GPT2LMHeadModel(GPT2Config(**CONFIG | changes))


class Callback(Model):
    def training_step(self, batch, batch_idx):
        return self.net(**batch).loss
