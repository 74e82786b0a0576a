"""No prompts at all: the frozen backbone and the head, the floor of every comparison, or all of it trained."""

from collections.abc import Mapping

from torch import Tensor

from clip.modules.interfaces import NO_SLOTS, ModelInput, TowerSlots
from clip.modules.method import EVERY_PART, Method


class NoPrompts(Method):
    """Leaves the towers as they are; the head alone is trained."""

    def forward(self, batch: ModelInput, tokens: Mapping[str, Tensor]) -> dict[str, TowerSlots]:
        """No slots anywhere."""
        return dict.fromkeys(self.places, NO_SLOTS)


class WholeBackbone(NoPrompts):
    """No prompts, and nothing frozen: pretraining, and full fine-tuning."""

    def trains(self, task: str) -> tuple[str, ...]:
        """Every part."""
        return (EVERY_PART,)
