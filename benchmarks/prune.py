"""Compare Wanda and SparseGPT with llm-compressor: time, perplexity, and the limit.

    python benchmarks/prune.py [--peer PYTHON] [--algorithm wanda,sparsegpt] [--repeats 3]
                               [--threads 1] [--windows 32] [--length 256] [--check]

The model is a Llama of about 120 M parameters (16 blocks, width 768, 12 heads, 2,048 neurons).
It starts random and is trained for a few steps on a made-up language: there is something to lose.
The calibration text is of the same language.

PYTHON is the interpreter of an environment of its own with llm-compressor
(`pip install llmcompressor`). Without it the peer is the algorithm as published, written out here.
It computes the sums of each layer separately and the inverse by two Cholesky decompositions.
It goes one column at a time, and sorts for each threshold.

The two take turns, each in a process of its own.
Only the pruning is timed, from a loaded model and tokenized windows.
Limit = the matrix products alone at the speed measured.
These are each window through the blocks once or twice, and X X^T of each input.
With `--check` the exit status is 1 unless ours is 1.5 x faster and perplexity is no worse.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]
BAR = 1.5
VOCABULARY = 8192


def language(rows: int, length: int, seed: int):
    """Return token ids [rows, length] of a made-up language.

    Few words are frequent, and what may follow a word depends on it.
    """
    import torch

    g = torch.Generator().manual_seed(seed)
    ids = (torch.rand(rows, length, generator=g) ** 3 * VOCABULARY).long()
    for t in range(1, length):
        follows = (ids[:, t - 1] * 31 + torch.randint(0, 4, (rows,), generator=g) * 1013 + 7) % 512
        ids[:, t] = torch.where(torch.rand(rows, generator=g) < 0.5, follows, ids[:, t])
    return ids


def make_model(folder: Path, steps: int, length: int):
    "Save the model, trained for a few steps."
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=16,
        num_attention_heads=12,
        num_key_value_heads=12,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95))
    for step in range(steps):
        ids = language(8, 64, 1000 + step)
        loss = model(ids, labels=ids).loss
        (
            optimizer.zero_grad(),
            loss.backward(),
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0),
            optimizer.step(),
        )
    model.save_pretrained(folder)
    # llm-compressor asks for a tokenizer, though the windows are tokens
    raw = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w2"))
    PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="w0", eos_token="w1", pad_token="w2"
    ).save_pretrained(folder)
    print(
        f"model: {sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters, {steps} "
        f"steps, loss {loss.item():.2f}",
        flush=True,
    )


def load(folder: str):
    import torch
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def finish(model, length: int, seconds: float, cpu: float):
    "Print the results: times, peak memory, sparsity, and perplexity on unseen text."
    import torch

    # since exec: ru_maxrss would begin at the parent's peak
    peak = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
    with torch.no_grad():
        ids = language(8, length, 2)
        loss = model(ids, labels=ids).loss.item()
    weights = [m.weight for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    zeros = sum((w == 0).sum().item() for w in weights) / sum(w.numel() for w in weights)
    print(
        json.dumps(
            dict(
                seconds=seconds,
                cpu=cpu,
                peak=peak,
                perplexity=float(torch.tensor(loss).exp()),
                sparsity=zeros,
            )
        )
    )


def ours(a, algorithm: str):
    from polm_lab.efficiency.prune import prune_model

    model, windows = load(a.folder), language(a.windows, a.length, 1)
    start, cpu = time.perf_counter(), time.process_time()
    list(prune_model(model, windows, [0.5] * len(model.model.layers), algorithm, rows=a.rows))
    finish(model, a.length, time.perf_counter() - start, time.process_time() - cpu)


def compressor(a, algorithm: str):
    "llm-compressor's oneshot with the same windows."
    import datasets
    import torch
    from llmcompressor import oneshot
    from loguru import logger
    from transformers import AutoTokenizer

    try:
        from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
    except ImportError:
        from llmcompressor.modifiers.obcq import SparseGPTModifier
        from llmcompressor.modifiers.pruning import WandaPruningModifier
    logger.remove()
    model, windows, tokenizer = (
        load(a.folder),
        language(a.windows, a.length, 1),
        AutoTokenizer.from_pretrained(a.folder),
    )
    data = datasets.Dataset.from_dict(
        {"input_ids": windows.tolist(), "attention_mask": torch.ones_like(windows).tolist()}
    )
    kind = WandaPruningModifier if algorithm == "wanda" else SparseGPTModifier
    start, cpu = time.perf_counter(), time.process_time()
    oneshot(
        model=model,
        processor=tokenizer,
        dataset=data,
        recipe=kind(sparsity=0.5, mask_structure="0:0", ignore=["re:.*lm_head"]),
        max_seq_length=a.length,
        num_calibration_samples=a.windows,
        batch_size=a.rows,
    )
    finish(model, a.length, time.perf_counter() - start, time.process_time() - cpu)


def published(a, algorithm: str):
    "Run the papers' algorithms, layer by layer and column by column."
    import torch

    model, windows = load(a.folder), language(a.windows, a.length, 1)
    start, cpu = time.perf_counter(), time.process_time()
    with torch.no_grad():
        inputs, kwargs = [], {}

        class Stop(Exception):
            pass

        def catch(block, args, kw):
            (
                inputs.append(args[0] if args else kw["hidden_states"]),
                kwargs.update({k: v for k, v in kw.items() if k != "hidden_states"}),
            )
            raise Stop

        hook = model.model.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
        for window in windows:
            try:
                model.model(window[None], use_cache=False)
            except Stop:
                pass
        hook.remove()
        for block in model.model.layers:
            layers, sums = [m for m in block.modules() if isinstance(m, torch.nn.Linear)], {}

            def add(layer, args, out):
                x = args[0].flatten(0, 1)
                sums[layer] = sums.get(layer, 0) + (
                    x.square().sum(0) if algorithm == "wanda" else x.T @ x
                )

            hooks = [layer.register_forward_hook(add) for layer in layers]
            for x in inputs:
                block(x, **kwargs)
            for hook in hooks:
                hook.remove()
            for layer in layers:
                W = layer.weight.data
                if algorithm == "wanda":
                    order = torch.sort(W.abs() * sums[layer].sqrt(), dim=1, stable=True).indices[
                        :, : W.shape[1] // 2
                    ]
                    W.scatter_(1, order, 0.0)
                    continue
                H = sums[layer]
                H.diagonal().add_(0.01 * H.diagonal().mean())
                U = torch.linalg.cholesky(
                    torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True
                )
                for i in range(0, W.shape[1], 128):
                    B, u = W[:, i : i + 128].clone(), U[i : i + 128, i : i + 128]
                    score, errors = B**2 / u.diagonal() ** 2, torch.zeros_like(B)
                    mask = score <= torch.sort(score.flatten())[0][score.numel() // 2]
                    for j in range(B.shape[1]):
                        q = B[:, j].clone()
                        q[mask[:, j]] = 0
                        error = (B[:, j] - q) / u[j, j]
                        B[:, j:] -= error[:, None] @ u[j, j:][None]
                        B[:, j], errors[:, j] = q, error
                    W[:, i : i + 128] = B
                    W[:, i + 128 :] -= errors @ U[i : i + 128, i + 128 :]
            inputs = [out if torch.is_tensor(out := block(x, **kwargs)) else out[0] for x in inputs]
    finish(model, a.length, time.perf_counter() - start, time.process_time() - cpu)


def limit(a, algorithm: str):
    """Return the seconds of the matrix products that cannot be avoided.

    They are each window through the linear layers (twice; down once less in the last block), and
    X X^T of the four inputs.
    """
    import torch

    model = load(a.folder)
    layers = {
        n: m for n, m in model.model.layers[0].named_modules() if isinstance(m, torch.nn.Linear)
    }
    tokens = a.rows * a.length
    x = {width: torch.randn(tokens, width) for width in (768, 2048)}

    def timed(call, times=5):
        call()
        found = []
        for _ in range(times):
            start = time.perf_counter()
            call()
            found.append(time.perf_counter() - start)
        return min(found)

    with torch.no_grad():
        forward = sum(timed(lambda m=m: m(x[m.in_features])) for m in layers.values())
        last = timed(lambda: layers["mlp.down_proj"](x[2048]))
        gram = (
            3 * timed(lambda: x[768].T @ x[768]) + timed(lambda: x[2048].T @ x[2048])
            if algorithm == "sparsegpt"
            else 0.0
        )
    blocks, batches = len(model.model.layers), a.windows / a.rows
    total = batches * (blocks * (forward - last + gram) + (blocks - 1) * forward)
    print(json.dumps(dict(seconds=total, cpu=total, peak=0, perplexity=0, sparsity=0)))


def child(a, python: str, what: str, algorithm: str) -> dict:
    "One measurement in a process of its own."
    words = [
        python,
        "-P",
        __file__,
        "--child",
        what,
        "--algorithm",
        algorithm,
        "--folder",
        a.folder,
        "--windows",
        a.windows,
        "--length",
        a.length,
        "--rows",
        a.rows,
        "--threads",
        a.threads,
    ]
    env = {
        **os.environ,
        "OMP_NUM_THREADS": str(a.threads),
        "HF_HUB_OFFLINE": "1",
        "TQDM_DISABLE": "1",
    }
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, env=env)
    if done.returncode:
        raise SystemExit(f"{what} {algorithm}: {done.stderr.strip()[-2000:]}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    print(
        f"{algorithm} {what}: {found['seconds']:.1f} s, CPU {found['cpu']:.1f} s",
        file=sys.stderr,
        flush=True,
    )
    return found


def medians(measured: tuple[dict, ...]) -> dict[str, float]:
    "Return the median of each figure."
    found = {}
    for name in measured[0]:
        found[name] = statistics.median(m[name] for m in measured)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in dict(
        repeats=3, threads=1, windows=32, length=128, rows=4, train=12
    ).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--algorithm", default="wanda,sparsegpt")
    parser.add_argument(
        "--peer",
        default=os.environ.get("POLM_LLMCOMPRESSOR", ""),
        help="python of an environment with llm-compressor",
    )
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--check", action="store_true")
    a = parser.parse_args()
    if a.child:
        import torch

        torch.set_num_threads(a.threads)
        {"ours": ours, "compressor": compressor, "published": published, "limit": limit}[a.child](
            a, a.algorithm
        )
        return 0
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        a.folder = a.folder or folder
        if not (Path(a.folder) / "config.json").exists():
            make_model(Path(a.folder), a.train, a.length)
        peers = {"compressor": a.peer} if a.peer else {"published": sys.executable}
        print(
            f"{a.windows} windows of {a.length} tokens, {a.threads} thread(s), load "
            f"{os.getloadavg()[0]:.1f}\n"
        )
        print(
            "| method | peer | ours, s | peer, s | peer / ours (min–max) | CPU time, peer / ours "
            "| peak MiB, ours : peer | perplexity, ours : peer | sparsity | limit, s (share of "
            "ours) |"
        )
        print("|---|---|---|---|---|---|---|---|---|---|")
        for algorithm in a.algorithm.split(","):
            for name, python in peers.items():
                pairs = [
                    (child(a, sys.executable, "ours", algorithm), child(a, python, name, algorithm))
                    for _ in range(a.repeats)
                ]
                ratios = [theirs["seconds"] / mine["seconds"] for mine, theirs in pairs]
                work = statistics.median(theirs["cpu"] / mine["cpu"] for mine, theirs in pairs)
                mine, theirs = (medians(each) for each in zip(*pairs))
                least = min(
                    child(a, sys.executable, "limit", algorithm)["seconds"] for _ in range(2)
                )
                ratio = statistics.median(ratios)
                missed += ratio < BAR or mine["perplexity"] > theirs["perplexity"] * 1.005
                print(
                    f"| {algorithm} | {name} | {mine['seconds']:.1f} | {theirs['seconds']:.1f} | "
                    f"{ratio:.2f} ({min(ratios):.2f}–{max(ratios):.2f}) | {work:.2f} | "
                    f"{mine['peak']:.0f} : {theirs['peak']:.0f} "
                    f"| {mine['perplexity']:.1f} : {theirs['perplexity']:.1f} | "
                    f"{mine['sparsity']:.3f} : {theirs['sparsity']:.3f} | {least:.1f} "
                    f"({least / mine['seconds']:.0%}) |",
                    flush=True,
                )
    return int(a.check and missed > 0)


if __name__ == "__main__":
    sys.exit(main())
