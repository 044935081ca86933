# SPDX-License-Identifier: Apache-2.0
"""How much of SAELens's list of pretrained SAEs can be used here.

Reads the list of the installed sae-lens (a test-only dependency), and for each SAE asks
this project's own code: does `saelens:RELEASE/SAE_ID` load it, which point of which
layer does it read and write, and does the model's decoder layer have these points?
Prints the counts of usable, refused and unknown SAEs for each of SAELens's loaders.
Exits with 1 if less than 97 % are usable.

    python tools/coverage_of_public_saes.py [--missing]
"""

from __future__ import annotations

import argparse
import functools
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import transformers
from make_saelens_table import read_list

from vllm.config.steering_points import HookPoint
from vllm.model_executor.layers.steering_families import (
    FAMILIES,
    MODELS,
    DecoderLayer,
    LayerFamily,
    hugging_face_family,
)
from vllm.model_executor.layers.steering_families import (
    points_of as layer_points_of,
)
from vllm.model_executor.model_loader.sae_formats import (
    gemma_scope,
    saelens_list,
)
from vllm.model_executor.model_loader.sae_formats.layout import (
    LayoutError,
    Location,
)
from vllm.model_executor.model_loader.sae_formats.names import (
    Points,
    parse_site_name,
    transcoder_points,
)

TARGET = 0.97
# For a model that runs under vLLM's Transformers backend.
TRANSFORMERS = "transformers"
# Prefix of a model's name in the list -> its Hugging Face architecture and the decoder
# layer that vLLM runs for it. The first match counts.
_LLAMA = ("LlamaForCausalLM", "llama.LlamaDecoderLayer")
_GEMMA_3 = ("Gemma3ForCausalLM", "gemma3.Gemma3DecoderLayer")
_QWEN_3 = ("Qwen3ForCausalLM", "qwen3.Qwen3DecoderLayer")
ARCHITECTURES: tuple[tuple[str, tuple[str, str]], ...] = (
    ("gemma-2-", ("Gemma2ForCausalLM", "gemma2.Gemma2DecoderLayer")),
    ("google/gemma-3-270m", _GEMMA_3),
    ("google/gemma-3-1b", _GEMMA_3),
    ("google/gemma-3-", ("Gemma3ForConditionalGeneration", _GEMMA_3[1])),
    ("gemma-2b", ("GemmaForCausalLM", "gemma.GemmaDecoderLayer")),
    ("pythia-", ("GPTNeoXForCausalLM", TRANSFORMERS)),
    ("gpt2", ("GPT2LMHeadModel", "gpt2.GPT2Block")),
    ("meta-llama/", _LLAMA),
    ("deepseek-ai/DeepSeek-R1-Distill-Llama", _LLAMA),
    ("mistral-7b", ("MistralForCausalLM", "mistral.MistralDecoderLayer")),
    ("Qwen/Qwen2.5-", ("Qwen2ForCausalLM", "qwen2.Qwen2DecoderLayer")),
    ("Qwen/Qwen3-30B-A3B", ("Qwen3MoeForCausalLM", "qwen3_moe.Qwen3MoeDecoderLayer")),
    (
        "Qwen/Qwen3.5-",
        ("Qwen3_5ForConditionalGeneration", "qwen3_5.Qwen3_5DecoderLayer"),
    ),
    ("Qwen/Qwen3-", _QWEN_3),
    ("qwen3-", _QWEN_3),
    ("openai/gpt-oss", ("GptOssForCausalLM", "gpt_oss.TransformerBlock")),
)
# What only the files say, and our reader refuses.
REFUSED_BY_FILES = {
    re.compile(r".*-v5-(?:32k|128k)"): "normalize_activations layer_norm",
}
_TRANSFORMER_LENS = re.compile(
    r"blocks\.[0-9]+\.(?:attn\.|mlp\.)?hook_[a-z]+(?:_[a-z]+)*"
)
_LLAMA_SCOPE = {
    "r": HookPoint.POST_BLOCK,
    "a": HookPoint.ATTN_OUT,
    "m": HookPoint.MLP_OUT,
}
_TORCH_LAYER = re.compile(r"(?:layer|-l)([0-9]+)(?:\.sae)?\.pth?")


@dataclass(frozen=True)
class Verdict:
    """`state` is usable, refused or unknown; `reason` says why it is not usable."""

    state: str
    reason: str = ""


