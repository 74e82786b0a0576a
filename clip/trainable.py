"""Which parameters are trained: the parts of the model, and what trains which (METHOD.md section 5)."""

import re
from typing import NamedTuple

from clip.modules.classifier import MissingModalityClassifier

LEARNER = r"model\.(memory|prompt)_learner\."
TOWER = r"model\.\w+_encoder\."


class Part(NamedTuple):
    """A set of parameters, by a pattern of their whole names."""

    label: str
    pattern: str


HEAD = Part("head", r"\w+_classifier\.(weight|bias|prototypes)")
METHOD = Part("method", LEARNER + ".+")
UNUSED = Part("method, unused", LEARNER + ".+")
DYNAMIC_ATTENTION = Part("dynamic attention", TOWER + r"transformer\.resblocks\.0\.attn_(memory|prompt)\..+")
ENDS = Part(
    "final norms, image projection",
    r"model\.(image_encoder\.(ln_post\..+|proj)|text_encoder\.ln_final\..+)",
)
CLIP = Part(
    "CLIP",
    r"model\.(logit_scale|image_encoder\.(conv1|ln_pre)\..+|\w+_encoder\.(class|positional|token)_embedding.*"
    r"|text_encoder\.text_projection|\w+_encoder\.transformer\.resblocks\.\d+\.(attn|mlp|ln_1|ln_2)\..+)",
)
PARTS = (METHOD, UNUSED, HEAD, DYNAMIC_ATTENTION, ENDS, CLIP)


def part_of_parameters(classifier: MissingModalityClassifier) -> dict[str, Part]:
    """The part that each parameter belongs to; exactly one fits each."""
    method = classifier.model.method
    unused = tuple(f"model.{method.attribute}.{name}" for name in method.frozen)
    found: dict[str, Part] = {}
    for name, _ in classifier.named_parameters():
        not_used = name.startswith(unused) if unused else False
        fitting = [part for part in PARTS if part is not (METHOD if not_used else UNUSED)]
        fitting = [part for part in fitting if re.fullmatch(part.pattern, name)]
        assert len(fitting) == 1, f"parameter {name} belongs to {len(fitting)} parts of the model, not to 1"
        found[name] = fitting[0]
    return found


def trained_parts(classifier: MissingModalityClassifier, task: str) -> tuple[Part, ...]:
    """What is trained: the method and the head, and what else the method says for `task`."""
    towers = (DYNAMIC_ATTENTION, ENDS) if task in classifier.model.method.trains_towers_on else ()
    return (METHOD, HEAD, *towers)


def freeze(classifier: MissingModalityClassifier, task: str) -> str:
    """Sets `requires_grad` of every parameter; returns a table of the parts with their sizes, as text."""
    counts = dict.fromkeys(PARTS, 0)
    part_of, trained = part_of_parameters(classifier), trained_parts(classifier, task)
    for name, parameter in classifier.named_parameters():
        parameter.requires_grad_(part_of[name] in trained)
        counts[part_of[name]] += parameter.numel()
    lines = [
        f"  {part.label:<44}{counts[part]:>14,}  {'trained' if part in trained else 'frozen'}"
        for part in PARTS
        if counts[part]
    ]
    in_all = sum(counts[part] for part in trained)
    return "\n".join([*lines, f"  {'trained in all':<44}{in_all:>14,}"])
