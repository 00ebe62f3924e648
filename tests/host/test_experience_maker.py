"""The experience maker against the host's own: same experiences, same arithmetic, credit where the reward was."""

import pytest
import torch

from abc_plugin.config import ShapingConfig
from abc_plugin.errors import CreditError
from abc_plugin.host.import_openrlhf import import_host

import_host()

from openrlhf.models.utils import compute_reward  # noqa: E402
from openrlhf.trainer.ppo_utils.experience import Experience  # noqa: E402
from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker  # noqa: E402
from openrlhf.trainer.ppo_utils.kl_controller import FixedKLController  # noqa: E402

from abc_plugin.host.arguments import GROUPED, parse  # noqa: E402
from abc_plugin.host.experience_maker import CreditExperienceMaker  # noqa: E402
from abc_plugin.host.model_workers import EvidenceBatch  # noqa: E402

ESTIMATORS = ("gae", "reinforce", "rloo", "reinforce_baseline", "group_norm", "dr_grpo", "flash_reinforce")


class Strategy:
    def __init__(self, args):
        self.args = args


class Tokenizer:
    pad_token_id = 0
    all_special_ids = [0, 1]


def make(cls, shaping, *flags):
    words = ["--reward.model_name_or_path", "x", "--actor.num_gpus_per_node", "1", "--vllm.num_engines", "0", *flags]
    args = parse([*words, "--rollout.batch_size", "8"])
    args.shaping = shaping
    return cls(None, None, None, None, FixedKLController(0.1), Strategy(args), Tokenizer())


def experience(seed, rows=4, length=9, first=0):
    """A batch with two action spans in row 0, a truncated response in row 1, right padding in row 2, none in row 3."""
    rng = torch.Generator().manual_seed(seed)
    mask = torch.zeros(rows, length - 1, dtype=torch.long)
    for row, spans in enumerate([[(2, 4), (6, 7)], [(3, 8)], [(1, 5)], []]):
        for start, end in spans:
            mask[row, start:end] = 1
    value = lambda: torch.randn(rows, length - 1, generator=rng)  # noqa: E731
    exp = Experience(
        sequences=torch.randint(2, 50, (rows, length), generator=rng),
        attention_mask=torch.ones(rows, length, dtype=torch.long),
        action_mask=mask,
        action_log_probs=value(),
        values=value(),
        kl=0.1 * value(),
        rewards=3 * torch.randn(rows, generator=rng),
        truncated=torch.zeros(rows, dtype=torch.bool),
        response_length=mask.sum(1),
        index=list(range(first, first + rows)),
        info={},
    )
    exp.evidence = [{name: torch.rand(rows, length, generator=rng) for name in ("attention", "prefix")}]
    exp.evidence[0]["contribution"] = torch.randn(rows, length, generator=rng)
    return exp


def batch():
    return [experience(0), experience(1, first=4)]


def flags(estimator):
    grouped = estimator in ("rloo", "reinforce_baseline", "group_norm", "dr_grpo")
    return ["--algo.advantage.estimator", estimator, "--rollout.n_samples_per_prompt", "4" if grouped else "1"]


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("shaping", [ShapingConfig("none"), ShapingConfig("abc", 0.0), ShapingConfig("uniform", 0.0)])
def test_none_and_beta_zero_are_bit_identical_to_the_stock_host(estimator, shaping):
    stock = make(RemoteExperienceMaker, shaping, *flags(estimator)).compute_advantages_and_returns(batch())
    ours = make(CreditExperienceMaker, shaping, *flags(estimator)).compute_advantages_and_returns(batch())
    for theirs, mine in zip(stock, ours, strict=True):
        assert torch.equal(theirs.advantages, mine.advantages)
        assert torch.equal(theirs.returns, mine.returns)
        assert theirs.info.keys() == mine.info.keys()


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("method", ["abc", "uniform", "prefix", "abc_signed"])
def test_credit_keeps_the_return_and_moves_the_reward(estimator, method):
    extra = ["--reward.clip_range", "-2", "2"]
    stock = make(RemoteExperienceMaker, None, *flags(estimator), *extra).compute_advantages_and_returns(batch())
    ours = make(CreditExperienceMaker, ShapingConfig(method), *flags(estimator), *extra)
    for theirs, mine in zip(stock, ours.compute_advantages_and_returns(batch()), strict=True):
        acting = theirs.action_mask.any(1)  # where there is no action the host counts a reward it then masks away
        torch.testing.assert_close(theirs.info["return"][acting], mine.info["return"][acting])
        assert not torch.allclose(theirs.returns[acting], mine.returns[acting])
        assert (mine.info["credit_conservation_error"] < 1e-6).all()
        assert torch.isfinite(mine.advantages).all()


