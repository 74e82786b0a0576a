"""The ingredients of `make demo`: a made-up dataset in the MM-IMDb layout and a tiny CLIP pretrained beside it."""
