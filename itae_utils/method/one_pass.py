"""One pass over a batch of images for any number of variants.

The method edits only the `[CLS]` row of the last block. So the tokens that enter that block and its keys are the same
for every variant, and after the attention only one token is needed. Each further variant costs one row of attention and
one token through the MLP. Variants that edit earlier blocks, too, share the pass up to the first of these and run the
following blocks on their own. So do test-time registers, and their tokens serve all variants on top of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor, nn

from itae_utils.method.anatomy import adapt, block_inputs
from itae_utils.method.artifacts import FiringRule, capture_truth, select_artifacts
from itae_utils.method.attention import attenuate, attenuated_logits, check_substitutes, constant, substituted
from itae_utils.method.direction import directions_of
from itae_utils.method.layers import QKV, BlockAdapter, BlockInput, scaled_logits
from itae_utils.method.register_setting import Variant, parted
from itae_utils.method.registers import apply_registers
from itae_utils.method.setting import ITAE
from itae_utils.method.statistics import patch_statistic

# The last bits of an output depend on how many rows are computed at once. So there are always this many: the baseline
# and up to seven variants, padded with the baseline.
GROUP = 8


class OnePass:
    """Computes the `[CLS]` outputs of all variants for one batch at a time. No call waits for the device.

    Args:
        model: a timm ViT.
        variants: by name, with numeric thresholds and neurons; None is the unmodified model.
        truth: the rule of a planted backbone, needed by select="oracle".
    """

    def __init__(self, model: nn.Module, variants: Mapping[str, Variant], truth: FiringRule | None = None) -> None:
        self.model, self.last = model, len(model.blocks) - 1
        self.registers, self.settings = ({name: parted(variant)[part] for name, variant in variants.items()}
                                         for part in (0, 1))
        edited = {name: itae for name, itae in self.settings.items() if itae is not None}
        self.deep = [name for name, itae in edited.items() if itae.blocks > 1]
        # Variants with equal edits are next to each other, so that they are edited at once.
        self.shallow = sorted((name for name in edited if name not in self.deep), key=lambda name: _edit(edited[name]))
        # The block from which each set of tokens differs; the unmodified model's come first.
        self.firsts = {None: self.last} | {each: each.first_block for each in self.registers.values() if each}
        self.kept = {*self.firsts.values(), *map(self._first_block, self.deep)}
        self.directions = {itae.rank: directions_of(model, self.last, itae) for itae in edited.values()
                           if itae.source == "direction"}
        self.truth = truth if any(itae.select == "oracle" for itae in edited.values()) else None

    def _first_block(self, name: str) -> int:
        return self.last + 1 - self.settings[name].blocks

    def __call__(self, images: Tensor, first_image: int) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the `[CLS]` outputs (B, dim) and the artifacts in the last block (B, N) of every variant.

        Args:
            images: (B, 3, H, W), preprocessed, on the model's device.
            first_image: number of the first image in its data set, used by the random control.
        """
        image_numbers = range(first_image, first_image + len(images))
        with capture_truth(self.truth, self.model) as captured:
            inputs = block_inputs(self.model, images, range(min(self.kept), self.last + 1), self.kept)
        return self.after(inputs, image_numbers, captured.mask)

    def after(self, inputs: Mapping[int, BlockInput], image_numbers: range, truth: Tensor | None = None
              ) -> dict[str, tuple[Tensor, Tensor]]:
        """Return what a call does, from what enters the blocks `kept` of the unmodified model, by block."""
        results = {}
        for registers, first in self.firsts.items():
            names = [name for name in self.shallow if self.registers[name] == registers]
            with apply_registers(self.model, registers) if registers else nullcontext():
                last_block = _LastBlock(self.model, self._run_from(first, inputs), image_numbers, truth,
                                        self.directions)
                baseline, *outputs = last_block.run([self.settings[name] for name in names])
            found = dict(zip(names, outputs, strict=True))
            found |= {name: baseline for name, itae in self.settings.items()
                      if itae is None and self.registers[name] == registers}
            if registers is None:
                found |= {name: self._run_deep(name, inputs, image_numbers, truth) for name in self.deep}
            results |= {name: (output.or_baseline(baseline), output.artifacts) for name, output in found.items()}
        return {name: results[name] for name in self.settings}

    def _run_from(self, first: int, inputs: Mapping[int, BlockInput]) -> BlockInput:
        """Run the blocks from `first` up to the last on kept tokens, and return the input of the last."""
        tokens = inputs[first].tokens
        for index in range(first, self.last):
            tokens = replace(inputs[index], tokens=tokens).run(self.model.blocks[index])
        return replace(inputs[self.last], tokens=tokens)

    def _run_deep(self, name: str, inputs: Mapping[int, BlockInput], image_numbers: range,
                  truth: Tensor | None) -> _Output:
        """Run a variant of several blocks from the first of them on."""
        itae = self.settings[name]
        with attenuate(self.model, itae, truth=truth, first_image=image_numbers.start):
            entering = self._run_from(self._first_block(name), inputs)
        last_block = _LastBlock(self.model, entering, image_numbers, truth, self.directions)
        _, output = last_block.run([itae])
        output.changed |= (entering.tokens != inputs[self.last].tokens).flatten(1).any(dim=1)
        return output


