"""The one row of a sample's outputs by dense matrices."""

import torch


def output_row(S, parameters):
    """``S v / sqrt(v^T S v)``: v after eight products with ``K S`` from the top eigenvector of ``K = I + W W^T / c``.

    W is the last of the parameters with a row for each output; without one it is the top eigenpair of S.
    """
    S = S.double()
    heads = [p.detach().double().flatten(1) for p in parameters if p.ndim > 1 and len(p) == len(S)]
    if not heads:
        values, vectors = torch.linalg.eigh(S)
        return vectors[:, -1] * values[-1].clamp_min(0).sqrt()
    gram = heads[-1] @ heads[-1].T
    gram = gram / gram.diagonal().mean()
    v = torch.linalg.eigh(gram)[1][:, -1]
    for _ in range(8):
        v = S @ v
        v = v + gram @ v
        v = v / v.abs().max().clamp_min(1e-300)
    image = S @ v
    size = v @ image
    return image / size.sqrt() if size > 0 else torch.zeros_like(image)
