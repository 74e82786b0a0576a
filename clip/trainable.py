"""Decides which parameters are trained, by the model's named parts (docs/method.md section 5)."""

from collections.abc import Collection

from torch import nn

from clip.modules.classifier import MissingModalityClassifier
from clip.modules.method import EVERY_PART, UNUSED
from clip.modules.no_prompts import NoPrompts

HEAD, GATES = "head", "gates of neighbours"


def parts_of(classifier: MissingModalityClassifier) -> dict[str, list[nn.Parameter]]:
    """All parameters, keyed by part: those of method and backbone, and the head. Each is in exactly one part."""
    method, backbone = classifier.method.parts(), classifier.model.parts()
    gates = [] if classifier.neighbours is None else list(classifier.neighbours.parameters())
    parts = {**method, HEAD: list(classifier.head.parameters()), GATES: gates, **backbone}
    assert len(parts) == len(method) + 2 + len(backbone), "method and backbone have parts of the same name"
    in_parts = sorted(id(parameter) for part in parts.values() for parameter in part)
    assert in_parts == sorted(map(id, classifier.parameters())), "a parameter is in no part, or in several"
    return parts


def freeze(classifier: MissingModalityClassifier, task: str) -> str:
    """Sets `requires_grad` of every parameter and returns a table of the parts and their sizes as text."""
    trained = {*classifier.method.trains(task)}
    if classifier.method.trains_head:
        trained |= {HEAD, GATES, *classifier.model.always_trained}
    train_ends, ends = classifier.method.options.train_ends, set(classifier.model.ends)
    if train_ends or (train_ends is None and classifier.head.trains_ends):
        trained |= ends
    elif train_ends is False:
        trained -= ends
    if EVERY_PART in trained:
        trained |= parts_of(classifier).keys() - {UNUSED}
    lines, total = [], 0
    for label, parameters in parts_of(classifier).items():
        size = sum(parameter.numel() for parameter in parameters)
        for parameter in parameters:
            parameter.requires_grad_(label in trained)
        total += size if label in trained else 0
        if size:
            lines.append(f"  {label:<44}{size:>14,}  {'trained' if label in trained else 'frozen'}")
    return "\n".join([*lines, f"  {'trained in all':<44}{total:>14,}"])


def has_frozen_towers(classifier: MissingModalityClassifier, but_for: Collection[str] = ()) -> bool:
    """Whether the towers get no slots and no parameter of theirs is trained, except in the parts `but_for`."""
    model = classifier.model
    excepted = {id(parameter) for name, part in model.parts().items() if name in but_for for parameter in part}
    considered = [each for tower in model.towers.values() for each in tower.parameters() if id(each) not in excepted]
    return type(classifier.method) is NoPrompts and not any(each.requires_grad for each in considered)
