"""Which parameters are trained: one table (METHOD.md section 5)."""

import re
from dataclasses import dataclass

from torch import nn

from clip.tasks import TASKS

ALL_TASKS = frozenset(TASKS)
NO_TASK: frozenset[str] = frozenset()


@dataclass(frozen=True)
class ParameterRow:
    """A set of parameters, by a pattern of their whole name, and the tasks that train it."""

    label: str
    pattern: str
    trained_by: frozenset[str]


PARAMETER_TABLE = (
    ParameterRow("memory learner", r"model\.memory_learner\.(?!dynamic_common_token_net\.).+", ALL_TASKS),
    ParameterRow("dynamic token net (released model: unused)", r"model\.memory_learner\.dynamic_common.+", NO_TASK),
    ParameterRow("head", r"\w+_classifier\.(weight|bias)", ALL_TASKS),
    ParameterRow(
        "dynamic attention", r"model\.\w+_encoder\.transformer\.resblocks\.0\.attn_memory\..+", frozenset({"hatememes"})
    ),
    ParameterRow(
        "final norms, image projection",
        r"model\.(image_encoder\.(ln_post\..+|proj)|text_encoder\.ln_final\..+)",
        frozenset({"hatememes"}),
    ),
    ParameterRow(
        "CLIP",
        r"model\.(logit_scale|image_encoder\.(conv1|ln_pre)\..+|\w+_encoder\.(class|positional|token)_embedding.*"
        r"|text_encoder\.text_projection|\w+_encoder\.transformer\.resblocks\.\d+\.(attn|mlp|ln_1|ln_2)\..+)",
        NO_TASK,
    ),
)


def rows_by_parameter(module: nn.Module) -> dict[str, ParameterRow]:
    """The row of each parameter of a `MissingModalityClassifier`; exactly one row fits each."""
    rows: dict[str, ParameterRow] = {}
    for name, _ in module.named_parameters():
        fitting = [row for row in PARAMETER_TABLE if re.fullmatch(row.pattern, name)]
        assert len(fitting) == 1, f"parameter {name} fits {len(fitting)} rows of PARAMETER_TABLE, not 1"
        rows[name] = fitting[0]
    return rows


def freeze(module: nn.Module, task: str) -> str:
    """Sets `requires_grad` of every parameter by the table; returns the table with counts, as text."""
    counts = {row.label: 0 for row in PARAMETER_TABLE}
    rows = rows_by_parameter(module)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(task in rows[name].trained_by)
        counts[rows[name].label] += parameter.numel()
    lines = [
        f"  {row.label:<44}{counts[row.label]:>14,}  {'trained' if task in row.trained_by else 'frozen'}"
        for row in PARAMETER_TABLE
    ]
    trained = sum(counts[row.label] for row in PARAMETER_TABLE if task in row.trained_by)
    return "\n".join([*lines, f"  {'trained in all':<44}{trained:>14,}"])


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