@dataclass
class _Output:
    """Result of one variant for one batch."""

    cls_output: Tensor  # (B, dim)
    artifacts: Tensor   # (B, N) bool, in the last block
    changed: Tensor     # (B,) bool: the variant changes this image

    def or_baseline(self, baseline: _Output) -> Tensor:
        """Return the outputs, with the baseline's own for unchanged images, so that these are equal to the bit."""
        return torch.where(self.changed[:, None], self.cls_output, baseline.cls_output)


def _edit(itae: ITAE) -> tuple[str, float]:
    return itae.attenuation, itae.alpha


def _as_multiplied(x: Tensor) -> Tensor:
    """Return x in the type that autocast gives to products, so that it is converted once, not for each product."""
    kind = x.device.type
    cast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return x.to(torch.get_autocast_dtype(kind)) if cast else x


class _Projections(dict):
    """Queries, keys and values of normed tokens x (B, T, C), each computed when it is first read."""

    def __init__(self, adapter: BlockAdapter, x: Tensor) -> None:
        self._adapter, self._x = adapter, x

    def __missing__(self, name: str) -> Tensor:
        self[name] = self._adapter.project(self._x, name)
        return self[name]


class _LastBlock:
    """The last block for one batch, computed for `[CLS]` alone; all variants share its keys and logits."""

    def __init__(self, model: nn.Module, inputs: BlockInput, image_numbers: range, truth: Tensor | None,
                 directions: Mapping[int, Tensor]) -> None:
        self.model, self.adapter = model, adapt(model).blocks[-1]
        self.image_numbers, self.truth, self.directions = image_numbers, truth, directions
        self.cls_token, self.x = inputs.tokens[:, 0], _as_multiplied(self.adapter.block.norm1(inputs.tokens))
        self.qkv = QKV(self.adapter, _Projections(self.adapter, self.x), inputs.rope, inputs.tokens)
        query = self.adapter.project(self.x[:, :1], "query")
        self.logits = scaled_logits(self.adapter.heads("query", query, inputs.rope), self.qkv.heads("key"))
        self.statistics: dict[tuple[str, int], Tensor] = {}

    def run(self, settings: Sequence[ITAE]) -> list[_Output]:
        """Return the output of the baseline, then of each setting."""
        size = GROUP - 1
        baseline, *outputs = self._run_group(settings[:size])
        for start in range(size, len(settings), size):
            outputs += self._run_group(settings[start:start + size])[1:]
        return [baseline, *outputs]

    def _run_group(self, settings: Sequence[ITAE]) -> list[_Output]:
        num_patches = self.logits.shape[-1] - self.model.num_prefix_tokens
        artifacts, rows = [self.logits.new_zeros((len(self.logits), num_patches), dtype=bool)], [self.logits]
        for _, alike in groupby(settings, key=_edit):
            alike = list(alike)
            selected = [self._select(itae) for itae in alike]
            rows.append(attenuated_logits(self.logits, torch.stack(selected, dim=1), alike[0]))
            artifacts += selected
        logits = torch.cat(rows + [self.logits] * (GROUP - len(artifacts)), dim=2)
        weights, further = self._substitute(logits.softmax(dim=-1), settings, artifacts[1:])
        heads = self.adapter.value_sums(weights, self.x, further).permute(2, 0, 1, 3).flatten(2)
        tokens = self.adapter.finish(self.cls_token, self.x[:, 0], heads)  # (GROUP, B, C)
        outputs = self.model.fc_norm(self.model.norm(tokens))  # one of the two is the final norm, the other an Identity
        changed = (weights != weights[:, :, :1]).any(dim=-1).any(dim=1)
        return [_Output(outputs[index], selected, changed[:, index]) for index, selected in enumerate(artifacts)]

    def _substitute(self, weights: Tensor, settings: Sequence[ITAE], artifacts: Sequence[Tensor]
                    ) -> tuple[Tensor, Tensor | None]:
        """Return the weights (B, H, GROUP, T) without those of substituted tokens, and the weighted substitutes."""
        vectors = {row: check_substitutes(itae)[-1] for row, itae in enumerate(settings, start=1)}
        vectors = {row: vector for row, vector in vectors.items() if vector is not None}
        if not vectors:
            return weights, None
        further = weights.new_zeros(*weights.shape[:3], self.x.shape[-1])
        for row, vector in vectors.items():
            place = slice(row, row + 1)
            weights[:, :, place], share = substituted(weights[:, :, place], artifacts[row - 1])
            further[:, :, place] = share * constant(vector, weights.dtype, weights.device)
        return weights, further

    def _select(self, itae: ITAE) -> Tensor:
        index, key = len(self.model.blocks) - 1, (itae.source, itae.rank)
        if key not in self.statistics:
            self.statistics[key] = patch_statistic(itae.source, self.qkv, self.model.num_prefix_tokens,
                                                   self.directions.get(itae.rank), self.logits)
        return select_artifacts(self.statistics[key], itae.thresholds[-1], itae, block=index,
                                image_numbers=self.image_numbers, truth=self.truth)
