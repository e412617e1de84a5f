"""Short forms of what training does in steps."""

from clsd_tf.training.fit import fit, prepare
from clsd_tf.training.teachers.stored import scores_of, scores_path


def fitted(dataset, config, work_dir, *, title=None, init_from=None, strategy=None, **arguments):
    """Prepares and fits a run -> (model with its best weights, history)."""
    run = prepare(dataset, config, work_dir, init_from=init_from, strategy=strategy)
    return run.model, fit(run, title=title, **arguments)


def teacher_scores(dataset, config, title=None):
    """The scores of a config's only teacher."""
    (run,) = config.teacher_runs
    return scores_of(dataset, config, run, title)


def scores_file(dataset, config):
    """Where they are kept."""
    (run,) = config.teacher_runs
    return scores_path(dataset, config, run)
