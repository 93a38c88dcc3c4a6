"""How results of each kind are made: by the engine, by subspace finding, on test rows."""

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

from intrinsic_prompt_tuning.backbone import Encoded
from intrinsic_prompt_tuning.context import COLLECTION_SEED, Context
from intrinsic_prompt_tuning.files import digest
from intrinsic_prompt_tuning.finding import SubspaceConfig, fit_subspace
from intrinsic_prompt_tuning.lazy import Tensor, torch
from intrinsic_prompt_tuning.metrics import METRICS
from intrinsic_prompt_tuning.results import AfterStep, Choice, Made, Maker, Result, collection_name
from intrinsic_prompt_tuning.spaces import Space, fair_space, linear_space, low_rank_space, unit_of, untrained_space
from intrinsic_prompt_tuning.tasks import Sample
from intrinsic_prompt_tuning.tuning import Job, JobTable, TuneConfig, tune

Question = tuple[Result, Tensor, Encoded]  # a score, its prompt, a test row


def makers(x: Context) -> dict[str, Maker]:
    """Return kind -> how its results are made, in the method's order: each is a function of those before it."""
    made_by = {"soft-prompt": make_tuned, "subspace": make_subspaces, "intrinsic-vector": make_tuned, "score": make_scores}
    return {kind: partial(maker, x) for kind, maker in made_by.items()}


def job_of(x: Context, result: Result, space: Space) -> Job:
    """Return what the engine is to do for a soft prompt or an intrinsic vector."""
    header = result.header
    about = {name: header[name] for name in ("task", "metric", "data_seed", "learning_rate", "seed")}
    state = x.store.unfinished(result)
    theta = torch.zeros(space.dim) if state else start_of(x, result, space)  # what goes on looks for no start
    rows = x.encoded(header["task"], header["data_seed"])[:2]
    return Job(**about, of=result, number=header.get("try", 0), theta=theta, rows=rows, unfinished=state)


def start_of(x: Context, result: Result, space: Space) -> Tensor:
    """Return where theta starts: zero for a prompt, or what its header says; a vector N(0, 0.02), or near those of seen tasks."""
    header = result.header
    if "start_prompt" in header:
        return space.project(x.starts[header["start_prompt"]][None])[0]
    if "start" not in header:
        return torch.zeros(space.dim)
    collection = result.inputs if result.kind == "soft-prompt" else result.inputs[0][0].inputs
    if header["start"] == "nearest":  # the n-th try from the n-th nearest
        found = nearest_prompts(x, collection, header["task"], header["data_seed"], x.rates.tries)
        return space.project(found[header.get("try", 0) % len(found)][None])[0]
    seed = digest({name: header[name] for name in ("task", "data_seed", "seed", "try") if name in header})
    generator = torch.Generator().manual_seed(int(seed, 16) % 2**63)
    if header["start"] == "random":
        return 0.02 * torch.randn(space.dim, generator=generator)
    seen = space.project(x.prompts(collection))
    mix = torch.randn(len(seen), generator=generator).to(seen) / math.sqrt(len(seen))
    return seen.mean(0) + mix @ (seen - seen.mean(0))  # normal, with the seen vectors' mean and covariance


def make_tuned(x: Context, results: Iterator[Result], after_step: AfterStep) -> Iterator[Made]:
    """Tune soft prompts or intrinsic vectors: the one engine."""
    first, o, done = next(results), x.options, 0
    is_prompt, config = first.kind == "soft-prompt", TuneConfig(**first.header["tuning"])
    space = x.prompt_space if is_prompt else x.space(first.inputs[0][0])
    jobs = (job_of(x, result, space) for result in itertools.chain((first,), results))

    def step(table: JobTable) -> None:
        snapshot, steps = table.snapshot(), float(table.state["step"].sum()) + done * config.steps
        after_step(lambda: {job.of: state for job, state in snapshot().items()}, steps)

    def told(job: Job, figures: dict[str, float]) -> None:
        header = job.of.header
        about = {name: header[name] for name in ("kind", "task", "data_seed", "space", "dim", "try") if name in header}
        x.report.log("validation", **about, learning_rate=job.learning_rate, **figures)

    for tuned in tune(x.backbone, space, jobs, config, slots=o.slots, decoding=o.decoding, on_step=step, on_validation=told):
        done += 1
        tensors = {"soft_prompt": tuned.soft_prompt} if is_prompt else {"intrinsic_vector": tuned.theta}
        yield Made(tuned.job.of, tuned.record | x.answering(tuned.job.task, tuned.job.data_seed), tensors)


