"DPO: closed forms, the ways to the reference, TRL's loss and training, repeatability, wrong input."

import math

import pytest
import torch
from conftest import shaken, trl_pairs

import polm_lab as lab
from polm_lab.alignment.dpo import dpo_loss, implicit_reward, optimal_policy, trl_loss
from polm_lab.training import answers, pairwise, reference
from polm_lab.training.answers import answer_batches, encode_answers, side_logps
from polm_lab.training.pairwise import pair_metrics
from polm_lab.training.reference import can_switch_off, pick_reference
from polm_lab.data.load import load_data
from polm_lab.core.knobs import WrongInput
from polm_lab.models.policy import Policy
from polm_lab.models.load import load_model

SHORT = dict(
    data="sums",
    steps=3,
    batch_size=4,
    eval_rows=4,
    max_length=64,
    device="cpu",
    dtype="float32",
    learning_rate=1e-3,
    warmup=0.0,
)


@pytest.fixture(scope="module")
def pairs(tokenizer):
    return encode_answers(
        tokenizer,
        [
            *load_data("chat", "preference", "test")[:3],
            *load_data("sums", "preference", "test")[:3],
        ],
        128,
    )


def weights(run):
    return b"".join(p.read_bytes() for p in sorted((run.path / "model").glob("*.safetensors")))


# The loss -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.01, 0.1, 3.0])
@pytest.mark.parametrize("epsilon", [0.0, 0.2])
def test_zero_margin_costs_log_2_and_pulls_with_half_beta(beta, epsilon):
    sides = [
        torch.tensor([-3.0, -70.0], requires_grad=True),
        torch.tensor([-9.0, -1.0], requires_grad=True),
    ]
    loss = dpo_loss(*sides, *(s.detach() for s in sides), beta, epsilon)
    loss.sum().backward()
    assert torch.allclose(loss, torch.full((2,), math.log(2)))
    assert torch.allclose(sides[0].grad, torch.full((2,), -beta * (0.5 - epsilon)))
    assert torch.equal(sides[1].grad, -sides[0].grad)


def test_loss_of_large_margins_is_finite_and_linear_when_wrong():
    chosen = torch.tensor([1e4, -1e4], requires_grad=True)
    zero = torch.zeros(2)
    loss = dpo_loss(chosen, zero, zero, zero, 0.1)
    loss.sum().backward()
    assert loss.tolist() == [0.0, 1000.0]
    assert torch.allclose(chosen.grad, torch.tensor([0.0, -0.1]))


def test_loss_by_hand():
    "beta 0.5, log-ratios +2 and -1: margin 1.5."
    one = torch.tensor([1.0])
    loss = dpo_loss(-3 * one, -6 * one, -5 * one, -5 * one, 0.5, 0.1).item()
    assert math.isclose(
        loss, 0.9 * math.log(1 + math.exp(-1.5)) + 0.1 * math.log(1 + math.exp(1.5)), rel_tol=1e-6
    )


def test_smoothed_loss_is_lowest_where_the_labels_odds_are():
    margins = torch.linspace(-6, 6, 1201)
    zero = torch.zeros_like(margins)
    best = margins[dpo_loss(margins, zero, zero, zero, 1.0, 0.1).argmin()].item()
    assert abs(best - math.log(9)) < 0.011


def test_only_log_ratios_matter():
    """Adding the same to policy and reference changes nothing.

    So a long prompt or answer has no weight of its own.
    """
    torch.manual_seed(0)
    a, b, c, d, shift = torch.randn(5, 7, dtype=torch.float64)
    assert torch.allclose(dpo_loss(a, b, c, d, 0.3), dpo_loss(a + shift, b, c + shift, d, 0.3))
    assert not torch.allclose(dpo_loss(a, b, c, d, 0.3), dpo_loss(b, a, c, d, 0.3))


def test_optimal_policy_beats_others():
    torch.manual_seed(1)
    ref, reward = (
        torch.randn(5, dtype=torch.float64).log_softmax(-1),
        torch.randn(5, dtype=torch.float64),
    )

    def value(logp, beta):
        return (logp.exp() * (reward - beta * (logp - ref))).sum()

    for beta in (0.1, 1.0, 10.0):
        best = optimal_policy(ref, reward, beta)
        assert value(best, beta).item() == pytest.approx(
            beta * torch.logsumexp(ref + reward / beta, -1).item()
        )  # = beta log Z
        assert all(
            value((best + 0.1 * torch.randn(5)).log_softmax(-1), beta) < value(best, beta)
            for _ in range(20)
        )
        gaps = implicit_reward(best, ref, beta) - reward
        assert torch.allclose(gaps, gaps[0].expand(5))


