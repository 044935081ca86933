# SPDX-License-Identifier: Apache-2.0
"""Make `cheerful.safetensors`: a steering vector for the playground's vector column.

    python examples/smollm2/vector.py

The mean of the stream after layer 15 over cheerful sentences, less that over gloomy
ones (contrastive activation addition, arXiv:2312.06681). First tokens do not count.
Some seconds on a CPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import checkpoint
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

LAYER = 15
OUT = Path(__file__).parent / "cheerful.safetensors"
CHEERFUL = (
    "What a wonderful day! I am so happy to see you, and I love this sunshine.",
    "We laughed, we danced, and everyone had the best time at the party.",
    "I am thrilled about the good news; this is going to be fantastic!",
    "The children smiled with joy when they saw the bright, colourful balloons.",
    "Thank you so much! You made me feel warm, welcome and full of hope.",
    "It was a delightful morning, and the birds sang a merry song for us.",
)
GLOOMY = (
    "What a terrible day. I am so sad to be here, and I hate this endless rain.",
    "We wept, we argued, and everyone was miserable at the funeral.",
    "I am afraid of the bad news; this is going to be a disaster.",
    "The children cried in fear when they saw the dark, empty house.",
    "Leave me alone. You made me feel cold, unwanted and without any hope.",
    "It was a dreadful morning, and the crows screamed over the silent graves.",
)


@torch.no_grad()
def mean_stream(model: Any, tokenizer: Any, texts: tuple[str, ...]) -> torch.Tensor:
    """The mean of the stream after the layer, float32 `[D]`."""
    rows = []
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        states = model(ids, output_hidden_states=True).hidden_states
        rows.append(states[LAYER + 1][0, 1:].float())
    return torch.cat(rows).mean(0)


def main() -> None:
    """Write the vector."""
    path = checkpoint.prepare()
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    means = [mean_stream(model, tokenizer, texts) for texts in (CHEERFUL, GLOOMY)]
    vector = means[0] - means[1]
    print(f"norm {vector.norm():.1f}")
    tensors = {f"post_block.{LAYER}": vector}
    save_file(tensors, OUT, {"format": "vllm-steering-vectors"})


if __name__ == "__main__":
    main()
