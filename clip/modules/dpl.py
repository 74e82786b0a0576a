"""DPL, decoupled prototype learning: a head for any method (arXiv 2505.08283; docs/method.md section 8).

Shape suffixes: B samples, E width of a modality's features, C classes, V views, N prototypes.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip.modules.heads import Head
from clip.modules.method import MethodOptions

TEXT_MISSING, IMAGE_MISSING = 1, 2
VIEWS = {
    "text": ("w_mi_c", "w_mi_tm", "w_mt_c"),
    "image": ("w_mi_c", "w_mt_c", "w_mt_im"),
    "both": ("w_mi_c", "w_mi_tm", "w_mt_c", "w_mt_im"),
}
"""Names of the prototypes used in training, keyed by the missing type; the first are the anchors of `one_view`."""
SMALLEST_SQUARE = 1e-12
"""Lower bound of a squared sine; at 0, the square root has no finite gradient."""


class DecoupledPrototypes(Head):
    """A prototype of each class for images of complete samples, for images without text, and the same for texts.

    Logits are cosines between the features of the present modalities and the prototypes of the sample's missing type,
    averaged for complete samples. There is no bias, and no scale in evaluation, so a class is predicted if its cosine
    is at least 0. In training, logits are scaled, the angle to the right classes is widened by the missing type's
    margin, and a contrast loss pulls the prototypes of a class together. Parameter names are those of published
    checkpoints.
    """

    trains_ends = True
    logit_scale = 32.0

    def __init__(self, parts: int, embed_dim: int, n_classes: int, options: MethodOptions | None = None) -> None:
        super().__init__(parts, embed_dim, n_classes, options)
        if parts != 2:
            raise ValueError(f"head=dpl expects an image and a text, found {parts} modalities")
        options = options or MethodOptions()
        self.margins, self.contrast_weight = options.dpl_margins, options.dpl_contrast_weight
        self.scales = (self.logit_scale,) * 3
        self.temperature = self.base_temperature = 1.0
        self.one_view = False
        self.views = VIEWS["both"]
        for name in VIEWS["both"]:
            self.register_parameter(name, nn.Parameter(nn.init.xavier_normal_(torch.empty(embed_dim, n_classes))))

    def trained_on(self, missing_type: str) -> None:
        """Restricts the contrast loss to the prototypes of this missing type; ValueError: not one of image and text."""
        if missing_type not in VIEWS:
            raise ValueError(f"head=dpl expects an image and a text, found missing_type={missing_type}")
        self.views = VIEWS[missing_type]

    def forward(self, features: Tensor, missing_type_B: Tensor, labels: Tensor | None = None) -> Tensor:
        """Cosines (B, C) for features (B, 2E), image first; with labels, the training logits.

        Computed in full precision: 16 bits round cosines near 1 to 1, where the sine has no finite gradient.
        """
        with torch.autocast(features.device.type, enabled=False):
            features = features.to(self.get_parameter("w_mi_c").dtype)
            image_BE, text_BE = F.normalize(features.unflatten(-1, (2, -1)), dim=-1).unbind(1)
            type_B1 = missing_type_B[:, None]
            image_BC = torch.where(
                type_B1 == TEXT_MISSING, image_BE @ self._prototypes("w_mi_tm"), image_BE @ self._prototypes("w_mi_c")
            )
            text_BC = torch.where(
                type_B1 == IMAGE_MISSING, text_BE @ self._prototypes("w_mt_im"), text_BE @ self._prototypes("w_mt_c")
            )
            single_BC = torch.where(type_B1 == TEXT_MISSING, image_BC, text_BC)
            cosine_BC = torch.where(type_B1 == 0, (image_BC + text_BC) / 2, single_BC)
            return cosine_BC if labels is None else self.with_margin(cosine_BC, missing_type_B, labels)

    def with_margin(self, cosine_BC: Tensor, missing_type_B: Tensor, labels: Tensor) -> Tensor:
        """Logits for the task's loss: scaled cosines, with the margin added to the angle of the right classes.

        Where the widened angle would exceed pi, `margin * sin(pi - margin)` is subtracted from the cosine instead.
        """
        scale_B1, margin_B1 = (
            _of_type(values, missing_type_B, cosine_BC.dtype)[:, None] for values in (self.scales, self.margins)
        )
        classes_C = torch.arange(cosine_BC.shape[-1], device=labels.device)
        right_BC = labels[:, None] == classes_C if labels.ndim == 1 else labels.bool()
        sine_BC = (1 - cosine_BC.square()).clamp_min(SMALLEST_SQUARE).sqrt()
        widened_BC = torch.where(
            cosine_BC > (math.pi - margin_B1).cos(),
            cosine_BC * margin_B1.cos() - sine_BC * margin_B1.sin(),
            cosine_BC - margin_B1 * (math.pi - margin_B1).sin(),
        )
        return scale_B1 * torch.where(right_BC, widened_BC, cosine_BC)

    def losses(self) -> dict[str, Tensor]:
        """The contrast loss: each prototype should be nearer to those of its class than to all others."""
        if not self.contrast_weight:
            return {}
        with torch.autocast(self.get_parameter("w_mi_c").device.type, enabled=False):
            prototypes_NE = torch.cat([self._prototypes(name).T for name in self.views])  # view by view
            V, N = len(self.views), len(prototypes_NE)
            anchors = N // V if self.one_view else N
            itself = torch.eye(N, dtype=torch.bool, device=prototypes_NE.device)[:anchors]
            same_class = torch.eye(N // V, dtype=torch.bool, device=itself.device).repeat(V, V)[:anchors] & ~itself
            similarity_AN = prototypes_NE[:anchors] @ prototypes_NE.T / self.temperature
            log_softmax_AN = similarity_AN.masked_fill(itself, -math.inf).log_softmax(dim=1)
            mean = log_softmax_AN.masked_fill(~same_class, 0).sum() / (anchors * (V - 1))
            return {"contrast": -self.contrast_weight * self.temperature / self.base_temperature * mean}

    def _prototypes(self, name: str) -> Tensor:
        """Prototypes (E, C), each of length 1."""
        return F.normalize(self.get_parameter(name), dim=0)


def _of_type(values: Sequence[float], type_B: Tensor, dtype: torch.dtype) -> Tensor:
    """The value (B,) for each sample's missing type. `values` is not made a tensor, whose copy to the GPU a CUDA graph
    could not capture."""
    return torch.stack([(type_B == code).to(dtype) * value for code, value in enumerate(values)]).sum(dim=0)
