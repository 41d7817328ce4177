"""Interventions on a model by plain forward hooks, and the attention contributions of tokens, by transformers alone.

An oracle of what is changed where: nothing of the package. The model has eager attention, so that its weights are seen.

Data flow: a question and pictures -> ``PlainQuestion``: inputs and token classes -> forward passes with hooks on the
blocks' parts -> last-token logits.

Shapes: L tokens, D hidden size, R rows of a batch, P positions, H heads, E head size, V vocabulary size.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.helpers.plain_states import MARK, PlainModel, PlainRow

SITES = {"mlp": "mlp", "attention": "self_attn", "residual": ""}
"""Site -> the part of a block whose output it is."""


def first_of(output: Any) -> Tensor:
    found = output[0] if isinstance(output, tuple) else output
    assert isinstance(found, Tensor)
    return found


def put(output: Any, changed: Tensor) -> Any:
    return (changed, *output[1:]) if isinstance(output, tuple) else changed


@dataclass(frozen=True, eq=False)
class PlainQuestion:
    """A question about some pictures.

    Args:
        plain: The model.
        id: Of the question.
        text: As it is asked.
        pictures: Files.
        constraints: Parts of the text, each of which stands there once.
        begun: What of the answer stands behind the prompt.
    """

    plain: PlainModel
    id: str
    text: str
    pictures: Sequence[str]
    constraints: Sequence[str]
    begun: str = ""

    @cached_property
    def inputs(self) -> dict[str, Tensor]:
        return self.plain.encode(MARK * len(self.pictures) + "\n" + self.text, self.pictures, self.begun)

    @cached_property
    def row(self) -> PlainRow:
        tokens = [self.plain.processor.tokenizer.decode([token]) for token in self.inputs["input_ids"][0].tolist()]
        return PlainRow(self.inputs, None, self.plain.image_positions(self.inputs), tokens)

    @property
    def length(self) -> int:
        return int(self.inputs["input_ids"].shape[1])

    @cached_property
    def parts(self) -> dict[str, list[int]]:
        """Name -> positions: image, question (with the constraint), constraint, last."""
        constraint = [at for words in self.constraints for at in self.row.span(words)]
        parts = {"image": self.row.image, "question": self.row.span(self.text), "constraint": sorted(constraint)}
        return parts | {"last": [self.length - 1]}

    @cached_property
    def classes(self) -> list[str]:
        """The class of each token; the last sixteenth of the image tokens, at least one, is late."""
        classes = ["template"] * self.length
        image = self.parts["image"]
        late = max(1, round(len(image) / 16))
        for positions, name in (
            (image[:-late], "image_early"), (image[-late:], "image_late"),
            (self.parts["question"], "question"), (self.parts["constraint"], "constraint"), ([-1], "last"),
        ):  # fmt: skip
            for position in positions:
                classes[position] = name
        return classes

    def images(self) -> list[list[int]]:
        """Positions of each picture's tokens: the tokens between two are none of them."""
        runs = np.split(self.row.image, np.flatnonzero(np.diff(self.row.image) > 1) + 1)
        return [run.tolist() for run in runs]


