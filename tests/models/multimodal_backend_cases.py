# SPDX-License-Identifier: Apache-2.0
"""Multimodal checkpoints under the Transformers backend, on prompts of text and with
images, run by test_multimodal.py in a process with torchvision.

On a CPU, vLLM attends causally inside an image. So does the oracle, which gets no
`token_type_ids`: with them, Hugging Face's Gemma-3 lets the tokens of an image see each
other.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from steering_testing import models, oracle
from steering_testing.cases import MULTIMODAL_BACKEND_CASES
from steering_testing.conformance import (
    MAX_TOKENS,
    case_engine,
    requests,
    site_modules,
    steered_classes,
)
from steering_testing.engine import answer_of, assert_same, params
from steering_testing.requests import prompt, specs

from tests.models.multimodal_cases import (
    BEGIN,
    END,
    IMAGE,
    VISION,
    gemma_processor,
    tokenizer,
)

SIZE = {"height": 28, "width": 28}


def llava() -> Any:
    text = {"model_type": "llama", **models.COMMON, **models.HEAD}
    return transformers.LlavaConfig(
        text_config=text,
        vision_config={"model_type": "clip_vision_model", **VISION},
        image_token_index=IMAGE,
        image_seq_length=4,
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )


models.FAMILIES["llava"] = llava


def llava_processor() -> Any:
    return transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessor(size=SIZE, crop_size=SIZE),
        tokenizer=tokenizer({"<image>": IMAGE}, image_token="<image>"),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def qwen_processor() -> Any:
    special = {
        "<|image_pad|>": IMAGE,
        "<|vision_start|>": BEGIN,
        "<|vision_end|>": END,
        "<|video_pad|>": models.VOCAB - 1,
    }
    sizes = {"min_pixels": 28 * 28, "max_pixels": 28 * 28, "patch_size": 14}
    return transformers.Qwen2_5_VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(**sizes),
        tokenizer=tokenizer(special, image_token="<|image_pad|>"),
        video_processor=transformers.Qwen2VLVideoProcessor(**sizes),
    )


# The processor of each family, and what stands for an image in a prompt.
PROCESSORS: dict[str, tuple[Callable[[], Any], str]] = {
    "gemma3_mm": (gemma_processor, "<start_of_image>"),
    "llava": (llava_processor, "<image>"),
    "qwen2_5_vl": (qwen_processor, "<|vision_start|><|image_pad|><|vision_end|>"),
}


def save(family: str, path: Path) -> Any:
    """Save the family's model, changed so that it never writes the placeholder.

    Hugging Face would look for another image there. A logit of 0 is below others.
    """
    model = copy.deepcopy(models.build(family))
    with torch.no_grad():
        for table in (model.get_input_embeddings(), model.get_output_embeddings()):
            table.weight[IMAGE] = 0
    model.save_pretrained(path)
    return model


class WithImage:
    """A Hugging Face model that sees an image beside the tokens of its prompt."""

    def __init__(self, model: Any, inputs: dict[str, torch.Tensor]):
        self.base_model, self.model, self.inputs = model.base_model, model, inputs

    def __call__(self, tokens: torch.Tensor, **options: Any) -> Any:
        seen = dict(self.inputs)
        if "image_grid_thw" in seen:
            seen["mm_token_type_ids"] = (tokens == IMAGE).int()
        return self.model(tokens, **seen, **options)


def text(ids: list[int], image: str | None) -> str:
    """A prompt's words; the image comes after the third."""
    words = [f"w{i}" for i in ids if i not in models.SPECIAL]
    return " ".join([*words[:3], *([image] if image else []), *words[3:]])


@pytest.mark.parametrize("name", sorted(MULTIMODAL_BACKEND_CASES))
def test_every_tier_at_every_point_on_text_and_images(
    name: str, tmp_path: Path
) -> None:
    case = MULTIMODAL_BACKEND_CASES[name]
    make_processor, mark = PROCESSORS[case.family]
    processor, image = make_processor(), Image.new("RGB", (28, 28), (200, 30, 90))
    path = tmp_path / f"{case.family}-0"  # where `engine` looks
    model = save(case.family, path)
    processor.save_pretrained(path)
    modules = site_modules(case)
    asked = [asks for asks in requests(case, modules) for _ in range(2)]
    prompts: list[Any] = []
    for at in range(len(asked)):
        words = text(prompt(at, 7 + at % 5), mark if at % 2 else None)
        prompts.append({"prompt": words})
        if at % 2:
            prompts[-1]["multi_modal_data"] = {"image": image}
    sampling = [params(MAX_TOKENS, **specs(*asks)) for asks in asked]
    paths = modules.save(tmp_path)
    with case_engine(case, tmp_path, paths, skip_tokenizer_init=False) as llm:
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        assert steered_classes(llm) == case.classes
    pixels = processor.image_processor(image, return_tensors="pt")
    pixels = {
        k: v for k, v in pixels.items() if k in ("pixel_values", "image_grid_thw")
    }
    for at, (asks, output) in enumerate(zip(asked, outputs, strict=True)):
        ids, found = list(output.prompt_token_ids or ()), answer_of(output)
        assert (IMAGE in ids) == bool(at % 2)
        seen = WithImage(model, pixels) if at % 2 else model
        expected = oracle.follow(seen, ids, modules.edits(*asks), found.tokens)
        assert_same(found, expected, f"{name}, image {at % 2}: {asks}")
        plain = oracle.follow(seen, ids, {}, found.tokens).logprobs
        moved = max(abs(a - b) for a, b in zip(plain, found.logprobs, strict=True))
        assert not asks or moved > 1e-3, f"nothing was steered: {asks}"
