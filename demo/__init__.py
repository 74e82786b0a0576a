"""The ingredients of `make demo`: a synthetic dataset in the MM-IMDb layout, and a tiny CLIP pretrained for it."""

from common.machine import settle_threads

settle_threads()  # for `python -m demo` and the commands it starts; must precede any import of torch
