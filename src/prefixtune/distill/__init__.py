"""Distils a text into a prefix: the teacher has the text in its context, the student the prefix.

Reading order: `session` (from options to a result), `context` (what the teacher has before a question),
`questions` (given, or written by the model), `teacher` (its answers, and what it has where it gives them),
`comparison` (the prefix beside the text in the context and no text). Training is `prefixtune.train`'s.
"""

from prefixtune.distill.comparison import Contestant, closeness
from prefixtune.distill.context import Context
from prefixtune.distill.session import Distillation, distill

__all__ = ["Contestant", "Context", "Distillation", "closeness", "distill"]
