# SPDX-License-Identifier: Apache-2.0
"""Hugging Face transformers with forward hooks around the float64 mathematics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from steering_testing.models import decoder_layers
from steering_testing.reference import Edit, edit_token

# (layer, hook) -> the request's edits there.
SiteEdits = Mapping[tuple[int, str], list[Edit]]

MID_NORMS = ("pre_feedforward_layernorm", "post_attention_layernorm", "ln_2")


@dataclass
class Greedy:
    """A greedy continuation: tokens, and the log-probability of each."""

    tokens: list[int]
    logprobs: list[float]


def mid_norm(layer: Any) -> Any:
    """The norm in front of a layer's MLP."""
    for name in MID_NORMS:
        if hasattr(layer, name):
            return getattr(layer, name)
    raise AssertionError(f"{type(layer).__name__} has no known norm before its MLP")


@contextmanager
def hooked(
    model: Any, sites: SiteEdits, tokens: list[int], prompt_len: int
) -> Iterator[None]:
    """Hooks that edit the stream of the one sequence `tokens` in place."""

    def edit(stream: torch.Tensor, edits: list[Edit]) -> None:
        for at, token_id in enumerate(tokens):
            x = stream[0, at].double()
            out = edit_token(edits, x, token_id, at, prompt_len)
            if out is not x:
                stream[0, at] = out.to(stream.dtype)

    def before(edits: list[Edit]) -> Any:
        def hook(module: Any, args: tuple, kwargs: dict) -> None:
            edit(args[0] if args else kwargs["hidden_states"], edits)

        return hook

    def after(edits: list[Edit]) -> Any:
        def hook(module: Any, args: tuple, output: Any) -> None:
            edit(output[0] if isinstance(output, tuple) else output, edits)

        return hook

    handles = []
    for (layer_index, point), edits in sites.items():
        layer = decoder_layers(model)[layer_index]
        if point == "post_block":
            handles.append(layer.register_forward_hook(after(edits)))
        else:
            at = layer if point == "pre_attn" else mid_norm(layer)
            hook = before(edits)
            handles.append(at.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def greedy(model: Any, prompt: list[int], sites: SiteEdits, max_tokens: int) -> Greedy:
    """Greedy decoding without a cache, every step a whole forward with hooks."""
    tokens, logprobs = list(prompt), []
    for _ in range(max_tokens):
        with hooked(model, sites, tokens, len(prompt)):
            logits = model(torch.tensor([tokens]), use_cache=False).logits[0, -1]
        scores = logits.double().log_softmax(-1)
        best = int(scores.argmax())
        logprobs.append(float(scores[best]))
        tokens.append(best)
    return Greedy(tokens[len(prompt) :], logprobs)


@torch.no_grad()
def follow(
    model: Any, prompt: list[int], sites: SiteEdits, continuation: list[int]
) -> Greedy:
    """What greedy decoding says at each step of a continuation that is given.

    One forward in place of one for each token: equal to `greedy` if and only if the
    tokens that come out are those of `continuation`.
    """
    tokens = [*prompt, *continuation[:-1]]
    with hooked(model, sites, tokens, len(prompt)):
        logits = model(torch.tensor([tokens]), use_cache=False).logits[0]
    scores = logits[len(prompt) - 1 :].double().log_softmax(-1)
    best = scores.argmax(-1)
    return Greedy(best.tolist(), scores.gather(1, best[:, None])[:, 0].tolist())
