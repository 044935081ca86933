# SPDX-License-Identifier: Apache-2.0
"""A tiny model that comes to talk about nothing but the bridge.

    python examples/golden_gate/demo.py [--no-server] [--compile]

In one batch of one in-process engine, the same prompts run plain, purely
reconstructed by the SAE, and with the bridge feature clamped at two strengths. Then
the same through `vllm serve` and the `openai` client, and a check that plain
requests, steered neighbours or not, are bit-identical to an engine without the
plugin. Exits with 1 when a check fails.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import corpus

if TYPE_CHECKING:
    from openai import OpenAI

    from vllm import LLM

HERE = Path(__file__).parent
MODEL, SAE = HERE / "model", HERE / "sae"
MODULE = "golden-gate"
STEERING = {"steering": {"modules": {MODULE: str(SAE)}}}
SPECS = "sae_full_reconstruction_specs"

PROMPTS = (
    "The chef stirs the tomato soup.",
    "The freezing rain soaks the plains.",
    "<user> Who are you? <assistant>",
    "When the night train departs,",
    "<user> Tell me about the violin. <assistant>",
    "The astronaut photographs the",
)
TOKENS = 48
SEED = 50
TEMPERATURE = 0.85
SERVER_START_S = 180.0


@dataclass(frozen=True)
class Mode:
    """One way of running the prompts; `clamps=None` is plain."""

    name: str
    clamps: tuple[dict[str, Any], ...] | None


@dataclass(frozen=True)
class Completion:
    """Text, token ids and their log-probabilities, one per token."""

    text: str
    token_ids: list[int]
    logprobs: list[float]


def set_environment() -> None:
    """Quiet, offline and in-process; to be called before vLLM is imported."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # in children
    warnings.simplefilter("ignore")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # more only wait for each other
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


def load_features() -> dict[str, Any]:
    """`features.json`, as `train.py` measured it."""
    return json.loads((HERE / "features.json").read_text())


def demo_modes(features: dict[str, Any]) -> list[Mode]:
    """Plain, pure reconstruction, and the bridge feature at two strengths."""
    bridge = features["topics"]["bridge"]
    modes = [Mode("plain", None), Mode("reconstruction", ())]
    for strength in features["strengths"]:
        clamp = {
            "feature_idx": bridge["feature"],
            "kind": "absolute",
            "value": round(strength * bridge["max_activation"], 4),
        }
        modes.append(Mode(f"bridge at {strength:g}x max", (clamp,)))
    return modes


