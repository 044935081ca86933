# SPDX-License-Identifier: Apache-2.0
"""The same full reconstruction by this project and by other libraries, on a CPU.

    python benchmarks/bench_peers.py MODEL SAE SAELENS [--out FILE]

MODEL is a Hugging Face checkpoint of a Llama model, SAE a native directory with one
`post_block` site, SAELENS the same SAE as SAELens stores it. Each library answers the
same prompts greedily in float32, plain and with the stream after one layer replaced by
the SAE's reconstruction, but for the first token. Sixteen prompts go in one batch, and
one goes alone. Each library has a process of its own. Libraries that are not installed
are left out.

The figures are medians of tokens per second of processor time, which other processes
change little, and of tokens per second by the clock; and the share of tokens that equal
those of Hugging Face with a hook.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from facts import commit
from safetensors.torch import load_file

PROMPTS = [f"The most important thing about {thing} is" for thing in (
    "the sea", "bread", "winter", "music", "trains", "France", "chess", "gardens",
    "the moon", "history", "dogs", "rivers", "glass", "sleep", "letters", "gold",
)]  # fmt: skip
REFERENCE = "Hugging Face, forward hook"
OURS = "this project"
Edit = Callable[[torch.Tensor], torch.Tensor]
# Prompts `[n, T]`, and whether the stream is reconstructed -> new tokens.
Answer = Callable[[torch.Tensor, bool], list[list[int]]]


@dataclass(frozen=True)
class Task:
    """What every library is asked to do."""

    checkpoint: Path
    model: torch.nn.Module
    tokenizer: Any
    layer: int
    edit: Edit
    sae: Path
    saelens: Path
    new: int  # tokens that are generated


def reconstruct(weights: dict[str, torch.Tensor]) -> Edit:
    """A JumpReLU SAE in plain PyTorch; `b_enc` includes what `b_dec` does to it."""
    w = {name: tensor.float() for name, tensor in weights.items()}

    def edit(x: torch.Tensor) -> torch.Tensor:
        p = x @ w["W_enc"].T + w["b_enc"]
        return (p * (p > w["threshold"])) @ w["W_dec"] + w["b_dec"]

    return edit


def but_first(x: torch.Tensor, edit: Edit) -> torch.Tensor:
    """Edit all tokens of a prompt `[n, T, D]` but its first, or a step's one token."""
    if x.shape[1] == 1:
        return edit(x)
    return torch.cat([x[:, :1], edit(x[:, 1:])], dim=1)


@torch.no_grad()
def generate(model: torch.nn.Module, ids: torch.Tensor, new: int) -> list[list[int]]:
    """Greedy answers of Hugging Face's `generate`."""
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new
    )
    return out[:, ids.shape[1] :].tolist()


@contextmanager
def hooked(layer: torch.nn.Module, edit: Edit) -> Iterator[None]:
    """A forward hook that edits what a layer returns."""
    handle = layer.register_forward_hook(lambda m, args, out: but_first(out, edit))
    try:
        yield
    finally:
        handle.remove()


def by_hook(task: Task, edit: Edit) -> Answer:
    """Hugging Face with a forward hook."""

    def answer(ids: torch.Tensor, steered: bool) -> list[list[int]]:
        if not steered:
            return generate(task.model, ids, task.new)
        with hooked(task.model.model.layers[task.layer], edit):
            return generate(task.model, ids, task.new)

    return answer


def by_saelens(task: Task) -> Answer:
    """SAELens' SAE in the hook."""
    from sae_lens import SAE

    sae = SAE.load_from_disk(task.saelens).float()
    return by_hook(task, lambda x: sae.decode(sae.encode(x)))


def by_transformer_lens(task: Task) -> Answer:
    """TransformerLens' `TransformerBridge`, and SAELens' SAE in its hook."""
    from sae_lens import SAE
    from transformer_lens.model_bridge import TransformerBridge

    sae = SAE.load_from_disk(task.saelens).float()
    bridge = TransformerBridge.boot_transformers(
        str(task.checkpoint), tokenizer=task.tokenizer, dtype=torch.float32
    )
    point = f"blocks.{task.layer}.hook_resid_post"

    @torch.no_grad()
    def answer(ids: torch.Tensor, steered: bool) -> list[list[int]]:
        edit = [(point, lambda x, hook: but_first(x, sae.forward))]
        with bridge.hooks(fwd_hooks=edit if steered else []):
            out = bridge.generate(
                ids, max_new_tokens=task.new, stop_at_eos=False, do_sample=False,
                verbose=False, return_type="tokens",
            )  # fmt: skip
        return out[:, ids.shape[1] :].tolist()

    return answer


def by_nnsight(task: Task) -> Answer:
    """nnsight, which edits the layer's output in each step."""
    from nnsight import LanguageModel, save

    wrapped = LanguageModel(task.model, tokenizer=task.tokenizer)
    layer, edit, new = task.layer, task.edit, task.new
    sampling = {"do_sample": False, "max_new_tokens": new}

    @torch.no_grad()
    def answer(ids: torch.Tensor, steered: bool) -> list[list[int]]:
        mask = torch.ones_like(ids)
        inputs = {"input_ids": ids, "attention_mask": mask}
        with wrapped.generate(inputs, **sampling) as tracer:
            if steered:
                for _ in tracer.iter[:new]:
                    found = wrapped.model.layers[layer].output
                    wrapped.model.layers[layer].output = but_first(found, edit)
            out = save(tracer.result)
        return out[:, ids.shape[1] :].tolist()

    return answer


