"""MPLMM's prompts (Guo et al., ACL 2024, arXiv 2407.05374): docs/vla.md section 3.

Shape suffixes: B samples, b and n some of them, T steps, P prompt length, d width of the backbone, w width of a tower,
which is 2d.
"""

from collections.abc import Mapping
from itertools import permutations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip.modules.interfaces import ModelInput, Place, TowerSlots
from clip.modules.method import PROMPT_STD, Method, MethodOptions, select_by_missing_type
from vilt.missing_types import is_missing
from vla.backbone import LETTERS
from vla.memory_learner import TYPES

MODALITIES = tuple(LETTERS)


class Pointwise(nn.Module):
    """A 1×1 convolution with GELU."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width_in, width_out, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (…, i) to (…, o)."""
        return F.gelu(F.linear(x, self.conv.weight[..., 0], self.conv.bias))


def _generator_name(missing: str, present: tuple[str, ...]) -> str:
    """Published name of the layer that generates a modality from others; `v_alp` takes l before a despite its name."""
    letters = "".join(LETTERS[name] for name in present)
    return f"{LETTERS[missing]}_{'al' if letters == 'la' else letters}p"


class Mplmm(Method):
    """Generates missing modalities from present ones, marks both with prompts, and appends missing-type prompts.

    As published, the couplings `m_*` and `missing_type_prompt` start at 0, like the signal prompts that they are
    multiplied with, so their gradients are always 0.
    """

    attribute = "prompt_learner"
    generates_missing = True
    learns = False
    """Whether missing-type prompts and their couplings start at random values, from which they can learn."""

    def __init__(self, places: Mapping[str, Place], embed_dim: int, options: MethodOptions) -> None:
        super().__init__(places, embed_dim, options)
        P, d, w = options.prompt_length, embed_dim // 2, embed_dim
        steps = {name: place.input_shape[0] for name, place in places.items()}
        std = PROMPT_STD if self.learns else 0.0
        self.generative_prompt = nn.Parameter(torch.zeros(3, d, P))
        self.missing_type_prompt = nn.Parameter(std * torch.randn(3, P, d))
        for name, letter in LETTERS.items():
            for state in ("m", "nm"):
                self.register_parameter(f"prompt{letter}_{state}", nn.Parameter(torch.zeros(d, steps[name])))
            self.register_parameter(f"m_{letter}", nn.Parameter(std * torch.randn(steps[name], w)))
        for source, target in permutations(LETTERS, 2):
            self.add_module(f"{LETTERS[source]}2{LETTERS[target]}", Pointwise(places[source].input_shape[1], d))
        for missing in MODALITIES:
            others = tuple(name for name in MODALITIES if name != missing)
            for present in (others, others[:1], others[1:]):
                length = P + sum(steps[name] for name in present)
                self.add_module(_generator_name(missing, present), Pointwise(length, steps[missing]))

    def adapt(self, batch: ModelInput, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tokens (B, T, d): projected features, or generated ones where a modality is missing, with their prompt."""
        type_B = batch.missing_type_B
        rows_of_type = {code: (type_B == code).nonzero().flatten() for code in batch.types}
        # Index of each sample's input among the inputs of a modality.
        index_MB = (batch.present_BM.long().cumsum(dim=0) - 1).T
        inputs = dict(zip(MODALITIES, index_MB, strict=True))
        adapted = {}
        for index, (name, letter) in enumerate(LETTERS.items()):
            rows, parts = [], []
            if name in tokens:
                rows.append(batch.rows[name])
                parts.append(tokens[name] + self.get_parameter(f"prompt{letter}_nm").T)
            for code, rows_n in rows_of_type.items():
                if is_missing(MODALITIES, name, code):
                    present = tuple(other for other in MODALITIES if not is_missing(MODALITIES, other, code))
                    given = [self.generative_prompt[index].T.expand(len(rows_n), -1, -1)]
                    for other in present:
                        x_nTD = batch.inputs[other][inputs[other][rows_n]]
                        given.append(self.get_submodule(f"{LETTERS[other]}2{letter}")(x_nTD))
                    given_ndT = torch.cat(given, dim=1).transpose(1, 2)
                    made_ndT = self.get_submodule(_generator_name(name, present))(given_ndT)
                    rows.append(rows_n)
                    parts.append((made_ndT + self.get_parameter(f"prompt{letter}_m")).transpose(1, 2))
            adapted[name] = torch.cat(parts)[torch.cat(rows).argsort()]
        return adapted

    def forward(self, batch: ModelInput, tokens: Mapping[str, Tensor]) -> dict[str, TowerSlots]:
        """The prompts of each sample's missing type, appended to the steps of every tower."""
        coupled = {
            (name, lacking): self.get_parameter(f"prompt{letter}_{'m' if lacking else 'nm'}")
            @ self.get_parameter(f"m_{letter}")
            for name, letter in LETTERS.items()
            for lacking in (False, True)
        }
        sum_Tdw = [
            sum(coupled[name, bool(is_missing(MODALITIES, name, code))] for name in MODALITIES) for code in range(TYPES)
        ]
        return {
            name: TowerSlots(appended_BmD=select_by_missing_type([prompt_Pd @ one for one in sum_Tdw], batch))
            for name, prompt_Pd in zip(MODALITIES, self.missing_type_prompt, strict=True)
        }


class MplmmDescribed(Mplmm):
    """MPLMM with missing-type prompts that learn, because they and their couplings start from N(0, 0.02²)."""

    learns = True
