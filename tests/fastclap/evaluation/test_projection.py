"""The components of the map are those of a singular value decomposition in float64, also where there are none."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastclap.evaluation.projection import coordinates, even_selection, principal_components


@pytest.mark.parametrize(("n", "dim"), [(60, 7), (5, 30), (400, 64), (3, 2)])
def test_components_are_those_of_a_float64_svd(n: int, dim: int) -> None:
    points = torch.randn(n, dim) * torch.linspace(3, 0.5, dim) + 5
    directions, shares = principal_components(points)
    x = points.double().numpy()
    u, s, vt = np.linalg.svd(x - x.mean(axis=0), full_matrices=False)
    signs = np.sign([row[np.abs(row).argmax()] for row in vt[:2]])
    np.testing.assert_allclose(directions.numpy(), vt[:2].T * signs, atol=1e-9)
    np.testing.assert_allclose(shares.numpy(), (s**2 / (s**2).sum())[:2], atol=1e-12)
    expected = (u * s)[:, :2] * signs
    np.testing.assert_allclose(coordinates(points, directions), expected, atol=5.1e-5)  # rounded to four decimals


def test_another_order_of_the_points_gives_the_same_map() -> None:
    points, order = torch.randn(50, 16) * torch.linspace(2, 0.5, 16), torch.randperm(50)
    placed = coordinates(points, principal_components(points)[0])
    again = coordinates(points[order], principal_components(points[order])[0])
    np.testing.assert_allclose(again, np.array(placed)[order.numpy()], atol=1.1e-4)


def test_what_does_not_vary_is_placed_at_the_origin() -> None:
    equal = torch.full((9, 4), 0.1).add(torch.arange(4.0).mul(0.3))
    for points in (torch.randn(1, 4), equal, torch.zeros(3, 4)):
        directions, shares = principal_components(points)
        assert directions.shape == (4, 2) and not directions.any() and not shares.any()
        assert coordinates(points, directions) == [[0, 0]] * len(points)
    line = torch.arange(5.0)[:, None] * torch.tensor([3.0, -4.0, 0.0])
    directions, shares = principal_components(line)
    np.testing.assert_allclose(directions[:, 0], [-0.6, 0.8, 0], atol=1e-12)
    assert not directions[:, 1].any() and shares.tolist() == pytest.approx([1, 0])
    directions, shares = principal_components(torch.tensor([[1.0], [2.0], [4.0]]))
    assert directions.tolist() == [[1, 0]] and shares.tolist() == pytest.approx([1, 0])


def test_the_selection_is_even() -> None:
    assert even_selection(3, 5) == [0, 1, 2]
    assert even_selection(5, 5) == [0, 1, 2, 3, 4]
    assert even_selection(10, 4) == [0, 2, 5, 7]
    selected = even_selection(123_457)
    assert len(selected) == 2000
    assert set(np.diff(selected)) == {61, 62}
