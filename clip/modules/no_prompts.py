"""No prompts: the frozen backbone and a head, the baseline of every comparison, or a backbone trained as a whole."""

from collections.abc import Mapping

from torch import Tensor

from clip.modules.interfaces import NO_SLOTS, ModelInput, TowerSlots
from clip.modules.method import EVERY_PART, Method


class NoPrompts(Method):
    """Leaves the towers unchanged and trains the head alone."""

    def forward(self, batch: ModelInput, tokens: Mapping[str, Tensor]) -> dict[str, TowerSlots]:
        """No slots anywhere."""
        return dict.fromkeys(self.places, NO_SLOTS)


class WholeBackbone(NoPrompts):
    """No prompts and nothing frozen, for pretraining and full fine-tuning."""

    def trains(self, task: str) -> tuple[str, ...]:
        """Every part."""
        return (EVERY_PART,)
