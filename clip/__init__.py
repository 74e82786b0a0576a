"""CLIP with learnable memory: backbone weights, tokenizer, towers, methods and heads."""
