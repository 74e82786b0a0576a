"""Methods, keyed by their `prompt_type`, and heads. To add one, add a file and a line here.

Entries are import names, so that reading the options imports none of them.
"""

from pkgutil import resolve_name
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clip.modules.heads import Head
    from clip.modules.method import Method

METHODS = {
    "rep": "clip.modules.clip_dynamic_memory:MemoryLearner",
    "dcp": "clip.modules.dcp:DeepCorrelatedPrompts",
    "map_input": "clip.modules.map_prompts:MapInput",
    "map_attention": "clip.modules.map_prompts:MapAttention",
    "maple": "clip.modules.maple:MaPLe",
    "coop": "clip.modules.coop:CoOp",
    "msp": "clip.modules.msp:ModalitySpecificPrompts",
    "mora": "clip.modules.mora:MoRA",
    "lora": "clip.modules.mora:LoRA",
    "syp": "clip.modules.syp:SynergisticPrompts",
    "aoept": "clip.modules.aoept:AOEPT",
    "none": "clip.modules.no_prompts:NoPrompts",
}
FAMILY_METHODS = {
    "vla": {
        "rep": "vla.memory_learner:VlaMemoryLearner",
        "mplmm": "vla.mplmm:Mplmm",
        "mplmm_described": "vla.mplmm:MplmmDescribed",
        "none": "clip.modules.no_prompts:NoPrompts",
        "full": "clip.modules.no_prompts:WholeBackbone",
    },
    "sensors": {
        "rep": "sensors.memory:SensorMemoryLearner",
        "none": "clip.modules.no_prompts:NoPrompts",
        "full": "sensors.methods:Supervised",
        "focal": "sensors.methods:Focal",
    },
}
"""Methods of the families of backbones that do not use METHODS, keyed by family."""
PRETRAINING = {"focal": 4}
"""Methods that train a backbone without labels, with the number of consecutive samples of a recording that they
compare. Their checkpoints serve as backbones for other methods."""
TRAIN_BACKBONES = (*PRETRAINING, "full")
"""Methods whose checkpoints serve as backbones for other methods."""
HEADS = {
    "linear": "clip.modules.heads:LinearHead",
    "linear_by_type": "clip.modules.heads:LinearByType",
    "dpl": "clip.modules.dpl:DecoupledPrototypes",
}


def every_method() -> list[str]:
    """The names of all methods of all families."""
    return list(dict.fromkeys([*METHODS, *(name for methods in FAMILY_METHODS.values() for name in methods)]))


def methods_of(family: str) -> dict[str, str]:
    """The methods for a family of backbones."""
    return FAMILY_METHODS.get(family, METHODS)


def method_class(name: str, family: str = "clip") -> "type[Method]":
    """The class of a method."""
    found: type[Method] = resolve_name(methods_of(family)[name])
    return found


def head_class(name: str) -> "type[Head]":
    """The class of a head."""
    found: type[Head] = resolve_name(HEADS[name])
    return found
