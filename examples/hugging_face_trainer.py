"""The Trainer of transformers with a small GPT-2 of random weights, watched by one callback."""

import tempfile

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from lsp_callbacks import Monitor, SGDStability, Sharpness
from lsp_callbacks.loops.hugging_face import StabilityCallback

CONFIG = GPT2Config(vocab_size=17, n_positions=12, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)


def train(steps=12, accumulate=2):
    """Train on periodic sequences; return the callback."""
    torch.manual_seed(0)
    tokens = (torch.arange(12) + torch.randint(17, (64, 1))) % 17
    data = [{"input_ids": row, "labels": row} for row in tokens]
    model = GPT2LMHeadModel(CONFIG)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=8, gradient_accumulation_steps=accumulate,
            max_grad_norm=0.0, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        stability = StabilityCallback(Monitor(SGDStability(16), Sharpness(), every_n_steps=4))
        Trainer(model, args, train_dataset=data, optimizers=(optimizer, schedule), callbacks=[stability]).train()
    return stability


if __name__ == "__main__":
    for key, curve in train().watch.history.items():
        print(key, curve.steps, [round(value, 4) for value in curve.values])
