"""One pass over a batch of images for any number of variants.

The method touches only the `[CLS]` row of the last block, so what enters that block, and its keys, are the same for
every variant; and after the attention only one token is needed. Each further variant costs one row of attention and one
token through the MLP. Variants that reach into earlier blocks share the pass up to there and run the rest each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor, nn

from itae_utils.method.anatomy import anatomy, block_inputs
from itae_utils.method.artifacts import FiringRule, patch_norms
from itae_utils.method.attention import attenuate, attenuated_logits, scaled_logits, select_artifacts
from itae_utils.method.layers import BlockInput
from itae_utils.method.setting import ITAE

GROUP = 8  # bits depend on how many rows run at once: always the baseline and seven variants, padded with the baseline


class OnePass:
    """What is done to one batch: the shared pass, the variants of the last block in groups, then the deeper ones.

    Args:
        model: a timm ViT.
        settings: variants by name, with numeric thresholds; None is the model as it is.
        truth: ground-truth rule, for select="oracle".
    """

    def __init__(self, model: nn.Module, settings: Mapping[str, ITAE | None], truth: FiringRule | None = None) -> None:
        self.model, self.truth, self.settings = model, truth, settings
        self.last = len(model.blocks) - 1
        self.deep = [name for name, itae in settings.items() if itae is not None and itae.blocks > 1]
        shallow = [name for name, itae in settings.items() if itae is not None and itae.blocks == 1]
        self.shallow = sorted(shallow, key=lambda name: _edit(settings[name]))  # those edited alike are edited at once
        self.doors = range(min([self.last, *map(self._first_block, self.deep)]), self.last + 1)
        self.needs_truth = any(itae is not None and itae.select == "oracle" for itae in settings.values())

    def _first_block(self, name: str) -> int:
        return self.last + 1 - self.settings[name].blocks

    def __call__(self, images: Tensor, first_image: int) -> dict[str, tuple[Tensor, Tensor]]:
        """(B, dim) `[CLS]` outputs and (B, N) artifacts in the last block, by variant in the order of the settings.

        Args:
            images: (B, 3, H, W), preprocessed, on the model's device.
            first_image: number of the first of them in its data set, which the random control's draw depends on.
        """
        entering, truth = self._shared(images)
        tail = _LastBlock(self.model, entering[self.last], first_image, truth)
        baseline, *rows = tail.run([self.settings[name] for name in self.shallow])
        results = dict(zip(self.shallow, rows, strict=True))
        results |= {name: baseline for name, itae in self.settings.items() if itae is None}
        for name in self.deep:
            results[name] = self._deep(name, entering, first_image, truth)
        return {name: (results[name].or_else(baseline), results[name].artifacts) for name in self.settings}

    def _shared(self, images: Tensor) -> tuple[dict[int, BlockInput], Tensor | None]:
        if not self.needs_truth:
            return block_inputs(self.model, images, self.doors), None
        with self.truth.watch(self.model) as watch:
            return block_inputs(self.model, images, self.doors), watch.mask

    def _deep(self, name: str, entering: dict[int, BlockInput], first_image: int, truth: Tensor | None) -> _Row:
        """A variant of several blocks: its own way from the first of them on."""
        itae, first = self.settings[name], self._first_block(name)
        with attenuate(self.model, itae, truth=truth, first_image=first_image):
            tokens = entering[first].tokens
            for index in range(first, self.last):
                tokens = replace(entering[index], tokens=tokens).through(self.model.blocks[index])
        at_last = replace(entering[self.last], tokens=tokens)
        row = _LastBlock(self.model, at_last, first_image, truth).run([itae])[1]
        row.changed |= (tokens != entering[self.last].tokens).flatten(1).any(dim=1)
        return row


@dataclass
class _Row:
    """One variant of one batch: `[CLS]` outputs (B, dim), artifacts (B, N), and which images it changed (B,)."""

    cls_output: Tensor
    artifacts: Tensor
    changed: Tensor

    def or_else(self, baseline: _Row) -> Tensor:
        """Images that were not changed take the baseline's output itself, so that doing no harm holds to the bit."""
        return torch.where(self.changed[:, None], self.cls_output, baseline.cls_output)


def _edit(itae: ITAE) -> tuple[str, float]:
    return itae.attenuation, itae.alpha


class _LastBlock:
    """The last block, computed for `[CLS]` alone; keys and logits are shared by all variants."""

    def __init__(self, model: nn.Module, entering: BlockInput, first_image: int, truth: Tensor | None) -> None:
        self.model, self.layer = model, anatomy(model).layers[-1]
        self.first_image, self.truth = first_image, truth
        self.cls_token, self.normed = entering.tokens[:, 0], self.layer.block.norm1(entering.tokens)
        self.rope = entering.rope
        query = self.layer.project(self.normed[:, :1], self.rope, ["query"])
        self.keys = self.layer.project(self.normed, self.rope, ["key"])
        self.logits = scaled_logits(query.heads("query"), self.keys.heads("key"))
        self.norms: dict[str, Tensor] = {}

    def run(self, settings: Sequence[ITAE]) -> list[_Row]:
        """The baseline, and each of `settings` after it."""
        rows, size = [], GROUP - 1
        for start in range(0, max(1, len(settings)), size):
            rows += self._group(settings[start:start + size])[bool(start):]  # one baseline is enough
        return rows

    def _group(self, settings: Sequence[ITAE]) -> list[_Row]:
        num_patches = self.logits.shape[-1] - self.model.num_prefix_tokens
        artifacts, rows = [self.logits.new_zeros((len(self.logits), num_patches), dtype=bool)], [self.logits]
        for _, alike in groupby(settings, key=_edit):
            alike = list(alike)
            found = [self._artifacts(itae) for itae in alike]
            rows.append(attenuated_logits(self.logits, torch.stack(found, dim=1), alike[0]))
            artifacts += found
        padded = torch.cat(rows + [self.logits] * (GROUP - len(artifacts)), dim=2)
        outputs = self._after_attention(self.layer.value_sums(padded.softmax(dim=-1), self.normed))
        changed = (padded != self.logits).any(dim=-1).any(dim=1)
        return [_Row(outputs[place], found, changed[:, place]) for place, found in enumerate(artifacts)]

    def _artifacts(self, itae: ITAE) -> Tensor:
        if itae.source not in self.norms:
            projected = (self.keys if itae.source == "key"
                         else self.layer.project(self.normed, self.rope, [itae.source]))
            self.norms[itae.source] = patch_norms(projected[itae.source], self.model.num_prefix_tokens)
        threshold = None if itae.select == "oracle" else itae.thresholds[-1]
        return select_artifacts(self.norms[itae.source], threshold, itae, block=len(self.model.blocks) - 1,
                                first_image=self.first_image, truth=self.truth)

    def _after_attention(self, heads: Tensor) -> Tensor:
        """(B, H, G, d) -> (G, B, dim): everything after the value sum, for one token a variant and image."""
        tokens = self.layer.finish(self.cls_token, self.normed[:, 0], heads.permute(2, 0, 1, 3).flatten(2))
        return self.model.fc_norm(self.model.norm(tokens))  # the final norm is one of them, the other an Identity
