"""Methods without slots for the sensor backbones: FOCAL's pretraining, and supervised training from scratch.

Shape suffixes: B samples, b samples with a modality, K classes.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from clip.modules.interfaces import Backbone, ModelInput, Place
from clip.modules.method import METHOD, MethodOptions
from clip.modules.no_prompts import NoPrompts, WholeBackbone
from clip.modules.registry import PRETRAINING
from sensors.augmentations import CUTMIX_PROBABILITY, cut_box, draw_view, drawn, pasted, random_phase
from sensors.backbone import TOWERS, SensorBackbone
from sensors.focal import FocalSettings, focal_losses, projector


class Focal(NoPrompts):
    """FOCAL: trains towers and projection heads on two views of subsequences; needs samples with all modalities."""

    attribute = "mod_projectors"
    trains_head = False
    betas = (0.9, 0.999)
    decays_all = True

    def __init__(self, places: Mapping[str, Place], embed_dim: int, options: MethodOptions) -> None:
        super().__init__(places, embed_dim, options)
        for name, place in places.items():
            self.add_module(name, projector(embed_dim, place.projection))

    def pretraining_losses(self, backbone: Backbone, batch: ModelInput) -> dict[str, Tensor]:
        """The four weighted parts of the loss for a batch of subsequences."""
        assert isinstance(backbone, SensorBackbone)
        views = []
        with torch.autocast(batch.present_BM.device.type, enabled=False):  # the blocks use the dtype of their tower
            for _ in range(2):
                signals = draw_view(batch.inputs)
                features = {name: backbone.towers[name](signals[name]) for name in self.places}
                projected = {name: self.get_submodule(name)(feature_BE) for name, feature_BE in features.items()}
                views.append({name: x.unflatten(0, (-1, PRETRAINING["focal"])) for name, x in projected.items()})
            return focal_losses(views, FocalSettings(backbone.sizes.temperature))

    def trains(self, task: str) -> tuple[str, ...]:
        """Projection heads and towers; the patch embedding only with the backbone's `train_patch_embed`."""
        return (METHOD, TOWERS)


class Supervised(WholeBackbone):
    """Supervised training on mixed samples, and for the SW-Transformer with phase shifts too."""

    betas = (0.9, 0.999)
    decays_all = True

    def augment(self, batch: ModelInput, labels: Tensor, n_classes: int) -> tuple[ModelInput, Tensor]:
        """Mixup or cutmix with one other sample, in the modalities that both have; labels are mixed accordingly."""
        B = len(labels)
        share, other_B = float(torch.rand(())), torch.randperm(B)
        cut = float(torch.rand(())) < CUTMIX_PROBABILITY
        inputs: dict[str, Tensor] = {}
        kept_B, present_B = torch.zeros(B), torch.zeros(B)
        for name, x_b in batch.inputs.items():
            rows = batch.rows[name].cpu()
            if not len(rows):  # no sample of the batch has it
                inputs[name] = x_b
                continue
            index_B = torch.full((B,), -1)
            index_B[rows] = torch.arange(len(rows))
            partner_b = index_B[other_B[rows]]
            partner_b = torch.where(partner_b < 0, torch.arange(len(rows)), partner_b)  # if the other sample lacks it
            other = x_b[partner_b.to(x_b.device)]
            kept_share = share
            if cut:
                size = (x_b.shape[2], x_b.shape[3])
                box = cut_box(share, (int(torch.randint(size[0], ())), int(torch.randint(size[1], ()))), size)
                inputs[name] = pasted(x_b, other, box)
                kept_share = 1 - (box[1] - box[0]) * (box[3] - box[2]) / (size[0] * size[1])
            else:
                inputs[name] = share * x_b + (1 - share) * other
            alone_b = partner_b == torch.arange(len(rows))
            kept_B[rows] += torch.where(alone_b, 1.0, kept_share)
            present_B[rows] += 1
        if all(place.depth for place in self.places.values()):
            inputs = drawn(random_phase, inputs)
        kept_B1 = (kept_B / present_B)[:, None].to(labels.device)
        one_hot_BK = F.one_hot(labels, n_classes).float()
        mixed_BK = kept_B1 * one_hot_BK + (1 - kept_B1) * one_hot_BK[other_B.to(labels.device)]
        return batch._replace(inputs=inputs), mixed_BK
