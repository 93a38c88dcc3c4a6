"""The paper's stages as descriptions of results: soft prompts, subspaces, intrinsic vectors, scores. Describing runs nothing."""

import copy
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any, Self

from intrinsic_prompt_tuning.context import COLLECTION_SEED, Context, Options, Start, sample_digest
from intrinsic_prompt_tuning.errors import IptError
from intrinsic_prompt_tuning.evaluation import GROUP
from intrinsic_prompt_tuning.files import digest
from intrinsic_prompt_tuning.finding import SubspaceConfig, check_dim
from intrinsic_prompt_tuning.makers import job_of, makers
from intrinsic_prompt_tuning.results import Choice, Cost, Result, collection_name, make, names
from intrinsic_prompt_tuning.settings import settled
from intrinsic_prompt_tuning.spaces import SpaceKind, coded_numbers, low_rank
from intrinsic_prompt_tuning.tasks import rows_digest
from intrinsic_prompt_tuning.tuning import pace_of


class Experiment(Context):
    """What can be made of a backbone, tasks and a cache, and what has been."""

    def soft_prompts(
        self, tasks: Iterable[str], data_seed: int = COLLECTION_SEED, starts: Mapping[str, dict[str, str]] | None = None,
        near: Sequence[Choice] = (),
    ) -> dict[str, Choice]:  # fmt: skip
        """Describe soft prompts of tasks (prompt tuning), one per learning rate and try.

        They start from the initial prompt, or as `starts` say, or from the nearest of the prompts `near`, as SPoT does (Vu et
        al., ACL 2022).
        """
        about, starts = {"start": "nearest", "collection": collection_name(near)} if near else {}, starts or {}
        return {task: self._tuned("soft-prompt", task, data_seed, about | starts.get(task, {}), *near) for task in tasks}

    def intrinsic_vectors(
        self, tasks: Iterable[str], data_seed: int, subspace: Result, start: Start = "random"
    ) -> dict[str, Choice]:
        """Describe an intrinsic vector of each task (IST), one per learning rate and try."""
        if start != "random" and subspace.header["space"] not in ("subspace", "linear"):
            raise IptError(
                f"--start {start} needs a space that prompts can be sent into, which a {subspace.header['space']} one is not"
            )
        about = {"space": subspace.header["space"], "dim": subspace.header["dim"], "start": start, "subspace": subspace.name}
        return {task: self._tuned("intrinsic-vector", task, data_seed, about, (subspace,)) for task in tasks}

    def _tuned(self, kind: str, task: str, data_seed: int, about: Mapping[str, Any], *inputs: Choice) -> Choice:
        """Describe what the engine makes on the rows of a task and data seed, one result per learning rate and try."""
        config, is_prompt, sample = self.tuning, kind == "soft-prompt", self.sample(task, data_seed)
        rates = self.rates.learning_rate if is_prompt else self.rates.vector_learning_rate
        of = {"task": task, "data_seed": data_seed, "metric": self.task(task).metric, "data": sample_digest(sample)}
        header = self.header(kind, tuning=asdict(config), **of, **about)
        trained, answered = config.steps * config.batch_size, config.evaluations * len(sample.validation)
        if header.get("start") == "nearest":
            answered += len(sample.train) * len(inputs if is_prompt else inputs[0][0].inputs)
        size = 4 * header.get("dim", self.prompt_space.dim)
        cost = Cost(trained, answered, (trained + answered) * self.row_tokens(sample.train), size, config.steps)
        choice: Choice = ()
        # The largest rate first: a task that is solved needs nothing else.
        for rate, number in itertools.product(sorted({*rates}, reverse=True), range(self.rates.tries)):
            which = {"learning_rate": rate} | ({"try": number} if number else {})
            choice += (Result(header | which, inputs, cost, instead_of=choice),)
        return choice

    def subspace(self, space: SpaceKind, dim: int, prompts: Mapping[str, Choice]) -> Result:
        """Describe a subspace of soft prompts (MSF), or one of those that need no learning.

        Raises:
            IptError: the dimension exceeds the prompt's.
        """
        dim = self._numbers(space, dim)
        config, n = self.fitting, self.prompt_space.dim
        prompts = dict(sorted(prompts.items()))  # as a header that was written and read has them
        collection = {task: names(choice) for task, choice in prompts.items()}
        # A space without free numbers has the name that it had before there were any.
        coded = coded_numbers(dim, len(prompts), config.free) if space in ("subspace", "linear") else dim
        more = {"free": config.free} if coded < dim else {"origin": "initial prompt"} if space == "random" else {}
        used = ("subspace_seed",) * (coded < dim) if space == "linear" else ("subspace_seed", "inner")
        about = {name: v for name, v in asdict(config).items() if name != "free" and (space == "subspace" or name in used)}
        header = self.header("subspace", space=space, dim=dim, prompts=collection, config=about, **more)
        learned = space == "subspace" and config.lm_loss
        rows = config.subspace_steps * min(config.tasks_per_step, len(prompts)) * config.rows_per_task * learned
        length = fmean(self.row_tokens(self.sample(task, COLLECTION_SEED).train) for task in prompts) if rows else 0
        steps = config.steps_before + config.subspace_steps if space == "subspace" else 0
        sizes = {"linear": n * (dim + coded), "low-rank": low_rank(self.prompt_space.initial_prompt, dim) * self.backbone.hidden}
        size = 4 * sizes.get(space, n * (dim + config.inner) + coded * config.inner)
        return Result(header, tuple(prompts.values()), Cost(rows, 0, rows * length, size, steps))

    def _numbers(self, space: SpaceKind, dim: int) -> int:
        """Return how many numbers a space of this dim has: dim itself, or as nearly that as a low-rank space can have."""
        initial = self.prompt_space.initial_prompt
        check_dim(dim, initial)
        return len(initial) * low_rank(initial, dim) + 2 * initial.shape[1] if space == "low-rank" else dim

    def scores(self, prompts: Mapping[str, Choice], subspaces: Iterable[Result], vectors: Iterable[Choice]) -> list[Result]:
        """Describe the test scores of prompts, of their reconstructions, of intrinsic vectors, and of what needs no tuning."""
        wanted = [self._score(stage, task) for stage in ("no prompt", "one answer for all") for task in prompts]
        wanted += [self._score("prompt tuning", task, choice) for task, choice in prompts.items()]
        by_name = {subspace.name: subspace for subspace in subspaces}
        collections = {digest(subspace.header["prompts"]): subspace.inputs for subspace in by_name.values()}
        for collection in collections.values():  # what a subspace must beat to mean anything, and nothing is tuned for
            unseen = [task for task in prompts if self.roles[task] != "seen"]
            wanted += [self._score(stage, task, *collection) for task in unseen for stage in ("mean", "nearest")]
        for subspace in by_name.values():
            if subspace.header["space"] == "subspace":
                own = dict(zip(subspace.header["prompts"], subspace.inputs, strict=True))
                for task, choice in prompts.items():
                    made = own.get(task, choice)  # of rows that the task has no more, it says nothing of the task
                    if made[0].header["data"] == choice[0].header["data"] and (task in own or self.roles[task] != "seen"):
                        wanted.append(self._score("MSF", task, made, (subspace,)))
        # One space after the other, as they are large; their tasks in the split's order, on which a bootstrap depends.
        order: dict[str | None, int] = {name: n for n, name in enumerate((None, *by_name, *prompts))}
        tuned = [choice for choice in vectors if choice[0].header["task"] in prompts]
        for choice in sorted(tuned, key=lambda it: (order.get(it[0].header.get("subspace"), 0), order[it[0].header["task"]])):
            header = choice[0].header
            stage = "IST" if "subspace" in header else "two-stage" if header["start"] == "subspace" else "warm start"
            wanted.append(self._score(stage, header["task"], choice, *(choice[0].inputs if stage == "IST" else ())))
        return wanted

    def _score(self, stage: str, task: str, *inputs: Choice) -> Result:
        """Describe one test score."""
        sample, about = self.sample(task, COLLECTION_SEED), dict[str, Any]()
        for choice in inputs:
            about |= {name: choice[0].header[name] for name in GROUP if name in choice[0].header}
        if stage in ("MSF", "IST"):
            about["subspace"] = inputs[1][0].name
        elif stage in ("mean", "nearest"):
            about |= {"space": stage, "dim": 0, "subspace": collection_name(inputs)}
        elif stage in ("two-stage", "warm start"):
            of = inputs[0][0].header.get("collection")  # tells apart what started from other prompts or vectors
            about |= {"space": "prompt", "dim": self.prompt_space.dim} | ({"subspace": of} if of else {})
        header = self.header(
            "score", stage=stage, task=task, metric=self.task(task).metric, test=rows_digest(sample.test),
            data=sample_digest(sample), of=[names(choice) for choice in inputs], **about,
        )  # fmt: skip
        if stage == "one answer for all":
            return Result(header, cost=Cost(steps=1))
        rows = len(sample.test) + (len(inputs) * len(sample.train) if stage == "nearest" else 0)
        return Result(header, inputs, Cost(0, rows, rows * self.row_tokens(sample.test), steps=1))

    def whole(self, dims: Sequence[int], data_seed: int) -> tuple[list[Result], list[Result]]:
        """Describe the whole experiment: the seen tasks' subspace and its rivals, on other data of theirs and on unseen tasks.

        Returns:
            All but the scores; the scores.

        Raises:
            IptError: the split has no seen tasks.
        """
        prompts = self.soft_prompts(self.with_rows(self.named("seen", "unseen"), COLLECTION_SEED))
        self.with_rows(self.named("seen"), data_seed)  # leaves out what has none
        collection = {task: prompts[task] for task in self.seen_tasks()}
        kinds: tuple[SpaceKind, ...] = ("subspace", "random")
        spaces = [self.subspace(kind, dim, collection) for kind in kinds for dim in dict.fromkeys(dims)]
        challenges = [(list(collection), data_seed), (self.named("unseen"), COLLECTION_SEED)]
        vectors = [choice for s in spaces for who, seed in challenges for choice in self.intrinsic_vectors(who, seed, s).values()]
        tuned = [result for choice in (*prompts.values(), *vectors) for result in choice]
        return [*tuned, *spaces], self.scores(prompts, spaces, vectors)

    def with_seeds(self, n: int) -> Self:
        """Return the experiment with the n-th next seeds: other orders of rows, starts of vectors, subspaces and random words."""
        other = copy.copy(self)  # with the backbone, the rows and the split as they are
        other.given = self.given | {"seed": self.options.seed + n, "subspace_seed": self.fitting.subspace_seed + n}
        other.options, other.fitting = settled(Options, other.given), settled(SubspaceConfig, other.given)
        vars(other).pop("prompt_space", None)
        return other

    # --- Making them

    def make(self, results: Iterable[Result], *, dry_run: bool = False) -> None:
        """Make what the cache lacks of some results, or only tell what that takes, measuring a few steps."""
        make(self.store, results, makers(self), self.report, pace=self._pace if dry_run else None)

    def _pace(self, results: Sequence[Result]) -> tuple[float, float]:
        """Return seconds per row trained and per row answered, measured once on at most 16 samples of results."""
        if self._measured is None:
            asked = ((r.header, task) for r in results for task in r.header.get("prompts", [r.header.get("task")]))
            rows = list(dict.fromkeys((task, header.get("data_seed", COLLECTION_SEED)) for header, task in asked))
            some = [self.soft_prompts([task], seed)[task] for task, seed in rows[:: -(-len(rows) // 16)]]
            jobs = [job_of(self, choice[0], self.prompt_space) for choice in some]
            self._measured = pace_of(self.backbone, self.prompt_space, jobs, self.tuning, self.options.decoding)
        return self._measured

    # --- Finding them in the cache

    def found(self, kind: str, *, aloud: bool = True) -> list[Result]:
        """Return what the cache holds of a kind that was made with these options; say what is left out, and why."""
        results, unusable = self.store.found(kind)
        self.leave_out(unusable)
        shared = self.header(kind)

        def why_not(result: Result) -> str:
            differing = [name for name in (*shared, "initial_text") if result.header.get(name) != shared.get(name)]
            return f"another {differing[0]}" if differing else ""

        return self._used(results, why_not, aloud=aloud)

    def _used(self, results: Iterable[Result], why_not: Callable[[Result], str], *, aloud: bool = True) -> list[Result]:
        """Return the results that nothing speaks against; say of how many others what does."""
        reasons = [(result, why_not(result)) for result in results]
        for (kind, why), count in Counter((result.kind, why) for result, why in reasons if why and aloud).items():
            self.say_once(f"not used: {count} {kind.replace('-', ' ')}s of {why}")
        return [result for result, why in reasons if not why]

    def _why_outdated(self, result: Result) -> str:
        """Return why a tuned result is not of the rows and the metric that its task has now; nothing if it is."""
        header = result.header
        same = header["data"] == sample_digest(self.sample(header["task"], header["data_seed"]))
        return "" if same and header["metric"] == self.task(header["task"]).metric else "other rows"

    def found_prompts(self, tasks: Iterable[str]) -> dict[str, Choice]:
        """Return, for each task that has one in the cache, its soft prompts, whatever settings they were tuned with.

        Raises:
            IptError: rows cannot be had of a task that has prompts.
        """
        plain = [r for r in self.found("soft-prompt") if r.header["data_seed"] == COLLECTION_SEED and "start" not in r.header]
        made = {result.header["task"] for result in plain}  # prompts of other data or from elsewhere are no baseline
        had: dict[str, Choice] = dict.fromkeys(self.with_rows([task for task in tasks if task in made], COLLECTION_SEED), ())
        for result in self._used((r for r in plain if r.header["task"] in had), self._why_outdated):
            had[result.header["task"]] += (result,)
        return {task: choice for task, choice in had.items() if choice}

    def collected(self) -> dict[str, Choice]:
        """Return the soft prompts of the seen tasks.

        Raises:
            IptError: a seen task has none; nothing is ever put in its place.
        """
        found = self.found_prompts(self.seen_tasks())
        missing = [task for task in self.named("seen") if task not in found]
        if not found or (missing and not self.options.skip_missing):
            some = ", ".join(missing[:5]) + " ..." * (len(missing) > 5)
            told = f"{len(missing)} seen tasks of the split {self.options.split} have no soft prompt in {self.store.folder}"
            remedy = "run 'ipt collect' with the same options first" + ", or leave them out with --skip-missing" * bool(found)
            raise IptError("; ".join([f"{told} ({some}): {remedy}", *self.left_out.values()]))
        self.leave_out({task: f"the seen task '{task}' has no soft prompt" for task in missing})
        return found

    def found_subspaces(self) -> list[Result]:
        """Return the subspaces of this split's seen tasks whose soft prompts the cache still holds."""
        prompts = {result.name: result for result in self.store.found("soft-prompt")[0]}
        seen = {task for task, role in self.roles.items() if role == "seen"}  # also those whose rows cannot be had now
        found = [
            Result(subspace.header, tuple(self.store.complete(own, prompts) for own in subspace.header["prompts"].values()))
            for subspace in self.found("subspace")
        ]

        def why_not(subspace: Result) -> str:
            if not subspace.header["prompts"].keys() <= seen:
                return "another split's tasks"
            if subspace.header["space"] == "random" and "origin" not in subspace.header:
                return "another origin, random ones of older versions"
            return "" if all(subspace.inputs) else "soft prompts that are gone"

        return self._used(found, why_not)

    def choose_subspace(self, space: SpaceKind, dim: int, name: str) -> Result:
        """Return the subspace of the cache that is meant, or describe one that needs no learning.

        Raises:
            IptError: there is none, or several, and `name`, the beginning of one's name, does not say which.
        """
        numbers = self._numbers(space, dim)
        found = [s for s in self.found_subspaces() if (s.header["space"], s.header["dim"]) == (space, numbers)]
        chosen = [subspace for subspace in found if subspace.name.startswith(name)]
        if not name:  # that of all seen tasks, before those of fewer
            whole = [subspace for subspace in chosen if subspace.header["prompts"].keys() == {*self.named("seen")}]
            chosen = whole or (chosen if self.options.skip_missing else [])
        if len(chosen) == 1:
            return chosen[0]
        if not (chosen or name or space == "subspace"):
            return self.subspace(space, dim, self.collected())
        if not found:
            remedy = f"run 'ipt fit-subspace --dim {dim}'" if space == "subspace" else "leave --subspace out"
            none = f"the cache holds 0 subspaces of dim {dim} of these {len(self.collected())} tasks: {remedy}"
            raise IptError("; ".join([none, *self.left_out.values()]))
        none = "" if chosen or name else f", none of them of all {len(self.named('seen'))} seen tasks"
        told = differences(found)
        known = "; ".join(f"{s.name[:8]} ({told.get(s.name) or f'{len(s.inputs)} tasks'})" for s in found)
        raise IptError(f"the cache holds {len(found)} subspaces of dim {dim}{none}: name one with --subspace: {known}")

    def found_vectors(self, subspaces: Iterable[Result], tasks: Sequence[str] = ()) -> list[Choice]:
        """Return vectors in these subspaces and prompts that started from others: choices by task, data seed, start, subspace.

        Of tasks that are named, also prompts of other data seeds, which are no baseline.
        """
        known: dict[str | None, Choice] = {subspace.name: (subspace,) for subspace in subspaces} | {None: ()}
        warm = [
            prompt for prompt in self.found("soft-prompt", aloud=False)
            if "start" in prompt.header or (tasks and prompt.header["data_seed"] != COLLECTION_SEED)
        ]  # fmt: skip
        found = [result for result in (*self.found("intrinsic-vector"), *warm) if not tasks or result.header["task"] in tasks]
        rows, left_out = dict[tuple[str, int], bool](), {*self.left_out}

        def why_not(result: Result) -> str:
            task, seed, space = result.header["task"], result.header["data_seed"], known.get(result.header.get("subspace"))
            if task not in (tasks or self.roles) or space is None:
                return "subspaces or tasks that are not shown"
            if not tasks and self.roles[task] == "seen" and space and task not in space[0].header["prompts"]:
                return "seen tasks in spaces that were made without them"
            if (task, seed) not in rows:
                rows[task, seed] = task not in left_out and bool(self.with_rows([task], seed))
            return self._why_outdated(result) if rows[task, seed] else "rows that cannot be had"

        choices: dict[tuple[Any, ...], list[Result]] = {}
        for result in self._used(found, why_not):
            key = tuple(result.header.get(name) for name in ("task", "data_seed", "start", "subspace", "collection"))
            space = known[result.header.get("subspace")]
            choices.setdefault(key, []).append(Result(result.header, (space,) if space else ()))
        return [tuple(results) for results in choices.values()]

    def wanted_scores(self, task: str = "") -> list[Result]:
        """Describe the scores of all that the cache holds of the split's tasks, or of one of them.

        Raises:
            IptError: there is no soft prompt to compare with, or the task is not in the split.
        """
        if task and self.task(task).name not in self.roles:
            raise IptError(f"the task '{task}' is not in the split {self.options.split}: name another with --split")
        prompts = self.found_prompts(self.named("seen", "unseen"))
        if not prompts or task not in ("", *prompts):
            what = task or f"the split {self.options.split}"
            told = f"{self.store.folder} holds no soft prompt of {what}: run 'ipt collect' first"
            raise IptError("; ".join([told, *self.left_out.values()]))
        subspaces = self.found_subspaces()
        for made in subspaces:
            own = [choice for choice in made.inputs if choice[0].header["task"] in prompts]
            if old := sum(any(map(self._why_outdated, choice)) for choice in own):
                told = f"{old} of its {len(made.inputs)} soft prompts are of other rows than their tasks have now"
                self.say_once(f"subspace {made.name[:8]}: {told}")
        vectors = self.found_vectors(subspaces)
        alone = "tasks without a soft prompt to compare with"  # whose scores are not described either
        self._used(itertools.chain(*vectors), lambda result: "" if result.header["task"] in prompts else alone)
        return [s for s in self.scores(prompts, subspaces, vectors) if task in ("", s.header["task"])]


def differences(subspaces: Iterable[Result]) -> dict[str, str]:
    """Return name -> what tells a subspace from others of its space and dim, in words; nothing where there is one of each."""
    groups: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    for header, name in ((subspace.header, subspace.name) for subspace in subspaces):
        collection = f"{len(header['prompts'])} tasks, prompts {digest(header['prompts'])[:8]}"
        about = header["config"] | {"free": header.get("free", 0), "collection": collection}
        groups.setdefault((header["space"], header["dim"]), {})[name] = about
    told = dict[str, str]()
    for group in (group for group in groups.values() if len(group) > 1):
        fields = dict.fromkeys(itertools.chain(*group.values()))  # a linear space has a seed where it has free numbers alone
        varying = [field for field in fields if len({str(own.get(field)) for own in group.values()}) > 1]
        told |= {name: ", ".join(f"{field} {own[field]}" for field in varying if field in own) for name, own in group.items()}
    return told
