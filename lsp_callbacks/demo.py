"""A data set and a residual network that train in seconds on a CPU."""

from __future__ import annotations

from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Digits(pl.LightningDataModule):
    """scikit-learn's bundled 8x8 digits: nothing is downloaded. 1,437 images to train on, 360 to validate on.

    Args:
        batch_size: of training; every epoch leaves out the incomplete last batch.
        seed: of the stratified split and of the order of the batches.

    Raises:
        ImportError: without scikit-learn.
        ValueError: for a batch size outside 1 to 1,437.

    Example:
        >>> data = Digits(batch_size=64)
        >>> data.setup("fit")
        >>> images, labels = next(iter(data.train_dataloader()))
        >>> tuple(images.shape), len(data.train_dataloader()), len(data.validation)
        ((64, 1, 8, 8), 22, 360)
    """

    def __init__(self, batch_size: int = 256, seed: int = 0):
        super().__init__()
        if not 1 <= batch_size <= 1437:
            raise ValueError(f"batch_size={batch_size}: give 1 to 1437, the number of training images")
        self.batch_size, self.seed = batch_size, seed

    def setup(self, stage: str) -> None:
        try:
            from sklearn.datasets import load_digits
            from sklearn.model_selection import train_test_split
        except ImportError as error:
            raise ImportError(
                "Digits needs scikit-learn, which carries the images: pip install 'lsp-callbacks[demo]'"
            ) from error
        images, labels = load_digits(return_X_y=True)
        parts = train_test_split(images / 16, labels, test_size=360, stratify=labels, random_state=self.seed)
        train_x, val_x = (torch.tensor(part, dtype=torch.float32).reshape(-1, 1, 8, 8) for part in parts[:2])
        train_y, val_y = map(torch.tensor, parts[2:])
        self.train, self.validation = TensorDataset(train_x, train_y), TensorDataset(val_x, val_y)

    def train_dataloader(self) -> DataLoader:
        # A generator of its own: the order of the batches does not depend on what else draws random numbers.
        generator = torch.Generator().manual_seed(self.seed)
        return DataLoader(self.train, self.batch_size, shuffle=True, drop_last=True, generator=generator)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.validation, batch_size=360)


class ResidualBlock(nn.Module):
    """``x + branch(x)``: one explicit Euler step in depth."""

    def __init__(self, width: int):
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class ResidualNet(pl.LightningModule):
    """A small residual network for `Digits`, trained by SGD.

    Args:
        width: of the residual stream.
        depth: residual blocks.
        lr: learning rate; of a ramp, the first.
        momentum: of SGD.
        schedule: "constant"; "cosine", down to 0 at the end of training; or "ramp", exponential growth at every step.
        ramp: the factor of the schedule "ramp" in 1,000 steps.
        label_smoothing: of the cross-entropy. Above 0 the images cannot be memorised to a loss of 0, where the
            curvature would vanish and any rate would be stable.

    Raises:
        ValueError: for a schedule that is not one of these, or a ramp that is not positive.
    """

    def __init__(
        self,
        width: int = 64,
        depth: int = 4,
        lr: float = 0.1,
        momentum: float = 0.0,
        schedule: Literal["constant", "cosine", "ramp"] = "constant",
        ramp: float = 30.0,
        label_smoothing: float = 0.1,
    ):
        super().__init__()
        if schedule not in ("constant", "cosine", "ramp"):
            raise ValueError(f"schedule={schedule!r}: give 'constant', 'cosine' or 'ramp'")
        if not ramp > 0:
            raise ValueError(f"ramp={ramp}: give a positive number, by which the rate is multiplied in 1,000 steps")
        self.save_hyperparameters()
        self.stem = nn.Sequential(nn.Flatten(), nn.Linear(64, width))
        self.blocks = nn.Sequential(*(ResidualBlock(width) for _ in range(depth)))
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(images)))

    def on_fit_start(self) -> None:
        # Matrices this small gain nothing from threads; on a busy machine these wait for each other, 10 times slower.
        torch.set_num_threads(1)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = nn.functional.cross_entropy(self(images), labels, label_smoothing=self.hparams["label_smoothing"])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        logits = self(images)
        self.log("val_loss", nn.functional.cross_entropy(logits, labels))
        self.log("val_accuracy", (logits.argmax(1) == labels).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> Any:
        settings = self.hparams
        optimizer = torch.optim.SGD(self.parameters(), lr=settings["lr"], momentum=settings["momentum"])
        if settings["schedule"] == "constant":
            return optimizer
        scheduler: torch.optim.lr_scheduler.LRScheduler
        if settings["schedule"] == "cosine":
            steps = int(self.trainer.estimated_stepping_batches)
            scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
        else:
            growth = settings["ramp"] ** (1 / 1000)
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: growth**step)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
