# SPDX-License-Identifier: Apache-2.0
"""Train the demo's model and SAE, and measure which feature is which topic.

    python examples/golden_gate/train.py

rewrites `model/` and `sae/` beside this file from a fixed seed, in a few minutes on
two CPU cores. Everything is made here: no data and no weights are downloaded.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path

import corpus
import torch
from jumprelu import JumpReLUSAE, activations, quality, reconstruct
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

HERE = Path(__file__).parent
SEED = 1937  # the year in which the bridge opened
LAYER = 1
MAX_WORDS = 128
BATCH = 32
TARGET_L0 = 10.0


def batches(
    tokenizer: PreTrainedTokenizerFast, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids and topics, both `[BATCH, MAX_WORDS]`; padded with pad and -1."""
    pad = tokenizer.pad_token_id
    stream = corpus.documents(seed, MAX_WORDS)
    while True:
        ids = torch.full((BATCH, MAX_WORDS), pad)
        topics = torch.full((BATCH, MAX_WORDS), -1)
        for row in range(BATCH):
            document = next(stream)
            n = len(document.words)
            ids[row, :n] = torch.tensor(tokenizer.convert_tokens_to_ids(document.words))
            topics[row, :n] = torch.tensor(document.topics)
        yield ids, topics


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A random Llama of about 0.4 M parameters for the language."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def train_model(tokenizer: PreTrainedTokenizerFast, steps: int) -> LlamaForCausalLM:
    """Next-token training; 1 % of the inputs are `<unk>`, which is never a target."""
    model = new_model(tokenizer).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=4e-3, total_steps=steps, pct_start=0.1
    )
    data = batches(tokenizer, SEED)
    for step in range(steps):
        ids, _ = next(data)
        labels = ids.masked_fill(ids == tokenizer.pad_token_id, -100)
        unknown = (torch.rand(ids.shape) < 0.01) & (labels != -100)
        unknown[:, 0] = False
        inputs = ids.masked_fill(unknown, tokenizer.unk_token_id)
        loss = model(input_ids=inputs, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"model step {step:5d}  loss {loss.item():.3f}", flush=True)
    return model.eval()


def collect(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    num_batches: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`resid_post [T, D]` and topics `[T]` of fresh text, without bos, eos and pad."""
    skip = torch.tensor(skip_token_ids(tokenizer))
    all_topics: list[torch.Tensor] = []

    def ids_only() -> Iterator[torch.Tensor]:
        for ids, topics in itertools.islice(batches(tokenizer, seed), num_batches):
            all_topics.append(topics[~torch.isin(ids, skip)])
            yield ids

    x, _ = activations(model, LAYER, ids_only(), lambda ids: ~torch.isin(ids, skip))
    return x, torch.cat(all_topics)


def skip_token_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Tokens that the engine leaves untouched by default."""
    return [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]


def train_sae(x: torch.Tensor, d_sae: int, steps: int) -> JumpReLUSAE:
    """JumpReLU SAE of `x [T, D]`, in the units of `x`."""
    scale = float(x.pow(2).sum(-1).mean().sqrt() / x.shape[1] ** 0.5)
    data = x / scale
    sae = JumpReLUSAE(x.shape[1], d_sae)
    with torch.no_grad():
        sae.b_dec.copy_(data.mean(0))
    optimizer = torch.optim.Adam(sae.parameters(), lr=3e-3, betas=(0.5, 0.999))
    for step in range(steps):
        progress = step / steps
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, progress / 0.05, (1 - progress) / 0.3)
        batch = data[torch.randint(len(data), (1024,))]
        sparsity = 20.0 * min(1.0, progress / 0.3)
        loss = sae.loss(batch, TARGET_L0, sparsity)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        sae.project()
        if step % 500 == 0 or step == steps - 1:
            l0, fvu = quality(sae, batch)
            print(f"sae step {step:5d}  L0 {l0:6.2f}  FVU {fvu:.4f}", flush=True)
    sae.rescale(scale)
    return sae.requires_grad_(False)


