"""The ingredients of `make demo`: a made-up dataset in the MM-IMDb layout and a tiny CLIP pretrained beside it."""

from common.machine import settle_threads

settle_threads()  # for `python -m demo` and the commands that it starts, before anything imports torch