@pytest.mark.parametrize("method", ["abc", "prefix", "abc_signed"])
def test_group_norm_is_dr_grpo_divided_by_the_groups_deviation(method):
    """Both subtract the group's mean; so whatever the credit, the returns differ by the deviation alone."""
    made = []
    for estimator in ("group_norm", "dr_grpo"):
        experiences = batch()
        for exp in experiences:
            exp.kl.zero_()
        experiences[1].rewards.fill_(0.7)  # a group without a deviation: nothing is to be learned from it
        made.append(
            make(CreditExperienceMaker, ShapingConfig(method), *flags(estimator)).compute_advantages_and_returns(
                experiences
            )
        )
    (divided, equal), (plain, _) = made
    deviation_B1 = plain.rewards.std() + 1e-9
    torch.testing.assert_close(divided.returns * deviation_B1, plain.returns)
    assert plain.returns.abs().max() > 1.0
    torch.testing.assert_close(equal.returns, torch.zeros_like(equal.returns))


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("estimator", GROUPED)
def test_what_a_prompt_scores_by_itself_sets_no_token_apart_in_groups(estimator, tokens):
    """A reward model that only likes the prompt: every token has the sparse reward's advantage under ``prefix``."""

    def liked():
        experiences = batch()
        for exp in experiences:
            exp.action_mask[0, tokens - 1] = 1  # row 0 acts at once behind a prompt of so many tokens
            exp.evidence = [{"prefix": exp.rewards[:, None].expand(-1, exp.sequences.shape[1])}]
        return experiences

    stock = make(RemoteExperienceMaker, None, *flags(estimator)).compute_advantages_and_returns(liked())
    ours = make(CreditExperienceMaker, ShapingConfig("prefix", 1.0), *flags(estimator))
    for theirs, mine in zip(stock, ours.compute_advantages_and_returns(liked()), strict=True):
        torch.testing.assert_close(theirs.advantages, mine.advantages)


def test_the_reward_that_reaches_gae_by_hand(monkeypatch):
    """One response of three tokens: reward 2, attention .1 .3 .1 on it, beta 0.8, KL coefficient 0.1."""
    maker = make(CreditExperienceMaker, ShapingConfig("abc", 0.8))
    exp = Experience(
        sequences=torch.tensor([[5, 6, 7, 8, 1, 0]]),
        attention_mask=torch.tensor([[1, 1, 1, 1, 1, 0]]),
        action_mask=torch.tensor([[0, 1, 1, 1, 0]]),
        values=torch.zeros(1, 5),
        kl=torch.tensor([[0.0, 1.0, -1.0, 0.5, 0.0]]),
        rewards=torch.tensor([2.0]),
        truncated=torch.tensor([False]),
        response_length=torch.tensor([3]),
        index=[0],
        info={},
    )
    exp.evidence = [{"attention": torch.tensor([[0.4, 0.1, 0.1, 0.3, 0.1, 0.0]])}]
    seen = []
    original = RemoteExperienceMaker.get_advantages_and_returns
    monkeypatch.setattr(
        RemoteExperienceMaker,
        "get_advantages_and_returns",
        lambda self, values, reward, *rest: seen.append(reward) or original(self, values, reward, *rest),
    )
    maker.compute_advantages_and_returns([exp])
    expected = torch.tensor([[0.0, 0.32 - 0.1, 0.96 + 0.1, 0.32 + 0.4 - 0.05, 0.0]])
    torch.testing.assert_close(seen[0], expected)
    torch.testing.assert_close(exp.info["credit_last_token"], torch.tensor([0.2]))
    torch.testing.assert_close(
        exp.info["credit_special_tokens"], torch.tensor([0.2])
    )  # token id 1 closes the response
    assert "evidence" not in vars(exp)  # nothing extra goes into the replay buffer