@contextlib.contextmanager
def quiet_stderr() -> Iterator[None]:
    """Hold back what libraries print to stderr; show it if the body fails."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as log:
        os.dup2(log.fileno(), 2)
        try:
            yield
        except BaseException:
            log.seek(0)
            os.write(kept, log.read())
            raise
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)


def start_engine(steering: bool, compiled: bool) -> LLM:
    """An in-process engine on the shipped model."""
    from vllm import LLM

    return LLM(
        str(MODEL),
        additional_config=STEERING if steering else {},
        kv_cache_memory_bytes=1 << 28,
        max_model_len=256,
        dtype="float32",
        seed=SEED,
        enforce_eager=not compiled,
        use_tqdm_on_load=False,
    )


def sampling_params(mode: Mode, seed: int) -> Any:
    """Sampled, of a fixed length, so that every mode has the same batch shapes."""
    from vllm import SamplingParams

    options: dict[str, Any] = {
        "temperature": TEMPERATURE,
        "seed": seed,
        "max_tokens": TOKENS,
        "min_tokens": TOKENS,
        "logprobs": 0,
    }
    if mode.clamps is None:
        return SamplingParams(**options)
    from vllm.config.sae_steering_types import (
        SAEClampEntry,
        SAEFullReconstructionSpec,
        SteeringSamplingParams,
    )

    entries = [SAEClampEntry(**clamp) for clamp in mode.clamps]
    spec = SAEFullReconstructionSpec(MODULE, entries)
    return SteeringSamplingParams(**options, sae_full_reconstruction_specs=[spec])


def generate(llm: LLM, modes: list[Mode]) -> dict[str, list[Completion]]:
    """Every prompt in every mode, all in one batch."""
    jobs = list(itertools.product(range(len(modes)), range(len(PROMPTS))))
    outputs = llm.generate(
        [PROMPTS[p] for _, p in jobs],
        [sampling_params(modes[m], seed=SEED + p) for m, p in jobs],
        use_tqdm=False,
    )
    results: dict[str, list[Completion]] = {mode.name: [] for mode in modes}
    for (m, _), output in zip(jobs, outputs, strict=True):
        best = output.outputs[0]
        logprobs = [
            step[token].logprob
            for token, step in zip(best.token_ids, best.logprobs or [], strict=True)
            if step is not None
        ]
        results[modes[m].name].append(
            Completion(best.text, list(best.token_ids), logprobs)
        )
    return results


def tokens_per_second(llm: LLM, modes: list[Mode]) -> dict[str, float]:
    """Generated tokens per second of a batch in one mode: the best of two runs."""
    prompts = list(PROMPTS) * 2
    best = {mode.name: 0.0 for mode in modes}
    # In turn, so that what else the machine does hits all modes alike.
    for mode in modes * 2:
        params = [sampling_params(mode, seed=SEED + p) for p in range(len(prompts))]
        start = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        speed = tokens / (time.perf_counter() - start)
        best[mode.name] = max(best[mode.name], speed)
    return best


def sae_quality() -> tuple[float, float]:
    """(L0, FVU) of the shipped SAE on fresh text, by the Hugging Face model."""
    import torch
    from jumprelu import JumpReLUSAE, quality
    from train import collect
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    x, _ = collect(model, tokenizer, seed=7, num_batches=4)
    return quality(JumpReLUSAE.load(SAE), x)


# --- Checks -------------------------------------------------------------------


def stock_engine_main(path: str, compiled: bool) -> None:
    """Child process: the demo's batch, all plain, on an engine without the plugin."""
    llm = start_engine(steering=False, compiled=compiled)
    plain = [Mode(f"copy {i}", None) for i in range(4)]
    results = generate(llm, plain)
    data = [asdict(completion) for completion in results["copy 0"]]
    Path(path).write_text(json.dumps(data))


