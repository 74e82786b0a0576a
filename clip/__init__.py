"""CLIP with learnable memory: backbone weights, tokenizer, model, checkpoints and training."""
