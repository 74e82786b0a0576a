"""The made-up segments of the demo."""

import numpy as np

from demo import segments


def test_each_modality_shows_something_of_the_sentiment_and_padding_is_in_front() -> None:
    splits = segments.corpus("mosi", {"train": 300, "valid": 4, "test": 4})
    arrays, labels = splits["train"], splits["train"]["labels"].ravel()
    assert np.abs(labels).max() <= 3 and np.allclose(labels * 5, np.round(labels * 5), atol=1e-5)
    for name, width in (("text", 300), ("audio", 5), ("vision", 20)):
        x = arrays[name]
        assert x.shape == (300, segments.STEPS, width)
        real = x.any(axis=2)
        assert (np.diff(real.astype(int), axis=1) >= 0).all() and real.sum(axis=1).min() >= segments.LEAST_STEPS
        features = np.concatenate([x.mean(axis=1), x.std(axis=1)[:, :5]], axis=1)[:, :40]
        design = np.c_[features, np.ones(300)]
        fitted = design @ np.linalg.lstsq(design, labels, rcond=None)[0]
        assert np.corrcoef(fitted, labels)[0, 1] > 0.4, name


def test_both_corpora_share_their_words_and_nothing_else() -> None:
    one, other = (segments.corpus(name, {"train": 40}) for name in ("mosei", "mosi"))
    words = [{tuple(row) for row in each["train"]["text"].reshape(-1, 300)[:, :3]} for each in (one, other)]
    assert len(words[0] & words[1]) > 50
    assert one["train"]["audio"].shape[2] == 74 and other["train"]["audio"].shape[2] == 5
