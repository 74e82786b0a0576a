"""No prompts at all: frozen CLIP and the head, the floor of every comparison."""

from collections.abc import Mapping

from torch import Tensor

from clip.modules.interfaces import NO_SLOTS, ModelInput, TowerSlots
from clip.modules.method import Method


class NoPrompts(Method):
    """Leaves the towers as they are; the head alone is trained."""

    def forward(self, batch: ModelInput, tokens: Mapping[str, Tensor]) -> dict[str, TowerSlots]:
        """No slots anywhere."""
        return dict.fromkeys(self.places, NO_SLOTS)
