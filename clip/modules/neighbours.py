"""Retrieval: the features and labels of the nearest training samples reach the head, through gates that start at 0.

The similarity of two samples is the mean cosine over the modalities that both have, after the training samples' mean
features are subtracted. A missing modality's feature is filled with the mean over the nearest samples that have it; the
labels of the nearest samples overall are added to the logits. A training sample never finds its own row.

Shape suffixes: B samples of the batch, N of the training split, M modalities, E width of a modality's feature, F of all
features concatenated, C classes, k neighbours, G searches: one among all samples, then one for each modality among the
samples that have it.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip.modules.interfaces import ModelInput

TRAIN = "train"
BANK = ("features_NF", "present_NM", "labels_NC", "row_N")


class Neighbours(nn.Module):
    """The training samples, and what the nearest of them contribute.

    Features come from frozen towers, so the neighbours found for a sample of a split remain valid in later epochs.

    Args:
        widths: E, keyed by modality.
        k: number of neighbours.
    """

    def __init__(self, widths: Mapping[str, int], n_classes: int, k: int) -> None:
        super().__init__()
        self.widths, self.n_classes, self.k = dict(widths), n_classes, k
        self.feature_gate_M = nn.Parameter(torch.zeros(len(widths)))
        self.vote_gate_C = nn.Parameter(torch.zeros(n_classes))
        self.allocate(0)
        self._found: dict[tuple[str, int, int], Tensor] = {}

    def allocate(self, samples: int) -> None:
        """Allocates the buffers for the training samples, before they are computed or loaded from a checkpoint."""
        self.register_buffer("features_NF", torch.zeros(samples, sum(self.widths.values()), dtype=torch.float16))
        self.register_buffer("present_NM", torch.zeros(samples, len(self.widths), dtype=torch.bool))
        self.register_buffer("labels_NC", torch.zeros(samples, self.n_classes, dtype=torch.uint8))
        self.register_buffer("row_N", torch.zeros(samples, dtype=torch.long))

    def store(self, features_NF: Tensor, present_NM: Tensor, labels: Tensor, row_N: Tensor) -> None:
        """Stores the training samples, with modalities missing as in their missing table; a row of zeros is no sample.

        Args:
            labels: 0 and 1 (N, C), or class indices (N,).
        """
        labels_NC = labels if labels.ndim == 2 else F.one_hot(labels, self.n_classes)
        labels_NC = labels_NC * present_NM.any(1, keepdim=True)
        self.allocate(len(row_N))
        for name, value in zip(BANK, (features_NF, present_NM, labels_NC, row_N), strict=True):
            self.get_buffer(name).copy_(value)

    def forward(self, features: Mapping[str, Tensor], batch: ModelInput) -> tuple[dict[str, Tensor], Tensor]:
        """Features (B, E) with missing ones filled, keyed by modality, and the addition (B, C) to the logits."""
        near_BGk = self._nearest(torch.cat([features[name] for name in self.widths], 1).detach(), batch)
        valid_BGk = near_BGk >= 0
        count_BG = valid_BGk.sum(-1)
        filled = {}
        parts_NE = self.get_buffer("features_NF").split(list(self.widths.values()), dim=1)
        for m, (name, part_NE) in enumerate(zip(self.widths, parts_NE, strict=True)):
            weight_Bk = valid_BGk[:, 1 + m] / count_BG[:, 1 + m, None].clamp_min(1)
            found_BkE = part_NE[near_BGk[:, 1 + m]].float()
            mean_BE = torch.einsum("bk,bke->be", weight_Bk, found_BkE)
            filled[name] = features[name] + self.feature_gate_M[m] * mean_BE
        labels_NC = self.get_buffer("labels_NC").float()
        share_C = (labels_NC.sum(0) + 0.5) / (self.get_buffer("present_NM").any(1).sum() + 1)
        votes_BC = (labels_NC[near_BGk[:, 0]] * valid_BGk[:, 0, :, None]).sum(1) + share_C
        log_odds_BC = (votes_BC / (count_BG[:, :1] + 1)).logit() - share_C.logit()
        return filled, self.vote_gate_C * log_odds_BC

    def _nearest(self, features_BF: Tensor, batch: ModelInput) -> Tensor:
        """Indices (B, G, k) of training samples, -1 where fewer qualify; none for a modality that the sample has."""
        types = batch.missing_type_B.tolist()
        if not batch.split or batch.index_B is None:
            return self._search(features_BF, batch)
        keys = [(batch.split, index, code) for index, code in zip(batch.index_B.tolist(), types, strict=True)]
        if any(key not in self._found for key in keys):
            self._found |= zip(keys, self._search(features_BF, batch).cpu(), strict=True)
        return torch.stack([self._found[key] for key in keys]).to(features_BF.device)

    @torch.no_grad()
    def _search(self, features_BF: Tensor, batch: ModelInput) -> Tensor:
        """Computes what `_nearest` returns, with one matrix product."""
        bank_NF, present_NM, row_N = (self.get_buffer(name) for name in ("features_NF", "present_NM", "row_N"))
        widths = list(self.widths.values())
        counts_F = present_NM.sum(0).clamp_min(1).repeat_interleave(torch.tensor(widths, device=present_NM.device))
        mean_F = bank_NF.float().sum(0) / counts_F

        def keys(features: Tensor, present: Tensor) -> Tensor:
            parts = zip((features.float() - mean_F).split(widths, dim=1), present.unbind(1), strict=True)
            return torch.cat([F.normalize(part * has[:, None], dim=1) for part, has in parts], dim=1)

        with torch.autocast(features_BF.device.type, enabled=False):
            cosine_BN = keys(features_BF, batch.present_BM) @ keys(bank_NF, present_NM).T
        shared_BN = batch.present_BM.float() @ present_NM.float().T
        mean_BN = (cosine_BN / shared_BN).masked_fill(shared_BN == 0, -torch.inf)
        if batch.split == TRAIN and batch.index_B is not None and len(row_N):  # fast_dev_run has no training samples
            mean_BN.masked_fill_(row_N[batch.index_B][:, None] == row_N, -torch.inf)
        found = []
        for m in range(-1, len(self.widths)):
            among_BN = mean_BN
            if m >= 0:
                among_BN = mean_BN.masked_fill(batch.present_BM[:, m, None] | ~present_NM[:, m], -torch.inf)
            nearness_Bk, index_Bk = among_BN.topk(min(self.k, len(row_N)))
            found.append(index_Bk.where(nearness_Bk.isfinite(), -1))
        return torch.stack(found, 1)