def test_metrics_of_pairs():
    chosen = implicit_reward(
        torch.tensor([-1.0, -2.0, -9.0]), torch.tensor([-2.0, -2.0, -3.0]), 0.5
    )
    rejected = implicit_reward(
        torch.tensor([-5.0, -2.0, -3.0]), torch.tensor([-4.0, -2.0, -3.0]), 0.5
    )
    found = pair_metrics(chosen, rejected)
    assert found["pair_accuracy"].tolist() == [1.0, 0.5, 0.0]
    assert found["margin"].tolist() == [1.0, 0.0, -3.0]
    assert found["reward_chosen"].tolist() == [0.5, 0.0, -3.0]
    assert found["reward_rejected"].tolist() == [-0.5, 0.0, 0.0]


# Pairs in the model -------------------------------------------------------------------------------


def test_batch_of_pairs_is_each_answer_alone(tokenizer, start, pairs):
    "Log-probabilities of a padded, regrouped batch are those of each answer by itself."
    for batch in answer_batches(pairs, 4, tokenizer.pad_token_id):
        assert len(batch["input_ids"]) == 2 * batch["weight"]
        for side, values in zip(("chosen", "rejected"), side_logps(Policy(start), batch)):
            for row, value in zip(batch["rows"].tolist(), values):
                ids, mask = (
                    torch.tensor(pairs[row][side]["input_ids"]),
                    torch.tensor(pairs[row][side]["completion_mask"]),
                )
                logp = (
                    start(ids[None]).logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
                )
                assert value.item() == pytest.approx((logp * mask[1:]).sum().item(), abs=2e-4)


def test_prompt_is_not_learned(tokenizer, pairs):
    row = load_data("chat", "preference", "test")[0]
    learned = [
        t
        for t, m in zip(pairs[0]["chosen"]["input_ids"], pairs[0]["chosen"]["completion_mask"])
        if m
    ]
    assert tokenizer.decode(learned).startswith(row["chosen"][0]["content"][:20])


# TRL ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [0.0, 0.2])
def test_loss_and_gradient_are_trls(tokenizer, start, tmp_path, epsilon):
    trainer, batch, theirs = trl_pairs(tokenizer, start, tmp_path, **trl_loss(0.3, epsilon))
    model = shaken(start)
    with torch.no_grad():
        reference = side_logps(Policy(start), batch)
    ours = dpo_loss(*side_logps(Policy(model), batch), *reference, 0.3, epsilon).mean()
    ours.backward()
    assert abs(ours.item() - math.log(2)) > 1e-2  # far from the start, where all losses are alike
    assert ours.item() == pytest.approx(theirs, abs=1e-5)
    for (name, p), q in zip(model.named_parameters(), trainer.model.parameters()):
        assert (p.grad - q.grad).norm() <= 1e-5 * max(q.grad.norm().item(), 1e-3), name


@pytest.mark.parametrize("more", [{}, dict(adapter="lora:r=4", steps=2)])
def test_engine_trl_learns_the_same(more):
    "Same rows, order, loss and optimizer; the schedules differ in the warm-up, which is off."
    ours, theirs = (
        lab.run(
            "dpo", **SHORT | more, clip=0.0, schedule="constant", label_smoothing=0.1, engine=engine
        )
        for engine in ("lab", "trl")
    )
    for a, b in zip(ours.lines(), theirs.lines(), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=2e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=2e-2)
        assert a["reward_chosen"] == pytest.approx(b["reward_chosen"], abs=2e-3)
    assert ours.summary["after"]["margin"] == pytest.approx(
        theirs.summary["after"]["margin"], abs=5e-3
    )
    assert set(theirs.summary["after"]) == set(ours.summary["after"])
    files = []
    for run in (ours, theirs):
        paths = (run.path / "model").rglob("*.safetensors")
        files.append(sorted(path.relative_to(run.path).as_posix() for path in paths))
    assert files[0] == files[1]  # TRL trains a second adapter too, which must not be saved


# The reference ------------------------------------------------------------------------------------


def test_three_ways_to_the_reference_agree():
    runs = {
        way: lab.run("dpo", **SHORT, adapter="lora:r=4", reference=way)
        for way in ("copy", "adapter", "precomputed")
    }
    assert "reference: adapter" in (runs["adapter"].path / "log.txt").read_text()
    for way in ("adapter", "precomputed"):
        for a, b in zip(runs["copy"].lines(), runs[way].lines(), strict=True):
            for name in ("loss", "margin", "reward_chosen", "logp_rejected", "grad_norm"):
                assert a[name] == pytest.approx(b[name], abs=2e-4, rel=1e-3), (way, name)
    assert all(
        len(row["ids"]) == len(row["tokens"]) == len(row["logp"])
        for row in runs["copy"].lines("samples")
    )
    assert (
        abs(runs["copy"].lines()[-1]["margin"]) > 1e-3
    )  # the policy has moved, so a reference that moves with it would show


