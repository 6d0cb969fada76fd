import torch

from lsp_callbacks.quantities import sgd_stability

torch.set_num_threads(1)
# The runs of the tests are shorter than the memory of BatchNorm; one of them waits for it.
sgd_stability.INITIAL = 1.0