def make_subspaces(x: Context, results: Iterator[Result], after_step: AfterStep) -> Iterator[Made]:
    """Find subspaces, one after the other, of which one at a time is in memory."""
    done = 0.0
    for result in results:
        yield _learned(x, result, after_step, done) if result.header["space"] == "subspace" else _unlearned(x, result)
        done += result.cost.steps


def _learned(x: Context, result: Result, after_step: AfterStep, done: float) -> Made:
    """Find a subspace."""
    rows = [x.encoded(choice[0].header["task"], COLLECTION_SEED)[0] for choice in result.inputs]
    space, record = fit_subspace(
        x.backbone, x.prompts(result.inputs), x.prompt_space.initial_prompt, rows, result.header["dim"],
        _config(result), unfinished=x.store.unfinished(result),
        on_step=lambda fit: after_step(lambda: {result: state} if (state := fit.state()) else {}, done + fit.step),
    )  # fmt: skip
    return Made(result, {"unit": space.unit} | record, space.weights)


def _config(subspace: Result) -> SubspaceConfig:
    return SubspaceConfig(**subspace.header["config"], free=subspace.header.get("free", 0.0))


def _unlearned(x: Context, result: Result) -> Made:
    """Make a space that needs no learning."""
    initial, kind, dim = x.prompt_space.initial_prompt, result.header["space"], result.header["dim"]
    prompts, config = x.prompts(result.inputs), _config(result)
    seed = config.subspace_seed
    if kind == "linear":
        space = linear_space(prompts, initial, dim=dim, free=config.free, seed=seed)
    elif kind == "low-rank":
        space = low_rank_space(initial, unit=x.prompt_space.unit, dim=dim, seed=seed)
    else:
        space = untrained_space(initial, unit=unit_of(prompts, initial), dim=dim, inner=config.inner, seed=seed)
        space = fair_space(space, seed) if kind == "random" else space
    return Made(result, {"unit": space.unit}, space.weights)


def make_scores(x: Context, results: Iterator[Result], after_step: AfterStep) -> Iterator[Made]:
    """Score prompts on test rows, rows of many prompts at a time."""
    said, done, more = dict[Result, list[str]](), 0, True
    rows = _unanswered(x, results, said)
    while more:
        more = _answer_some(x, rows, said)
        for score, answers in list(said.items()):
            test = x.sample(score.header["task"], COLLECTION_SEED).test
            if len(answers) == len(test):
                value = METRICS[score.header["metric"]](answers, [e.answers for e in test])
                yield Made(score, {"score": value, "n": len(test)}, {})
                del said[score]
                done += 1
        after_step(lambda: {score: {"said": torch.tensor(list(json.dumps(said[score]).encode()))} for score in said}, done)


def _unanswered(x: Context, scores: Iterator[Result], said: dict[Result, list[str]]) -> Iterator[Question]:
    """Yield the test rows of scores that have no answer yet, each with its prompt; begin `said` with the answers there are."""
    for score in scores:
        task = score.header["task"]
        if score.header["stage"] == "one answer for all":
            said[score] = _one_answer(x.sample(task, COLLECTION_SEED), score.header["metric"])
            continue
        state = x.store.unfinished(score)
        said[score] = json.loads(bytes(state["said"].tolist())) if state else []
        prompt = prompt_of(x, score)
        yield from ((score, prompt, row) for row in x.encoded(task, COLLECTION_SEED)[2][len(said[score]) :])


