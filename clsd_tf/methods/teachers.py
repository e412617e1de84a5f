"""Teachers that score every training row before the fit begins, by name."""

from clsd_tf.plugins.registry import Registry

# Name -> function of a ``clsd_tf.training.teachers.TeacherJob`` that gives the scores of all training rows.
TEACHERS = Registry(
    "teacher",
    {
        "cross_fit": "clsd_tf.training.teachers.cross_fit:cross_fit",
        "prequential": "clsd_tf.training.teachers.prequential:prequential",
        "scores": "clsd_tf.training.teachers.scores_file:scores_file",
    },
)
