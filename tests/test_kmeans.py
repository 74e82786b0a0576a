"""K-means on well-separated clusters."""

import torch

from common.kmeans import kmeans


def test_centres_are_the_means_of_the_clusters() -> None:
    torch.manual_seed(0)
    expected = 10 * torch.randn(8, 5)
    points = (expected[:, None] + 0.01 * torch.randn(8, 20, 5)).flatten(0, 1)[torch.randperm(160)]
    found = kmeans(points, 8)
    nearest = torch.cdist(expected, found).min(dim=1)
    assert sorted(nearest.indices.tolist()) == list(range(8)) and nearest.values.max() < 0.02
    assert torch.equal(kmeans(points, 8), found)
    for centre in found:
        members = points[torch.cdist(points, found).argmin(dim=1) == torch.cdist(centre[None], found).argmin()]
        assert torch.allclose(members.mean(dim=0), centre, atol=1e-4)


def test_fewer_points_than_clusters_are_repeated_as_centres() -> None:
    points = torch.randn(3, 2)
    assert torch.equal(kmeans(points, 5), points[[0, 1, 2, 0, 1]])
