"""Intrinsic Prompt Tuning: many soft prompts, one small subspace, new tasks by tuning 250 numbers (arXiv 2110.07867).

load_backbone      a Backbone: a frozen language model, with its tokenizer
load_tasks         the tasks of a tasks file; a Task draws a Sample of Examples
Space, untrained_space, linear_space        theta -> soft prompts
tune, Job, TuneConfig                       tune prompts or intrinsic vectors, many at once
fit_subspace, SubspaceConfig                find the subspace of soft prompts
Experiment         all of it over a cache of results, as the command `ipt` does it
IptError           what every mistake that a person can mend ends in
"""

from intrinsic_prompt_tuning.backbone import Backbone, load_backbone
from intrinsic_prompt_tuning.errors import IptError
from intrinsic_prompt_tuning.experiment import Experiment
from intrinsic_prompt_tuning.finding import SubspaceConfig, fit_subspace
from intrinsic_prompt_tuning.spaces import Space, linear_space, untrained_space
from intrinsic_prompt_tuning.tasks import Example, Sample, Task, load_tasks
from intrinsic_prompt_tuning.tuning import Job, TuneConfig, tune

__all__ = [
    "Backbone", "Example", "Experiment", "IptError", "Job", "Sample", "Space", "SubspaceConfig", "Task", "TuneConfig",
    "fit_subspace", "linear_space", "load_backbone", "load_tasks", "tune", "untrained_space",
]  # fmt: skip
