"""Names on the command line of the published code, which this program's users know: renamed here, or without meaning.

The published code inherits ViLT's configuration, most of which is for ViLT's own tasks and model.
"""

from collections.abc import Sequence

from common.errors import ConfigError

RENAMED = {"prompt_length": "memory_length", "prompt_depth": "memory_depth"}
"""DCP's names."""
OPTIONS_OF_VILT = frozenset(
    {
        *("datasets", "loss_names", "train_transform_keys", "val_transform_keys", "max_image_len", "patch_size"),
        *("draw_false_image", "draw_false_text", "image_only", "max_text_len", "vocab_size", "whole_word_masking"),
        *("mlm_prob", "vqav2_label_size", "get_recall_metric", "hidden_size", "num_heads", "num_layers", "mlp_ratio"),
        *("drop_rate", "mmimdb_class_num", "food101_class_num", "hatememes_class_num", "learnt_p", "prompt_layers"),
        "multi_layer_prompt",
    }
)
CONFIGS_OF_VILT = (
    *("task_mlm_itm", "task_finetune_nlvr2", "task_finetune_vqa", "task_finetune_irtr_"),
    *("env_dandelin", "vit32_base", "step25k", "step50k", "step100k", "step200k"),
)
"""Beginnings of the names of its named configs."""


def with_names_of_here(words: Sequence[str]) -> list[str]:
    """A command line with the names that this program has.

    Raises:
        ConfigError: an option or a named config has no meaning here.
    """
    renamed = []
    for word in words:
        name, equals, value = word.partition("=")
        if equals and name in OPTIONS_OF_VILT:
            raise ConfigError(f"{name}: an option of ViLT, whose tasks and model are not here; leave it out")
        if not equals and name.startswith(CONFIGS_OF_VILT):
            raise ConfigError(f"{name}: a named config of ViLT, whose tasks and model are not here; leave it out")
        renamed.append(f"{RENAMED.get(name, name)}{equals}{value}")
    return renamed
