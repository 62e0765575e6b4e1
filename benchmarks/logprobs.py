"""Compare the log-prob kernel with the dense path: time, peak memory and gradients.

    python benchmarks/logprobs.py [--vocab 128256] [--width 512] [--rows 2048] [--threads 2]
                                  [--repeats 3] [--check]

One forward and backward pass is measured, each time in a process of its own.
Dense = `F.linear(hidden, weight)`, `log_softmax`, `gather`, autograd.

Memory = highest resident set during one call, less the resident set just before it.
By then inputs are loaded and thread pools warm, so it is everything that the call adds.
It includes the gradient of the weight, [vocab, width], which both paths must return.
The column `without dW` subtracts that gradient from both.

Time = best of `repeats` calls after a warm-up; dense and ours take turns.
The column `cpu s` = processor time of all threads, which other work does not stretch.
Limit = the matrix products alone, at the speed measured for that shape.
Dense has 3 of them; ours has a fourth, since it recomputes the logits in the backward pass.
Linux only (/proc). With `--check` the exit status is 1 unless the bars hold.
"""

import argparse
import json
import subprocess
import sys
import time

CASES = {  # name: (kind of loss, who asks for gradients)
    "log-prob": ("logp", "hidden weight"),
    "log-prob, frozen head": ("logp", "hidden"),
    "log-prob, no gradient": ("logp", ""),
    "log-prob and entropy": ("entropy", "hidden weight"),
    "KL to a reference": ("kl", "hidden weight"),
    "JSD to a teacher": ("jsd", "hidden weight"),
}


def one(args):
    "In a child process: measure one variant of one case, print JSON."
    import torch
    import torch.nn.functional as F

    from polm_lab.efficiency.distillation.divergences import comparison
    from polm_lab.models.logprobs import Readout, divergence_in_parts, full_kl, selected_logprobs

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    kind, wants = CASES[args.case]
    hidden = torch.empty(args.rows, args.width).normal_().requires_grad_("hidden" in wants)
    weight = torch.empty(args.vocab, args.width).normal_(std=0.05).requires_grad_("weight" in wants)
    ref = torch.empty(args.vocab, args.width).normal_(std=0.05) if kind in ("kl", "jsd") else None
    jsd = comparison("jsd", 0.5, 1.0)
    targets, by = torch.randint(args.vocab, (args.rows,)), torch.randn(2, args.rows)

    def dense(hidden, weight, targets, by):
        if kind == "jsd":
            with torch.no_grad():
                constant = F.linear(hidden, ref)
            return jsd(F.linear(hidden, weight), constant) @ by[0]
        logp = F.log_softmax(F.linear(hidden, weight), -1)
        if kind == "kl":
            with torch.no_grad():
                q = F.log_softmax(F.linear(hidden, ref), -1)
            return (logp.exp() * (logp - q)).sum(-1) @ by[0]
        loss = logp.gather(-1, targets[:, None])[:, 0] @ by[0]
        return loss - (logp.exp() * logp).sum(-1) @ by[1] if kind == "entropy" else loss

    def ours(hidden, weight, targets, by):
        if kind == "jsd":
            parts = divergence_in_parts(jsd, hidden, Readout(weight), hidden, Readout(ref))
            return parts @ by[0]
        if kind == "kl":
            return full_kl(hidden, weight, hidden, ref) @ by[0]
        logp, entropy = selected_logprobs(hidden, weight, targets, entropy=kind == "entropy")
        return logp @ by[0] + (entropy @ by[1] if kind == "entropy" else 0)

    def run(path, rows=args.rows):
        hidden.grad = weight.grad = None
        with torch.set_grad_enabled(bool(wants)):
            loss = path(hidden[:rows], weight, targets[:rows], by[:, :rows])
        if wants:
            loss.backward()

    def resident(field):
        with open("/proc/self/status") as f:
            return next(int(line.split()[1]) / 1024 for line in f if line.startswith(field))

    path = {"dense": dense, "ours": ours}[args.one]
    if args.measure == "memory":
        run(path, rows=2)
        hidden.grad = weight.grad = None
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")  # sets VmHWM, the highest resident set, back to the present one
        before = resident("VmRSS")
        run(path)
        return {"mib": resident("VmHWM") - before}
    if args.measure == "gradient":
        found = []
        for path in (dense, ours):
            run(path)
            found.append([t.grad for t in (hidden, weight) if t.grad is not None])
        pairs = list(zip(*found))
        return {
            "largest": max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs),
            "norm": max(float((a - b).norm() / a.norm()) for a, b in pairs),
        }
    if args.measure == "speed":  # GFLOP/s of the three products, at the shapes that the kernel uses
        step = 2048
        z, w, h, out = (
            torch.empty(args.rows, step),
            weight[:step].detach(),
            hidden.detach(),
            torch.empty(step, args.width),
        )

        def gflops(product):
            best = min(timed(product) for _ in range(5))
            return 2 * args.rows * args.width * step / best / 1e9

        return {
            "z": gflops(lambda: torch.mm(h, w.T, out=z)),
            "dh": gflops(lambda: torch.mm(z, w)),
            "dw": gflops(lambda: torch.mm(z.T, h, out=out)),
        }
    run(path)
    busy = time.process_time()
    seconds = timed(lambda: run(path))
    return {"seconds": seconds, "cpu": time.process_time() - busy}


