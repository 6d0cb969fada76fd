"""What larger batches bear, at one step."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lsp_callbacks.functional.sgd.useful_batch import UsefulBatch, useful_batch
from lsp_callbacks.operators.sgd.frozen_sgd import frozen_sgd
from lsp_callbacks.quantities import SGDStability
from lsp_callbacks.step.snapshot import Snapshot


@dataclass(frozen=True)
class BatchSizes:
    """Largest stable rates over batch sizes, relative to that of the run.

    Attributes:
        size: of the run's batches.
        population: of training samples; very many where nobody knows.
        useful: the size beyond which larger batches bear little more.
        doubled: by what twice the batch multiplies the largest stable rate.
        samples: that were looked at.
    """

    size: int
    population: int
    useful: UsefulBatch
    doubled: float
    samples: int

    @classmethod
    def at(cls, snapshot: Snapshot) -> BatchSizes:
        """Compare batch sizes at a step, by its probes.

        Raises:
            Unmeasurable: see `lsp_callbacks.operators.sgd.frozen_sgd.frozen_sgd`.

        Cost: as `SGDStability` without its random products.
        """
        most_rows = SGDStability().most_rows
        sgd = frozen_sgd(snapshot, generator=snapshot.generator("batch sizes"), most_rows=most_rows)
        size, population, samples = min(sgd.batch_size, sgd.population), sgd.population, sgd.kernel.samples

        def critical(batch: int) -> float:
            return replace(sgd, batch_size=batch).mean_square_lr()

        useful = useful_batch(critical, population=population, samples=samples)
        return cls(size, population, useful, critical(min(2 * size, population)) / critical(size), samples)
