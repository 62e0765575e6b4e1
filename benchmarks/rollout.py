"""Compare sampling with `model.generate`: tokens per second, and the limit.

    python benchmarks/rollout.py [--prompts 8] [--num_generations 8] [--read 192] [--new 64]
                                 [--threads 2] [--repeats 5] [--check]

The model is a Llama of about 10 M random parameters in fp32.
It has 6 layers, width 320 and a vocabulary of 4,096.
Its peer `generate` gets the prompts repeated `num_generations` times, `do_sample=True`, and the same
limit.
The end tokens are the same too: 99 ids of the vocabulary.
A row then ends with probability 0.024 a token, and lengths vary.

The two take turns in one process.
The figure is the median of the ratios of neighbouring runs, in new tokens per second.
End tokens are counted, padding is not.
`plain` is `rollout(share=False)`: one prefill, a cache written in place, rows that leave.
It has a copy of the prompt's keys and values for each row.

Limit = the matrix products that cannot be avoided, at the speed measured for those shapes.
Those are every prompt token once, and every new token that is read once.
Attention, norms, sampling and Python come on top.
With `--check` the exit status is 1 unless the ratio is 2 or more.
"""

import argparse
import statistics
import sys
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from polm_lab.models.rollout import rollout

ENDS = list(range(1, 100))


def timed(call):
    start = time.perf_counter()
    out = call()
    return out, time.perf_counter() - start


def gemm_seconds(model, rows, times):
    """Return the seconds of the linear layers of one forward pass over `rows` tokens.

    They run as bare matrix products; the result is the median of `times`.
    """
    layers = [
        m
        for name, m in model.named_modules()
        if isinstance(m, torch.nn.Linear) and name != "lm_head"
    ]
    pairs = [(m.weight, torch.randn(rows, m.in_features)) for m in layers]

    def products():
        for weight, x in pairs:
            torch.nn.functional.linear(x, weight)

    products()
    return statistics.median(timed(products)[1] for _ in range(times))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in dict(
        prompts=8, num_generations=8, read=192, new=64, threads=2, repeats=5
    ).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--check", action="store_true")
    a = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=4096,
            hidden_size=320,
            intermediate_size=864,
            num_hidden_layers=6,
            num_attention_heads=5,
            num_key_value_heads=5,
            max_position_embeddings=max(512, a.read + a.new),
            bos_token_id=0,
            eos_token_id=ENDS,
            pad_token_id=0,
        )
    ).eval()
    prompts = torch.randint(100, 4096, (a.prompts, a.read))
    repeated, ends = prompts.repeat_interleave(a.num_generations, 0), torch.tensor(ENDS)

    def by_generate(seed):
        torch.manual_seed(seed)
        mask = torch.ones_like(repeated)
        out = model.generate(
            repeated,
            attention_mask=mask,
            do_sample=True,
            top_k=0,
            max_new_tokens=a.new,
            pad_token_id=0,
        )
        hit = torch.isin(out[:, a.read :], ends)
        return torch.where(hit.any(1), hit.int().argmax(1) + 1, hit.shape[1]).tolist()

    def by_rollout(seed, share=True):
        return list(
            map(
                len,
                rollout(
                    model, None, prompts.tolist(), a.num_generations, a.new, seeds=seed, share=share
                ).completions,
            )
        )

    ways = {"generate": by_generate, "plain": lambda s: by_rollout(s, False), "rollout": by_rollout}
    rates, seconds, lengths = {w: [] for w in ways}, {w: [] for w in ways}, {}
    with torch.no_grad():
        for seed in range(-1, a.repeats):  # -1: warm-up
            for way, sample in ways.items():
                lengths[way], spent = timed(lambda: sample(seed + 1))
                if seed >= 0:
                    rates[way].append(sum(lengths[way]) / spent)
                    seconds[way].append(spent)
        # the limit, for the last rollout: all prompt tokens, then each step's rows, and the head
        # for every sampled token
        sizes = []
        for t in range(1, max(lengths["rollout"])):
            sizes.append(sum(n > t for n in lengths["rollout"]))
        padded = sorted({8 * -(-n // 8) for n in sizes})
        cost = {rows: gemm_seconds(model, rows, 5) for rows in padded}
        body = gemm_seconds(model, a.prompts * a.read, 3) + sum(
            cost[8 * -(-n // 8)] * n / (8 * -(-n // 8)) for n in sizes
        )
        x = torch.randn(a.prompts * a.num_generations, 320)
        head = (
            statistics.median(timed(lambda: model.lm_head(x))[1] for _ in range(9))
            / len(x)
            * sum(lengths["rollout"])
        )
        limit = body + head
        read = statistics.median(
            timed(lambda: model(prompts, logits_to_keep=1))[1] for _ in range(3)
        )

    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{parameters / 1e6:.1f} M parameters, {a.prompts} prompts x {a.num_generations} samples, "
        f"{a.read} prompt tokens, up to {a.new} new, "
        f"{a.threads} threads"
    )
    lasting = lengths["rollout"]
    print(
        f"new tokens a row: {min(lasting)} to {max(lasting)}, mean {statistics.mean(lasting):.0f}\n"
    )
    print(f"{'':10}{'seconds':>9}{'tokens/s':>10}{'x generate':>12}")
    for way in ways:
        ratio = statistics.median(r / g for r, g in zip(rates[way], rates["generate"]))
        print(
            f"{way:10}{statistics.median(seconds[way]):9.2f}"
            f"{statistics.median(rates[way]):10.0f}{ratio:12.2f}"
        )
    last = seconds["rollout"][-1]
    print(
        f"\nlimit: {limit:.2f} s of matrix products ({limit / last:.0%} of the last rollout's "
        f"{last:.2f} s); "
        f"reading the prompts once takes {read:.2f} s"
    )
    if a.check and ratio < 2:
        sys.exit(f"rollout is {ratio:.2f} x generate; the bar is 2")


if __name__ == "__main__":
    main()
