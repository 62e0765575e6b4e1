"The conformance suite on every registered training method, and proof that it can fail."

import dataclasses
import functools
import itertools
import re
from pathlib import Path
from unittest import mock

import pytest
import torch

from polm_lab.training import conformance as check
from polm_lab.training import evaluate
from polm_lab.models import logprobs, policy
from polm_lab.core import machine as train_machine
from polm_lab.training import loop as train_loop
from polm_lab.core.method import find, methods

TRAINED = [name for name, m in methods().items() if m.trains]


ALONE = [prop for prop in check.PROPERTIES if prop is not check.two_processes_are_one]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    "Short runs of all methods, to which the others are compared, each made once."
    return functools.cache(
        lambda name: check.short_run(find(name), tmp_path_factory.mktemp("base"))
    )


@pytest.mark.parametrize("prop", ALONE, ids=lambda p: p.__name__)
@pytest.mark.parametrize("name", TRAINED)
def test_every_training_method_has_the_property(bases, name, prop, tmp_path):
    figure, holds = prop(find(name), tmp_path, bases(name))
    assert holds, f"{name}: {prop.__name__} = {figure:.3g}"


# A method that trains six things. Its default is above. The others learn by the same loop from
# other rows, or, like CodeRL, by that of PPO.
BITS = (check.same_seed, check.resumed_is_uninterrupted, check.record_complete)
VARIANTS = [
    (learn, prop) for learn in ("selfee", "critique", "refiner", "editor") for prop in BITS
] + [("coderl", prop) for prop in ALONE]


@pytest.fixture(scope="module")
def variants(tmp_path_factory):
    "Short runs of what `critic` trains, each made once."

    @functools.cache
    def short(learn):
        found = find("critic")
        found = dataclasses.replace(found, small=found.small | dict(algorithm=learn, data=""))
        return found, check.short_run(found, tmp_path_factory.mktemp(learn))

    return short


@pytest.mark.parametrize(
    "learn, prop", VARIANTS, ids=[f"critic-{learn}-{prop.__name__}" for learn, prop in VARIANTS]
)
def test_whatever_critic_trains_has_the_property(variants, learn, prop, tmp_path):
    method, run = variants(learn)
    figure, holds = prop(method, tmp_path, run)
    assert holds, f"critic, learn={learn}: {prop.__name__} = {figure:.3g}"


@pytest.fixture(scope="module")
def pairs(bases, variants, tmp_path_factory):
    "Short runs, and the same by two processes, which are started once for all of them."
    runs = {name: bases(name) for name in TRAINED} | {"critic-coderl": variants("coderl")[1]}
    made = check.in_two_processes(list(runs.values()), tmp_path_factory.mktemp("two"))
    return {name: pair for name, *pair in zip(runs, runs.values(), made)}


@pytest.mark.parametrize("name", [*TRAINED, "critic-coderl"])
def test_two_processes_are_one(pairs, name):
    gap = check.distance(*pairs[name])
    assert gap < check.CLOSE, f"{name}: {gap:.3g}"


# Each property is broken on purpose in the way that peers had it broken; the suite must see it.


def by_time():
    "Random choices that depend on the clock."
    counter = itertools.count()
    return mock.patch.object(train_machine, "seed_of", lambda *parts: next(counter))


def each_batch_by_its_own_count():
    "Each microbatch normalized by its own number of tokens."
    plain = train_loop.token_batches

    def wrong(examples, settings, pad_id, packing=False):
        batches = plain(examples, settings, pad_id, packing)
        return [dict(b, weight=1.0) for b in batches]

    return check.replaced_everywhere(plain, wrong)


def padding_is_learned():
    "Padding counts as text that is learned."
    plain = policy.Policy.forward

    def wrong(self, input_ids, attention_mask=None, completion_mask=None, *args, **kwargs):
        return plain(
            self,
            input_ids,
            torch.ones_like(input_ids),
            completion_mask.bool() | ~attention_mask.bool(),
            *args,
            **kwargs,
        )

    return mock.patch.object(policy.Policy, "forward", wrong)


