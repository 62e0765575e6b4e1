"""Distillation: divergences, the kernel that compares two models in parts, teachers, own answers."""

import dataclasses
import json
import math

import pytest
import torch
from conftest import shaken
from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import polm_lab as lab
from polm_lab.core.knobs import WrongInput
from polm_lab.core.method import find
from polm_lab.core.run import Run, open_run
from polm_lab.efficiency.distill import Distill, Ensemble, Source, check_teachers, gap_closed
from polm_lab.efficiency.distill import later_mean, make_student, minillm_loss
from polm_lab.efficiency.distillation.divergences import DIVERGENCES, comparison
from polm_lab.models.logprobs import Readout, divergence_in_parts
from polm_lab.models.policy import Policy
from polm_lab.models.small import save_small
from polm_lab.training import conformance as check
from polm_lab.training.chain import check_settings
from polm_lab.training.loop import Meter

SIZES = dict(
    vocab_size=67, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
)
SMALL = dict(
    teacher="tiny", rows=8, steps=2, batch_size=4, eval_rows=4, max_new_tokens=6, max_length=64,
    save_every=1, dtype="float32", device="cpu",
)  # fmt: skip


def logits(seed: int, rows: int = 7, vocab: int = 11, scale: float = 2.0):
    return scale * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def says(call, *args, **kwargs) -> str:
    with pytest.raises(WrongInput) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_divergence_is_nothing_between_equals_and_positive_else(name):
    z, ref = logits(0).requires_grad_(), logits(1)
    apart = comparison(name, 0.3, 2.0)(z, ref)
    assert (apart > 0.001).all()
    (slope,) = torch.autograd.grad(apart.sum(), z)
    assert slope.isfinite().all()
    assert slope.sum(-1).abs().max() < 1e-5  # adding a number to all logits changes nothing
    same = comparison(name, 0.3, 2.0)(z, z.detach())
    assert same.abs().max() < 1e-6
    if name not in ("tv", "uld"):  # whose slope jumps there
        assert torch.autograd.grad(same.sum(), z)[0].abs().max() < 1e-5


@pytest.mark.parametrize("name", [n for n in DIVERGENCES if n not in ("akl",)])
def test_the_gradient_of_a_divergence_is_that_of_its_values(name):
    z, ref = logits(2, 2, 5).double().requires_grad_(), logits(3, 2, 5).double()
    assert torch.autograd.gradcheck(lambda z: comparison(name, 0.3, 1.5)(z, ref), z)


def test_closed_forms():
    p, q = torch.tensor([[0.5, 0.5, 1e-30]]).log(), torch.tensor([[0.5, 0.25, 0.25]]).log()
    mean = (p.exp() + q.exp()) / 2
    half = 0.5 * (p.exp() * (p - mean.log())).sum() + 0.5 * (q.exp() * (q - mean.log())).sum()
    found = {name: of(p, q, 0.5).item() for name, of in DIVERGENCES.items()}
    assert found["forward_kl"] == pytest.approx(0.5 * math.log(2), rel=1e-5)
    assert found["tv"] == pytest.approx(0.25, rel=1e-5)
    assert found["jsd"] == pytest.approx(half.item(), rel=1e-5)
    assert found["scaled_jsd"] == pytest.approx(4 * half.item(), rel=1e-5)
    assert found["skew"] == pytest.approx(0.5 * math.log(0.5 / 0.375), rel=1e-4)
    assert found["uld"] == pytest.approx(0.5, rel=1e-5)
    assert DIVERGENCES["reverse_kl"](q, p).item() == pytest.approx(0.5 * math.log(2), rel=1e-5)
    # head and rest of the teacher are off by a tenth each, wherever they are in the vocabulary
    p, q = torch.tensor([[0.1, 0.6, 0.1, 0.2]]).log(), torch.tensor([[0.1, 0.5, 0.1, 0.3]]).log()
    both = [DIVERGENCES[name](p, q).item() for name in ("forward_kl", "reverse_kl")]
    assert DIVERGENCES["akl"](p, q, 0.5).item() == pytest.approx(sum(both) / 2, rel=1e-4)
    q = torch.tensor([[0.15, 0.6, 0.05, 0.2]]).log()  # the head agrees
    rest = DIVERGENCES["reverse_kl"](p, q).item()
    assert DIVERGENCES["akl"](p, q, 0.5).item() == pytest.approx(rest, rel=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_jsd_is_that_of_trl(beta, temperature):
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    z, ref = logits(4, 40, 300), logits(5, 40, 300)
    ours, theirs = z.clone().requires_grad_(), z.clone().requires_grad_()
    value = comparison("jsd", beta, temperature)(ours, ref).sum() / temperature**2
    trl = GKDTrainer.generalized_jsd_loss(
        theirs[None], ref[None], beta=beta, temperature=temperature, reduction="sum"
    )
    value.backward()
    trl.backward()
    assert abs(value.item() - trl.item()) / 40 <= 2e-6
    assert (ours.grad - theirs.grad).abs().max() <= 2e-6


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_in_parts_and_at_once_are_the_same(name, softcap):
    torch.manual_seed(1)
    moved = [torch.randn(9, 6), torch.randn(31, 6), torch.randn(31)]
    moved = [x.requires_grad_() for x in moved]
    ref = Readout(torch.randn(31, 4), None, 0.5)
    ref_rows, weights = torch.randn(9, 4), torch.linspace(-1, 1, 9)
    compare, found = comparison(name, 0.3, 1.7), []
    for in_parts in (True, False):
        rows, *head = moved
        readout = Readout(*head, 1.3, softcap)
        if in_parts:
            values = divergence_in_parts(compare, rows, readout, ref_rows, ref, chunk=4)
        else:
            values = compare(readout.logits(rows), ref.logits(ref_rows))
        found.append((values, *torch.autograd.grad((weights * values).sum(), moved)))
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-6)