def main() -> int:
    """Print the table; 0 if enough of the list is usable."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--missing", action="store_true", help="reasons, by number")
    options = parser.parse_args()
    counts: dict[str, Counter[str]] = {}
    reasons: Counter[tuple[str, str]] = Counter()
    for name, release in read_list().items():
        loader = release["conversion_func"] or "sae_lens"
        for sae in release["saes"]:
            verdict = judge(name, release["model"], sae["id"])
            counts.setdefault(loader, Counter())[verdict.state] += 1
            if verdict.reason:
                reasons[verdict.state, verdict.reason] += 1
    share = print_table(counts)
    if options.missing:
        for (state, reason), count in reasons.most_common():
            print(f"{count:7} {state}: {reason}")
    return 0 if share >= TARGET else 1


def print_table(counts: dict[str, Counter[str]]) -> float:
    """Print usable, refused and unknown for each loader; return the share usable."""
    states = ("usable", "refused", "unknown")
    print(f"{'loader':28}" + "".join(f"{state:>10}" for state in states))
    total: Counter[str] = Counter()
    for loader, found in sorted(counts.items(), key=lambda item: -item[1].total()):
        total += found
        print(f"{loader:28}" + "".join(f"{found[state]:10}" for state in states))
    share = total["usable"] / max(1, total.total())
    print(f"{'all':28}" + "".join(f"{total[state]:10}" for state in states))
    print(f"{share:.2%} of {total.total()} usable; expected at least {TARGET:.0%}")
    return share


def judge(release: str, model: str, sae_id: str) -> Verdict:
    """Whether one SAE of the list can be used with its model."""
    for pattern, reason in REFUSED_BY_FILES.items():
        if pattern.fullmatch(release):
            return Verdict("refused", reason)
    try:
        listed = saelens_list.find(release, sae_id)
        normalize = listed.overrides.normalize
        if normalize not in (None, "none", "expected_average_only_in"):
            return Verdict("refused", f"normalize_activations {normalize}")
        points = points_of(listed, sae_id)
    except LayoutError as error:
        return Verdict("refused", str(error).partition(": ")[2] or str(error))
    if points is None:
        return Verdict("unknown", f"no point known for {listed.loader}")
    known = [pair for prefix, pair in ARCHITECTURES if model.startswith(prefix)]
    if not known:
        return Verdict("unknown", f"model {model}")
    architecture, layer_class = known[0]
    have = layer_points(architecture, layer_class)
    if have is None:
        return Verdict("unknown", f"{architecture}: {layer_class} is in no family")
    for hook in {points.hook, points.hook_out or points.hook}:
        if hook not in have:
            return Verdict("unknown", f"{architecture} has no {hook.value}")
    return Verdict("usable")


@functools.cache
def layer_points(architecture: str, layer_class: str) -> frozenset[HookPoint] | None:
    """The points that an architecture's layers have on one rank; None: unknown."""
    if layer_class == TRANSFORMERS:
        return hugging_face_points(architecture)
    family = FAMILIES.get(f"{MODELS}.{layer_class}")
    if family is None:
        return None
    return frozenset(hook for hook in HookPoint if has_point(family, hook))


def hugging_face_points(architecture: str) -> frozenset[HookPoint] | None:
    """As `layer_points`, from a tiny model of Hugging Face's own class."""
    name = architecture.removesuffix("ForCausalLM")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "vocab_size": 8}
    config = getattr(transformers, f"{name}Config")(
        **sizes, num_hidden_layers=1, num_attention_heads=1
    )
    model = getattr(transformers, architecture)(config)
    for module in model.modules():
        if (family := hugging_face_family(module)) is not None:
            return frozenset(layer_points_of(DecoderLayer(0, module, family)))
    return None


def points_of(listed: saelens_list.ListedSAE, sae_id: str) -> Points | None:
    """The points of a listed SAE, as our readers find them in its path or files."""
    if listed.loader in ("gemma_2", "gemma_2_transcoder", "gemma_3"):
        origin = f"hf:{listed.repo}/{listed.path}"
        return gemma_scope.points_of_path(Location(Path(), origin))
    if listed.loader == "mwhanna_transcoder":
        number = re.search(r"[0-9]+", listed.path)
        return None if number is None else transcoder_points(int(number[0]))
    if listed.loader in ("llama_scope", "llama_scope_r1_distill"):
        step = re.search(r"L([0-9]+)([RAM])", listed.path)
        if step is None:
            return None
        return Points(int(step[1]), _LLAMA_SCOPE[step[2].lower()])
    if match := _TORCH_LAYER.search(listed.path):
        return Points(int(match[1]), HookPoint.POST_BLOCK)
    if match := re.search(r"resid_post_layer_([0-9]+)", listed.path):
        return Points(int(match[1]), HookPoint.POST_BLOCK)
    if match := _TRANSFORMER_LENS.match(sae_id):
        site = parse_site_name(match[0])
        return None if site is None else Points(*site)
    return None


def has_point(family: LayerFamily, hook: HookPoint) -> bool:
    """Whether layers of the family have the point, on one rank."""
    if hook is HookPoint.POST_ATTN:
        return family.mid_norm is not None or family.mlp_reads_stream
    if hook is HookPoint.ATTN_Z:
        return bool(family.attention and family.projection)
    if hook is HookPoint.ATTN_OUT:
        return bool(family.attention)
    if hook in (HookPoint.MLP_IN, HookPoint.MLP_OUT):
        return family.mlp is not None
    return True


if __name__ == "__main__":
    sys.exit(main())