def by_vllm(task: Task) -> Answer:
    """This project; the manifest's norm guard leaves out the first token."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams

    # An end in an answer is a token as any other here.
    module = {"path": str(task.sae), "skip_token_ids": []}
    llm = LLM(
        str(task.checkpoint),
        dtype="float32",
        max_model_len=128,
        max_num_seqs=len(PROMPTS),
        enable_prefix_caching=False,
        kv_cache_memory_bytes=1 << 28,
        additional_config={"steering": {"modules": {"sae": module}}},
    )
    spec = {"module_name": "sae", "clamps": {}}

    def answer(ids: torch.Tensor, steered: bool) -> list[list[int]]:
        sampling = SamplingParams(
            temperature=0, max_tokens=task.new, ignore_eos=True, detokenize=False,
            extra_args={"sae_full_reconstruction_specs": [spec]} if steered else None,
        )  # fmt: skip
        prompts = [{"prompt_token_ids": row} for row in ids.tolist()]
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return answer


# Name -> the packages that it needs, and how it answers.
LIBRARIES: dict[str, tuple[tuple[str, ...], Callable[[Task], Answer]]] = {
    REFERENCE: (("transformers",), lambda task: by_hook(task, task.edit)),
    "Hugging Face, SAELens": (("sae_lens",), by_saelens),
    "TransformerLens, SAELens": (("transformer_lens", "sae_lens"), by_transformer_lens),
    "nnsight": (("nnsight",), by_nnsight),
    OURS: (("vllm",), by_vllm),
}


def measure(answer: Answer, ids: torch.Tensor, rounds: int) -> dict[str, Any]:
    """By case: the tokens, and tokens per second of both clocks."""
    report: dict[str, Any] = {}
    for batch in (ids, ids[:1]):
        for steered in (False, True):
            used, clock = [], []
            found = answer(batch, steered)  # warms up
            for _ in range(rounds):
                wall, start = time.perf_counter(), time.process_time()
                found = answer(batch, steered)
                spent = time.process_time() - start, time.perf_counter() - wall
                count = sum(map(len, found))
                used.append(count / spent[0])
                clock.append(count / spent[1])
            kind = "reconstructed" if steered else "plain"
            report[f"{len(batch)} prompts, {kind}"] = {
                "per_processor_second": round(statistics.median(used), 1),
                "per_second": round(statistics.median(clock), 1),
                "tokens": found,
            }
    return report


def in_a_process(name: str, arguments: list[str]) -> dict[str, Any]:
    """What a library measures in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "report.json"
        command = [sys.executable, __file__, *arguments, "--library", name]
        subprocess.run([*command, "--out", str(out)], check=True)
        return json.loads(out.read_text())


def compare(reports: dict[str, dict[str, Any]]) -> None:
    """Replace the tokens by the share that equals the reference's."""
    expected = {case: r.pop("tokens") for case, r in reports[REFERENCE].items()}
    for report in reports.values():
        for case, figures in report.items():
            tokens = torch.tensor(figures.pop("tokens", expected[case]))
            same = (tokens == torch.tensor(expected[case])).float().mean()
            figures["equal_tokens"] = round(same.item(), 4)


def make_task(options: argparse.Namespace) -> Task:
    """Load model and SAE."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (site,) = json.loads((options.sae / "manifest.json").read_text())["sites"]
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    # Nobody stops before the last token, and nobody keeps from writing an end.
    model.generation_config.eos_token_id = None
    return Task(
        checkpoint=options.model,
        model=model.eval(),
        tokenizer=AutoTokenizer.from_pretrained(options.model),
        layer=site["layer"],
        edit=reconstruct(load_file(options.sae / site["file"])),
        sae=options.sae,
        saelens=options.saelens,
        new=options.tokens,
    )


def environment() -> dict[str, object]:
    """Processor, threads and versions."""
    packages = ["torch", "transformers", "sae-lens", "transformer-lens", "nnsight"]
    found: dict[str, object] = {
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "commit": commit() or "not a git checkout",
        "date": time.strftime("%Y-%m-%d"),
    }
    for package in packages:
        if importlib.util.find_spec(package.replace("-", "_")):
            found[package] = version(package)
    return found


def main() -> None:
    """Let each library answer in a process of its own, and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("sae", type=Path)
    parser.add_argument("saelens", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=32, help="new ones, a prompt")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--library", choices=LIBRARIES, help="only this one")
    options = parser.parse_args()
    if options.library:
        task = make_task(options)
        rows = [task.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
        width = min(map(len, rows))
        ids = torch.tensor([row[:width] for row in rows])
        report = measure(LIBRARIES[options.library][1](task), ids, options.rounds)
        options.out.write_text(json.dumps(report))
        return
    paths = [str(p) for p in (options.model, options.sae, options.saelens)]
    arguments = [*paths, f"--rounds={options.rounds}", f"--tokens={options.tokens}"]
    reports = {
        name: in_a_process(name, arguments)
        for name, (packages, _) in LIBRARIES.items()
        if all(map(importlib.util.find_spec, packages))
    }
    compare(reports)
    for name, report in reports.items():
        for case, figures in report.items():
            print(f"{name:26} {case:28}", *figures.values())
    if options.out:
        content = {"environment": environment(), "libraries": reports}
        options.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
