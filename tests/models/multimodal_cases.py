# SPDX-License-Identifier: Apache-2.0
"""Multimodal checkpoints, run by test_multimodal.py in a process with torchvision."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from steering_testing import models
from steering_testing.cases import MULTIMODAL_CASES
from steering_testing.conformance import conforms
from steering_testing.engine import engine, save_sae
from steering_testing.read_conformance import reads_conform
from steering_testing.reference import random_sae

from tests.models.test_steering_sites import (
    NEEDS_TORCHVISION,
    names_are_those_of_the_class,
)
from vllm import SamplingParams

VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": models.HIDDEN,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
# The ids of the image's tokens are below the vocabulary's end, and in no text prompt.
IMAGE, BEGIN, END = 124, 125, 126


def gemma3() -> Any:
    text = transformers.Gemma3TextConfig(**models.GEMMA)
    return transformers.Gemma3Config(
        text_config=text.to_dict(),
        # Published checkpoints have no pooling head.
        vision_config={
            "model_type": "siglip_vision_model",
            "vision_use_head": False,
            **VISION,
        },
        mm_tokens_per_image=4,
        boi_token_index=BEGIN,
        eoi_token_index=END,
        image_token_index=IMAGE,
        tie_word_embeddings=True,
    )


def gemma4() -> Any:
    vision = {k: v for k, v in VISION.items() if k != "image_size"}
    return transformers.Gemma4Config(
        text_config=models.FAMILIES["gemma4"]().to_dict(),
        vision_config={
            **vision,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "pooling_kernel_size": 1,
            "position_embedding_size": 16,
        },
        # Hugging Face gives these ids another embedding, also where the model writes
        # them, so they are ids that it cannot write.
        image_token_id=models.VOCAB,
        video_token_id=models.VOCAB + 1,
        audio_token_id=models.VOCAB + 2,
        boi_token_id=BEGIN,
        eoi_token_id=END,
        tie_word_embeddings=True,
    )


def qwen2_5_vl() -> Any:
    return transformers.Qwen2_5_VLConfig(
        text_config={**models.COMMON, "rope_parameters": MROPE},
        vision_config={**QWEN_VISION, "fullatt_block_indexes": [0]},
        image_token_id=IMAGE,
        vision_start_token_id=BEGIN,
        vision_end_token_id=END,
        tie_word_embeddings=False,
    )


def qwen3_vl() -> Any:
    rope = {**MROPE, "mrope_interleaved": True}
    return transformers.Qwen3VLConfig(
        text_config={**models.COMMON, **models.HEAD, "rope_parameters": rope},
        vision_config={
            **QWEN_VISION,
            "deepstack_visual_indexes": [0],
            "num_position_embeddings": 16,
        },
        image_token_id=IMAGE,
        vision_start_token_id=BEGIN,
        vision_end_token_id=END,
        tie_word_embeddings=False,
    )


def mistral3() -> Any:
    return transformers.Mistral3Config(
        text_config={
            "model_type": "mistral",
            **models.COMMON,
            **models.HEAD,
            "sliding_window": None,
        },
        vision_config={"model_type": "pixtral", **VISION, "head_dim": 16},
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )


def qwen3_vl_moe() -> Any:
    config = qwen3_vl()
    text = {**config.text_config.to_dict(), **models.MOE, "mlp_only_layers": []}
    text.pop("model_type")
    return transformers.Qwen3VLMoeConfig(
        text_config=text,
        vision_config=config.vision_config.to_dict(),
        image_token_id=IMAGE,
        vision_start_token_id=BEGIN,
        vision_end_token_id=END,
        tie_word_embeddings=False,
    )


def qwen3_5_mm() -> Any:
    rope = {**MROPE, "partial_rotary_factor": 0.5, "mrope_interleaved": True}
    return transformers.Qwen3_5Config(
        text_config={
            **models.LINEAR,
            "rope_parameters": {**rope, "mrope_section": [2, 3, 3]},
        },
        vision_config={**QWEN_VISION, "num_position_embeddings": 16},
        image_token_id=IMAGE,
        vision_start_token_id=BEGIN,
        vision_end_token_id=END,
        tie_word_embeddings=False,
    )


def llama4_mm() -> Any:
    return transformers.Llama4Config(
        text_config=models.FAMILIES["llama4"]().to_dict(),
        vision_config={
            **VISION,
            "vision_output_dim": 48,
            "projector_input_dim": 48,
            "projector_output_dim": 48,
            "intermediate_size": 128,
        },
        image_token_index=IMAGE,
        boi_token_index=BEGIN,
        eoi_token_index=END,
        tie_word_embeddings=False,
    )


models.ROUNDED.add("qwen3_5_mm")
models.FAMILIES |= {
    "llama4_mm": llama4_mm,
    "qwen3_5_mm": qwen3_5_mm,
    "qwen3_vl_moe": qwen3_vl_moe,
    "gemma3_mm": gemma3,
    "gemma4_mm": gemma4,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "mistral3": mistral3,
}


@pytest.mark.parametrize("family", sorted(MULTIMODAL_CASES))
def test_every_tier_at_every_point_of_a_multimodal_checkpoint(
    family: str, model_root: Path, tmp_path: Path
) -> None:
    if family == "qwen3_vl_moe":
        transpose_experts(models.save(family, model_root))
    conforms(MULTIMODAL_CASES[family], model_root, tmp_path)


@pytest.mark.parametrize("family", sorted(MULTIMODAL_CASES))
def test_reading_at_every_point_of_a_multimodal_checkpoint(
    family: str, model_root: Path, tmp_path: Path
) -> None:
    if family == "qwen3_vl_moe":
        transpose_experts(models.save(family, tmp_path))
        model_root = tmp_path
    reads_conform(MULTIMODAL_CASES[family], model_root, tmp_path)


def transpose_experts(path: Path) -> None:
    """Released checkpoints have experts' matrices as `[experts, in, out]`; transformers
    5 saves `[experts, out, in]`, and vLLM expects the former."""
    for file in path.glob("*.safetensors"):
        tensors = {
            name: value.mT.contiguous() if ".experts." in name else value
            for name, value in load_file(file).items()
        }
        save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("layer_class", sorted(NEEDS_TORCHVISION))
def test_the_names_in_the_table_are_those_of_the_class(layer_class: str) -> None:
    names_are_those_of_the_class(layer_class)


def name_as_vllm_does(path: Path) -> None:
    """Released checkpoints have `vision_model` in the names of the tower's tensors;
    transformers 5 leaves it out when it saves, and vLLM expects it."""
    for file in path.glob("*.safetensors"):
        tensors = load_file(file)
        renamed = {
            re.sub(
                r"vision_tower\.(?!vision_model)", "vision_tower.vision_model.", n
            ): t
            for n, t in tensors.items()
        }
        save_file(renamed, file, metadata={"format": "pt"})


def tokenizer(special: dict[str, int], **named: str) -> Any:
    """A tokenizer of the words `w0`, `w1`, …, and of special tokens."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    words = {f"w{i}": i for i in range(models.VOCAB)}
    known = {"<pad>": models.PAD, "<bos>": models.BOS, "<eos>": models.EOS, **special}
    vocab = {w: i for w, i in words.items() if i not in known.values()} | known
    raw = Tokenizer(WordLevel(vocab, unk_token="<pad>"))
    raw.pre_tokenizer = WhitespaceSplit()
    raw.add_special_tokens(list(special))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<pad>",
        extra_special_tokens=named,
    )


