"""Methods of the sensor backbones that have no slots."""

from clip.modules.method import METHOD
from clip.modules.no_prompts import NoPrompts
from sensors.backbone import FUSION


class FrozenTowers(NoPrompts):
    """The towers as they were pretrained; fusion and head are trained."""

    def trains(self, task: str) -> tuple[str, ...]:
        return (METHOD, FUSION)