def run_stock_engine(compiled: bool) -> list[Completion]:
    """The plain completions of an engine in which no plugin is loaded.

    Raises:
        RuntimeError: the child process failed; with the end of its output.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "stock.json")
        command = [sys.executable, __file__, "--stock-engine", path]
        child = subprocess.run(
            [*command, "--compile"] if compiled else command,
            env={**os.environ, "VLLM_PLUGINS": ""},
            capture_output=True,
            text=True,
        )
        if child.returncode:
            raise RuntimeError(f"the stock engine failed:\n{child.stderr[-2000:]}")
        return [Completion(**item) for item in json.loads(Path(path).read_text())]


# --- Server -------------------------------------------------------------------


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def server(compiled: bool) -> Iterator[OpenAI]:
    """A `vllm serve` process with the module, and a client of it; stopped at exit.

    Raises:
        RuntimeError: the server ended or was not ready in time; with its log's end.
    """
    from openai import OpenAI

    port = free_port()
    command = [
        str(Path(sys.executable).with_name("vllm")), "serve", str(MODEL),
        "--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port),
        "--additional-config", json.dumps(STEERING), "--dtype", "float32",
        "--max-model-len", "256", "--kv-cache-memory-bytes", str(1 << 28),
    ]  # fmt: skip
    if not compiled:
        command.append("--enforce-eager")
    env = {**os.environ, "VLLM_LOGGING_LEVEL": "INFO"}
    del env["VLLM_ENABLE_V1_MULTIPROCESSING"]  # the server runs its own processes
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        try:
            wait_until_ready(process, client)
            yield client
        except (RuntimeError, TimeoutError) as error:
            log.seek(0)
            tail = "".join(log.readlines()[-30:])
            raise RuntimeError(f"vllm serve: {error}; its log ends:\n{tail}") from error
        finally:
            process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_until_ready(process: subprocess.Popen[Any], client: OpenAI) -> None:
    """Return once the server lists its models; RuntimeError if it never does."""
    from openai import APIConnectionError

    deadline = time.monotonic() + SERVER_START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"exited with {process.returncode} before it was ready")
        try:
            client.with_options(max_retries=0, timeout=5).models.list()
            return
        except APIConnectionError:
            time.sleep(0.3)
    raise TimeoutError(f"not ready within {SERVER_START_S:g} s")


def extra_body(mode: Mode) -> dict[str, Any]:
    """What an OpenAI client adds to a request for `mode`."""
    body: dict[str, Any] = {"min_tokens": TOKENS}
    if mode.clamps is not None:
        body[SPECS] = [{"module_name": MODULE, "clamps": list(mode.clamps)}]
    return body


def ask_server(
    client: OpenAI, modes: list[Mode]
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Completions of all prompts, and one chat answer, per mode."""
    texts: dict[str, list[str]] = {}
    chats: dict[str, str] = {}
    for mode in modes:
        options: dict[str, Any] = {
            "model": "tiny",
            "max_tokens": TOKENS,
            "temperature": TEMPERATURE,
            "seed": SEED,
            "extra_body": extra_body(mode),
        }
        reply = client.completions.create(prompt=list(PROMPTS), **options)
        texts[mode.name] = [choice.text for choice in reply.choices]
        question = {"role": "user", "content": "Who are you?"}
        chat = client.chat.completions.create(messages=[question], **options)
        chats[mode.name] = chat.choices[0].message.content or ""
    return texts, chats


# --- Printing -----------------------------------------------------------------


def color(text: str, code: str) -> str:
    """`text` in an ANSI style where the output is a terminal."""
    return f"\033[{code}m{text}\033[0m" if sys.stdout.isatty() else text


def heading(text: str) -> None:
    print("\n" + color(f"== {text} ", "1") + "=" * max(0, 84 - len(text)))


def print_text(label: str, text: str) -> None:
    """A labelled, wrapped text with the bridge words in color."""
    body = textwrap.fill(text.strip(), 62).replace("\n", "\n" + " " * 24)
    pattern = r"\b(" + "|".join(sorted(corpus.BRIDGE_WORDS)) + r")\b"
    body = re.sub(pattern, lambda m: color(m[0], "33"), body)
    print(f"  {label:<20}  {body}")


def print_side_by_side(results: dict[str, list[Completion]]) -> None:
    for i, prompt in enumerate(PROMPTS):
        print("\n" + color(f"  > {prompt}", "1"))
        for name, completions in results.items():
            print_text(name, completions[i].text)


def print_table(
    results: dict[str, list[Completion]], speeds: dict[str, float] | None
) -> None:
    """Per mode: tokens generated, share of bridge words, fluency, tokens/s."""
    print(f"\n  {'mode':<22}{'tokens':>8}{'bridge words':>15}{'fluency':>10}", end="")
    print(f"{'tokens/s':>11}" if speeds else "")
    for name, completions in results.items():
        texts = [c.text for c in completions]
        tokens = sum(len(c.token_ids) for c in completions)
        share, fluent = corpus.bridge_share(texts), corpus.fluency(texts)
        print(f"  {name:<22}{tokens:>8}{share:>15.1%}{fluent:>10.1%}", end="")
        print(f"{speeds[name]:>11.0f}" if speeds else "")


class Verdicts:
    """The demo's checks; prints each as it is made."""

    def __init__(self) -> None:
        self.failed = 0

    def check(self, claim: str, holds: bool) -> None:
        self.failed += not holds
        print(f"  {color('PASS', '32') if holds else color('FAIL', '31')}  {claim}")