def kernel_drifts():
    "The fast path is one per cent off."
    plain = logprobs.selected_logprobs

    def wrong(*args, **kwargs):
        logp, entropy = plain(*args, **kwargs)
        return logp * 1.01, entropy

    return check.replaced_everywhere(plain, wrong)


def optimizer_is_forgotten():
    "A resumed run begins with fresh moments."
    plain = train_loop.load_checkpoint

    def wrong(run, accelerator):
        states = [o.state_dict() for o in accelerator._optimizers]
        step = plain(run, accelerator)
        for optimizer, state in zip(accelerator._optimizers, states):
            optimizer.load_state_dict(state)
        return step

    return mock.patch.object(train_loop, "load_checkpoint", wrong)


def a_step_is_not_logged():
    "The second step is missing from the record."
    plain = check.Run.log
    return mock.patch.object(
        check.Run, "log", lambda self, step, **m: None if step == 2 else plain(self, step, **m)
    )


def an_evaluation_learns():
    "Each evaluation moves the weights a little, by the same amount in each run."
    plain = evaluate.Evaluation.__call__

    def wrong(self):
        for weights in self.policy.parameters():
            weights.data.mul_(1.01)
        return plain(self)

    return mock.patch.object(evaluate.Evaluation, "__call__", wrong)


MUTATIONS = [
    (check.same_seed, by_time, dict(neftune_alpha=20.0)),
    (check.same_seed, an_evaluation_learns, {}),
    (check.batches_add_up, each_batch_by_its_own_count, {}),
    (check.padding_is_nothing, padding_is_learned, {}),
    (check.chunked_is_dense, kernel_drifts, {}),
    (check.resumed_is_uninterrupted, optimizer_is_forgotten, {}),
    (check.record_complete, a_step_is_not_logged, {}),
]


def test_the_suite_sees_processes_that_do_not_share_their_counts(tmp_path, monkeypatch):
    """Each process divides by its own number of tokens.

    The fault is in the processes that the property starts.
    """
    (tmp_path / "sitecustomize.py").write_text(
        "import accelerate\n"
        "accelerate.Accelerator.reduce = lambda self, tensor, *args, **kwargs: tensor\n"
    )
    method = find("sft")
    base = check.short_run(method, tmp_path / "base")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    figure, holds = check.two_processes_are_one(method, tmp_path, base)
    assert not holds, f"went unseen ({figure:.3g})"


@pytest.mark.parametrize(
    "prop, mutation, settings", MUTATIONS, ids=[m.__name__ for _, m, _ in MUTATIONS]
)
def test_the_suite_sees_a_broken_property(prop, mutation, settings, tmp_path):
    method = find("sft")
    method = dataclasses.replace(method, small=method.small | settings)
    with mutation():
        figure, holds = prop(method, tmp_path, check.short_run(method, tmp_path / "base"))
    assert not holds, f"{mutation.__name__} went unseen ({prop.__name__} = {figure:.3g})"


# In 16 bits ---------------------------------------------------------------------------------------

FLAGS = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
HAS_BF16 = re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", FLAGS) is not None


@pytest.mark.skipif(
    not HAS_BF16,
    reason="this CPU has no instructions for bf16, which make it up to a hundred times slower",
)
@pytest.mark.parametrize("name", TRAINED)
def test_in_bf16_the_bits_are_the_same_and_the_record_is_complete(name, tmp_path):
    """Other properties depend on the order of rounding: batches that add up, padding, chunks.

    They are not required in 16 bits.
    """
    method = find(name)
    method = dataclasses.replace(method, small=method.small | dict(dtype="bfloat16"))
    base = check.short_run(method, tmp_path / "base")
    for prop in BITS:
        figure, holds = prop(method, tmp_path / prop.__name__, base)
        assert holds, f"{name}: {prop.__name__} = {figure:.3g}"
