"""The stages as descriptions of results, and what the cache holds of them. Soft prompts are made up here, not tuned."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import TASKS_FILE
from helpers import Listener
from torch import Tensor

from intrinsic_prompt_tuning import makers
from intrinsic_prompt_tuning.adapters import read_prompt
from intrinsic_prompt_tuning.backbone import Answer
from intrinsic_prompt_tuning.context import Options, Rates
from intrinsic_prompt_tuning.errors import IptError, UnreachableError
from intrinsic_prompt_tuning.experiment import Experiment, differences
from intrinsic_prompt_tuning.files import digest, read_file, write_file
from intrinsic_prompt_tuning.finding import SubspaceConfig
from intrinsic_prompt_tuning.makers import _nearest, job_of, start_of
from intrinsic_prompt_tuning.metrics import METRICS
from intrinsic_prompt_tuning.passes import Budget
from intrinsic_prompt_tuning.results import Choice, Cost, Made, Result, stages
from intrinsic_prompt_tuning.settings import TESTBED_SETTINGS, settled
from intrinsic_prompt_tuning.spaces import freed, linear_space, unit_of, untrained_space
from intrinsic_prompt_tuning.tasks import Sample, load_tasks
from intrinsic_prompt_tuning.tuning import TuneConfig
from intrinsic_prompt_tuning.using import tuned_prompts, warm_starts

Build = Callable[..., Experiment]


@pytest.fixture
def build(t5_folder: Path, tasks_file: Path, tmp_path: Path) -> Build:
    """Return a way to make an experiment on the tiny T5 and the small world, with some settings changed."""

    def build(**changes: Any) -> Experiment:
        given = {
            "backbone": str(t5_folder), "tasks_file": tasks_file, "split": "tiny", "prompt_length": 3, "shots": 4, "test_rows": 10,
            "cache": tmp_path, "device": "cpu", "learning_rate": [0.1], "vector_learning_rate": [0.1],
        }  # fmt: skip
        return Experiment(given | changes, Listener())

    return build


@pytest.fixture
def x(build: Build) -> Experiment:
    return build()


def told(x: Experiment) -> list[str]:
    assert isinstance(x.report, Listener)
    return x.report.sentences


def made_up(x: Experiment, rank: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """Return a soft prompt for each seen task, whose differences to the initial one lie near a space of few dimensions."""
    g, tasks, initial = torch.Generator().manual_seed(seed), x.named("seen"), x.prompt_space.initial_prompt
    mixed = torch.randn(len(tasks), rank, generator=g) @ torch.randn(rank, initial.numel(), generator=g)
    noise = 0.1 * torch.randn(len(tasks), initial.numel(), generator=g)
    return dict(zip(tasks, initial + 3 * (mixed + noise).unflatten(1, initial.shape), strict=True))


def save(x: Experiment, results: Iterable[Result], tensors: dict[str, Tensor], validation: float = 0.5) -> None:
    for result in results:
        x.store.save(Made(result, {"validation": validation, "validation_loss": 1.0}, tensors))


def save_prompts(x: Experiment, tasks: Iterable[str] = ()) -> dict[str, Choice]:
    """Save made-up prompts of seen tasks, all or some, and return their descriptions."""
    prompts, wanted = made_up(x), list(tasks) or x.named("seen")
    choices = x.soft_prompts(wanted)
    for task, choice in choices.items():
        save(x, choice, {"soft_prompt": prompts[task]})
    return choices


def save_subspace(x: Experiment, prompts: dict[str, Choice], dim: int = 6) -> Result:
    subspace = x.subspace("subspace", dim, prompts)
    space = untrained_space(x.prompt_space.initial_prompt, unit=2.5, dim=dim, inner=13, seed=1)
    x.store.save(Made(subspace, {"unit": space.unit}, space.weights))
    return subspace


# --- Settings ------------------------------------------------------------------------------------


def test_a_split_names_its_seen_and_unseen_tasks(x: Experiment, build: Build) -> None:
    assert x.named("seen") == list(x.tasks)[:5]
    assert x.named("unseen") == ["even-or-good", "day-then-count"]
    assert x.named("seen", "unseen") == list(x.roles) == list(x.tasks)
    with pytest.raises(IptError, match="'tinny'; did you mean 'tiny'"):
        build(split="tinny")


def test_settings_are_what_was_given_else_the_testbed_s_else_the_fields(tmp_path: Path) -> None:
    def settings(**given: Any) -> dict[str, Any]:
        made = Experiment({"cache": tmp_path, **given})
        groups = (settled(kind, made.given) for kind in (Options, TuneConfig, SubspaceConfig, Rates))
        return {name: value for group in groups for name, value in dataclasses.asdict(group).items()}

    fields = [dataclasses.asdict(kind()) for kind in (Options, TuneConfig, SubspaceConfig, Rates)]
    defaults = {name: value for group in fields for name, value in group.items()}
    assert settings(steps=None) == defaults | TESTBED_SETTINGS | {"cache": tmp_path}
    assert settings(backbone="testbed") == settings()
    assert settings(steps=7, lm_loss=False)["steps"] == 7
    assert settings(steps=7, lm_loss=False) == settings() | {"steps": 7, "lm_loss": False}
    # Open steps would ask the backbone where its prompts stand.
    elsewhere = settings(backbone="google/t5-base-lm-adapt", steps=1000)
    assert elsewhere == defaults | {"cache": tmp_path, "backbone": "google/t5-base-lm-adapt"}


@pytest.mark.parametrize("rate", [0.0, -0.1, float("nan"), float("inf")])
@pytest.mark.parametrize("field", ["learning_rate", "vector_learning_rate"])
def test_a_learning_rate_is_a_number_above_0(rate: float, field: str) -> None:
    with pytest.raises(IptError, match=f"^--{field.replace('_', '-')} is .*, expected a number above 0"):
        Rates(**{field: [0.1, rate]})


def test_what_fits_into_memory_is_remembered_for_the_next_command(x: Experiment, build: Build) -> None:
    x.remember_budgets()
    assert not list(x.store.folder.glob("budgets/*"))
    x.backbone.budget.tokens, x.backbone.budget.most, x.backbone.answer_budget.tokens = 123, 456, 789
    x.backbone.budget.overhead = 7  # is of the backbone, and not remembered
    save_prompts(x, ["mood-good"])
    again = build()
    assert again.store.folder == x.store.folder
    assert (again.backbone.budget, again.backbone.answer_budget) == (Budget(123, 456, by_block=True), Budget(789, by_block=True))


@pytest.mark.parametrize("content", ["", "null", "[[1, 2]]", '[["a", 1], [2, 3]]', "[[1], [2]]"])
def test_budgets_that_cannot_be_read_are_found_out_again(x: Experiment, build: Build, content: str) -> None:
    assert not list(x.store.folder.glob("budgets/*"))
    x.backbone.budget.tokens = 123
    x.remember_budgets()
    (file,) = x.store.folder.glob("budgets/*")
    file.write_text(content)
    again, fresh = build(), build().backbone
    assert again.store.folder == x.store.folder
    assert (again.backbone.budget, again.backbone.answer_budget) == (fresh.budget, fresh.answer_budget)


# --- Descriptions --------------------------------------------------------------------------------


def prompt_name(x: Experiment, task: str = "mood-good", seed: int = 100) -> str:
    ((result,),) = x.soft_prompts([task], seed).values()
    return result.name


def test_a_soft_prompt_s_name_changes_with_all_that_it_depends_on(x: Experiment, build: Build) -> None:
    tunings = [{"steps": 13}, {"batch_size": 5}, {"learning_rate": [0.2]}, {"evaluations": 4}, {"patience": 2}]
    options = [
        {"prompt_length": 4},
        {"shots": 5},
        {"decoding": "generate"},
        {"max_length": 30},
        {"seed": 1},
        {"precision": "bf16"},
    ]
    names = [prompt_name(x), prompt_name(x, task="animal-class"), prompt_name(x, seed=21)]
    names += [prompt_name(build(**change)) for change in [*tunings, *options]]
    assert len(set(names)) == len(names) == 14


def test_a_soft_prompt_s_name_changes_with_every_field_of_its_configuration(x: Experiment) -> None:
    names = [prompt_name(x)]
    for field in dataclasses.fields(TuneConfig):
        config = dataclasses.replace(TuneConfig(), **{field.name: getattr(TuneConfig(), field.name) * 2})
        names.append(prompt_name(Experiment(x.given | dataclasses.asdict(config))))
    assert len(set(names)) == len(names)


def test_a_soft_prompt_s_name_changes_with_its_task_s_metric_and_rows(x: Experiment, build: Build, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    names = [prompt_name(x, "animal-class")]
    for old, new in (("metric: Classification-F1", "metric: ACC"), ("cod fish, eel fish", "cod fish, eel bird")):
        assert old in TASKS_FILE
        other.write_text(TASKS_FILE.replace(old, new), encoding="utf-8")
        names.append(prompt_name(build(tasks_file=other), "animal-class"))
    assert len(set(names)) == 3


def test_a_result_s_name_does_not_change_with_what_changes_nothing(x: Experiment, build: Build) -> None:
    others = [{"test_rows": 7}, {"slots": 3}, {"skip_missing": True}, {"lm_loss": False}]
    assert {prompt_name(build(**change)) for change in others} == {prompt_name(x)}


def test_a_grid_of_learning_rates_is_a_choice(build: Build) -> None:
    x = build(learning_rate=[0.1, 0.3])
    choices = x.soft_prompts(["mood-good", "count-next"])
    found = {task: [result.header["learning_rate"] for result in choice] for task, choice in choices.items()}
    assert found == {"mood-good": [0.3, 0.1], "count-next": [0.3, 0.1]}
    one, two = (result.header for result in choices["mood-good"])
    assert {name for name in one if one[name] != two[name]} == {"learning_rate"}


def test_a_rate_is_needed_only_where_no_rate_before_it_solved_the_task(build: Build) -> None:
    x = build(learning_rate=[0.1, 0.3, 0.5])
    ((first, second, third),) = x.soft_prompts(["mood-good"]).values()
    assert x.store.missing([first, second, third]) == [first, second, third]
    save(x, [first], {"soft_prompt": made_up(x)["mood-good"]}, validation=0.9)
    assert x.store.missing([first, second, third]) == [second, third]
    save(x, [second], {"soft_prompt": made_up(x)["mood-good"]}, validation=1.0)
    assert x.store.missing([first, second, third]) == []
    assert x.store.best((first, second, third))[0] is second


def test_files_of_another_initial_text_are_not_used_and_that_is_said(x: Experiment, build: Build) -> None:
    save_prompts(x)
    other = build(initial_text="the glad fox")
    seen = x.named("seen")
    assert other.found_prompts(seen) == {} and told(other) == [f"not used: {len(seen)} soft prompts of another initial_text"]
    save_prompts(other)
    assert sorted(x.found_prompts(seen)) == sorted(other.found_prompts(seen)) == sorted(seen)
    assert not torch.equal(x.prompt_space.initial_prompt, other.prompt_space.initial_prompt)


def test_tries_are_a_choice_vectors_each_from_its_own_start_and_a_solved_task_needs_no_other(build: Build) -> None:
    x, once = build(learning_rate=[0.1, 0.3], vector_learning_rate=[0.2], tries=3), build(learning_rate=[0.1, 0.3])
    (choice,) = x.soft_prompts(["mood-good"]).values()
    assert [(r.header["learning_rate"], r.header.get("try")) for r in choice] == [
        (0.3, None),
        (0.3, 1),
        (0.3, 2),
        (0.1, None),
        (0.1, 1),
        (0.1, 2),
    ]
    assert [r.name for r in once.soft_prompts(["mood-good"])["mood-good"]] == [choice[0].name, choice[3].name]
    prompts = save_prompts(build())
    vectors = x.intrinsic_vectors(["mood-good"], 100, x.subspace("random", 6, prompts))["mood-good"]
    space = untrained_space(x.prompt_space.initial_prompt, unit=2.5, dim=6, inner=13, seed=1)
    jobs = [job_of(x, result, space) for result in vectors]
    assert (
        len({tuple(job.theta.tolist()) for job in jobs})
        == len({job.order for job in jobs})
        == len({str(job) for job in jobs})
        == 3
    )
    again = [job_of(x, result, x.prompt_space) for result in choice[:3]]  # prompts: their rows in another order alone
    assert not any(job.theta.any() for job in again) and len({job.order for job in again}) == 3
    for result, validation in zip(choice[:3], (0.5, 1.0, 1.0), strict=True):
        save(x, [result], {"soft_prompt": made_up(x)["mood-good"]}, validation=validation)
    assert x.store.missing(choice) == [] and x.store.best(choice)[0] is choice[1]


def test_a_subspace_of_prompts_of_which_some_rates_were_not_needed_is_found_again(build: Build) -> None:
    """As `ipt run --learning-rate 0.1 --learning-rate 0.3` leaves it."""
    x = build(learning_rate=[0.1, 0.3])
    prompts = x.soft_prompts(x.named("seen"))
    for task, choice in prompts.items():
        solved = task == "mood-good"
        save(x, choice[:1] if solved else choice, {"soft_prompt": made_up(x)[task]}, validation=1.0 if solved else 0.5)
    assert x.store.missing([result for choice in prompts.values() for result in choice]) == []
    subspace = save_subspace(x, prompts)
    other = build()
    assert [found.name for found in other.found_subspaces()] == [subspace.name], told(other)


def test_a_subspace_s_name_changes_with_its_kind_dim_configuration_and_prompts(x: Experiment, build: Build) -> None:
    prompts = x.soft_prompts(x.named("seen"))
    some = {task: choice for task, choice in prompts.items() if task != "count-next"}
    names = [x.subspace("subspace", 6, prompts).name, x.subspace("subspace", 5, prompts).name]
    names += [x.subspace(kind, 6, prompts).name for kind in ("linear", "random", "random-unscaled", "low-rank")]
    names += [x.subspace("subspace", 6, some).name]
    more = build(learning_rate=[0.1, 0.2])
    names += [more.subspace("subspace", 6, more.soft_prompts(x.named("seen"))).name]
    for field in dataclasses.fields(SubspaceConfig):
        value = getattr(SubspaceConfig(), field.name)
        config = SubspaceConfig(**{field.name: not value if isinstance(value, bool) else value + 1})
        names.append(Experiment(x.given | dataclasses.asdict(config)).subspace("subspace", 6, prompts).name)
    assert len(set(names)) == len(names) == 8 + 12


def test_a_space_that_needs_no_learning_does_not_change_with_how_others_learn(x: Experiment, build: Build) -> None:
    """`ipt run --subspace-steps 500` and `ipt tune --space random` mean one space."""
    prompts = x.soft_prompts(x.named("seen"))
    for kind in ("linear", "random", "random-unscaled"):
        others = [build(subspace_steps=500), build(alpha=1.0), build(noise=0.0)]
        assert {other.subspace(kind, 4, prompts).name for other in others} == {x.subspace(kind, 4, prompts).name}


def test_an_intrinsic_vector_s_name_changes_with_all_that_it_depends_on(x: Experiment, build: Build) -> None:
    prompts = x.soft_prompts(x.named("seen"))
    one, two = x.subspace("subspace", 6, prompts), x.subspace("random", 6, prompts)

    def name(by: Experiment, task: str = "mood-good", seed: int = 100, subspace: Result = one, start: Any = "random") -> str:
        ((result,),) = by.intrinsic_vectors([task], seed, subspace, start).values()
        assert result.inputs == ((subspace,),)
        return result.name

    names = [name(x), name(x, "count-next"), name(x, seed=21), name(x, subspace=two), name(x, start="seen")]
    names += [name(build(**change)) for change in ({"steps": 13}, {"vector_learning_rate": [0.2]}, {"seed": 1}, {"shots": 5})]
    assert len(set(names)) == len(names)
    assert name(build(learning_rate=[0.7])) == name(x)


def score_of(x: Experiment, stage: str, task: str = "mood-good") -> Result:
    (score,) = [score for score in x.scores(x.soft_prompts([task]), [], []) if score.header["stage"] == stage]
    return score


def test_a_score_without_a_prompt_is_another_at_each_prompt_length_and_maximal_length(x: Experiment, build: Build) -> None:
    """The prompt and the maximal length decide where inputs are cut."""
    others = [build(prompt_length=4), build(max_length=30), build(test_rows=9), build(decoding="generate")]
    assert len({score_of(other, "no prompt").name for other in [x, *others]}) == 5
    assert score_of(build(steps=13), "no prompt").name == score_of(x, "no prompt").name


def test_a_score_changes_with_its_metric_its_prompt_and_its_task(x: Experiment, build: Build, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(TASKS_FILE.replace("metric: Classification-F1", "metric: ACC"), encoding="utf-8")
    for stage in ("no prompt", "one answer for all", "prompt tuning"):
        scores = [
            score_of(x, stage),
            score_of(x, stage, "animal-class"),
            score_of(build(tasks_file=other), stage, "animal-class"),
        ]
        assert len({score.name for score in scores}) == 3
    assert score_of(x, "prompt tuning").name != score_of(build(steps=13), "prompt tuning").name
    assert score_of(x, "one answer for all").name != score_of(build(shots=5), "one answer for all").name


def test_every_prompt_vector_and_reconstruction_is_scored_once(x: Experiment) -> None:
    prompts = x.soft_prompts(x.named("seen", "unseen"))
    collection = {task: prompts[task] for task in x.named("seen")}
    spaces = [x.subspace("subspace", 6, collection), x.subspace("random", 6, collection)]
    vectors = [choice for s in spaces for choice in x.intrinsic_vectors(x.named("unseen"), 100, s).values()]
    scores = x.scores(prompts, [*spaces, spaces[0]], vectors)
    count = {stage: sum(score.header["stage"] == stage for score in scores) for stage in ("MSF", "IST", "mean", "nearest")}
    assert count == {"MSF": 7, "IST": 4, "mean": 2, "nearest": 2}
    assert len({score.name for score in scores}) == len(scores) == 3 * 7 + 7 + 4 + 2 * 2


def test_another_prompt_than_the_subspace_s_own_is_no_reconstruction(x: Experiment, build: Build) -> None:
    """T_train(MSF) is of the prompts that the subspace was made of, whatever else the cache holds of their tasks."""
    own = x.soft_prompts(x.named("seen"))
    later = build(learning_rate=[0.1, 0.5]).soft_prompts(x.named("seen", "unseen"))
    subspace = x.subspace("subspace", 6, own)
    scores = [score for score in x.scores(later, [subspace], []) if score.header["stage"] == "MSF"]
    inputs = {score.header["task"]: len(score.inputs[0]) for score in scores}
    assert inputs == dict.fromkeys(x.named("seen"), 1) | dict.fromkeys(x.named("unseen"), 2)


# --- Costs ---------------------------------------------------------------------------------------


def test_a_prompt_s_cost_counts_steps_validation_rows_tokens_and_numbers(build: Build) -> None:
    def cost(**changes: Any) -> Cost:
        x = build(**{"steps": 10, "batch_size": 2, "evaluations": 1} | changes)
        ((result,),) = x.soft_prompts(["mood-good"]).values()
        return result.cost

    train = build().sample("mood-good", 100).train
    length = 3 + sum(len(e.input) for e in train) / len(train) / 4
    assert cost() == Cost(20, 8, pytest.approx(28 * length), 4 * 48, steps=10)
    assert cost(steps=20) == Cost(40, 8, pytest.approx(48 * length), 4 * 48, steps=20)
    assert cost(evaluations=2) == Cost(20, 16, pytest.approx(36 * length), 4 * 48, steps=10)


def test_a_vector_s_cost_has_the_dim_s_numbers(build: Build) -> None:
    x = build(steps=10, batch_size=2, evaluations=1)
    subspace = x.subspace("subspace", 6, x.soft_prompts(x.named("seen")))
    ((vector,),) = x.intrinsic_vectors(["mood-good"], 100, subspace).values()
    ((prompt,),) = x.soft_prompts(["mood-good"]).values()
    assert vector.cost == dataclasses.replace(prompt.cost, size=4 * 6)


def test_a_subspace_s_cost_counts_the_rows_of_the_tasks_loss_and_its_weights(build: Build) -> None:
    def cost(kind: Any = "subspace", **changes: Any) -> Cost:
        x = build(**{"subspace_steps": 7} | changes)
        return x.subspace(kind, 6, x.soft_prompts(x.named("seen"))).cost

    assert (cost().trained, cost().answered) == (7 * 5 * 4, 0)
    assert 0 < cost().tokens / cost().trained < 30
    space = untrained_space(build().prompt_space.initial_prompt, unit=1, dim=4, inner=768, seed=0)
    weights = freed(space, 6, reach=0.5, seed=0).weights.values()
    assert cost().size == pytest.approx(4 * sum(weight.numel() for weight in weights), rel=0.05)
    assert dataclasses.replace(cost(lm_loss=False), size=0) == Cost(steps=cost().steps)
    assert dataclasses.replace(cost("random"), size=0) == Cost()
    assert cost().steps == SubspaceConfig().steps_before + 7


def test_a_score_s_cost_counts_test_rows_and_one_answer_for_all_costs_nothing(x: Experiment) -> None:
    for stage, rows in (("no prompt", 10), ("prompt tuning", 10), ("one answer for all", 0)):
        cost = score_of(x, stage).cost
        assert (cost.trained, cost.answered, cost.size) == (0, rows, 0)
        assert bool(cost.tokens) == bool(rows)


def test_a_plan_s_time_comes_from_steps_that_change_nothing(build: Build) -> None:
    x = build(steps=5)
    prompts = [result for choice in x.soft_prompts(x.roles).values() for result in choice]
    assert all(0 < seconds < 5 for seconds in x._pace(prompts))
    assert x._pace(prompts) == x._pace(prompts), "measured once"
    x.make(prompts, dry_run=True)
    assert told(x)[0].startswith("plan: 7 soft prompts to make, 0 made before; at most ")
    assert not x.store.folder.exists()


# --- Starts --------------------------------------------------------------------------------------


def test_soft_prompts_start_at_the_initial_prompt(x: Experiment) -> None:
    ((prompt,),) = x.soft_prompts(["mood-good"]).values()
    assert torch.equal(start_of(x, prompt, x.prompt_space), torch.zeros(48))


def test_intrinsic_vectors_start_by_the_paper_s_rule_or_like_the_seen_tasks_vectors(x: Experiment) -> None:
    subspace = save_subspace(x, save_prompts(x), dim=20)
    space = x.space(subspace)
    seen = space.project(torch.stack(list(made_up(x).values())))

    def starts(start: Any) -> Tensor:
        choices = [choice for seed in range(40) for choice in x.intrinsic_vectors(x.tasks, seed, subspace, start).values()]
        return torch.stack([start_of(x, choice[0], space) for choice in choices])

    drawn = starts("random")
    assert drawn.shape == (280, 20)
    assert float(drawn.std()) == pytest.approx(0.02, rel=0.05)
    assert len(drawn.unique(dim=0)) == 280
    near = starts("seen")
    torch.testing.assert_close(near.mean(0), seen.mean(0), rtol=0, atol=0.25 * float(seen.std(0).max()))
    covariance = torch.cov(seen.T, correction=0)
    assert float((torch.cov(near.T) - covariance).norm() / covariance.norm()) < 0.25


def test_what_starts_nearby_starts_at_the_seen_prompts_with_the_least_losses_a_try_each(x: Experiment, build: Build) -> None:
    subspace, by = save_subspace(x, save_prompts(x), dim=20), build(tries=7)
    collection, train = by.found_prompts(by.named("seen")), x.encoded("even-or-good", 21)[0]
    prompts = torch.stack([made_up(x)[task] for task in collection])
    losses = [sum(a.loss for a in x.backbone.answer(prompt[None], [(0, row) for row in train])) for prompt in prompts]
    order = sorted(range(5), key=losses.__getitem__)
    near = [by.soft_prompts(["even-or-good"], 21, near=[*collection.values()])["even-or-good"],
            by.intrinsic_vectors(["even-or-good"], 21, subspace, "nearest")["even-or-good"]]  # fmt: skip
    for choice, space in zip(near, (x.prompt_space, x.space(subspace)), strict=True):
        assert len(choice) == 7 and len({result.name for result in choice}) == 7
        for result, at in zip(choice, (*order, *order[:2]), strict=True):
            torch.testing.assert_close(start_of(by, result, space), space.project(prompts[[at]])[0])
    assert [stage[0].header.get("start") for stage in stages([*near[0], *chain(*collection.values())], ["soft-prompt"])] == [
        None, "nearest",
    ]  # fmt: skip
    with pytest.raises(IptError, match="--start nearest needs a space that prompts can be sent into"):
        x.intrinsic_vectors(["even-or-good"], 21, x.subspace("low-rank", 38, collection), "nearest")


@pytest.mark.parametrize("count", [1, 3, 20])
def test_the_nearest_are_found_without_all_rows_of_all_prompts(count: int) -> None:
    losses, asked = torch.rand(20, 33, generator=torch.Generator().manual_seed(count)), list[Any]()
    losses[:4] /= 8
    losses[4, 5] = math.nan

    def answer(prompts: Tensor, pairs: list[Any], *, decoding: None) -> list[Answer]:
        asked.extend(pairs)
        return [Answer("", float(losses[pair])) for pair in pairs]

    x: Any = SimpleNamespace(backbone=SimpleNamespace(answer=answer))
    rows: Any = range(33)
    found = _nearest(x, torch.zeros(20, 1, 1), rows, count)
    assert found == losses.nan_to_num(math.inf).mean(1).argsort().tolist()[:count]
    assert len(asked) == len(set(asked)) and (len(asked) < 20 * 33 / 2 if count < 20 else len(asked) == 20 * 33)


def test_a_start_changes_with_task_and_seeds_and_not_with_learning_rate_space_or_configuration(
    x: Experiment, build: Build
) -> None:
    prompts = save_prompts(x)

    def start(by: Experiment, task: str = "mood-good", seed: int = 100, dim: int = 6) -> tuple[float, ...]:
        subspace = by.subspace("random", dim, prompts)
        (choice,) = by.intrinsic_vectors([task], seed, subspace).values()
        space = untrained_space(by.prompt_space.initial_prompt, unit=2.5, dim=dim, inner=13, seed=1)
        return tuple(start_of(by, choice[0], space).tolist())

    assert start(build(vector_learning_rate=[0.5], steps=3)) == start(x) == start(x)
    assert len({start(x), start(x, "count-next"), start(x, seed=21), start(build(seed=1))}) == 4
    assert len(start(x, dim=4)) == 4


def test_a_start_like_the_seen_tasks_is_the_same_in_a_subspace_that_was_described_and_in_one_that_was_found(
    x: Experiment, build: Build
) -> None:
    """Headers keep no order of tasks, so a result may not depend on one."""
    described = save_subspace(x, save_prompts(x))
    again = build()
    (found,) = again.found_subspaces()
    assert found.name == described.name
    starts = []
    for by, subspace in ((x, described), (again, found)):
        (choice,) = by.intrinsic_vectors(["day-then-count"], 100, subspace, "seen").values()
        starts.append((choice[0].name, start_of(by, choice[0], by.space(subspace))))
    assert starts[0][0] == starts[1][0]
    torch.testing.assert_close(starts[0][1], starts[1][1])


def test_with_other_seeds_prompts_vectors_subspaces_and_random_words_are_others(build: Build) -> None:
    x = build(initial_text="")
    one = x.with_seeds(0)
    other = x.with_seeds(2)
    assert (other.options.seed, other.fitting.subspace_seed) == (x.options.seed + 2, x.fitting.subspace_seed + 2)

    def told(by: Experiment) -> list[str]:
        prompts = by.soft_prompts(by.named("seen"))
        subspace = by.subspace("subspace", 6, prompts)
        vectors = by.intrinsic_vectors(["mood-good"], 21, subspace)["mood-good"]
        return [prompts["mood-good"][0].name, subspace.name, vectors[0].name]

    assert told(one) == told(x)
    assert not {*told(other)} & {*told(x)}
    assert other.soft_prompts(["mood-good"])["mood-good"][0].header["seed"] == x.options.seed + 2
    assert not torch.equal(other.prompt_space.initial_prompt, x.prompt_space.initial_prompt)
    assert torch.equal(one.prompt_space.initial_prompt, x.prompt_space.initial_prompt)


# --- Rows ----------------------------------------------------------------------------------------


def test_a_hub_that_does_not_answer_is_asked_once_unless_tasks_may_be_left_out(build: Build) -> None:
    asked: list[str] = []

    def unreachable(data_seed: int, shots: int, test_rows: int | None) -> Sample:
        asked.append("")
        raise UnreachableError("no route")

    for skip_missing in (False, True):
        x = build(skip_missing=skip_missing)
        x.tasks = {name: dataclasses.replace(task, draw=unreachable, definition=None) for name, task in x.tasks.items()}
        seen, n_before = x.named("seen"), len(asked)
        if skip_missing:
            assert x.with_rows(seen, 100) == [] and len(asked) == n_before + len(seen)
        else:
            with pytest.raises(IptError, match="^no route$"):
                x.with_rows(seen, 100)
            assert len(asked) == 1


def test_words_that_the_backbone_does_not_know_are_said(build: Build, tmp_path: Path) -> None:
    rows = [f"a marvellous film number {n} {'glad' if n % 2 else 'sorry'},{'yes' if n % 2 else 'no'}" for n in range(60)]
    (tmp_path / "films.csv").write_text("\n".join(["text,label", *rows]), encoding="utf-8")
    x = build(data=tmp_path / "films.csv", split="own")
    x.encoded("films", 100)
    assert any("tokens of films are words that" in sentence and "name another --backbone" in sentence for sentence in told(x))
    known = build()
    known.encoded("mood-good", 100)
    assert not told(known)


def test_rows_that_cannot_be_had_are_refused_before_anything_is_made_or_left_out(build: Build, impossible: Path) -> None:
    x = build(tasks_file=impossible)
    with pytest.raises(IptError, match=r"1 tasks cannot be had, leave them out with --skip-missing: .*mood good and mood bad"):
        x.with_rows(x.named("seen"), 100)
    x.finish()
    x = build(tasks_file=impossible, skip_missing=True)
    assert x.with_rows(x.named("seen"), 100) == [task for task in x.roles if x.roles[task] == "seen" and task != "animal-class"]
    assert "animal-class" not in x.named("seen")
    assert [sentence.startswith("left out: ") for sentence in told(x)] == [True]
    with pytest.raises(IptError, match="1 were left out: .*mood good and mood bad"):
        x.finish()


def test_a_plan_asks_for_no_rows_but_those_it_is_about(build: Build, impossible: Path) -> None:
    """On a split of Hub tasks, a dry run of one task may not download others, nor fail for them."""
    x = build(tasks_file=impossible)
    x.make(x.soft_prompts(["mood-good"], 21)["mood-good"], dry_run=True)
    assert "by steps just measured" in told(x)[0]
    assert [path.name for path in x.cache.glob("samples/*/*/*train*")] == ["mood-good_4_21_train.jsonl"]


def test_a_dim_that_is_named_twice_is_one(x: Experiment) -> None:
    _, scores = x.whole([6, 6], 21)
    assert len(scores) == len({score.name for score in scores})


def test_rows_are_drawn_once_on_a_machine(x: Experiment, build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    first = x.sample("mood-good", 100)
    monkeypatch.setattr("intrinsic_prompt_tuning.tasks.worlds.draw_rows", lambda *_: pytest.fail("drawn again"))
    assert build().sample("mood-good", 100) == first
    assert list(x.cache.glob("samples/mood-good-*/mood-good/mood-good_4_100_test.jsonl"))


# --- What the cache holds ------------------------------------------------------------------------


def test_prompts_are_found_whatever_they_were_tuned_with(x: Experiment, build: Build) -> None:
    save_prompts(x)
    save_prompts(build(learning_rate=[0.3, 0.5], steps=13), ["mood-good"])
    found = build().found_prompts(x.named("seen", "unseen"))
    assert list(found) == x.named("seen"), "in the split's order, and without tasks that have none"
    assert {task: len(choice) for task, choice in found.items()} == dict.fromkeys(x.named("seen"), 1) | {"mood-good": 3}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"prompt_length": 4}, "another prompt_length"),
        ({"max_length": 30}, "another max_length"),
        ({"seed": 1}, "another seed"),
        ({"decoding": "generate"}, "another decoding"),
        ({"precision": "bf16"}, None),  # other weights: a folder of its own
        ({"shots": 5}, "other rows"),
    ],
)
def test_prompts_of_other_options_or_rows_are_not_used_and_that_is_said(
    x: Experiment, build: Build, change: dict[str, Any], reason: str | None
) -> None:
    save_prompts(x)
    other = build(**change)
    assert other.found_prompts(x.named("seen")) == {}
    assert told(other) == ([f"not used: 5 soft prompts of {reason}"] if reason else [])
    with pytest.raises(IptError, match="5 seen tasks of the split tiny have no soft prompt .*: run 'ipt collect'"):
        other.collected()


def test_prompts_of_other_data_seeds_are_no_baseline(x: Experiment) -> None:
    for choice in x.soft_prompts(["mood-good"], 21).values():
        save(x, choice, {"soft_prompt": made_up(x)["mood-good"]})
    assert x.found_prompts(x.roles) == {}


def test_a_prompt_of_another_data_seed_answers_where_its_task_is_named(x: Experiment, build: Build) -> None:
    for choice in x.soft_prompts(["mood-good"], 21).values():
        save(x, choice, {"soft_prompt": made_up(x)["mood-good"]})
    for source in ("best", "prompt"):
        assert tuned_prompts(build(), ["mood-good"], source)["mood-good"].result.name == choice[0].name
    with pytest.raises(IptError, match="holds no tuned prompt of task 'mood-good'"):
        tuned_prompts(build(), ["mood-good"], "collected")
    assert build().found_vectors([]) == [], "eval has no row for it"


def test_a_seen_task_without_a_prompt_is_named_and_left_out_only_when_asked(x: Experiment, build: Build) -> None:
    save_prompts(x, ["mood-good", "count-next"])
    with pytest.raises(IptError, match=r"3 seen tasks .*animal-class, thing-plural, mood-opposite-choice.*--skip-missing"):
        x.collected()
    other = build(skip_missing=True)
    assert list(other.collected()) == ["mood-good", "count-next"]
    assert sorted(other.left_out) == ["animal-class", "mood-opposite-choice", "thing-plural"]
    assert build(skip_missing=True, split="tiny").named("seen") == x.named("seen")


def test_nothing_stands_in_for_all_prompts_that_are_missing(build: Build) -> None:
    with pytest.raises(IptError, match="5 seen tasks .* have no soft prompt"):
        build(skip_missing=True).collected()


def test_a_damaged_prompt_is_left_out_by_name(x: Experiment, build: Build) -> None:
    choices = save_prompts(x)
    path = x.store.path(choices["count-next"][0])
    path.write_bytes(path.read_bytes()[:-5])
    other = build()
    assert "count-next" not in other.found_prompts(x.named("seen"))
    assert told(other)[0].startswith(f"left out: {path} is not a file of ipt, or is damaged")
    with pytest.raises(IptError, match=path.name):
        other.finish()


def test_every_file_that_is_left_out_is_named_also_in_a_folder_with_spaces(build: Build, tmp_path: Path) -> None:
    x = build(cache=tmp_path / "my own cache")
    paths = [x.store.path(choice[0]) for task, choice in save_prompts(x).items() if task in ("count-next", "mood-good")]
    for path in paths:
        path.write_bytes(b"half")
    other = build(cache=tmp_path / "my own cache")
    other.found_prompts(x.named("seen"))
    with pytest.raises(IptError, match="2 were left out") as caught:
        other.finish()
    assert all(str(path) in str(caught.value) for path in paths)


@pytest.mark.parametrize(
    "tensors",
    [
        {"soft_prompt": torch.zeros(16, 3)},
        {"intrinsic_vector": torch.zeros(3, 16)},
        {"soft_prompt": torch.zeros(3, 16), "more": torch.zeros(1)},
        {"soft_prompt": torch.full((3, 16), float("nan"))},
        {"soft_prompt": torch.full((3, 16), float("inf"))},
        {"soft_prompt": torch.zeros(3, 16, dtype=torch.float16)},
    ],
)
def test_tensors_other_than_expected_are_refused_by_name(x: Experiment, tensors: dict[str, Tensor]) -> None:
    ((result,),) = x.soft_prompts(["mood-good"]).values()
    save(x, [result], tensors)
    with pytest.raises(IptError, match=rf"{result.name}\.safetensors holds the tensors .*expected .*: remove it"):
        x.prompts([(result,)])


def test_the_best_of_a_grid_is_what_is_used(build: Build) -> None:
    x = build(learning_rate=[0.1, 0.3, 0.5])
    prompts = list(made_up(x).values())[:3]
    ((*choice,),) = x.soft_prompts(["mood-good"]).values()
    for result, prompt, validation in zip(choice, prompts, (0.2, 0.9, 0.5), strict=True):
        save(x, [result], {"soft_prompt": prompt}, validation)
    assert torch.equal(x.prompts([tuple(choice)])[0], prompts[1])


def test_a_subspace_is_found_again_also_after_more_prompts_were_collected(x: Experiment, build: Build) -> None:
    subspace = save_subspace(x, save_prompts(x))
    save_prompts(build(learning_rate=[0.5]))
    other = build()
    (found,) = other.found_subspaces()
    assert found.name == subspace.name
    assert {choice[0].header["learning_rate"] for choice in found.inputs} == {0.1}
    assert sorted(choice[0].header["task"] for choice in found.inputs) == sorted(x.named("seen"))
    assert other.choose_subspace("subspace", 6, "").name == subspace.name


def test_subspaces_of_other_tasks_or_of_prompts_that_are_gone_are_not_used_and_that_is_said(
    x: Experiment, build: Build, tmp_path: Path
) -> None:
    prompts = save_prompts(x)
    save_subspace(x, prompts)
    split = tmp_path / "split.yaml"
    split.write_text("seen: [mood-good, count-next]\nunseen: [even-or-good]\n", encoding="utf-8")
    other = build(split=str(split))
    assert other.found_subspaces() == other.found_subspaces() == []
    assert told(other) == ["not used: 1 subspaces of another split's tasks"]
    x.store.path(prompts["mood-good"][0]).unlink()
    other = build()
    assert other.found_subspaces() == []
    assert told(other) == ["not used: 1 subspaces of soft prompts that are gone"]


def test_what_a_subspace_was_made_of_is_told_and_not_scored_once_rows_are_others(x: Experiment, build: Build) -> None:
    subspace = save_subspace(x, save_prompts(x))
    other = build(shots=5)
    for task, choice in other.soft_prompts(other.named("seen", "unseen")).items():
        save(other, choice, {"soft_prompt": made_up(x).get(task, made_up(x)["mood-good"])})
    again = build(shots=5)
    stages = [score.header["stage"] for score in again.wanted_scores() if score.header.get("subspace") == subspace.name]
    assert stages == ["MSF", "MSF"], "of the unseen tasks alone"
    assert f"subspace {subspace.name[:8]}: 5 of its 5 soft prompts are of other rows than their tasks have now" in told(again)


def test_every_score_is_of_the_rows_that_its_task_has(x: Experiment, build: Build) -> None:
    """By training rows the nearest prompt is found, and by them and validation rows the longest answer."""
    prompts, fewer = save_prompts(x), build(shots=5)
    subspace = save_subspace(x, prompts)
    for task in ("mood-good", "day-then-count"):
        names = [
            {s.name for s in by.scores({task: prompts.get(task, prompts["mood-good"])}, [subspace], [])} for by in (x, fewer)
        ]
        assert names[0] and not names[0] & names[1]


def test_a_subspace_is_no_prompt_though_it_may_have_the_shape_of_one(x: Experiment) -> None:
    subspace = x.subspace("low-rank", 6, save_prompts(x))
    x.make([subspace])
    with pytest.raises(IptError, match="is a subspace, expected a soft prompt or an intrinsic vector"):
        read_prompt(x, x.store.path(subspace), "mood-good")


@pytest.mark.parametrize("kind", ["random", "random-unscaled", "low-rank"])
def test_a_start_nearby_needs_a_space_that_prompts_can_be_sent_into(x: Experiment, kind: Any) -> None:
    """What an untrained network makes of a prompt has nothing to do with what it makes of that."""
    subspace = x.subspace(kind, 6, save_prompts(x))
    with pytest.raises(IptError, match=f"--start nearest needs a space .* a {kind} one is not"):
        x.intrinsic_vectors(["day-then-count"], 100, subspace, "nearest")


def test_a_random_space_of_an_older_cache_which_starts_elsewhere_is_no_longer_used(x: Experiment, build: Build) -> None:
    now = x.subspace("random", 6, save_prompts(x))
    before = Result({name: value for name, value in now.header.items() if name != "origin"}, now.inputs)
    space = untrained_space(x.prompt_space.initial_prompt, unit=2.5, dim=6, inner=13, seed=1)
    x.store.save(Made(before, {"unit": space.unit}, space.weights))
    other = build()
    assert other.found_subspaces() == []
    assert told(other) == ["not used: 1 subspaces of another origin, random ones of older versions"]
    assert other.choose_subspace("random", 6, "").name == now.name != before.name


def test_a_space_with_free_numbers_and_one_without_are_told_apart(x: Experiment, build: Build) -> None:
    """Those of older versions are without."""
    prompts, paper = save_prompts(x), build(free=0.0)
    one, two = save_subspace(x, prompts), save_subspace(paper, prompts)
    assert one.header == two.header | {"free": 0.5}
    with pytest.raises(
        IptError, match=rf"{one.name[:8]} \(free 0\.5\).*{two.name[:8]} \(free 0\)|{two.name[:8]} \(free 0\).*{one.name[:8]}"
    ):
        x.choose_subspace("subspace", 6, "")
    few = {build(free=free).subspace("subspace", 4, prompts).name for free in (0.0, 0.5, 1.0)}
    assert len(few) == 1, "no more numbers than the prompts of five tasks differ in"


@pytest.mark.parametrize("kind", ["subspace", "linear"])
def test_of_more_numbers_than_prompts_differ_in_the_rest_is_free(x: Experiment, build: Build, kind: Any) -> None:
    prompts = save_prompts(x)
    spaces = [build(subspace_steps=2, subspace_seed=seed).subspace(kind, 20, prompts) for seed in (0, 1)]
    x.make(spaces)
    for subspace in spaces:
        weights = x.space(subspace).weights
        assert (weights["free.weight"].shape, weights["in.weight"].shape) == ((48, 16), (4, 48))
    assert len({float(x.space(subspace).weights["free.weight"][0, 0]) for subspace in spaces}) == 2
    paper = build(subspace_steps=2, free=0.0)
    if kind == "subspace":
        paper.make([whole := paper.subspace(kind, 20, prompts)])
        assert "free.weight" not in paper.space(whole).weights and paper.space(whole).dim == 20
    else:
        with pytest.raises(IptError, match="the 5 prompts span 4 dimensions, not 20: use a smaller --dim"):
            paper.make([paper.subspace(kind, 20, prompts)])


def test_of_several_subspaces_one_must_be_named_and_what_differs_is_told(x: Experiment, build: Build) -> None:
    prompts = save_prompts(x)
    one = save_subspace(x, prompts)
    two = save_subspace(build(lm_loss=False), prompts)
    with pytest.raises(IptError, match="the cache holds 2 subspaces of dim 6: name one with --subspace: ") as caught:
        x.choose_subspace("subspace", 6, "")
    for subspace, lm_loss in ((one, True), (two, False)):
        assert f"{subspace.name[:8]} (lm_loss {lm_loss})" in str(caught.value)
        assert x.choose_subspace("subspace", 6, subspace.name[:8]).name == subspace.name
        assert x.choose_subspace("subspace", 6, subspace.name).name == subspace.name
    with pytest.raises(IptError, match="name one with --subspace"):
        x.choose_subspace("subspace", 6, "zz")


def test_a_space_of_fewer_seen_tasks_is_not_taken_for_that_of_all(x: Experiment, build: Build) -> None:
    prompts = save_prompts(x)
    few = {task: prompts[task] for task in ("mood-good", "animal-class")}
    small = save_subspace(x, few)
    with pytest.raises(
        IptError,
        match=f"holds 1 subspaces of dim 6, none of them of all 5 seen tasks: name one with --subspace: {small.name[:8]} .2 tasks",
    ):
        x.choose_subspace("subspace", 6, "")
    assert x.choose_subspace("subspace", 6, small.name[:4]).name == small.name
    assert build(skip_missing=True).choose_subspace("subspace", 6, "").name == small.name
    linear = x.subspace("linear", 1, few)
    x.make([linear])
    assert x.choose_subspace("linear", 1, "").name == x.subspace("linear", 1, prompts).name != linear.name
    whole = save_subspace(x, prompts)
    assert x.choose_subspace("subspace", 6, "").name == whole.name
    assert build(skip_missing=True).choose_subspace("subspace", 6, "").name == whole.name


def test_what_goes_on_from_a_state_looks_for_no_start(x: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    subspace = save_subspace(x, save_prompts(x))
    ((result,),) = x.intrinsic_vectors(["even-or-good"], 100, subspace, "nearest").values()
    x.store.save_unfinished({result: {"step": torch.tensor(1.0), "theta": torch.ones(6)}})
    monkeypatch.setattr(makers, "start_of", lambda *_: pytest.fail("a start was looked for"))
    assert job_of(x, result, x.space(subspace)).unfinished["theta"].tolist() == [1.0] * 6


def test_prompts_that_started_from_the_nearest_of_other_collections_are_told_apart(x: Experiment, build: Build) -> None:
    prompts = save_prompts(x)
    for count in (2, 5):
        (choice,) = x.soft_prompts(["mood-good"], near=[*prompts.values()][:count]).values()
        save(x, choice, {"soft_prompt": made_up(x)["mood-good"]})
    warm = [score for score in build().wanted_scores() if score.header["stage"] == "warm start"]
    assert len({score.header["subspace"] for score in warm}) == len(warm) == 2


def test_a_seen_task_is_not_scored_in_a_space_that_was_made_without_it(x: Experiment, build: Build) -> None:
    prompts = save_prompts(x)
    small = save_subspace(x, {task: prompts[task] for task in ("mood-good", "animal-class")})
    for task in ("mood-good", "count-next"):
        (choice,) = x.intrinsic_vectors([task], 100, small).values()
        save(x, choice, {"intrinsic_vector": torch.zeros(6)})
    other = build()
    scores = other.wanted_scores()
    assert {score.header["task"] for score in scores if score.header["stage"] == "MSF"} == {"mood-good", "animal-class"}
    assert [score.header["task"] for score in scores if score.header["stage"] == "IST"] == ["mood-good"]
    assert told(other)[-1] == "not used: 1 intrinsic vectors of seen tasks in spaces that were made without them"


def test_a_vector_of_a_task_that_has_no_prompt_to_compare_with_is_said(x: Experiment, build: Build) -> None:
    subspace = save_subspace(x, save_prompts(x))
    (choice,) = x.intrinsic_vectors(["even-or-good"], 100, subspace).values()
    save(x, choice, {"intrinsic_vector": torch.zeros(6)})
    other = build()
    assert "even-or-good" not in {score.header["task"] for score in other.wanted_scores()}
    assert told(other) == ["not used: 1 intrinsic vectors of tasks without a soft prompt to compare with"]


def test_a_rate_that_is_given_twice_is_one(build: Build) -> None:
    (choice,) = build(learning_rate=[0.3, 0.1, 0.3]).soft_prompts(["mood-good"]).values()
    assert [result.header["learning_rate"] for result in choice] == [0.3, 0.1]


@pytest.mark.parametrize("dim", [4, 40])
@pytest.mark.parametrize("kind", ["subspace", "linear", "low-rank", "random"])
def test_a_plan_tells_about_how_large_the_file_of_a_space_will_be(x: Experiment, kind: Any, dim: int) -> None:
    space = x.subspace(kind, dim, save_prompts(x))
    x.make([space])
    assert 0 < x.store.path(space).stat().st_size - space.cost.size < 8000  # a header, biases


def test_a_space_that_needs_no_learning_is_described_where_the_cache_has_none(x: Experiment) -> None:
    prompts = save_prompts(x)
    for kind in ("linear", "random", "random-unscaled"):
        assert x.choose_subspace(kind, 3, "").name == x.subspace(kind, 3, prompts).name
    with pytest.raises(IptError, match="0 subspaces of dim 3 of these 5 tasks: run 'ipt fit-subspace --dim 3'"):
        x.choose_subspace("subspace", 3, "abcd")
    with pytest.raises(IptError, match="0 subspaces of dim 3 of these 5 tasks: run 'ipt fit-subspace --dim 3'"):
        x.choose_subspace("subspace", 3, "")
    with pytest.raises(IptError, match="0 subspaces of dim 3 of these 5 tasks: leave --subspace out"):
        x.choose_subspace("linear", 3, "abcd")


def test_linear_spaces_of_which_one_has_free_numbers_are_told_apart(x: Experiment) -> None:
    prompts = x.soft_prompts(x.named("seen"))
    of_all = x.subspace("linear", 4, prompts)
    of_few = x.subspace("linear", 4, {task: prompts[task] for task in ("mood-good", "count-next", "animal-class")})
    for spaces in ((of_all, of_few), (of_few, of_all)):
        told = differences(spaces)
        assert "free 0.5" in told[of_few.name] and "free 0," in told[of_all.name]


def test_what_tells_subspaces_apart_is_settings_or_the_prompts_that_they_are_of(x: Experiment, build: Build) -> None:
    prompts = x.soft_prompts(x.named("seen"))
    some = {task: choice for task, choice in prompts.items() if task != "count-next"}
    other = build(learning_rate=[0.5]).soft_prompts(x.named("seen"))
    one, few, more, noisy = (
        x.subspace("subspace", 6, prompts), x.subspace("subspace", 6, some), x.subspace("subspace", 6, other),
        build(noise=0.5, alpha=2.0).subspace("subspace", 6, prompts),
    )  # fmt: skip
    assert differences([]) == {}
    assert differences([one]) == differences([one, x.subspace("subspace", 5, prompts)]) == {}
    assert differences([one, noisy]) == {one.name: "alpha 10.0, noise 0.2", noisy.name: "alpha 2.0, noise 0.5"}
    words = differences([one, few])
    assert words[one.name].startswith("collection 5 tasks, prompts ") and words[few.name].startswith(
        "collection 4 tasks, prompts "
    )
    assert len(set(differences([one, more]).values())) == 2


def test_vectors_of_a_grid_are_one_choice_and_others_are_not(x: Experiment, build: Build) -> None:
    subspace = save_subspace(x, save_prompts(x))
    other = build(vector_learning_rate=[0.1, 0.3])
    for task, seed, start in (("mood-good", 21, "random"), ("day-then-count", 100, "random"), ("day-then-count", 100, "seen")):
        for choice in other.intrinsic_vectors([task], seed, subspace, start).values():
            save(x, choice, {"intrinsic_vector": torch.zeros(6)})
    found = build().found_vectors([subspace])
    about = [(choice[0].header["task"], choice[0].header["data_seed"], choice[0].header["start"]) for choice in found]
    assert sorted(about) == [("day-then-count", 100, "random"), ("day-then-count", 100, "seen"), ("mood-good", 21, "random")]
    assert all([r.header["learning_rate"] for r in choice] in ([0.1, 0.3], [0.3, 0.1]) for choice in found)
    assert all(r.inputs[0][0].name == subspace.name for choice in found for r in choice)


def test_vectors_in_subspaces_that_are_not_shown_and_of_other_rows_are_not_used(x: Experiment, build: Build) -> None:
    subspace = save_subspace(x, save_prompts(x))
    for by in (x, build(shots=5)):
        for choice in by.intrinsic_vectors(["mood-good"], 21, subspace).values():
            save(x, choice, {"intrinsic_vector": torch.zeros(6)})
    other = build()
    assert len(other.found_vectors([subspace])) == 1
    assert told(other) == ["not used: 1 intrinsic vectors of other rows"]
    other = build()
    assert other.found_vectors([]) == []
    assert told(other) == ["not used: 2 intrinsic vectors of subspaces or tasks that are not shown"]


def test_a_prompt_of_other_rows_that_started_nearby_is_told_as_a_prompt(x: Experiment, build: Build) -> None:
    collection = [*save_prompts(x).values()]
    for choice in build(shots=5).soft_prompts(["mood-good"], near=collection).values():
        save(x, choice, {"soft_prompt": torch.zeros(3, 16)})
    other = build()
    assert other.found_vectors([]) == []
    assert told(other) == ["not used: 1 soft prompts of other rows"]


def test_a_subspace_of_which_a_bit_is_another_costs_only_itself(x: Experiment, build: Build) -> None:
    prompts = save_prompts(x)
    good, bad = save_subspace(x, prompts), save_subspace(x, prompts, dim=5)
    path = x.store.path(bad)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    other = build(skip_missing=True)
    assert [subspace.name for subspace in other.found_subspaces()] == [good.name]
    assert "its checksum is another" in other.left_out[str(path)]
    with pytest.raises(IptError, match=r"holds 0 subspaces of dim 5 .*; .*/5-.*\(its checksum is another\): remove it"):
        other.choose_subspace("subspace", 5, "")


def test_a_subspace_stays_where_the_rows_of_one_of_its_tasks_cannot_be_had_now(x: Experiment, build: Build) -> None:
    subspace = save_subspace(x, save_prompts(x))
    other = build(skip_missing=True)
    other.leave_out({"mood-good": "its rows are gone"})
    assert [found.name for found in other.found_subspaces()] == [subspace.name]


def test_a_prompt_from_elsewhere_whose_header_lacks_fields_is_left_out(x: Experiment, build: Build) -> None:
    save_prompts(x)
    x.store.save(Made(Result(x.header("soft-prompt", start="subspace")), {}, {"soft_prompt": torch.zeros(3, 16)}))
    other = build(skip_missing=True)
    assert other.found_vectors([]) == []
    ((path, why),) = other.left_out.items()
    assert "remove it; field 'task' of its header must be text, not empty" in why and path in why


def test_vectors_whose_rows_are_gone_are_left_out_if_that_is_asked_for(x: Experiment, build: Build) -> None:
    subspace = save_subspace(x, save_prompts(x))
    for start in ("random", "seen", "nearest"):  # files of other names, some before and some behind that of the other seed
        for choice in x.intrinsic_vectors(["mood-good"], 100, subspace, start).values():
            save(x, choice, {"intrinsic_vector": torch.zeros(6)})
    for choice in x.intrinsic_vectors(["mood-good"], 21, subspace).values():
        save(x, choice, {"intrinsic_vector": torch.zeros(6)})

    def gone(data_seed: int, shots: int, test_rows: int | None) -> Sample:
        if data_seed == 21:
            raise IptError("the rows of seed 21 are gone")
        return x.tasks["mood-good"].draw(data_seed, shots, test_rows)

    for skip_missing in (False, True):
        other = build(skip_missing=skip_missing, cache=x.cache)
        shutil.rmtree(x.cache / "samples", ignore_errors=True)
        other.tasks = other.tasks | {"mood-good": dataclasses.replace(x.tasks["mood-good"], draw=gone)}
        if skip_missing:
            starts = [score.header["start"] for score in other.wanted_scores() if score.header["stage"] == "IST"]
            assert sorted(starts) == ["nearest", "random", "seen"]
            assert "the rows of seed 21 are gone" in other.left_out["mood-good"]
        else:
            with pytest.raises(
                IptError, match=r"cannot be had, leave them out with --skip-missing: the rows of seed 21 are gone"
            ):
                other.wanted_scores()


@pytest.mark.parametrize("wrong", [torch.zeros(5), torch.zeros(6).double(), torch.full((6,), math.nan)])
def test_a_vector_s_file_with_other_tensors_is_refused_wherever_it_is_used(x: Experiment, wrong: Tensor) -> None:
    subspace = save_subspace(x, save_prompts(x))
    ((result,),) = x.intrinsic_vectors(["mood-good"], 100, subspace).values()
    save(x, (result,), {"intrinsic_vector": wrong})
    with pytest.raises(IptError, match=r"mood-good-.* holds the tensors .*, expected \{'intrinsic_vector': \(6,\)\}, finite"):
        tuned_prompts(x, ["mood-good"], "vector")


def test_a_note_of_no_pass_size_at_all_ends_nothing(x: Experiment, build: Build) -> None:
    assert x.store
    x.backbone.budget.tokens += 1
    x.remember_budgets()
    (note,) = x.store.folder.glob("budgets/*.json")
    note.write_text("[[0, 1], [0, 1]]", encoding="utf-8")
    other = build()
    assert other.store and (other.backbone.budget.tokens, other.backbone.answer_budget.tokens) == (1, 1)
    other.make(other.scores(other.soft_prompts(["mood-good"]), [], [])[:1])


# --- Making --------------------------------------------------------------------------------------


def test_the_linear_space_is_a_file_and_is_read_back(x: Experiment, build: Build) -> None:
    prompts = save_prompts(x)
    x.make([x.subspace("linear", 3, prompts)])
    other = build()
    found = other.choose_subspace("linear", 3, "")
    assert other.store.path(found).name.startswith("3-")
    space = other.space(found)
    expected = linear_space(torch.stack(list(made_up(x).values())), x.prompt_space.initial_prompt, dim=3)
    assert (space.dim, space.unit) == (3, pytest.approx(expected.unit))
    for name, weight in expected.weights.items():
        torch.testing.assert_close(space.weights[name], weight)
    assert "hidden.weight" not in space.weights


def test_random_spaces_are_read_back_and_reach_as_far_as_learned_ones_or_do_not(x: Experiment) -> None:
    prompts = save_prompts(x)
    spaces = {kind: x.subspace(kind, 6, prompts) for kind in ("random", "random-unscaled")}
    x.make(spaces.values())
    vectors = torch.randn(500, 6, generator=torch.Generator().manual_seed(0))
    unit = unit_of(torch.stack(list(made_up(x).values())), x.prompt_space.initial_prompt)
    reach = {
        kind: unit_of(x.space(one).back_project(vectors), x.prompt_space.initial_prompt) / unit for kind, one in spaces.items()
    }
    assert reach["random"] == pytest.approx(1, rel=0.1)
    assert reach["random-unscaled"] < 0.5


def test_a_low_rank_space_has_nearly_as_many_numbers_as_were_asked_for_and_is_read_back(x: Experiment, build: Build) -> None:
    """3 rows of a rank of 2, beside 2 * 16 numbers for all rows."""
    prompts = save_prompts(x)
    one = x.subspace("low-rank", 39, prompts)
    assert one.header["dim"] == 3 * 2 + 2 * 16
    x.make([one])
    other = build()
    found = other.choose_subspace("low-rank", 39, "")
    assert found.name == one.name
    space = other.space(found)
    assert space.dim == 38 and space.weights.keys() == {"basis"}
    (vectors,) = other.intrinsic_vectors(["mood-good"], 100, found).values()
    assert len(start_of(other, vectors[0], space)) == 38


def test_the_mean_and_the_nearest_of_the_seen_prompts_are_scored_on_unseen_tasks(x: Experiment) -> None:
    save_prompts(x)
    prompts = {task: x.soft_prompts([task])[task] for task in x.named("seen")}
    unseen = x.soft_prompts(["even-or-good"])
    save(x, unseen["even-or-good"], {"soft_prompt": made_up(x)["mood-good"]})
    scores = x.scores(prompts | unseen, [x.subspace("random", 6, prompts)], [])
    wanted = {score.header["stage"]: score for score in scores if score.header["stage"] in ("mean", "nearest")}
    assert {score.header["task"] for score in wanted.values()} == {"even-or-good"}
    x.make(wanted.values())
    tensors = torch.stack(list(made_up(x).values()))
    train, _, test = x.encoded("even-or-good", 100)
    losses = [sum(a.loss for a in x.backbone.answer(prompt[None], [(0, row) for row in train])) for prompt in tensors]
    for stage, prompt in (("mean", tensors.mean(0)), ("nearest", tensors[losses.index(min(losses))])):
        answers = x.backbone.answer(prompt[None], [(0, row) for row in test])
        expected = METRICS["ACC"]([answer.text for answer in answers], [row.example.answers for row in test])
        assert x.store.read(wanted[stage])[0] == {"score": pytest.approx(expected), "n": 10}


def test_one_answer_for_all_is_the_training_answer_that_is_best_on_validation_rows(x: Experiment) -> None:
    tasks = load_tasks(x.options.tasks_file)
    scores = {task: score_of(x, "one answer for all", task) for task in tasks}
    x.make(scores.values())
    for name, task in tasks.items():
        train, validation, test = task.sample(100, 4, 10)
        metric = METRICS[task.metric]
        on_validation = {
            answer: metric([answer] * len(validation), [row.answers for row in validation])
            for answer in dict.fromkeys(row.answers[0] for row in train)
        }
        best = next(answer for answer, score in on_validation.items() if score == max(on_validation.values()))
        expected = metric([best] * len(test), [row.answers for row in test])
        assert x.store.read(scores[name])[0] == {"score": pytest.approx(expected), "n": 10}


def test_a_score_is_a_file_without_tensors(x: Experiment) -> None:
    score = score_of(x, "no prompt")
    x.make([score])
    record, tensors = x.store.read(score)
    assert (sorted(record), record["n"], tensors) == (["n", "score"], 10, {})
    assert json.dumps(score.header)


def test_what_is_best_of_a_grid_stays_when_a_rate_that_was_not_needed_is_made_later(build: Build) -> None:
    x = build(learning_rate=[0.1, 0.3])
    (choice,) = x.soft_prompts(["mood-good"]).values()
    prompts = list(made_up(x).values())
    assert [result.header["learning_rate"] for result in choice] == [0.3, 0.1], (
        "the largest rate is tried first, in whatever order"
    )
    x.store.save(Made(choice[0], {"validation": 1.0, "validation_loss": 0.5}, {"soft_prompt": prompts[0]}))
    assert x.store.missing(choice) == [] and x.store.best(choice)[0] is choice[0]
    x.store.save(Made(choice[1], {"validation": 1.0, "validation_loss": 0.1}, {"soft_prompt": prompts[1]}))
    assert x.store.best(choice)[0] is choice[0]


def test_a_cache_that_cannot_be_written_is_no_reason_to_leave_tasks_out(build: Build, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    x = build(cache=tmp_path / "cache", skip_missing=True)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "samples").write_text("in the way")
    with pytest.raises(IptError, match="cannot write"):
        x.with_rows(["mood-good"], 100)


def test_a_damaged_note_of_what_fits_into_memory_costs_only_itself(build: Build) -> None:
    x = build()
    x.store.folder.mkdir(parents=True, exist_ok=True)
    x.backbone.budget.tokens = 123
    x.remember_budgets()
    (note,) = x.store.folder.glob("budgets/*")
    note.write_bytes(b"half")
    other = build()
    other.remember_budgets()
    assert note.read_bytes() == b"half" and other.store.folder == x.store.folder
    other.backbone.budget.tokens = 456
    other.remember_budgets()
    assert b"456" in note.read_bytes()


# --- Headers that are not what they should be -----------------------------------------------------


@pytest.mark.parametrize("kind", ["soft-prompt", "subspace", "intrinsic-vector"])
def test_a_header_without_a_field_or_with_one_of_another_type_is_told_and_never_used(
    x: Experiment, build: Build, kind: str
) -> None:
    """The file has the name and the checksum that its header asks for, as one of another program would."""
    prompts = save_prompts(x)
    subspace = save_subspace(x, prompts)
    (vectors,) = x.intrinsic_vectors(["mood-good"], 21, subspace).values()
    save(x, vectors, {"intrinsic_vector": torch.zeros(6)})
    whole = {"soft-prompt": prompts["mood-good"][0], "subspace": subspace, "intrinsic-vector": vectors[0]}[kind]
    path = x.store.path(whole)
    header, record, tensors = read_file(path)
    path.unlink()
    wrong: list[dict[str, Any]] = [{k: v for k, v in header.items() if k != name} for name in header if name != "free"]
    odd = (None, {"a": 5}, [[]], "x", 5)
    wrong += [
        header | {k: v}
        for k in header
        for v in odd
        if type(v) is not type(header[k]) and {type(v), type(header[k])} != {int, float} and (k, v) != ("free", None)
    ]
    wrong += [
        header | {name: value}
        for name, value in (("backbone", "0" * 64), ("prompt_length", 4), ("version", 3), ("version", None))
    ]
    for changed in wrong:
        named = path.with_name(f"{changed.get('task', changed.get('dim'))}-{digest(changed)}.safetensors")
        write_file(named, changed, record, tensors)
        other = build()
        other.__dict__["backbone"] = x.backbone  # loading it takes longer than all else
        found = other.found_prompts(["mood-good"]), other.found_subspaces(), other.found_vectors([subspace])
        assert not found[["soft-prompt", "subspace", "intrinsic-vector"].index(kind)], changed
        assert any(str(named) in why for why in other.left_out.values()) or "not used: 1" in " ".join(told(other)), changed
        named.unlink()
    assert len(wrong) > 70


def test_a_subspace_whose_weights_are_of_another_dim_than_its_header_says_is_refused_by_name(x: Experiment) -> None:
    prompts = save_prompts(x)
    subspace = x.subspace("subspace", 6, prompts)
    space = untrained_space(x.prompt_space.initial_prompt, unit=2.5, dim=5, inner=13, seed=1)
    x.store.save(Made(subspace, {"unit": space.unit}, space.weights))
    with pytest.raises(IptError, match=rf"6-{subspace.name}\.safetensors holds weights of dim 5"):
        x.space(subspace)


# --- Test rows that were seen before -------------------------------------------------------------


def few_shot_folder(folder: Path, test: list[str], labels: str = "ab") -> Path:
    """Write few-shot files of a task whose training rows are 0 and 1, whose validation rows are 2 and 3."""
    (folder / "new").mkdir(parents=True)
    for seed in (13, 100):
        parts = {"train": ["0", "1"], "dev": ["2", "3"], "test": test}
        for part, inputs in parts.items():
            rows = [{"input": text, "output": labels[n % 2], "options": ["a", "b"]} for n, text in enumerate(inputs)]
            (folder / "new" / f"new_4_{seed}_{part}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


def test_test_rows_that_stand_among_the_others_are_counted_and_said_once_a_task(build: Build, tmp_path: Path) -> None:
    split = tmp_path / "split.yaml"
    split.write_text("seen: [new]", encoding="utf-8")
    x = build(data=few_shot_folder(tmp_path / "data", ["0", "3", "4", "5"]), split=str(split))
    for seed in (100, 13, 100):
        assert len(x.sample("new", seed).test) == 4
    assert told(x) == ["2 of 4 test rows of new are in train or validation (seed 100), too"]
    apart = build(data=few_shot_folder(tmp_path / "apart", ["4", "5"]), split=str(split))
    apart.sample("new", 100)
    assert told(apart) == []


def test_rows_of_a_world_never_stand_in_two_parts(x: Experiment) -> None:
    for task in x.tasks:
        x.sample(task, 100)
    assert told(x) == []


def test_one_validation_row_and_a_label_that_training_never_shows_give_scores_all_the_same(build: Build, tmp_path: Path) -> None:
    split = tmp_path / "split.yaml"
    split.write_text("seen: [new]", encoding="utf-8")
    folder = few_shot_folder(tmp_path / "data", ["4", "5", "6", "7"])
    for path in folder.glob("new/*_dev.jsonl"):
        path.write_text(json.dumps({"input": "2", "output": "a", "options": ["a", "b"]}), encoding="utf-8")
    for path in folder.glob("new/*_train.jsonl"):
        path.write_text(json.dumps({"input": "0", "output": "a", "options": ["a", "b"]}), encoding="utf-8")
    x = build(data=folder, split=str(split), steps=2, evaluations=1)
    prompts = x.soft_prompts(["new"])
    scores = x.scores(prompts, [], [])
    x.make([*prompts["new"], *scores])
    assert x.store.read(prompts["new"][0])[0]["validation"] in (0.0, 1.0), "one row is right or wrong"
    told_scores = {score.header["stage"]: x.store.read(score)[0] for score in scores}
    assert told_scores["one answer for all"] == {"score": 0.5, "n": 4}, "the label that never occurs in train is never right"
    assert all(0 <= record["score"] <= 1 and record["n"] == 4 for record in told_scores.values())


def test_a_subspace_of_a_grid_of_which_one_prompt_is_gone_is_not_used(build: Build) -> None:
    """The prompt that is gone may have been the best of its grid."""
    x = build(learning_rate=[0.1, 0.3])
    prompts = save_prompts(x)
    save_subspace(x, prompts)
    assert len(build().found_subspaces()) == 1
    x.store.path(prompts["mood-good"][1]).unlink()
    other = build()
    assert other.found_subspaces() == []
    assert told(other) == ["not used: 1 subspaces of soft prompts that are gone"]


def test_a_score_is_of_the_prompt_that_its_stage_names(x: Experiment) -> None:
    """MSF: there and back through the subspace. IST: the vector back-projected."""
    seen, unseen = save_prompts(x), x.soft_prompts(["even-or-good"])
    save(x, unseen["even-or-good"], {"soft_prompt": made_up(x, seed=1)["mood-good"]})
    subspace, theta = save_subspace(x, seen), torch.linspace(-1, 1, 6)
    (vector,) = x.intrinsic_vectors(["even-or-good"], 100, subspace).values()
    save(x, vector, {"intrinsic_vector": theta})
    space, prompts = x.space(subspace), made_up(x) | {"even-or-good": made_up(x, seed=1)["mood-good"]}
    checked = []
    for score in x.scores(seen | unseen, [subspace], [vector]):
        stage, own = score.header["stage"], prompts[score.header["task"]][None]
        expected = {"prompt tuning": own, "MSF": space.back_project(space.project(own)), "IST": space.back_project(theta[None])}
        if stage in expected:
            torch.testing.assert_close(makers.prompt_of(x, score), expected[stage][0])
            checked.append(stage)
    assert {stage: checked.count(stage) for stage in checked} == {"prompt tuning": 6, "MSF": 6, "IST": 1}


def test_a_two_stage_prompt_starts_from_the_learned_subspace_and_the_same_rows(x: Experiment) -> None:
    """However much better a vector of another space or of other rows is."""
    prompts = save_prompts(x)
    learned, rival = save_subspace(x, prompts), x.subspace("random", 6, prompts)
    x.make([rival])
    validations = {(learned.name, 100): 0.5, (learned.name, 21): 0.9, (rival.name, 100): 0.8}
    made = {}
    for (name, seed), validation in validations.items():
        (choice,) = x.intrinsic_vectors(["mood-good"], seed, learned if name == learned.name else rival).values()
        save(x, choice, {"intrinsic_vector": torch.full((6,), validation)}, validation)
        made[name, seed] = choice[0].name
    for seed in (100, 21):
        starts = warm_starts(x, "subspace", ["mood-good"], seed, None)
        assert starts["mood-good"]["start_prompt"] == made[learned.name, seed]
    best = tuned_prompts(x, ["mood-good"], "vector")["mood-good"]
    assert best.result.name == made[learned.name, 21]


def test_a_vector_of_the_dim_that_is_asked_for_answers(x: Experiment) -> None:
    prompts, names = save_prompts(x), dict[int, str]()
    for dim, validation in ((4, 0.5), (6, 0.9)):
        (choice,) = x.intrinsic_vectors(["mood-good"], 100, save_subspace(x, prompts, dim)).values()
        save(x, choice, {"intrinsic_vector": torch.zeros(dim)}, validation)
        names[dim] = choice[0].name
    found = {dim: tuned_prompts(x, ["mood-good"], "vector", {"dim": dim})["mood-good"].result.name for dim in (4, 6)}
    assert found == names


def test_how_many_rows_are_cut_is_said(build: Build) -> None:
    x = build(max_length=10)
    x.encoded("count-next", 100)
    assert told(x) == ["26 of 26 rows of count-next are cut to 10 tokens"]
