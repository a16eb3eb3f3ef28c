"""
The methods that a TransformerLens user types, on our own models: they mean what TransformerLens means by them. A name
that is unknown raises, and so does one that does not fire in a run (but for add_hook's, which have no run of their own).
Functions of the same names work on any model (hooks.py, data.py).
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

import hooks  # first: its utils sets OpenMP's variables before torch is loaded
from hooks import Cache, Names
from data import str_tokens, text_of, to_tokens

import torch as t
import torch.nn as nn
from torch import Tensor


class Hooked:
    """Mixin for a model with .tokenizer, hook points, blocks, W_E and W_U. Texts become tokens where one is given."""

    # Texts and tokens
    def to_tokens(self, text: str | list[str], prepend_bos: bool | None = None) -> Tensor:
        """
        (batch, pos), on the model's device. Beginning-of-text comes first as the tokenizer has it, or as prepend_bos
        says. Shorter texts are filled up on the right with token 0, which no earlier position sees.
        """
        texts = [text] if isinstance(text, str) else text
        rows = [to_tokens(self.tokenizer, one, prepend_bos)[0] for one in texts]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self.W_E.device)

    def to_str_tokens(self, text: str | Tensor | list[int], prepend_bos: bool | None = None) -> list[str]:
        """The text of every token, of a text or of tokens (pos) or (1, pos)."""
        tokens = self.to_tokens(text, prepend_bos) if isinstance(text, str) else t.as_tensor(text)
        return str_tokens(self.tokenizer, tokens.flatten())

    def to_string(self, tokens: Tensor | list[int]) -> str | list[str]:
        """The text of tokens (pos), or of each row (batch, pos)."""
        tokens = t.as_tensor(tokens)
        if tokens.ndim == 2:
            return [text_of(self.tokenizer, row.tolist()) for row in tokens]
        return text_of(self.tokenizer, tokens.flatten().tolist())

    def to_single_token(self, text: str) -> int:
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        assert len(ids) == 1, f"{text!r} is {len(ids)} tokens: {str_tokens(self.tokenizer, ids)}"
        return ids[0]

    # Running, listening, intervening
    def run_with_cache(self, tokens: str | Tensor, names_filter: Names | None = None, **kwargs) -> tuple[Tensor, Cache]:
        """(logits, cache) of the hooks that names_filter means: a name, a *-pattern, a list of these, a predicate."""
        return hooks.run_with_cache(self, self.as_tokens(tokens), names_filter, **kwargs)

    def run_with_hooks(self, tokens: str | Tensor, fwd_hooks: list[tuple[Names, Callable]], **kwargs) -> Tensor:
        """Logits of a run with fn(activation, hook) at each name; they are gone afterwards."""
        return hooks.run_with_hooks(self, self.as_tokens(tokens), fwd_hooks, **kwargs)

    def hooks(self, fwd_hooks: list[tuple[Names, Callable]]) -> AbstractContextManager[None]:
        """The hooks hold within the context: with model.hooks([(name, fn)]): ..."""
        return hooks.hooks(self, fwd_hooks)

    def add_hook(self, name: Names, fn: Callable) -> None:
        """Until reset_hooks: fn(activation, hook) at every hook that the name means."""
        points = hooks.hook_points(self)
        for found in hooks.find_hooks(self, name, points):
            points[found].add_hook(fn)

    def reset_hooks(self) -> None:
        for point in hooks.hook_points(self).values():
            point.remove_hooks()

    def as_tokens(self, tokens: str | Tensor) -> Tensor:
        return self.to_tokens(tokens) if isinstance(tokens, str) else tokens

    # Weights of all layers, as in A Mathematical Framework
    def stacked(self, part: str, name: str) -> Tensor:
        return t.stack([getattr(getattr(block, part), name) for block in self.blocks])

    @property
    def W_Q(self) -> Tensor:
        """(layer, head, d_model, d_head)"""
        return self.stacked("attn", "W_Q")

    @property
    def W_K(self) -> Tensor:
        """(layer, head, d_model, d_head), one head for each group of queries where they share keys"""
        return self.stacked("attn", "W_K")

    @property
    def W_V(self) -> Tensor:
        """(layer, head, d_model, d_head), as W_K"""
        return self.stacked("attn", "W_V")

    @property
    def W_O(self) -> Tensor:
        """(layer, head, d_head, d_model)"""
        return self.stacked("attn", "W_O")

    @property
    def W_in(self) -> Tensor:
        """(layer, d_model, d_mlp)"""
        return self.stacked("mlp", "W_in")

    @property
    def W_out(self) -> Tensor:
        """(layer, d_mlp, d_model)"""
        return self.stacked("mlp", "W_out")
