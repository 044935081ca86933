# SPDX-License-Identifier: Apache-2.0
"""`evaluate` of a transcoder, against Hugging Face's model with hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from vllm import LLM
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.entrypoints.steering import SiteEvaluation, encode, evaluate
from vllm.model_executor.model_loader.sae_formats.native import save_native

MODEL = Path(__file__).parents[3] / "examples" / "golden_gate" / "model"
TEXTS = ["the golden gate bridge in the fog .", "the chef stirs the tomato soup ."]
LAYERS = (0, 2)
WIDTH, HIDDEN = 192, 96
Replace = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def transcoder(seed: int) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {
        "W_enc": torch.randn(WIDTH, HIDDEN, generator=random) / HIDDEN**0.5,
        "b_enc": torch.randn(WIDTH, generator=random) / 10,
        "W_dec": torch.randn(WIDTH, HIDDEN, generator=random) / WIDTH**0.5 / 4,
        "b_dec": torch.randn(HIDDEN, generator=random) / 10,
    }


TENSORS = {layer: transcoder(layer) for layer in LAYERS}


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    path = tmp_path_factory.mktemp("transcoder") / "module"
    sites = {
        (layer, "mlp_in"): {**tensors, "hook_out": "mlp_out"}
        for layer, tensors in TENSORS.items()
    }
    save_native(path, sites)
    llm = LLM(
        str(MODEL),
        dtype="float32",
        max_model_len=64,
        enforce_eager=True,
        kv_cache_memory_bytes=1 << 26,
        additional_config={"steering": {"modules": {"tc": str(path)}}},
    )
    yield llm
    llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()


@torch.no_grad()
def expected(ids: list[list[int]], layer: int) -> SiteEvaluation:
    """The same figures from the definition; bos is not edited."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    weights = TENSORS[layer]
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def features(x: torch.Tensor) -> torch.Tensor:
        return (x @ weights["W_enc"].T + weights["b_enc"]).relu()

    def written(x: torch.Tensor, _y: torch.Tensor) -> torch.Tensor:
        return features(x) @ weights["W_dec"] + weights["b_dec"]

    def loss(replace: Replace) -> float:
        def hook(
            _mlp: object, args: tuple[torch.Tensor, ...], y: torch.Tensor
        ) -> torch.Tensor:
            edited = replace(args[0][0, 1:], y[0, 1:])
            return torch.cat([y[:, :1], edited[None]], dim=1)

        handle = model.model.layers[layer].mlp.register_forward_hook(hook)
        losses = []
        for own in ids:
            logits = model(torch.tensor([own])).logits[0, :-1].double()
            target = torch.tensor(own[1:])
            losses.append(
                torch.nn.functional.cross_entropy(logits, target, reduction="none")
            )
        handle.remove()
        return float(torch.cat(losses).mean())

    def keep(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        seen.append((x, y))
        return y

    plain = loss(keep)
    x, y = (torch.cat(parts) for parts in zip(*seen, strict=True))
    mean = y.mean(0)
    error = (y - written(x, y)).square().sum() / (y - mean).square().sum()
    return SiteEvaluation(
        site=f"mlp_in.{layer}",
        tokens=len(y),
        fvu=float(error),
        l0=float((features(x) > 0).sum(1).float().mean()),
        ce_plain=plain,
        ce_reconstructed=loss(written),
        ce_ablated=loss(lambda x, y: mean.expand_as(y)),
    )


def test_a_transcoder_is_evaluated_at_each_of_its_sites(llm: LLM) -> None:
    ids = [text.token_ids for text in encode(llm, "tc", TEXTS, top_k=1)]
    found = evaluate(llm, "tc", TEXTS)
    assert [one.site for one in found] == ["mlp_in.0", "mlp_in.2"]
    for layer, one in zip(LAYERS, found, strict=True):
        wanted = expected(ids, layer)
        assert one.tokens == wanted.tokens
        for name in ("fvu", "l0", "ce_plain", "ce_reconstructed", "ce_ablated"):
            own, other = vars(one)[name], vars(wanted)[name]
            assert own == pytest.approx(other, rel=1e-4), name