def test_a_response_without_attention_is_counted():
    """Row 3 has no actions; row 1 has some and no attention on them, on the prompt alone."""
    experiences = batch()
    experiences[1].evidence[0]["attention"][1] = torch.tensor([0.5, 0.5] + [0.0] * 7)
    made = make(CreditExperienceMaker, ShapingConfig("abc")).compute_advantages_and_returns(experiences)
    assert [one.info["credit_without_attention"].tolist() for one in made] == [[0.0] * 4, [0.0, 1.0, 0.0, 0.0]]
    torch.testing.assert_close(made[1].info["credit_entropy"][1], torch.tensor(5.0).log())  # uniform over 5 actions


def test_order_of_experiences_does_not_matter():
    maker = make(CreditExperienceMaker, ShapingConfig("abc"), "--algo.advantage.no_std_norm")
    straight = maker.compute_advantages_and_returns(batch())
    turned = maker.compute_advantages_and_returns(batch()[::-1])
    assert torch.equal(straight[0].returns, turned[1].returns)
    assert torch.equal(straight[1].returns, turned[0].returns)


@pytest.mark.parametrize(("sign", "scale"), [(1.0, 3.0), (-1.0, 0.0)])
def test_contributions_are_scaled_by_the_slope_of_the_reward_on_them(sign, scale, capsys):
    experiences = batch()
    for one in experiences:
        one.kl = torch.zeros_like(one.kl)
        earlier = one.action_mask * (one.action_mask.flip(1).cumsum(1).flip(1) > 1)
        one.rewards = 5 + sign * 3 * (one.evidence[0]["contribution"][:, 1:] * earlier).sum(1)
    contribution = experiences[0].evidence[0]["contribution"][1, 4:8]
    maker = make(CreditExperienceMaker, ShapingConfig("abc_signed", 1.0), *flags("reinforce"))
    done = maker.compute_advantages_and_returns(experiences)[0]
    torch.testing.assert_close(done.returns[1, 3:7] - done.returns[1, 4:8], scale * contribution)
    torch.testing.assert_close(done.returns[1, 3], done.rewards[1])
    torch.testing.assert_close(done.info["credit_scale"], torch.full((4,), scale))
    assert ("contributions do not rise with the reward" in capsys.readouterr().out) == (scale == 0)


@pytest.mark.parametrize("estimator", [name for name in ESTIMATORS if name != "gae"])
def test_gamma_discounts_credit_under_every_estimator_and_the_sparse_reward_where_the_host_does(estimator):
    def returns(method):  # of row 1, which has five actions
        words = [*flags(estimator), "--algo.advantage.gamma", "0.5"]
        one = experience(0)
        one.kl = torch.zeros_like(one.kl)
        maker = make(CreditExperienceMaker, ShapingConfig(method, 1.0), *words)
        return maker.compute_advantages_and_returns([one])[0].returns[1, 3:8]

    # Equal credit c, from the last action back: c, c·(1 + 1/2), c·(1 + 1/2 + 1/4), ...
    dense, sparse = returns("uniform"), returns("none")
    torch.testing.assert_close(dense, dense[-1] * torch.tensor([1.9375, 1.875, 1.75, 1.5, 1.0]))
    assert dense[-1] != 0
    fades = [0.0625, 0.125, 0.25, 0.5, 1.0] if estimator == "reinforce" else [1.0] * 5
    torch.testing.assert_close(sparse, sparse[-1] * torch.tensor(fades))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda exp: vars(exp).pop("evidence"), "attention row none"),
        (lambda exp: exp.evidence[0].update(attention=torch.rand(4, 8)), r"attention row \(4, 8\)"),
    ],
)
def test_missing_or_misfitting_attention_stops_the_run(damage, message):
    experiences = batch()
    damage(experiences[1])
    with pytest.raises(CreditError, match=message):
        make(CreditExperienceMaker, ShapingConfig("abc")).compute_advantages_and_returns(experiences)


def test_a_host_that_skips_or_repeats_a_reward_stops_the_run(monkeypatch):
    maker = make(CreditExperienceMaker, ShapingConfig("abc"))
    monkeypatch.setattr(RemoteExperienceMaker, "compute_advantages_and_returns", lambda self, experiences: experiences)
    with pytest.raises(CreditError, match="skipped the reward of 2 experiences"):
        maker.compute_advantages_and_returns(batch())
    monkeypatch.undo()

    def first_one_twice(self, experiences):
        for one in (experiences[0], experiences[0]):
            reward_BA = compute_reward(one.rewards, self.kl_ctl.value, one.kl, one.action_mask, None)
            self.get_cumulative_returns(reward_BA, one.action_mask, 1.0)

    monkeypatch.setattr(RemoteExperienceMaker, "compute_advantages_and_returns", first_one_twice)
    with pytest.raises(CreditError, match="out of turn, or asked twice"):
        maker.compute_advantages_and_returns(batch())