def test_no_table_of_logits_is_made(monkeypatch):
    monkeypatch.setattr("polm_lab.models.logprobs.BLOCK_MIB", 0.25)
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **(kwargs or {}))
            for one in made if isinstance(made, (tuple, list)) else [made]:
                self.numbers = max(self.numbers, one.numel() if torch.is_tensor(one) else 0)
            return made

    rows, weight = torch.randn(512, 8).requires_grad_(), torch.randn(4096, 8)
    with Largest() as largest:
        compare = comparison("forward_kl", 0.5, 1.0)
        divergence_in_parts(compare, rows, Readout(weight), rows, Readout(weight)).sum().backward()
    assert largest.numbers <= 8 * 4096


def test_two_vocabularies_are_refused():
    rows = torch.randn(3, 4)
    readouts = Readout(torch.randn(11, 4)), Readout(torch.randn(12, 4))
    compare = comparison("tv", 0.5, 1.0)
    said = says(divergence_in_parts, compare, rows, readouts[0], rows, readouts[1])
    assert "vocabulary of 12; expected 11" in said


MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=67, n_embd=16, n_layer=2, n_head=2)),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.3)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8)),
}


def built(name: str, seed: int):
    torch.manual_seed(seed)
    return shaken(MODELS[name]().eval(), seed)