def feature_table(
    sae: JumpReLUSAE, x: torch.Tensor, topics: torch.Tensor
) -> dict[str, dict[str, float | int]]:
    """For each topic, the feature most specific to it, by activation contrast.

    The contrast of a feature is the share of the topic's tokens on which it is
    active, less the share of all other tokens; the largest wins.
    """
    feature_acts = sae.encode(x)
    active = (feature_acts > 0).float()
    table: dict[str, dict[str, float | int]] = {}
    for index, topic in enumerate(corpus.TOPICS):
        inside = topics == index
        density_in = active[inside].mean(0)
        density_out = active[~inside].mean(0)
        feature = int((density_in - density_out).argmax())
        values = feature_acts[inside, feature]
        table[topic.name] = {
            "feature": feature,
            "max_activation": round(float(feature_acts[:, feature].max()), 4),
            "mean_activation": round(float(values[values > 0].mean()), 4),
            "density_in_topic": round(float(density_in[feature]), 4),
            "density_elsewhere": round(float(density_out[feature]), 4),
        }
    return table


def save_model(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, path: Path
) -> None:
    """Write a directory that vLLM and transformers load."""
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    for file in path.iterdir():
        file.chmod(0o644)


def share_with_clamp(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    sae: JumpReLUSAE,
    clamps: dict[int, float],
    prompts: list[str],
) -> tuple[float, list[str]]:
    """Bridge share and texts of sampled continuations under reconstruction."""
    texts = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt).input_ids] * 4)
        torch.manual_seed(SEED)
        with reconstruct(model, sae, LAYER, clamps, skip_token_ids(tokenizer)):
            out = model.generate(  # type: ignore[misc]
                ids, do_sample=True, max_new_tokens=48, min_new_tokens=48
            )
        new = out[:, ids.shape[1] :]
        texts += tokenizer.batch_decode(new, skip_special_tokens=True)
    return corpus.bridge_share(texts), texts


# Strengths of the demo, as multiples of the bridge feature's largest activation.
STRENGTHS = (1.25, 2.0)
D_SAE = 384
PROMPTS = [
    "the chef stirs the tomato soup .",
    "the rain soaks the plains .",
    "<user> who are you ? <assistant>",
    "the night train departs and",
]


def report_clamps(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    sae: JumpReLUSAE,
    bridge: dict[str, float | int],
) -> None:
    """Print what reconstruction and clamps of several strengths do to text."""
    feature, maximum = int(bridge["feature"]), bridge["max_activation"]
    for strength in (0.0, 1.0, *STRENGTHS, 4.0):
        clamps = {feature: strength * maximum} if strength else {}
        share, texts = share_with_clamp(model, tokenizer, sae, clamps, PROMPTS)
        label = f"bridge at {strength:g}x max" if strength else "reconstruction"
        print(f"{label}: {share:.1%} bridge, {corpus.fluency(texts):.1%} fluent")
        print(f"    {texts[0]}")


def main() -> None:
    """Train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model-steps", type=int, default=600)
    parser.add_argument("--sae-steps", type=int, default=2500)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--sae-only", action="store_true", help="keep the model, train the SAE again"
    )
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to")
    options = parser.parse_args()
    start = time.perf_counter()
    torch.set_num_threads(options.threads)
    torch.manual_seed(SEED)

    tokenizer = corpus.build_tokenizer()
    if options.sae_only:
        model = LlamaForCausalLM.from_pretrained(options.out / "model").eval()
    else:
        model = train_model(tokenizer, options.model_steps)
        save_model(model, tokenizer, options.out / "model")

    torch.manual_seed(SEED)  # the SAE does not depend on how the model came to be
    x, _ = collect(model, tokenizer, SEED + 1, num_batches=60)
    sae = train_sae(x, D_SAE, options.sae_steps)
    sae.save(
        options.out / "sae",
        {
            "model_name": "golden-gate-tiny",
            "hook_name": f"blocks.{LAYER}.hook_resid_post",
            "context_size": MAX_WORDS,
            "prepend_bos": True,
            "sae_lens_version": "6.0.0",
        },
    )
    fresh, topics = collect(model, tokenizer, SEED + 2, num_batches=20)
    l0, fvu = quality(sae, fresh)
    table = feature_table(sae, fresh, topics)
    features = {
        "layer": LAYER,
        "d_sae": D_SAE,
        "l0": round(l0, 2),
        "fvu": round(fvu, 4),
        "strengths": STRENGTHS,
        "topics": table,
    }
    path = options.out / "features.json"
    path.write_text(json.dumps(features, indent=2) + "\n")
    print(json.dumps(features, indent=2))
    report_clamps(model, tokenizer, sae, table["bridge"])
    print(f"written to {options.out} in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
