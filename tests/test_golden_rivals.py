"""Rivals compared with numbers from their published code, for made-up weights and inputs, without dropout.

The files are in `tests/data/golden/rivals`, or in the folder named by GOLDEN_RIVALS_DIR; weights come from `weights.py`
in the default golden folder. For each file we compare outputs, losses, the exact set of trained parameters, and the
gradient of each of them.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from clip.modules.aoept import AOEPT
from clip.modules.classifier import MissingModalityClassifier
from clip.modules.dpl import DecoupledPrototypes
from clip.modules.method import MethodOptions
from clip.modules.mora import MoRA
from engine.checkpoint import ModelSpec, build_classifier
from engine.tasks import TASKS
from tests import golden
from tests.conftest import Patch
from tests.models import model_input, published_name, published_state

DEFAULT = Path(__file__).parent / "data" / "golden" / "rivals"
FOLDER = Path(os.environ.get("GOLDEN_RIVALS_DIR") or DEFAULT)
SCRIPTS = Path(__file__).parent / "data" / "golden"
WEIGHTS = golden.load_module(SCRIPTS / "weights.py")
FILES = sorted(FOLDER.glob("*.npz"))
FORWARD_TOLERANCE = 1e-4

Change = Callable[[str, tuple[int, ...]], np.ndarray]


class Case:
    """One golden file, and the part of its model that all rivals share."""

    def __init__(self, path: Path) -> None:
        arrays, meta = golden.read(path)
        self.arrays, self.meta = (
            {name: torch.from_numpy(array) for name, array in arrays.items()},
            SimpleNamespace(**meta),
        )
        self.task, self.types = TASKS[self.meta.task], list(self.meta.missing_type)
        inputs = WEIGHTS.inputs(self.meta.tag, self.types, self.meta.resolution, self.task.name, self.task.n_classes)
        self.tokens, self.images, self.labels = map(torch.from_numpy, inputs)
        assert torch.equal(self.tokens, self.arrays["tokens"]) and torch.equal(self.labels, self.arrays["label"])

    def parameter(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A parameter of the file's model, by its published name."""
        return torch.from_numpy(np.asarray(WEIGHTS.parameter(self.meta.tag, name, shape)))

    def build(self, options: MethodOptions, head: str) -> MissingModalityClassifier:
        """A classifier with the file's frozen towers and, for DCP, the file's learner; the rest is random."""
        meta = self.meta
        arch = golden.architecture(meta.vision_layers, meta.text_layers, meta.resolution)
        classifier = build_classifier(ModelSpec(self.task.name, options, arch, head)).eval()
        given = ("model.",) if options.prompt_type == "dcp" else ("model.image_", "model.text_", "model.logit_")
        with torch.no_grad():
            for name, value in published_state(classifier).items():
                if name.startswith(given):
                    value.copy_(self.parameter(name, tuple(value.shape)))
        return classifier

    def check(self, name: str, found: Tensor) -> None:
        assert golden.relative_error(found, self.arrays[name]) < FORWARD_TOLERANCE, name

    def check_gradients(self, classifier: MissingModalityClassifier, published: Callable[[str], str]) -> None:
        """The trained parameters and their gradients are those of the file."""
        trained = {published(name): p for name, p in classifier.named_parameters() if p.requires_grad}
        assert trained.keys() == {*self.meta.grad_norm, *self.meta.trainable_without_grad}
        for name in self.meta.trainable_without_grad:
            assert trained[name].grad is None, name
        golden.assert_gradients({name: p.grad for name, p in trained.items()}, vars(self.meta), floor=1e-7)


def check_dpl(case: Case) -> None:
    meta = case.meta
    options = MethodOptions(meta.base, meta.memory_length or 36, meta.memory_depth or 6)
    classifier = case.build(options, "dpl")
    head = classifier.head
    assert isinstance(head, DecoupledPrototypes)
    head.scales, head.margins, head.contrast_weight = tuple(meta.scale), tuple(meta.margin), meta.contrast_weight
    head.temperature, head.base_temperature = meta.contrast_temperature, meta.contrast_base_temperature
    head.one_view = meta.contrast_mode == "one"
    head.trained_on(meta.pattern)
    with torch.no_grad():
        for name, shape in meta.prototypes.items():
            head.get_parameter(name.rpartition(".")[2]).copy_(case.parameter(name, tuple(shape)))

    batch = model_input(case.images, case.tokens, case.types)
    features, _ = classifier.features(batch)
    case.check("features", classifier.model.fuse(features, batch.present_BM))
    case.check("cosine", classifier(batch))
    logits, losses = classifier.training_outputs(batch, case.labels)
    case.check("margin_logits", logits)
    loss, contrast = case.task.loss(logits, case.labels), losses.get("contrast", torch.zeros(()))
    assert loss.item() == pytest.approx(meta.classification_loss, rel=FORWARD_TOLERANCE)
    assert contrast.item() == pytest.approx(meta.contrast_loss, rel=FORWARD_TOLERANCE)
    (loss + contrast).backward()
    case.check_gradients(classifier, lambda name: published_name(name).replace("_classifier.", "_pl_head."))

    probes = case.arrays["probe_cosine"][:, None]
    right = torch.ones_like(probes)
    for missing_type, expected in enumerate(case.arrays["probe_margin"]):
        found = head.with_margin(probes, torch.full((len(probes),), missing_type), right)[:, 0]
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)