def gemma_processor() -> Any:
    """The tokenizer and image processor that an image prompt needs."""
    special = {
        "<image_soft_token>": IMAGE,
        "<start_of_image>": BEGIN,
        "<end_of_image>": END,
        **{"\n" * n: 119 + n for n in (1, 2, 3, 4)},
    }
    image = transformers.Gemma3ImageProcessor(
        size={"height": 28, "width": 28}, do_pan_and_scan=False
    )
    return transformers.Gemma3Processor(
        image_processor=image,
        tokenizer=tokenizer(
            special,
            image_token="<image_soft_token>",
            boi_token="<start_of_image>",
            eoi_token="<end_of_image>",
        ),
        image_seq_length=4,
    )


def test_image_positions_are_steered_and_bypassed_by_the_placeholders_id(
    tmp_path: Path,
) -> None:
    path = models.save("gemma3_mm", tmp_path)
    gemma_processor().save_pretrained(path)
    name_as_vllm_does(path)
    site = {(1, "post_block"): random_sae(40, models.HIDDEN, "relu", 3)}
    modules = {
        "all": save_sae(tmp_path / "all", site, skip_token_ids=[]),
        "no-images": save_sae(tmp_path / "none", site, skip_token_ids=[IMAGE]),
    }
    image = Image.new("RGB", (28, 28), (200, 30, 90))
    prompt = {
        "prompt": "w5 w9 <start_of_image> w17 w33",
        "multi_modal_data": {"image": image},
    }
    clamps = [{"feature_idx": 5, "kind": "absolute", "value": 3.0}]

    def ask(name: str | None) -> SamplingParams:
        spec = {"module_name": name, "phase": "prefill", "clamps": clamps}
        extra = {"sae_full_reconstruction_specs": [spec]} if name else None
        return SamplingParams(
            temperature=0, max_tokens=2, logprobs=0, ignore_eos=True, extra_args=extra
        )

    options: dict[str, Any] = {"skip_tokenizer_init": False, "max_num_seqs": 4}
    with engine("gemma3_mm", tmp_path, modules, **options) as llm:
        out = llm.generate([prompt] * 3, [ask(None), ask("all"), ask("no-images")])
    ids = list(out[0].prompt_token_ids or ())
    assert ids.count(IMAGE) == 4
    scores = []
    for one_out in out:
        step = one_out.outputs[0].logprobs[0]
        scores.append(next(iter(step.values())).logprob)
    assert abs(scores[0] - scores[1]) > 1e-4
    assert abs(scores[1] - scores[2]) > 1e-4, "image positions are edited"
