"""Names that are none here but that people type: those of the published code, and the usual ones of other programs.

The published code inherits ViLT's configuration, most of which is for ViLT's own tasks and model.
"""

RENAMED = {"prompt_length": "memory_length", "prompt_depth": "memory_depth"}
"""DCP's names, which are taken for ours. MPLMM has a prompt_length of its own."""
_OURS_AND_THEIRS = {
    "learning_rate": "lr base_lr",
    "prompt_type": "method model prompt",
    "vit": "backbone encoder arch clip",
    "task": "dataset",
    "data_root": "data data_dir data_path root",
    "max_epoch": "epochs epoch num_epochs max_epochs",
    "max_steps": "steps num_steps",
    "warmup_steps": "warmup warmup_ratio",
    "weight_decay": "wd",
    "optim_type": "optimizer optim",
    "per_gpu_batchsize": "batch bs",
    "num_workers": "workers",
    "num_gpus": "gpus gpu device devices",
    "precision": "amp fp16 dtype",
    "missing_ratio": "ratio missing_rate",
    "missing_type": "type missing",
    "load_path": "checkpoint ckpt checkpoint_path ckpt_path pretrained",
    "resume_from": "resume",
    "exp_name": "name run_name",
    "log_dir": "output_dir save_dir",
    "sweep_seeds": "seeds",
    "memory_length": "length n_ctx",
    "memory_depth": "depth",
}
MEANT = {theirs: ours for ours, several in _OURS_AND_THEIRS.items() for theirs in several.split()}
"""What a user means; refused with a hint."""
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
