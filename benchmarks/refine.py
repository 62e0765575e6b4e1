"""Compare refining a batch with the shared sampler to one question after another.

    python benchmarks/refine.py [--questions 64] [--alone 12] [--rounds 3] [--threads 2]
                                [--repeats 3] [--check]

The task is sums, with the embedded model in fp32, by RCI: draft, check, correct.
See the page on self-refinement.
The same loop is called once with all questions, and once for each of `--alone` of them.
Traces are the same token for token, which is asserted.
The figure is questions per second, median of `--repeats`; the two take turns.
The ratio is taken pair by pair. With `--check` the exit status is 1 unless it is 5 or more.
"""

import argparse
import statistics
import sys
import time

import torch

from polm_lab.data.tasks import TASKS
from polm_lab.reasoning.refine.trace import Ask, Trace, make_writer
from polm_lab.reasoning.refine.self_critics import feedback_critic
from polm_lab.reasoning.refine.tiny_prompts import SumPrompts
from polm_lab.reasoning.refine.rounds import draft, follow, forget, refine, satisfied


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in dict(questions=64, alone=12, rounds=3, threads=2, repeats=3).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--check", action="store_true")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    ask, words = Ask(make_writer("tiny", dtype="float32", device="cpu"), 48), SumPrompts()
    places = dict(
        draft=draft(words),
        critic=feedback_critic(words, contradiction=True),
        reviser=follow(words),
        stop=satisfied,
        memory=forget,
    )

    def refined(rows, start=0):
        traces = [Trace(start + i, row, left=600) for i, row in enumerate(rows)]
        list(refine(traces, **places, ask=ask, rounds=a.rounds))
        return traces

    rates, ratios = {"together": [], "one by one": []}, []
    for repeat in range(-1, a.repeats):  # -1: warm-up
        rows = TASKS["sums"].rows("prompt", a.questions, repeat + 1, "test")
        began = time.perf_counter()
        together = refined(rows)
        middle = time.perf_counter()
        alone = [refined([row], i)[0] for i, row in enumerate(rows[: a.alone])]
        ended = time.perf_counter()
        assert [t.answers for t in alone] == [t.answers for t in together[: a.alone]], (
            "the batch changed an answer"
        )
        if repeat >= 0:
            rates["together"].append(a.questions / (middle - began))
            rates["one by one"].append(a.alone / (ended - middle))
            ratios.append(rates["together"][-1] / rates["one by one"][-1])
    tokens = sum(t.tokens() for t in together) / len(together)
    print("| way | questions/s | tokens/s |\n| --- | --- | --- |")
    for way, found in rates.items():
        print(
            f"| {way} | {statistics.median(found):.1f} | {statistics.median(found) * tokens:.0f} |"
        )
    ratio = statistics.median(ratios)
    print(
        f"\ntogether / one by one: {ratio:.1f} (min {min(ratios):.1f}, max {max(ratios):.1f}), "
        f"{a.questions} questions, at most {a.rounds} rounds, {tokens:.0f} tokens a question; bar "
        "5"
    )
    sys.exit(a.check and ratio < 5)


if __name__ == "__main__":
    main()
