"""What can be had without looking at a film: predicting the most frequent genres for everyone."""

import json
from collections.abc import Sequence
from pathlib import Path

from common.errors import DataError


def _genres_of(raw: Path, ids: Sequence[str]) -> list[set[str]]:
    found = []
    for film_id in ids:
        path = raw / "labels" / f"{film_id}.json"
        try:
            found.append(set(json.loads(path.read_text(encoding="utf-8"))["genres"]))
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
    return found


def _constant_f1_macro(predicted: set[str], films: Sequence[set[str]]) -> float:
    """F1-macro of predicting the same genres for every film; a genre neither predicted nor present is left out."""
    occurring = predicted.union(*films)
    total = 0.0
    for genre in predicted:
        hits = sum(genre in genres for genres in films)
        total += 2 * hits / (len(films) + hits)
    return total / len(occurring) if occurring else 0.0


def frequent_genres_f1(raw: Path) -> float:
    """F1-macro on the test split of the MM-IMDb layout under `raw` of predicting the k most frequent genres of the
    training split for every film, with the k that is best on the dev split. DataError where a file is unreadable."""
    path = raw / "split.json"
    try:
        split = json.loads(path.read_text(encoding="utf-8"))
        train, dev, test = (_genres_of(raw, split[name]) for name in ("train", "dev", "test"))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
    counts = {genre: sum(genre in genres for genres in train) for genre in set().union(*train)}
    ranked = sorted(counts, key=lambda genre: (-counts[genre], genre))
    best_k = max(range(1, len(ranked) + 1), key=lambda k: _constant_f1_macro(set(ranked[:k]), dev), default=0)
    return _constant_f1_macro(set(ranked[:best_k]), test)
