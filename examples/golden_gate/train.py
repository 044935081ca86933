# SPDX-License-Identifier: Apache-2.0
"""Train the demo's model and SAE, and measure which feature is which topic.

    python examples/golden_gate/train.py

It rewrites `model/` and `sae/` beside this file from a fixed seed, in a few minutes on
two CPU cores. No data and no weights are downloaded.
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
TARGET_L0 = 12.0


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


def contrast(
    feature_acts: torch.Tensor, topics: torch.Tensor, index: int
) -> torch.Tensor:
    """`[d_sae]`: share of the topic's tokens on which a feature is active, less the
    share of all other tokens."""
    active = (feature_acts > 0).float()
    inside = topics == index
    return active[inside].mean(0) - active[~inside].mean(0)


def describe(
    feature_acts: torch.Tensor, topics: torch.Tensor, index: int, feature: int
) -> dict[str, float | int]:
    """How `feature` behaves inside and outside the topic `index`."""
    values, inside = feature_acts[:, feature], topics == index
    row = {
        "max_activation": values.max(),
        "mean_activation": values[inside & (values > 0)].mean(),
        "density_in_topic": (values[inside] > 0).float().mean(),
        "density_elsewhere": (values[~inside] > 0).float().mean(),
    }
    rounded = {name: round(float(value), 4) for name, value in row.items()}
    return {"feature": feature, **rounded}


def feature_table(
    feature_acts: torch.Tensor, topics: torch.Tensor
) -> dict[str, dict[str, float | int]]:
    """For each topic, the feature most specific to it, by `contrast`."""
    table = {}
    for index, topic in enumerate(corpus.TOPICS):
        feature = int(contrast(feature_acts, topics, index).argmax())
        table[topic.name] = describe(feature_acts, topics, index, feature)
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
                ids,
                do_sample=True,
                temperature=0.7,
                max_new_tokens=48,
                min_new_tokens=48,
            )
        new = out[:, ids.shape[1] :]
        texts += tokenizer.batch_decode(new, skip_special_tokens=True)
    return corpus.bridge_share(texts), texts


# Strengths of the demo, as multiples of the bridge feature's largest activation.
STRENGTHS = (1.25, 2.0)
D_SAE = 512
PROMPTS = [
    "the chef stirs the tomato soup .",
    "the rain soaks the plains .",
    "<user> who are you ? <assistant>",
    "the night train departs and",
]


def choose_bridge_feature(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    sae: JumpReLUSAE,
    feature_acts: torch.Tensor,
    topics: torch.Tensor,
) -> dict[str, float | int]:
    """The bridge feature that steers best, among the three of largest contrast.

    Several features may stand for the topic, each for another part of speech; the best
    gives the most bridge words in the most fluent text at the weaker strength.
    """
    best, best_score = {}, -1.0
    for candidate in contrast(feature_acts, topics, 0).topk(3).indices.tolist():
        row = describe(feature_acts, topics, 0, candidate)
        clamps = {candidate: STRENGTHS[0] * row["max_activation"]}
        share, texts = share_with_clamp(model, tokenizer, sae, clamps, PROMPTS)
        score = share * corpus.fluency(texts)
        print(f"bridge candidate {candidate}: share x fluency {score:.3f}", flush=True)
        if score > best_score:
            best, best_score = row, score
    return best


def report_clamps(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    sae: JumpReLUSAE,
    bridge: dict[str, float | int],
) -> None:
    """Print what reconstruction and clamps of several strengths do to text."""
    feature, maximum = int(bridge["feature"]), bridge["max_activation"]
    for strength in (0.0, 1.0, *STRENGTHS, 5.0):
        clamps = {feature: strength * maximum} if strength else {}
        share, texts = share_with_clamp(model, tokenizer, sae, clamps, PROMPTS)
        label = f"bridge at {strength:g}x max" if strength else "reconstruction"
        print(f"{label}: {share:.1%} bridge, {corpus.fluency(texts):.1%} fluent")
        print(f"    {texts[0]}")


def main() -> None:
    """Train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model-steps", type=int, default=600)
    parser.add_argument("--sae-steps", type=int, default=1500)
    parser.add_argument("--threads", type=int, default=1)
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

    torch.manual_seed(
        SEED
    )  # so that the SAE does not depend on the training of the model
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
    feature_acts = sae.encode(fresh)
    table = feature_table(feature_acts, topics)
    table["bridge"] = choose_bridge_feature(model, tokenizer, sae, feature_acts, topics)
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
