"""Backbones, losses and preprocessing reproduce the published implementation's numbers, REP those of its definition.

Runs over every `.npz` in GOLDEN_AS_DIR (default: tests/data/golden_as).
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip.modules.interfaces import NO_SLOTS
from engine.optimization import OptimizerSettings, make_schedule
from sensors import augmentations, spectra
from sensors.backbone import build, is_unused_entry
from sensors.focal import FocalSettings, focal_losses, focal_parts
from sensors.swt import SwtTower
from sensors.weights import sizes_for
from tests import golden_as
from tests.conftest import Patch, read_json
from tests.golden import assert_gradients, relative_error
from tests.golden_as import INPUTS, Golden
from vilt.datasets.specs import DATASETS
from vilt.utils import write_mod

FORWARD, GRADIENT = 1e-4, 1e-3
FEATURES = golden_as.files("swt", "deepsense")
PRETRAIN = golden_as.files("pretrain")
LOSSES = golden_as.files("loss")


def close(found: Tensor, expected: Tensor, context: object = "", tolerance: float = FORWARD) -> None:
    assert relative_error(found, expected) < tolerance, context


def gradients_agree(golden: Golden, modules: dict[str, nn.Module]) -> None:
    """Exactly the published parameters have gradients, and these match."""
    found = {
        prefix + name: parameter.grad
        for prefix, module in modules.items()
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }
    norms = golden.meta["grad_norm"]
    assert set(found) == set(norms)
    # Gradients of biases before a BatchNorm are nothing but rounding.
    assert_gradients(found, golden.meta, floor=1e-6 * max(norms.values()))


def test_golden_files_of_every_kind_exist() -> None:
    assert FEATURES and PRETRAIN and LOSSES and golden_as.files("rep") and golden_as.files("preprocessing")


@pytest.mark.parametrize("path", FEATURES, ids=lambda path: path.stem)
def test_backbones_reproduce_the_published_numbers(path: Path, monkeypatch: Patch) -> None:
    golden = golden_as.load(path)
    meta, names = golden.meta, golden.names
    backbone = golden_as.backbone_of(golden)
    classes = nn.Linear(backbone.fused_parts * backbone.embed_dim, meta["n_classes"])
    golden.fill(classes, "class_layer.0.")
    if meta["mode"] != "eval":
        monkeypatch.setattr("sensors.deepsense.DROPOUT", 0.0)
        backbone.train()
        for recurrence in backbone.modules():
            if isinstance(recurrence, nn.GRU):
                recurrence.dropout = 0.0
    signals, batch = golden.signals(), meta["batch"]
    taps: dict[str, Tensor] = {}
    for name in names:
        tower = backbone.towers[name]
        if isinstance(tower, SwtTower):
            tap_swt(tower, name, taps)
        else:
            extractor = tower.get_submodule("extractor")
            extractor.get_submodule("conv_layer_in").register_forward_hook(
                lambda *a, n=name: taps.update({f"conv_in_{n}": a[2][0]})
            )
            extractor.register_forward_hook(lambda *a, n=name: taps.update({f"conv_{n}": a[2][0]}))
    features = {name: backbone.towers[name](signals[name]) for name in names}
    fused = backbone.fuse(features, torch.ones(batch, len(names), dtype=torch.bool))
    logits = classes(fused)
    found = {**taps, "fused": fused, "logits": logits, **{f"feature_{n}": x for n, x in features.items()}}
    heads = golden_as.projectors_of(golden, backbone)
    found |= {f"projected_{name}": heads[name](x) for name, x in features.items()}
    if "present" in golden.arrays:
        present = golden["present"].bool()
        left = {name: x * present[:, [m]] for m, (name, x) in enumerate(features.items())}
        found["fused_missing"] = backbone.fuse(left, present)
        found["logits_missing"] = classes(found["fused_missing"])
    for name, expected in golden.arrays.items():
        if name not in ("label", "present"):
            tensor = found[name]
            for axis, size in enumerate(expected.shape if name in taps else ()):
                tensor = tensor.narrow(axis, 0, size)
            close(tensor, torch.from_numpy(expected), name)
    loss = F.cross_entropy(logits, golden["label"])
    assert loss.item() == pytest.approx(meta["loss"], rel=FORWARD)
    loss.backward()
    gradients_agree(golden, {"": backbone, "class_layer.0.": classes})
    state = backbone.state_dict()
    for name, (total, norm) in meta.get("running_after", {}).items():
        assert (float(state[name].sum()), float(state[name].norm())) == pytest.approx((total, norm), rel=FORWARD), name


def tap_swt(tower: SwtTower, name: str, taps: dict[str, Tensor]) -> None:
    def keep(module: nn.Module, tap: str) -> None:
        module.register_forward_hook(
            lambda _, __, output: taps.update(
                {f"{tap}_{name}": (output[0] if isinstance(output, tuple) else output)[0]}
            )
        )

    keep(tower.patch_embed, "patches")
    stages: Any = tower.stages
    for s, stage in enumerate(stages):
        for b, block in enumerate(stage.blocks):
            keep(block, f"stage{s}_block{b}")
        keep(stage.blocks[-1] if stage.downsample is None else stage.downsample, f"stage{s}")


@pytest.mark.parametrize("path", golden_as.files("swt"), ids=lambda path: path.stem)
def test_grids_shifts_and_masks_match_the_published_ones(path: Path) -> None:
    golden = golden_as.load(path)
    for name, tower in build(golden.sizes).towers.items():
        stages: Any = tower.get_submodule("stages")
        for s, stage in enumerate(stages):
            first, odd = stage.blocks[0].attn, stage.blocks[1].attn
            resolution = golden.meta["resolution"][f"{name}.{s}"]
            assert len(odd.order_L) == resolution[0] * resolution[1]
            assert first.shift == (0, 0) and list(odd.shift) == golden.meta["shift"][f"{name}.{s}"]
            masked = int((odd.mask_ntt == -100).sum())
            found = [list(odd.mask_ntt.shape), masked] if masked else None
            assert found == golden.meta["masked"][f"{name}.{s}"] and not first.mask_ntt.any()


@pytest.mark.parametrize("path", PRETRAIN, ids=lambda path: path.stem)
def test_a_pretraining_step_reproduces_the_published_numbers(path: Path) -> None:
    golden = golden_as.load(path)
    meta = golden.meta
    backbone = golden_as.backbone_of(golden)
    for parameter in (p for name, p in backbone.named_parameters() if name.startswith("patch_embed")):
        parameter.requires_grad_(False)
    heads = golden_as.projectors_of(golden, backbone)
    views = []
    for view in (1, 2):
        features = {name: backbone.towers[name](x, NO_SLOTS) for name, x in golden.signals(view).items()}
        projected = {name: heads[name](x) for name, x in features.items()}
        for name, x in projected.items():
            close(x, golden[f"projected{view}_{name}"], (view, name))
        views.append({name: x.unflatten(0, (meta["subsequences"], meta["seq_len"])) for name, x in projected.items()})
    settings = FocalSettings(meta["temperature"], tuple(meta["weights"]), meta["margin"])
    for name, part in focal_parts(views, settings).items():
        assert part.item() == pytest.approx(meta["parts"][name], rel=FORWARD), name
    loss = sum(focal_losses(views, settings).values(), torch.zeros(()))
    assert loss.item() == pytest.approx(meta["loss"], rel=FORWARD)
    loss.backward()
    gradients_agree(golden, {"": backbone, "mod_projectors.": heads})


@pytest.mark.parametrize("path", LOSSES, ids=lambda path: path.stem)
def test_losses_reproduce_the_published_numbers(path: Path) -> None:
    golden = golden_as.load(path)
    meta = golden.meta
    shape = (meta["subsequences"], meta["seq_len"], meta["width"])
    leaves = {
        (view, name): torch.from_numpy(INPUTS.features(meta["tag"], name, view, shape[0] * shape[1], shape[2]))
        for view in (1, 2)
        for name in golden.names
    }
    for leaf in leaves.values():
        leaf.requires_grad_()
    views = [{name: leaves[view, name].view(shape) for name in golden.names} for view in (1, 2)]
    settings = FocalSettings(meta["temperature"], tuple(meta["weights"]), meta["margin"], meta["no_private"])
    for name, part in focal_parts(views, settings).items():
        assert part.item() == pytest.approx(meta["parts"][name], rel=FORWARD), name
    loss = sum(focal_losses(views, settings).values(), torch.zeros(()))
    assert loss.item() == pytest.approx(meta["loss"], rel=FORWARD)
    loss.backward()
    for (view, name), leaf in leaves.items():
        assert leaf.grad is not None
        close(leaf.grad, golden[f"grad{view}_{name}"], (view, name), GRADIENT)


@pytest.mark.parametrize("path", golden_as.files("preprocessing"), ids=lambda path: path.stem)
def test_preprocessing_reproduces_the_published_numbers(path: Path) -> None:
    golden = golden_as.load(path)
    tag, arrays = golden.meta["tag"], golden.arrays

    def signal(name: str, *shape: int) -> Tensor:
        return torch.from_numpy(INPUTS.signal(tag, name, shape))

    for name, shape in {"even": (2, 2, 3, 8), "odd": (1, 3, 2, 5), "mod_seismic": (1, 1, 10, 20)}.items():
        close(spectra.spectrum(signal(f"fft_{name}", *shape)), golden[f"fft_{name}"], name)
    bins = arrays["fft_mod_audio_bins"]
    close(spectra.spectrum(signal("fft_mod_audio", 1, 1, 10, 1600))[..., bins], golden["fft_mod_audio"])
    x = signal("warp", 2, 2, 4, 10)
    curve = augmentations.smooth_curve(40, arrays["mag_knots"])
    assert curve == pytest.approx(arrays["mag_curve"], abs=1e-9)
    close(x * torch.from_numpy(curve).view(4, 10), golden["mag_warped"])
    positions = augmentations.time_positions(augmentations.smooth_curve(40, arrays["time_knots"]))
    assert 39 * positions == pytest.approx(arrays["time_positions"], abs=1e-9)
    close(augmentations.warped(x, positions), golden["time_warped"])
    angle = float(arrays["phase_angle"])
    close(spectra.spectrum(augmentations.with_phase(x, angle)), golden["phase_shifted"])
    close(augmentations.flipped(x), golden["flipped"])
    share, other = float(arrays["mix_lam"]), x[golden["mix_perm"]]
    close(share * x + (1 - share) * other, golden["mixed"])
    box = augmentations.cut_box(share, tuple(arrays["cut_centre"].tolist()), (4, 10))
    assert list(box) == arrays["cut_box"].tolist()
    close(augmentations.pasted(x, other, box), golden["cut"])
    recording = signal("resample", 1, 1, 1, 641).flatten().numpy().astype(np.float64)
    assert write_mod.half_rate_kernel() == pytest.approx(arrays["resample_kernel"].flatten(), abs=1e-12)
    assert write_mod.at_half_rate(recording, 0, 321) == pytest.approx(arrays["resampled"], abs=1e-9)


def test_the_learning_rate_is_one_epoch_ahead_of_the_published_one() -> None:
    expected = golden_as.load(golden_as.HERE / "preprocessing.npz").arrays["lr_finetune"]
    settings = OptimizerSettings("adamw", 1e-3, 1, 0, 0, 1e-6, "cosine")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 1e-3)
    [share_of_rate] = make_schedule(optimizer, settings, 200 * 3).lr_lambdas
    assert [1e-3 * share_of_rate(3 * epoch) for epoch in range(199)] == pytest.approx(expected[1:], rel=1e-6)


def test_step_decay_multiplies_the_rate_after_each_fifth_an_epoch_ahead_of_the_published_one() -> None:
    """Published: rates of every fiftieth of 1500 epochs."""
    expected = golden_as.load(golden_as.HERE / "preprocessing.npz").arrays["lr_step"]
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 1e-4)
    settings = OptimizerSettings("adamw", 1e-4, 1, 0, 0, 1e-7, "step")
    [share_of_rate] = make_schedule(optimizer, settings, 1500 * 3).lr_lambdas
    assert [1e-4 * share_of_rate(3 * epoch) for epoch in range(49, 1499, 50)][: len(expected) - 1] == pytest.approx(
        expected[1:], rel=1e-6
    )
    assert share_of_rate(0) == 1 and share_of_rate(900) == 0.2 and share_of_rate(899) == 1


SWT_SIZES = ("width", "blocks", "feature_width", "heads", "projection_width", "temperature")
DEEPSENSE_SIZES = ("width", "inner_layers", "recurrent_width", "projection_width", "temperature")


@pytest.mark.parametrize(
    ("task", "swt", "windows", "deepsense", "kernels", "rate"),
    [
        ("mod", (64, [2, 2, 4], 256, 4, 256, 0.07), {"audio": [3, 3, 1, 40], "seismic": [3, 3, 1, 1]},
         (128, 4, 256, 256, 0.5), {"audio": [80, 80, 5], "seismic": [3, 1, 3]}, 1e-3),
        ("rwhar", (32, [2, 2, 2], 128, 4, 256, 0.07), {"acc": [3, 3, 1, 2]},
         (128, 4, 256, 256, 0.07), {"acc": [3, 1, 3]}, 5e-4),
        ("pamap2", (32, [2, 2, 2], 128, 4, 128, 0.5), {"Acc": [3, 5, 1, 2]},
         (64, 2, 64, 128, 0.5), {"Acc": [5, 1, 5]}, 5e-4),
    ],
)  # fmt: skip
def test_default_sizes_are_the_published_ones(task, swt, windows, deepsense, kernels, rate):
    spec = DATASETS[task]
    sizes = sizes_for(spec, {}, {})
    assert tuple(getattr(sizes, name) for name in SWT_SIZES) == swt
    for name, expected in windows.items():
        assert [*sizes.of(name).window, *sizes.of(name).patch] == expected
    sizes = sizes_for(spec, {"type": "deepsense"}, {})
    assert tuple(getattr(sizes, name) for name in DEEPSENSE_SIZES) == deepsense
    for name, expected in kernels.items():
        assert [sizes.of(name).kernel, sizes.of(name).stride, sizes.of(name).inner_kernel] == expected
    assert {**spec.options, **spec.pretraining}["learning_rate"] == rate


@pytest.mark.parametrize(("network", "file"), [("swt", "swt_mod"), ("deepsense", "deepsense_mod")])
def test_names_and_shapes_match_published_checkpoints(network: str, file: str) -> None:
    golden = golden_as.load(golden_as.HERE / f"{file}.npz")
    backbone = build(golden.sizes)
    keys = read_json(golden_as.HERE / f"checkpoint_keys_{file}.json")
    ours = {name: list(x.shape) for name, x in backbone.state_dict().items()}
    heads = golden_as.projectors_of(golden, backbone)
    ours |= {f"mod_projectors.{name}": list(x.shape) for name, x in heads.state_dict().items()}
    ours |= {"class_layer.0.weight": [7, backbone.fused_parts * backbone.embed_dim], "class_layer.0.bias": [7]}
    assert ours == {name: shape for name, shape in keys.items() if not is_unused_entry(name)}