def repeated(inputs: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """A batch of equal rows."""
    return {name: value.repeat(count, *[1] * (value.ndim - 1)) for name, value in inputs.items()}


class PlainRuns:
    """Forward passes of a model with hooks.

    Args:
        plain: The model, with eager attention.
    """

    def __init__(self, plain: PlainModel) -> None:
        self.plain, self.blocks = plain, plain.blocks

    @torch.no_grad()
    def logits(self, inputs: dict[str, Tensor], count: int = 1) -> Tensor:
        """(R, V) float64 logits of the last token."""
        found: Tensor = self.plain.model(**repeated(inputs, count), use_cache=False).logits[:, -1].double()
        return found

    def module(self, layer: int, site: str) -> Any:
        return getattr(self.blocks[layer], SITES[site]) if SITES[site] else self.blocks[layer]

    @contextmanager
    def changed(self, layers: Sequence[int], site: str, change: Callable[[int, Any, Tensor], Tensor]) -> Iterator[None]:
        """While active, the outputs of a site are changed: layer, what the module is given and what it gives."""
        with ExitStack() as stack:
            for layer in layers:

                def hook(_: Any, args: Any, kwargs: Any, output: Any, layer: int = layer) -> Any:
                    given = args[0] if args else kwargs["hidden_states"]
                    return put(output, change(layer, given, first_of(output).clone()))

                module = self.module(layer, site)
                stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
            yield

    @torch.no_grad()
    def outputs(self, inputs: dict[str, Tensor], site: str) -> list[Tensor]:
        """The (L, D) output of a site in each layer."""
        kept: dict[int, Tensor] = {}

        def keep(layer: int, _: Any, output: Tensor) -> Tensor:
            kept[layer] = output[0]
            return output

        with self.changed(range(len(self.blocks)), site, keep):
            self.logits(inputs)
        return [kept[layer] for layer in range(len(self.blocks))]

    def restored(
        self, corrupt: dict[str, Tensor], clean: Sequence[Tensor], site: str, layers: Sequence[int],
        units: Sequence[Sequence[int]],
    ) -> Tensor:  # fmt: skip
        """(R, V) logits of the corrupted run, in row r of which the clean outputs stand at the tokens of unit r."""

        def back(layer: int, _: Any, output: Tensor) -> Tensor:
            for r, unit in enumerate(units):
                output[r, list(unit)] = clean[layer][list(unit)]
            return output

        with self.changed(layers, site, back):
            return self.logits(corrupt, len(units))

    @torch.no_grad()
    def contributions(self, inputs: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """By layer the (L, L) norms of the contribution of token j to token i over all heads, and (H, L, L) by head."""
        values: list[Tensor] = []
        with ExitStack() as stack:
            for block in self.blocks:
                hook = block.self_attn.v_proj.register_forward_hook(lambda _, __, output: values.append(output[0]))
                stack.callback(hook.remove)
            weights = self.plain.model(**inputs, use_cache=False, output_attentions=True).attentions
        found = []
        for block, value, weight in zip(self.blocks, values, weights, strict=True):
            by_head = self._value_heads(value, weight.shape[1], block.self_attn.o_proj)
            out_HED = block.self_attn.o_proj.weight.T.reshape(weight.shape[1], by_head.shape[2], -1)
            written_HLD = (by_head @ out_HED).double()
            per_head = weight[0].double()[..., None] * written_HLD[:, None]
            found.append((per_head.sum(0).norm(dim=-1), per_head.norm(dim=-1)))
        return found

    @staticmethod
    def _value_heads(value_LK: Tensor, heads: int, projection: Any) -> Tensor:
        """(H, L, E) values of every query head."""
        grouped = value_LK.view(len(value_LK), -1, projection.in_features // heads).transpose(0, 1)
        return grouped.repeat_interleave(heads // len(grouped), 0)

    @torch.no_grad()
    def knocked_out(self, inputs: dict[str, Tensor], layers: Sequence[int], cut_LL: Tensor, kind: str) -> Tensor:
        """(V,) logits where the pairs (attending token, attended token) are cut before or after the softmax."""
        if kind == "pre":
            with ExitStack() as stack:
                for layer in layers:

                    def mask(_: Any, args: Any, kwargs: Any) -> Any:
                        whole = kwargs["attention_mask"]
                        return args, kwargs | {
                            "attention_mask": whole.masked_fill(cut_LL, torch.finfo(whole.dtype).min)
                        }

                    attention = self.blocks[layer].self_attn
                    stack.callback(attention.register_forward_pre_hook(mask, with_kwargs=True).remove)
                return self.logits(inputs)[0]
        with ExitStack() as stack:
            for layer in layers:
                attention, values = self.blocks[layer].self_attn, []

                def keep(_: Any, __: Any, output: Tensor, values: list[Tensor] = values) -> None:
                    values[:] = [output[0]]

                def less(module: Any, _: Any, output: Any, values: list[Tensor] = values) -> Any:
                    weight = output[1][0] * cut_LL
                    heads = weight @ self._value_heads(values[0], len(weight), module.o_proj)
                    gone = heads.transpose(0, 1).flatten(1) @ module.o_proj.weight.T
                    return (output[0] - gone, *output[1:])

                stack.callback(attention.v_proj.register_forward_hook(keep).remove)
                stack.callback(attention.register_forward_hook(less).remove)
            return self.logits(inputs)[0]
