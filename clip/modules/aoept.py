"""AOEPT: prompts that attend to clusters of the training set, gated by the other modality (arXiv 2605.24816;
docs/method.md section 8).

Shape suffixes: B samples, L sequence, D width of a tower, S slots of one kind, N prototypes, K blocks with prompts.
"""

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip.modules.interfaces import NO_SLOTS, Backbone, ModelInput, Place, TowerSlots
from clip.modules.method import METHOD, Method, MethodOptions, check_depth, prompts
from clip.modules.vision_transformer_memory import FINAL, TEXT_PROJECTION, ClipBackbone, Transformer, causal_mask
from common.kmeans import kmeans

HEADS = 8
START_OF_SCALE = 4.6052
PUBLISHED_END = 2
"""Token id by which the published code looks for the end of a text; it never marks the end."""
IGNORED = -100
TOWERS = {"text": "text", "image": "vision"}
"""Published names of the towers, keyed by modality; text comes first."""


class AOEPT(Method):
    """Own and shared prompts for each of K blocks; the towers run in step, each gating the other's prompts.

    Missing inputs are encoded as a black image or an empty text; a gate is 1 where the other modality is missing.
    Before training, `see` fills the prototypes, which then stay frozen. Parameter names are the published ones.
    """

    grey = 0.0
    per_sample = True
    sees_training_split = True
    reduction = 16

    def __init__(self, places: Mapping[str, Place], embed_dim: int, options: MethodOptions) -> None:
        super().__init__(places, embed_dim, options)
        if [*places] != ["image", "text"]:
            raise ValueError(f"prompt_type=aoept expects image and text, found {', '.join(places)}")
        K, S = options.memory_depth, options.slots
        check_depth(places, K)
        hidden = embed_dim // self.reduction
        self.shared_query = prompts(K, S, hidden)
        self.logit_scale = nn.Parameter(torch.tensor(START_OF_SCALE))
        for tower, name in TOWERS.items():
            d, other = places[tower].width, places["image" if tower == "text" else "text"].width
            self.register_buffer(f"{name}_init_tokens", torch.zeros(K, options.aoept_prototypes, d))
            self.register_parameter(f"{name}_query", prompts(K, S, d))
            for kind in ("", "shared_"):
                gates = [_two_layers(other, other // self.reduction, d, nn.ReLU()) for _ in range(K)]
                self.add_module(f"{kind}{name}_gate_mlp", nn.ModuleList(gates))
                self.add_module(f"{kind}{name}_layernorm", nn.LayerNorm(d))
            projections = [_two_layers(hidden, hidden, d, nn.GELU()) for _ in range(K)]
            self.add_module(f"shared_{name}_proj", nn.ModuleList(projections))
        self._auxiliary: list[tuple[Tensor, Tensor]] = []

    def forward(self, batch: ModelInput, tokens: Mapping[str, Tensor]) -> dict[str, TowerSlots]:
        """No slots: the prompts are computed from block to block in `encode`."""
        return dict.fromkeys(self.places, NO_SLOTS)

    def trains(self, task: str) -> tuple[str, ...]:
        """The method and the towers' ends, including the text projection."""
        return (METHOD, FINAL, TEXT_PROJECTION)

    # Prompts

    def own_prompts(self, tower: str, block: int) -> Tensor:
        """Own prompts (S, D) of a tower and block, before gating."""
        name = TOWERS[tower]
        return self._reading(f"{name}_layernorm", self.get_parameter(f"{name}_query")[block], tower, block)

    def shared_prompts(self, tower: str, block: int) -> Tensor:
        """Shared prompts (S, D) for a tower and block, before gating."""
        name = TOWERS[tower]
        projected_SD = self.get_submodule(f"shared_{name}_proj.{block}")(self.shared_query[block])
        return self._reading(f"shared_{name}_layernorm", projected_SD, tower, block)

    def _reading(self, norm: str, query_SD: Tensor, tower: str, block: int) -> Tensor:
        """The queries plus their attention output over the prototypes, normalised; attention has no projections."""
        source_ND = self.get_buffer(f"{TOWERS[tower]}_init_tokens")[block]
        q, kv = (x.unflatten(-1, (HEADS, -1)).transpose(0, 1) for x in (query_SD, source_ND))
        read_SD = F.scaled_dot_product_attention(q, kv, kv).transpose(0, 1).flatten(1)
        result: Tensor = self.get_submodule(norm)(query_SD + read_SD)
        return result

    def gate(self, kind: str, tower: str, block: int, mean_BD: Tensor) -> Tensor:
        """The gate (B, D), from 0 to 1, given the other tower's mean token; `kind` is "" (own prompts) or `shared_`."""
        found: Tensor = self.get_submodule(f"{kind}{TOWERS[tower]}_gate_mlp.{block}")(mean_BD)
        return found.sigmoid()

    # The towers

    def encode(
        self,
        backbone: Backbone,
        batch: ModelInput,
        tokens: Mapping[str, Tensor],
        slots: Mapping[str, TowerSlots],
    ) -> dict[str, Tensor]:
        """Features (B, E) of both towers, run block by block; also collects the terms of the auxiliary loss."""
        assert isinstance(backbone, ClipBackbone)
        with torch.autocast(batch.present_BM.device.type, enabled=False):
            return self._encode(backbone, batch, tokens)

    def _encode(self, backbone: ClipBackbone, batch: ModelInput, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
        K, S = self.options.memory_depth, self.options.slots
        has = {tower: batch.present_BM[:, column] for column, tower in enumerate(self.places)}
        ids_BL = batch.to_all_samples("text", batch.inputs["text"])
        end_B = ids_BL.argmax(dim=1)
        text_tower, image_tower = backbone.text_encoder, backbone.image_encoder
        x = {
            "text": self._text_tokens(backbone, ids_BL, end_B),
            "image": batch.to_all_samples("image", tokens["image"]),
        }
        transformers = {"text": text_tower.transformer, "image": image_tower.transformer}
        lengths = {tower: x_BLD.shape[1] for tower, x_BLD in x.items()}
        means = {tower: x_BLD.mean(dim=1) for tower, x_BLD in x.items()}
        masks = {"text": _text_mask(end_B, lengths["text"], 2 * S), "image": None}
        self._auxiliary = []
        for k in range(max(len(transformer.resblocks) for transformer in transformers.values())):
            for tower, transformer in transformers.items():
                if k >= len(transformer.resblocks):
                    continue
                if k < K:
                    other = "image" if tower == "text" else "text"
                    gates = [
                        torch.where(has[other][:, None], self.gate(kind, tower, k, means[other]), 1.0)[:, None]
                        for kind in ("shared_", "")
                    ]
                    shared_BSD = gates[0] * self.shared_prompts(tower, k)
                    own_BSD = gates[1] * self.own_prompts(tower, k)
                    x[tower] = torch.cat([shared_BSD, own_BSD, x[tower][:, -lengths[tower] :]], dim=1)
                x[tower] = transformer.run(k, x[tower], mask=masks[tower])
                if k < K:
                    means[tower] = x[tower][:, -lengths[tower] :].mean(dim=1)
                    self._auxiliary.append(self._auxiliary_term(own_BSD.mean(dim=1), means[tower], has[tower]))
        read_B = self._read_position(ids_BL, end_B)
        row_B = torch.arange(len(ids_BL), device=ids_BL.device)
        return {
            "image": image_tower.ln_post(x["image"][:, 2 * S]) @ image_tower.proj,
            "text": text_tower.ln_final(x["text"][row_B, 2 * S + read_B]) @ text_tower.text_projection,
        }

    def _text_tokens(self, backbone: ClipBackbone, ids_BL: Tensor, end_B: Tensor) -> Tensor:
        """Text tokens (B, L, D), padded with `<end>`. Their positions are the last L of the embeddings stretched by the
        number of prompts."""
        tower = backbone.text_encoder
        L = ids_BL.shape[1]
        padding_BL = torch.arange(L, device=ids_BL.device) > end_B[:, None]
        ids_BL = torch.where(padding_BL, ids_BL.amax(dim=1, keepdim=True), ids_BL)
        size = (L + 2 * self.options.slots, tower.positional_embedding.shape[1])
        stretched = F.interpolate(tower.positional_embedding[None, None], size, mode="bilinear", align_corners=False)
        embedded: Tensor = tower.token_embedding(ids_BL)
        return embedded + stretched[0, 0, -L:]

    def _read_position(self, ids_BL: Tensor, end_B: Tensor) -> Tensor:
        """Position (B,) in the text to read out: `<end>`, or the published code's, in effect the last of the 77."""
        if self.options.aoept_read == "end":
            return end_B
        found_BL = ids_BL == PUBLISHED_END
        last_B = torch.full_like(end_B, ids_BL.shape[1] - 1)
        return torch.where(found_BL.any(dim=1), found_BL.int().argmax(dim=1), last_B)

    # The auxiliary loss

    def _auxiliary_term(self, prompt_BD: Tensor, mean_BD: Tensor, has_B: Tensor) -> tuple[Tensor, Tensor]:
        """Contrast that pulls each sample's mean own prompt nearer to its own mean token than to those of others.

        Returns:
            The cross-entropy over the samples that have the modality, and whether there are at least two of them.
        """
        B, count = len(has_B), has_B.sum()
        cosine_BB = F.normalize(prompt_BD, dim=-1) @ F.normalize(mean_BD.detach(), dim=-1).T
        logits_BB = (cosine_BB * self.logit_scale.exp()).masked_fill(~has_B, torch.finfo(cosine_BB.dtype).min)
        itself_B = torch.where(has_B, torch.arange(B, device=has_B.device), IGNORED)
        summed = F.cross_entropy(logits_BB, itself_B, ignore_index=IGNORED, reduction="sum")
        return summed / count.clamp_min(1), count > 1

    def losses(
        self, slots: Mapping[str, TowerSlots], features: Mapping[str, Tensor], logits_BC: Tensor, labels: Tensor
    ) -> dict[str, Tensor]:
        """The mean of the auxiliary terms over towers and blocks; 0 if no modality is present in two samples."""
        terms, counted = (torch.stack(each) for each in zip(*self._auxiliary, strict=True))
        return {"auxiliary": self.options.aoept_weight * (terms * counted).sum() / counted.sum().clamp_min(1)}

    # Before the training

    @torch.no_grad()
    def see(self, backbone: Backbone, batches: Iterable[ModelInput]) -> None:
        """Sets the prototypes: cluster centres of the mean tokens before each of K blocks of a tower without prompts.

        Only samples with the modality count, and only the tokens of a text up to `<end>`.
        """
        assert isinstance(backbone, ClipBackbone)
        transformers: dict[str, Transformer] = {
            "text": backbone.text_encoder.transformer,
            "image": backbone.image_encoder.transformer,
        }
        seen: dict[str, list[Tensor]] = {tower: [] for tower in transformers}
        for batch in batches:
            for name, x_bLD in backbone.embed(batch).items():
                transformer = transformers[name]
                keep_bL1 = torch.ones(*x_bLD.shape[:2], 1, device=x_bLD.device)
                if name == "text":
                    end_b1 = batch.inputs["text"].argmax(dim=1, keepdim=True)
                    keep_bL1 = (torch.arange(x_bLD.shape[1], device=x_bLD.device) <= end_b1)[..., None].float()
                means = []
                for k in range(self.options.memory_depth):
                    means.append((x_bLD * keep_bL1).sum(dim=1) / keep_bL1.sum(dim=1))
                    x_bLD = transformer.run(k, x_bLD)
                seen[name].append(torch.stack(means, dim=1).float().cpu())
        for name, means_bKD in seen.items():
            centres = self.get_buffer(f"{TOWERS[name]}_init_tokens")
            for k, means_ND in enumerate(torch.cat(means_bKD).unbind(dim=1) if means_bKD else []):
                centres[k] = kmeans(means_ND.to(centres.device), centres.shape[1])


def _two_layers(width_in: int, hidden: int, width_out: int, activation: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width_in, hidden), activation, nn.Linear(hidden, width_out))


def _text_mask(end_B: Tensor, length: int, slots: int) -> Tensor:
    """Mask (B, 1, L, L), causal over prompts and text; no position sees what follows `<end>`."""
    positions = torch.arange(slots + length, device=end_B.device)
    seen_BL = positions <= slots + end_B[:, None]
    return (causal_mask(slots + length, end_B.device) & seen_BL[:, None])[:, None]
