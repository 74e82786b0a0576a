"""Which parameters are trained: the parts of the model, and what trains which (METHOD.md section 5)."""

from torch import nn

from clip.modules.classifier import MissingModalityClassifier

HEAD = "head"


def parts_of(classifier: MissingModalityClassifier) -> dict[str, list[nn.Parameter]]:
    """The parameters by part: what method and backbone say, and the head. Each is in exactly one."""
    method, backbone = classifier.method.parts(), classifier.model.parts()
    parts = {**method, HEAD: list(classifier.head.parameters()), **backbone}
    assert len(parts) == len(method) + 1 + len(backbone), "method and backbone have parts of the same name"
    of_parts = sorted(id(parameter) for part in parts.values() for parameter in part)
    assert of_parts == sorted(map(id, classifier.parameters())), "a parameter is in no part, or in several"
    return parts


def freeze(classifier: MissingModalityClassifier, task: str) -> str:
    """Sets `requires_grad` of every parameter; returns a table of the parts with their sizes, as text."""
    trained = {HEAD, *classifier.method.trains(task)}
    lines, total = [], 0
    for label, parameters in parts_of(classifier).items():
        size = sum(parameter.numel() for parameter in parameters)
        for parameter in parameters:
            parameter.requires_grad_(label in trained)
        total += size if label in trained else 0
        if size:
            lines.append(f"  {label:<44}{size:>14,}  {'trained' if label in trained else 'frozen'}")
    return "\n".join([*lines, f"  {'trained in all':<44}{total:>14,}"])


def optimizer_groups(
    module: nn.Module, head_name: str, learning_rate: float, lr_mult: float, weight_decay: float
) -> list[dict[str, object]]:
    """AdamW's parameter groups: weight decay or none (biases and norms), backbone part or head.

    Every trained parameter is in exactly one group.
    """
    norm_parameters = {
        f"{module_name}.{name}"
        for module_name, submodule in module.named_modules()
        if isinstance(submodule, nn.LayerNorm)
        for name, _ in submodule.named_parameters(recurse=False)
    }
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            plain = name.endswith("bias") or name in norm_parameters
            groups.setdefault((name.startswith(f"{head_name}."), plain), []).append(parameter)
    grouped = [id(parameter) for parameters in groups.values() for parameter in parameters]
    trained = [id(parameter) for parameter in module.parameters() if parameter.requires_grad]
    assert sorted(grouped) == sorted(trained), "a trained parameter is in no optimiser group, or in two"
    return [
        {
            "params": parameters,
            "lr": learning_rate * (lr_mult if head else 1.0),
            "weight_decay": 0.0 if plain else weight_decay,
        }
        for (head, plain), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]