def check_mora(case: Case) -> None:
    meta = case.meta
    options = MethodOptions(
        "mora",
        lora_matrices="".join(meta.matrices),
        lora_rank=(meta.shared_rank, meta.vision_rank, meta.text_rank),
        lora_alpha=meta.alpha,
    )
    classifier = case.build(options, "linear")
    method = classifier.method
    assert isinstance(method, MoRA) and list(method.blocks) == meta.adapted_blocks
    method.get_buffer("text_marks").copy_(torch.tensor([49406, 49407]))
    first = next(matrix for matrix in "kvq" if matrix in meta.matrices)
    kinds = {"P": "modality_A", "Q": "modality_B", "shared_gain": "shared_magnitude", "own_gain": "specific_magnitude"}

    def published(name: str) -> str:
        if name.startswith(case.task.head_name):
            return name.replace(case.task.head_name, "cls_head")
        *_, group, place, kind = name.split(".")
        if group == "shared":
            factor = "shared_A" if kind == "text" else "shared_B"
            return f"model.text_model.encoder.layers.{place}.self_attn.{first}_proj.shared_params.{factor}"
        tower = {"image": "vision", "text": "text"}[group]
        block, matrix = place.split("_")
        return f"model.{tower}_model.encoder.layers.{block}.self_attn.{matrix}_proj.{kinds[kind]}"

    trained = {published(name): p for name, p in classifier.named_parameters() if p.requires_grad}
    assert {name: list(p.shape) for name, p in trained.items()} == meta.shapes
    assert sum(p.numel() for p in trained.values()) == meta.trained_values
    method.start_on(classifier.model)
    with torch.no_grad():
        for name, parameter in trained.items():
            if name.endswith("magnitude"):
                uniform = WEIGHTS.uniform(meta.tag, name, tuple(parameter.shape))
                parameter.mul_(1 + 0.2 * torch.from_numpy(uniform))
            else:
                parameter.copy_(case.parameter(name, tuple(parameter.shape)))

    batch = model_input(case.images, case.tokens, case.types)
    features, _ = classifier.features(batch)
    case.check("features", classifier.model.fuse(features, batch.present_BM))
    logits = classifier(batch)
    case.check("logits", logits)
    matrix, block = meta.matrices[0], meta.start_block
    for tower, array in (("image", "adapted_vision"), ("text", "adapted_text")):
        name = f"model.{tower}_encoder.transformer.resblocks.{block}.attn.in_proj_weight"
        frozen = classifier.get_parameter(name).chunk(3)["qkv".index(matrix)]
        case.check(array, method.adapted(tower, block, matrix, frozen)[:4])
    loss = case.task.loss(logits, case.labels)
    assert loss.item() == pytest.approx(meta.loss, rel=FORWARD_TOLERANCE)
    loss.backward()
    case.check_gradients(classifier, published)


def check_aoept(case: Case) -> None:
    meta = case.meta
    options = MethodOptions(
        "aoept",
        3 * meta.prompt_length,
        meta.prompt_depth,
        aoept_prototypes=meta.prototypes,
        aoept_weight=meta.aux_weight,
        aoept_read={"last": "published", "end": "end"}[meta.read_position],
    )
    with Patch.context() as patch:
        patch.setattr(AOEPT, "reduction", meta.reduction)
        classifier = case.build(options, "linear")
    method = classifier.method
    assert isinstance(method, AOEPT)
    method.get_buffer("text_marks").copy_(torch.tensor([49406, 49407]))

    def published(name: str) -> str:
        name = name.replace(case.task.head_name, "classifier").removeprefix("model.prompt_learner.")
        return re.sub(r"(gate_mlp\.\d+)", r"\1.gate_net", name)

    own = [*classifier.named_parameters(), *classifier.named_buffers()]
    values = {published(name): value for name, value in own if published(name) in meta.shapes}
    assert {name: list(value.shape) for name, value in values.items()} == meta.shapes
    assert sum(p.numel() for p in classifier.parameters() if p.requires_grad) == meta.trained_values
    with torch.no_grad():
        for name, value in values.items():
            factor = {"query": 0.3, "tokens": 1.0}.get(name.rpartition("_")[2])
            made = WEIGHTS.uniform if factor else WEIGHTS.parameter
            value.copy_((factor or 1) * torch.from_numpy(np.asarray(made(meta.tag, name, tuple(value.shape)))))

    batch = model_input(case.images, case.tokens, case.types)
    case.check("prompts_text_0", method.own_prompts("text", 0))
    case.check("prompts_vision_0", method.own_prompts("image", 0))
    case.check("shared_text_0", method.shared_prompts("text", 0))
    case.check("shared_vision_last", method.shared_prompts("image", meta.prompt_depth - 1))
    gates: dict[tuple[str, str, int], Tensor] = {}
    gate = method.gate
    method.gate = lambda *of, **more: gates.setdefault(of[:3], gate(*of, **more))  # type: ignore[method-assign]
    features, _ = classifier.features(batch)
    case.check("gate_text_0", gates["", "text", 0])
    case.check("gate_vision_last", gates["", "image", meta.prompt_depth - 1])
    case.check("features", classifier.model.fuse(features, batch.present_BM))
    gates.clear()
    logits, losses = classifier.training_outputs(batch, case.labels)
    case.check("logits", logits)
    loss = case.task.loss(logits, case.labels)
    assert loss.item() == pytest.approx(meta.classification_loss, rel=FORWARD_TOLERANCE)
    assert losses["auxiliary"].item() == pytest.approx(meta.aux_weight * meta.aux_loss, rel=FORWARD_TOLERANCE)
    (loss + losses["auxiliary"]).backward()
    case.check_gradients(classifier, published)


CHECKS: dict[str, Callable[[Case], None]] = {"dpl": check_dpl, "mora": check_mora, "aoept": check_aoept}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_rival_reproduces_the_published_numbers(path: Path) -> None:
    CHECKS[path.name.partition("_")[0]](Case(path))


def test_golden_files_of_every_rival_exist() -> None:
    assert {path.name.partition("_")[0] for path in FILES} >= CHECKS.keys(), f"files of rivals in {FOLDER}"
