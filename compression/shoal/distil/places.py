"""Where models are while a student learns: in memory, or, if they came with their blocks on disk, spread over the ranks.

Which of the two it is, the run does not see: a place gives the student that learns, and takes it back when it has learned.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext

from transformers import PreTrainedModel

from shoal.distil.trainable import merge_trained
from shoal.large.on_disk import copy_model, is_on_disk
from shoal.large.shard import Shards, collect, spread


class InMemory:
    """The student itself learns."""

    opened = nullcontext

    def __init__(self, student: PreTrainedModel):
        self.learner, self.dtype = student, student.dtype

    def bring_back(self) -> PreTrainedModel:
        """The student with what it learned merged, in evaluation mode and its first dtype."""
        merge_trained(self.learner)
        self.learner.gradient_checkpointing_disable()
        for parameter in self.learner.parameters():
            parameter.requires_grad_(False)
            parameter.data = parameter.data.to(self.dtype)
        return self.learner.eval()


class OnRanks:
    """A copy of the student learns, of which each rank holds a share: nobody has to hold a whole one.

    Once a module has been `opened`, for the choice of what is trained in it, it is spread.
    """

    def __init__(self, student: PreTrainedModel):
        self.student, self.learner = student, copy.deepcopy(student)
        self.opened = Shards(student.device).of

    def bring_back(self) -> PreTrainedModel:
        """The student, with what its copy learned on disk: on rank 0, the others' is as it came."""
        collect(self.learner, self.student, merge_trained)
        return self.student


def place_student(student: PreTrainedModel) -> InMemory | OnRanks:
    """The place where this student learns. Raises ValueError if it is on disk, and there is no process group."""
    return OnRanks(student) if is_on_disk(student) else InMemory(student)


def place_teacher(teacher: PreTrainedModel) -> PreTrainedModel:
    """The teacher as it came, or a copy that is spread. Raises ValueError if there is no process group for that."""
    return spread(copy_model(teacher)) if is_on_disk(teacher) else teacher