@pytest.mark.parametrize("name", MODELS)
def test_a_policy_is_compared_with_a_teacher_or_several(name):
    student = Policy(built(name, 0))
    teachers = [Policy(built(other, 1)) for other in ("llama", name)]
    ids = torch.randint(1, 67, (3, 9), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    target = mask.clone()
    target[:, :3] = 0
    compare = comparison("skew", 0.2, 1.5)
    for teacher in (teachers[0], Ensemble(teachers)):
        found = student(ids, mask, target, reference=teacher, divergence=compare).kl
        with torch.no_grad():
            given = [teacher] if teacher is teachers[0] else teachers
            ref = sum(one.model(input_ids=ids, attention_mask=mask).logits for one in given)
            own = student.model(input_ids=ids, attention_mask=mask).logits
            right = comparison("skew", 0.2, 1.5)(own.float(), ref.float() / len(given))
        right = torch.cat([torch.zeros(3, 1), right[:, :-1]], 1) * target
        torch.testing.assert_close(found, right, rtol=1e-3, atol=1e-5)
        found.sum().backward()
    assert not any(p.grad is not None for one in teachers for p in one.parameters())
    assert all(p.grad.isfinite().all() for p in student.parameters() if p.grad is not None)


def test_jsd_of_bf16_models_is_not_negative(start):
    student, teacher = (Policy(shaken(start, seed).to(torch.bfloat16)) for seed in (0, 1))
    ids = torch.randint(5, 200, (4, 20), generator=torch.Generator().manual_seed(0))
    for other in (student, teacher):
        values = student(ids, reference=other, divergence=comparison("jsd", 0.9, 1.0)).kl
        assert values.dtype == torch.float32
        assert (values >= 0).all()


def test_what_comes_later():
    rewards = torch.tensor([[5.0, 1.0, 2.0, 3.0], [4.0, 8.0, 9.0, 9.0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    assert later_mean(rewards, mask).tolist() == [[2.0, 2.5, 3.0, 0.0], [8.0, 0.0, 0.0, 0.0]]
    logp, kl = torch.tensor([[-1.0, -2.0]]).requires_grad_(), torch.tensor([[0.25, 0.5]])
    loss = minillm_loss(kl, logp, torch.tensor([[-1.0, -3.0]]), torch.ones(1, 2))
    assert loss.item() == pytest.approx(0.75 - (-1.0) * -1.0)  # the second token is off by -1
    loss.backward()
    assert logp.grad.tolist() == [[1.0, 0.0]]


def test_the_share_of_the_gap():
    assert gap_closed(4.0, 2.0, 1.0) == pytest.approx(0.5)
    assert math.isnan(gap_closed(1.0, 1.0, 1.0))


def source_of(tmp_path, **settings):
    settings = Distill(**SMALL | dict(student="same") | settings)
    policy, tokenizer = make_student(settings)
    run = Run.create("distill", {}, out=tmp_path)
    examples = []
    for n in range(6):
        asked = tokenizer(f"{n}+{n}=").input_ids
        mask = [0] * len(asked) + [1]
        examples.append(dict(input_ids=[*asked, asked[0]], completion_mask=mask))
    return Source(settings, policy, tokenizer, examples, run)


def test_own_answers_depend_on_seed_and_step_alone(tmp_path):
    source = source_of(tmp_path, source="mixed", own_share=0.5)
    kinds = [source.is_own(step) for step in range(200)]
    assert 70 < sum(kinds) < 130
    own, step = kinds.index(True), kinds.index(False)
    first, second = (source(own, [1, 2, 5], Meter()) for _ in range(2))
    assert first == second
    assert first[1] is True
    for example, n in zip(first[0], [1, 2, 5]):
        asked = source.prompts[n]
        assert example["input_ids"][: len(asked)] == asked
        assert example["completion_mask"][: len(asked)] == [0] * len(asked)
    assert source(step, [1, 2], Meter()) == ([source.examples[1], source.examples[2]], False)


def test_old_answers_are_replayed_and_those_of_a_later_step_forgotten(tmp_path):
    source = source_of(tmp_path, source="replay", own_share=1.0)
    made = [source(step, [0, 1, 2], Meter())[0] for step in range(6)]
    assert all(example in made[0] for step in (1, 2, 3) for example in made[step])
    assert not all(example in made[0] for example in made[4])
    assert [group["step"] for group in json.loads(source.path.read_text())] == [0, 4]
    # killed after step 4, and taken up again from the checkpoint of step 2
    assert [source(step, [0, 1, 2], Meter())[0] for step in (2, 3, 4)] == made[2:5]


@pytest.mark.parametrize(
    "settings",
    [
        dict(source="replay", own_share=1.0),
        dict(algorithm="minillm"),
        dict(source="mixed", divergence="jsd", label_weight=0.3),
    ],
    ids=str,
)
def test_a_resumed_run_ends_like_an_uninterrupted_one(settings, tmp_path):
    method = find("distill")
    method = dataclasses.replace(method, small=method.small | settings)
    base = check.short_run(method, tmp_path / "base")
    figure, holds = check.resumed_is_uninterrupted(method, tmp_path, base)
    assert holds, figure


def test_teachers_are_made_once_and_kept(tmp_path):
    settings = SMALL | dict(teacher="", teacher_steps=1, steps=1)
    run = lab.run("distill", out=tmp_path, algorithm="ensemble", **settings)
    assert list(run.record["stages"]) == ["teacher 1", "teacher 2"]
    for place in run.record["stages"].values():
        assert open_run(tmp_path / place).method == "sft"
    assert run.record["teacher"]["perplexity"] > 1
    run = lab.run("distill", out=tmp_path, algorithm="born_again", student="same", **settings)
    assert list(run.record["stages"]) == ["teacher 1", "generation 1"]
    assert run.summary["after"]["ensemble_perplexity"] > 1
    made = open_run(tmp_path / run.record["stages"]["generation 1"])
    assert made.settings["teacher"].endswith(run.record["stages"]["teacher 1"])


def test_the_ends_of_beta_are_noted(tmp_path):
    for beta, way in ((0.0, "KL(teacher‖student)"), (1.0, "KL(student‖teacher)")):
        run = lab.run("distill", out=tmp_path, divergence="jsd", beta=beta, **SMALL | dict(steps=1))
        assert way in (run.path / "log.txt").read_text()


def test_a_path_of_a_teacher_holds_from_every_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    _, settings = check_settings("distill", dict(teacher="a+b+tiny", student="a"))
    assert settings.teacher == f"{tmp_path / 'a'}+{tmp_path / 'b'}+tiny"
    assert settings.student == str(tmp_path / "a")


def test_whole_texts_teach_too(tmp_path):
    stories = tmp_path / "stories.jsonl"
    stories.write_text('{"text": "Once there was a fox and it ran."}\n' * 8)
    more = dict(steps=12, learning_rate=5e-4)
    run = lab.run("distill", out=tmp_path, data=str(stories), **SMALL | more)
    first, *_, last = (row["divergence"] for row in run.lines())
    assert last < 0.9 * first
    assert not run.lines("samples")


def test_bad_input_is_one_line(tmp_path):
    def run(**settings):
        return says(lab.run, "distill", out=tmp_path, **SMALL | settings)

    assert "is the student itself" in run(student="same")
    assert "needs several" in run(algorithm="ensemble")
    assert "adapter" in run(adapter="lora")
    stories = tmp_path / "stories.jsonl"
    stories.write_text('{"text": "Once there was a fox and it ran."}\n' * 8)
    assert "whole texts" in run(data=str(stories), source="on_policy")
    other = tmp_path / "other"
    save_small(other)
    assert "expected a model with the same tokenizer" in run(teacher=str(other))
    # no teacher is tuned for a student that cannot learn from it
    assert "expected a model with the same tokenizer" in run(teacher="", student=str(other))
    assert not list(tmp_path.glob("*-sft-*"))
    for settings in (dict(source="on_policy"), dict(algorithm="minillm")):
        assert "have no labels" in run(label_weight=0.5, **settings)
    assert "compare a model with itself" in run(divergence="skew", beta=1.0)
    tokenizer = make_student(Distill(student="same"))[1]
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    assert "expected a dense decoder" in run(model=str(tmp_path / "gpt2"))


def test_a_gpt2_teaches_another(tmp_path, tokenizer):
    places = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2)
        places.append(str(tmp_path / f"gpt2-{seed}"))
        shaken(GPT2LMHeadModel(config), seed).save_pretrained(places[-1])
        tokenizer.save_pretrained(places[-1])
    more = dict(model=places[0], teacher=places[1], student="same", source="mixed")
    run = lab.run("distill", out=tmp_path, **SMALL | more)
    assert run.status == "finished"
    assert [row["tokens"] for row in run.lines("samples")]


@pytest.mark.parametrize("student", ["half", "fresh"])
def test_activations_of_a_cut_student_can_be_recomputed(student, tmp_path):
    losses = []
    for on in (False, True):
        policy, _ = make_student(Distill(student=student, gradient_checkpointing=on))
        assert policy.model.is_gradient_checkpointing is on
        run = lab.run("distill", out=tmp_path, student=student, gradient_checkpointing=on, **SMALL)
        losses.append([row["loss"] for row in run.lines()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_processes_do_not_make_the_same_teacher(monkeypatch):
    monkeypatch.setattr("polm_lab.efficiency.distill.process_rank_and_count", lambda: (0, 2))
    tokenizer = make_student(Distill(student="same"))[1]
    assert check_teachers(Distill(teacher="tiny"), tokenizer) == ["tiny"]
    for settings in (dict(), dict(teacher="tiny", algorithm="born_again")):
        assert "take one process" in says(check_teachers, Distill(**settings), tokenizer)
