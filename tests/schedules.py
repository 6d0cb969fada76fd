"""Modules with a scheduler."""

from harness import Model
from torch.optim import SGD, lr_scheduler


class Scheduled(Model):
    def __init__(self, make, interval="step", frequency=1, lr=0.1):
        super().__init__()
        self.make, self.interval, self.frequency, self.lr = make, interval, frequency, lr

    def configure_optimizers(self):
        optimizer = SGD(self.parameters(), lr=self.lr, momentum=0.9)
        config = {"scheduler": self.make(self, optimizer), "interval": self.interval, "frequency": self.frequency}
        return {"optimizer": optimizer, "lr_scheduler": config | {"monitor": "loss", "strict": False}}

    def factor(self, step):
        return 1.0 + self.lr * step


SCHEDULES = {
    "lambda": (lambda m, o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step), {}),
    "a method of the module": (lambda m, o: lr_scheduler.LambdaLR(o, m.factor), {}),
    "one cycle": (lambda m, o: lr_scheduler.OneCycleLR(o, 1.0, total_steps=40), {}),
    "warm-up, then cosine": (
        lambda m, o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.LinearLR(o, 0.1, total_iters=4), lr_scheduler.CosineAnnealingLR(o, 20)], [4]
        ),
        {},
    ),
    "every third step": (lambda m, o: lr_scheduler.ExponentialLR(o, 0.5), {"frequency": 3}),
    "by epochs": (lambda m, o: lr_scheduler.StepLR(o, 1, 0.5), {"interval": "epoch"}),
    "every other epoch": (lambda m, o: lr_scheduler.StepLR(o, 1, 0.5), {"interval": "epoch", "frequency": 2}),
    "plateau": (lambda m, o: lr_scheduler.ReduceLROnPlateau(o, patience=99), {"interval": "epoch"}),
}
