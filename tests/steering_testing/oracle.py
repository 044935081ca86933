# SPDX-License-Identifier: Apache-2.0
"""Hugging Face transformers with forward hooks around the float64 mathematics."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from steering_testing.models import decoder_layers
from steering_testing.reference import Edit, edit_token

# (layer, hook) -> the request's edits there.
SiteEdits = Mapping[tuple[int, str], list[Edit]]


@dataclass
class Greedy:
    """A greedy continuation: tokens, and the log-probability of each."""

    tokens: list[int]
    logprobs: list[float]


ATTENTIONS = (
    "self_attn",
    "attention",
    "attn",
    "linear_attn",
    "mixer",
    "self_attention",
)
PROJECTIONS = ("o_proj", "dense", "out_proj", "c_proj")
MLPS = ("mlp", "feed_forward", "block_sparse_moe", "shared_mlp", "mixer")
MID_NORMS = (
    "pre_feedforward_layernorm",
    "pre_mlp_layernorm",
    "feedforward_layernorm",
    "post_attention_layernorm",
    "ln_2",
    "final_layer_norm",
    "pre_ff_layernorm",
    "ffn_norm",
)
# Norms of what a sublayer writes, by a norm that only such layers have.
OUTPUT_NORMS = {
    "post_feedforward_layernorm": (
        "post_attention_layernorm",
        "post_feedforward_layernorm",
    ),
    "post_self_attn_layernorm": ("post_self_attn_layernorm", "post_mlp_layernorm"),
    "pre_mlp_layernorm": ("post_attention_layernorm", "post_mlp_layernorm"),
    "post_norm1": ("post_norm1", "post_norm2"),
}


def part(owner: Any, names: tuple[str, ...]) -> Any:
    """The first of these parts that a module has."""
    for name in names:
        if (found := getattr(owner, name, None)) is not None:
            return found
    raise AssertionError(f"{type(owner).__name__} has none of {names}")


def norms_outputs_only(layer: Any) -> bool:
    """Whether the layer norms what sublayers write, and not what they read."""
    return hasattr(layer, "post_feedforward_layernorm") and not hasattr(
        layer, "pre_feedforward_layernorm"
    )


def point_of(layer: Any, hook: str) -> tuple[Any, bool]:
    """The Hugging Face module at a point, and whether the point is its output."""
    if hook == "post_block":
        return layer, True
    if hook == "pre_attn":
        return layer, False
    if hook == "post_attn":
        reads_stream = norms_outputs_only(layer)
        return part(layer, MLPS if reads_stream else MID_NORMS), False
    if hook == "attn_z":
        return part(part(layer, ATTENTIONS), PROJECTIONS), False
    if hook == "mlp_in":
        return part(layer, MLPS), False
    for mark, names in OUTPUT_NORMS.items():
        if hasattr(layer, mark):
            return getattr(layer, names[hook == "mlp_out"]), True
    return part(layer, ATTENTIONS if hook == "attn_out" else MLPS), True


class _Hooks:
    """The hooks that edit the one sequence `tokens`."""

    def __init__(self, model: Any, tokens: list[int], prompt_len: int):
        self.layers = decoder_layers(model)
        self.tokens, self.prompt_len = tokens, prompt_len
        self.handles: list[Any] = []
        self.read: dict[int, torch.Tensor] = {}  # what each MLP reads

    def edit(
        self, x: torch.Tensor, edits: list[Edit], source: torch.Tensor | None = None
    ) -> None:
        """Edit `x [1, T, D]` (or `[T, D]`) in place."""
        rows = x.view(-1, x.shape[-1])
        reads = None if source is None else source.view(-1, source.shape[-1])
        for at, token_id in enumerate(self.tokens):
            one = rows[at].double()
            read = None if reads is None else reads[at].double()
            out = edit_token(edits, one, token_id, at, self.prompt_len, read)
            if out is not one:
                rows[at] = out.to(rows.dtype)

    def at_input(self, layer: int, hook: str, act: Callable[[Any], None]) -> None:
        """Call `act` with the input; edits of `mlp_in` are seen by the MLP alone."""
        shared = hook != "mlp_in"

        def call(module: Any, args: tuple, kwargs: dict) -> Any:
            x = args[0] if args else kwargs["hidden_states"]
            x = x if shared else x.clone()
            act(x)
            if args:
                return (x, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": x}

        module, _ = point_of(self.layers[layer], hook)
        handle = module.register_forward_pre_hook(call, with_kwargs=True)
        self.handles.append(handle)

    def at_output(self, layer: int, hook: str, act: Callable[[Any], None]) -> None:
        def call(module: Any, args: tuple, output: Any) -> None:
            act(output[0] if isinstance(output, tuple) else output)

        module, _ = point_of(self.layers[layer], hook)
        self.handles.append(module.register_forward_hook(call))

    def add(self, layer: int, hook: str, edits: list[Edit]) -> None:
        """Edits of a point."""
        _, is_output = point_of(self.layers[layer], hook)
        place = self.at_output if is_output else self.at_input
        place(layer, hook, lambda x: self.edit(x, edits))

    def add_transcoder(self, layer: int, edits: list[Edit]) -> None:
        """Edits of a transcoder from `mlp_in` to `mlp_out`."""

        def keep(x: torch.Tensor) -> None:
            self.read[layer] = x

        self.at_input(layer, "mlp_in", keep)
        self.at_output(
            layer, "mlp_out", lambda x: self.edit(x, edits, self.read[layer])
        )


@contextmanager
def hooked(
    model: Any, sites: SiteEdits, tokens: list[int], prompt_len: int
) -> Iterator[None]:
    """Hooks that edit the one sequence `tokens` in place.

    A transcoder reads `mlp_in` as edited, and edits at `mlp_out` read what it wrote.
    """
    hooks = _Hooks(model, tokens, prompt_len)
    transcoders = {
        layer: [edit for edit in edits if edit.sae and edit.sae.hook_out]
        for (layer, hook), edits in sites.items()
        if hook == "mlp_in"
    }
    others = {
        site: [edit for edit in edits if not (edit.sae and edit.sae.hook_out)]
        for site, edits in sites.items()
    }
    for (layer, hook), edits in others.items():
        if hook != "mlp_out":
            hooks.add(layer, hook, edits)
    for layer, edits in transcoders.items():
        if edits:
            hooks.add_transcoder(layer, edits)
    for (layer, hook), edits in others.items():
        if hook == "mlp_out":
            hooks.add(layer, hook, edits)
    try:
        yield
    finally:
        for handle in hooks.handles:
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
    """The result of greedy decoding at each step of a given continuation.

    It takes one forward for all tokens. The result equals that of `greedy` if and only
    if its tokens are those of `continuation`.
    """
    tokens = [*prompt, *continuation[:-1]]
    with hooked(model, sites, tokens, len(prompt)):
        logits = model(torch.tensor([tokens]), use_cache=False).logits[0]
    scores = logits[len(prompt) - 1 :].double().log_softmax(-1)
    best = scores.argmax(-1)
    return Greedy(best.tolist(), scores.gather(1, best[:, None])[:, 0].tolist())