def prompt_of(x: Context, score: Result) -> Tensor:
    """Return the prompt that a score is of: (prompt_length, hidden)."""
    stage = score.header["stage"]
    if stage == "nearest":
        return nearest_prompts(x, score.inputs, score.header["task"], COLLECTION_SEED)[0]
    if stage == "mean":
        return x.prompts(score.inputs).mean(0)
    if stage == "MSF":
        space = x.space(score.inputs[1][0])
        return space.back_project(space.project(x.tuned(score.inputs[0])[None]))[0]
    return x.tuned(score.inputs[0]) if score.inputs else x.prompt_space.initial_prompt[:0]


def _answer_some(x: Context, rows: Iterator[Question], said: dict[Result, list[str]]) -> bool:
    """Answer as many rows as fill four passes, so that rows of like length meet; tell whether there were any."""
    piece, tokens = list[Question](), 4 * x.backbone.answer_budget.tokens
    while tokens > 0 and (row := next(rows, None)):
        piece.append(row)
        tokens -= len(row[1]) + len(row[2])
    for _, group in itertools.groupby(piece, key=lambda row: len(row[1])):
        own = list(group)
        prompts = {score: prompt for score, prompt, _ in own}
        pairs = [(list(prompts).index(score), row) for score, _, row in own]
        answers = x.backbone.answer(torch.stack(list(prompts.values())), pairs, decoding=x.options.decoding, losses=False)
        for (score, *_), answer in zip(own, answers, strict=True):
            said[score].append(answer.text)
    return bool(piece)


def answers_of(x: Context, scores: Iterable[Result]) -> dict[str, list[str]]:
    """Return what is answered to the test rows behind the prompts that scores are of, by the scores' names."""
    said = dict[Result, list[str]]()
    rows = _unanswered(x, iter(scores), said)
    while _answer_some(x, rows, said):
        pass
    return {score.name: answers for score, answers in said.items()}


def _one_answer(sample: Sample, metric: str) -> list[str]:
    """Return for every test row the training answer that, given to every row, scores best on the validation rows."""
    known = dict.fromkeys(example.answers[0] for example in sample.train)
    references = [example.answers for example in sample.validation]
    return [max(known, key=lambda answer: METRICS[metric]([answer] * len(references), references))] * len(sample.test)


def nearest_prompts(x: Context, collection: Sequence[Choice], task: str, data_seed: int, count: int = 1) -> Tensor:
    """Return the prompts of a collection with the least losses on a task's training rows, the least first: retrieval."""
    prompts, (train, *_) = x.prompts(collection), x.encoded(task, data_seed)
    key = task, data_seed, collection_name(collection)
    if len(x.nearest.get(key, ())) < min(count, len(prompts)):
        x.nearest[key] = _nearest(x, prompts, train, count)
    return prompts[x.nearest[key][:count]]


def _nearest(x: Context, prompts: Tensor, train: Sequence[Encoded], count: int) -> list[int]:
    """Find the numbers of the prompts with the least losses.

    A loss grows with every row. So a prompt that has lost more on some rows than `count` others on all of them is out.
    """
    losses, every, piece = torch.zeros(len(prompts), len(train)), list(range(len(prompts))), -(-len(train) // 8)

    def look(which: list[int], rows: slice) -> None:
        pairs = [(at, row) for at in which for row in train[rows]]
        found = torch.tensor([answer.loss for answer in x.backbone.answer(prompts, pairs, decoding=None)]).nan_to_num(math.inf)
        losses[which, rows] = found.view(len(which), -1)

    look(every, slice(piece))
    first = losses.sum(1).argsort(stable=True)[:count].tolist()
    look(first, slice(piece, None))
    most, others = losses[first].sum(1).max(), [at for at in every if at not in first]
    for begin in range(piece, len(train), piece):
        if others := [at for at in others if losses[at].sum() <= most]:
            look(others, slice(begin, begin + piece))
    return sorted([*first, *others], key=lambda at: float(losses[at].mean()))[:count]