@pytest.mark.parametrize(
    "adapter, switchable",
    [
        ("lora:r=2", True),
        ("lora:r=2,init_lora_weights=pissa", False),
        ("prompt_tuning:num_virtual_tokens=3", False),
    ],
)
def test_an_adapter_is_tried_before_it_is_trusted(tokenizer, pairs, adapter, switchable):
    policy = Policy(load_model("tiny", dtype="float32", device="cpu", adapter=adapter))
    batch = answer_batches(pairs[:1], 1, tokenizer.pad_token_id)[0]
    assert can_switch_off(policy, batch) == switchable
    assert pick_reference("auto", True, switchable, 10, 10) == (
        "adapter" if switchable else "precomputed"
    )


def test_start_is_the_reference_and_says_so():
    before = lab.run("dpo", **SHORT | dict(steps=0)).summary["before"]
    assert before["margin"] == before["reward_chosen"] == before["reward_rejected"] == 0.0
    assert before["pair_accuracy"] == 0.5
    assert before["kl"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(reference="adapter"), "no adapter to switch off"),
        (dict(reference="adapter", adapter="prompt_tuning"), "starts without effect"),
        (dict(reference="copied"), "expected one of auto, copy, adapter, precomputed"),
        (dict(beta=0.0), "beta = 0.0"),
        (dict(label_smoothing=0.5), "label_smoothing = 0.5"),
        (dict(data="facts", max_length=4), "max_length"),
    ],
)
def test_wrong_input_is_one_line_before_any_step(runs, changes, words):
    with pytest.raises(WrongInput) as wrong:
        lab.run("dpo", **SHORT | changes)
    assert words in str(wrong.value)
    assert "\n" not in str(wrong.value)
    assert not any(run.lines() for run in lab.core.run.all_runs())


# Repeatable ---------------------------------------------------------------------------------------


def test_same_seed_same_bits_and_resumed_is_uninterrupted(monkeypatch):
    whole = lab.run("dpo", **SHORT, reference="precomputed", save_every=1)
    with monkeypatch.context() as patch:
        patch.setattr(lab.Run, "stop_requested", lambda self: self.record["step"] == 1)
        with pytest.raises(lab.Stopped):
            lab.run("dpo", **SHORT, reference="precomputed", save_every=1)
    halted = next(r for r in lab.core.run.all_runs() if r.status == "stopped")
    passes, original = [], answers.logps_table

    def counted(policy, pairs, *rest):
        passes.append(len(pairs))
        return original(policy, pairs, *rest)

    for module in (pairwise, reference):
        monkeypatch.setattr(module, "logps_table", counted)
    lab.resume(halted)
    assert weights(halted) == weights(whole)
    assert max(passes) == SHORT["eval_rows"], "the training pairs went through the reference again"


def test_dropout_is_off():
    "A run with dropout in its adapter is the run without, to the last digit."
    with_dropout, without = (
        lab.run("dpo", **SHORT, adapter=f"lora:r=2,lora_dropout={p}") for p in (0.5, 0.0)
    )
    facts = lambda run: [(row["loss"], row["grad_norm"], row["margin"]) for row in run.lines()]
    assert facts(with_dropout) == facts(without)
    assert len(facts(without)) == 3
    assert with_dropout.summary == without.summary


@pytest.mark.parametrize(
    "kind, chances",
    [
        ("Llama", dict(attention_dropout=0.5)),
        ("OPT", dict(dropout=0.5, attention_dropout=0.5, layerdrop=0.5)),
        ("GPT2", dict(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)),
    ],
)
def test_no_chance_is_left_to_drop_anything(kind, chances):
    "Dropout layers, dropout inside of attention, and whole layers that are left out."
    import transformers

    from polm_lab.models.layers import switch_off_dropout

    small = dict(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        ffn_dim=24,
        n_embd=16,
        n_layer=2,
        n_head=2,
        word_embed_proj_dim=16,
    )
    config = getattr(transformers, f"{kind}Config")(**small, **chances)
    model = getattr(transformers, {"GPT2": "GPT2LMHeadModel"}.get(kind, f"{kind}ForCausalLM"))(
        config
    )
    ids, model = torch.arange(3, 15)[None], model.train()
    noisy = [model(ids).logits for _ in range(2)]
    assert not torch.allclose(*noisy)
    switch_off_dropout(model)
    with torch.no_grad():
        assert torch.equal(model.train()(ids).logits, model.eval()(ids).logits)