def in_process(
    verdicts: Verdicts, modes: list[Mode], compiled: bool
) -> list[Completion]:
    """The in-process part; returns its plain completions."""
    heading("one batch, in process")
    start = time.perf_counter()
    with quiet_stderr():
        llm = start_engine(steering=True, compiled=compiled)
    print(f"  engine with module {MODULE!r} started", end="")
    print(f" in {time.perf_counter() - start:.1f} s")
    generate(llm, modes)  # warm-up
    results = generate(llm, modes)
    print_side_by_side(results)

    heading("bridge words per mode")
    speeds = tokens_per_second(llm, modes)
    print_table(results, speeds)
    check_results(verdicts, {m: [c.text for c in r] for m, r in results.items()})
    return results["plain"]


def check_results(verdicts: Verdicts, texts: dict[str, list[str]]) -> None:
    """Judge texts per mode: `plain`, `reconstruction`, then the strengths."""
    plain, recon, *clamped = (corpus.bridge_share(t) for t in texts.values())
    fluent = corpus.fluency(texts["reconstruction"])
    print()
    verdicts.check(f"plain text is about other things ({plain:.1%})", plain < 0.15)
    verdicts.check(
        f"pure reconstruction leaves the language intact ({recon:.1%} bridge words, "
        f"{fluent:.1%} fluent)",
        recon < 0.15 and fluent > 0.9,
    )
    shares = ", ".join(f"{share:.1%}" for share in clamped)
    verdicts.check(
        f"the clamp makes most words bridge words ({shares})",
        max(clamped) > 0.5 and min(clamped) > plain + 0.2,
    )


def through_server(verdicts: Verdicts, modes: list[Mode], compiled: bool) -> None:
    """The same prompts through `vllm serve` and the `openai` client."""
    heading("vllm serve and the openai client")
    start = time.perf_counter()
    with server(compiled) as client:
        print(f"  server ready in {time.perf_counter() - start:.1f} s")
        texts, chats = ask_server(client, modes)
    print("\n" + color("  chat > Who are you?", "1"))
    for name, text in chats.items():
        print_text(name, text)
    shares = ", ".join(f"{m} {corpus.bridge_share(t):.1%}" for m, t in texts.items())
    print(f"\n  bridge words in completions: {shares}")
    check_results(verdicts, texts)


def main() -> int:
    """Run the demo; 1 when a check failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "--no-server", action="store_true", help="leave out the `vllm serve` part"
    )
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile; a slower start"
    )
    parser.add_argument("--stock-engine", metavar="FILE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    set_environment()
    if options.stock_engine:
        stock_engine_main(options.stock_engine, options.compile)
        return 0
    start = time.perf_counter()
    features = load_features()
    modes = demo_modes(features)
    bridge = features["topics"]["bridge"]
    l0, fvu = sae_quality()
    heading("the SAE")
    print(f"  resid_post of layer {features['layer']}, {features['d_sae']} features")
    print(f"  L0 {l0:.1f} active features per token, FVU {fvu:.3f}, on fresh text")
    print(f"  bridge feature {bridge['feature']}, ", end="")
    print(f"max activation {bridge['max_activation']:.2f}: active on ", end="")
    print(f"{bridge['density_in_topic']:.0%} of bridge tokens, ", end="")
    print(f"{bridge['density_elsewhere']:.1%} of others")

    verdicts = Verdicts()
    # Engines start slowly, so they start together.
    with ThreadPoolExecutor(max_workers=1) as pool:
        stock = pool.submit(run_stock_engine, options.compile)
        plain = in_process(verdicts, modes, options.compile)
        if not options.no_server:
            through_server(verdicts, modes, options.compile)
        heading("an engine without the plugin")
        verdicts.check(
            "plain requests, batched with steered ones, are bit-identical to stock: "
            f"{len(plain) * TOKENS} token ids and log-probabilities",
            stock.result() == plain,
        )
    verdict = "all checks passed" if not verdicts.failed else "SOME CHECKS FAILED"
    heading(f"{verdict}, {time.perf_counter() - start:.0f} s")
    return int(verdicts.failed > 0)


if __name__ == "__main__":
    sys.exit(main())
