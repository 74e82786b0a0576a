"""No prompts at all: frozen CLIP and the head, the floor of every comparison."""

from collections.abc import Sequence

from clip.modules.method import Memory, Method
from clip.modules.vision_transformer_memory import NO_MEMORY


class NoPrompts(Method):
    """Gives the towers nothing; the head alone is trained."""

    def of_types(self, types: Sequence[int]) -> Memory:
        """Nothing."""
        return Memory(NO_MEMORY, NO_MEMORY)
