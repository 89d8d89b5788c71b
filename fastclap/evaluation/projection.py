"""A map of the embeddings: the first two principal components of the clips, with the texts placed among them.

Contrastive training leaves a gap between the modalities (Liang et al. 2022, arXiv 2203.02053): texts lie far from every
clip, and two components of both together would show that gap and nothing else. So each modality is centred on its own
mean, and the components are those of the clips alone. What the map shows is whether a class's clips lie where its
prompt points, not how near they are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_POINTS = 2000  # clips on a map: more hide each other, and the coordinates are kept in the report's JSON


def even_selection(count: int, most: int = MAX_POINTS) -> list[int]:
    """`most` of `count` positions at equal distances, starting with the first; all of them if there are no more."""
    return list(range(count)) if count <= most else [index * count // most for index in range(most)]


def principal_components(points: Tensor) -> tuple[Tensor, Tensor]:
    """The two orthonormal directions in which points vary most, and the shares of the variance along them.

    Args:
        points: floating point [n, D], of any mean.

    Returns:
        float64 [D, 2] on the CPU, each direction with its largest entry positive, and float64 [2]. Directions without
        variance (of a single point, of collapsed embeddings, beyond D) are zero.

    They are the eigenvectors of the float64 covariance: exact, deterministic, and for D of a thousand found in a
    fraction of a second.
    """
    points = points.double().cpu()
    centred = points - points.mean(dim=0)
    variances, directions = torch.linalg.eigh(centred.T @ centred)  # ascending
    variances, directions = variances.flip(0)[:2].clamp(min=0), directions.flip(1)[:, :2]
    total = centred.square().sum()
    # what remains of equal points after the mean was subtracted is rounding
    present = variances > 1e-12 * points.square().sum()
    largest = directions.gather(0, directions.abs().argmax(dim=0, keepdim=True))
    directions = torch.where(present, directions * torch.where(largest < 0, -1.0, 1.0), 0.0)
    shares = torch.where(present, variances / total.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
    missing = 2 - len(shares)
    return F.pad(directions, (0, missing)), F.pad(shares, (0, missing))


def coordinates(points: Tensor, directions: Tensor) -> list[list[float]]:
    """Where points [n, D] lie along the directions [D, 2] from their own mean: n pairs, rounded to four decimals."""
    points = points.double().cpu()
    placed = (points - points.mean(dim=0)) @ directions
    return [[round(value, 4) for value in pair] for pair in placed.tolist()]