def timed(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def lowest(times: dict[str, list[dict]], unit: str) -> dict[str, float]:
    "Return the lowest figure `unit` of each path."
    found = {}
    for name, each in times.items():
        found[name] = min(one[unit] for one in each)
    return found


def child(args, **change):
    options = {**{k: v for k, v in vars(args).items() if k not in ("check", "repeats")}, **change}
    command = [
        sys.executable,
        __file__,
        *(str(x) for k, v in options.items() if v is not None for x in (f"--{k}", v)),
    ]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in (
        ("vocab", 128256),
        ("width", 512),
        ("rows", 2048),
        ("threads", 2),
        ("repeats", 3),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--case", choices=CASES, help="this case only")
    parser.add_argument(
        "--check",
        action="store_true",
        help=(
            "exit 1 unless memory <= 1/10, time <= 1.3 x dense, gradients within 1e-5 in the case "
            "log-prob"
        ),
    )
    parser.add_argument("--one", choices=["dense", "ours"], help=argparse.SUPPRESS)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args)))
        return 0
    weight_mib, product = (
        args.vocab * args.width * 4 / 2**20,
        2 * args.vocab * args.width * args.rows / 1e9,
    )
    print(
        f"vocabulary {args.vocab:,}, width {args.width}, {args.rows:,} rows, fp32, {args.threads} "
        f"threads; dW = {weight_mib:.0f} MiB"
    )
    print(
        f"{'case':24}{'':7}{'seconds':>9}{'cpu s':>8}{'limit':>8}{'MiB':>8}{'without dW':>12}"
        f"{'max diff':>10}{'norm diff':>10}"
    )
    held = True
    for case in [args.case] if args.case else CASES:
        kind, wants = CASES[case]
        times = {"dense": [], "ours": []}
        for _ in range(args.repeats):
            for name in times:
                times[name].append(child(args, one=name, case=case, measure="time"))
        best, cpu = lowest(times, "seconds"), lowest(times, "cpu")
        memory = {name: child(args, one=name, case=case, measure="memory")["mib"] for name in times}
        speed = child(args, one="ours", case=case, measure="speed")
        forward = product / speed["z"] * (2 if kind in ("kl", "jsd") else 1)
        backward = ("hidden" in wants) * product / speed["dh"] + (
            "weight" in wants
        ) * product / speed["dw"]
        limits = {"dense": forward + backward, "ours": forward * (2 if wants else 1) + backward}
        apart = (
            child(args, one="ours", case=case, measure="gradient")
            if wants
            else {"largest": 0.0, "norm": 0.0}
        )
        for name in times:
            own = memory[name] - weight_mib * ("weight" in wants)
            tail = f"{apart['largest']:10.1e}{apart['norm']:10.1e}" if name == "ours" else ""
            print(
                f"{case:24}{name:7}{best[name]:9.2f}{cpu[name]:8.2f}{limits[name]:8.2f}"
                f"{memory[name]:8.0f}{own:12.0f}{tail}",
                flush=True,
            )
        slower, smaller = best["ours"] / best["dense"], memory["ours"] / memory["dense"]
        print(
            f"{'':24}{'ratio':7}{slower:9.2f}{cpu['ours'] / cpu['dense']:8.2f}{'':8}{smaller:8.3f}",
            flush=True,
        )
        if case == "log-prob":
            held = smaller <= 0.1 and slower <= 1.3 and apart["largest"] <= 1e-5
    return 0 if held or not args.check else 1


if __name__ == "__main__":
    sys.exit(main())
