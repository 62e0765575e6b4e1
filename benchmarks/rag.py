"""Compare the index of passages with bm25s and FAISS called directly.

    python benchmarks/rag.py [--passages 100000] [--words 80] [--width 384] [--queries 200]
                             [--threads 2] [--repeats 3] [--check]

It measures build rate, memory, and time of a query.
Passages are made of 50,000 words drawn as in real text (Zipf), questions of 8 words of a passage.
For dense search the vectors are given (random, of length 1): the index is measured, not an encoder.
The time in which `tiny` encodes a question is printed separately.
The build from texts with that encoder is a case of its own (`encoded`, 2,000 passages).
Each measurement is a process of its own; ours and the library take turns.
Figures are medians over `repeats`.

Build = from texts (or vectors) to an index that has answered one question.
Memory = highest resident set during build and queries, less that before the build.
Query = one question, from text to passages, median over `queries`; for dense search from a vector.
Update = 100 passages are added to the BM25 index, which makes its matrix again, and one question.

An Index reads passages, which FAISS alone does not.
It checks that texts are not blank and that ids are unique; that time is printed under the table.
For dense search it is subtracted from the build: vectors are given, the rest is a copy of memory.

Bars: p50 <= 20 ms a query for BM25 and for dense search with encoding.
Build time, memory and query time are at most 1.1 times the library's.
The checks take at most 0.5 µs a passage.
Linux only (/proc). With `--check` the exit status is 1 unless the bars hold.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time


# 2,000 passages are a few MiB, and torch keeps much more while it encodes
NOT_HELD = {("encoded", "memory_mib")}


def medians(measured: list[dict]) -> dict[str, float]:
    "Return the median of each figure; what was found is none."
    found = {}
    for name in measured[0]:
        if name != "found":
            found[name] = statistics.median(m[name] for m in measured)
    return found


def resident(field):
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) / 1024 for line in f if line.startswith(field))


def corpus(args):
    "Texts and questions; both sides of a comparison get the same."
    import numpy as np

    rng = np.random.default_rng(0)
    vocabulary = np.array([f"w{n:x}k" for n in range(50_000)])
    chance = 1 / np.arange(1, len(vocabulary) + 1)
    drawn = vocabulary[
        rng.choice(len(vocabulary), (args.passages, args.words), p=chance / chance.sum())
    ]
    texts = [" ".join(row) for row in drawn]
    questions = [
        " ".join(drawn[n, rng.choice(args.words, 8)])
        for n in rng.integers(args.passages, size=args.queries)
    ]
    return texts, questions


def unit(n, width, seed):
    import numpy as np

    vectors = np.random.default_rng(seed).standard_normal((n, width), np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


class Given:
    "An encoder whose vectors are there already."

    spec, identity = "given", "given"

    def __init__(self, documents, questions):
        self.documents, self.questions, self.width = documents, questions, documents.shape[1]

    def __call__(self, texts, side="document"):
        return self.documents if side == "document" else self.questions[[int(t) for t in texts]]


def one(args):
    "In a child process: measure one variant of one case, print JSON."
    import faiss
    import torch

    torch.set_num_threads(args.threads)
    faiss.omp_set_num_threads(args.threads)
    from polm_lab.integration.retrieval import passages as ours
    from polm_lab.integration.retrieval.passages import Encoder, Index

    checks, check = [0.0], ours._checked

    def timed_check(*given):
        began = time.perf_counter()
        try:
            return check(*given)
        finally:
            checks[0] += time.perf_counter() - began

    ours._checked = timed_check
    if args.case == "encode":
        encoder, asked = (
            Encoder("tiny", device="cpu"),
            [f"Which instrument does Adran {n} play?" for n in range(args.queries)],
        )
        return print(
            json.dumps(
                {
                    "query_ms": 1000
                    * statistics.median(timed(lambda: encoder([q], "query")) for q in asked)
                }
            )
        )
    import bm25s

    if args.case == "encoded":
        args.passages = 2000
        encoder, (texts, asked) = Encoder("tiny", device="cpu"), corpus(args)
        passages = [{"id": str(n), "text": t} for n, t in enumerate(texts)]
        encoder(texts[:64])
    elif args.case == "bm25":
        texts, asked = corpus(args)
        passages = (
            [{"id": str(n), "text": t} for n, t in enumerate(texts)]
            if args.variant == "ours"
            else None
        )
    else:
        documents, vectors = unit(args.passages, args.width, 0), unit(args.queries, args.width, 1)
        passages, asked = (
            [{"id": str(n), "text": str(n)} for n in range(args.passages)],
            [str(n) for n in range(args.queries)],
        )
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")  # the high-water mark begins here
    before, began, processor = resident("VmRSS"), time.perf_counter(), time.process_time()
    if args.variant == "ours":
        index = Index(
            passages,
            Given(documents, vectors)
            if args.case == "dense"
            else encoder
            if args.case == "encoded"
            else None,
        )
        ask = lambda q: [
            h.id for h in index.search([q], 10, "bm25" if args.case == "bm25" else "dense")[0]
        ]
    elif args.case == "bm25":
        index = bm25s.BM25()
        index.index(bm25s.tokenize(texts, show_progress=False), show_progress=False)
        ask = lambda q: [
            str(n)
            for n in index.retrieve(
                bm25s.tokenize([q], show_progress=False, return_ids=False),
                k=10,
                show_progress=False,
            )[0][0]
        ]
    elif args.case == "encoded":
        index = faiss.IndexFlatIP(encoder.width)
        index.add(encoder(texts))
        ask = lambda q: [str(n) for n in index.search(encoder([q], "query"), 10)[1][0]]
    else:
        index = faiss.IndexFlatIP(args.width)
        index.add(documents)
        ask = lambda q: [str(n) for n in index.search(vectors[[int(q)]], 10)[1][0]]
    found = [ask(asked[0])]
    built, work, checked = time.perf_counter() - began, time.process_time() - processor, checks[0]
    times = [timed(lambda: found.append(ask(q))) for q in asked]
    highest, update = resident("VmHWM"), 0.0
    if args.variant == "ours" and args.case == "bm25":
        began = time.perf_counter()
        index.add([{"id": f"new {n}", "text": f"w{n:x}k new"} for n in range(100)])
        ask(asked[0])
        update = time.perf_counter() - began
    print(
        json.dumps(
            dict(
                build_s=built,
                check_s=checked,
                update_s=update,
                cpu_s=work,
                query_ms=1000 * statistics.median(times),
                p99_ms=1000 * sorted(times)[int(0.99 * len(times))],
                memory_mib=highest - before,
                found=found,
            )
        )
    )


def timed(call):
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def child(args, case, variant):
    words = [
        f"--{name}={getattr(args, name)}"
        for name in ("passages", "words", "width", "queries", "threads")
    ]
    done = subprocess.run(
        [sys.executable, "-P", __file__, *words, f"--case={case}", f"--variant={variant}"],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{case}, {variant}: exit {done.returncode}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, value in (
        ("passages", 100_000),
        ("words", 80),
        ("width", 384),
        ("queries", 200),
        ("threads", 2),
        ("repeats", 3),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    parser.add_argument("--check", action="store_true", help="exit 1 if a bar is missed")
    args = parser.parse_args()
    if args.case:
        return one(args)
    encode = child(args, "encode", "ours")["query_ms"]
    print(
        f"{args.passages:,} passages of {args.words} words, vectors of width {args.width}; "
        f"encoding a question with tiny: {encode:.1f} ms\n"
    )
    print(
        "| search | who | build, s | passages/s | CPU, s | memory, MiB | query p50, ms | p99, ms "
        "|\n|---|---|---|---|---|---|---|---|"
    )
    missed, notes = [], []
    for case, peer in (("bm25", "bm25s"), ("dense", "FAISS"), ("encoded", "tiny, FAISS")):
        rounds = []
        for _ in range(args.repeats):
            rounds.append({who: child(args, case, who) for who in ("ours", "theirs")})
        if any(r["ours"]["found"] != r["theirs"]["found"] for r in rounds):
            missed.append(f"{case}: other passages are found")
        middle = {}
        for who in ("ours", "theirs"):
            middle[who] = medians([r[who] for r in rounds])
        for variant, name in (("ours", "Index"), ("theirs", peer)):
            m = middle[variant]
            print(
                f"| {case} | {name} | {m['build_s']:.2f} | "
                f"{(2000 if case == 'encoded' else args.passages) / m['build_s']:,.0f} | "
                f"{m['cpu_s']:.2f} | {m['memory_mib']:.0f} | {m['query_ms']:.2f} | "
                f"{m['p99_ms']:.2f} |"
            )
        every = {}
        for key in ("build_s", "cpu_s", "memory_mib", "query_ms"):
            every[key] = []
            for r in rounds:
                off = r["ours"]["check_s"] if (case, key) == ("dense", "build_s") else 0.0
                every[key].append((r["ours"][key] - off) / r["theirs"][key])
        ratios = {key: statistics.median(found) for key, found in every.items()}
        print(
            f"| {case} | ours / theirs | {ratios['build_s']:.2f} | | {ratios['cpu_s']:.2f} | "
            f"{ratios['memory_mib']:.2f} | {ratios['query_ms']:.2f} | |"
        )
        mine = middle["ours"]
        whole = [r["ours"]["build_s"] / r["theirs"]["build_s"] for r in rounds]
        notes.append(
            f"{case}: build, lowest to highest of {args.repeats}: {min(every['build_s']):.2f} to "
            f"{max(every['build_s']):.2f}; checks of ids and texts {1000 * mine['check_s']:.0f} "
            f"ms, with them {statistics.median(whole):.2f} ({min(whole):.2f} to {max(whole):.2f})"
            + (
                f"; 100 passages added, then a question: {mine['update_s']:.1f} s"
                if case == "bm25"
                else ""
            )
        )
        missed += [
            f"{case}: {key} {ratios[key]:.2f} times the library's"
            for key in ("build_s", "memory_mib", "query_ms")
            if ratios[key] > 1.1 and (case, key) not in NOT_HELD
        ]
        passages = 2000 if case == "encoded" else args.passages
        missed += (
            [f"{case}: checks {1e6 * mine['check_s'] / passages:.2f} µs a passage"]
            if mine["check_s"] > 5e-7 * passages
            else []
        )
        total = middle["ours"]["query_ms"] + (encode if case == "dense" else 0)
        missed += [f"{case}: p50 {total:.1f} ms"] if total > 20 else []
    print("\n" + "\n".join(notes))
    print("\nbars: " + ("; ".join(missed) if missed else "all hold"))
    return int(bool(args.check and missed))


if __name__ == "__main__":
    sys.exit(main())
