"""Names that are none here but that people type: those of the published code, and the usual ones of other programs.

The published code inherits ViLT's configuration, most of which is for ViLT's own tasks and model.
"""

RENAMED = {"prompt_length": "memory_length", "prompt_depth": "memory_depth"}
"""DCP's names, which are taken for ours."""
MEANT = {
    **dict.fromkeys(("lr", "base_lr"), "learning_rate"),
    **dict.fromkeys(("method", "prompt", "model"), "prompt_type"),
    **dict.fromkeys(("backbone", "clip", "encoder", "arch"), "vit"),
    **dict.fromkeys(("dataset", "task_name"), "task"),
    **dict.fromkeys(("data", "data_dir", "data_path", "root"), "data_root"),
    **dict.fromkeys(("epochs", "num_epochs", "max_epochs", "epoch"), "max_epoch"),
    **dict.fromkeys(("steps", "num_steps"), "max_steps"),
    **dict.fromkeys(("warmup", "warmup_ratio"), "warmup_steps"),
    **dict.fromkeys(("wd", "decay"), "weight_decay"),
    **dict.fromkeys(("optimizer", "optim"), "optim_type"),
    **dict.fromkeys(("bs", "batchsize"), "batch_size"),
    **dict.fromkeys(("workers", "n_workers"), "num_workers"),
    **dict.fromkeys(("gpus", "gpu", "devices", "device"), "num_gpus"),
    **dict.fromkeys(("nodes",), "num_nodes"),
    **dict.fromkeys(("amp", "fp16", "dtype"), "precision"),
    **dict.fromkeys(("ratio", "missing_rate"), "missing_ratio"),
    **dict.fromkeys(("type", "missing", "missing_modality"), "missing_type"),
    **dict.fromkeys(("ckpt", "checkpoint", "checkpoint_path", "ckpt_path", "pretrained"), "load_path"),
    **dict.fromkeys(("resume",), "resume_from"),
    **dict.fromkeys(("name", "run_name"), "exp_name"),
    **dict.fromkeys(("output_dir", "save_dir", "result_dir"), "log_dir"),
    **dict.fromkeys(("seeds",), "sweep_seeds"),
    **dict.fromkeys(("length", "n_ctx"), "memory_length"),
    **dict.fromkeys(("depth",), "memory_depth"),
}
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
