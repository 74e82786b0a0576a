"""The methods by the name that `prompt_type` knows them by. Adding one is adding a file and a line here."""

from clip.modules.clip_dynamic_memory import MemoryLearner
from clip.modules.coop import CoOp
from clip.modules.dcp import DeepCorrelatedPrompts
from clip.modules.map_prompts import MapAttention, MapInput
from clip.modules.maple import MaPLe
from clip.modules.method import Method
from clip.modules.msp import ModalitySpecificPrompts
from clip.modules.no_prompts import NoPrompts

METHODS: dict[str, type[Method]] = {
    "rep": MemoryLearner,
    "dcp": DeepCorrelatedPrompts,
    "map_input": MapInput,
    "map_attention": MapAttention,
    "maple": MaPLe,
    "coop": CoOp,
    "msp": ModalitySpecificPrompts,
    "none": NoPrompts,
}