def test_a_reward_or_a_penalty_that_is_no_number_stops_the_run():
    for field, message in (("rewards", "the reward"), ("kl", r"the KL penalty \(the policy .* diverged\)")):
        experiences = batch()
        getattr(experiences[0], field)[0] = float("nan")
        with pytest.raises(CreditError, match=rf"{message} of sample 0 is NaN or infinite \(1 in its batch\)"):
            make(CreditExperienceMaker, ShapingConfig("abc")).compute_advantages_and_returns(experiences)


class Watching:
    """A recorder that keeps what it is told."""

    due = True

    def record(self, experiences, parts):
        self.parts = parts


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_final_reward_and_penalty_add_up_to_what_the_host_passed(monkeypatch, estimator):
    """Also with ``none``, whose host gets its own tensor back."""
    maker = make(CreditExperienceMaker, ShapingConfig("none"), *flags(estimator), "--reward.clip_range", "-2", "2")
    maker.recorder, passed = Watching(), []
    for name, position in (("get_advantages_and_returns", 1), ("get_cumulative_returns", 0)):
        monkeypatch.setattr(
            CreditExperienceMaker, name, noting(getattr(CreditExperienceMaker, name), position, passed)
        )
        monkeypatch.setattr(
            RemoteExperienceMaker, name, noting(getattr(RemoteExperienceMaker, name), position, passed)
        )
    experiences = batch()
    maker.compute_advantages_and_returns(experiences)
    assert len(passed) == 4 and all(passed[i] is passed[i + 1] for i in (0, 2))
    for experience, part, reward_BA in zip(experiences, maker._parts, passed[::2], strict=True):
        acts_B = experience.action_mask.any(1)
        together_BA = part.shaped_BA.double() + part.penalty_BA.double()
        torch.testing.assert_close(together_BA.float()[acts_B], reward_BA[acts_B], rtol=2e-7, atol=2e-7)  # one ulp
        assert (part.shaped_BA.abs() <= 2 + 1e-6).all() and (part.shaped_BA != 0).sum() <= acts_B.sum()
        assert (part.value_BA is experience.values) == (estimator == "gae")


def noting(method, position, notes):
    def noted(self, *args):
        notes.append(args[position])
        return method(self, *args)

    return noted


def test_a_host_whose_reward_is_made_otherwise_stops_the_run(monkeypatch):
    monkeypatch.setattr("abc_plugin.host.experience_maker.compute_reward", lambda r, coefficient, kl, *_: kl + 1.0)
    with pytest.raises(CreditError, match="is not the final reward plus the KL penalty"):
        make(CreditExperienceMaker, ShapingConfig("abc")).compute_advantages_and_returns(batch())


def test_credit_is_split_from_the_reward_and_a_reward_without_it_stops_the_run(monkeypatch):
    maker = make(CreditExperienceMaker, ShapingConfig("abc"))
    scored = EvidenceBatch(torch.tensor([1.0]), [{"attention": torch.rand(1, 9)}], {})
    monkeypatch.setattr("openrlhf.trainer.ppo_utils.experience_maker.ray.get", lambda refs: refs)

    def host_method(self, samples):
        if results:
            assert self._flatten_results(results, 1) == [scored.output] * len(results)
        return samples

    monkeypatch.setattr(RemoteExperienceMaker, "make_experience", host_method)
    results = [[scored], [scored]]
    made = maker.make_experience(batch())
    assert all(torch.equal(exp.evidence[0]["attention"], scored.evidence[0]["attention"]) for exp in made)
    results = [[scored]]
    with pytest.raises(CreditError, match="1 batches of evidence for 2 experiences"):
        maker.make_experience(batch())
    results = []
    with pytest.raises(
        CreditError,
        match="reward of sample 0 came without credit.*serve-rm --reward_shaping abc, .*uniform, abc_d or none",
    ):
        maker.make_experience(batch())
